"""Train: steps lower the loss, warm-up leaves no mark, and every knob does something."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt
from conftest import Toy, make_shards, tiny_env, toy_documents, train_toy_tokenizer
from test_model import config, lone
from train_gpt import (
    Clock,
    Loader,
    Trainer,
    UserError,
    all_knobs,
    make_model,
    read_artifact_header,
    read_config,
    warm_up,
)

BRIEF = {"ITERATIONS": "3", "VAL_MAX_TOKENS": "300", "GRAD_ACCUM_STEPS": "1"}


class Run(NamedTuple):
    """What a run has left behind."""

    folder: Path
    error: str  # the text of a UserError, or ""

    def read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    @property
    def trace(self) -> list[dict]:
        return [json.loads(line) for line in self.read("trace.jsonl").splitlines()]

    @property
    def losses(self) -> list[float]:
        return [float.fromhex(row["loss"]) for row in self.trace if "loss" in row]

    @property
    def results(self) -> dict:
        return json.loads(self.read("results.json") or "{}")

    @property
    def log(self) -> list[str]:
        """Lines of train.log after the source."""
        return self.read("train.log").split("=" * 100 + "\n", 1)[-1].splitlines()

    def lines(self, start: str) -> list[str]:
        return [line for line in self.log if line.startswith(start)]

    @property
    def blob(self) -> bytes:
        return (self.folder / "model.ptz").read_bytes()


def try_here(folder: Path, data: Toy, **knobs) -> Run:
    """The whole program in this process, tiny and brief; a refusal is an outcome too."""
    env = tiny_env(**(BRIEF | data.env | {"RUN_DIR": folder} | knobs))
    try:
        assert train_gpt.run(env) == 0
    except UserError as e:
        return Run(folder, str(e))
    return Run(folder, "")


def run_here(folder: Path, data: Toy, **knobs) -> Run:
    run = try_here(folder, data, **knobs)
    assert not run.error, run.error
    return run


# --------------------------------------------------------------------------------------
# Learning
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [0, 1])
def test_thirty_steps_lower_the_loss(tmp_path, toy_data, packing):
    run = run_here(tmp_path, toy_data, ITERATIONS=30, TRAIN_BATCH_TOKENS=1024, DOC_PACKING=packing)
    assert len(run.losses) == 30
    assert abs(run.losses[0] - np.log(320)) < 0.05
    assert np.mean(run.losses[-5:]) < run.losses[0] - 1.0
    assert all(row["ok"] == 1 for row in run.trace if "loss" in row)


EVERYTHING = {
    "NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 1, "LATE_QAT_THRESHOLD": 0.5, "EMA_DECAY": 0.9,
    "ITERATIONS": 6,
}  # fmt: skip


@pytest.mark.parametrize("packing", [0, 1])
def test_warm_up_leaves_no_trace(tmp_path, toy_data, packing):
    """But for the hash of the configuration in the artifact, which knows the number of warm-up steps."""
    knobs = EVERYTHING | {"DOC_PACKING": packing, "VAL_LOSS_EVERY": 2}
    cold, warm = (run_here(tmp_path / str(n), toy_data, WARMUP_STEPS=n, **knobs) for n in (0, 3))
    assert [len(run.lines("warmup_step:")) for run in (cold, warm)] == [0, 4]
    traces = [
        [line for line in run.read("trace.jsonl").splitlines() if "sha256" not in line]
        for run in (cold, warm)
    ]
    assert traces[0] == traces[1]
    assert len(traces[0]) == 6 + 3 + 2
    headers, payloads = zip(
        *(read_artifact_header(run.blob, "artifact") for run in (cold, warm)), strict=True
    )
    assert {key for key in headers[0] if headers[0][key] != headers[1][key]} == {"config_hash"}
    assert payloads[0] == payloads[1]


def test_warm_up_restores_weights_moments_averages_and_the_random_state(toy_data):
    cfg = read_config(tiny_env(**toy_data.env, **EVERYTHING, WARMUP_STEPS=2))
    t = Trainer(make_model(cfg, lone()), Loader(cfg, lone(), 1), cfg, lone(), "source")
    torch.manual_seed(5)
    before, random = {n: live.clone() for n, live in t.tensors().items()}, torch.get_rng_state()
    moved = []
    real = train_gpt.train_step

    def watched(t, batches, phase):
        torch.rand(3)
        figures = real(t, batches, phase)
        moved.append((phase.loops, phase.qat, all(torch.equal(b, t.tensors()[n]) for n, b in before.items())))
        return figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "train_step", watched)
        warm_up(t)
    t.loader.close()
    assert [m[:2] for m in moved] == [(0, False)] * 2 + [(1, False)] * 2 + [(0, True)] * 2 + [(1, True)] * 2
    assert not any(same for _, _, same in moved)
    assert all(torch.equal(live, before[name]) for name, live in t.tensors().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in t.model.parameters())
    assert (t.state.step, t.state.skipped, len(t.reports)) == (0, 0, 0)


@pytest.mark.parametrize("packing", [0, 1])
def test_micro_batches_give_the_steps_of_one_batch(tmp_path, toy_data, packing):
    """After five steps, to 1e-5 in every loss and in the score of the weights.

    ADAM_EPS keeps Adam from forgetting the size of the gradient, which is the mean over micro-batches.
    """
    shared = {"ITERATIONS": 5, "DOC_PACKING": packing, "ADAM_EPS": 0.01}
    whole, *others = (run_here(tmp_path / str(n), toy_data, GRAD_ACCUM_STEPS=n, **shared) for n in (1, 2, 8))
    assert len(set(whole.losses)) == 5
    for run in others:
        assert np.allclose(run.losses, whole.losses, rtol=1e-5, atol=0)
        found, want = (r.results["scores"]["pre_quant"]["val_loss"] for r in (run, whole))
        assert found == pytest.approx(want, rel=1e-5)


def test_late_quantiser_changes_the_losses_from_its_step_on(tmp_path, toy_data):
    """Rates 1, 1, 1, 1, 2/3, 1/3: below a half the last step alone, below 0.9 the last two."""
    losses = {
        late: run_here(
            tmp_path / str(late), toy_data, ITERATIONS=6, MATRIX_BITS=6, LATE_QAT_THRESHOLD=late
        ).losses
        for late in (0, 0.5, 0.9)
    }
    assert [a == b for a, b in zip(losses[0], losses[0.5], strict=True)] == [True] * 5 + [False]
    assert [a == b for a, b in zip(losses[0], losses[0.9], strict=True)] == [True] * 4 + [False] * 2


def test_validation_happens_at_its_steps(tmp_path, toy_data):
    for every, steps in ((2, [2, 4]), (3, [3])):
        run = run_here(tmp_path / str(every), toy_data, ITERATIONS=5, VAL_LOSS_EVERY=every)
        assert [row["step"] + 1 for row in run.trace if "val_loss" in row and "step" in row] == steps
        lines = [line.split()[0] for line in run.lines("step:") if "val_bpb" in line]
        assert lines == [f"step:{step}/5" for step in steps]


def test_validation_during_training_does_not_change_it(tmp_path, toy_data):
    often, never = (run_here(tmp_path / str(n), toy_data, VAL_LOSS_EVERY=n, ITERATIONS=4) for n in (1, 0))
    assert often.losses == never.losses
    assert often.blob == never.blob


READERS = ("objective", "round_trip", "gather_hessians", "score_windows", "activation_bytes")


def reader() -> str:
    """Which function has asked the model."""
    frame = sys._getframe()
    while frame and frame.f_code.co_name not in READERS:
        frame = frame.f_back
    return frame.f_code.co_name if frame else "another"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_who_ask_the_model_give_it_int64_tokens_and_get_one_arithmetic(
    tmp_path, toy_data, monkeypatch, dtype
):
    """Training, round trips, calibration, validation and scores: no dtype of their own, and no autocast."""
    seen, embed, proj = {}, train_gpt.Embed.forward, train_gpt.Proj.forward
    forward, name = train_gpt.GPT.forward, str(dtype).removeprefix("torch.")

    def embedding(module, ctx):
        e = embed(module, ctx)
        seen.setdefault(reader(), set()).add(("tokens", ctx.tokens.dtype, e.dtype))
        return e

    def multiplying(module, x, phase):
        y = proj(module, x, phase)
        seen[reader()].add(("product", x.dtype, y.dtype))
        return y

    def asking(model, ctx, targets):
        nll, out = forward(model, ctx, targets)
        seen[reader()].add(("targets", targets.dtype, nll.dtype))
        return nll, out

    for owner, patch in (
        (train_gpt.Embed, embedding),
        (train_gpt.Proj, multiplying),
        (train_gpt.GPT, asking),
    ):
        monkeypatch.setattr(owner, "forward", patch)
    knobs = {"EXPORT_PROXY_EVAL": 1, "GPTQ_ENABLED": 1, "VAL_LOSS_EVERY": 2, "SLIDING_WINDOW_ENABLED": 1}
    run_here(tmp_path, toy_data, **knobs, DTYPE=name)
    alike = {
        ("tokens", torch.int64, dtype),
        ("product", dtype, dtype),
        ("targets", torch.int64, torch.float32),
    }
    unscored = {row for row in alike if row[0] != "targets"}
    scored = dict.fromkeys(("objective", "round_trip", "score_windows"), alike)
    assert seen == scored | dict.fromkeys(("gather_hessians", "activation_bytes"), unscored)


class Asked(TorchDispatchMode):
    """Notes operators that bring a number to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select"):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def questions(monkeypatch, **knobs) -> list[str]:
    """What two steps bring to the host."""
    cfg = config(**{"FUSED_CE_ENABLED": 0} | knobs)
    t = Trainer(make_model(cfg, lone()), None, cfg, lone(), "source")
    batches = [train_gpt.Batch(*torch.randint(4, 300, (2, 2, 32)), None) for _ in range(2)]
    with Asked() as asked, monkeypatch.context() as patch:
        for name in ("tolist", "numpy", "cpu"):
            real = getattr(torch.Tensor, name)
            patch.setattr(
                torch.Tensor, name, lambda *a, n=name, f=real, **k: asked.names.append(n) or f(*a, **k)
            )
        for _ in range(2):
            train_gpt.train_step(t, batches, train_gpt.Phase(1.0, 0.95, cfg.loop.count, True, averages=True))
    return asked.names


