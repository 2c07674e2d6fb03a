"""Everything a GPU can tell, in one command of less than nine minutes: what was aimed at, what was reached.

    python tests/bench/gpu_suite.py                            # all sections, to runs/gpu_suite
    python tests/bench/gpu_suite.py --only training --out DIR
    python tests/bench/gpu_suite.py --dry                      # the same code at tiny sizes on a CPU

Sections run one after another in a child process, each in a box of seconds. One that raises, hangs or takes
the device down has that as its result, and the next one gets a new child. Every line goes to
DIR/gpu_suite.jsonl the moment it is known; the table, DIR/gpu_suite.md, is made from those lines alone. To
keep a run, move them to records/bench/raw and records/bench. It wants torch, triton, numpy and sentencepiece.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
START = 90.0  # seconds in which a child has to import torch and find its device
WHOLE = 530.0  # of the command
MARK = "== a child for"  # begins what a child says in the log
SOFT = 2.0  # seconds before its box ends in which a section puts down its pen
NOT_RUN = "Not run on a GPU.\n\n    python tests/bench/gpu_suite.py\n"


class Section(NamedTuple):
    box: float  # seconds
    load: Callable[[], Callable]  # gives its function; asked in the child alone, for it brings torch


def of_sections(name: str) -> Section:
    """A section of gpu_sections.py or kernels.py, by its function."""

    def load() -> Callable:
        import gpu_sections
        import kernels

        functions = (gpu_sections.ceilings, gpu_sections.correctness, kernels.cross_entropy, kernels.mlp,
                     gpu_sections.attention, gpu_sections.muon, gpu_sections.training, gpu_sections.artifact)
        return {function.__name__: function for function in functions}[name]

    return Section(BOXES[name], load)


BOXES = {
    "ceilings": 20.0,
    "correctness": 60.0,
    "cross_entropy": 90.0,
    "mlp": 60.0,
    "attention": 40.0,
    "muon": 30.0,
    "training": 150.0,
    "artifact": 30.0,
}
SECTIONS = {name: of_sections(name) for name in BOXES}


# --------------------------------------------------------------------------------------
# The child: sections, until one of them goes wrong
# --------------------------------------------------------------------------------------


def append(path: Path, row: dict) -> None:
    """One line, whole or not at all."""
    with path.open("ab") as f:
        f.write(json.dumps(row).encode() + b"\n")


def work(names: list[str], lines: Path, run: str, dry: bool) -> int:
    """Run sections in this process; the status says whether the last one left it usable."""
    functions = {name: SECTIONS[name].load() for name in names}
    import torch
    from gpu_timing import Bench, BoxEndedError, Gpu, Host, last_line, machine

    place = Host() if dry or not torch.cuda.is_available() else Gpu()
    mark = {"run": run} | ({} if place.real else {"dry": True})
    append(lines, {"section": "machine", **machine(place), **mark})
    limits: dict[str, float] = known_limits(lines, run)
    for name, function in functions.items():
        box = SECTIONS[name].box
        append(lines, {"section": name, "state": "begun", **mark})
        bench = Bench(name, place, max(box - SOFT, box / 2), lambda row: append(lines, row | mark))
        bench.limits, begin, state = limits, time.monotonic(), {"state": "done"}
        torch.manual_seed(0)
        try:
            function(bench)
            if bench.left_out:
                state = {"state": "cut", "error": f"left out: {', '.join(bench.left_out)}"}
        except BoxEndedError as ended:
            state = {"state": "cut", "error": str(ended)}
        except Exception as error:  # noqa: BLE001 -- whatever it is, it is this section's result
            import traceback

            traceback.print_exc()
            state = {"state": "raised", "error": last_line(error)}
        append(lines, {"section": name, **state, "seconds": round(time.monotonic() - begin, 1), **mark})
        if state["state"] == "raised" and not usable(place):
            return 1
        limits = bench.limits
        gc.collect()
        place.empty_cache()
        torch._dynamo.reset()
    return 0


def usable(place: object) -> bool:
    """Whether the device still does what it is told; after some errors no process of this context can."""
    try:
        place.synchronize()
    except Exception:  # noqa: BLE001 -- whatever it is, a new child has to be made
        return False
    return True


def known_limits(lines: Path, run: str) -> dict[str, float]:
    """The ceilings that this run has measured, for a child that comes later."""
    units = {"B/s": "bytes", "FLOP/s": "flops"}
    rows = [row for row in read_lines(lines) if row.get("run") == run and row["section"] == "ceilings"]
    return {units[row["unit"]]: row["measured"] for row in rows if row.get("unit") in units}


# --------------------------------------------------------------------------------------
# The parent: boxes
# --------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict]:
    """Whole lines; the last one may still be on its way."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


