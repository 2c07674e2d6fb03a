"""The project's Triton kernels: right or wrong, and how fast.

    python tests/bench/kernels.py                                     # all of them, at the record's sizes
    python tests/bench/kernels.py --kernel one_pass --rows 65536 --vocab 8192

On a GPU each is held against float64 and timed against its plain form and torch.compile of that. On a CPU
speed means nothing, so correctness alone is looked at: by tests/interpret.py, in Triton's interpreter, at its
own sizes. tests/bench/gpu_suite.py runs the same sections within its boxes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator
from unittest import mock

import torch
import torch.nn.functional as F
from common import ROOT
from gpu_timing import BROKEN, CAP, Bench, BoxEndedError, Case, Gpu, last_line, machine
from torch import Tensor

import train_gpt as tg

LOSSES = ("one_pass", "approximate", "two_pass")
MLPS = ("by_tma", "by_pointer")
WIDTH, HIDDEN, SLOPE = 512, 2048, 0.5  # of the record's MLP
H200 = "H200"

# --------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------


def one_pass_in_place(logits: Tensor, targets: Tensor, fast: bool) -> Tensor:
    """Nats (N,); the logits (N,V) become their slopes. Launched as `one_pass_operator` does."""
    if not tg.runs_triton(logits):
        nats, slopes = tg.softcapped_slopes_ref(logits, targets, CAP)
        logits.copy_(slopes)
        return nats
    (rows, cols), found = logits.shape, logits.new_empty(len(logits), dtype=torch.float32)
    block = 1 << (cols - 1).bit_length()
    warps = max(4, min(16, block // 1024))
    tg.one_pass_kernel()[rows,](logits, targets, found, cols, CAP, block, fast, num_warps=warps)
    return found


def two_pass_both(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    nats = tg.two_pass_operator()(leaf, targets, CAP)[0]
    return nats.detach(), torch.autograd.grad(nats.sum(), leaf)[0]


def nats_and_slopes(form: str, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if form == "two_pass":
        return two_pass_both(logits, targets)
    slopes = logits.clone()
    return one_pass_in_place(slopes, targets, form == "approximate"), slopes


def loss_truth(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nats and slopes in float64, from the formula alone; a negative target counts for nothing."""
    x = logits.double().requires_grad_()
    z = CAP * torch.tanh(x / CAP)
    nats = torch.logsumexp(z, 1) - z.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    nats = nats * (targets >= 0)
    return nats.detach(), torch.autograd.grad(nats.sum(), x)[0]


def plain_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """As `softcapped_nll_ref` does it, from the logits on."""
    return F.cross_entropy(CAP * torch.tanh(tg.wide(logits) / CAP), targets, reduction="none")


def distance(found: Tensor, want: Tensor) -> float:
    """Of two tensors, in units of the second one's norm."""
    want = want.detach().double()
    return float((found.detach().double() - want).norm() / want.norm())


def takes(form: str, vocab: int) -> bool:
    """Whether the program gives rows so long to this kernel."""
    return form == "two_pass" or not tg.read_config({"VOCAB_SIZE": str(vocab)}).two_passes


def draw_targets(bench: Bench, rows: int, vocab: int) -> Tensor:
    return torch.randint(vocab, (rows,), device=bench.device)


def check_loss(bench: Bench, form: str, rows: int, vocab: int) -> None:
    """Nats and slopes of a kernel against float64 of the same logits; every seventh target is ignored."""
    bench.want_time(f"{form} {rows}x{vocab}")
    name = f"{form} {rows:,} x {vocab:,}"
    logits, targets = bench.normal(rows, vocab, scale=20.0), draw_targets(bench, rows, vocab)
    targets[::7] = -100
    with failures_told(bench, name):
        found = nats_and_slopes(form, logits, targets)
        nats, slopes = (distance(a, b) for a, b in zip(found, loss_truth(logits, targets), strict=True))
        exact = form != "approximate"
        note = "" if exact else "what the hardware's tanh costs"
        bench.row(f"{name}: nats", nats, "of norm", aim=["<=", 1e-5] if exact else None, note=note)
        bench.row(f"{name}: slopes", slopes, "of norm", aim=["<=", 3e-3] if exact else None, note=note)
        if not exact:
            shift = float(found[0].double().mean() - loss_truth(logits, targets)[0].mean())
            bench.row(f"{name}: mean loss moves by", shift, "nats", note=note)