STEP = {
    "EMA_DECAY": 0.9, "GRAD_CLIP_NORM": 0.5, "MATRIX_CODEC": "ternary", "TERNARY_NOISE_SCALE": 0.05,
    "MUON_WD": 0.1, "NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 1, "PARALLEL_START_LAYER": 2,
    "Z_LOSS_WEIGHT": 0.1, "MTP_NUM_HEADS": 1, "TERNARY_THRESHOLD_SEARCH": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    "knobs", [{}, STEP, STEP | {"MATRIX_OPTIMIZER": "adamw"}], ids=["plain", "all", "adam"]
)
def test_no_step_waits_for_a_number_from_the_device(monkeypatch, knobs):
    """Whether it was finite, how long its gradient is, its losses: all of it is decided on the device.

    The loss in its plain form: by chunks, as on a CPU, it asks whether its gradient is a constant.
    """
    assert questions(monkeypatch, **knobs) == []


@pytest.mark.parametrize("how", ["item", "tolist", "bool"])
def test_a_step_that_asks_for_a_number_is_noticed(monkeypatch, how):
    real = train_gpt.objective

    def logged(*args):
        total, terms = real(*args)
        {"item": torch.Tensor.item, "tolist": lambda t: t.tolist(), "bool": bool}[how](terms["nll"].detach())
        return total, terms

    monkeypatch.setattr(train_gpt, "objective", logged)
    assert len(questions(monkeypatch)) == 4


