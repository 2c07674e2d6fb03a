"""Compile: few graphs, none of them made after warm-up, and the same losses as without."""

import dataclasses
import functools
import itertools
import shutil

import pytest
import torch

import train_gpt
from conftest import Toy, make_shards, toy_documents, train_toy_tokenizer
from test_kernels import distance, problem, truth
from test_model import config, lone, nats, scrambled, tokens_of
from test_train import run_here
from train_gpt import Batch, softcapped_nll

# Warnings of the compiler about itself are errors inside it, where nobody sees them
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "DeprecationWarning")]
COMPILERS = ("g++", "clang++", "c++")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """Each test starts without graphs, and leaves none to the tests of other files."""

    def clear():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        train_gpt.compiled_once.cache_clear()

    limit = torch._dynamo.config.recompile_limit
    clear()
    yield
    clear()
    torch._dynamo.config.recompile_limit = limit


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Toy:
    """Short documents, so that the number of boundaries in a batch varies beyond a multiple of 64."""
    folder = tmp_path_factory.mktemp("data")
    make_shards(folder, train=(20_000,), val=(2_100,), mean_length=8)
    return Toy(folder, train_toy_tokenizer(folder / "tokenizer", toy_documents(200, 0), 320), 320, {})


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


ALL = {
    "NUM_LOOPS": 1, "LOOP_START": 0, "LOOP_END": 1, "LATE_QAT_THRESHOLD": 0.5, "INT8_CLIP_PERCENTILE": 95,
    "VAL_LOSS_EVERY": 2, "SLIDING_WINDOW_ENABLED": 1, "EVAL_SEQ_LEN": 48, "EVAL_STRIDE": 16, "EMA_DECAY": 0.9,
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(
    ("packing", "dtype", "knobs", "training"),
    [(0, "float32", {}, 2), (1, "bfloat16", {}, 3), (0, "bfloat16", ALL, 3), (1, "float32", ALL, 3)],
    ids=["plain", "documents", "everything", "everything in documents"],
)
def test_no_graph_is_made_after_warm_up(tmp_path, data, monkeypatch, packing, dtype, knobs, training):
    """One graph for the block of all layers, one for the loss, and the same again without gradients.

    The quantiser makes one more block of training, documents in bfloat16 one for their tiles.
    Loops, validation, sliding windows, the loaded artifact, and documents in any number make none. Counted
    with Dynamo alone, which decides graphs and guards.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    made, boundaries = {}, set()
    real_warm, real_packed = train_gpt.warm_evaluation, train_gpt.packed

    def warm_evaluation(*args):
        made["training"] = graphs()
        real_warm(*args)
        made["all"] = graphs()

    def packed(*args):
        batch = real_packed(*args)
        boundaries.add(len(batch.docs))
        return batch

    monkeypatch.setattr(train_gpt, "warm_evaluation", warm_evaluation)
    monkeypatch.setattr(train_gpt, "packed", packed)
    sizes = {"TRAIN_BATCH_TOKENS": 2048, "TRAIN_SPANS": 4, "GRAD_ACCUM_STEPS": 2, "ITERATIONS": 6}
    run_here(
        tmp_path, data, COMPILE=1, DTYPE=dtype, DOC_PACKING=packing, VAL_MAX_TOKENS=1500, **sizes, **knobs
    )
    assert made == {"training": training, "all": training + 2}
    assert graphs() == made["all"]
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(boundaries) >= 3 * packing


@needs_compiler
def test_planted_recompilation_is_counted(tmp_path, data, monkeypatch):
    """The count above sees a block that reads its layer's number."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    numbers, real = itertools.count(), train_gpt.Attention.forward
    monkeypatch.setattr(
        train_gpt.Attention, "forward", lambda self, x, ctx: real(self, x * (1 + 0.1 * self.number), ctx)
    )
    init = train_gpt.Attention.__init__

    def numbered(self, *args):
        init(self, *args)
        self.number = next(numbers) % 3

    monkeypatch.setattr(train_gpt.Attention, "__init__", numbered)
    run_here(tmp_path, data, COMPILE=1)
    assert graphs() > 4


@needs_compiler
def test_compiled_loss_is_the_loss():
    """Nats and gradients of the generated code, to 1e-5 of the formula in float64."""
    hidden, weight, targets = problem(300, 16, 100)
    nll = softcapped_nll(hidden, weight, targets, 30.0, fast=True)
    g = torch.randn(300)
    found = nll, *torch.autograd.grad(nll, (hidden, weight), g)
    for ours, want in zip(found, truth(hidden, weight, targets, 30.0, g), strict=True):
        assert distance(ours, want) <= 1e-5


@needs_compiler
def test_compiled_blocks_give_the_loss_and_gradients_of_plain_ones():
    cfg = config(NUM_LAYERS=2)
    model, other = scrambled(cfg), scrambled(cfg)
    for block in other.blocks:  # the loss has a test of its own
        block.compile(fullgraph=True, dynamic=False)
    tokens = tokens_of(4, 33, cfg)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], None)
    totals = []
    for one in (model, other):
        total, _ = train_gpt.objective(one, batch, train_gpt.final_phase(cfg), cfg)
        total.backward()
        totals.append(total.item())
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert distance(q.grad, p.grad) <= 1e-4, name
    assert graphs() == 1


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize("packing", [0, 1])
def test_compiled_run_follows_the_plain_one(tmp_path, data, packing):
    knobs = {
        "NUM_LOOPS": 1,
        "LOOP_START": 0,
        "LOOP_END": 1,
        "LATE_QAT_THRESHOLD": 0.5,
        "DOC_PACKING": packing,
    }
    plain, fast = (run_here(tmp_path / c, data, COMPILE=c, ITERATIONS=6, **knobs) for c in "01")
    assert fast.losses == pytest.approx(plain.losses, rel=1e-4)
    scores = [run.results["scores"]["roundtrip"]["val_loss"] for run in (plain, fast)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    assert fast.results["compile_cache"] in {"cold", "warm"}


def test_compiling_without_a_compiler_is_refused_and_auto_goes_without(tmp_path, monkeypatch):
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *a: None if name in COMPILERS else real(name, *a))
    kinds = {"float32": torch.float32}
    with pytest.raises(train_gpt.UserError, match="COMPILE=1 wants a C"):
        train_gpt.measured_choice(config(COMPILE=1), lone(), kinds)
    assert train_gpt.measured_choice(config(COMPILE="auto"), lone(), kinds) == ("float32", False)
    assert lone().compiling is False


