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
    World,
    clip_mean,
    clip_own,
    group_params,
    make_model,
    objective,
    orthogonalize,
    polar_express,
    reduce_gradients,
    train_step,
)

YES, NO = torch.tensor(True), torch.tensor(False)
CLASSIC = [(3.4445, -4.7750, 2.0315)] * 20
POLAR = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
] + [(2.3465413258596377, -1.7097828382687081, 0.42323551169305323)] * 16  # the last goes on


def with_gradients(cfg, seed: int = 0):
    """A model with the gradients of one batch."""
    model, tokens = scrambled(cfg, seed=seed), tokens_of(4, 33, cfg, seed)
    objective(model, Batch(tokens[:, :-1], tokens[:, 1:], None), PLAIN, cfg)[0].backward()
    return model


def values(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def reduced(model, loss: torch.Tensor | None = None) -> train_gpt.Gradients:
    """What one process makes of the gradients that a model has."""
    return reduce_gradients(Optimizer(model, model.cfg, lone()), torch.zeros(()) if loss is None else loss)


def step(optimizer: Optimizer, phase: Phase = PLAIN, ok: torch.Tensor = YES) -> None:
    optimizer.step(reduce_gradients(optimizer, torch.zeros(())), phase, ok)


def muon_step(muon: Muon, phase: Phase = PLAIN, ok: torch.Tensor = YES) -> None:
    for stack, (share, _) in zip(muon.stacks, muon.share_gradients(), strict=True):
        muon.apply(stack, muon.update(stack, share, phase, ok), phase, ok)


# --------------------------------------------------------------------------------------
# Newton-Schulz
# --------------------------------------------------------------------------------------

SCALAR_MAP = [  # singular value, then what five iterations of Polar Express and of Muon's own make of it
    (0.001, 0.859, 0.471), (0.01, 1.027, 0.699), (0.1, 1.059, 0.712), (0.5, 0.911, 0.765),
    (1.0, 0.859, 0.696),
]  # fmt: skip


@pytest.mark.parametrize(("before", "polar", "classic"), SCALAR_MAP)
def test_singular_value_after_five_iterations(before, polar, classic):
    """On a diagonal of norm 1, so that dividing by the norm changes nothing."""
    diagonal = torch.diag(torch.tensor([before, math.sqrt(1 - before**2)]).double())[None]
    for function, after in ((polar_express, polar), (orthogonalize, classic)):
        found = function(diagonal, 5)[0]
        assert found[0, 0].item() == pytest.approx(after, abs=6e-4)
        assert found[0, 1] == found[1, 0] == 0


def test_polar_express_ends_between_0859_and_1141():
    """On every singular value from 0.001 to 1; each stands beside another that makes the norm 1."""
    before = torch.logspace(-3, 0, 2000).double()
    other = (1 - before.square()).clamp_min(0).sqrt()
    found = polar_express(torch.diag_embed(torch.stack([before, other], -1)), 5)[:, 0, 0]
    assert found.min().item() == pytest.approx(0.859, abs=1e-3)
    assert found.max().item() == pytest.approx(1.141, abs=1e-3)


def test_singular_values_end_between_047_and_121():
    found = orthogonalize(torch.diag(torch.logspace(-3, -0.1, 400).double())[None], 5)[0].diagonal()
    small = torch.logspace(-3, -0.1, 400) / torch.logspace(-3, -0.1, 400).norm() < 1e-3
    assert 0.46 < found[~small].min() < 0.7
    assert 1.19 < found.max() < 1.21


def naive_orthogonal(g: torch.Tensor, steps: int, coefficients: list = CLASSIC) -> torch.Tensor:
    """One matrix by its singular values: the polynomial acts on them alone."""
    u, s, v = torch.linalg.svd(g.double(), full_matrices=False)
    s = s / s.norm()
    for a, b, c in coefficients[:steps]:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 7), (64, 16)])