def test_run_without_steps_ships_the_first_weights(tmp_path, toy_data):
    run = run_here(tmp_path, toy_data, ITERATIONS=0)
    assert run.losses == []
    assert run.results["steps"] == run.results["train_tokens"] == run.results["tokens_per_second"] == 0
    assert run.results["scores"]["roundtrip"]["val_loss"] == pytest.approx(np.log(320), abs=0.05)


def test_two_runs_leave_the_same_trace(tmp_path, toy_data):
    one, two = (run_here(tmp_path / name, toy_data, ITERATIONS=4) for name in "ab")
    assert one.read("trace.jsonl") == two.read("trace.jsonl") != ""
    assert one.blob == two.blob


# --------------------------------------------------------------------------------------
# Every knob does something
# --------------------------------------------------------------------------------------


def outcome(run: Run) -> tuple[list[dict], bytes]:
    """Losses, rates, scores, and the weights that are shipped; no hash of all the knobs."""
    payload = bytes(read_artifact_header(run.blob, "the artifact")[1])
    return [row for row in run.trace if "artifact_sha256" not in row], payload


class Effect(NamedTuple):
    """Changing a knob from a base changes something that can be seen of the run."""

    change: dict
    base: dict = MappingProxyType({})
    seen: Callable[[Run], object] = outcome


def lines(start: str) -> Callable[[Run], list[str]]:
    return lambda run: run.lines(start)


def count(start: str) -> Callable[[Run], int]:
    return lambda run: len(run.lines(start))


def result(key: str) -> Callable[[Run], object]:
    return lambda run: run.results.get(key)


def error(run: Run) -> str:
    return run.error


def files(run: Run) -> list[str]:
    return sorted(path.name for path in run.folder.iterdir())


