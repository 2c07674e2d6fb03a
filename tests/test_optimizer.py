"""Optimizer: Muon for matrices, Adam for the rest, rates from the phase, and steps that do not happen."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import train_gpt
from test_model import PLAIN, config, lone, scrambled, tokens_of
from train_gpt import (
    Average,
    Batch,
    Muon,
    Optimizer,
    Phase,
    Tag,
    Trainer,
    clip_gradients,
    group_params,
    make_model,
    objective,
    orthogonalize,
    reduce_gradients,
    train_step,
)

YES, NO = torch.tensor(True), torch.tensor(False)
COEFFICIENTS = 3.4445, -4.7750, 2.0315


def with_gradients(cfg, seed: int = 0):
    """A model with the gradients of one batch."""
    model, tokens = scrambled(cfg, seed=seed), tokens_of(4, 33, cfg, seed)
    objective(model, Batch(tokens[:, :-1], tokens[:, 1:], None), PLAIN, cfg)[0].backward()
    return model


def values(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------
# Newton-Schulz
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"), [(0.001, 0.471), (0.01, 0.699), (0.1, 0.712), (0.5, 0.765), (1.0, 0.696)]
)
def test_singular_value_after_five_iterations(before, after):
    """On a diagonal of norm 1, so that dividing by the norm changes nothing."""
    found = orthogonalize(torch.diag(torch.tensor([before, math.sqrt(1 - before**2)]).double())[None], 5)[0]
    assert found[0, 0].item() == pytest.approx(after, abs=6e-4)
    assert found[0, 1] == found[1, 0] == 0


def test_singular_values_end_between_047_and_121():
    found = orthogonalize(torch.diag(torch.logspace(-3, -0.1, 400).double())[None], 5)[0].diagonal()
    small = torch.logspace(-3, -0.1, 400) / torch.logspace(-3, -0.1, 400).norm() < 1e-3
    assert 0.46 < found[~small].min() < 0.7
    assert 1.19 < found.max() < 1.21


def naive_orthogonal(g: torch.Tensor, steps: int) -> torch.Tensor:
    """One matrix by its singular values: the polynomial acts on them alone."""
    u, s, v = torch.linalg.svd(g.double(), full_matrices=False)
    s = s / s.norm()
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 7), (64, 16)])
@pytest.mark.parametrize("steps", [1, 5])
def test_only_the_singular_values_change(shape, steps):
    g = torch.randn(3, *shape, dtype=torch.float64)
    found = orthogonalize(g, steps)
    for one, result in zip(g, found, strict=True):
        assert (result - naive_orthogonal(one, steps)).abs().max() <= 1e-5


def test_matrix_of_zeros_stays_zero():
    assert not orthogonalize(torch.zeros(2, 4, 6), 5).any()


# --------------------------------------------------------------------------------------
# Muon
# --------------------------------------------------------------------------------------

MATRICES = {"a": (8, 4), "b": (4, 8), "c": (8, 4), "d": (6, 6), "e": (8, 4)}


def muon_of(names, cfg=None):
    """(Muon over random matrices, the matrices); the same values for a name in every call."""
    params = {}
    for name in names:
        random = torch.Generator().manual_seed(ord(name))
        params[name] = nn.Parameter(torch.randn(MATRICES[name], generator=random))
    return Muon(params, cfg or config(), lone()), params


def give(params: dict, step: int):
    for name, p in params.items():
        random = torch.Generator().manual_seed(1000 * step + ord(name))
        p.grad = torch.randn(p.shape, generator=random)


@torch.no_grad()
def test_muon_is_momentum_then_orthogonalisation_then_a_rate_by_shape():
    cfg = config(MATRIX_LR=0.03)
    muon, params = muon_of(MATRICES, cfg)
    want = {name: p.detach().double().clone() for name, p in params.items()}
    buffers = {name: torch.zeros(MATRICES[name], dtype=torch.float64) for name in MATRICES}
    for step, (rate, momentum) in enumerate([(1.0, 0.85), (0.5, 0.9), (0.25, 0.95)]):
        give(params, step)
        muon.step(Phase(rate, momentum, 0, False), YES)
        for name, (rows, cols) in MATRICES.items():
            g = params[name].grad.double()
            buffers[name] = momentum * buffers[name] + g
            update = naive_orthogonal(g + momentum * buffers[name], 5)
            want[name] -= 0.03 * rate * math.sqrt(max(1, rows / cols)) * update
    for name, p in params.items():
        assert (p - want[name]).abs().max() <= 1e-5
        assert (muon.state()[name] - buffers[name]).abs().max() <= 1e-5


@torch.no_grad()
def test_batching_of_equal_shapes_does_not_matter():
    together, params = muon_of(MATRICES)
    assert sorted(len(members) for members in together.stacks.values()) == [1, 1, 3]
    alone = {name: muon_of([name]) for name in MATRICES}
    for step in range(3):
        for muon, members in ((together, params), *alone.values()):
            give(members, step)
            muon.step(PLAIN, YES)
    for name, (_, members) in alone.items():
        assert (members[name] - params[name]).abs().max() <= 1e-6


def test_number_of_iterations_is_a_knob():
    results = []
    for steps in (1, 5):
        muon, params = muon_of("a", config(MUON_BACKEND_STEPS=steps))
        give(params, 0)
        with torch.no_grad():
            muon.step(PLAIN, YES)
        results.append(params["a"])
    assert not torch.equal(*results)


# --------------------------------------------------------------------------------------
# Groups and rates
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs", [{}, {"TIE_EMBEDDINGS": 0}, {"NUM_LOOPS": 1, "LOOP_END": 1, "LOOP_START": 0}]
)
def test_every_parameter_is_in_one_group(knobs):
    model = make_model(config(**knobs), lone())
    groups = group_params(model)
    names = [name for members in groups.values() for name in members]
    assert sorted(names) == sorted(dict(model.named_parameters()))
    assert len({id(p) for members in groups.values() for p in members.values()}) == len(names)
    assert ("head" in groups) == (not model.cfg.model.tied)
    lines = Optimizer(model, model.cfg, lone()).table()
    assert sum(int(line.split("params:")[1]) for line in lines) == sum(p.numel() for p in model.parameters())


def test_unknown_group_and_vector_under_muon_are_errors():
    model = make_model(config(), lone())
    codec = model.tags["skip_weights"].codec
    model.tags["skip_weights"] = Tag(codec, "sgd")
    with pytest.raises(KeyError, match="sgd"):
        group_params(model)
    model.tags["skip_weights"] = Tag(codec, "scalar")
    model.blocks[0].attn.tags["q_gain"] = Tag(codec, "muon")
    with pytest.raises(AssertionError, match="matrices only"):
        group_params(model)


RATES = {"MATRIX_LR": 0.011, "SCALAR_LR": 0.013, "TIED_EMBED_LR": 0.017, "EMBED_LR": 0.019, "HEAD_LR": 0.023}


@pytest.mark.parametrize("tied", [0, 1])
def test_each_group_moves_by_its_own_rate(tied):
    """Adam's first step is the rate itself; stored rates, which somebody may change, are never read."""
    cfg = config(TIE_EMBEDDINGS=tied, **RATES)
    model = with_gradients(cfg)
    before, optimizer = values(model), Optimizer(model, cfg, lone())
    for group in optimizer.adam.param_groups:
        group["lr"] = 123.0
    optimizer.step(Phase(0.5, 0.9, 0, False), YES)
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters()}
    half = {"embed.weight": 0.017 if tied else 0.019, "head.weight": 0.023, "skip_weights": 0.013}
    for name in half.keys() & moved.keys():
        assert moved[name] == pytest.approx(half[name] / 2, rel=1e-3)
    assert optimizer.rates["muon"] == RATES["MATRIX_LR"]
    still = values(model)
    optimizer.step(Phase(0.0, 0.9, 0, False), YES)
    assert equal(values(model), still)


