"""What the GPU benchmarks share: a device that can be timed, a box of seconds, and the lines they write.

`Gpu` and `Host` have one interface. Host is for dry runs: it executes the same code at tiny sizes on a CPU,
with the operators' plain twins, so that nothing but CUDA's events waits for a GPU to be tried. What it times
means nothing, and every line says so.
"""

from __future__ import annotations

import statistics
import subprocess
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from common import facts
from torch import Tensor

import train_gpt as tg

CAP = 30.0  # LOGIT_SOFTCAP of the records
LEAST = 10  # samples that a median wants
ROUNDS = 20
WRITES = 8  # of 256 MB before each sample: the first empties the cache, all give the host time to get ahead
RESERVE, COMPILING = 3.0, 15.0  # seconds of a box without which no further case, or compilation, is begun
BROKEN = (Exception,)  # whatever a kernel or a compiler raises, it is that case's result


class BoxEndedError(Exception):
    """The section's seconds are over; the message says what was left out."""


class Timing(NamedTuple):
    """Milliseconds: median, least and most of n samples."""

    ms: float
    low: float
    high: float
    n: int


class Case(NamedTuple):
    """What is timed, and what has to be put right before each time, outside of it."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    compiles: bool = False  # takes long the first time


class Gpu:
    """The first CUDA device, timed by its own events, with nothing of the data in its cache."""

    real, dtype = True, torch.bfloat16

    def __init__(self) -> None:
        cfg = tg.read_config({"DEVICE": "cuda"})
        self.device = tg.pick_device(cfg, 0)  # sets the precision that training has
        self.flushed = torch.empty(1 << 28, dtype=torch.uint8, device=self.device)

    def queue(self, case: Case, cold: bool = True) -> Callable[[], float]:
        """Start a case; what is returned waits for its end and gives its milliseconds."""
        case.prepare()
        for _ in range(WRITES if cold else 0):
            self.flushed.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        case.run()
        end.record()

        def wait() -> float:
            end.synchronize()
            return begin.elapsed_time(end)

        return wait

    def compile(self, function: Callable) -> Callable:
        return torch.compile(function, fullgraph=True, dynamic=False)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def describe(self) -> dict:
        about = torch.cuda.get_device_properties(self.device)
        memory = f"{about.total_memory / 2**30:.0f} GiB"
        name = f"{about.name} ({memory}, {about.multi_processor_count} SMs, sm_{about.major}{about.minor})"
        return {"device": name, "driver": driver(), "cuda": torch.version.cuda}


class Host:
    """A CPU in the place of a GPU: the same calls, timed by the clock, for dry runs."""

    real, dtype = False, torch.bfloat16

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def queue(self, case: Case, cold: bool = True) -> Callable[[], float]:
        case.prepare()
        begin = time.perf_counter()
        case.run()
        spent = (time.perf_counter() - begin) * 1000
        return lambda: spent

    def compile(self, function: Callable) -> Callable:
        return torch.compile(function, fullgraph=True, dynamic=False, backend="eager")

    def synchronize(self) -> None:
        """It does what it is given at once."""

    def empty_cache(self) -> None:
        """There is none."""

    def forget_peak(self) -> None:
        """Nothing counts it."""

    def peak_bytes(self) -> int:
        return 0

    def describe(self) -> dict:
        return {"device": "CPU", "driver": "none", "cuda": torch.version.cuda or "none"}


def driver() -> str:
    """The NVIDIA driver's version, from nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown (no nvidia-smi)"
    return said.split("\n", maxsplit=1)[0].strip()