@pytest.mark.parametrize("steps", [1, 3, 5, 8])
@pytest.mark.parametrize(("function", "coefficients"), [(orthogonalize, CLASSIC), (polar_express, POLAR)])
def test_only_the_singular_values_change(shape, steps, function, coefficients):
    """Fewer iterations than five take the first rows of Polar Express, more repeat its last."""
    g = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(steps))
    found = function(g, steps)
    for one, result in zip(g, found, strict=True):
        assert (result - naive_orthogonal(one, steps, coefficients)).abs().max() <= 1e-5


@pytest.mark.parametrize("function", [orthogonalize, polar_express])
def test_matrix_of_zeros_stays_zero(function):
    assert not function(torch.zeros(2, 4, 6), 5).any()


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


MUONS = {  # settings: coefficients, weight decay, factor of the rate
    "plain": ({}, CLASSIC, 0.0, 1.0),
    "rows": ({"MUON_ROW_NORMALIZE": 1}, CLASSIC, 0.0, 1.0),
    "polar": ({"POLAR_EXPRESS_NS": 1}, POLAR, 0.0, 1.0),
    "decay": ({"MUON_WD": 2.0}, CLASSIC, 2.0, 1.0),
    "wide": ({"LR_WIDTH_SCALING": 1, "MODEL_DIM": 256, "MUON_WD": 1.0}, CLASSIC, 1.0, 2.0),
    "record": ({"MUON_ROW_NORMALIZE": 1, "POLAR_EXPRESS_NS": 1, "MUON_WD": 0.095}, POLAR, 0.095, 1.0),
}


@torch.no_grad()
@pytest.mark.parametrize("case", MUONS)
def test_muon_is_momentum_then_rows_then_orthogonalisation_then_decay_and_a_rate_by_shape(case):
    """The decay is multiplied by the rate of the step, not by the factor of the shape, and by its taper."""
    knobs, coefficients, decay, factor = MUONS[case]
    muon, params = muon_of(MATRICES, config(MATRIX_LR=0.03, **knobs))
    want = {name: p.detach().double().clone() for name, p in params.items()}
    buffers = {name: torch.zeros(MATRICES[name], dtype=torch.float64) for name in MATRICES}
    for step, (lr, momentum, taper) in enumerate([(1.0, 0.85, 1.0), (0.5, 0.9, 1.0), (0.25, 0.95, 0.5)]):
        give(params, step)
        muon_step(muon, Phase(lr, momentum, 0, False, taper))
        for name, (rows, cols) in MATRICES.items():
            g = params[name].grad.double()
            buffers[name] = momentum * buffers[name] + g
            nesterov = g + momentum * buffers[name]
            if "MUON_ROW_NORMALIZE" in knobs:
                nesterov = nesterov / nesterov.square().sum(1, keepdim=True).sqrt()
            update = naive_orthogonal(nesterov, 5, coefficients)
            rate = 0.03 * factor * lr
            want[name] *= 1 - rate * decay * taper
            want[name] -= rate * math.sqrt(max(1, rows / cols)) * update
    for name, p in params.items():
        assert (p - want[name]).abs().max() <= 1e-5
        assert (muon.state()[name] - buffers[name]).abs().max() <= 1e-5


@torch.no_grad()
def test_batching_of_equal_shapes_does_not_matter():
    together, params = muon_of(MATRICES)
    assert sorted(len(stack.params) for stack in together.stacks) == [1, 1, 3]
    alone = {name: muon_of([name]) for name in MATRICES}
    for number in range(3):
        for muon, members in ((together, params), *alone.values()):
            give(members, number)
            muon_step(muon)
    for name, (_, members) in alone.items():
        assert (members[name] - params[name]).abs().max() <= 1e-6


