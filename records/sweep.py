"""Run a list of settings one after another and table their scores: an ablation is one small text file.

    python records/sweep.py records/bench/cpu_ablation.sweep            # run what is missing, write the table
    python records/sweep.py records/bench/cpu_ablation.sweep --table    # write the table from the raw lines

Such a file, its paths from its own folder:

    table = cpu_ablation              # writes cpu_ablation.md here and raw/cpu_ablation.jsonl
    base  = ablation.env              # what every row has in common
    seeds = 1 2 3                     # of every row that names none itself; left out: 1337
    score = sliding                   # which score is tabled; left out: the one that a run declares
    ranks = 8                         # processes of a run, by torchrun; left out: 1, without it
    about = A sentence for the head of the table.

    B0: SEED=1,2,3,4,5                # the first row: its standard deviation is the unit of all differences
    xsa: XSA_LAST_N=6                 # base and this, compared with the first row
    gates: @xsa SPARSE_ATTN_GATE=1    # what xsa has and this, compared with xsa

Each run that ends well adds one line to the raw lines. A run is not made again while there is a line of its
row and seed with the same settings: every knob that differs from its default, and the paths of data and
tokenizer. So a new knob, whose default is what the program did before, asks for no new runs; a line that no
longer belongs to any row stays where it is and is not tabled.

It may be killed at any moment. The raw lines are replaced as a whole, a run counts once its results.json is
there, and a run that outlives the sweep is waited for by the next start. A run that fails is reported, noted
in failures.jsonl beside its log, and tried again by the next start. Exit status: 0, 1 where a run failed, 2
with one line for a fault in what was given, 130 when interrupted. Variables that are knobs are not inherited:
the file is the experiment.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402  (the project's folder is put on the path first)
from build_submission import ONE_RUN, read_env_file, unknown_knob  # noqa: E402
from train_gpt import UserError  # noqa: E402

PROGRAM = ROOT / "train_gpt.py"
HEADER = re.compile(r"(\w+)\s*=\s*(.*)")
ROW = re.compile(r"([^\s:=@|][^:=@|]*?)\s*:(?:\s+(.*))?")
HEADS = ("table", "base", "seeds", "score", "ranks", "about")
PATHS = ("DATA_PATH", "TOKENIZER_PATH")  # of the knobs of a run's own section, those that decide its result
OURS = {*ONE_RUN, "RUN_ID"}  # which the sweep sets itself, or which would make something else of a run


# ------------------------------------------------------------------------------------------- the file


@dataclass(frozen=True)
class Row:
    """One setting of the sweep: all its knobs, and what it is compared with."""

    name: str
    words: str  # as they stand in the file
    against: str  # the name of another row; the first row's is its own
    env: dict[str, str]
    seeds: tuple[int, ...]

    @property
    def folder(self) -> str:
        return re.sub(r"[^A-Za-z0-9.+-]+", "_", self.name)

    @functools.cached_property
    def settings(self) -> dict[str, str]:
        return settings_of(train_gpt.read_config(self.env))


class Job(NamedTuple):
    """One run: a row and a seed."""

    row: Row
    seed: int

    def config(self) -> train_gpt.Config:
        return train_gpt.read_config({**self.row.env, "SEED": str(self.seed)})

    def is_done_by(self, line: dict) -> bool:
        return (line["row"], line["seed"], line["settings"]) == (self.row.name, self.seed, self.row.settings)


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read and checked."""

    path: Path
    heads: dict[str, str]
    rows: list[Row]

    @property
    def table(self) -> Path:
        return self.path.parent / f"{self.heads['table']}.md"

    @property
    def raw(self) -> Path:
        return self.path.parent / f"raw/{self.heads['table']}.jsonl"

    @property
    def jobs(self) -> list[Job]:
        return [Job(row, seed) for row in self.rows for seed in row.seeds]


def settings_of(cfg: train_gpt.Config) -> dict[str, str]:
    """What decides a run's result beside its seed: the knobs that differ from their defaults, and PATHS."""
    kept = {*train_gpt.identity(cfg), *PATHS} - {"SEED"}
    return {name: text for name, text in train_gpt.changed_knobs(cfg).items() if name in kept}


