"""Triton without a GPU: kernels in its interpreter against float64, and compiled for a Hopper GPU."""

import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import train_gpt
from conftest import ROOT
from test_kernels import distance, problem, truth
from test_model import config, lone, scrambled, tokens_of
from train_gpt import (
    Ctx,
    one_pass_kernel,
    one_pass_loss,
    one_pass_operator,
    squared_kernels,
    squared_mlp,
    squared_mlp_ref,
    squared_operator,
    two_pass_kernels,
    two_pass_loss,
    two_pass_operator,
)

CPU = torch.device("cpu")
LOSSES = {"one_pass": lambda: one_pass_loss(False), "two_pass": two_pass_loss}


# --------------------------------------------------------------------------------------
# What the kernels compute: the figures of tests/interpret.py
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def figures() -> dict:
    run = subprocess.run(
        [sys.executable, ROOT / "tests/interpret.py"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("form", ["one_pass", "two_pass"])
def test_softcapped_loss_and_slopes_are_those_of_the_formula(figures, form):
    """Rows of one and of many blocks, whole and partly filled."""
    shapes = [name for name in figures if re.fullmatch(rf"{form} \d+x\d+", name)]
    assert len(shapes) == 5
    for name in [*shapes, f"{form} ignored"]:
        assert max(figures[name]) <= 1e-6, name


@pytest.mark.parametrize("form", ["one_pass", "two_pass"])
def test_softcapped_loss_at_its_borders(figures, form):
    assert figures[f"{form} ignored row"] == [0.0, 0.0]
    error, finite = figures[f"{form} extremes"]
    assert error <= 1e-6
    assert finite
    assert figures[f"{form} nan rows"] == [[False, False, True, False]] * 2
    nll, slopes = figures[f"{form} bfloat16"]
    assert nll <= 1e-6
    assert slopes <= 8e-3  # the interpreter cuts bfloat16 off where a GPU rounds it


@pytest.mark.parametrize("form", ["one_pass", "two_pass"])
def test_whole_loss_has_the_gradients_of_the_formula(figures, form):
    assert max(figures[f"whole loss {form}"]) <= 1e-6


def test_squared_mlp_is_the_formula(figures):
    cases = [name for name in figures if name.startswith("mlp ")]
    assert len(cases) == 4
    assert max(max(figures[name]) for name in cases) <= 1e-6
    assert max(figures["by_tma forward"] + figures["by_tma back"]) <= 1e-6


# --------------------------------------------------------------------------------------
# What a Hopper GPU would run: compiled here, and read as machine code
# --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Machine:
    registers: int  # a thread
    spilled: int  # bytes of stack a thread
    shared: int
    special: int  # instructions of the special-function unit
    products: int  # wgmma instructions
    copies: int  # of the tensor memory accelerator


def for_hopper(kernel: object, kinds: dict[str, str], consts: dict, folder: Path, **options: int) -> Machine:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(kinds.values())
        if kind[0] == "*" or kind == "i32"
    }
    signature = kinds | dict.fromkeys(consts, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=consts, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    (folder / "cubin").write_bytes(built.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"

    def read(*command: object) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    used = read(tools / "cuobjdump", "-res-usage", folder / "cubin")
    code = read(tools / "nvdisasm", "-c", folder / "cubin")
    return Machine(
        registers=int(re.search(r"REG:(\d+)", used)[1]),
        spilled=int(re.search(r"STACK:(\d+)", used)[1]) + int(re.search(r"LOCAL:(\d+)", used)[1]),
        shared=built.metadata.shared,
        special=len(re.findall(r"\bMUFU\b", code)),
        products=built.asm["ptx"].count("wgmma.mma_async"),
        copies=len(re.findall(r"\bUTMA(?:LDG|STG)", code)),
    )


@pytest.fixture
def hopper(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns where it is not set
    return functools.partial(for_hopper, folder=tmp_path)


ROWS = {"logits": "*bf16", "targets": "*i64", "nll": "*fp32"}


@pytest.mark.parametrize(("fast", "most"), [(False, 3.2), (True, 2.2)], ids=["exact", "approximate"])
@pytest.mark.parametrize(("cols", "warps"), [(1024, 4), (8192, 8), (16384, 16)])
def test_one_pass_for_hopper(hopper, cols, warps, fast, most):
    kinds = {**ROWS, "cols": "i32", "cap": "fp32"}
    built = hopper(one_pass_kernel(), kinds, {"BLOCK": cols, "FAST": fast}, num_warps=warps)
    a_thread = cols / 32 / warps
    over = 3.5 / a_thread  # a row's own logarithm and divisions, which short rows share among fewer logits
    assert built.spilled == 0
    assert built.registers <= (168 if cols > 1024 else 48)
    assert most - 1.3 < built.special / a_thread <= max(most, most - 0.2 + over)


def test_two_passes_for_hopper(hopper):
    scan, slopes = two_pass_kernels()
    built = hopper(scan, {**ROWS, "lse": "*fp32", "cols": "i32", "cap": "fp32"}, {"BLOCK": 1024}, num_warps=4)
    assert built.spilled == 0
    assert built.registers <= 40
    kinds = {"g": "*fp32", "logits": "*bf16", "targets": "*i64", "lse": "*fp32", "out": "*bf16"}
    built = hopper(slopes, {**kinds, "cols": "i32", "cap": "fp32"}, {"BLOCK": 1024}, num_warps=4)
    assert built.spilled == 0
    assert built.registers <= 40
    assert built.special / (1024 / 32 / 4) <= 3.2


SIZES = {"rows": "i32", "cols": "i32", "inner": "i32", "slope": "fp32"}


@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
def test_squared_product_for_hopper_by_its_copy_engine(hopper, back):
    m, n, k = train_gpt.TMA_TILE
    kinds = dict(zip("ab", (f"tensordesc<bf16[{m}, {k}]>", f"tensordesc<bf16[{n}, {k}]>"), strict=True))
    kinds |= dict.fromkeys(("pre", "out"), f"tensordesc<bf16[{m}, {n // 2}]>")
    consts = {"BACK": back, "PROGRAMS": 132, "M": m, "N": n, "K": k}
    built = hopper(squared_kernels()[0], kinds | SIZES, consts, num_warps=8, num_stages=3 if back else 4)
    assert built.spilled == 0
    assert built.products >= 4
    assert built.copies >= 8
    assert built.shared <= 227 * 1024


@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
def test_squared_product_for_hopper_by_pointers(hopper, back):
    kinds = dict.fromkeys(("a", "b", "pre", "out"), "*bf16") | SIZES
    consts = {"BACK": back, "PROGRAMS": 132, "M": 128, "N": 128, "K": 32}
    built = hopper(squared_kernels()[1], kinds, consts, num_warps=8, num_stages=3)
    assert built.spilled == 0
    assert built.products >= 2
    assert built.copies == 0


def test_a_kernel_that_spills_is_seen(hopper):
    """The same product with a tile too large for the registers."""
    kinds = dict.fromkeys(("a", "b", "pre", "out"), "*bf16") | SIZES
    consts = {"BACK": True, "PROGRAMS": 132, "M": 128, "N": 256, "K": 64}
    assert hopper(squared_kernels()[1], kinds, consts, num_warps=8, num_stages=3).spilled > 0


# --------------------------------------------------------------------------------------
# The operators around the kernels: on a CPU their plain twins, under the compiler whole
# --------------------------------------------------------------------------------------


def test_operators_keep_their_promises():
    """Fake shapes, mutation, autograd registration and dynamic shapes, as torch checks them."""
    hidden, weight, targets = problem(12, 8, 30)
    logits = (hidden @ weight.T).detach()
    torch.library.opcheck(one_pass_operator(), (hidden, weight, targets, 30.0, False))
    torch.library.opcheck(two_pass_operator(), (logits.requires_grad_(), targets, 30.0))
    x, up, down = (torch.randn(*shape, requires_grad=True) for shape in ((6, 8), (10, 8), (8, 10)))
    torch.library.opcheck(squared_operator(), (x, up, down, 0.5))


@pytest.mark.parametrize("form", ["one_pass", "two_pass"])
@pytest.mark.parametrize("upstream", ["mean", "any"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "whole graph"])
def test_fused_loss_is_the_loss(form, upstream, compiled):
    hidden, weight, targets = problem(50, 16, 37)
    g = torch.full((50,), 1 / 50) if upstream == "mean" else torch.randn(50)
    loss = functools.partial(train_gpt.fused_nll, LOSSES[form](), False)
    if compiled:
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    nll = loss(hidden, weight, targets, 30.0)
    found = nll, *torch.autograd.grad(nll, (hidden, weight), g)
    for a, b in zip(found, truth(hidden, weight, targets, 30.0, g), strict=True):
        assert a.dtype == torch.float32
        assert distance(a, b) <= 1e-6


def test_fused_loss_may_be_differentiated_twice_over():
    """What is kept of the logits is not used up by the first backward."""
    hidden, weight, targets = problem()
    nll = one_pass_loss(False)(hidden, weight, targets, 30.0)
    first = torch.autograd.grad(nll.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(nll.sum(), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_scores_are_never_made_by_an_approximation():
    hidden, weight, targets = problem()
    with torch.no_grad():
        scored = train_gpt.fused_nll(None, False, hidden, weight, targets, 30.0)
        assert torch.equal(scored, train_gpt.softcapped_nll(hidden, weight, targets, 30.0, False))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "whole graph"])
@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_squared_mlp_is_its_reference(slope, compiled):
    random = torch.Generator().manual_seed(1)
    drawn = [torch.randn(*shape, generator=random) for shape in ((9, 8), (20, 8), (8, 20))]
    fast = functools.partial(squared_mlp(), slope=slope)
    if compiled:
        fast = torch.compile(fast, fullgraph=True, backend="aot_eager")
    sides = []
    for function, dtype in (
        (fast, torch.float32),
        (functools.partial(squared_mlp_ref, slope=slope), torch.float64),
    ):
        leaves = [t.to(dtype).requires_grad_() for t in drawn]
        y = function(*leaves)
        sides.append([y, *torch.autograd.grad(y.square().mean(), leaves)])
    assert max(distance(a, b) for a, b in zip(*sides, strict=True)) <= 1e-6


# --------------------------------------------------------------------------------------
# Where they are used
# --------------------------------------------------------------------------------------


def test_model_with_all_kernels_is_the_model(monkeypatch):
    """Nats and gradients of every parameter, weights quantised, through the operators' plain twins."""
    cfg = config(MLP_NEGATIVE_SLOPE=0.5, LATE_QAT_THRESHOLD=0.5)
    tokens, targets = tokens_of(2, 32, cfg), tokens_of(2, 32, cfg, seed=2)
    phase, sides, ran = train_gpt.final_phase(cfg)._replace(qat=True), [], []

    def noting(name: str, function):
        return lambda *args: ran.append(name) or function(*args)

    for fused in (False, True):
        model = scrambled(cfg)
        if fused:
            loss = noting("loss", one_pass_loss(False))
            whole = functools.partial(train_gpt.fused_nll, loss, False)
            model.loss_of = train_gpt.tanh_alone(whole, cfg.model.softcap)
            monkeypatch.setattr(train_gpt.MLP, "fuses", lambda self, x: True)
            for block in model.blocks:
                block.mlp.fused = noting("mlp", block.mlp.fused)
        nll, _ = model(Ctx(tokens, None, 32, phase), targets)
        nll.mean().backward()
        sides.append([nll.detach(), *(p.grad for p in model.parameters())])
    assert all(distance(a, b.double()) <= 1e-5 for a, b in zip(*sides, strict=True))
    assert ran == [*["mlp"] * cfg.model.layers, "loss"]


def test_squared_mlp_fuses_in_training_on_a_gpu_alone(monkeypatch):
    """Not without gradients, not in float32, not while calibration listens, not after a kernel failed."""
    mlp = train_gpt.MLP(config())
    x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert mlp.fuses(x)
    assert not mlp.fuses(SimpleNamespace(is_cuda=False, dtype=torch.bfloat16))
    assert not mlp.fuses(SimpleNamespace(is_cuda=True, dtype=torch.float32))
    with torch.no_grad():
        assert not mlp.fuses(x)
    for proj in (mlp.fc, mlp.proj):
        proj.tap = object()
        assert not mlp.fuses(x)
        proj.tap = None
    mlp.fused = None
    assert not mlp.fuses(x)


def test_loss_is_chosen_by_knob_device_and_cap(monkeypatch):
    monkeypatch.setattr(train_gpt, "has_triton", lambda: True)
    cuda = torch.device("cuda")

    def name(device=cuda, **knobs) -> str:
        return train_gpt.pick_loss(config(**knobs), device, False)[0]

    assert name() == "one_pass"
    assert [name(FUSED_CE_FORM=f) for f in ("one_pass", "two_pass", "approximate")] == [
        "one_pass",
        "two_pass",
        "approximate",
    ]
    assert name(FUSED_CE_ENABLED=0) == name(CPU, FUSED_CE_ENABLED=0) == "plain"
    assert name(CPU) == name(LOGIT_SOFTCAP=41) == "chunked"
    assert name(VOCAB_SIZE=16384) == "one_pass"
    assert name(VOCAB_SIZE=16385) == "two_pass"  # longer rows do not fit the registers
    monkeypatch.setattr(train_gpt, "has_triton", lambda: False)
    assert name() == "chunked"


# --------------------------------------------------------------------------------------
# A kernel that is wrong on a device is left out, aloud
# --------------------------------------------------------------------------------------


def fused_model(cfg):
    """A model as a GPU would have it, with the operators' plain twins."""
    model = train_gpt.make_model(cfg, lone(torch.bfloat16))
    loss = functools.partial(train_gpt.fused_nll, one_pass_loss(False), False)
    model.loss_name, model.loss_of = "one_pass", train_gpt.tanh_alone(loss, cfg.model.softcap)
    return model


def test_right_kernels_stay():
    cfg = config()
    assert train_gpt.failing_kernels(fused_model(cfg), cfg, lone(torch.bfloat16)) == {}


def broken(*_, **__):
    from triton.compiler.errors import CompilationError

    raise CompilationError("source", None, "no such instruction")


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (lambda x, up, down, slope: 1.03 * squared_mlp_ref(x, up, down, slope), "off by 0.06"),
        (broken, "CompilationError: no such instruction"),
    ],
    ids=["wrong", "broken"],
)
def test_wrong_kernel_is_found(monkeypatch, fault, why):
    cfg = config(FUSED_CE_ENABLED=0)
    monkeypatch.setattr(train_gpt, "squared_mlp", lambda: fault)
    model = train_gpt.make_model(cfg, lone(torch.bfloat16))
    failed = train_gpt.failing_kernels(model, cfg, lone(torch.bfloat16))
    assert list(failed) == ["FUSED_MLP"]
    assert why in failed["FUSED_MLP"]


def test_missing_triton_is_said():
    cfg = config()
    with mock.patch.object(train_gpt, "has_triton", lambda: False):
        failed = train_gpt.failing_kernels(fused_model(cfg), cfg, lone(torch.bfloat16))
    assert failed == dict.fromkeys(("FUSED_CE_ENABLED", "FUSED_MLP"), "triton is not installed")


def test_failed_kernels_are_replaced_and_named(monkeypatch):
    cfg, said = config(), []
    model, world = fused_model(cfg), lone(torch.bfloat16)
    world = dataclasses.replace(world, device=torch.device("cuda"))
    monkeypatch.setattr(train_gpt, "failing_kernels", lambda *_: {"FUSED_MLP": "a", "FUSED_CE_ENABLED": "b"})
    monkeypatch.setattr(train_gpt.World, "log", lambda self, line, **_: said.append(line))
    train_gpt.settle_kernels(model, cfg, world)
    assert model.loss_name == "chunked"
    assert not any(block.mlp.fused for block in model.blocks)
    assert [line.split(" (")[0] for line in said] == [
        "kernel_left_out: FUSED_MLP",
        "kernel_left_out: FUSED_CE_ENABLED",
    ]


# --------------------------------------------------------------------------------------
# On a GPU
# --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["one_pass", "two_pass"])
@pytest.mark.parametrize(("rows", "vocab"), [(4096, 8192), (1000, 1024), (77, 5003)])
def test_gpu_loss_is_the_loss(form, rows, vocab):
    """Nats to 1e-5 and gradients to 3e-3 of what float64 makes of the same bfloat16 logits."""
    hidden, weight, targets = problem(rows, 64, vocab)
    hidden, weight = (t.detach().bfloat16().cuda().requires_grad_() for t in (hidden, weight))
    targets = targets.cuda()
    nll = LOSSES[form]()(hidden, weight, targets, 30.0)
    found = nll, *torch.autograd.grad(nll.mean(), (hidden, weight))
    logits = (hidden @ weight.T).detach().double().requires_grad_()
    z = 30.0 * torch.tanh(logits / 30.0)
    want = torch.logsumexp(z, 1) - z.gather(1, targets[:, None])[:, 0]
    slopes = torch.autograd.grad(want.mean(), logits)[0]
    assert distance(found[0], want) <= 1e-5
    assert distance(found[1], slopes @ weight.double()) <= 3e-3
    assert distance(found[2], slopes.T @ hidden.double()) <= 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(4096, 512, 2048), (1000, 256, 768), (77, 72, 200)])
def test_gpu_squared_mlp_is_its_reference(sizes):
    rows, width, hidden = sizes
    random = torch.Generator().manual_seed(1)
    shapes = (rows, width), (hidden, width), (width, hidden)
    drawn = [(torch.randn(*shape, generator=random) / shape[1] ** 0.5).bfloat16().cuda() for shape in shapes]
    sides = []
    for function, dtype in ((squared_mlp(), torch.bfloat16), (squared_mlp_ref, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in drawn]
        y = function(*leaves, 0.5)
        sides.append([y, *torch.autograd.grad(y.double().square().mean(), leaves)])
    assert max(distance(a, b) for a, b in zip(*sides, strict=True)) <= 5e-3


@pytest.mark.gpu
def test_gpu_keeps_its_kernels():
    cfg = config(MODEL_DIM=128, DEVICE="cuda", DTYPE="bfloat16")
    world = dataclasses.replace(lone(torch.bfloat16), device=torch.device("cuda"))
    assert train_gpt.failing_kernels(train_gpt.make_model(cfg, world), cfg, world) == {}
