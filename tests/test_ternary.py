"""Ternary weights in models: grids, rotation, noise, clipping, and what the loaded artifact does."""

import functools
import itertools
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from faults import plant, play, small
from test_features import batch_of
from test_model import PLAIN, config, lone, nats, scrambled, tokens_of
from test_ranks import agree
from test_resume import go_on, undisturbed
from test_storage import reload, same_bits
from test_train import run_here
from train_gpt import (
    Fp4,
    Fp8,
    Jitter,
    Loader,
    Ternary,
    Trainer,
    clip_limits,
    clip_weights,
    clipped,
    export,
    grids_of,
    hadamard,
    load,
    objective,
    open_artifact,
    param_tags,
    predicted_bytes,
    read_artifact_header,
    ternary_modules,
)

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler"
)
TERNARY = {"MATRIX_CODEC": "ternary"}
CALIBRATED = TERNARY | {"TERNARY_THRESHOLD_SEARCH": 1}
TURNED = TERNARY | {"TURBO_QUANT_TRAIN": 1, "TURBO_QUANT_EXPORT": 1}
NOISY = TERNARY | {"TERNARY_NOISE_SCALE": 0.05}
QAT = PLAIN._replace(qat=True)


def calibrated(model: torch.nn.Module) -> torch.nn.Module:
    """Grids as a search may leave them, another for each matrix."""
    for i, grid in enumerate(grids_of(model).values()):
        grid.copy_(torch.tensor([0.35 + 0.4 * (i % 5) / 4, 0.9 + 0.2 * (i % 3) / 2]))
    return model


# --------------------------------------------------------------------------------------
# Grids
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("knob", ["TERNARY_THRESHOLD_SEARCH", "TERNARY_SCALE_SEARCH"])
def test_grids_belong_to_ternary_weights_of_runs_that_calibrate(knob):
    model = scrambled(config(**TERNARY, **{knob: 1}))
    ternary = [n for n, tag in param_tags(model).items() if isinstance(tag.codec, Ternary)]
    assert [*grids_of(model)] == ternary and len(ternary) == 6 * 3
    assert all(grid.tolist() == [0.5, 1.0] for grid in grids_of(model).values())
    assert not grids_of(scrambled(config(**TERNARY)))
    some = grids_of(scrambled(config(MATRIX_CODEC="fp4", ATTN_CODEC="ternary", **{knob: 1})))
    assert [*some] == [name for name in ternary if ".attn." in name]
    assert not grids_of(scrambled(config(**TERNARY, **{knob: 1}, TERNARY_QAT=1)))


def test_first_grid_changes_nothing():
    plain, grown = (scrambled(config(**knobs)) for knobs in (TERNARY, CALIBRATED))
    pair, live = (tokens_of(2, 32, plain.cfg), tokens_of(2, 32, plain.cfg, 2)), PLAIN._replace(qat=True)
    assert torch.equal(nats(plain, *pair, phase=live), nats(grown, *pair, phase=live))
    want = nats(plain, *pair, phase=live)
    assert not torch.equal(want, nats(calibrated(grown), *pair, phase=live))


def test_grids_are_in_checkpoints_and_in_no_artifact(toy_data):
    cfg = config(**toy_data.env, **CALIBRATED)
    t = Trainer(calibrated(scrambled(cfg)), Loader(cfg, lone(), 1), cfg, lone(), "source")
    t.loader.close()
    kept = {name.removeprefix("model."): v for name, v in t.tensors().items() if name.endswith(".grid")}
    assert {f"{n.removesuffix('.grid')}.weight" for n in kept} == grids_of(t.model).keys()
    before = {name: live.clone() for name, live in t.tensors().items()}
    for grid in grids_of(t.model).values():
        grid.fill_(0.7)
    t.restore(before)
    assert all(torch.equal(before[f"model.{n}"], live) for n, live in kept.items())
    held = open_artifact(export(t.model, cfg).blob, cfg, lone(), "the artifact")
    assert not any("grid" in name for name in held.tensors)
    assert not grids_of(load(export(t.model, cfg).blob, cfg, lone(), "the artifact"))