def test_number_of_iterations_is_a_knob():
    results = []
    for steps in (1, 5):
        muon, params = muon_of("a", config(MUON_BACKEND_STEPS=steps))
        give(params, 0)
        with torch.no_grad():
            muon_step(muon)
        results.append(params["a"])
    assert not torch.equal(*results)


@torch.no_grad()
def test_row_without_gradient_stays_where_it_is():
    muon, params = muon_of("d", config(MUON_ROW_NORMALIZE=1))
    give(params, 0)
    params["d"].grad[2] = 0
    before = params["d"].clone()
    muon_step(muon)
    moved = (params["d"] - before).abs().sum(1)
    assert moved[2] <= 1e-6 < moved.sum() and torch.isfinite(params["d"]).all()


# --------------------------------------------------------------------------------------
# Groups and rates
# --------------------------------------------------------------------------------------


RATES = {"MATRIX_LR": 0.011, "SCALAR_LR": 0.013, "TIED_EMBED_LR": 0.017, "EMBED_LR": 0.019, "HEAD_LR": 0.023}


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


def test_table_tells_algorithm_rate_and_decay_of_each_group():
    muon = {"MUON_ROW_NORMALIZE": 1, "POLAR_EXPRESS_NS": 1, "MUON_BACKEND_STEPS": 4, "LR_WIDTH_SCALING": 1}
    decays = {"MUON_WD": 0.3, "EMBED_WD": 0.2, "ADAM_WD": 0.1}
    cfg = config(TIE_EMBEDDINGS=0, MODEL_DIM=64, **RATES, **decays, **muon)
    rows = [dict(pair.split(":") for pair in line.split()) for line in
            Optimizer(make_model(cfg, lone()), cfg, lone()).table()]  # fmt: skip
    assert [tuple(row[key] for key in ("optimizer_group", "algorithm", "lr", "wd")) for row in rows] == [
        ("muon", "muon+row_norm+polar_expressx4", "0.088", "0.3"),
        ("embed", "adam", "0.019", "0.2"),
        ("head", "adam", "0.023", "0.2"),
        ("scalar", "adam", "0.013", "0.1"),
    ]
    line = Optimizer(make_model(config(), lone()), config(), lone()).table()[0]
    assert " algorithm:muon+newton_schulzx5 lr:0.04 wd:0 " in line


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


@pytest.mark.parametrize("tied", [0, 1])
def test_each_group_moves_by_its_own_rate(tied):
    """Adam's first step is the rate itself; stored rates, which somebody may change, are never read."""
    cfg = config(TIE_EMBEDDINGS=tied, **RATES)
    model = with_gradients(cfg)
    before, optimizer = values(model), Optimizer(model, cfg, lone())
    for group in optimizer.adam.param_groups:
        group["lr"] = 123.0
    step(optimizer, Phase(0.5, 0.9, 0, False))
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters()}
    half = {"embed.weight": 0.017 if tied else 0.019, "head.weight": 0.023, "skip_weights": 0.013}
    for name in half.keys() & moved.keys():
        assert moved[name] == pytest.approx(half[name] / 2, rel=1e-3)
    assert optimizer.rates["muon"] == RATES["MATRIX_LR"]
    still = values(model)
    step(optimizer, Phase(0.0, 0.9, 0, False))
    assert equal(values(model), still)


