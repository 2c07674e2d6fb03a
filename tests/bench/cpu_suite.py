"""Speed, memory and bytes on a CPU as ratios, each against its aim, in one command of under four minutes.

    python tests/bench/cpu_suite.py               # measure, append to the raw lines, write the table
    python tests/bench/cpu_suite.py --only loss   # one section: step, loss, newton_schulz or artifact
    python tests/bench/cpu_suite.py --table       # write the table again from the raw lines
    python tests/bench/cpu_suite.py --dry         # everything at tiny sizes, unfiltered, into runs/bench_dry

Times of a machine that does something else as well are worth nothing. So the variants of a ratio take turns,
a quarter of a second or more each, and a round of them counts only if other processes used at most 12 % of
the cores' time during each of its samples: busy time of /proc/stat less our own, children included. A ratio
is the median over such rounds, five of them at least; where a section's time runs out before, its rows say
`contended` and give no number, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import json
import math
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import artifact
import cpu_train
import numpy as np
import torch
from common import RECORDS, ROOT, Bench, cpu_name_and_matrix_extensions, facts, parser_for
from torch import Tensor

import train_gpt as tg

BENCH = Bench("cpu_suite")
DRY = Bench("cpu_suite", ROOT / "runs/bench_dry")
CAP, NS_STEPS = 30.0, 5
ARTIFACT_BYTES = 16_000_000
BUDGET = 200.0  # seconds after which a section that begins tries no longer than it must


class Aim(NamedTuple):
    """A row of the table: a quotient or a number, and what is wanted of it; no sign: nothing."""

    section: str
    what: str
    sign: str = ""
    bound: float = math.nan

    def verdict(self, value: float) -> str:
        if not self.sign:
            return "-"
        return "met" if (value >= self.bound if self.sign == ">=" else value <= self.bound) else "missed"


AIMS = [
    Aim("step", "V=1024: eager / compiled", ">=", 1.5),
    Aim("step", "V=1024: limit / compiled", ">=", 0.65),
    Aim("step", "V=8192: eager / compiled", ">=", 1.5),
    Aim("step", "V=8192: limit / compiled", ">=", 0.60),
    Aim("loss", "eager / chunked", ">=", 3.0),
    Aim("loss", "torch.compile / chunked", ">=", 1.5),
    Aim("loss", "chunked / matrix products", "<=", 2.6),
    Aim("loss", "extra memory: chunked / eager", "<=", 0.25),
    Aim("newton_schulz", "10 of 256 x 1024: single / batched", ">=", 4.0),
    Aim("newton_schulz", "4 of 256 x 1024: single / batched", ">=", 4.0),
    Aim("newton_schulz", "6 of 1024 x 256: single / batched", ">=", 4.0),
    *(
        Aim("artifact", f"{stream}{what}", sign, bound)
        for stream in ("int6", "trits")
        for what, sign, bound in (
            (": bytes / entropy", "<=", 1.0015),
            (": seconds to decode 16 MB", "<=", 3.0),
            (": seconds to encode 16 MB", "", math.nan),
            (" by brotli: bytes / entropy", "", math.nan),
            (" by brotli: seconds to decode 16 MB", "", math.nan),
            (" by brotli: seconds to encode 16 MB", "", math.nan),
        )
    ),
]


class Sizes(NamedTuple):
    """What is measured: cases of the training step, (N, D, V) of the loss, stacks, rows of the streams."""

    cases: tuple[cpu_train.Case, ...]
    loss: tuple[int, int, int]
    stacks: tuple[tuple[int, int, int], ...]
    int6_rows: int
    trit_rows: int


FULL = Sizes(
    (cpu_train.CASES["v1024"], cpu_train.CASES["v8192"]),
    (4096, 256, 8192),
    ((10, 256, 1024), (4, 256, 1024), (6, 1024, 256)),
    16384,  # 8,388,608 values
    10417,  # 8,000,256 values
)
SMALL = cpu_train.Case(64, 16, 0, 1.0, 1.0, layers=1, dim=32, tokens=64)
TINY = Sizes((SMALL, SMALL), (64, 16, 32), ((3, 8, 16), (2, 8, 16), (2, 16, 8)), 16, 16)


# ------------------------------------------------------------------------------- quiet rounds


class Usage(NamedTuple):
    """Seconds of CPU time until now: of all cores together, of these busy, and our own."""

    total: float
    busy: float
    own: float


def read_stat(text: str, ticks: int) -> tuple[float, float]:
    """/proc/stat -> (total, busy): what a hypervisor took is busy, waiting for a disk is not."""
    user, nice, system, idle, waiting, *rest = map(int, text.splitlines()[0].split()[1:9])
    busy = user + nice + system + sum(rest)
    return (busy + idle + waiting) / ticks, busy / ticks


def usage() -> Usage:
    """Now. Of our children those that have ended count: the compiler's, which work before the first round."""
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    stat = read_stat(Path("/proc/stat").read_text(), 100)  # USER_HZ, the same on all of Linux' machines
    return Usage(*stat, sum(r.ru_utime + r.ru_stime for r in own))