class Watch:
    """One child and how far it is, as its lines tell."""

    def __init__(self, names: list[str], out: Path, words: list[str]) -> None:
        self.lines, self.names = out / "gpu_suite.jsonl", list(names)
        self.seen = len(read_lines(self.lines))
        self.doing, self.deadline, self.raised = "", time.monotonic() + START, False
        self.log = out / "gpu_suite.log"
        with self.log.open("ab") as log:
            log.write(f"{MARK} {' '.join(names)}\n".encode())
            log.flush()
            command = [sys.executable, sys.argv[0], "--child", *names, *words]
            streams = {"stdout": log, "stderr": log}
            self.child = subprocess.Popen(command, **streams, start_new_session=True, env=caches())

    def look(self) -> None:
        """Take in what has been written since, and print it."""
        rows = read_lines(self.lines)
        for row in rows[self.seen :]:
            state = row.get("state")
            if state == "begun":
                self.doing, self.raised = row["section"], False
                self.deadline = time.monotonic() + SECTIONS[row["section"]].box
            elif state:
                self.names.remove(row["section"])
                self.doing, self.deadline = "", time.monotonic() + START
                self.raised = state == "raised"
            print(short(row), flush=True)
        self.seen = len(rows)

    def kill(self) -> None:
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()


def caches() -> dict[str, str]:
    """The environment with both compilers' caches in a folder of the tree that git ignores."""
    folder = ROOT / "runs/compile_cache"
    mine = {"TORCHINDUCTOR_CACHE_DIR": folder / "inductor", "TRITON_CACHE_DIR": folder / "triton"}
    return {"TRITON_DEFAULT_FP_FUSION": "1"} | os.environ | {key: str(value) for key, value in mine.items()}


def run_sections(names: list[str], out: Path, words: list[str], run: str) -> None:
    """Every section to its end, its box, or its fall; a child that is lost is replaced."""
    end, left = time.monotonic() + WHOLE, list(names)
    while left:
        watch = Watch(left, out, ["--out", str(out), "--run", run, *words])
        try:
            why = follow(watch, end)
        finally:
            watch.kill()
        watch.look()
        left = watch.names
        if why and left:
            state, error = why
            dry = {"dry": True} if any(row.get("dry") for row in read_lines(watch.lines)[-1:]) else {}
            row = {"section": left[0], "state": state, "error": error, "run": run, **dry}
            append(watch.lines, row)
            print(short(row), flush=True)
            left = left[1:]


def follow(watch: Watch, end: float) -> tuple[str, str] | None:
    """Wait for a child -> (state, why) of the section that is to be left, None where none is."""
    while True:
        status = watch.child.poll()
        watch.look()
        if status is not None:
            fell = bool(watch.names) and not watch.raised
            return ("fell", f"its process ended with status {status}: {last_words(watch)}") if fell else None
        if time.monotonic() > end:
            return "cut", f"the {WHOLE:.0f} s of the whole command were over"
        if time.monotonic() > watch.deadline:
            if not watch.doing:
                return "cut", f"it did not start within {START:.0f} s"
            return "cut", f"its box of {SECTIONS[watch.doing].box:g} s was over"
        time.sleep(0.05)


def last_words(watch: Watch) -> str:
    said = watch.log.read_text(errors="replace").split("\n")
    last = next((line.strip()[:300] for line in reversed(said) if line.strip()), MARK)
    return "it said nothing" if last.startswith(MARK) else last


# --------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------


def verdict(row: dict, device: str) -> str:
    """met or missed, of a row that has an aim which this device can be held to."""
    if row.get("dry"):
        return "dry"
    if "error" in row:
        return "failed"
    if "missing" in row:
        return "not here"
    if "aim" not in row:
        return "-"
    sign, number, *whose = row["aim"]
    if whose and whose[0] not in device:
        return f"no {whose[0]}"
    reached = row["measured"] <= number if sign == "<=" else row["measured"] >= number
    return "met" if reached else "missed"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


UNITS = {"B/s": (1e12, "TB/s"), "FLOP/s": (1e12, "TFLOP/s")}


def shown(row: dict) -> str:
    """What was measured, or why it was not."""
    if row.get("measured") is None:
        return row.get("error") or row.get("missing") or "-"
    scale, unit = UNITS.get(row["unit"], (1.0, row["unit"]))
    return f"{number(row['measured'] / scale)} {unit}"


def short(row: dict) -> str:
    """A line for the terminal."""
    if row["section"] in {"machine", "command"}:
        return " ".join(f"{key}:{value}" for key, value in row.items() if key not in {"section", "run"})
    if "state" in row:
        return f"== {row['section']} {row['state']} " + row.get("error", "")
    note = f" ({row['note']})" if "note" in row else ""
    return f"{row['section']}: {row['what']}: {shown(row)}{note}"