def test_artifact_and_forecast_see_the_grid(monkeypatch):
    cfg, said = config(**CALIBRATED), []
    monkeypatch.setattr(train_gpt.World, "log", lambda self, text: said.append(text))
    model = scrambled(cfg)
    for grid in grids_of(model).values():
        grid.copy_(torch.tensor([10.0, 1.0]))  # no entry is so large: nothing but zeros
    train_gpt.log_weighed_bytes(model, 0, lone())
    held = open_artifact(export(model, cfg).blob, cfg, lone(), "the artifact").tensors
    assert not any(held[name].any() for name in grids_of(model))
    for grid in grids_of(model).values():
        grid.copy_(torch.tensor([0.5, 1.0]))
    train_gpt.log_weighed_bytes(model, 0, lone())
    few, many = (int(line.split("weights:")[1].split()[0]) for line in said)
    assert few < 0.8 * many


@needs_compiler
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compiled_blocks_see_a_changed_grid_and_make_no_graph_for_it():
    torch._dynamo.reset()
    cfg = config(**CALIBRATED)
    eager, fast = calibrated(scrambled(cfg)), scrambled(cfg)
    train_gpt.make_fast(fast, train_gpt.dataclasses.replace(lone(), compiling=True))
    pair, live = (tokens_of(2, 32, cfg), tokens_of(2, 32, cfg, 2)), PLAIN._replace(qat=True)
    before = nats(fast, *pair, phase=live)
    made = train_gpt.graphs_made()
    after = nats(calibrated(fast), *pair, phase=live)
    assert train_gpt.graphs_made() == made
    want = nats(eager, *pair, phase=live)
    assert (after - want).abs().max() < 1e-5 < 1e-2 < (before - want).abs().max()


def boundary(seed: int = 0) -> torch.Tensor:
    return torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("turned", [False, True])
def test_threshold_is_the_boundary_of_trits_wherever_it_lies(turned):
    """0.02 to 0.49 change nothing in a quantiser that rounds u = w / s first and drops small |u| then
    (SKC notes F5); ours compares |u| itself, so there as in 0.35 to 0.75 trits follow the threshold."""
    codec, w = Ternary(64, rotated=turned), boundary()
    plain = codec.encode(w)
    z = codec.groups(w) if not turned else hadamard(codec.groups(w))
    u = z / torch.from_numpy(plain["ternary.scale"]).float().view(64, 4, 1)
    for tau in (0.02, 0.2, 0.35, 0.49, 0.5, 0.6, 0.75):
        q = torch.from_numpy(codec.encode(w, grid=torch.tensor([tau, 1.0]))["ternary.q"]).view_as(u)
        assert torch.equal(q, u.sign() * (u.abs() >= tau))
        rounded_first = torch.where(u.abs() >= tau, u.round().clamp(-1, 1), 0.0)
        assert torch.equal(rounded_first, torch.from_numpy(plain["ternary.q"]).view_as(u)) == (tau < 0.51)
        assert np.array_equal(q.flatten().numpy(), plain["ternary.q"]) == (0.49 < tau < 0.51)


def test_half_way_entries_are_kept_and_the_next_ones_below_are_not():
    """u = +-0.5 and +-1.5 round away from zero; the float32 below 0.5 does not."""
    below = float(np.nextafter(np.float32(0.5), np.float32(0)))
    w = torch.tensor([[0.5, -0.5, 1.5, -1.5, below, -below, 2.0, 1.0]])  # the mean is 1
    streams = Ternary(8).encode(w)
    assert streams["ternary.scale"].tolist() == [1.0]
    assert streams["ternary.q"].tolist() == [1, -1, 1, -1, 0, 0, 1, 1]