def machine(place: Gpu | Host) -> dict:
    """What the table's head says of the device and the versions."""
    import importlib.metadata as installed

    try:
        triton = installed.version("triton")
    except installed.PackageNotFoundError:
        triton = "not installed"
    found = facts("torch", "python", "source") | {"triton": triton}
    return place.describe() | found | {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M")}


class Bench:
    """One section at work: its device, its seconds, and where its lines go."""

    def __init__(
        self, section: str, place: Gpu | Host, seconds: float, write: Callable[[dict], None]
    ) -> None:
        self.section, self.place, self.write = section, place, write
        self.device, self.dtype, self.real = place.device, place.dtype, place.real
        self.deadline = time.monotonic() + seconds
        self.limits: dict[str, float] = {}  # bytes/s and FLOP/s that this run has measured
        self.told: set[tuple[str, str]] = set()
        self.left_out: list[str] = []

    # ---------------------------------------------------------------------------------- seconds and sizes

    def size(self, real: int, dry: int) -> int:
        return real if self.real else dry

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def want_time(self, what: str) -> None:
        """Raise BoxEndedError where the section's seconds are over."""
        if self.left() <= 0:
            raise BoxEndedError(f"not measured any more: {what}")

    # ---------------------------------------------------------------------------------- lines

    def row(self, what: str, measured: float | None, unit: str, **more: object) -> None:
        """A line of the table. more: aim (sign, number, perhaps its device), spread, n, note."""
        dry = {} if self.real else {"dry": True}
        kept = {key: value for key, value in more.items() if value is not None and value != ""}
        line = {"section": self.section, "what": what, "measured": measured, "unit": unit}
        self.write(line | kept | dry)

    def timing(self, what: str, t: Timing | None, **more: object) -> None:
        """A line in milliseconds, if the case ran."""
        if t is not None:
            self.row(what, round(t.ms, 5), "ms", spread=[round(t.low, 5), round(t.high, 5)], n=t.n, **more)

    def ratio(self, what: str, over: float | None, under: float | None, **more: object) -> None:
        """A line with a quotient, if both sides were measured."""
        if over is not None and under:
            self.row(what, round(over / under, 4), "x", **more)

    def missing(self, what: str, why: str) -> None:
        """One line, however often it is said."""
        if (what, why) not in self.told:
            self.row(what, None, "", missing=why)
        self.told.add((what, why))

    def failed(self, what: str, error: Exception) -> None:
        self.row(what, None, "", error=last_line(error))

    # ---------------------------------------------------------------------------------- time

    def time(self, cases: dict[str, Callable | Case]) -> dict[str, Timing]:
        """Name -> timing, of those cases that run: each once in turn, round after round.

        A case that fails gets a line that says why, and the others go on. Raises BoxEndedError, and what the
        device raises when it has been left unusable.
        """
        ready: dict[str, Case] = {}
        for name, case in cases.items():
            case = case if isinstance(case, Case) else Case(case)
            if not ready:
                self.want_time(", ".join(cases))
            elif self.left() < (COMPILING if case.compiles else RESERVE):
                self.left_out.append(name)
                self.missing(name, "not measured: the box was nearly over")
                continue
            if self.warm(name, case):
                ready[name] = case
        samples: dict[str, list[float]] = {name: [] for name in ready}
        rounds = ROUNDS if self.real else 3
        for done in range(rounds if ready else 0):
            if self.left() <= 0 and done >= LEAST:
                break
            waits = [(name, self.place.queue(case)) for name, case in ready.items()]
            for name, wait in waits:
                samples[name].append(wait())
        return {n: Timing(statistics.median(s), min(s), max(s), len(s)) for n, s in samples.items()}

    def warm(self, name: str, case: Case) -> bool:
        """Run a case until it is compiled and steady; whether it can run."""
        try:
            for _ in range(3 if self.real else 1):
                case.prepare()
                case.run()
            self.place.synchronize()
        except BROKEN as error:
            traceback.print_exc()
            self.failed(name, error)
            self.place.synchronize()  # raises where no other case can run either
            self.place.empty_cache()
            return False
        return True

    # ---------------------------------------------------------------------------------- data and limits

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.float32).mul_(scale).to(self.dtype)

    def measured_limits(self) -> dict[str, float]:
        """{"bytes": bytes/s of a copy, "flops": FLOP/s of 8192^3}, measured here if not before."""
        if not self.limits:
            self.limits = measure_limits(self)[0]
        return self.limits


def last_line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {text[-1].strip()}"[:300]


def measure_limits(bench: Bench) -> tuple[dict[str, float], dict[str, Timing]]:
    """Copy bandwidth, read and write together, and the rate of 8192^3 in bfloat16 on random data."""
    count, side = bench.size(1 << 30, 1 << 12), bench.size(8192, 32)
    source = bench.normal(count // 1024, 1024)
    target, a, b = torch.empty_like(source), bench.normal(side, side), bench.normal(side, side)
    found = bench.time({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b})
    bytes_moved, flops = 2 * source.numel() * source.element_size(), 2 * side**3
    work = {"bytes": ("copy", bytes_moved), "flops": ("matmul", flops)}
    limits = {key: amount / found[name].ms * 1000 for key, (name, amount) in work.items() if name in found}
    return limits, found


def flops_per_token(cfg: tg.Config, loops: int, context: float = 600.0) -> float:
    """Model FLOP of training on one token: six for each visit of a weight, the head's included, and 3.5
    times attention's forward. `context` is how many keys a query sees on average."""
    model = cfg.model
    kv = model.kv_heads * model.head_dim
    matrices = 2 * model.dim**2 + 2 * model.dim * kv + 2 * model.dim * model.hidden
    plan = tg.layer_plan(cfg, loops)
    passes = len(plan.encoder) + len(plan.decoder)
    return 6 * (passes * matrices + model.vocab * model.dim) + passes * 3.5 * 4 * context * model.dim


def read_env(path: Path) -> dict[str, str]:
    """KEY=value lines of a record's recipe."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def draw_row(tokens: int, vocab: int, mean: int, seed: int) -> object:
    """(tokens+1,) ids of documents whose lengths vary around `mean`, each from BOS on."""
    import numpy as np

    random = np.random.default_rng(seed)
    row = random.integers(4, vocab, tokens + 1)
    starts = np.cumsum(random.geometric(1 / mean, 2 * tokens // mean + 2))
    row[starts[starts < tokens]] = tg.BOS
    row[0] = tg.BOS
    return row


def mean_context(docs: Tensor) -> float:
    """Keys that a query sees on average, itself included."""
    lengths = docs.diff().double()
    return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())