def check_head(bench: Bench, form: str, rows: int, vocab: int) -> None:
    """Gradients by hidden states and head, for incoming gradients that differ, against float64.

    Those are powers of two, so that multiplying by them rounds nothing.
    """
    bench.want_time(f"{form} with its head")
    hidden = bench.normal(rows, bench.size(64, 32), scale=3.0).requires_grad_()
    weight = bench.normal(vocab, hidden.shape[1]).requires_grad_()
    targets, g = draw_targets(bench, rows, vocab), 0.5 ** draw_targets(bench, rows, 4).float()
    with failures_told(bench, f"{form} with its head"):
        found = torch.autograd.grad(whole_losses(form)(hidden, weight, targets, CAP), (hidden, weight), g)
        slopes = loss_truth((hidden @ weight.T).detach(), targets)[1] * g[:, None].double()
        want = slopes @ weight.double(), slopes.T @ hidden.double()
        for side, a, b in zip(("hidden states", "head"), found, want, strict=True):
            aim = ["<=", 3e-3] if form != "approximate" else None
            what = f"{form} {rows:,} x {vocab:,}: gradient by the {side}"
            bench.row(what, distance(a, b), "of norm", aim=aim)


def whole_losses(form: str) -> Callable:
    return tg.two_pass_loss() if form == "two_pass" else tg.one_pass_loss(form == "approximate")


@contextlib.contextmanager
def failures_told(bench: Bench, what: str) -> Generator[None]:
    """A case that fails is a line; the others go on, unless the device is left unusable."""
    try:
        yield
    except BoxEndedError:
        raise
    except BROKEN as error:
        traceback.print_exc()
        bench.failed(what, error)
        bench.place.synchronize()


def time_loss(bench: Bench, rows: int, vocab: int, forms: tuple[str, ...] = LOSSES) -> None:
    """Loss and slopes from logits (N,V) that lie in memory: kernels, eager, compiled, Liger."""
    logits, targets = bench.normal(rows, vocab, scale=5.0), draw_targets(bench, rows, vocab)
    place = torch.empty_like(logits).requires_grad_()
    refill = functools.partial(place.detach().copy_, logits)
    compiled = bench.place.compile(plain_nats)

    def differentiated(nats: Callable) -> Callable:
        return lambda: torch.autograd.grad(nats(place, targets).mean(), place)

    cases: dict[str, Case] = {}
    for form in (f for f in forms if takes(f, vocab)):
        if form == "two_pass":
            operator = tg.two_pass_operator()
            cases[form] = Case(differentiated(lambda x, t, o=operator: o(x, t, CAP)[0]), refill)
        else:
            fast = form == "approximate"
            run = functools.partial(one_pass_in_place, place.detach(), targets, fast)
            cases[form] = Case(run, refill)
    cases |= {"eager": Case(differentiated(plain_nats), refill)}
    cases |= {"torch.compile": Case(differentiated(compiled), refill, compiles=True)}
    liger = liger_loss(bench)
    if liger:
        cases["Liger"] = Case(lambda: torch.autograd.grad(liger(place, targets), place), refill)
    report_loss(bench, rows, vocab, bench.time(cases))


def liger_loss(bench: Bench) -> Callable | None:
    """Liger-Kernel's softcapped cross-entropy, where it is installed; else one line says that it is not."""
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        return LigerCrossEntropyLoss(softcap=CAP)
    except ImportError:
        why = "not installed"
    except BROKEN as error:
        why = last_line(error)
    bench.missing("Liger-Kernel", why)
    return None


