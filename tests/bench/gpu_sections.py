"""What tests/bench/gpu_suite.py measures besides the kernels of tests/bench/kernels.py: a function a section.

Each takes a Bench and writes its lines as soon as it has them; what its box has no room for it leaves out.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from common import ROOT
from gpu_timing import (
    BROKEN,
    LEAST,
    Bench,
    Case,
    Timing,
    draw_row,
    flops_per_token,
    last_line,
    mean_context,
    measure_limits,
    read_env,
)
from kernels import H200, HIDDEN, WIDTH, check_mlp, distance, failures_told, told_ways, world_of
from kernels import correctness as kernels_correctness
from torch import Tensor

import train_gpt as tg

HEADS, KV, HEAD_DIM, LENGTH, MEAN = 8, 4, 64, 2048, 600  # the record's attention; tokens of its documents
PEAK = 989e12  # FLOP/s of an H100 or H200 in dense bfloat16, as published

# --------------------------------------------------------------------------------------
# Ceilings
# --------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> None:
    """What this device reaches on work that is nothing else: the limits that all shares are of."""
    limits, found = measure_limits(bench)
    bench.limits = limits
    if "bytes" in limits:
        t = found["copy"]
        bench.timing("copy", t)
        bench.row("copy bandwidth, read and write", limits["bytes"], "B/s", note="4.3e12 is an H200's")
    if "flops" in limits:
        bench.timing("matmul 8192^3", found["matmul"])
        bench.row("matmul rate, 8192^3 bfloat16 on random data", limits["flops"], "FLOP/s",
                  note="7.9e14 is an H200's, 9.89e14 its data sheet's")
    rows, width, hidden = bench.size(65536, 32), bench.size(WIDTH, 16), bench.size(HIDDEN, 24)
    shapes = {"up": (width, hidden), "down": (hidden, width), "head": (width, bench.size(8192, 40))}
    pairs = {name: (bench.normal(rows, a), bench.normal(b, a)) for name, (a, b) in shapes.items()}
    timings = bench.time({name: functools.partial(times, x, w) for name, (x, w) in pairs.items()})
    for name, t in timings.items():
        (a, b), rate = shapes[name], 2 * rows * shapes[name][0] * shapes[name][1] / t.ms * 1000
        note = f"{rate / 1e12:,.0f} TFLOP/s"
        note += f", {100 * rate / limits['flops']:.0f} % of 8192^3" if "flops" in limits else ""
        bench.timing(f"{name}: {rows:,} x {a:,} x {b:,}", t, note=note)


def times(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.T


# --------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------


def backends(bench: Bench) -> dict[str, Callable]:
    """ATTENTION's choices that can run here; one line for each that cannot."""
    found = {}
    for choice in ("flash3", "flash2", "varlen", "flex", "sdpa"):
        try:
            name, found[choice] = tg.pick_attention(bench.device, bench.dtype, False, choice=choice)
        except tg.UserError as error:
            bench.missing(f"attention {choice}", str(error).split("; ATTENTION=auto")[0])
        except BROKEN as error:
            bench.missing(f"attention {choice}", last_line(error))
        else:
            bench.row(f"attention {choice} is", None, "", note=name)
    return found


def draw_heads(bench: Bench, tokens: int) -> list[Tensor]:
    return [bench.normal(1, tokens, n, HEAD_DIM).requires_grad_() for n in (HEADS, KV, KV)]


def draw_documents(bench: Bench, tokens: int, length: int) -> Tensor:
    """Boundaries as training has them, the empty ones at their end included."""
    row = draw_row(tokens, 8192, bench.size(MEAN, 12), seed=0)
    return tg.packed([row], tg.BOS, length).docs.to(bench.device)


def check_attention(bench: Bench) -> None:
    """Value and gradients of every backend inside documents, against SDPA in float64 of the same values."""
    tokens, length = bench.size(4096, 64), bench.size(LENGTH, 32)
    docs, heads = draw_documents(bench, tokens, length), draw_heads(bench, tokens)
    g, sides = bench.normal(1, tokens, HEADS, HEAD_DIM), {}
    wide = [t.detach().double().requires_grad_() for t in heads]
    y = tg.attend_segments_ref(*wide, docs)
    want = [y, *torch.autograd.grad(y, wide, g.double())]
    for name, attend in backends(bench).items():
        bench.want_time(f"attention {name}")
        with failures_told(bench, f"attention {name}"):
            y = attend(*heads, docs, length)
            sides[name] = [y, *torch.autograd.grad(y, heads, g)]
            worst = max(distance(a, b) for a, b in zip(sides[name], want, strict=True))
            bench.row(f"attention {name}: worst of value and three gradients", worst, "of norm",
                      aim=["<=", 0.01])
    names = list(sides)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            apart = max(distance(a, b) for a, b in zip(sides[one], sides[other], strict=True))
            bench.row(f"attention {one} and {other} are apart by", apart, "of norm", aim=["<=", 0.01])