@pytest.mark.parametrize(("embed", "others"), [(0.0, 0.0), (3.0, 1.0)])
def test_adam_is_torch_adam_with_a_decay_of_each_group(embed, others):
    """EMBED_WD is of the embedding and of the head, ADAM_WD of gains and scales; both times the rate."""
    rates = {"SCALAR_LR": 0.02, "EMBED_LR": 0.02, "HEAD_LR": 0.02, "EMBED_WD": embed, "ADAM_WD": others}
    cfg = config(BETA1=0.8, BETA2=0.97, ADAM_EPS=1e-4, TIE_EMBEDDINGS=0, **rates)
    model = with_gradients(cfg)
    names = {name: kind for kind in ("embed", "head", "scalar") for name in group_params(model)[kind]}
    other = {name: nn.Parameter(model.get_parameter(name).detach().clone()) for name in names}
    decays = {"embed": embed, "head": embed, "scalar": others}
    groups = [{"params": [p], "weight_decay": decays[names[name]]} for name, p in other.items()]
    adam = torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.97), eps=1e-4, foreach=False, fused=False)
    optimizer = Optimizer(model, cfg, lone())
    for number in range(5):
        for name, p in other.items():
            random = torch.Generator().manual_seed(number)
            model.get_parameter(name).grad = p.grad = torch.randn(p.shape, generator=random)
        for group in adam.param_groups:
            group["lr"] = 0.02 / (number + 1)
        step(optimizer, PLAIN._replace(lr=1 / (number + 1)))
        adam.step()
    assert len(names) > 4
    for name, p in other.items():
        assert (model.get_parameter(name) - p).abs().max() <= 1e-6


# --------------------------------------------------------------------------------------
# Steps that do not happen, and state
# --------------------------------------------------------------------------------------


def trainer(cfg) -> Trainer:
    return Trainer(with_gradients(cfg), None, cfg, lone(), "source")


def snapshot(t: Trainer) -> dict[str, torch.Tensor]:
    return {name: live.clone() for name, live in t.tensors().items()}


DECAYS = {"MUON_WD": 0.1, "EMBED_WD": 0.1, "ADAM_WD": 0.1}


@pytest.mark.parametrize("knobs", [{}, DECAYS | {"MUON_ROW_NORMALIZE": 1, "POLAR_EXPRESS_NS": 1}])
@pytest.mark.parametrize("poison", [0.0, math.nan, math.inf])
def test_step_that_must_not_happen_changes_not_a_bit(poison, knobs):
    """Weights, moments, their step counts and the average, whatever the gradients hold."""
    t = trainer(config(EMA_DECAY=0.9, TIE_EMBEDDINGS=0, **knobs))
    step(t.optimizer)
    t.average.update(YES)
    before = snapshot(t)
    for p in t.model.parameters():
        p.grad.add_(poison)
    step(t.optimizer, ok=NO)
    t.average.update(NO)
    assert equal(snapshot(t), before)
    for p in t.model.parameters():
        p.grad.nan_to_num_(0.5, 0.5, 0.5)
    step(t.optimizer)
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
    step(t.optimizer)
    assert set(t.optimizer.state()) == names
    params = dict(t.model.named_parameters())
    muon = group_params(t.model)["muon"]
    assert len(names) == len(muon) + 3 * (len(params) - len(muon))


def test_restored_state_goes_on_as_if_nothing_had_been():
    t = trainer(config(EMA_DECAY=0.9))

    def two_steps():
        for _ in range(2):
            step(t.optimizer)
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
    assert reduced(model).norm.item() == pytest.approx(want.item(), rel=1e-6)


def test_parameter_without_a_gradient_counts_as_zero():
    model = with_gradients(config())
    norm = reduced(model).norm
    gone = model.skip_weights.grad.norm()
    matrix = model.blocks[0].mlp.fc.weight
    gone_too = matrix.grad.norm()
    model.skip_weights.grad = matrix.grad = None
    less = reduced(model).norm
    assert less.item() == pytest.approx((norm**2 - gone**2 - gone_too**2).sqrt().item(), rel=1e-5)
    assert not model.skip_weights.grad.any() and not matrix.grad.any()


def test_gradient_is_clipped_to_its_whole_norm():
    gradients = reduced(with_gradients(config()))
    tensors, norm = [*gradients.shares, *gradients.whole], gradients.norm.item()
    before = [t.clone() for t in tensors]
    clip_mean(gradients, 2 * norm)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    clip_mean(gradients, norm / 3)
    after = torch.cat([t.double().flatten() for t in tensors]).norm().item()
    assert after == pytest.approx(norm / 3, rel=1e-5)
    for t, b in zip(tensors, before, strict=True):
        assert (t - b / 3).abs().max() <= 1e-5 * b.abs().max()