def test_adam_is_torch_adam():
    cfg = config(BETA1=0.8, BETA2=0.97, ADAM_EPS=1e-4, SCALAR_LR=0.02, TIED_EMBED_LR=0.02)
    model = with_gradients(cfg)
    names = [name for kind in ("embed", "scalar") for name in group_params(model)[kind]]
    other = {name: nn.Parameter(model.get_parameter(name).detach().clone()) for name in names}
    adam = torch.optim.Adam(other.values(), lr=0.02, betas=(0.8, 0.97), eps=1e-4, foreach=False, fused=False)
    optimizer = Optimizer(model, cfg, lone())
    for step in range(5):
        for name, p in other.items():
            random = torch.Generator().manual_seed(step)
            model.get_parameter(name).grad = p.grad = torch.randn(p.shape, generator=random)
        optimizer.step(PLAIN, YES)
        adam.step()
    assert len(names) > 3
    for name, p in other.items():
        assert (model.get_parameter(name) - p).abs().max() <= 1e-6


# --------------------------------------------------------------------------------------
# Steps that do not happen, and state
# --------------------------------------------------------------------------------------


def trainer(cfg) -> Trainer:
    return Trainer(with_gradients(cfg), None, cfg, lone(), "source")


def snapshot(t: Trainer) -> dict[str, torch.Tensor]:
    return {name: live.clone() for name, live in t.tensors().items()}