def read_sweep(path: Path) -> Sweep:
    """Read and check the whole file. Raises UserError with the first bad line's number."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}; name a sweep file") from None
    heads, found = {}, []
    for number, line in enumerate(text.splitlines(), 1):
        with at(f"{path}:{number}"):
            content = re.sub(r"(^|\s)#.*", "", line).strip()
            if header := HEADER.fullmatch(content):
                read_header(heads, *header.groups(), late=bool(found))
            elif row := ROW.fullmatch(content):
                found.append((number, row[1], row[2] or ""))
            elif content:
                raise UserError(f"{content[:80]!r} is neither `name = value` nor `row: KEY=value KEY=value`")
    missing = [name for name in ("table", "base") if name not in heads]
    if missing or not found:
        raise UserError(f"{path}: want `table = name`, `base = file` and one row or more")
    return Sweep(path, heads, read_rows(path, heads, found))


@contextlib.contextmanager
def at(place: str) -> Generator[None]:
    """Says where a UserError came up."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{place}: {e}") from None


def read_header(heads: dict[str, str], name: str, value: str, *, late: bool) -> None:
    """Take one `name = value`. Raises UserError."""
    if name not in HEADS:
        raise UserError(f"{name!r} is no header; want one of {', '.join(HEADS)}, or `row: KEY=value`")
    if name in heads or late:
        raise UserError(f"{name!r} stands {'after the first row' if late else 'a second time'}")
    if name == "table" and not re.fullmatch(r"\w+", value):
        raise UserError(f"table = {value!r}: want letters, digits and _")
    if name == "ranks" and not re.fullmatch(r"[1-9]\d*", value):
        raise UserError(f"ranks = {value!r}: want a whole number from 1 on")
    if name == "seeds":
        read_seeds(value)
    heads[name] = value


def read_seeds(text: str) -> tuple[int, ...]:
    """Whole numbers with spaces or commas between them. Raises UserError."""
    words = text.replace(",", " ").split()
    seeds = tuple(int(word) for word in words if re.fullmatch(r"\d{1,18}", word))
    if not seeds or len(seeds) != len(words) or len(set(seeds)) != len(seeds):
        raise UserError(f"seeds {text!r}: want different whole numbers, e.g. 1 2 3")
    return seeds


def read_rows(path: Path, heads: dict[str, str], found: list[tuple[int, str, str]]) -> list[Row]:
    """(line number, name, words) of each row -> rows; a row may build on one above it. Raises UserError."""
    base, rows = read_env_file(path.parent / heads["base"]), {}
    with at(str(path.parent / heads["base"])):
        refuse_names(base)
    for number, name, words in found:
        with at(f"{path}:{number}"):
            row = read_row(name, words, rows, base)
            if any(row.folder == other.folder for other in rows.values()):
                raise UserError(f"row {name!r} stands a second time, or one whose folder has the same name")
            rows[name] = row if row.seeds else replace(row, seeds=read_seeds(heads.get("seeds", "1337")))
            train_gpt.read_config(row.env)
    return list(rows.values())


def read_row(name: str, words: str, rows: dict[str, Row], base: dict[str, str]) -> Row:
    """One row; without seeds where it names none. Raises UserError."""
    try:
        parts = shlex.split(words)
    except ValueError as e:
        raise UserError(f"row {name!r}: {words!r} is not KEY=value KEY=value ({e})") from None
    against = parts.pop(0)[1:] if parts and parts[0].startswith("@") else ""
    if against and against not in rows:
        raise UserError(f"row {name!r}: there is no row {against!r} above it")
    pairs = [part.partition("=") for part in parts]
    bad = ["".join(pair) for pair in pairs if not (pair[1] and pair[0].isidentifier())]
    if bad:
        raise UserError(f"row {name!r}: {bad[0]!r} is not KEY=value")
    own = {key: value for key, _, value in pairs}
    if len(own) != len(pairs):
        raise UserError(f"row {name!r} sets a knob twice")
    refuse_names(own)
    seeds = read_seeds(own.pop("SEED")) if "SEED" in own else ()
    inherited = rows[against].env if against else base
    return Row(name, words, against or next(iter(rows), name), {**inherited, **own}, seeds)


def refuse_names(env: dict[str, str]) -> None:
    """Raises UserError for what is no knob, or is one that no row of a sweep may set."""
    known = {*train_gpt.all_knobs(), *train_gpt.ALIASES} - OURS
    for name in env:
        if name in OURS:
            raise UserError(f"{name} is about one run; the sweep sets it, or cannot do with it")
        if name not in known:
            raise UserError(unknown_knob(name))