QUANTISERS = [{"MATRIX_BITS": 6}, {"MATRIX_CODEC": "ternary"}]
LONGER = [
    {"MATRIX_CODEC": "fp8"}, {"MATRIX_CODEC": "fp4"}, {"MATRIX_BITS": 5, "MATRIX_CLIP_SIGMAS": 6},
    {"MATRIX_CODEC": "ternary", "TERNARY_SCALE_STEP": 0.04},
]  # fmt: skip
QUANTISERS += [pytest.param(knobs, marks=pytest.mark.full) for knobs in LONGER]


@needs_compiler
@pytest.mark.parametrize("knobs", QUANTISERS, ids=str)
def test_compiled_blocks_are_trained_through_the_bits_that_ship(knobs):
    """The compiler would leave out rounding to float16 and back: 4e-4 of a weight, now and then a step.

    Here that made 0.003 to 0.1 nats, where the order of sums makes 3e-6.
    """
    cfg, world = config(**knobs, NUM_LAYERS=1, QAT_ENABLED=1), dataclasses.replace(lone(), compiling=True)
    model, tokens = scrambled(cfg), tokens_of(2, 33, cfg)
    shipped = train_gpt.load(train_gpt.export(model, cfg).blob, cfg, lone(), "it").eval()
    with torch.no_grad():  # gains are float16 in the artifact alone
        for name, p in model.named_parameters():
            if not name.endswith(".weight"):
                p.copy_(shipped.get_parameter(name))
    live = train_gpt.Phase(1.0, 0.95, 0, True)
    want = nats(shipped, tokens[:, :-1], tokens[:, 1:])
    found = nats(train_gpt.make_fast(model, world), tokens[:, :-1], tokens[:, 1:], phase=live)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
