"""Compile: few graphs, none of them made after warm-up, and the same losses as without."""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

import train_gpt
from conftest import ROOT, Toy, make_shards, run_program, tiny_env, toy_documents, train_toy_tokenizer
from faults import plant, play, small
from test_kernels import distance, formed, formed_problem, formed_truth, problem, truth
from test_model import config, lone, nats, scrambled, tokens_of
from test_optimizer import MATRICES, give, muon_of, muon_step
from test_train import run_here, try_here
from train_gpt import Batch, Phase, UserError, World, softcapped_nll

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
EXPERTS = ALL | {"MOE_ENABLED": 1, "MOE_TOP_K": 2, "MOE_START_FRACTION": 0.5}


@needs_compiler
@pytest.mark.parametrize(
    ("packing", "dtype", "knobs", "training"),
    [
        (0, "float32", {}, 2), (1, "bfloat16", {}, 3), (0, "bfloat16", ALL, 3), (1, "float32", ALL, 3),
        (0, "float32", EXPERTS, 7),
    ],
    ids=["plain", "documents", "everything", "everything in documents", "experts"],
)  # fmt: skip
def test_no_graph_is_made_after_warm_up(tmp_path, data, monkeypatch, packing, dtype, knobs, training):
    """One graph for the block of all layers, one for the loss, and the same again without gradients.

    The quantiser makes one more block of training, documents in bfloat16 one for their tiles, Muon one for
    each shape of its matrices, of which the tiny model has four. Experts make one more block for each of
    these, with and without the quantiser, and in training one more while a token takes one more. Loops,
    validation, sliding windows, the loaded artifact, documents in any number, and what the schedule changes
    make none. Counted with Dynamo alone, which decides graphs and guards; the run counts by itself too.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(train_gpt.World, "compiles_updates", True)  # as on a GPU
    made, boundaries = {}, set()
    real_warm, real_packed = train_gpt.warm_evaluation, train_gpt.packed

    def warm_evaluation(*args):
        made.setdefault("training", graphs())  # the first to ask is the trial of compilation
        real_warm(*args)
        made.setdefault("all", graphs())

    def packed(*args):
        batch = real_packed(*args)
        boundaries.add(len(batch.docs))
        return batch

    monkeypatch.setattr(train_gpt, "warm_evaluation", warm_evaluation)
    monkeypatch.setattr(train_gpt, "packed", packed)
    sizes = {"TRAIN_BATCH_TOKENS": 2048, "TRAIN_SPANS": 4, "GRAD_ACCUM_STEPS": 2, "ITERATIONS": 6}
    run = run_here(
        tmp_path, data, COMPILE=1, DTYPE=dtype, DOC_PACKING=packing, VAL_MAX_TOKENS=1500, **sizes, **knobs
    )
    kinds, through = 1 + ("MOE_ENABLED" in knobs), "LATE_QAT_THRESHOLD" in knobs
    evaluation = 1 + kinds * (1 + through)  # the loss, and blocks; validation looks through the quantiser
    assert made == {"training": training + 4, "all": training + 4 + evaluation}
    assert graphs() == made["all"]
    told = {"graphs": graphs(), "graphs_after_warmup": graphs(), "mode": "default", "fallback": ""}
    assert run.results["compile"] == told | {"cache": "cold"}
    assert not run.lines("compile: ")
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
@pytest.mark.parametrize("curve", ["poly", pytest.param("algebraic", marks=pytest.mark.full)])
def test_compiled_loss_of_another_form_is_the_loss(curve):
    """Nats, log-sum-exps and all gradients, with a bias and z-loss, the last chunk a shorter one."""
    args, weights = formed_problem(True, rows=300, vocab=100), (torch.randn(300), 0.1)
    with mock.patch.object(train_gpt, "chunk_rows", lambda n, vocab, gpu=False: 128):
        fast = functools.partial(train_gpt.formed_nll, fast=True)
        found = formed(args, curve, 10.0, weights, fast)
    for ours, want in zip(found, formed_truth(args, curve, 10.0, weights), strict=True):
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
def test_graphs_made_after_warm_up_are_told_in_one_line(tmp_path, data, monkeypatch):
    """Those of evaluation, which the warm-up leaves out here."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(train_gpt, "warm_evaluation", lambda *args: None)
    run = run_here(tmp_path, data, COMPILE=1)
    (line,) = run.lines("compile: ")
    assert line.startswith("compile: 2 graphs were made after warm-up, which had made 2: ")
    compiled = run.results["compile"]
    assert (compiled["graphs"], compiled["graphs_after_warmup"], compiled["fallback"]) == (4, 2, "")