# ------------------------------------------------------------------------------------------ the runs


@contextlib.contextmanager
def alone(folder: Path) -> Generator[int]:
    """Holds the sweep's lock and gives its descriptor to pass on: the lock is free when all holders ended.

    So two sweeps never write the same lines, and a run that was left behind ends before another starts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting: this sweep, or a run that it left behind, is at work ({lock.name})", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def run_all(sweep: Sweep, runs: Path) -> int:
    """Make every run that no raw line has; the table is written after each. Returns how many failed."""
    failed = 0
    with alone(runs) as lock:
        lines = read_lines(sweep.raw)
        todo = [job for job in sweep.jobs if not any(job.is_done_by(line) for line in lines)]
        print(f"{sweep.path.name}: {len(todo)} of {len(sweep.jobs)} runs to make", flush=True)
        for number, job in enumerate(todo, 1):
            # a run that ended while nobody looked is taken as it is
            problem = "" if results_of(job, runs) else run_one(job, sweep, runs, lock)
            text = note_failure(job, problem, runs) if problem else note_result(job, sweep, runs)
            print(f"[{number}/{len(todo)}] {job.row.name}, seed {job.seed}: {text}", flush=True)
            failed += bool(problem)
    return failed


def note_result(job: Job, sweep: Sweep, runs: Path) -> str:
    """Add a run's line, write the table again, and say what came out."""
    line = line_of(job, results_of(job, runs))
    append(sweep.raw, line)
    train_gpt.write_atomic(sweep.table, render(sweep, read_lines(sweep.raw)).encode())
    bpb, _ = scored(line, sweep.heads.get("score", ""))
    return f"{bpb:.4f} bpb, {line['steps']} steps, {line['process_seconds']:.0f} s"


def note_failure(job: Job, problem: str, runs: Path) -> str:
    """Note what went wrong beside the runs, and say so. It is no result."""
    append(
        runs / "failures.jsonl", {"date": today(), "row": job.row.name, "seed": job.seed, "problem": problem}
    )
    return f"FAILED, {problem}; see {log_of(job, runs)}"


def folder_of(job: Job, runs: Path) -> Path:
    return runs / f"{job.row.folder}-{job.seed}"


def log_of(job: Job, runs: Path) -> Path:
    return runs / f"{job.row.folder}-{job.seed}.log"


def run_one(job: Job, sweep: Sweep, runs: Path, lock: int) -> str:
    """Run the program to its end, its output into the log. Returns "", or what went wrong in one line."""
    knobs = {*train_gpt.all_knobs(), *train_gpt.ALIASES}
    env = {name: text for name, text in os.environ.items() if name not in knobs}
    env |= {"CHECKPOINT_EVERY": "-1", "PROGRESS": "0", **job.row.env, "SEED": str(job.seed)}
    env |= {"RUN_DIR": str(folder_of(job, runs)), "OVERWRITE": "1"}
    with log_of(job, runs).open("wb") as log:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command(sweep), cwd=ROOT, env=env, pass_fds=(lock,), **pipes)
        try:
            status = process.wait()
        except BaseException:  # an interrupted sweep takes its run with it
            process.terminate()
            process.wait()
            raise
    if status == 0:
        return "" if results_of(job, runs) else "exit status 0, but no results.json of these settings"
    said = log_of(job, runs).read_text(errors="replace").splitlines()
    last = next((line.strip() for line in reversed(said) if line.strip()), "no output")
    return f"exit status {status}: {last[:300]}"


def command(sweep: Sweep) -> list[str]:
    """How a run is started."""
    ranks = int(sweep.heads.get("ranks", "1"))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *(torchrun if ranks > 1 else []), str(PROGRAM)]


def results_of(job: Job, runs: Path) -> dict | None:
    """results.json of a whole run with this configuration and no other; it is written last, and at once."""
    cfg = job.config()
    values = train_gpt.knob_values(cfg)
    try:
        found = json.loads((folder_of(job, runs) / "results.json").read_text())
        same = found["config_hash"] == train_gpt.config_hash(cfg)  # which leaves the paths out
        return found if same and all(found["config"][name] == values[name] for name in PATHS) else None
    except (OSError, ValueError, KeyError):
        return None