def correctness(bench: Bench) -> None:
    """All kernels, all of attention, and last the MLP at odd sizes, each of which is compiled anew."""
    kernels_correctness(bench)
    check_attention(bench)
    for way in told_ways(bench):
        check_mlp(bench, way, *((77, 72, 200) if bench.real else (33, 24, 100)))


def attention(bench: Bench) -> None:
    """Forward and backward of every backend: rows of 2,048 tokens, and documents of 600 on average."""
    tokens, length = bench.size(65536, 64), bench.size(LENGTH, 32)
    heads, found = draw_heads(bench, tokens), backends(bench)
    rows = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=bench.device)
    cuts = {"whole rows": rows, "documents": draw_documents(bench, tokens, length)}
    g = bench.normal(1, tokens, HEADS, HEAD_DIM)
    for what, docs in cuts.items():
        flops = 3.5 * 4 * mean_context(docs.cpu()) * tokens * HEADS * HEAD_DIM
        cases = {name: case_of(attend, heads, g, (docs, length)) for name, attend in found.items()}
        if "flex" in cases:
            cases["flex"] = Case(cases["flex"], compiles=True)
        if what == "whole rows" and "sdpa" in cases:  # one call for all, which has no boundaries to mind
            folded = [t.detach().view(-1, length, *t.shape[2:]).requires_grad_() for t in heads]
            cases["sdpa"] = case_of(found["sdpa"], folded, g.view(folded[0].shape), (None, length))
        for name, t in bench.time(cases).items():
            bench.timing(f"{name}, {what}, {tokens:,} tokens", t, note=f"{flops / t.ms / 1e9:,.1f} TFLOP/s")


def case_of(attend: Callable, heads: list[Tensor], g: Tensor, place: tuple) -> Callable:
    return lambda: torch.autograd.grad(attend(*heads, *place), heads, g)


# --------------------------------------------------------------------------------------
# Muon and ternary weights
# --------------------------------------------------------------------------------------


def record(bench: Bench, **knobs: object) -> tg.Config:
    """The configuration of records/r1855 with some knobs otherwise; on a CPU with every size small."""
    env = read_env(ROOT / "records/r1855/env") | {k: str(v) for k, v in knobs.items()}
    small = {"VOCAB_SIZE": 320, "MODEL_DIM": 32, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "ROPE_DIMS": 4,
             "TRAIN_SEQ_LEN": 32, "TRAIN_BATCH_TOKENS": 512, "GRAD_ACCUM_STEPS": 2, "COMPILE": 0,
             "DTYPE": "bfloat16", "DEVICE": "cpu"}
    return tg.read_config(env if bench.real else env | {k: str(v) for k, v in small.items()})


def muon(bench: Bench) -> None:
    """Orthogonalisation of all the record's matrices, shape by shape; and what ternary weights cost."""
    cfg, shapes = record(bench), {}
    for p in tg.group_params(tg.empty_model(cfg, world_of(bench)))["muon"].values():
        shapes[tuple(p.shape)] = shapes.get(tuple(p.shape), 0) + 1
    stacks = [bench.normal(count, *shape) for shape, count in shapes.items()]
    steps = cfg.optim.ns_steps
    flops = sum(count * newton_schulz_flops(*shape, steps) for shape, count in shapes.items())
    fast = bench.place.compile(tg.polar_express)
    forms = {"polar_express": tg.polar_express, "quintic": tg.orthogonalize, "polar_express compiled": fast}
    runs = {name: functools.partial(each_of, f, stacks, steps) for name, f in forms.items()}
    found = bench.time({name: Case(run, compiles="compiled" in name) for name, run in runs.items()})
    rate = bench.measured_limits().get("flops")
    for name, t in found.items():
        bench.timing(f"{name} x{steps}, all stacks", t, note=f"{flops / t.ms / 1e9:,.0f} TFLOP/s")
        if rate:
            aim = [">=", 0.5] if name == "polar_express compiled" else None  # as training has it
            bench.row(f"{name}: share of the matmul rate", flops / t.ms * 1000 / rate, "of 1", aim=aim)
    del stacks
    ternary(bench)