def test_run_without_compilation_makes_no_graphs(tmp_path, data):
    run = run_here(tmp_path, data)
    told = {"graphs": 0, "graphs_after_warmup": 0, "mode": "default", "cache": "none", "fallback": ""}
    assert run.results["compile"] == told and run.results["compile_cache"] == "none"
    assert not run.lines("compile: ")


# --------------------------------------------------------------------------------------
# The mode
# --------------------------------------------------------------------------------------

TUNED = {"max_autotune": True, "coordinate_descent_tuning": True}
EXACT = {"emulate_precision_casts": True}


@pytest.mark.parametrize(
    ("knobs", "want"),
    [
        ({}, {}),
        ({"QAT_ENABLED": 1}, EXACT),
        ({"COMPILE_MODE": "max-autotune-no-cudagraphs"}, TUNED),
        ({"COMPILE_MODE": "max-autotune-no-cudagraphs", "QAT_ENABLED": 1}, TUNED | EXACT),
    ],
    ids=str,
)
def test_mode_reaches_inductor_beside_the_options(monkeypatch, knobs, want):
    """What inductor is told to compile a block with; the graph itself is run as it is."""
    import torch._inductor.compile_fx as inductor

    told = []

    def compile_fx(graph, inputs, config_patches=None, **more):
        told.append(config_patches)
        return graph.forward

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    cfg = config(NUM_LAYERS=2, **knobs)
    model = train_gpt.make_fast(scrambled(cfg), dataclasses.replace(lone(), compiling=True))
    with torch.no_grad():
        model.hidden(train_gpt.Ctx(tokens_of(2, 32, cfg), None, 32, train_gpt.final_phase(cfg)))
    assert told == [want]


def test_modes_with_cuda_graphs_are_not_offered():
    choices = train_gpt.all_knobs()["COMPILE_MODE"][1].metadata["choices"]
    modes = torch._inductor.list_mode_options()
    assert [m for m in choices if modes[m].get("triton.cudagraphs")] == []
    for mode in ("max-autotune", "reduce-overhead"):
        text = f"COMPILE_MODE='{mode}' is not allowed; .* none with CUDA graphs"
        with pytest.raises(UserError, match=text):
            config(COMPILE_MODE=mode)