def used_by_others(before: Usage, after: Usage) -> float:
    """Share of the cores' time between two moments; below zero where /proc/stat does not count us."""
    total = after.total - before.total
    return (after.busy - before.busy - (after.own - before.own)) / total if total > 0 else math.inf


class Plan(NamedTuple):
    """How long to try: rounds wanted, rounds that suffice, seconds of a sample and of all rounds."""

    wanted: int = 7
    least: int = 5
    sample: float = 0.25  # at 100 ticks a second on two cores, one tick is 2 % of it
    box: float = 25.0
    others: float = 0.12
    warm: int = 2  # calls before the first round: they compile


UNFILTERED = Plan(1, 1, 0.0, 0.0, math.inf, 1)


class Found(NamedTuple):
    """Milliseconds of each variant in the quiet rounds, and how many rounds there were."""

    label: str
    rounds: list[dict[str, float]]
    tried: int

    def ratio(self, over: str, under: str) -> list[float]:
        return [r[over] / r[under] for r in self.rounds]

    def medians(self) -> dict[str, float]:
        return {name: round(statistics.median(r[name] for r in self.rounds), 3) for name in self.rounds[0]}


def sample(call: Callable[[], object], seconds: float, read: Callable[[], Usage]) -> tuple[float, float]:
    """Call again and again -> milliseconds of a call, and what others used meanwhile."""
    before, begin, calls, elapsed = read(), time.perf_counter(), 0, 0.0
    while not calls or elapsed < seconds:
        call()
        calls += 1
        elapsed = time.perf_counter() - begin
    return elapsed / calls * 1000, used_by_others(before, read())


def take_turns(
    label: str, variants: dict[str, Callable[[], object]], plan: Plan, read: Callable[[], Usage] = usage
) -> Found:
    """Rounds of all variants until enough were quiet or the time is over; no round where too few were.

    A round ends with its first noisy sample. A slow machine that is quiet gets its `plan.least` rounds.
    """
    for call in variants.values():
        for _ in range(plan.warm):
            call()
    quiet, tried, end = [], 0, time.monotonic() + plan.box
    while len(quiet) < plan.wanted and (len(quiet) == tried < plan.least or time.monotonic() < end):
        taken, most, tried = {}, 0.0, tried + 1
        for name, call in variants.items():
            taken[name], others = sample(call, plan.sample, read)
            most = max(most, others, key=abs)
            if abs(others) > plan.others:
                break
        else:
            quiet.append(taken)
        print(f"{label}: round {tried}, {len(quiet)} quiet; others used {most:.0%} at most", flush=True)
    return Found(label, quiet if len(quiet) >= plan.least else [], tried)


# ----------------------------------------------------------------------------------- sections


class Finding(NamedTuple):
    """A row's values, one of each quiet round, of `tried`; none where the rounds were contended."""

    what: str
    values: list[float]
    tried: int
    detail: dict


def finding(what: str, found: Found, values: list[float]) -> Finding:
    return Finding(what, values, found.tried, {"ms": found.medians()} if values else {})


def step(sizes: Sizes, plan: Plan) -> Iterator[Finding]:
    """A whole training step in bfloat16: ours compiled, ours eager, its matrix products and attention."""
    for name, case in zip(("V=1024", "V=8192"), sizes.cases, strict=True):
        variants = {
            "compiled": cpu_train.our_step(case, torch.bfloat16, compiling=True),
            "eager": cpu_train.our_step(case, torch.bfloat16, compiling=False),
            "limit": cpu_train.limit_step(case, torch.bfloat16),
        }
        found = take_turns(f"step, {name}", variants, plan)
        for other in ("eager", "limit"):
            yield finding(f"{name}: {other} / compiled", found, found.ratio(other, "compiled"))