ABOUT = (
    "Times by CUDA events, after warm-up, cases in turn, the cache flushed before each: median, least and "
    "most of n. An aim that names a device holds for that device alone."
)


def render(rows: list[dict]) -> str:
    """The table: of each section what the last run with it says. Dry lines count only where all are dry."""
    rows = [row for row in rows if not row.get("dry")] or rows
    if not rows:
        return NOT_RUN
    runs = {row["section"]: row["run"] for row in rows}  # the last one wins
    lines = ["# One GPU", ""]
    for run in sorted(set(runs.values())):
        lines += [head(run, [row for row in rows if row["run"] == run]), ""]
    if any(row.get("dry") for row in rows):
        lines += ["dry run, no GPU: not measured", ""]
    lines += [ABOUT, ""]
    for name in sorted(runs.keys() - {"machine", "command"}, key=list(BOXES | runs).index):
        lines += section([row for row in rows if row["section"] == name and row["run"] == runs[name]],
                         device_of(rows, runs[name]))
    left = [name for name in BOXES if name not in runs]
    lines += [f"Not run: {', '.join(left)}.", ""] if left else []
    return "\n".join(lines)


def device_of(rows: list[dict], run: str) -> str:
    return next((r["device"] for r in rows if r["section"] == "machine" and r["run"] == run), "unknown")


def head(run: str, rows: list[dict]) -> str:
    """What a run was on and how it was started."""
    about = next((r for r in rows if r["section"] == "machine"), {})
    command = next((r["command"] for r in rows if r["section"] == "command"), "unknown")
    named = {"driver": "driver", "cuda": "CUDA", "torch": "torch", "triton": "triton", "python": "Python",
             "source": "source"}
    facts = ", ".join(f"{said} {about[key]}" for key, said in named.items() if key in about)
    return f"Run {run}: {about.get('device', 'no device')}, {facts}, {about.get('date', '')}; `{command}`."


def section(rows: list[dict], device: str) -> list[str]:
    """The lines of one section, and how it ended."""
    end = next((row for row in reversed(rows) if row.get("state", "begun") != "begun"), {})
    state = end.get("state", "did not end")
    said = f"{state} after {end['seconds']} s" if "seconds" in end else state
    said += f": {end['error']}" if "error" in end else ""
    name = rows[0]["section"]
    lines = [f"## {name}", "", f"{said} (box {BOXES[name]:.0f} s)." if name in BOXES else f"{said}.", ""]
    cells = [row for row in rows if "what" in row]
    if cells:
        lines += ["| what | aim | measured | verdict | spread | n | note |", "|---|---|---|---|---|---|---|"]
    return [*lines, *(table_row(row, device) for row in cells), ""]


def table_row(row: dict, device: str) -> str:
    sign, least, *whose = row.get("aim", ("-", None))
    aim = sign if least is None else " ".join([sign, number(least), *(f"({name})" for name in whose)])
    spread = " to ".join(number(x) for x in row["spread"]) if "spread" in row else "-"
    rest = (shown(row), verdict(row, device), spread, row.get("n", "-"), row.get("note", "-"))
    if row.get("dry") and row["measured"] is not None:
        rest = ("not measured", "dry", "-", "-", "-")
    cells = (row["what"], aim, *rest)
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


# --------------------------------------------------------------------------------------


def arguments(words: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu_suite", help="folder of lines and table")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS], metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU; nothing is measured")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> int:
    args = arguments(sys.argv[1:])
    lines = args.out / "gpu_suite.jsonl"
    if args.child:
        return work(args.child, lines, args.run, args.dry)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no child is left behind
    args.out.mkdir(parents=True, exist_ok=True)
    run = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    names = [name for name in SECTIONS if name in (args.only or SECTIONS)]
    only = f" --only {' '.join(args.only)}" if args.only else ""
    command = f"python tests/bench/gpu_suite.py{only}{' --dry' if args.dry else ''}"
    dry = {"dry": True} if args.dry else {}
    append(lines, {"section": "command", "command": command, "run": run, **dry})
    try:
        run_sections(names, args.out, ["--dry"] if args.dry else [], run)
    finally:
        table = render(read_lines(lines))
        (args.out / "gpu_suite.md").write_text(table)
        print(table, flush=True)
    return int(any(failed(row) for row in read_lines(lines) if row["run"] == run))


def failed(row: dict) -> bool:
    """Whether it says that something went wrong, rather than that time was short."""
    return "error" in row and row.get("state") != "cut"


if __name__ == "__main__":
    sys.exit(main())