def report_loss(bench: Bench, rows: int, vocab: int, found: dict) -> None:
    """Milliseconds, and their share of what the bytes alone take at this run's copy bandwidth: 4 bytes a
    logit, one bfloat16 read and one written. Two passes read twice."""
    speed, shape, logits = bench.measured_limits().get("bytes"), f"{rows:,} x {vocab:,}", rows * vocab
    usual = vocab == bench.size(8192, 40)  # the vocabulary that the aims are for
    for name, t in found.items():
        ours = name == "one_pass" and usual
        moved = logits * (6 if name == "two_pass" else 4)
        note = "the kernel alone" if name in {"one_pass", "approximate"} else "forward and backward"
        if name in LOSSES and speed:
            share = 100 * moved / t.ms * 1000 / speed
            note += f"; {moved / t.ms / 1e6:,.0f} GB/s, {share:.0f} % of the copy's"
        aim = ["<=", 0.60, H200] if ours and rows == bench.size(65536, 16) else None
        bench.timing(f"{name} {shape}", t, aim=aim, note=note)
        if speed:
            aim = ["<=", 1.20] if ours else None
            bench.ratio(f"{name} {shape}: over the bytes' time", t.ms, 4 * logits / speed * 1000, aim=aim)
    ms = {name: t.ms for name, t in found.items()}
    for other, least in (("two_pass", 1.5), ("eager", 10.0), ("torch.compile", None), ("Liger", None)):
        aim = [">=", least] if least and usual else None
        bench.ratio(f"{other} / one_pass {shape}", ms.get(other), ms.get("one_pass"), aim=aim)


def time_head(bench: Bench, rows: int, vocab: int, forms: tuple[str, ...] = LOSSES) -> None:
    """The whole loss as training has it: head, softcap, loss, and both gradients."""
    width = bench.size(WIDTH, 16)
    hidden = bench.normal(rows, width).requires_grad_()
    weight = torch.randn(vocab, width, device=bench.device).mul_(0.3).requires_grad_()
    targets = draw_targets(bench, rows, vocab)
    losses = {form: whole_losses(form) for form in forms if takes(form, vocab)}
    losses |= {"eager": tg.softcapped_nll_ref, "torch.compile": bench.place.compile(tg.softcapped_nll_ref)}
    losses |= {"chunked": functools.partial(tg.softcapped_nll, fast=bench.real)}

    def case(name: str, loss: Callable) -> Case:
        def run() -> tuple:
            return torch.autograd.grad(loss(hidden, weight, targets, CAP).mean(), (hidden, weight))

        return Case(run, compiles=name in {"torch.compile", "chunked"})

    found = bench.time({name: case(name, loss) for name, loss in losses.items()})
    limits, flops = bench.measured_limits(), 6 * rows * width * vocab
    for name, t in found.items():
        note = ""
        if len(limits) == 2:
            least = flops / limits["flops"] + 4 * rows * vocab / limits["bytes"]
            note = f"{t.ms / 1000 / least:.2f} of its matrix products and one pass over the logits"
        bench.timing(f"{name} with its head, {rows:,} x {width} x {vocab:,}", t, note=note)


# --------------------------------------------------------------------------------------
# The MLP
# --------------------------------------------------------------------------------------


@contextlib.contextmanager
def descriptors_or_not(way: str) -> Generator[None]:
    """The product by Hopper's copy engine where it can, or by pointers whatever the device."""
    if way == "by_tma":
        yield
    else:
        with mock.patch.object(tg, "takes_descriptors", lambda a, b: False):
            yield


def ways(bench: Bench) -> list[str]:
    """by_tma and by_pointer, or the latter alone where there is no such copy engine, which a line says."""
    sample = bench.normal(8, 8)
    if bench.real and not tg.takes_descriptors(sample, sample):
        bench.missing("squared MLP by_tma", "wants compute capability 9.0 or later")
        return ["by_pointer"]
    return list(MLPS)