def test_multiplier_scales_what_ships_and_moves_no_trit():
    w = 0.02 * boundary()
    plain = Ternary(64).encode(w)
    more = Ternary(64).encode(w, grid=torch.tensor([0.5, 1.1]))
    assert np.array_equal(plain["ternary.q"], more["ternary.q"])
    want = (torch.from_numpy(plain["ternary.scale"]).float() * torch.tensor(1.1)).half()
    assert more["ternary.scale"].tolist() == want.tolist()
    least = Ternary(64).encode(1e-8 * w, grid=torch.tensor([0.5, 0.5]))
    assert set(least["ternary.scale"].tolist()) == {2.0**-14}


# --------------------------------------------------------------------------------------
# Rotation
# --------------------------------------------------------------------------------------


def sylvester(size: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h


@pytest.mark.parametrize("size", [1, 2, 4, 64, 128])
def test_butterfly_is_sylvesters_matrix_and_its_own_inverse(size):
    z = torch.randn(3, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    want = z.numpy() @ sylvester(size) / size**0.5
    np.testing.assert_allclose(hadamard(z).numpy(), want, atol=1e-12)
    np.testing.assert_allclose(hadamard(hadamard(z)).numpy(), z.numpy(), atol=1e-12)


def test_rotated_groups_by_hand():
    """[3, 1] turns into [4, 2] / sqrt 2, mean 3 / sqrt 2, both kept; [1, 0] and its filling likewise."""
    w = torch.tensor([[3.0, 1.0, 1.0]])
    streams = Ternary(2, rotated=True).encode(w)
    assert streams["ternary.q"].tolist() == [1, 1, 1, 1]
    scales = [np.float16(3 / 2**0.5), np.float16(1 / 2**0.5)]
    assert streams["ternary.scale"].tolist() == scales
    want = [2**0.5 * float(scales[0]), 0.0, 2**0.5 * float(scales[1])]
    np.testing.assert_allclose(Ternary(2, rotated=True).fake_quant(w)[0], want, rtol=1e-6)


def test_filling_of_rotated_groups_ships_and_is_forecast():
    """600 columns in groups of 128 are 640 trits; without rotation they are 600."""
    turned, plain = Ternary(128, rotated=True), Ternary(128)
    assert turned.planes((8, 600))["ternary.q"] == (8, 640, -1, 1)
    assert plain.planes((8, 600))["ternary.q"] == (8, 600, -1, 1)
    assert turned.planes((8, 600))["ternary.scale"] == plain.planes((8, 600))["ternary.scale"] == (8, 5, 0, 0)
    assert turned.bits((8, 600)) - plain.bits((8, 600)) == pytest.approx(1.58 * 8 * 40)
    assert turned.bits((8, 640)) == plain.bits((8, 640))
    shape = {"MODEL_DIM": 40, "TERNARY_GROUP": 32}
    assert bytes_of(TURNED | shape) > bytes_of(TERNARY | shape)


def bytes_of(knobs: dict) -> int:
    return predicted_bytes(config(**knobs), lone())


def relative_error(codec: Ternary, w: torch.Tensor) -> float:
    return float((codec.fake_quant(w) - w).norm() / w.norm())


def test_rotation_helps_heavy_tails_and_nothing_else():
    """SKC notes 2.3: squared error 0.261 either way for Gaussian weights, 0.51 and 0.23 for Student's t."""
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(128, 512, generator=random)
    heavy = normal * (3 / torch.randn(3, 128, 512, generator=random).square().sum(0)).sqrt()
    plain, turned = Ternary(128), Ternary(128, rotated=True)
    found = [relative_error(codec, w) ** 2 for w in (normal, heavy) for codec in (plain, turned)]
    assert found == pytest.approx([0.261, 0.261, 0.51, 0.23], abs=0.02)


def test_short_last_group_is_stored_as_well_as_the_others():
    """130 columns in groups of 128: the mean that counts the filling would leave an error of 0.99."""
    w = boundary()[:, :130]
    held = Ternary(128).fake_quant(w)
    last = float((held - w)[:, 128:].norm() / w[:, 128:].norm())
    assert last < 0.45
    counted = Ternary(128).groups(w).abs().mean(2)[:, 1:]  # what must not be
    q = w[:, 128:].sign() * (w[:, 128:].abs() >= counted / 2)
    assert float((q * counted - w[:, 128:]).norm() / w[:, 128:].norm()) > 0.9


@settings(max_examples=40)
@given(seed=st.integers(0, 99), turned=st.booleans(), step=st.sampled_from([0.0, 0.04]))
def test_groups_never_cross_a_row_and_experts_stand_below_each_other(seed, turned, step):
    """A weight of three dimensions ships as its rows do, whatever its layout in memory."""
    codec = Ternary(16, step, turned)
    w = torch.randn(3, 5, 21, generator=torch.Generator().manual_seed(seed))
    grid = torch.tensor([0.42, 1.07])
    whole = codec.fake_quant(w, grid)
    assert same_bits(whole.view(15, 21), torch.cat([codec.fake_quant(r[None], grid) for r in w.view(15, 21)]))
    crossed = w.transpose(0, 2).contiguous().transpose(0, 2)
    assert not crossed.is_contiguous() and same_bits(codec.fake_quant(crossed, grid), whole)
    assert same_bits(reload(codec, crossed, grid=grid), whole)
    assert same_bits(codec.fake_quant(w.bfloat16(), grid), reload(codec, w.bfloat16(), grid=grid).bfloat16())


@pytest.mark.parametrize("knobs", [TURNED, CALIBRATED, NOISY], ids=str)
def test_gradient_is_the_identity_through_every_extra(knobs):
    (m, *_) = ternary_modules(calibrated(scrambled(config(**knobs))))
    g = torch.randn(m.weight.shape, generator=torch.Generator().manual_seed(2))
    m.effective(QAT).backward(g)
    assert same_bits(m.weight.grad, g)


# --------------------------------------------------------------------------------------
# Noise
# --------------------------------------------------------------------------------------


def drawn(step: int, key: int = 7, shape=(64, 4, 128), std: float = 1.0) -> torch.Tensor:
    jitter = Jitter(shape, std, key, torch.device("cpu"))
    jitter.draw(step)
    return jitter.noise


def test_noise_is_gaussian_and_independent_of_step_weight_and_place():
    z = drawn(0)
    many = z.numel()
    assert abs(z.mean()) < 4 / many**0.5
    assert abs(z.var() - 1) < 6 / many**0.5
    assert abs((z**3).mean()) < 4 * 15**0.5 / many**0.5
    assert abs((z**4).mean() - 3) < 4 * 96**0.5 / many**0.5
    flat = z.flatten()
    half = many // 2  # where the pairs of a circle lie apart
    for shift in (1, 2, 128, half):
        pairs = flat[shift:], flat[:-shift]
        assert abs((pairs[0] * pairs[1]).mean()) < 4 / len(pairs[0]) ** 0.5
        assert abs((pairs[0] ** 2 * pairs[1] ** 2).mean() - 1) < 40 / len(pairs[0]) ** 0.5
    for other in (drawn(1), drawn(0, key=8), drawn(2**20), drawn(0, key=1_000_010)):
        assert abs((z * other).mean()) < 4 / many**0.5
    assert len(z.unique()) > 0.99 * many
    assert torch.equal(drawn(5), drawn(5)) and not torch.equal(drawn(5), drawn(6))
    torch.testing.assert_close(drawn(5, std=0.02), 0.02 * drawn(5))
    assert drawn(3, shape=(3, 1, 5)).shape == (3, 1, 5)


def test_noise_moves_entries_by_shares_of_their_scale_before_they_are_rounded():
    """Some entries near the threshold change their trit, those far from it and all scales do not."""
    for codec in (Ternary(64), Ternary(64, rotated=True)):
        for size in (1e-3, 1.0):
            w, noise = size * boundary(), drawn(0, shape=codec.grouped((64, 256)), std=0.05)
            q, scale = codec.parts(w)
            moved, same = codec.parts(w, None, noise)
            assert torch.equal(scale, same)
            z = hadamard(codec.groups(w)) if codec.rotated else codec.groups(w)
            u = z / scale[..., None]
            off = (u.abs() - 0.5).abs() > 0.3
            assert torch.equal(q[off], moved[off])
            assert 0.01 < float((q != moved).float().mean()) < 0.05
            assert (q != moved).sum() == ((u + noise).abs().ge(0.5) != u.abs().ge(0.5)).sum()


def test_noise_is_heard_in_training_through_the_quantiser_alone():
    model, quiet = (scrambled(config(**knobs)) for knobs in (NOISY, TERNARY))
    batch = batch_of(model.cfg)
    loss = {
        (name, phase.qat, grad): nothing_kept(m, batch, phase, grad)
        for name, m in (("noisy", model), ("quiet", quiet))
        for phase, grad in itertools.product((PLAIN, QAT), (False, True))
    }
    differ = [
        key[1:] for key, found in loss.items() if key[0] == "noisy" and found != loss["quiet", *key[1:]]
    ]
    assert differ == [(True, True)]


def nothing_kept(model, batch, phase, grad: bool) -> float:
    with torch.set_grad_enabled(grad):
        return objective(model, batch, phase, model.cfg)[0].item()


def test_noise_leaves_no_mark_on_a_model_without_it():
    model, noisy = (scrambled(config(**knobs)) for knobs in (TERNARY, NOISY))
    assert not [*model.buffers()]
    assert {m.jitter for m in ternary_modules(model)} == {None}
    keys = [m.jitter.key for m in ternary_modules(noisy)]
    assert len({*keys}) == len(keys) == 18
    other = scrambled(config(**NOISY, SEED=2))
    assert not {m.jitter.key for m in ternary_modules(other)} & {*keys}
    assert [*noisy.state_dict()] == [*model.state_dict()]


def test_every_step_has_a_noise_of_its_own_and_all_its_micro_batches_the_same(toy_data, monkeypatch):
    cfg = config(**toy_data.env, **NOISY, GRAD_ACCUM_STEPS=2)
    t = Trainer(train_gpt.make_model(cfg, lone()), Loader(cfg, lone(), 1), cfg, lone(), "source")
    seen, real = [], train_gpt.objective

    def watched(model, batch, phase, cfg):
        seen.append(ternary_modules(model)[4].jitter.noise.clone())
        return real(model, batch, phase, cfg)

    monkeypatch.setattr(train_gpt, "objective", watched)
    for step in (0, 1, 5):
        t.state.step = step
        train_gpt.train_step(t, t.loader.batches(step), QAT)
    t.loader.close()
    key = ternary_modules(t.model)[4].jitter.key
    for step, found in zip((0, 0, 1, 1, 5, 5), seen, strict=True):
        assert torch.equal(found, drawn(step, key, found.shape, 0.05))


def test_run_under_noise_that_was_stopped_ends_as_one_that_was_not(toy_data, tmp_path):
    knobs = NOISY | CALIBRATED
    want = undisturbed(toy_data, tmp_path, **knobs)
    env = small(toy_data, tmp_path / "stopped", **knobs)
    assert play(env, plant("at_step", step=3, actions=["kill"], micro=1, rank=0)).status == -9
    assert go_on(env) == want
    assert undisturbed(toy_data, tmp_path, **CALIBRATED) != want


def test_two_ranks_under_noise_agree_with_one(toy_data, tmp_path):
    knobs = NOISY | {"TRAIN_SPANS": 4, "ITERATIONS": 5, "VAL_MAX_TOKENS": 300, "MODEL_DIM": 32}
    knobs |= {"ADAM_EPS": 0.01, "CHECKPOINT_EVERY": 0}
    alone, both = (small(toy_data, tmp_path / name, **knobs) for name in ("one", "two"))
    assert play(alone).status == 0
    outcome = play(both, plant("note_digest"), ranks=2)
    assert outcome.statuses == [0, 0], outcome.errs
    assert len({note["digest"] for note in outcome.notes}) == 1
    agree(alone, both)


# --------------------------------------------------------------------------------------
# Compiled
# --------------------------------------------------------------------------------------


def compiled_too(cfg, phase) -> list[tuple[float, dict]]:
    found = []
    for compiling in (False, True):
        model = calibrated(scrambled(cfg))
        train_gpt.make_fast(model, train_gpt.dataclasses.replace(lone(), compiling=compiling))
        total, _ = objective(model, batch_of(cfg), phase, cfg)
        total.backward()
        found.append((total.item(), {name: p.grad for name, p in model.named_parameters()}))
    return found


EXTRAS = [TURNED | CALIBRATED | NOISY, TURNED, CALIBRATED | {"TERNARY_SCALE_STEP": 0.04}, NOISY]


@needs_compiler
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "knobs",
    [pytest.param(k, marks=() if i == 0 else pytest.mark.full) for i, k in enumerate(EXTRAS)],
    ids=str,
)
def test_compiled_training_through_the_extras_is_the_eager_one(knobs):
    torch._dynamo.reset()
    cfg = config(**knobs, MODEL_DIM=40)
    (loss, grads), (fast, fast_grads) = compiled_too(cfg, QAT)
    assert abs(loss - fast) < 1e-5 * abs(loss)
    for name, g in grads.items():
        assert (g - fast_grads[name]).norm() <= 2e-4 * g.norm(), name


@needs_compiler
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_no_step_of_noise_is_a_graph_of_its_own(tmp_path, toy_data, monkeypatch):
    """By Dynamo alone, which decides on graphs; nor is any weight one, each with a key and a grid."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    knobs = TURNED | CALIBRATED | NOISY | {"COMPILE": 1, "ITERATIONS": 4, "GRAD_ACCUM_STEPS": 2}
    told = run_here(tmp_path / "noisy", toy_data, **knobs).results["compile"]
    assert told["graphs"] == told["graphs_after_warmup"] > 0
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = run_here(tmp_path / "plain", toy_data, **TERNARY, COMPILE=1, GRAD_ACCUM_STEPS=2).results[
        "compile"
    ]
    assert told["graphs"] == plain["graphs"]
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------
# Trained, shipped, loaded: one forward
# --------------------------------------------------------------------------------------

CHOICES = {
    "rotation": ({}, {"TURBO_QUANT_TRAIN": 1, "TURBO_QUANT_EXPORT": 1}),
    "embedding": ({}, {"EMBED_CODEC": "fp4"}, {"EMBED_CODEC": "fp8"}, {"EMBED_CODEC": "ternary"}),
    "attention": ({}, {"ATTN_CODEC": "fp4"}),
    "grid": ({}, {"TERNARY_THRESHOLD_SEARCH": 1}),
    "filling": ({"MODEL_DIM": 32}, {"MODEL_DIM": 40}),
    "head": ({}, {"TIE_EMBEDDINGS": 0}),
    "loops": ({}, {"NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 1}),
    "scales": ({}, {"TERNARY_SCALE_STEP": 0.04}),
    "noise": ({}, {"TERNARY_NOISE_SCALE": 0.05}),
}
Combination = tuple[int, ...]
ALL = [*itertools.product(*(range(len(options)) for options in CHOICES.values()))]


def pairs_of(combination: Combination) -> set:
    return {*itertools.combinations(enumerate(combination), 2)}


def covering(seed: int = 0) -> list[Combination]:
    """A few combinations in which every pair of options meets, chosen greedily among random ones."""
    rng, missing, found = random.Random(seed), set().union(*map(pairs_of, ALL)), []
    while missing:
        best = max(rng.sample(ALL, 200), key=lambda c: len(pairs_of(c) & missing))
        found.append(best)
        missing -= pairs_of(best)
    return found


SAMPLE = covering()


def test_sample_of_combinations_covers_every_pair():
    met = set().union(*map(pairs_of, SAMPLE))
    sizes = [len(options) for options in CHOICES.values()]
    assert len(met) == sum(a * b for a, b in itertools.combinations(sizes, 2)) and len(SAMPLE) < 20
    assert len(ALL) == 1024


def trained(cfg, steps: int = 3) -> torch.nn.Module:
    """A model after a few steps of Adam through its quantiser, its grids another for each matrix."""
    model = calibrated(scrambled(cfg)).train()
    adam = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(steps):
        adam.zero_grad()
        for m in ternary_modules(model) if cfg.ternary.noise else ():
            m.jitter.draw(step)
        objective(model, batch_of(cfg), QAT._replace(loops=cfg.loop.count), cfg)[0].backward()
        adam.step()
    return model.eval()


@pytest.mark.parametrize(
    "combination", [pytest.param(c, marks=() if c in SAMPLE else pytest.mark.full) for c in ALL], ids=str
)
def test_loaded_artifact_answers_as_the_trained_model_did_through_its_quantiser(combination):
    """Bit for bit; and otherwise than the weights that were never rounded."""
    chosen = [options[i] for options, i in zip(CHOICES.values(), combination, strict=True)]
    cfg = config(**TERNARY | {name: v for knobs in chosen for name, v in knobs.items()})
    model, tokens = trained(cfg), tokens_of(2, 33, cfg)
    pair = tokens[:, :-1], tokens[:, 1:]
    blob = export(model, cfg).blob
    shipped = load(blob, cfg, lone(), "the artifact").eval()
    want = nats(model, *pair, phase=QAT._replace(loops=cfg.loop.count))
    assert torch.equal(nats(shipped, *pair), want)
    assert (nats(model, *pair) - want).abs().max() > 1e-3
    alone = train_gpt.read_config(read_artifact_header(blob, "it")[0]["knobs"] | {"DEVICE": "cpu"})
    assert alone.export == cfg.export


# --------------------------------------------------------------------------------------
# Clip search
# --------------------------------------------------------------------------------------


def heavy_model(cfg) -> torch.nn.Module:
    """Weights of Student's t with three degrees of freedom."""
    model, random = scrambled(cfg), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_((3 / torch.randn(3, *p.shape, generator=random).square().sum(0)).sqrt())
    return model


def squared_error(model, cfg, truth) -> dict[str, float]:
    held = open_artifact(export(model, cfg).blob, cfg, lone(), "it").tensors
    return {name: float((held[name] - w).double().square().sum()) for name, w in truth.items()}


@pytest.mark.parametrize("mode", ["percentile", "row_std"])
@pytest.mark.parametrize("codec", ["ternary", "fp8", "fp4"])
def test_clip_search_never_raises_the_error_of_what_ships(mode, codec, monkeypatch):
    """Against the weights as they were: against the clipped ones the hardest clip would always win."""
    said = []
    monkeypatch.setattr(train_gpt.World, "log", lambda self, text: said.append(text))
    knobs = {"MATRIX_CODEC": codec, "EMBED_CODEC": codec, "TERNARY_THRESHOLD_SEARCH": int(codec == "ternary")}
    cfg = config(**knobs, TERNARY_CLIP_MODE=mode, TERNARY_CLIP_ROWS_K=3, TERNARY_EMBED_CLIP_ROWS_K=3)
    model = calibrated(heavy_model(cfg))
    matrices = [n for n, tag in param_tags(model).items() if isinstance(tag.codec, Ternary | Fp8 | Fp4)]
    truth = {n: model.get_parameter(n).detach().clone() for n in matrices}
    before = squared_error(model, cfg, truth)
    clip_weights(model, cfg, lone())
    after = squared_error(model, cfg, truth)
    moved = {n for n in matrices if not torch.equal(model.get_parameter(n), truth[n])}
    assert all(after[n] <= before[n] * (1 + 1e-9) for n in matrices)
    assert {n for n in matrices if after[n] < before[n] * (1 - 1e-9)} == moved
    for n in matrices:  # whatever was not taken would not have been better
        codec, grid, kind = param_tags(model)[n].codec, grids_of(model).get(n), param_tags(model)[n].kind
        tried = [codec.fake_quant(clipped(truth[n], c), grid) for c in clip_limits(truth[n], kind, cfg)]
        best = min(float((q - truth[n]).double().square().sum()) for q in tried)
        assert after[n] <= min(before[n], best) * (1 + 1e-6)
    assert f"matrices:{len(matrices)} clipped:{len(moved)} " in said[0]
    assert moved or (codec, mode) != (Fp4(), "percentile")


def test_limits_are_the_percentiles_and_the_deviations():
    w = torch.arange(1.0, 2001).view(40, 50)[:, torch.randperm(50)] * torch.tensor([1.0, -1.0]).repeat(25)
    limits = clip_limits(w, "mlp", config(TERNARY_CLIP_MODE="percentile", GPTQ_LITE_PERCENTILES=3))
    assert [float(limit) for limit in limits] == [1990, 1992, 1994]
    assert int((clipped(w, limits[0]) != w).sum()) == 10
    cfg = config(TERNARY_CLIP_MODE="row_std", TERNARY_CLIP_ROWS_K=1.5)
    (limit,) = clip_limits(w, "mlp", cfg)
    np.testing.assert_allclose(limit[:, 0], 1.5 * w.numpy().std(1, ddof=1), rtol=1e-6)
    (limit,) = clip_limits(w, "embed", cfg)
    np.testing.assert_allclose(limit[:, 0], 20 * w.numpy().std(1, ddof=1), rtol=1e-6)
    assert clip_limits(w[:, :1], "mlp", cfg) == []


@pytest.mark.parametrize(("codec", "gains"), [(Ternary(128), False), (Fp8(), False), (Fp4(), True)], ids=repr)
def test_clipping_helps_uniform_grids_alone(codec, gains):
    """Gaussian weights: a ternary scale is a mean and float8 has exponents, so both lose by every clip; of 15
    even steps up to a maximum fewer are wasted."""
    w = boundary().repeat(1, 3)
    limits = clip_limits(w, "mlp", config(TERNARY_CLIP_MODE="percentile"))
    plain, *found = (float((codec.fake_quant(t) - w).norm()) for t in (w, *(clipped(w, c) for c in limits)))
    assert all((error < plain) == gains for error in found)


def test_clipped_weights_are_those_that_ship_and_are_scored(tmp_path, toy_data):
    knobs = {"MATRIX_CODEC": "fp4", "TERNARY_CLIP_MODE": "percentile", "MATRIX_INIT": "orthogonal"}
    run = run_here(tmp_path / "on", toy_data, **knobs)
    off = run_here(tmp_path / "off", toy_data, **knobs | {"TERNARY_CLIP_MODE": "none"})
    (line,) = run.lines("clip_search: mode:percentile matrices:18 clipped:")
    assert int(line.split("clipped:")[1].split()[0]) > 0 and not off.lines("clip_search")
    assert run.losses == off.losses
    assert run.results["scores"]["pre_quant"] != off.results["scores"]["pre_quant"]


def test_two_ranks_clip_alike(toy_data, tmp_path):
    env = small(toy_data, tmp_path, MATRIX_CODEC="fp4", TERNARY_CLIP_MODE="percentile", MODEL_DIM=32)
    outcome = play(env, plant("note_digest"), ranks=2)
    assert outcome.statuses == [0, 0], outcome.errs
    assert len({note["digest"] for note in outcome.notes}) == 1