UNTIED, SLIDING = {"TIE_EMBEDDINGS": 0}, {"SLIDING_WINDOW_ENABLED": 1}
LOOPS = {"NUM_LOOPS": 1, "LOOP_START": 0, "LOOP_END": 1, "ENABLE_LOOPING_AT": 0}
TAPER = {"MUON_WD": 0.5, "WD_TAPER_START_FRAC": 0.4, "WD_TAPER_FINAL_MULT": 0.5}
LANES, SPARSE = {"PARALLEL_START_LAYER": 2}, {"SPARSE_ATTN_GATE_ENABLED": 1}
OUT, NARROW, YARN = {"ATTN_OUT_GATE_ENABLED": 1}, {"EMBED_DIM": 16}, {"ROPE_TYPE": "yarn"}
EXPERTS = {"MOE_ENABLED": 1}
FOUR = {"MATRIX_CODEC": "fp4", "MATRIX_INIT": "orthogonal"}
PAIRS, VALUES, AHEAD = {"BIGRAM_VOCAB_SIZE": 64}, {"VE_ENABLED": 1}, {"MTP_NUM_HEADS": 1}
PROXY, GUARDED = {"EXPORT_PROXY_EVAL": 1}, {"EMA_DECAY": 0.9, "EMA_GUARD": 1}
SEARCH = {"MATRIX_CODEC": "ternary", "TERNARY_THRESHOLD_SEARCH": 1, "TERNARY_SCALE_SEARCH": 1}
ONE = SEARCH | {"TERNARY_CALIB_TOP_N": 1, "CALIB_MAX_EVALS": 99}
EFFECTS = {
    "RUN_ID": Effect({"RUN_ID": "other"}, seen=result("run_id")),
    "DATA_PATH": Effect({"DATA_PATH": "{other}"}),
    "TOKENIZER_PATH": Effect({"TOKENIZER_PATH": "{other}/tokenizer.model"}),
    "STRICT": Effect({"STRICT": 1}, {"MODEL_DIMS": 64}, error),
    "FORECAST": Effect({"FORECAST": 0}, seen=lambda run: len(run.lines("forecast:"))),
    "CHECKPOINT_EVERY": Effect(
        {"CHECKPOINT_EVERY": 1e-6}, seen=lambda run: len(run.lines("checkpoint:saved"))
    ),
    "PRECOMPILE": Effect({"PRECOMPILE": 1}, seen=result("steps")),
    "NLL_PATH": Effect({"NLL_PATH": "{folder}/nats.npy"}, seen=files),
    "TRAIN_LOG_EVERY": Effect(
        {"TRAIN_LOG_EVERY": 6}, {"TRAIN_LOG_EVERY": 0, "ITERATIONS": 12}, count("step:")
    ),
    "VAL_LOSS_EVERY": Effect({"VAL_LOSS_EVERY": 2}),
    "SCORE": Effect({"SCORE": "sliding"}, SLIDING, result("score")),
    "SEED": Effect({"SEED": 1}),
    "ITERATIONS": Effect({"ITERATIONS": 2}),
    "MAX_WALLCLOCK_SECONDS": Effect({"MAX_WALLCLOCK_SECONDS": 0.001}, seen=result("steps")),
    "WARMUP_STEPS": Effect({"WARMUP_STEPS": 0}, seen=lines("warmup_step:")),
    "MAX_BAD_STEPS": Effect({"MAX_BAD_STEPS": 2}, {"QK_GAIN_INIT": 3e38}, error),
    "DEVICE": Effect(
        {"DEVICE": "cuda"}, {"DEVICE": "cpu"}, lambda run: (run.error, run.results.get("device"))
    ),
    "DTYPE": Effect({"DTYPE": "bfloat16"}),
    "FUSED_CE_ENABLED": Effect({"FUSED_CE_ENABLED": 0}),
    "ATTENTION": Effect({"ATTENTION": "flash3"}, {"DEVICE": "cpu"}, error),
    "TRAIN_BATCH_TOKENS": Effect({"TRAIN_BATCH_TOKENS": 512}),
    "TRAIN_SEQ_LEN": Effect({"TRAIN_SEQ_LEN": 16}),
    "TRAIN_SPANS": Effect({"TRAIN_SPANS": 4}),
    "GRAD_ACCUM_STEPS": Effect({"GRAD_ACCUM_STEPS": 4}, seen=lines("world_size:")),
    "DOC_PACKING": Effect({"DOC_PACKING": 1}),
    "VOCAB_SIZE": Effect({"VOCAB_SIZE": 321}, seen=error),
    "NUM_LAYERS": Effect({"NUM_LAYERS": 2}),
    "MODEL_DIM": Effect({"MODEL_DIM": 48}),
    "NUM_HEADS": Effect({"NUM_HEADS": 2}),
    "NUM_KV_HEADS": Effect({"NUM_KV_HEADS": 1}),
    "MLP_MULT": Effect({"MLP_MULT": 2.5}),
    "TIE_EMBEDDINGS": Effect({"TIE_EMBEDDINGS": 0}),
    "TIED_EMBED_INIT_STD": Effect({"TIED_EMBED_INIT_STD": 0.1}),
    "EMBED_DIM": Effect(NARROW),
    "EMBED_PROJ_OPTIMIZER": Effect({"EMBED_PROJ_OPTIMIZER": "adam"}, NARROW),
    "VOCAB_BIAS": Effect({"VOCAB_BIAS": 1}),
    "LOGIT_SOFTCAP": Effect({"LOGIT_SOFTCAP": 5}),
    "SOFTCAP_TYPE": Effect({"SOFTCAP_TYPE": "poly"}, {"LOGIT_SOFTCAP": 5}),
    "Z_LOSS_WEIGHT": Effect({"Z_LOSS_WEIGHT": 0.01}),
    "ROPE_BASE": Effect({"ROPE_BASE": 100}),
    "QK_GAIN_INIT": Effect({"QK_GAIN_INIT": 3}),
    "MLP_NEGATIVE_SLOPE": Effect({"MLP_NEGATIVE_SLOPE": 0.5}),
    "MATRIX_INIT": Effect({"MATRIX_INIT": "orthogonal"}),
    "MATRIX_INIT_STD": Effect({"MATRIX_INIT_STD": 0.1}, {"MATRIX_INIT": "normal"}),
    "RESIDUAL_PROJ_INIT_STD": Effect({"RESIDUAL_PROJ_INIT_STD": 0.002}),
    "NORMED_PROJ": Effect({"NORMED_PROJ": "plain"}),
    "ROPE_DIMS": Effect({"ROPE_DIMS": 4}),
    "ROPE_TYPE": Effect(YARN),
    "YARN_MAX_LEN": Effect({"YARN_MAX_LEN": 64}, YARN),
    "FUSED_QKV": Effect({"FUSED_QKV": 1}),
    "ROPE_YARN": Effect({"ROPE_YARN": 1}, {"EVAL_SEQ_LEN": 64}),
    "XSA_LAST_N": Effect({"XSA_LAST_N": 2}),
    "GATED_ATTN_ENABLED": Effect({"GATED_ATTN_ENABLED": 1}),
    "GATED_ATTN_INIT_STD": Effect({"GATED_ATTN_INIT_STD": 0.5}, {"GATED_ATTN_ENABLED": 1}),
    "SPARSE_ATTN_GATE_ENABLED": Effect(SPARSE),
    "SPARSE_ATTN_GATE_INIT_STD": Effect({"SPARSE_ATTN_GATE_INIT_STD": 0.5}, SPARSE),
    "SPARSE_ATTN_GATE_SCALE": Effect({"SPARSE_ATTN_GATE_SCALE": 0.5}, SPARSE),
    "ATTN_OUT_GATE_ENABLED": Effect(OUT),
    "ATTN_OUT_GATE_SRC": Effect({"ATTN_OUT_GATE_SRC": "q"}, OUT),
    "GATED_ATTENTION": Effect({"GATED_ATTENTION": 1}),
    "GATE_WINDOW": Effect({"GATE_WINDOW": 6}, SPARSE),
    "GATED_ATTN_QUANT_GATE": Effect({"GATED_ATTN_QUANT_GATE": 1}, SPARSE),
    "VALUE_RESIDUAL": Effect({"VALUE_RESIDUAL": 1}),
    "LN_SCALE": Effect({"LN_SCALE": 1}),
    "SKIP_GATES_ENABLED": Effect({"SKIP_GATES_ENABLED": 1}),
    "PARALLEL_START_LAYER": Effect(LANES),
    "PARALLEL_FINAL_LANE": Effect({"PARALLEL_FINAL_LANE": "mlp"}, LANES),
    "DTG_ENABLED": Effect({"DTG_ENABLED": 1}),
    "SMEAR_GATE_ENABLED": Effect({"SMEAR_GATE_ENABLED": 1}),
    "BIGRAM_VOCAB_SIZE": Effect(PAIRS),
    "BIGRAM_DIM": Effect({"BIGRAM_DIM": 8}, PAIRS),
    "VE_ENABLED": Effect(VALUES),
    "VE_DIM": Effect({"VE_DIM": 8}, VALUES),
    "VE_LAYERS": Effect({"VE_LAYERS": "0"}, VALUES),
    "MTP_NUM_HEADS": Effect(AHEAD),
    "MTP_LOSS_WEIGHT": Effect({"MTP_LOSS_WEIGHT": 1.0}, AHEAD),
    "MOE_ENABLED": Effect(EXPERTS),
    "MOE_NUM_EXPERTS": Effect({"MOE_NUM_EXPERTS": 2}, EXPERTS),
    "MOE_TOP_K": Effect({"MOE_TOP_K": 2}, EXPERTS),
    "MOE_ROUTER_AUX_LOSS_COEF": Effect({"MOE_ROUTER_AUX_LOSS_COEF": 1}, EXPERTS),
    "MOE_START_FRACTION": Effect({"MOE_START_FRACTION": 0.3}, EXPERTS),
    "MOE_LAYER_FRAC": Effect({"MOE_LAYER_FRAC": 0.6}, EXPERTS),
    "NUM_LOOPS": Effect({"NUM_LOOPS": 2}, LOOPS),
    "LOOP_START": Effect({"LOOP_START": 1}, LOOPS),
    "LOOP_END": Effect({"LOOP_END": 2}, LOOPS),
    "ENABLE_LOOPING_AT": Effect({"ENABLE_LOOPING_AT": 0.5}, LOOPS),
    "MATRIX_LR": Effect({"MATRIX_LR": 0.01}),
    "SCALAR_LR": Effect({"SCALAR_LR": 0.01}),
    "TIED_EMBED_LR": Effect({"TIED_EMBED_LR": 0.01}),
    "EMBED_LR": Effect({"EMBED_LR": 0.1}, UNTIED),
    "HEAD_LR": Effect({"HEAD_LR": 0.1}, UNTIED),
    "SCALES_LR_MULT": Effect({"SCALES_LR_MULT": 3}),
    "HEAD_LR_MULT": Effect({"HEAD_LR_MULT": 1.5}),
    "ALLOW_HEAD_LR_UNDERSCALE": Effect({"ALLOW_HEAD_LR_UNDERSCALE": 1}, {"HEAD_LR_MULT": 0.7}, error),
    "MATRIX_OPTIMIZER": Effect({"MATRIX_OPTIMIZER": "adamw"}),
    "BETA1": Effect({"BETA1": 0.5}),
    "BETA2": Effect({"BETA2": 0.5}),
    "ADAM_EPS": Effect({"ADAM_EPS": 1e-3}),
    "MUON_MOMENTUM": Effect({"MUON_MOMENTUM": 0.5}),
    "MUON_MOMENTUM_WARMUP_START": Effect({"MUON_MOMENTUM_WARMUP_START": 0.5}),
    "MUON_MOMENTUM_WARMUP_STEPS": Effect({"MUON_MOMENTUM_WARMUP_STEPS": 2}),
    "MUON_BACKEND_STEPS": Effect({"MUON_BACKEND_STEPS": 3}),
    "GRAD_CLIP_NORM": Effect({"GRAD_CLIP_NORM": 0.01}),
    "MUON_ROW_NORMALIZE": Effect({"MUON_ROW_NORMALIZE": 1}),
    "POLAR_EXPRESS_NS": Effect({"POLAR_EXPRESS_NS": 1}),
    "MUON_WD": Effect({"MUON_WD": 0.1}),
    "EMBED_WD": Effect({"EMBED_WD": 0.1}),
    "ADAM_WD": Effect({"ADAM_WD": 0.1}),
    "ADAM_WD_SCALES": Effect({"ADAM_WD_SCALES": 0}, {"ADAM_WD": 0.1}),
    "MUON_ACTIVE_GRAD_EPS": Effect({"MUON_ACTIVE_GRAD_EPS": 1000}, EXPERTS),
    "WD_TAPER_START_FRAC": Effect({"WD_TAPER_START_FRAC": 0.1}, TAPER),
    "WD_TAPER_FINAL_MULT": Effect({"WD_TAPER_FINAL_MULT": 0.0}, TAPER),
    "LR_WIDTH_SCALING": Effect({"LR_WIDTH_SCALING": 1}, {"MATRIX_LR": 0.001}),
    "EMA_DECAY": Effect({"EMA_DECAY": 0.9}),
    "EMA_START_FRACTION": Effect({"EMA_START_FRACTION": 0.6}, {"EMA_DECAY": 0.9}),
    "EMA_GUARD": Effect({"EMA_GUARD": 0}, GUARDED, result("shipped")),
    "HELD_OUT_TOKENS": Effect({"HELD_OUT_TOKENS": 5800}, seen=result("shipped")),
    "EXPORT_PROXY_EVAL": Effect({"EXPORT_PROXY_EVAL": 1}, {"HELD_OUT_TOKENS": 400}, count("proxy:")),
    "EXPORT_PROXY_EVERY": Effect({"EXPORT_PROXY_EVERY": 1}, PROXY, count("proxy:")),
    "EXPORT_PROXY_TOKENS": Effect({"EXPORT_PROXY_TOKENS": 200}, PROXY, result("shipped")),
    "EXPORT_PROXY_USE_BEST": Effect({"EXPORT_PROXY_USE_BEST": 0}, PROXY, result("shipped")),
    "TERNARY_THRESHOLD_LOW": Effect({"TERNARY_THRESHOLD_LOW": 0.1}, SEARCH),
    "TERNARY_THRESHOLD_HIGH": Effect({"TERNARY_THRESHOLD_HIGH": 0.6}, SEARCH),
    "TERNARY_THRESHOLD_STEPS": Effect({"TERNARY_THRESHOLD_STEPS": 7}, SEARCH, result("shipped")),
    "TERNARY_SCALE_MULT_LOW": Effect({"TERNARY_SCALE_MULT_LOW": 1.0}, SEARCH, result("shipped")),
    "TERNARY_SCALE_MULT_HIGH": Effect({"TERNARY_SCALE_MULT_HIGH": 2.0}, SEARCH),
    "TERNARY_SCALE_MULT_STEPS": Effect({"TERNARY_SCALE_MULT_STEPS": 7}, SEARCH, result("shipped")),
    "TERNARY_CALIB_TOP_N": Effect({"TERNARY_CALIB_TOP_N": 1}, SEARCH, result("shipped")),
    "CALIB_PREFILTER_MULT": Effect({"CALIB_PREFILTER_MULT": 4}, ONE, result("shipped")),
    "CALIB_MAX_CANDIDATES": Effect({"CALIB_MAX_CANDIDATES": 1}, ONE, result("shipped")),
    "CALIB_MAX_EVALS": Effect({"CALIB_MAX_EVALS": 3}, SEARCH, result("shipped")),
    "CALIB_MAX_SECONDS": Effect({"CALIB_MAX_SECONDS": 0}, SEARCH, result("shipped")),
    "CALIB_SECOND_PASS": Effect({"CALIB_SECOND_PASS": 1}, ONE, result("shipped")),
    "CALIB_PROXY_MAX_TOK": Effect({"CALIB_PROXY_MAX_TOK": 100}, SEARCH, result("shipped")),
    "EXPORT_ALIGNED_TRAIN": Effect(
        {"EXPORT_ALIGNED_TRAIN": 1}, SEARCH | {"EXPORT_ALIGNED_TRAIN_START_FRACTION": 0.3}
    ),
    "EXPORT_ALIGNED_TRAIN_START_FRACTION": Effect(
        {"EXPORT_ALIGNED_TRAIN_START_FRACTION": 0.3}, SEARCH | {"EXPORT_ALIGNED_TRAIN": 1}
    ),
    "TERNARY_THRESHOLD_SEARCH": Effect({"TERNARY_THRESHOLD_SEARCH": 0}, SEARCH),
    "TERNARY_SCALE_SEARCH": Effect({"TERNARY_SCALE_SEARCH": 0}, SEARCH),
    "WARMDOWN_FRAC": Effect({"WARMDOWN_FRAC": 0.9}),
    "WARMDOWN_ITERS": Effect({"WARMDOWN_ITERS": 1}),
    "MIN_LR": Effect({"MIN_LR": 0.9}),
    "QAT_ENABLED": Effect({"QAT_ENABLED": 1}),
    "LATE_QAT_THRESHOLD": Effect({"LATE_QAT_THRESHOLD": 0.9}),
    "MATRIX_BITS": Effect({"MATRIX_BITS": 6}),
    "EMBED_BITS": Effect({"EMBED_BITS": 6}),
    "INT8_CLIP_PERCENTILE": Effect({"INT8_CLIP_PERCENTILE": 95}),
    "ROW_SCALE_FLOOR": Effect({"ROW_SCALE_FLOOR": 0.01}),
    "TERNARY_NOISE_SCALE": Effect({"TERNARY_NOISE_SCALE": 0.05}, {"MATRIX_CODEC": "ternary"}),
    "TERNARY_CLIP_MODE": Effect({"TERNARY_CLIP_MODE": "percentile"}, FOUR),
    "GPTQ_LITE_PERCENTILES": Effect({"GPTQ_LITE_PERCENTILES": 1}, FOUR | {"TERNARY_CLIP_MODE": "percentile"}),
    "TERNARY_CLIP_ROWS_K": Effect(
        {"TERNARY_CLIP_ROWS_K": 1.7}, {"MATRIX_CODEC": "fp4", "TERNARY_CLIP_MODE": "row_std"}
    ),
    "TERNARY_EMBED_CLIP_ROWS_K": Effect(
        {"TERNARY_EMBED_CLIP_ROWS_K": 2.3},
        UNTIED | {"EMBED_CODEC": "fp4", "TERNARY_CLIP_MODE": "row_std", "MODEL_DIM": 128},
    ),
    "EVAL_SEQ_LEN": Effect({"EVAL_SEQ_LEN": 16}),
    "SLIDING_WINDOW_ENABLED": Effect(SLIDING),
    "EVAL_STRIDE": Effect({"EVAL_STRIDE": 4}, SLIDING),
    "VAL_MAX_TOKENS": Effect({"VAL_MAX_TOKENS": 200}),
}