def product(a: Tensor, b: Tensor, pre: Tensor, back: bool) -> Tensor:
    """One launch of the squared product: out (R,C); forward fills `pre` besides."""
    if tg.runs_triton(a):
        return tg.squared_product(a, b, pre, SLOPE, back)
    if back:
        return (a @ b.T) * 2.0 * torch.where(pre > 0, pre, SLOPE * SLOPE * pre)
    return F.leaky_relu(pre.copy_(a @ b.T), SLOPE).square()


def check_mlp(bench: Bench, way: str, rows: int, width: int, hidden: int) -> None:
    """Each launch against float64 of the very bfloat16 values that it reads, then all in one with gradients.

    The whole rounds three times in a row, so its aim is that of tests/test_triton.py.
    """
    bench.want_time(f"squared MLP {way}")
    name = f"squared MLP {way} {rows:,} x {width:,} x {hidden:,}"
    x, g = bench.normal(rows, width), bench.normal(rows, width)
    up, down = bench.normal(hidden, width, scale=width**-0.5), bench.normal(width, hidden, scale=hidden**-0.5)
    with failures_told(bench, name), descriptors_or_not(way):
        pre = x.new_empty(rows, hidden)
        post = product(x, up, pre, False)
        back = product(g, down.T.contiguous(), pre, True)
        seen = pre.double()
        bent = torch.where(seen > 0, seen, SLOPE * seen)
        slopes = 2.0 * torch.where(seen > 0, seen, SLOPE * SLOPE * seen)
        pairs = {
            "product": (pre, x.double() @ up.double().T),
            "its square": (post, bent.square()),
            "backward": (back, (g.double() @ down.double()) * slopes),
        }
        for what, (found, want) in pairs.items():
            bench.row(f"{name}: {what}", distance(found, want), "of norm", aim=["<=", 3e-3])
        sides = []
        for function, dtype in ((tg.squared_mlp(), bench.dtype), (tg.squared_mlp_ref, torch.float64)):
            leaves = [t.detach().to(dtype).requires_grad_() for t in (x, up, down)]
            y = function(*leaves, SLOPE)
            sides.append([y, *torch.autograd.grad(y, leaves, g.to(dtype))])
        worst = max(distance(a, b) for a, b in zip(*sides, strict=True))
        bench.row(f"{name}: whole, worst of value and three gradients", worst, "of norm", aim=["<=", 5e-3])


def time_mlp(bench: Bench, rows: int, way_names: list[str]) -> None:
    """Forward and backward at the record's width: ours both ways, eager, compiled; then each launch alone."""
    width, hidden = bench.size(WIDTH, 16), bench.size(HIDDEN, 64)
    x, g = bench.normal(rows, width).requires_grad_(), bench.normal(rows, width)
    up = bench.normal(hidden, width, scale=width**-0.5).requires_grad_()
    down = bench.normal(width, hidden, scale=hidden**-0.5).requires_grad_()

    def case(function: Callable, way: str = "by_tma", compiles: bool = False) -> Case:
        def run() -> tuple:
            with descriptors_or_not(way):
                return torch.autograd.grad(function(x, up, down, SLOPE), (x, up, down), g)

        return Case(run, compiles=compiles)

    cases = {way: case(tg.squared_mlp(), way) for way in way_names} | {"eager": case(tg.squared_mlp_ref)}
    cases["torch.compile"] = case(bench.place.compile(tg.squared_mlp_ref), compiles=True)
    found = bench.time(cases)
    rate, flops = bench.measured_limits().get("flops"), 12 * rows * width * hidden
    shape = f"{rows:,} x {width} x {hidden:,}"
    for name, t in found.items():
        ours = name == way_names[0]
        aim = ["<=", 1.45, H200] if ours and rows == bench.size(65536, 64) else None
        bench.timing(f"{name} {shape}", t, aim=aim, note=f"{flops / t.ms / 1e9:,.0f} TFLOP/s")
        if rate:
            share = flops / t.ms * 1000 / rate
            bench.row(f"{name} {shape}: share of the matmul rate", round(share, 4), "of 1",
                      aim=[">=", 0.72] if ours else None)
    ms = {name: t.ms for name, t in found.items()}
    least = {"torch.compile": 1.1, "eager": None, "by_pointer": None}
    for other in (name for name in least if name != way_names[0]):
        aim = [">=", least[other]] if least[other] else None
        bench.ratio(f"{other} / {way_names[0]} {shape}", ms.get(other), ms.get(way_names[0]), aim=aim)
    time_products(bench, [t.detach() for t in (x, g, up, down)], way_names)