def each_of(function: Callable, stacks: list[Tensor], steps: int) -> list[Tensor]:
    return [function(stack, steps) for stack in stacks]


def newton_schulz_flops(rows: int, cols: int, steps: int) -> int:
    """Of one matrix: x x', its square, and their product with x, every step."""
    low, high = min(rows, cols), max(rows, cols)
    return steps * (4 * low * low * high + 2 * low**3)


def ternary(bench: Bench) -> None:
    """fake_quant of 74M weights to bfloat16: 4 bytes read and 2 written an element."""
    w = torch.randn(bench.size(96256, 16), bench.size(768, 256), device=bench.device)

    def quantised(w: Tensor) -> Tensor:
        return tg.Ternary().fake_quant(w).to(torch.bfloat16)

    fast = bench.place.compile(quantised)
    cases = {"eager": Case(lambda: quantised(w)), "compiled": Case(lambda: fast(w), compiles=True)}
    found = bench.time(cases)
    speed = bench.measured_limits().get("bytes")
    for name, t in found.items():
        aim = ["<=", 0.2, H200] if name == "compiled" else None
        note = f"{6 * w.numel() / t.ms / 1e6:,.0f} GB/s"
        note += f", {100 * 6 * w.numel() / t.ms * 1000 / speed:.0f} % of the copy's" if speed else ""
        bench.timing(f"ternary fake_quant of {w.numel():,} weights, {name}", t, aim=aim, note=note)


# --------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------

UNFUSED = {"FUSED_CE_ENABLED": 0, "FUSED_MLP": 0}


class Stretch(NamedTuple):
    """Steps taken with one number of loops."""

    ms: list[float]
    seconds: float  # of them all, by the clock
    figures: list[Tensor]  # (3,) a step: loss, gradient norm, whether it was finite
    warm: float  # seconds of warm-up and compilation


def training(bench: Bench) -> None:
    """The record's own step at its own batch, before and after looping; then the same without our kernels."""
    speeds: dict[str, dict[int, float]] = {"ours": {}, "unfused": {}}
    for who, knobs, count in (("ours", {}, bench.size(30, 2)), ("unfused", UNFUSED, bench.size(LEAST, 2))):
        with failures_told(bench, who):
            speeds[who] = train_as(bench, who, knobs, count)
        gc.collect()
        bench.place.empty_cache()
    for loops, speed in speeds["ours"].items():
        bench.ratio(f"ours / unfused, tokens/s, {loops} loops", speed, speeds["unfused"].get(loops))


def train_as(bench: Bench, who: str, knobs: dict, count: int) -> dict[int, float]:
    """Loops -> tokens/s of `count` steps, or of as many as the box allows."""
    cfg = record(bench, MATRIX_INIT="uniform", **knobs)  # orthogonal matrices take seconds to draw
    place = tg.World(0, 1, bench.device, bench.dtype, False, tg.Journal(None), ROOT)
    world = tg.choose_speed(cfg, place)
    model = tg.make_fast(tg.make_model(cfg, world), world)
    tg.settle_kernels(model, cfg, world)
    t = tg.Trainer(model, None, cfg, world, "")
    fused = all(block.mlp.fused is not None for block in model.blocks) if cfg.compute.fused_mlp else False
    note = f"attention {model.attention_name}, loss {model.loss_name}, MLP {'fused' if fused else 'plain'}, "
    note += f"compiled {int(world.compiling)}, {tg.param_count(model):,} parameters, MATRIX_INIT=uniform"
    bench.row(f"{who}: what ran", None, "", note=note)
    rows = [draw_row(cfg.data.span, cfg.model.vocab, bench.size(MEAN, 12), i) for i in range(cfg.data.spans)]
    each = cfg.data.spans // tg.micro_batches(cfg, 1)
    groups = [rows[i : i + each] for i in range(0, len(rows), each)]
    batches = [tg.to_device(tg.packed(group, tg.BOS, cfg.data.seq_len), world) for group in groups]
    context = statistics.mean(mean_context(b.docs.cpu()) for b in batches)
    speeds: dict[int, float] = {}
    for phase in tg.warm_phases(cfg):
        bench.want_time(f"{who}, {phase.loops} loops, {count} steps")
        stretch = take_steps(bench, t, batches, phase, count)
        speeds[phase.loops] = report_training(bench, who, cfg, phase.loops, context, stretch)
    return speeds