def loss_inputs(size: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N,D) and weights (V,D), in bfloat16 and wanting gradients, and targets (N,)."""
    rows, dim, vocab = size
    torch.manual_seed(0)
    hidden = torch.randn(rows, dim).bfloat16().requires_grad_()
    weight = (0.1 * torch.randn(vocab, dim)).bfloat16().requires_grad_()
    return hidden, weight, torch.randint(vocab, (rows,))


def chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return tg.softcapped_nll(hidden, weight, targets, CAP, fast=True).mean()


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return tg.softcapped_nll_ref(hidden, weight, targets, CAP).mean()


LOSSES = {"chunked": chunked_loss, "eager": plain_loss}


def gradients(loss: Callable, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))


@torch.no_grad()
def matrix_products(hidden: Tensor, weight: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
    """What no form of the loss does without."""
    return hidden @ weight.T, slope @ weight, slope.T @ hidden


def loss(sizes: Sizes, plan: Plan) -> Iterator[Finding]:
    """Head, softcap and cross-entropy, forward and backward; then the memory of fresh processes."""
    inputs = loss_inputs(sizes.loss)
    slope = torch.randn(len(inputs[0]), len(inputs[1])).bfloat16()
    compiled = torch.compile(plain_loss, fullgraph=True, dynamic=False)
    variants = {
        "chunked": functools.partial(gradients, chunked_loss, *inputs),
        "eager": functools.partial(gradients, plain_loss, *inputs),
        "torch.compile": functools.partial(gradients, compiled, *inputs),
        "matrix products": functools.partial(matrix_products, *inputs[:2], slope),
    }
    found = take_turns("loss", variants, plan)
    for other in ("eager", "torch.compile"):
        yield finding(f"{other} / chunked", found, found.ratio(other, "chunked"))
    yield finding("chunked / matrix products", found, found.ratio("chunked", "matrix products"))
    tries = [extra_memory(sizes is TINY) for _ in range(plan.least)]
    mib = {who: statistics.median(t[who] for t in tries) for who in LOSSES}
    values = [t["chunked"] / max(t["eager"], 0.1) for t in tries]
    yield Finding("extra memory: chunked / eager", values, len(tries), {"mib": mib})


def extra_memory(dry: bool) -> dict[str, float]:
    """Peak MiB of one call of each loss in a process of its own, above what the process held before.

    Both at once: memory does not mind company.
    """
    command = [sys.executable, __file__, *["--dry"] * dry, "--memory"]
    started = {who: subprocess.Popen([*command, who], stdout=subprocess.PIPE, text=True) for who in LOSSES}
    said = {who: process.communicate()[0] for who, process in started.items()}
    if any(process.returncode for process in started.values()):
        sys.exit("a process that measures the loss's memory failed, see above")
    mib = {who: float(text.split()[-1]) for who, text in said.items()}
    print(f"loss, memory: {mib} MiB", flush=True)
    return mib


def print_extra_memory(who: str, sizes: Sizes) -> None:
    """One call after a small one, which compiles and starts the threads."""
    hidden, weight, targets = loss_inputs(sizes.loss)
    rows = tg.chunk_rows(*sizes.loss[::2])
    gradients(LOSSES[who], hidden[:rows].detach().requires_grad_(), weight, targets[:rows])
    ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed but kept would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (proc(5))
    before = resident("VmRSS")
    kept = gradients(LOSSES[who], hidden, weight, targets)
    print(round(resident("VmHWM") - before, 1))
    del kept


def resident(name: str) -> float:
    """MiB of this process: VmRSS, what it holds, or VmHWM, the most it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def newton_schulz(sizes: Sizes, plan: Plan) -> Iterator[Finding]:
    """The program's stacks in bfloat16 against one matrix at a time in float32."""
    aims = [aim.what for aim in AIMS if aim.section == "newton_schulz"]
    for what, shape in zip(aims, sizes.stacks, strict=True):
        torch.manual_seed(0)
        stack = torch.randn(shape)
        variants = {
            "batched": functools.partial(tg.orthogonalize, stack.bfloat16(), NS_STEPS),
            "single": functools.partial(one_by_one, stack),
        }
        found = take_turns(f"newton_schulz, {what.split(':')[0]}", variants, plan._replace(box=plan.box / 4))
        yield finding(what, found, found.ratio("single", "batched"))