EXEMPT = {  # a knob whose effect is shown elsewhere -> where, and why not here
    "PROGRESS": "test_output.py: it shows a bar on a terminal, and here is none",
    "RUN_DIR": "every run of this file sets it and finds its files there",
    "OVERWRITE": "test_used_folder_is_cleared_only_when_asked: it takes two runs in one folder",
    "RESUME": "test_resume.py: it takes a run that was stopped",
    "EVAL_ONLY": "test_export.py: it takes an artifact, and trains nothing",
    "ARTIFACT": "test_export.py: it names what EVAL_ONLY scores",
    "SAMPLE": "test_evaluate.py: it takes an artifact, and scores nothing",
    "CASEOPS_ENABLED": "test_caseops.py: it takes shards, sidecars and a tokenizer of their own",
    "COMPILE": "test_compile.py: it needs a C++ compiler, and its traces differ in the last bits",
    "COMPILE_MODE": "test_compile.py: nothing is compiled here, and its traces differ in the last bits",
    "COMPILE_CACHE": "test_compile.py: nothing is compiled here, and it takes two processes",
    "FUSED_CE_FORM": "test_loss_is_chosen_by_knob_device_and_cap in test_triton.py: it takes a GPU",
    "FUSED_MLP": "test_squared_mlp_fuses_in_training_on_a_gpu_alone in test_triton.py: it takes a GPU",
    "CLOCK_SYNC_EVERY": "test_clock_waits_for_the_device_as_often_as_told: nothing waits for a CPU",
    "DIST_TIMEOUT": "test_timeout_reaches_the_watchdog: nothing hangs in an honest run",
    "VAL_BATCH_TOKENS": "test_evaluate.py: the scores must not depend on it",
    "GRAD_CLIP_LOCAL": "test_ranks_clip_their_own_gradients in test_ranks.py: alone it changes nothing",
}
PAYLOAD = "test_knob_changes_the_artifact in test_calibrate.py compares what is coded, without its header"
EXEMPT |= dict.fromkeys(
    [
        "MATRIX_CODEC", "ATTN_CODEC", "MLP_CODEC", "EMBED_CODEC", "TERNARY_GROUP", "TERNARY_SCALE_STEP",
        "GPTQ_ENABLED", "GPTQ_CALIBRATION_BATCHES", "MATRIX_CLIP_SIGMAS", "ATTN_CLIP_SIGMAS",
        "MLP_CLIP_SIGMAS", "EMBED_CLIP_SIGMAS", "LQER_ENABLED", "LQER_RANK", "LQER_TOP_K", "LQER_FACTOR_BITS",
        "LQER_ASYM_ENABLED", "LQER_ASYM_GROUP", "COMPRESSOR",
    ],
    PAYLOAD,
)  # fmt: skip
EXEMPT |= {
    "GPTQ_RESERVE_SECONDS": "test_steps_and_calibration_end_before_the_cap in test_calibrate.py: it has one",
    "TURBO_QUANT_TRAIN": "test_calibrate.py: alone it is refused, with the other one it acts",
    "TURBO_QUANT_EXPORT": "test_calibrate.py: alone it is refused, with the other one it acts",
    "TERNARY_QAT": "test_ternary.py: it takes away the grids of runs that calibrate",
    "SIZE_LADDER": "test_rungs_are_taken_in_order in test_export.py: it needs another limit",
    "CODE_BYTES": "test_code_bytes_stand_for_the_files_own in test_export.py: it only counts",
}