def line_of(job: Job, results: dict) -> dict:
    """The raw line of a run; one by an older program tells neither its threads nor its median step."""
    copied = ("config_hash", "versions", "device", "dtype", "world_size", "params", "steps", "train_tokens")
    copied += ("train_seconds", "tokens_per_second", "process_seconds", "bytes", "score")
    threads = f", {results['threads']} thread(s)" if "threads" in results else ""
    return {
        "row": job.row.name,
        "seed": job.seed,
        "settings": job.row.settings,
        "date": today(),
        "source": results["source_sha256"][:16],
        "machine": f"{os.cpu_count()} cores of {cpu_name()}{threads}",
        **{name: results[name] for name in copied},
        "step_seconds": results.get("step_seconds"),
        "scores": {name: [s["val_bpb"], s["partial"]] for name, s in results["scores"].items()},
    }


def cpu_name() -> str:
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = re.search(r"^model name\s*: (.*)$", about, re.MULTILINE)
    return named[1] if named else platform.machine()


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def read_lines(raw: Path) -> list[dict]:
    """The raw lines. Raises UserError naming one that is damaged."""
    lines = []
    for number, line in enumerate(raw.read_text().splitlines() if raw.exists() else [], 1):
        with at(f"{raw}:{number}"):
            try:
                lines.append(json.loads(line))
            except ValueError as e:
                raise UserError(f"{line[:40]!r} is no JSON ({e}); mend or drop the line") from None
    return lines


def append(path: Path, line: dict) -> None:
    """Add a line by writing the whole file anew and renaming it: a kill leaves all of the line or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.exists() else b""
    gap = b"" if not before or before.endswith(b"\n") else b"\n"
    train_gpt.write_atomic(path, before + gap + json.dumps(line).encode() + b"\n")


# ----------------------------------------------------------------------------------------- the table


def rebuilt(path: Path) -> str:
    """The table of a sweep file and its raw lines, as Markdown."""
    sweep = read_sweep(path)
    return render(sweep, read_lines(sweep.raw))


def scored(line: dict, score: str) -> tuple[float, bool]:
    """(bits per byte, whether of a part of the validation split alone) of a raw line. Raises UserError."""
    name = score or line["score"]
    if name not in line["scores"]:
        raise UserError(f"score = {name}: a run of row {line['row']!r} has {', '.join(line['scores'])}")
    return tuple(line["scores"][name])


class Summary(NamedTuple):
    """A row's runs, added up."""

    bpb: list[float]
    partial: bool
    lines: list[dict]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.bpb)

    @property
    def spread(self) -> float | None:
        """Standard deviation of a sample; one run has none."""
        return statistics.stdev(self.bpb) if len(self.bpb) > 1 else None


def summarise(sweep: Sweep, lines: list[dict]) -> dict[str, Summary]:
    """Name of a row -> its runs, of each seed the latest line."""
    found = {}
    for row in sweep.rows:
        jobs = [Job(row, seed) for seed in row.seeds]
        own = [[line for line in lines if job.is_done_by(line)] for job in jobs]
        own = [same[-1] for same in own if same]
        scores = [scored(line, sweep.heads.get("score", "")) for line in own]
        found[row.name] = Summary([s for s, _ in scores], any(part for _, part in scores), own)
    return found


def render(sweep: Sweep, lines: list[dict]) -> str:
    """The table as Markdown."""
    found, first = summarise(sweep, lines), sweep.rows[0]
    score = sweep.heads.get("score", "the declared one")
    head = [
        f"# {sweep.heads['table']}",
        "",
        *([sweep.heads["about"], ""] if "about" in sweep.heads else []),
        f"`python records/sweep.py {shown_path(sweep.path)}`: base `{sweep.heads['base']}`, score: {score}, "
        f"in bits per byte. sd is the standard deviation over seeds. A difference is to the row named beside "
        f"it, also in units of {first.name}'s sd: beyond 2 of them better or worse, beyond 4 clearly so. "
        "Round trip: the artifact's score less that of the weights as trained. tokens/s: at the median step; "
        "with a star the mean of a run that told no median, so a busy machine is in it.",
        "",
        "| row | knobs | runs | bpb | sd | difference | in sd | round trip | parameters | steps | tokens/s | "
        "artifact bytes | source |",
        f"|{'---|' * 13}",
    ]
    body = [table_row(row, found, found[first.name].spread) for row in sweep.rows]
    tabled = [line for summary in found.values() for line in summary.lines]
    return "\n".join([*head, *body, *remarks(tabled, len(lines) - len(tabled))]) + "\n"


