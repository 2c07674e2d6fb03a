"""The long test run, `tests/run.sh --full`, and its outcome as a committed table.

    python tests/bench/reliability.py             # run everything, append the outcome, write the table
    python tests/bench/reliability.py --table     # write the table again from the raw lines
"""

from __future__ import annotations

import re
import subprocess
import sys
import time

from common import ROOT, Bench, facts, parser_for

BENCH = Bench("reliability")
COMMAND = ["tests/run.sh", "--full"]


def run() -> dict:
    """Run the suite -> a raw line. Its own output goes on to the terminal."""
    begin, lines = time.monotonic(), []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(COMMAND, cwd=ROOT, **pipes) as p:
        for line in p.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
    text = "\n".join(lines)
    counts = re.findall(r"^(\d+) passed, (\d+) failed, (\d+) skipped$", text, re.MULTILINE)
    passed, failed, skipped = map(int, counts[-1]) if counts else (0, 0, 0)
    return {
        **facts("date"),
        "command": " ".join(COMMAND),
        "exit": p.returncode,
        "passed": passed,
        "failed": failed,
        "skipped": re.findall(r"^skipped: (\d+, .*)$", text, re.MULTILINE) if skipped else [],
        "failures": re.findall(r"^FAILED (\S+)", text, re.MULTILINE),
        "minutes": round((time.monotonic() - begin) / 60, 1),
        **facts("cores", "python", "torch", "source"),
    }


def render(rows: list[dict]) -> str:
    head = [
        "# The long test run",
        "",
        "`python tests/bench/reliability.py` runs `tests/run.sh --full`: besides the default tests every "
        "kill and fault point of the saver, the random kills, and the whole matrix of the builder. Latest "
        "first.",
        "",
        "| date | passed | failed | skipped | minutes | where |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(table_row(r) for r in reversed(rows))]) + "\n"


def table_row(r: dict) -> str:
    failed = ": ".join([str(r["failed"]), *r["failures"]]) + f" (exit {r['exit']})" * (r["exit"] != 0)
    where = f"{r['cores']} cores, Python {r['python']}, torch {r['torch']}, source {r['source'][:8]}"
    skipped = "; ".join(r["skipped"]) or "0"
    return f"| {r['date']} | {r['passed']} | {failed} | {skipped} | {r['minutes']} | {where} |"


def main() -> int:
    status = 0
    if not parser_for(__doc__).parse_args().table:
        row = run()
        BENCH.add(row)
        status = row["exit"]
    BENCH.write_table(render)
    return status


if __name__ == "__main__":
    sys.exit(main())
