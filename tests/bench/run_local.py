"""What somebody gets who clones the project and types `./run_local.sh`, as a committed table.

    python tests/bench/run_local.py           # two fresh clones of HEAD, with and without a C++ compiler
    python tests/bench/run_local.py --table   # write the table again from the raw lines

Each run begins with nothing but the clone: no environment, no shards, no inductor cache. The order-0 entropy
is that of the validation tokens; a bpb well below it is what the model has learned.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, Bench, facts, parser_for

BENCH = Bench("run_local")
COMPILERS = re.compile(r"(\S+-)?(cc|c\+\+|gcc|g\+\+|clang|clang\+\+)(-[\d.]+)?")


def path_without_compilers(folder: Path) -> str:
    """A PATH of links to all that the present one has, but for C and C++ compilers."""
    folder.mkdir()
    for place in os.environ["PATH"].split(":"):
        for tool in Path(place).glob("*"):
            link = folder / tool.name
            if not COMPILERS.fullmatch(tool.name) and not link.exists():
                link.symlink_to(tool)
    return str(folder)


def run(compiler: bool) -> dict:
    """Clone HEAD, run it once -> a raw line. Its own output goes on to the terminal."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clone = folder / "clone"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        kept = {key: os.environ[key] for key in ("HOME", "LANG") if key in os.environ}
        path = os.environ["PATH"] if compiler else path_without_compilers(folder / "bin")
        fresh = {"RUN_DIR": "runs/bench", "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
        begin = time.monotonic()
        subprocess.run(["./run_local.sh"], cwd=clone, env={**kept, **fresh, "PATH": path}, check=True)
        seconds = time.monotonic() - begin
        results = json.loads((clone / "runs/bench/results.json").read_text())
    return {
        **facts("date"),
        "compiler": compiler,
        "seconds": round(seconds),
        **facts("cpu", "cores"),
        "source": results["source_sha256"][:16],
        **{key: results[key] for key in ("dtype", "steps", "tokens_per_second", "order0_bpb")},
        **{key: results[key] for key in ("train_seconds", "bytes", "versions")},
        "bpb": {name: score["val_bpb"] for name, score in results["scores"].items()},
    }


def render(rows: list[dict]) -> str:
    head = [
        "# A fresh clone and one command",
        "",
        "`python tests/bench/run_local.py`: clone, then `./run_local.sh` with no environment, no shards and "
        "no compiled code on the machine. *in all* is from the command to its end, installation included; "
        "*order 0* is the entropy of the validation tokens in bits per byte. Latest first.",
        "",
        "| date | C++ compiler | in all | steps | tokens/s | bpb before and after quantisation | order 0 | "
        "after/order 0 | bytes | where |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(table_row(r) for r in reversed(rows))]) + "\n"


def table_row(r: dict) -> str:
    before, after = r["bpb"]["pre_quant"], r["bpb"]["roundtrip"]
    machine = f"{r['cores']} cores of {r['cpu']}, torch {r['versions']['torch']}"
    cells = [
        r["date"],
        "yes" if r["compiler"] else "no",
        f"{r['seconds'] // 60} min {r['seconds'] % 60} s",
        str(r["steps"]),
        f"{r['tokens_per_second']:,.0f}",
        f"{before:.4f}, {after:.4f}",
        f"{r['order0_bpb']:.4f}",
        f"{after / r['order0_bpb']:.2f}",
        f"{r['bytes']['total']:,}",
        f"{machine}, {r['dtype']}, source {r['source'][:8]}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = parser_for(__doc__)
    if not parser.parse_args().table:
        if shutil.which("git") is None:
            parser.error("needs git on the PATH, to clone the project")
        for compiler in (True, False):
            BENCH.add(run(compiler))
    BENCH.write_table(render)
    return 0


if __name__ == "__main__":
    sys.exit(main())