def time_products(bench: Bench, tensors: list[Tensor], way_names: list[str]) -> None:
    """The launches alone, against torch's own product of the same shape, which squares nothing."""
    x, g, up, down = tensors
    pre, by_rows, cases = x.new_empty(len(x), len(up)), down.T.contiguous(), {}

    def case(way: str, back: bool) -> Callable:
        def run() -> Tensor:
            with descriptors_or_not(way):
                return product(g, by_rows, pre, True) if back else product(x, up, pre, False)

        return run

    for way in way_names:
        cases |= {f"{way} forward alone": case(way, False), f"{way} backward alone": case(way, True)}
    cases["torch's product alone"] = lambda: x @ up.T
    flops = 2 * len(x) * up.numel()
    for name, t in bench.time(cases).items():
        bench.timing(name, t, note=f"{flops / t.ms / 1e9:,.0f} TFLOP/s")


# --------------------------------------------------------------------------------------
# Sections
# --------------------------------------------------------------------------------------


def correctness(bench: Bench) -> None:
    """Every kernel of the loss and of the MLP against float64, and `failing_kernels` as training asks it."""
    shapes = [(4096, 8192), (1000, 1024), (77, 5003), (256, 16384)] if bench.real else [(14, 40)]
    for form in loss_names(bench):
        for rows, vocab in shapes:
            check_loss(bench, form, rows, vocab)
        check_head(bench, form, bench.size(4096, 64), bench.size(8192, 80))
    if "two_pass" in loss_names(bench):
        check_loss(bench, "two_pass", bench.size(256, 14), bench.size(50304, 50))
    for way in told_ways(bench):
        check_mlp(bench, way, bench.size(4096, 64), bench.size(WIDTH, 32), bench.size(HIDDEN, 128))
    for form in ("one_pass", "approximate", "two_pass"):
        check_as_training_does(bench, form)


def told_ways(bench: Bench) -> list[str]:
    return ways(bench) if told_loss_names(bench) else []


def loss_names(bench: Bench) -> tuple[str, ...]:
    """The kernels of the loss, or none where there is no Triton to compile them."""
    return LOSSES if tg.has_triton() or not bench.real else ()


def check_as_training_does(bench: Bench, form: str) -> None:
    """What `failing_kernels` finds in a model of the record's width."""
    knobs = {"MODEL_DIM": bench.size(WIDTH, 32), "VOCAB_SIZE": bench.size(8192, 320), "MLP_MULT": 4,
             "NUM_LAYERS": 1, "MLP_NEGATIVE_SLOPE": SLOPE, "FUSED_CE_FORM": form}
    cfg = tg.read_config({name: str(value) for name, value in knobs.items()})
    with failures_told(bench, f"failing_kernels, {form}"):
        world = world_of(bench)
        failed = tg.failing_kernels(tg.make_model(cfg, world), cfg, world)
        note = "; ".join(f"{name}: {why}" for name, why in failed.items())
        bench.row(f"failing_kernels, {form}", len(failed), "kernels", aim=["<=", 0], note=note)