@needs_compiler
@pytest.mark.full
def test_tuned_blocks_give_the_nats_of_plain_ones():
    cfg = config(NUM_LAYERS=2, COMPILE_MODE="max-autotune-no-cudagraphs")
    model, tokens = scrambled(cfg), tokens_of(4, 33, cfg)
    want = nats(model, tokens[:, :-1], tokens[:, 1:])
    fast = train_gpt.make_fast(model, dataclasses.replace(lone(), compiling=True))
    torch.testing.assert_close(nats(fast, tokens[:, :-1], tokens[:, 1:]), want, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------
# The optimizer's step
# --------------------------------------------------------------------------------------

PHASES = [Phase(1 / (i + 1), 0.85 + 0.02 * i, 0, False, 1 - 0.1 * i) for i in range(5)]
ALL_OF_MUON = {"MUON_ROW_NORMALIZE": 1, "POLAR_EXPRESS_NS": 1, "MUON_WD": 0.1}


def five_steps(names, cfg, compiling: bool) -> tuple[dict, dict]:
    """(matrices, momentum) after five steps of changing phases, of which the third must not happen."""
    muon, params = muon_of(names, cfg)
    with mock.patch.object(train_gpt.World, "compiles_updates", compiling):
        for i, phase in enumerate(PHASES):
            give(params, i)
            with torch.no_grad():
                muon_step(muon, phase, torch.tensor(i != 2))
    return params, muon.state()


def test_updates_are_compiled_on_a_gpu_alone():
    worlds = [dataclasses.replace(lone(), compiling=c, device=torch.device(d)) for c, d in
              ((True, "cuda"), (True, "cpu"), (False, "cuda"))]  # fmt: skip
    assert [world.compiles_updates for world in worlds] == [True, False, False]


@needs_compiler
@pytest.mark.parametrize("knobs", [{}, pytest.param(ALL_OF_MUON, marks=pytest.mark.full)], ids=str)
def test_compiled_muon_takes_the_steps_of_the_plain_one(knobs):
    """Matrices of two shapes, one tall, one alone of its shape; to 1e-5 of their size."""
    plain, fast = (five_steps("aceb", config(**knobs), compiling) for compiling in (False, True))
    assert graphs() == 2
    for ours, want in zip(fast, plain, strict=True):
        assert max(distance(ours[name], want[name]) for name in want) <= 1e-5


def test_schedule_of_muon_makes_no_graph(monkeypatch):
    """One for each shape, whatever rate, momentum, decay, and whether the step happens."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.config.recompile_limit = 64  # as make_fast has it
    five_steps(MATRICES, config(**ALL_OF_MUON), True)
    assert graphs() == 3
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch.Tensor, "new_full", lambda tensor, shape, value: value)
    five_steps(MATRICES, config(**ALL_OF_MUON), True)
    assert graphs() == 3 * len(PHASES), "the count sees a momentum that is a number"


# --------------------------------------------------------------------------------------
# Where compilation fails
# --------------------------------------------------------------------------------------

LOUD = "compile: fell back to eager: "


def break_compiler(monkeypatch, stage: str) -> None:
    """Compilation of forward or backward fails in the backend; COMPILE=auto has chosen to compile.

    Inductor raises RuntimeErrors when backward runs; what a backend raises in forward Dynamo turns into one.
    """
    from torch._dynamo.backends.common import aot_autograd

    def fails(graph, inputs):
        raise (RuntimeError if stage == "bw_compiler" else ValueError)("no such instruction")

    def works(graph, inputs):
        return graph.forward

    compilers = {"fw_compiler": works, "bw_compiler": works} | {stage: fails}
    backend = aot_autograd(**compilers) if stage != "backend" else fails
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(train_gpt, "measured_choice", lambda *args: ("float32", True, ""))


@pytest.mark.parametrize("stage", ["backend", "bw_compiler"])
def test_run_goes_on_eager_and_says_so(tmp_path, data, monkeypatch, stage):
    """With the steps, the score and the artifact of a run that compiles nothing; COMPILE is in its header."""
    plain = run_here(tmp_path / "plain", data, COMPILE=0)
    break_compiler(monkeypatch, stage)
    run = run_here(tmp_path / "broken", data, COMPILE="auto")
    (line,) = run.lines("compile: ")
    assert line.startswith(LOUD) and "no such instruction; expect about 1.7 times the step time" in line
    assert line.removeprefix(LOUD).startswith(run.results["compile"]["fallback"])
    assert run.results["compile"]["cache"] == "none"
    assert run.losses == plain.losses
    assert run.results["scores"]["roundtrip"]["val_loss"] == plain.results["scores"]["roundtrip"]["val_loss"]
    assert [line.split()[-1] for line in run.lines("world_size:")] == ["compile:0"]


def test_failure_on_one_rank_is_one_on_all(tmp_path, toy_data):
    """Rank 1 alone cannot compile; both go on, and take the steps of two ranks that compile nothing."""
    settings = {"plain": "0", "broken": "auto"}
    envs = [small(toy_data, tmp_path / name, COMPILE=c, WARMUP_STEPS=1) for name, c in settings.items()]
    ends = []
    for env, plants in zip(envs, ([], [plant("broken_compiler", rank=1)]), strict=True):
        outcome = play(env, *plants, ranks=2)
        assert outcome.statuses == [0, 0], outcome.errs
        ends.append([row for row in read_trace(env) if "loss" in row])
    assert ends[0] == ends[1] != []
    results = json.loads((Path(envs[1]["RUN_DIR"]) / "results.json").read_text())
    assert "no working compiler on this rank" in results["compile"]["fallback"]


def read_trace(env) -> list[dict]:
    return [json.loads(line) for line in (Path(env["RUN_DIR"]) / "trace.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("asked", [{"COMPILE": 1}, {"COMPILE": "auto", "PRECOMPILE": 1}], ids=str)
def test_failure_of_what_was_asked_for_is_an_error(tmp_path, data, monkeypatch, asked):
    break_compiler(monkeypatch, "backend")
    run = try_here(tmp_path, data, **asked)
    name = "PRECOMPILE=1" if "PRECOMPILE" in asked else "COMPILE=1"
    assert run.error.startswith(f"{name}, but compilation fails: ") and "COMPILE=0" in run.error
    assert "no such instruction" in run.error and "\n" not in run.error
    assert not run.losses


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize("choice", ["1", "auto"])
def test_broken_compiler_of_the_machine(tmp_path, data, choice):
    """A real one that fails: an error of one line and status 2 where it was asked for, else a run."""
    env = tiny_env(**data.env, RUN_DIR=tmp_path / "run", COMPILE=choice, COMPILE_CACHE=tmp_path / "cache")
    done = run_program(env=env | {"CXX": "/bin/false"})
    if choice == "1":
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith("error: COMPILE=1, but compilation fails: InductorError: ")
    else:
        assert done.returncode == 0, done.stderr
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        assert "InvalidCxxCompiler" in results["compile"]["fallback"] and LOUD in done.stdout


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, UserError, AssertionError, KeyboardInterrupt])
def test_only_what_a_compiler_may_raise_counts_as_its_failure(error):
    def work():
        raise error("no memory")

    with pytest.raises(error, match="no memory"):
        train_gpt.compile_failure(work)


def test_reason_is_one_line_without_the_compilers_advice():
    def fail(text: str):
        raise RuntimeError(text)

    advice = "went\n wrong\n\nSet TORCHDYNAMO_VERBOSE=1 for more"
    assert train_gpt.compile_failure(lambda: fail(advice)) == "RuntimeError: went wrong"
    long = train_gpt.compile_failure(lambda: fail("x" * 1000))
    assert long.endswith("...") and len(long) < 250
    assert train_gpt.compile_failure(lambda: "done") == ""


def test_probe_that_cannot_compile_chooses_among_eager_forms(monkeypatch):
    said = []

    def probe(cfg, world, dtype, compiling):
        if compiling:
            raise RuntimeError("no header of C++")
        return 1.0 if dtype == torch.bfloat16 else 2.0

    monkeypatch.setattr(train_gpt, "probe", probe)
    monkeypatch.setattr(World, "log", lambda world, text: said.append(text))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    world = train_gpt.choose_speed(config(DTYPE="auto", COMPILE="auto"), lone())
    assert (world.dtype, world.compiling) == (torch.bfloat16, False)
    assert world.fallback == "RuntimeError: no header of C++"
    assert said[0].startswith(LOUD + world.fallback)
    assert said[1].startswith("cpu_probe:float32_eager:2000.0ms bfloat16_eager:1000.0ms chosen:")
    with pytest.raises(UserError, match="COMPILE=1, but compilation fails: RuntimeError: no header of C"):
        train_gpt.choose_speed(config(DTYPE="auto", COMPILE=1), lone())


def test_resumed_run_remembers_why_it_does_not_compile():
    found = types.SimpleNamespace(meta={"dtype": "float32", "compiling": False, "fallback": "no compiler"})
    world = train_gpt.resumed_speed(found, config(), lone())
    assert (world.compiling, world.fallback) == (False, "no compiler")


# --------------------------------------------------------------------------------------
# The cache
# --------------------------------------------------------------------------------------

PLACES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def test_cache_goes_where_it_is_told_and_nowhere_else(tmp_path, monkeypatch):
    """An environment that says where already is left as it is."""
    for name in PLACES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    train_gpt.keep_compile_cache(Path("kept"))
    want = {"TORCHINDUCTOR_CACHE_DIR": f"{tmp_path}/kept", "TRITON_CACHE_DIR": f"{tmp_path}/kept/triton"}
    assert dict(os.environ) == before | want and (tmp_path / "kept" / "triton").is_dir()
    train_gpt.keep_compile_cache(Path("other"))
    assert dict(os.environ) == before | want
    for name in PLACES:
        monkeypatch.delenv(name)


def test_cache_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^COMPILE_CACHE=.*/file/cache cannot be written \(Not a directory"):
        train_gpt.keep_compile_cache(tmp_path / "file" / "cache")


COMPILES = """
import dataclasses, pathlib, sys
sys.path[:0] = sys.argv[2:]
import torch, train_gpt
from test_model import lone
train_gpt.keep_compile_cache(pathlib.Path(sys.argv[1]))
torch._inductor.config.cpp_cache_precompile_headers = False  # they would take most of the time
torch.compile(lambda x: x.sin() + 1)(torch.zeros(9))
print(train_gpt.compile_cache_state(dataclasses.replace(lone(), compiling=True)))
"""


@needs_compiler
def test_second_process_finds_a_function_that_the_first_compiled(tmp_path):
    (tmp_path / "compiles.py").write_text(COMPILES)
    words, found = [tmp_path / "cache", ROOT, ROOT / "tests"], []
    for _ in range(2):
        done = run_program(words, program=tmp_path / "compiles.py")
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split()[-1])
    assert found == ["cold", "warm"]


def test_cache_is_warm_where_all_was_found():
    world, found = dataclasses.replace(lone(), compiling=True), torch._dynamo.utils.counters["inductor"]
    states = []
    for hits, misses in ((0, 0), (0, 2), (2, 0), (2, 1)):
        found.update(fxgraph_cache_hit=hits - found["fxgraph_cache_hit"])
        found.update(fxgraph_cache_miss=misses - found["fxgraph_cache_miss"])
        states.append(train_gpt.compile_cache_state(world))
    assert states == ["cold", "cold", "warm", "cold"]
    assert train_gpt.compile_cache_state(lone()) == "none"


@needs_compiler
@pytest.mark.full
def test_second_process_finds_what_the_first_compiled(tmp_path, data):
    """One day's PRECOMPILE serves another day's run. All of Muon's matrices have one shape here."""
    square = {"NUM_LAYERS": 1, "NUM_KV_HEADS": 4, "MLP_MULT": 1, "COMPILE": 1, "WARMUP_STEPS": 1}
    brief = {"ITERATIONS": 2, "VAL_MAX_TOKENS": 100, "COMPILE_CACHE": tmp_path / "cache"}
    for name, more in (("first", {"PRECOMPILE": 1}), ("second", {})):
        env = tiny_env(**data.env, **square, **brief, **more, RUN_DIR=tmp_path / name)
        done = run_program(env=env, timeout=300)
        assert done.returncode == 0, done.stderr
        assert ("precompiled: the graphs" in done.stdout) == bool(more)
    results = json.loads((tmp_path / "second" / "results.json").read_text())
    assert (results["compile_cache"], results["compile"]["cache"]) == ("warm", "warm")
    assert results["compile"]["graphs"] == results["compile"]["graphs_after_warmup"] == 5


def test_precompiling_nothing_is_said(tmp_path, data):
    run = run_here(tmp_path, data, PRECOMPILE=1)
    assert run.lines("precompiled: nothing, because nothing is compiled here") and not run.losses


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
    why = "no C++ compiler on the PATH"
    assert train_gpt.measured_choice(config(COMPILE="auto"), lone(), kinds) == ("float32", False, why)
    assert lone().compiling is False


def test_run_without_a_compiler_says_so_in_its_results(tmp_path, data, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    run = run_here(tmp_path, data, COMPILE="auto")
    assert run.lines("compile:") == ["compile:0 no C++ compiler on the PATH"]
    assert run.results["compile"]["fallback"] == "no C++ compiler on the PATH"


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
