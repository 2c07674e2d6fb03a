"""Calibrate: Hessians are sums over what each matrix sees in training text, on the training clock."""

import dataclasses
import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train_gpt
from faults import play, small
from test_export import LOOPS
from test_model import config, lone, nats, scrambled, tokens_of
from test_storage import same_bits
from test_train import run_here, try_here
from train_gpt import (
    Clock,
    Ctx,
    IntRow,
    Loader,
    Progress,
    export,
    final_phase,
    fraction,
    gather_hessians,
    load,
    make_fast,
    open_artifact,
    param_tags,
    phase_at,
    tapped,
)

CALIBRATION = {"GPTQ_ENABLED": 1, "GPTQ_CALIBRATION_BATCHES": 5}


def setting(toy_data, **knobs):
    """(model with random weights, its config, a loader of training tokens)."""
    cfg = config(**toy_data.env | CALIBRATION | knobs)
    return scrambled(cfg), cfg, Loader(cfg, lone(), 1)


def by_hooks(model, cfg, loader, step: int) -> dict[str, torch.Tensor]:
    """X' X of every matrix in float64, inputs caught by forward hooks; the head sees the final states."""
    totals, handles = {}, []

    def catch(name):
        def hook(module, args):
            x = args[0].detach().flatten(0, -2).double()
            if isinstance(module, train_gpt.OutProj) and cfg.model.normed == "gain":
                x = F.rms_norm(x, x.shape[-1:], eps=2**-23) * module.scale.detach().double()
            totals[name] = totals.get(name, 0) + x.T @ x

        return hook

    for path, module in model.named_modules():
        if isinstance(module, train_gpt.Proj) and path != "head":
            handles.append(module.register_forward_pre_hook(catch(f"{path}.weight")))
    for k in range(cfg.gptq.batches):
        batch = loader.batch([loader.spans.span(step + k // cfg.data.spans, k % cfg.data.spans)])
        with torch.no_grad():
            out = model.hidden(Ctx(batch.tokens, batch.docs, cfg.data.seq_len, final_phase(cfg))).y
            out = model.embed.out(out, final_phase(cfg)) if cfg.model.embed_dim else out
        x = out.flatten(0, 1).double()
        head = "embed.weight" if cfg.model.tied else "head.weight"
        totals[head] = totals.get(head, 0) + x.T @ x
    for handle in handles:
        handle.remove()
    return totals


SETTINGS = {
    "plain": {}, "looped": LOOPS, "untied": {"TIE_EMBEDDINGS": 0}, "packed": {"DOC_PACKING": 1},
    "narrow": {"EMBED_DIM": 16, "FUSED_QKV": 1}, "normed": {"NORMED_PROJ": "gain"},
    "narrow, untied": {"EMBED_DIM": 16, "TIE_EMBEDDINGS": 0},
}  # fmt: skip


@pytest.mark.parametrize("knobs", SETTINGS.values(), ids=SETTINGS)
def test_hessians_are_sums_over_the_inputs_of_every_matrix(toy_data, knobs):
    model, cfg, loader = setting(toy_data, **knobs)
    found, want = gather_hessians(model, loader, 3, cfg, lone()), by_hooks(model, cfg, loader, 3)
    matrices = {name for name, _ in model.named_parameters() if name.endswith(".weight")}
    assert set(found) == set(want) == matrices - ({"embed.weight"} if not cfg.model.tied else set())
    for name, total in found.items():
        assert (total.dtype, total.shape) == (torch.float32, want[name].shape)
        torch.testing.assert_close(total.double(), want[name], rtol=1e-4, atol=1e-4 * float(want[name].max()))
    loader.close()


def test_every_visit_of_a_looped_layer_counts(toy_data):
    """Layer 1 is visited twice as often: the trace of an MLP input after norm is its number of rows."""
    (model, cfg, loader), width = setting(toy_data, **LOOPS), 32
    found = gather_hessians(model, loader, 0, cfg, lone())
    rows = cfg.gptq.batches * cfg.data.span
    traces = [found[f"blocks.{i}.mlp.fc.weight"].trace().item() / (rows * width) for i in range(3)]
    assert traces == pytest.approx([1, 2, 1], rel=0.01)
    loader.close()


def test_matrices_of_other_codecs_are_not_calibrated(toy_data):
    model, cfg, loader = setting(toy_data, MATRIX_CODEC="ternary")
    assert set(gather_hessians(model, loader, 0, cfg, lone())) == {"embed.weight"}
    loader.close()


def test_taps_are_gone_afterwards_even_after_an_error(toy_data):
    model, cfg, loader = setting(toy_data)
    projs = [m for m in model.modules() if isinstance(m, train_gpt.Proj)]
    gather_hessians(model.train(), loader, 0, cfg, lone())
    assert model.training and all(m.tap is None for m in projs)
    with pytest.raises(RuntimeError, match="in between"), tapped(model) as taps:
        assert len(taps) == len([m for m in projs if m.tap is not None]) == len(projs)
        raise RuntimeError("in between")
    assert all(m.tap is None for m in projs)
    loader.close()


def test_calibration_changes_neither_weights_nor_random_state(toy_data):
    model, cfg, loader = setting(toy_data)
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    gather_hessians(model, loader, 0, cfg, lone())
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    loader.close()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
def test_compiled_model_has_the_same_hessians(toy_data):
    torch._dynamo.reset()
    model, cfg, loader = setting(toy_data)
    want = gather_hessians(model, loader, 0, cfg, lone())
    world = dataclasses.replace(lone(), compiling=True)
    fast = make_fast(model, world)
    pair = tokens_of(2, 33, cfg)
    compiled = nats(fast, pair[:, :-1], pair[:, 1:])
    found = gather_hessians(fast, loader, 0, cfg, world)
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert torch.equal(nats(fast, pair[:, :-1], pair[:, 1:]), compiled), "the graphs are still there"
    torch._dynamo.reset()
    loader.close()


# ---- which tokens


@pytest.mark.parametrize("spans", [8, 2, 1])
def test_calibration_reads_the_spans_that_training_would_have_read_next(toy_data, spans):
    model, cfg, loader = setting(toy_data, TRAIN_SPANS=spans, GPTQ_CALIBRATION_BATCHES=5)
    asked, whole = [], loader.spans.span
    loader.spans.span = lambda step, index: asked.append((step, index)) or whole(step, index)
    gather_hessians(model, loader, 7, cfg, lone())
    assert asked == [(7 + k // spans, k % spans) for k in range(5)]
    loader.close()


def test_ranks_share_the_spans_out_without_overlap(toy_data):
    seen = []
    for rank in range(2):
        model, cfg, loader = setting(toy_data)
        whole = loader.spans.span
        loader.spans.span = lambda step, index, whole=whole: seen.append((step, index)) or whole(step, index)
        world = dataclasses.replace(lone(), rank=rank, size=2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_gpt.World, "sum_", lambda self, t: t)
            gather_hessians(model, loader, 0, cfg, world)
        loader.close()
    assert sorted(seen) == [(0, k) for k in range(5)]


def test_two_ranks_ship_what_one_does(toy_data, tmp_path):
    """To a rounding of the sum, which may tip an integer: the scores agree as those of plain rounding do."""
    knobs = CALIBRATION | {"GRAD_ACCUM_STEPS": 1, "ITERATIONS": 2, "GPTQ_RESERVE_SECONDS": 1}
    envs = [small(toy_data, tmp_path / str(ranks), **knobs) for ranks in (1, 2)]
    for ranks, env in zip((1, 2), envs, strict=True):
        assert play(env, ranks=ranks).statuses == [0] * ranks
    runs = [run_of(env) for env in envs]
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def run_of(env: dict) -> list[float]:
    scores = json.loads(Path(env["RUN_DIR"], "results.json").read_text())["scores"]
    return [score["val_loss"] for score in scores.values()]


# ---- the clock


def test_steps_end_before_the_cap_by_what_calibration_takes():
    """With a clock that jumps 0.7 s a step and 3 s kept: no step ends after 7 s of 10."""
    now = [0.0]
    cfg = config(MAX_WALLCLOCK_SECONDS=10, ITERATIONS=1000)
    clock = Clock(cfg, lone(), 0.0, lambda: now[0])
    clock.keep(3.0)
    clock.start()
    for step in range(1000):
        clock.tick(step)
        if not clock.ends_in_time():
            break
        now[0] += 0.7
    assert 7 - 2 * 0.77 < now[0] <= 7
    assert clock.projected_steps(step) == step + int((7 - now[0]) / 0.7)


def test_schedule_ends_where_the_steps_do():
    cfg = config(MAX_WALLCLOCK_SECONDS=600, WARMDOWN_FRAC=0.5, MIN_LR=0)
    assert fraction(Progress(9, 300, 100), cfg) == pytest.approx(0.6)
    assert fraction(Progress(9, 500, 100), cfg) == 1
    assert phase_at(Progress(9, 500, 100), cfg).lr == 0
    by_steps = config(MAX_WALLCLOCK_SECONDS=600, WARMDOWN_ITERS=100)
    assert phase_at(Progress(500, 500, 100), by_steps).lr == 0
    assert phase_at(Progress(450, 450, 100), by_steps).lr == pytest.approx(0.5)


def test_cap_that_leaves_no_time_beside_calibration_is_refused_in_words(tmp_path, toy_data):
    run = try_here(tmp_path, toy_data, **CALIBRATION, GPTQ_RESERVE_SECONDS=2, MAX_WALLCLOCK_SECONDS=2)
    assert run.error == (
        "MAX_WALLCLOCK_SECONDS=2.0 leaves no time to train: calibration takes 2.0 s of it; raise it or lower "
        "GPTQ_CALIBRATION_BATCHES, EXPORT_PROXY_TOKENS or CALIB_MAX_SECONDS"
    )
    assert run.losses == []


def test_without_a_cap_nothing_is_kept():
    clock = Clock(config(MAX_WALLCLOCK_SECONDS=0), lone(), 0.0)
    clock.keep(99.0)
    assert (clock.cap, clock.reserve) == (0, 0)


LINE = r"calibration: spans:(\d+) tokens:(\d+) matrices:(\d+) reserve:(\d+)ms train_time:(\d+)ms"


@pytest.mark.parametrize("reserve", [0, 0.5])
def test_steps_and_calibration_end_before_the_cap(tmp_path, toy_data, reserve):
    knobs = {"MAX_WALLCLOCK_SECONDS": 3, "ITERATIONS": 10**6, "GPTQ_RESERVE_SECONDS": reserve}
    run = run_here(tmp_path, toy_data, **CALIBRATION | knobs)
    spans, tokens, matrices, kept, spent = map(int, re.fullmatch(LINE, run.lines("calibration:")[0]).groups())
    assert (spans, tokens, matrices) == (5, 5 * 32, 19)
    assert kept == 500 if reserve else 0 < kept < 2000
    assert run.lines("stopping_early")
    stopped = int(re.search(r"train_time:(\d+)ms", run.lines("stopping_early")[0])[1])
    assert stopped <= 3000 - kept
    assert stopped < spent <= 3000
    assert run.results["train_seconds"] == pytest.approx(spent / 1000, abs=0.001)


def test_measured_reserve_is_the_second_pass_and_a_little_more(toy_data, monkeypatch):
    model, cfg, loader = setting(toy_data)
    waits = iter([0.5, 0.1])
    monkeypatch.setattr(train_gpt, "gather_hessians", lambda *_: time.sleep(next(waits)))
    assert 0.11 <= train_gpt.measured_reserve(model, loader, cfg, lone()) < 0.3
    fixed = dataclasses.replace(cfg, gptq=dataclasses.replace(cfg.gptq, reserve=7.5))
    assert train_gpt.measured_reserve(model, loader, fixed, lone()) == pytest.approx(7.5)
    loader.close()


def test_resumed_run_keeps_the_reserve(tmp_path, toy_data):
    knobs = CALIBRATION | {"GPTQ_RESERVE_SECONDS": 1.25, "MAX_WALLCLOCK_SECONDS": 60, "ITERATIONS": 4}
    first = run_here(tmp_path, toy_data, **knobs)
    again = run_here(tmp_path, toy_data, **knobs, RESUME=1)
    assert again.lines("resumed:1")
    assert [" reserve:1250ms " in line for line in again.lines("calibration:")] == [True, True]
    assert first.blob == again.blob


# ---- what it is for


@pytest.fixture(scope="module")
def trained(tmp_path_factory, toy_data):
    """A toy model after 60 steps, in float16, with its config for five bits and the record's clip."""
    knobs = {"ITERATIONS": 60, "TRAIN_BATCH_TOKENS": 1024, "MATRIX_BITS": 16, "EMBED_BITS": 16}
    run = run_here(tmp_path_factory.mktemp("trained") / "run", toy_data, **knobs)
    model = load(run.blob, config(**toy_data.env | knobs), lone(), "it")
    five = {"MATRIX_BITS": 5, "EMBED_BITS": 5, "MATRIX_CLIP_SIGMAS": 12.85, "GPTQ_CALIBRATION_BATCHES": 64}
    cfg = config(**toy_data.env | CALIBRATION | five | {"TRAIN_BATCH_TOKENS": 1024})
    again = scrambled(cfg)
    again.load_state_dict(model.state_dict())
    return again, cfg


def loss(model, cfg) -> float:
    loader = Loader(cfg, lone(), 1)
    batch = loader.batch([loader.spans.span(90, i) for i in range(8)])
    loader.close()
    return float(nats(model, batch.tokens, batch.targets).mean())


def test_gptq_at_five_bits_has_a_lower_loss_than_rounding_to_nearest(trained):
    model, cfg = trained
    loader = Loader(cfg, lone(), 1)
    hessians = gather_hessians(model, loader, 60, cfg, lone())
    loader.close()
    whole = loss(model.eval(), cfg)
    plain, calibrated = (
        loss(load(export(model, cfg, None, h).blob, cfg, lone(), "it").eval(), cfg) for h in ({}, hessians)
    )
    print(f"float16 {whole:.4f}, nearest {plain:.4f}, GPTQ {calibrated:.4f}")
    assert whole < calibrated < plain
    assert calibrated - whole < 0.8 * (plain - whole)


def test_artifact_of_gptq_holds_the_integers_that_gptq_found(trained):
    model, cfg = trained
    loader = Loader(cfg, lone(), 1)
    hessians = gather_hessians(model, loader, 60, cfg, lone())
    loader.close()
    held = open_artifact(export(model, cfg, None, hessians).blob, cfg, lone(), "it").tensors
    for name, tag in param_tags(model).items():
        if isinstance(tag.codec, IntRow):
            w = model.get_parameter(name).detach()
            step = tag.codec.step(w)
            assert same_bits(held[name], train_gpt.gptq(w, step, 15, hessians[name]) * step)


# ---- every knob does something


BASE = CALIBRATION | {"MATRIX_BITS": 6, "GPTQ_RESERVE_SECONDS": 1}
TWO = {"LQER_ENABLED": 1, "LQER_RANK": 2, "LQER_ASYM_GROUP": 16}
SYM = TWO | {"LQER_ASYM_ENABLED": 0}
KNOBS = [
    (BASE, {"GPTQ_ENABLED": 0}), (BASE, {"GPTQ_CALIBRATION_BATCHES": 2}), (BASE, {"MATRIX_CLIP_SIGMAS": 6}),
    (BASE, {"ATTN_CLIP_SIGMAS": 6}), (BASE, {"MLP_CLIP_SIGMAS": 6}), (BASE, {"EMBED_CLIP_SIGMAS": 6}),
    (BASE, TWO), (TWO, {"LQER_RANK": 3}), (TWO, {"LQER_TOP_K": 1}), (TWO, {"LQER_ASYM_ENABLED": 0}),
    (TWO, {"LQER_ASYM_GROUP": 32}), (SYM, {"LQER_FACTOR_BITS": 6}), ({}, {"COMPRESSOR": "brotli"}),
    ({}, {"COMPRESSOR": "zstd"}), ({}, {"MATRIX_CODEC": "ternary"}), ({}, {"EMBED_CODEC": "fp8"}),
    ({"MATRIX_CODEC": "ternary"}, {"TERNARY_GROUP": 8}),
    ({"MATRIX_CODEC": "ternary"}, {"TERNARY_SCALE_STEP": 0.04}),
    ({}, {"ATTN_CODEC": "fp4"}), ({}, {"MLP_CODEC": "ternary"}),
    ({"MATRIX_CODEC": "ternary"}, {"TURBO_QUANT_TRAIN": 1, "TURBO_QUANT_EXPORT": 1}),
]  # fmt: skip


def test_every_knob_of_the_artifacts_numbers_is_among_them():
    elsewhere = {"MATRIX_BITS", "EMBED_BITS", "INT8_CLIP_PERCENTILE", "ROW_SCALE_FLOOR"}  # test_train.py
    elsewhere |= {"GPTQ_RESERVE_SECONDS", "SIZE_LADDER", "CODE_BYTES"}
    sections = ("export", "gptq", "size")
    knobs = {env for env, (section, _) in train_gpt.all_knobs().items() if section in sections}
    assert {env for _, change in KNOBS for env in change} == knobs - elsewhere


@pytest.mark.parametrize(("base", "change"), KNOBS, ids=str)
def test_knob_changes_the_artifact(toy_data, base, change):
    payloads = []
    for knobs in (base, base | change):
        cfg = config(**toy_data.env | knobs)
        model, loader = scrambled(cfg), Loader(cfg, lone(), 1)
        hessians = gather_hessians(model, loader, 0, cfg, lone()) if cfg.gptq.on else {}
        loader.close()
        tags = param_tags(model)
        tags = train_gpt.corrected(model, tags, hessians, cfg) if cfg.gptq.lqer else tags
        payloads.append(export(model, cfg, tags, hessians).coded)
    assert payloads[0] != payloads[1]


def test_clip_of_one_kind_leaves_the_others_as_they_are():
    cfg = config(MATRIX_CLIP_SIGMAS=10, MLP_CLIP_SIGMAS=7, EMBED_CLIP_SIGMAS=15)
    sigmas = {
        name: tag.codec.sigmas
        for name, tag in param_tags(scrambled(cfg)).items()
        if hasattr(tag.codec, "sigmas")
    }
    assert {s for n, s in sigmas.items() if ".attn." in n} == {10.0}
    assert {s for n, s in sigmas.items() if ".mlp." in n} == {7.0}
    assert sigmas["embed.weight"] == pytest.approx(15)


def test_corrected_matrices_are_those_with_the_largest_error():
    """Absolute, so the large ones; calibration in it."""
    cfg = config(LQER_ENABLED=1, LQER_TOP_K=2, LQER_RANK=2, LQER_ASYM_GROUP=16)
    model = scrambled(cfg)
    with torch.no_grad():
        model.blocks[1].mlp.proj.weight.mul_(50)
        model.blocks[2].attn.c_v.weight.mul_(80)
    tags = train_gpt.corrected(model, param_tags(model), {}, cfg)
    found = {name for name, tag in tags.items() if isinstance(tag.codec, train_gpt.LowRank)}
    assert found == {"blocks.1.mlp.proj.weight", "blocks.2.attn.c_v.weight"}
    assert tags["blocks.1.mlp.proj.weight"].codec == train_gpt.LowRank(IntRow(8), 2, 16, 4)
    assert tags["blocks.1.mlp.proj.weight"].kind == "mlp"


def test_large_artifact_is_shared_between_ranks_quickly_and_whole():
    """Row H29: 16 MB to the other rank as bytes, not as a list of numbers (which takes seconds)."""
    outcome = play({}, ranks=2, call="share_16_megabytes")
    assert outcome.statuses == [0, 0], outcome.errs
    assert len({note["digest"] for note in outcome.notes}) == 1
    assert all(note["bytes"] == 16_000_000 for note in outcome.notes)
    assert max(note["seconds"] for note in outcome.notes) < 2.0