def one_by_one(stack: Tensor) -> list[Tensor]:
    return [tg.orthogonalize(matrix[None], NS_STEPS) for matrix in stack]


def coded(sizes: Sizes, plan: Plan) -> Iterator[Finding]:
    """Independent draws through the program's coder and through brotli."""
    yield from coded_stream("int6", artifact.drawn_int6(sizes.int6_rows), plan)
    yield from coded_stream("trits", artifact.drawn_trits(sizes.trit_rows), plan)


def coded_stream(ours: str, pool: tg.Pool, plan: Plan) -> Iterator[Finding]:
    """Bytes, and seconds as of a full artifact; brotli's encoder, which takes long, runs once."""
    theirs, densest = f"{ours} by brotli", tg.forms_of(pool.planes[0])[0]
    ways = {ours: artifact.by_rans(None), theirs: artifact.by_form(densest, "brotli")}
    blobs: dict[str, bytes] = {}

    def encode(name: str) -> None:
        blobs[name] = ways[name].encode(pool)

    def decode(name: str) -> np.ndarray:
        return ways[name].decode(blobs[name], pool)

    once = plan._replace(wanted=1, least=1, sample=0.0, box=0.0, warm=0)
    slow = take_turns(f"artifact, {theirs}", {f"encode {theirs}": functools.partial(encode, theirs)}, once)
    encode(ours)
    for name in ways:
        if decode(name).tobytes() != pool.values.tobytes():
            sys.exit(f"{name} does not give back the values that it was given")
        ratio = len(blobs[name]) / tg.entropy_bytes(pool.planes[0], pool.values)
        yield Finding(f"{name}: bytes / entropy", [ratio], 1, {"bytes": len(blobs[name])})
    variants = {f"decode {name}": functools.partial(decode, name) for name in ways}
    variants[f"encode {ours}"] = functools.partial(encode, ours)
    found = take_turns(f"artifact, {ours}", variants, plan._replace(box=plan.box / 2))
    for name, verb in itertools.product(ways, ("decode", "encode")):
        source = slow if (name, verb) == (theirs, "encode") else found
        scale = ARTIFACT_BYTES / len(blobs[name]) / 1000
        seconds = [r[f"{verb} {name}"] * scale for r in source.rounds]
        yield finding(f"{name}: seconds to {verb} 16 MB", source, seconds)


SECTIONS = {"step": step, "loss": loss, "newton_schulz": newton_schulz, "artifact": coded}


# --------------------------------------------------------------------------------------- table


def line(section: str, found: Finding, about: dict) -> dict:
    """A raw line: the numbers of a finding, or that there are none."""
    row = about | {"section": section, "what": found.what, "n": len(found.values), "rounds": found.tried}
    if not found.values:
        return row | {"status": "contended"}
    ends = [float(f"{end:.6g}") for end in (min(found.values), max(found.values))]
    value = float(f"{statistics.median(found.values):.6g}")
    return row | {"status": "measured", "value": value, "spread": ends, **found.detail}