def test_every_knob_has_an_effect_or_a_reason():
    assert sorted([*EFFECTS, *EXEMPT]) == sorted(all_knobs())
    assert all(len(reason.split()) > 5 for reason in EXEMPT.values())


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> tuple[Path, Toy]:
    """Another folder of data, and the usual one: random tokens, a tokenizer each."""
    made = []
    for seed in (1, 0):
        folder = tmp_path_factory.mktemp("data")
        make_shards(folder, train=(6_000,), val=(600,), seed=seed)
        model = train_toy_tokenizer(folder / "tokenizer", toy_documents(200 + 100 * seed, seed), 320)
        made.append(Toy(folder, model, 320, {}))
    return made[0].path, made[1]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, worlds):
    """Runs by their knobs, each made once."""
    other, data = worlds
    made: dict[str, Run] = {}

    def get(knobs: dict) -> Run:
        key = json.dumps(knobs, sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("run") / "run"
            values = {name: str(v).format(other=other, folder=folder) for name, v in knobs.items()}
            made[key] = try_here(folder, data, **values)
        return made[key]

    return get


@pytest.mark.parametrize("env", EFFECTS)
def test_knob_has_an_effect(env, outcomes):
    """And a knob that nothing has run into has none: what is seen is not the configuration itself."""
    effect = EFFECTS[env]
    assert set(effect.change) == {env}
    base, changed = outcomes({**effect.base}), outcomes({**effect.base, **effect.change})
    idle = outcomes({**effect.base, "MAX_BAD_STEPS": 11})
    assert effect.seen(base) != effect.seen(changed)
    assert effect.seen(base) == effect.seen(idle)
    if effect.seen is not error and env != "DEVICE":
        assert (base.error, changed.error) == ("", "")


def test_used_folder_is_cleared_only_when_asked(tmp_path, toy_data):
    first = run_here(tmp_path, toy_data)
    before = first.read("trace.jsonl")
    assert "already holds a run" in try_here(tmp_path, toy_data, SEED=1).error
    assert first.read("trace.jsonl") == before
    (tmp_path / "notes.txt").write_text("mine")
    again = run_here(tmp_path, toy_data, SEED=1, OVERWRITE=1)
    assert len(again.trace) == len(before.splitlines())
    assert again.read("trace.jsonl") != before
    assert again.read("notes.txt") == "mine"


def test_clock_waits_for_the_device_as_often_as_told():
    def waits(every: int, typical: float) -> list[int]:
        clock = Clock(config(CLOCK_SYNC_EVERY=every), lone(), 0.0)
        clock.times.append(typical)
        return [step for step in range(12) if clock.sync_due(step)]

    assert waits(5, 0.01) == [0, 5, 10]
    assert waits(0, 0.01) == list(range(12))
    assert waits(0, 0.5) == [0, 4, 8]


def test_timeout_reaches_the_watchdog(tmp_path, toy_data, monkeypatch):
    limits, real = [], train_gpt.watchdog
    monkeypatch.setattr(
        train_gpt, "watchdog", lambda world, limit: limits.append(limit) or real(world, limit)
    )
    run_here(tmp_path, toy_data, DIST_TIMEOUT=17)
    assert limits == [17.0]