@pytest.mark.parametrize("poison", [0.0, math.nan, math.inf])
def test_step_that_must_not_happen_changes_not_a_bit(poison):
    """Weights, moments, their step counts and the average, whatever the gradients hold."""
    t = trainer(config(EMA_DECAY=0.9, TIE_EMBEDDINGS=0))
    t.optimizer.step(PLAIN, YES)
    t.average.update(YES)
    before = snapshot(t)
    for p in t.model.parameters():
        p.grad.add_(poison)
    t.optimizer.step(PLAIN, NO)
    t.average.update(NO)
    assert equal(snapshot(t), before)
    for p in t.model.parameters():
        p.grad.nan_to_num_(0.5, 0.5, 0.5)
    t.optimizer.step(PLAIN, YES)
    t.average.update(YES)
    after = snapshot(t)
    assert all(not torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("where", ["embed.weight", "blocks.2.mlp.proj.weight", "skip_weights"])
def test_one_infinite_gradient_stops_the_step_of_all(where):
    t, cfg = trainer(config(EMA_DECAY=0.9)), config()
    before = snapshot(t)
    tokens = tokens_of(2, 33, cfg)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], None)
    first = torch.tensor([0])
    handle = t.model.get_parameter(where).register_hook(lambda g: g.index_fill(0, first, math.inf))
    assert train_step(t, [batch], PLAIN)[2] == 0
    assert equal(snapshot(t), before)
    handle.remove()
    assert train_step(t, [batch], PLAIN)[2] == 1
    assert not equal(snapshot(t), before)


def test_state_is_whole_before_the_first_step():
    t = trainer(config(TIE_EMBEDDINGS=0))
    names = set(t.optimizer.state())
    assert all(not tensor.any() for tensor in t.optimizer.state().values())
    t.optimizer.step(PLAIN, YES)
    assert set(t.optimizer.state()) == names
    params = dict(t.model.named_parameters())
    muon = group_params(t.model)["muon"]
    assert len(names) == len(muon) + 3 * (len(params) - len(muon))


def test_restored_state_goes_on_as_if_nothing_had_been():
    t = trainer(config(EMA_DECAY=0.9))

    def two_steps():
        for _ in range(2):
            t.optimizer.step(PLAIN, YES)
            t.average.update(YES)
        return snapshot(t)

    middle = two_steps()
    end = two_steps()
    t.restore(middle)
    assert equal(snapshot(t), middle)
    assert equal(two_steps(), end)
    assert not equal(middle, end)


def test_state_with_a_tensor_missing_is_an_error():
    t = trainer(config(RESUME=1, RUN_ID="x"))
    saved = snapshot(t)
    del saved["optimizer.muon.blocks.0.mlp.fc.weight"]
    with pytest.raises(train_gpt.UserError, match=r"blocks\.0\.mlp\.fc.*as None"):
        t.restore(saved)


# --------------------------------------------------------------------------------------
# Gradients and the average
# --------------------------------------------------------------------------------------


def test_norm_is_that_of_the_whole_gradient():
    model = with_gradients(config())
    want = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()
    assert reduce_gradients(model, torch.zeros(()), lone()).item() == pytest.approx(want.item(), rel=1e-6)


def test_parameter_without_a_gradient_counts_as_zero():
    model = with_gradients(config())
    norm = reduce_gradients(model, torch.zeros(()), lone())
    gone = model.skip_weights.grad.norm()
    model.skip_weights.grad = None
    less = reduce_gradients(model, torch.zeros(()), lone())
    assert less.item() == pytest.approx((norm**2 - gone**2).sqrt().item(), rel=1e-5)
    assert not model.skip_weights.grad.any()


def test_gradient_is_clipped_to_its_whole_norm():
    model = with_gradients(config())
    norm = reduce_gradients(model, torch.zeros(()), lone())
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    clip_gradients(model, norm, 2 * norm.item())
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())
    limit = norm.item() / 3
    clip_gradients(model, norm, limit)
    assert reduce_gradients(model, torch.zeros(()), lone()).item() == pytest.approx(limit, rel=1e-5)
    for name, p in model.named_parameters():
        assert (p.grad - before[name] / 3).abs().max() <= 1e-5 * before[name].abs().max()


def test_average_begins_at_the_first_weights_and_follows_by_its_decay():
    model = make_model(config(), lone())
    average, p = Average(model, 0.75), model.blocks[0].attn_scale
    by_hand = torch.ones(32)
    for value in (2.0, -4.0, 8.0):
        with torch.no_grad():
            p.fill_(value)
        average.update(YES)
        by_hand = 0.75 * by_hand + 0.25 * value
    assert torch.allclose(average.mean["blocks.0.attn_scale"], by_hand, rtol=1e-6)
    embedding = model.embed.weight.detach().clone()
    average.ship()
    assert torch.equal(p, average.mean["blocks.0.attn_scale"])
    assert torch.allclose(model.embed.weight, embedding, atol=1e-7)


def test_without_a_decay_nothing_is_averaged():
    t = trainer(config())
    assert t.average is None and not [name for name in t.tensors() if name.startswith("average.")]
    assert [name for name in trainer(config(EMA_DECAY=0.5)).tensors() if name.startswith("average.")]


def test_low_precision_activations_keep_float32_state():
    cfg = config()
    model = scrambled(cfg, torch.bfloat16)
    world = dataclasses.replace(lone(), dtype=torch.bfloat16)
    t = Trainer(model, None, cfg, world, "source")
    tokens = tokens_of(2, 33, cfg)
    train_gpt.train_step(t, [Batch(tokens[:, :-1], tokens[:, 1:], None)], PLAIN)
    assert {tensor.dtype for tensor in t.tensors().values()} == {torch.float32}