def test_alone_it_makes_no_difference_when_the_gradient_is_clipped():
    """Before averaging or after it: the same steps, to the rounding of a norm."""
    ends = []
    for local in (0, 1):
        cfg = config(GRAD_CLIP_NORM=0.05, GRAD_CLIP_LOCAL=local)
        t, tokens = trainer(cfg), tokens_of(2, 33, cfg)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], None)
        norms = [train_step(t, [batch], PLAIN)[1].item() for _ in range(3)]
        assert (max(norms) <= 0.0501) == bool(local), "what is reported is what was averaged"
        ends.append(values(t.model))
    for name, one in ends[0].items():
        assert (ends[1][name] - one).abs().max() <= 1e-5 * one.abs().max(), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_gradient_that_cannot_be_clipped_is_not_passed_on(bad):
    """A norm that overflows would shrink finite gradients to zero, and the step would count as good."""
    model = with_gradients(config())
    model.embed.weight.grad[0] = bad
    clip_own(model, 1.0)
    assert not torch.isfinite(reduced(model).norm)


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


# --------------------------------------------------------------------------------------
# What waits for what
# --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Slow(World):
    """A world of one whose collectives note when they begin and when they are waited for."""

    notes: list = dataclasses.field(default_factory=list)

    def noting(self, name: str) -> train_gpt.Pending:
        notes = self.notes
        notes.append(f"begin {name}")

        class Work:
            def wait(self) -> None:
                notes.append(f"end {name}")

        return train_gpt.Pending((Work(),))

    def mean_share_later(self, whole):
        return whole, self.noting(f"share {tuple(whole.shape)}")

    def gather_later(self, share):
        return share, self.noting(f"gather {tuple(share.shape)}")

    def mean_later(self, tensors):
        return self.noting("others")


def test_largest_stacks_leave_first_and_the_next_is_orthogonalised_while_one_travels(monkeypatch):
    world = Slow(0, 1, torch.device("cpu"), torch.float32, False, train_gpt.Journal(None), ".")
    cfg = config(MLP_MULT=3, NUM_LAYERS=2)
    optimizer = Optimizer(with_gradients(cfg), cfg, world)
    real, adam = train_gpt.orthogonalize, optimizer.adam.step

    def noted(g, steps):
        world.notes.append(f"orthogonalise {tuple(g.shape)}")
        return real(g, steps)

    monkeypatch.setattr(train_gpt, "orthogonalize", noted)
    monkeypatch.setattr(optimizer.adam, "step", lambda: (world.notes.append("adam"), adam()))
    step(optimizer)
    shapes = [(2, 96, 32), (2, 32, 96), (4, 32, 32), (4, 16, 32)]
    sent = [f"begin share {s}" for s in shapes] + ["begin others"]
    came = [f"end share {s}" for s in shapes] + ["end others"]
    assert world.notes[:10] == sent + came
    rows = []
    for before, s in zip([None, *shapes], shapes, strict=False):
        rows += [f"orthogonalise {s}", f"begin gather {s}"] + ([f"end gather {before}"] if before else [])
    assert world.notes[10:] == [*rows, "adam", f"end gather {shapes[-1]}"]


def test_low_precision_activations_keep_float32_state():
    cfg = config()
    model = scrambled(cfg, torch.bfloat16)
    world = dataclasses.replace(lone(), dtype=torch.bfloat16)
    t = Trainer(model, None, cfg, world, "source")
    tokens = tokens_of(2, 33, cfg)
    train_gpt.train_step(t, [Batch(tokens[:, :-1], tokens[:, 1:], None)], PLAIN)
    assert {tensor.dtype for tensor in t.tensors().values()} == {torch.float32}