def take_steps(bench: Bench, t: tg.Trainer, batches: list, phase: tg.Phase, count: int) -> Stretch:
    """Up to `count` steps after a warm-up that compiles; the host runs one step ahead, as in training."""
    begin = time.perf_counter()
    for _ in range(bench.size(3, 1)):
        tg.train_step(t, batches, phase)
        bench.place.synchronize()
    warm = time.perf_counter() - begin
    bench.want_time(f"{phase.loops} loops, after {warm:.0f} s of compilation and warm-up")
    bench.place.forget_peak()
    figures, ms, waits = [], [], deque()
    step = Case(lambda: figures.append(tg.train_step(t, batches, phase)))
    begin = time.perf_counter()
    for _ in range(count):
        waits.append(bench.place.queue(step, cold=False))
        if len(waits) > 1:
            ms.append(waits.popleft()())
        if bench.left() <= 0:
            break
    ms += [wait() for wait in waits]
    bench.place.synchronize()
    return Stretch(ms, time.perf_counter() - begin, figures, warm)


def report_training(
    bench: Bench, who: str, cfg: tg.Config, loops: int, context: float, found: Stretch
) -> float:
    """Lines of one stretch -> tokens/s, by the clock over all of its steps."""
    steps, when = len(found.ms), "before" if loops == 0 else "after"
    name = f"{who}, {when} looping ({loops} loops)"
    speed = steps * cfg.data.batch_tokens / found.seconds
    aims = {0: 1.15e6, cfg.loop.count: 0.80e6} if who == "ours" else {}
    each = cfg.data.batch_tokens // tg.micro_batches(cfg, 1)
    tokens = f"micro-batches of {each:,} tokens, {cfg.data.batch_tokens:,} a step, already on the device"
    aim = [">=", aims[loops], H200] if loops in aims else None
    bench.row(f"{name}: tokens/s", speed, "tokens/s", aim=aim, n=steps, note=tokens)
    timing = Timing(statistics.median(found.ms), min(found.ms), max(found.ms), steps)
    bench.timing(f"{name}: a step", timing, note=f"warm-up and compilation {found.warm:.0f} s")
    flops = flops_per_token(cfg, loops, context)
    note = f"{flops / 1e6:.0f}M FLOP a token at {context:.0f} keys a query"
    bench.row(f"{name}: MFU of 989 TFLOP/s", flops * speed / PEAK, "of 1", note=note)
    rate = bench.measured_limits().get("flops")
    if rate:
        aim = [">=", 0.38] if who == "ours" else None
        share = flops * speed / rate
        bench.row(f"{name}: MFU of the matmul rate measured here", share, "of 1", aim=aim, note=note)
    bench.row(f"{name}: peak memory", bench.place.peak_bytes() / 2**30, "GiB")
    losses = torch.stack(found.figures).cpu()
    bench.row(f"{name}: steps that were not finite", int((losses[:, 2] == 0).sum()), "steps", aim=["<=", 0],
              note=f"loss {float(losses[0, 0]):.3f} to {float(losses[-1, 0]):.3f}")
    return speed


# --------------------------------------------------------------------------------------
# Artifact
# --------------------------------------------------------------------------------------


def artifact(bench: Bench) -> None:
    """Decode what is as large as a record's artifact, to a model on the device; by the clock."""
    cfg = record(bench, COMPRESSOR="rans")
    world = world_of(bench)
    host = tg.World(0, 1, torch.device("cpu"), bench.dtype, False, tg.Journal(None), ROOT)
    model = tg.empty_model(cfg, host).to_empty(device="cpu")
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.05, generator=random)
    begin = time.perf_counter()
    blob = tg.export(model, cfg).blob
    spent = time.perf_counter() - begin
    bench.row("encode", spent, "s", note=f"{len(blob):,} bytes, random weights, rans; not a part of scoring")
    seconds, what = [], f"decode of {len(blob):,} bytes to the device"
    for _ in range(3):
        if seconds and bench.left() <= 0:
            break
        bench.want_time(what)
        begin = time.perf_counter()
        tg.load(blob, cfg, world, "the artifact")
        bench.place.synchronize()
        seconds.append(time.perf_counter() - begin)
    bench.row(what, round(statistics.median(seconds), 4), "s", aim=["<=", 3.0], n=len(seconds),
              spread=[round(min(seconds), 4), round(max(seconds), 4)])