def world_of(bench: Bench, compiling: bool = False) -> tg.World:
    return tg.World(0, 1, bench.device, bench.dtype, compiling, tg.Journal(None), ROOT)


def cross_entropy(bench: Bench) -> None:
    forms = told_loss_names(bench)
    wide, usual, small = bench.size(50304, 60), bench.size(8192, 40), bench.size(1024, 24)
    rows, more = bench.size(65536, 16), bench.size(98304, 24)
    time_loss(bench, rows, usual, forms)
    time_head(bench, rows, usual, forms)
    time_loss(bench, more, usual, forms)
    time_loss(bench, rows, small, forms)
    time_loss(bench, bench.size(10496, 8), wide, forms)
    time_head(bench, more, usual, forms)


def told_loss_names(bench: Bench) -> tuple[str, ...]:
    if not loss_names(bench):
        bench.missing("kernels by Triton", "triton is not installed")
    return loss_names(bench)


def mlp(bench: Bench) -> None:
    if told_ways(bench):
        time_mlp(bench, bench.size(65536, 64), ways(bench))


# --------------------------------------------------------------------------------------
# One kernel at will
# --------------------------------------------------------------------------------------


def on_a_gpu(kernel: str, rows: int, vocab: int) -> None:
    place = Gpu()
    print(json.dumps(machine(place)))
    bench = Bench(kernel, place, 3600.0, lambda row: print(said(row), flush=True))
    if kernel == "squared_mlp":
        for way in ways(bench):
            check_mlp(bench, way, min(rows, 4096), WIDTH, HIDDEN)
        time_mlp(bench, rows, ways(bench))
    elif not takes(kernel, vocab):
        print(f"{kernel} does not take rows of {vocab:,} logits; two_pass does")
    else:
        check_loss(bench, kernel, min(rows, 4096), vocab)
        check_head(bench, kernel, min(rows, 4096), vocab)
        time_loss(bench, rows, vocab, tuple(dict.fromkeys((kernel, "one_pass", "two_pass"))))
        time_head(bench, rows, vocab, (kernel,))


def said(row: dict) -> str:
    """A row as one line for the terminal."""
    if row.get("measured") is None:
        return f"{row['what']}: {row.get('missing') or row.get('error')}"
    aim = f" (aim {row['aim'][0]} {row['aim'][1]:g})" if "aim" in row else ""
    note = f"; {row['note']}" if "note" in row else ""
    return f"{row['what']}: {row['measured']:.6g} {row['unit']}{aim}{note}"


INTERPRETED = {  # kernel -> the cases of tests/interpret.py that run it
    "one_pass": ("one_pass", "whole loss one_pass"),
    "two_pass": ("two_pass", "whole loss two_pass"),
    "squared_mlp": ("mlp", "by_tma"),
}


def interpreted_figures() -> dict:
    command = [sys.executable, ROOT / "tests/interpret.py"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def on_a_cpu(kernel: str, figures: dict) -> None:
    if kernel not in INTERPRETED:
        print(f"{kernel}: the interpreter has no such instruction; only a GPU can tell")
        return
    for name in (n for n in figures if n.startswith(INTERPRETED[kernel])):
        print(f"{name}: {figures[name]}")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    names = [*LOSSES, "squared_mlp"]
    parser.add_argument("--kernel", choices=names, help="one of them")
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--vocab", type=int, default=8192)
    args = parser.parse_args()
    chosen = [args.kernel] if args.kernel else names
    if torch.cuda.is_available():
        for kernel in chosen:
            on_a_gpu(kernel, args.rows, args.vocab)
        return
    print("No CUDA device: correctness only, in Triton's interpreter, at the sizes of tests/interpret.py.")
    print("Distances from float64, in units of its norm.")
    figures = interpreted_figures()
    for kernel in chosen:
        on_a_cpu(kernel, figures)


if __name__ == "__main__":
    main()
