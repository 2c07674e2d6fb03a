"""What the benchmarks share: raw lines, the table made from them, and what a line says of its machine.

A benchmark appends one JSON object a line to `raw/<name>.jsonl` and makes `<name>.md` from these lines alone,
so that no number of a table is typed. Importing this puts the project's folder on the path.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "records/bench"
sys.path.insert(0, str(ROOT))


class Bench(NamedTuple):
    """Where a benchmark keeps its raw lines and its table."""

    name: str
    folder: Path = RECORDS

    @property
    def raw(self) -> Path:
        return self.folder / f"raw/{self.name}.jsonl"

    @property
    def table(self) -> Path:
        return self.folder / f"{self.name}.md"

    def rows(self) -> list[dict]:
        """All raw lines, oldest first."""
        return [json.loads(line) for line in self.raw.read_text().splitlines()] if self.raw.exists() else []

    def add(self, row: dict) -> None:
        """Append a raw line."""
        self.raw.parent.mkdir(parents=True, exist_ok=True)
        with self.raw.open("a") as f:
            f.write(json.dumps(row) + "\n")

    def write_table(self, render: Callable[[list[dict]], str]) -> str:
        """Make the table from the raw lines -> its text."""
        text = render(self.rows())
        self.table.parent.mkdir(parents=True, exist_ok=True)
        self.table.write_text(text)
        return text


def parser_for(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is the benchmark's docstring, with the option that all of them have."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    parser.add_argument("--table", action="store_true", help="only write the table from the raw lines")
    return parser


def facts(*names: str) -> dict:
    """What is asked for of this machine and moment, by name; the names are the keys of FACTS."""
    return {name: FACTS[name]() for name in names}


def place_of(row: dict) -> str:
    """The machine and moment of a raw line that has all of FACTS."""
    return (
        f"{row['date']}: {row['cores']} cores ({row['cpu']}), load {row['load']} at the start, Python "
        f"{row['python']}, numpy {row['numpy']}, torch {row['torch']}, source {row['source'][:8]}."
    )


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def source_hash() -> str:
    """The first 16 hexadecimal digits of the program's SHA-256."""
    return hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()[:16]


def torch_version() -> str:
    """With its build; asked for after the work of a benchmark that does without torch itself."""
    import torch

    return torch.__version__


def cpu_name() -> str:
    found = re.search(r"^model name\s*: (.*)$", cpu_text(), re.MULTILINE)
    return found[1] if found else "an unnamed CPU"


def cpu_name_and_matrix_extensions() -> str:
    """With the extensions that decide the speed of bfloat16."""
    flags = (flag for flag in ("amx_bf16", "avx512_bf16") if f" {flag}" in cpu_text())
    return " ".join([cpu_name(), *flags])


def cpu_text() -> str:
    about = Path("/proc/cpuinfo")
    return about.read_text() if about.exists() else ""


FACTS: dict[str, Callable[[], object]] = {
    "date": today,
    "source": source_hash,
    "python": platform.python_version,
    "numpy": lambda: version("numpy"),
    "torch": torch_version,
    "cores": os.cpu_count,
    "cpu": cpu_name,
    "load": lambda: round(os.getloadavg()[0], 2),
}