def render(rows: list[dict], dry: bool = False) -> str:
    """The table: of each row its latest measurement, or its latest line where nothing was ever measured."""
    latest: dict[tuple, dict] = {}
    for r in rows:
        key = r["section"], r["what"]
        if r["dry"] == dry and (r["status"] == "measured" or latest.get(key, r)["status"] != "measured"):
            latest[key] = r
    runs = list(dict.fromkeys(where(r) for r in rows if r in latest.values()))
    head = [
        "# What a CPU does, as ratios",
        "",
        *(["DRY: tiny sizes, one unfiltered round; the numbers mean nothing.", ""] if dry else []),
        "`python tests/bench/cpu_suite.py`, all in bfloat16. step: 4 layers, width 256, 8,192 tokens, "
        "forward, backward and update; the limit is the step's matrix products and attention alone. loss: "
        "softcapped linear layer and cross-entropy of 4,096 rows of 256 and 8,192 tokens, forward and "
        "backward; extra memory is the peak of a process of its own above what it held before. "
        "newton_schulz: five iterations, a batch in bfloat16 against single matrices in float32. artifact: "
        "8.4 million int6 values and 8 million trits, independent draws, by the program's coder; seconds are "
        "those of 16,000,000 bytes.",
        "",
        "Variants take turns, and a round counts only where other processes used at most 12 % of the cores' "
        "time in each of its samples; *n*: rounds that counted, of all. *contended*: fewer than 5 did. "
        "Measured: the median; a row without an aim stands beside for comparison.",
        "",
        "| section | what | aim | measured | verdict | n | spread | load | run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    body = [table_row(aim, latest.get((aim.section, aim.what)), runs) for aim in AIMS]
    notes = [f"{i}. {text}" for i, text in enumerate(runs, 1)]
    return "\n".join([*head, *body, *([""] if notes else []), *notes]) + "\n"


def where(r: dict) -> str:
    return (
        f"{r['date']}: threads: {r['threads']}, cores: {r['cores']} ({r['cpu']}), Python {r['python']}, "
        f"numpy {r['numpy']}, torch {r['torch']}, source {r['source'][:8]}, `{r['command']}`"
    )


def table_row(aim: Aim, r: dict | None, runs: list[str]) -> str:
    cells = [aim.section, aim.what, f"{aim.sign} {aim.bound:g}" if aim.sign else "-"]
    if r is None:
        return f"| {' | '.join([*cells, 'not run', *'-----'])} |"
    if r["status"] == "measured":
        low, high = r["spread"]
        spread = f"{low:.4g}-{high:.4g}" if r["n"] > 1 else "-"
        cells += [number(r["value"]), aim.verdict(r["value"])]
    else:
        cells, spread = [*cells, "contended", "-"], "-"
    counted = f"{r['n']} of {r['rounds']}"
    return f"| {' | '.join([*cells, counted, spread, str(r['load']), str(runs.index(where(r)) + 1)])} |"


def number(value: float) -> str:
    """Four digits, and as many more as show on which side of 1 a quotient of bytes is."""
    return f"{value:.4f}" if 0.9 < value < 1.1 else f"{value:.4g}"


def measure(bench: Bench, only: str | None, dry: bool) -> bool:
    """Run the sections and add their lines -> whether all rows were measured."""
    begin, complete = time.monotonic(), True
    about = facts("date", "source", "python", "numpy", "torch", "cores")
    about |= {"cpu": cpu_name_and_matrix_extensions(), "threads": torch.get_num_threads(), "dry": dry}
    about["command"] = shlex.join(["python", "tests/bench/cpu_suite.py", *sys.argv[1:]])
    for name in [only] if only else SECTIONS:
        here = about | facts("load")
        left = max(BUDGET - (time.monotonic() - begin), 0.0)
        plan = UNFILTERED if dry else Plan(box=min(Plan().box, left))
        for found in SECTIONS[name](TINY if dry else FULL, plan):
            row = line(name, found, here)
            print(json.dumps(row), flush=True)
            bench.add(row)
            complete &= row["status"] == "measured"
        print(f"{name} done, {time.monotonic() - begin:.0f} s since the start", flush=True)
    return complete


def main() -> int:
    parser = parser_for(__doc__)
    parser.add_argument("--only", choices=[*SECTIONS], help="one section")
    parser.add_argument("--out", type=Path, help="folder of raw lines and table, instead of records/bench")
    parser.add_argument("--dry", action="store_true", help="tiny sizes; goes to runs/bench_dry without --out")
    parser.add_argument("--memory", choices=[*LOSSES], help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.memory:
        print_extra_memory(words.memory, TINY if words.dry else FULL)
        return 0
    if words.dry and words.out and words.out.resolve() == RECORDS:
        parser.error("a dry run has no place in records/bench: name another folder, or leave --out away")
    bench = DRY if words.dry else BENCH
    if words.out:
        bench = bench._replace(folder=words.out)
    complete = words.table or measure(bench, words.only, words.dry)
    print(bench.write_table(functools.partial(render, dry=words.dry)))
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