def shown_path(path: Path) -> str:
    full = path.resolve()
    return str(full.relative_to(ROOT)) if full.is_relative_to(ROOT) else path.name


def table_row(row: Row, found: dict[str, Summary], unit: float | None) -> str:
    own, other = found[row.name], found[row.against]
    words = f"`{row.words}`" if row.words else ""
    cells = [row.name, words, f"{len(own.bpb)} of {len(row.seeds)}"]
    if not own.bpb:
        return f"| {' | '.join([*cells, 'not run', *['-'] * 9])} |"
    cells += [f"{own.mean:.4f}" + " (partial)" * own.partial]
    cells += [f"{own.spread:.4f}" if own.spread is not None else "-"]
    cells += compared(own, other, unit, row.against) if row.against != row.name else ["-", "-"]
    cells += [lost(own), span(own, "params"), span(own, "steps"), pace(own)]
    cells += [f"{statistics.fmean(line['bytes']['model'] for line in own.lines):,.0f}"]
    cells += [", ".join(sorted({line["source"][:8] for line in own.lines}))]
    return f"| {' | '.join(cells)} |"


def compared(own: Summary, other: Summary, unit: float | None, name: str) -> list[str]:
    """The difference of means, and the same in units with its verdict; less is better."""
    if not other.bpb:
        return [f"{name} not run", "-"]
    gap = own.mean - other.mean
    if not unit:
        return [f"{gap:+.4f} to {name}", "-"]
    size, word = abs(gap) / unit, "better" if gap < 0 else "worse"
    verdict = "no difference" if size <= 2 else word if size <= 4 else f"clearly {word}"
    return [f"{gap:+.4f} to {name}", f"{gap / unit:+.1f}, {verdict}"]


def lost(own: Summary) -> str:
    """What the trip through the artifact costs, the mean over runs."""
    gaps = [line["scores"]["roundtrip"][0] - line["scores"]["pre_quant"][0] for line in own.lines]
    return f"{statistics.fmean(gaps):+.7f}"


def span(own: Summary, key: str) -> str:
    return f"{statistics.fmean(line[key] for line in own.lines):,.0f}"


def pace(own: Summary) -> str:
    """Tokens a second, the mean over runs."""
    known = [line for line in own.lines if line.get("step_seconds")]
    if not known:
        return span(own, "tokens_per_second") + "*"
    batches = (line["train_tokens"] / line["steps"] / line["step_seconds"]["median"] for line in known)
    return f"{statistics.fmean(batches):,.0f}"


def remarks(tabled: list[dict], others: int) -> list[str]:
    """What the table's runs were made on, and how many raw lines it leaves out."""
    notes = sorted({place_of(line) for line in tabled})
    if others:
        notes.append(f"{others} raw line(s) belong to no row above, or to a seed that has a later one.")
    return ["", *(f"* {note}" for note in notes)] if notes else []


def place_of(line: dict) -> str:
    dtype = line["dtype"].removeprefix("torch.")
    machine = f"{line['machine']}, {line['world_size']} x {line['device']} in {dtype}"
    return f"{line['date']}, {machine}, torch {line['versions']['torch']}"


# -------------------------------------------------------------------------------------- command line


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports a fault as UserError, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; see --help")


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="the sweep, e.g. records/bench/cpu_ablation.sweep"
    )
    parser.add_argument("--table", action="store_true", help="only write the table from the raw lines")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="where runs go (runs/sweep/<table>)")
    return parser


def interrupt(number: int, frame: object) -> NoReturn:
    """SIGTERM ends a sweep as Ctrl-C does."""
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; the exit status is the one that the head of this file tells."""
    signal.signal(signal.SIGTERM, interrupt)
    try:
        args = build_parser().parse_args(argv)
        sweep = read_sweep(args.file)
        train_gpt.write_atomic(sweep.table, rebuilt(args.file).encode())
        if args.table:
            print(sweep.table)
            return 0
        runs = args.runs or ROOT / "runs/sweep" / sweep.heads["table"]
        return int(run_all(sweep, runs.resolve()) > 0)
    except UserError as e:
        print(f"sweep.py: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sweep.py: interrupted; the same command goes on with the runs still missing", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
