"""Features of the records' models: each changes the loss, learns, is blind to the future, and does what its
formula says."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import build_submission as builder
import train_gpt
from conftest import ROOT, read_env, tiny_env
from test_model import PLAIN, config, lone, nats, packed_nats, scrambled, tokens_of
from train_gpt import Batch, Config, Ctx, final_phase, make_model, objective, packed, param_tags, read_config

FEATURES = {  # what is switched on: its knobs
    "part of the head turned": {"ROPE_DIMS": 4},
    "own value removed": {"XSA_LAST_N": 2},
    "dense gate": {"GATED_ATTN_ENABLED": 1},
    "sparse gate": {"SPARSE_ATTN_GATE_ENABLED": 1, "SPARSE_ATTN_GATE_SCALE": 0.5},
    "out gate": {"ATTN_OUT_GATE_ENABLED": 1},
    "out gate of queries": {"ATTN_OUT_GATE_ENABLED": 1, "ATTN_OUT_GATE_SRC": "q"},
    "gate with bias": {"GATED_ATTENTION": 1},
    "value residual": {"VALUE_RESIDUAL": 1},
    "scale by depth": {"LN_SCALE": 1},
    "skip gates": {"SKIP_GATES_ENABLED": 1},
    "two lanes": {"PARALLEL_START_LAYER": 2},
    "lane of attention": {"PARALLEL_START_LAYER": 2, "PARALLEL_FINAL_LANE": "attn"},
    "lane of the MLP": {"PARALLEL_START_LAYER": 2, "PARALLEL_FINAL_LANE": "mlp"},
    "delta gate": {"DTG_ENABLED": 1},
    "smear gate": {"SMEAR_GATE_ENABLED": 1},
    "token pairs": {"BIGRAM_VOCAB_SIZE": 64},
    "value table": {"VE_ENABLED": 1},
    "heads ahead": {"MTP_NUM_HEADS": 2},
    "leaky ReLU": {"MLP_NEGATIVE_SLOPE": 0.5},
    "narrow embedding": {"EMBED_DIM": 16},
    "bias of the logits": {"VOCAB_BIAS": 1},
    "z-loss": {"Z_LOSS_WEIGHT": 0.01},
    "polynomial cap": {"SOFTCAP_TYPE": "poly", "LOGIT_SOFTCAP": 3},
    "algebraic cap": {"SOFTCAP_TYPE": "algebraic"},
    "slowed angles": {"ROPE_TYPE": "yarn", "YARN_MAX_LEN": 64},
    "normed projections": {"NORMED_PROJ": "plain"},
    "normed projections with gains": {"NORMED_PROJ": "gain"},
    "loops": {"NUM_LOOPS": 1},
    "experts": {"MOE_ENABLED": 1},
    "two experts a token": {"MOE_ENABLED": 1, "MOE_TOP_K": 2, "MOE_NUM_EXPERTS": 4},
    "experts with gains": {"MOE_ENABLED": 1, "NORMED_PROJ": "gain", "RESIDUAL_PROJ_INIT_STD": 0.1},
}
STACK = {  # record 1855's model, and besides what earlier records had
    **{"ROPE_DIMS": 4, "XSA_LAST_N": 3, "LN_SCALE": 1, "SKIP_GATES_ENABLED": 1, "PARALLEL_START_LAYER": 2},
    **{"SPARSE_ATTN_GATE_ENABLED": 1, "SMEAR_GATE_ENABLED": 1, "NUM_LOOPS": 2, "MLP_NEGATIVE_SLOPE": 0.5},
}
ONE_MATRIX = {"FUSED_QKV": 1}  # changes who is orthogonalised with whom, and no forward
EVERYTHING = {name: value for knobs in FEATURES.values() for name, value in knobs.items()} | ONE_MATRIX
PROFILES = {**FEATURES, "one matrix": ONE_MATRIX, "record stack": STACK, "everything": EVERYTHING}
RECORDS = {path.parent.name: read_env(path) for path in sorted((ROOT / "records").glob("*/env"))}
PROFILES |= {name: builder.tiny_twin(builder.make_recipe(env)).env for name, env in RECORDS.items()}


def batch_of(cfg: Config, rows: int = 2) -> Batch:
    tokens = tokens_of(rows, cfg.data.seq_len + 1, cfg)
    return Batch(tokens[:, :-1], tokens[:, 1:], None)


def loss_and_gradients(cfg: Config, compiling: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    """Of a model in which every weight matters, on two rows of random tokens."""
    model = scrambled(cfg)
    if compiling:
        train_gpt.make_fast(model, train_gpt.dataclasses.replace(lone(), compiling=True))
    total, _ = objective(model, batch_of(cfg), final_phase(cfg), cfg)
    total.backward()
    return total.item(), {name: p.grad for name, p in model.named_parameters()}


# --------------------------------------------------------------------------------------
# Every feature is there, and does nothing it should not
# --------------------------------------------------------------------------------------


def test_every_knob_of_the_sections_is_switched_on_somewhere_here():
    sections = {"attn", "residual", "input", "ahead", "moe"}
    knobs = {env for env, (section, _) in train_gpt.all_knobs().items() if section in sections}
    sizes = {"GATED_ATTN_INIT_STD", "SPARSE_ATTN_GATE_INIT_STD", "GATE_WINDOW", "GATED_ATTN_QUANT_GATE"}
    sizes |= {"BIGRAM_DIM", "VE_DIM", "VE_LAYERS", "MTP_LOSS_WEIGHT", "ROPE_YARN"}  # tests of their own
    sizes |= {"MOE_START_FRACTION", "MOE_LAYER_FRAC", "MOE_ROUTER_AUX_LOSS_COEF"}
    model = {"EMBED_DIM", "VOCAB_BIAS", "Z_LOSS_WEIGHT", "SOFTCAP_TYPE", "LOGIT_SOFTCAP", "NORMED_PROJ"}
    model |= {"NUM_LOOPS", "MLP_NEGATIVE_SLOPE", "RESIDUAL_PROJ_INIT_STD"}
    assert knobs - sizes == EVERYTHING.keys() - model


@pytest.mark.parametrize("name", FEATURES)
def test_feature_changes_the_loss_and_all_its_parameters_learn(name):
    cfg = config(**FEATURES[name])
    plain, _ = loss_and_gradients(config())
    loss, grads = loss_and_gradients(cfg)
    assert math.isfinite(loss) and abs(loss - plain) > 1e-4
    dead = [n for n, g in grads.items() if g is None or not g.any()]
    assert dead == (["blocks.0.attn.value_mix"] if name == "value residual" else []), (
        "the first layer mixes nothing"
    )
    for n in grads.keys() & {
        "parallel_resid_lambdas",
        "parallel_post_lambdas",
    }:  # rows of one-lane layers rest
        assert [bool(row.any()) for row in grads[n]] == [False, False, True]


@pytest.mark.parametrize("lanes", [0, 2])
@pytest.mark.parametrize("loops", [0, 1])
def test_every_feature_steps_with_layers_shared_and_lanes(loops, lanes):
    """All forms of the model construct and step, and nobody is left out of the optimizer."""
    shared = {"NUM_LOOPS": loops, "LOOP_START": 1, "LOOP_END": 1, "PARALLEL_START_LAYER": lanes}
    shared |= {"RESIDUAL_PROJ_INIT_STD": 0.1, "MATRIX_CODEC": "ternary", "ITERATIONS": 100}
    for name, knobs in FEATURES.items():
        cfg = config(**shared | {k: v for k, v in knobs.items() if k not in shared})
        t = train_gpt.Trainer(make_model(cfg, lone()), None, cfg, lone(), "source")
        phase = PLAIN._replace(loops=loops, qat=True, routing=0.5, extra=cfg.moe.extra)
        before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
        figures = [train_gpt.train_step(t, [batch_of(cfg)], phase) for _ in range(2)]
        assert all(f[2] == 1 for f in figures) and figures[1][0] < figures[0][0], name
        still = [n for n, p in t.model.named_parameters() if torch.equal(p, before[n])]
        rest = {"value residual": ["blocks.0.attn.value_mix"]}  # the first layer mixes nothing
        assert still == rest.get(name, []), name


@pytest.mark.parametrize("name", FEATURES)
def test_fresh_model_with_the_feature_begins_at_a_uniform_guess_and_learns(name):
    cfg = config(**FEATURES[name])
    model, batch = make_model(cfg, lone()), batch_of(cfg)
    total, terms = objective(model, batch, final_phase(cfg), cfg)
    assert abs(terms["nll"].item() - math.log(cfg.model.vocab)) < 0.01
    adam = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(8):
        adam.zero_grad()
        objective(model, batch, final_phase(cfg), cfg)[0].backward()
        adam.step()
    assert objective(model, batch, final_phase(cfg), cfg)[0].item() < total.item() - 0.3


@pytest.mark.parametrize(("codec", "int8"), [("int", 1), ("ternary", 0)])
def test_every_feature_is_trained_through_what_ships_of_it(codec, int8):
    """The loaded artifact answers as the model in its quantised phase: matrices, gates, gains and tables.

    Bit for bit but for the smear gate, whose product of one row adds up by where its numbers lie in memory.
    """
    for name, knobs in FEATURES.items():
        cfg = config(MATRIX_CODEC=codec, MATRIX_BITS=6, GATED_ATTN_QUANT_GATE=int8, **knobs)
        model, tokens = scrambled(cfg), tokens_of(2, 33, cfg)
        pair, phase = (tokens[:, :-1], tokens[:, 1:]), final_phase(cfg)._replace(qat=True)
        loaded = train_gpt.load(train_gpt.export(model, cfg).blob, cfg, lone(), "it").eval()
        live = nats(model, *pair, phase=phase)
        found, bound = nats(loaded, *pair), 1e-5 if cfg.input.smear else 0.0
        assert (found - live).abs().max() <= bound, name
        assert (nats(model, *pair) - live).abs().max() > 1e-3, name


COMPILED = ["record stack", "everything"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in COMPILED[1:] else pytest.mark.full) for n in PROFILES]
)
def test_compiled_model_is_the_eager_one_and_its_gates_learn(name):
    """Dead features under torch.compile are recorded failures of the field."""
    cfg = config(**PROFILES[name])
    (loss, grads), (fast, fast_grads) = loss_and_gradients(cfg), loss_and_gradients(cfg, compiling=True)
    assert abs(loss - fast) < 1e-5 * abs(loss)
    for n, g in grads.items():
        if g is None:  # see the test above
            assert fast_grads[n] is None
            continue
        assert (g - fast_grads[n]).norm() <= 2e-4 * g.norm(), n


# --------------------------------------------------------------------------------------
# Causal, and closed between documents
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROFILES)
@torch.no_grad()
def test_no_token_moves_what_is_predicted_before_it(name):
    """Hidden states, not nats: those of a target that leaks into its own prediction would change anyway.

    Bit for bit, but for experts: how many tokens an expert reads at once depends on all of them, and with
    it the last bits of each product; they are held to 1e-10 in float64.
    """
    cfg = config(**PROFILES[name])
    dtype, bound = (torch.float64, 1e-10) if cfg.moe.on else (torch.float32, 0.0)
    model, tokens = scrambled(cfg, dtype).to(dtype), tokens_of(1, 32, cfg)
    whole = model.hidden(Ctx(tokens, None, cfg.data.seq_len, final_phase(cfg))).y
    for at in (1, 2, 15, 31):
        other = tokens.clone()
        other[:, at:] = tokens_of(1, 32 - at, cfg, seed=at)
        found = model.hidden(Ctx(other, None, cfg.data.seq_len, final_phase(cfg))).y
        assert (found[:, :at] - whole[:, :at]).abs().max() <= bound
        assert (found[:, at:] - whole[:, at:]).abs().amax(-1).min() > 1e-5


@pytest.mark.parametrize("name", PROFILES)
def test_no_prefix_is_scored_otherwise_for_what_follows(name):
    cfg = config(**PROFILES[name])
    model, tokens = scrambled(cfg, torch.float64).double(), tokens_of(1, 33, cfg)
    whole = nats(model, tokens[:, :-1], tokens[:, 1:])
    worst = max(
        float((nats(model, tokens[:, :n], tokens[:, 1 : n + 1]) - whole[:, :n]).abs().max())
        for n in (1, 2, 7, 31)
    )
    assert worst < 1e-10, worst


@pytest.mark.parametrize("leak", [1e-3, 0.0])
def test_planted_leak_is_noticed_by_both_tests(leak, monkeypatch):
    """A thousandth of the next token's embedding, mixed into every token's."""
    embed = train_gpt.Embed.forward
    monkeypatch.setattr(train_gpt.Embed, "forward", lambda self, ctx: leaky(embed(self, ctx), leak))
    for test in (
        test_no_token_moves_what_is_predicted_before_it,
        test_no_prefix_is_scored_otherwise_for_what_follows,
    ):
        if leak:
            with pytest.raises(AssertionError):
                test("record stack")
        else:
            test("record stack")


def leaky(e: torch.Tensor, leak: float) -> torch.Tensor:
    return e + leak * torch.cat([e[:, 1:], torch.zeros_like(e[:, :1])], 1)


def documents_of(cfg: Config, changed: int | None = None) -> list:
    """Four documents, each from BOS on; one of them with other words."""
    texts = []
    for i, length in enumerate((5, 20, 1, 9)):
        seed = 40 + i + 100 * (i == changed)
        texts.append(torch.cat([torch.tensor([1]), tokens_of(1, length, cfg, seed)[0]]).numpy())
    return texts


@pytest.mark.parametrize("name", PROFILES)
def test_changed_document_moves_no_other(name):
    cfg = config(**PROFILES[name] | {"DOC_PACKING": 1})
    dtype, bound = (torch.float64, 1e-10) if cfg.moe.on else (torch.float32, 0.0)
    model = scrambled(cfg, dtype).to(dtype)
    whole = packed_nats(model, documents_of(cfg))
    for i in range(4):
        found = packed_nats(model, documents_of(cfg, changed=i))
        for j in range(4):  # the last target of a document is the next one's BOS, the same in both
            off = (found[j] - whole[j]).abs().max()
            assert off <= bound if i != j else off > 1e-4, (i, j)


@pytest.mark.parametrize("name", ["record stack", "everything"])
def test_document_in_a_pack_is_scored_as_alone(name):
    """To the rounding of the rotary angles, which are float32 and grow with the position in the pack."""
    cfg = config(**PROFILES[name] | {"DOC_PACKING": 1})
    model = scrambled(cfg, torch.float64).double()
    texts = documents_of(cfg)
    for together, text in zip(packed_nats(model, texts), texts, strict=True):
        assert (together - packed_nats(model, [text])[0]).abs().max() < 1e-5


def test_rows_of_one_pack_do_not_meet():
    """Several spans in one batch: the token before a span's first is another text's."""
    cfg = config(**EVERYTHING, DOC_PACKING=1)
    model, rows = scrambled(cfg), [tokens_of(1, 13, cfg, seed)[0].numpy() for seed in (1, 2, 3)]
    both = packed([rows[0], rows[2]], 1, 32), packed([rows[1], rows[2]], 1, 32)
    first, second = (nats(model, b.tokens, b.targets, b.docs)[0, 12:] for b in both)
    assert torch.equal(first, second)


# --------------------------------------------------------------------------------------
# The formulas, written a second time
# --------------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def context(cfg: Config, tokens: torch.Tensor, **filled) -> Ctx:
    return Ctx(tokens, None, cfg.data.seq_len, final_phase(cfg), **filled)


def test_only_the_first_dimensions_turn_and_by_the_published_angles():
    x, length = random(1, 6, 2, 8), 6
    rope = train_gpt.rope_table(length, 4, 100.0, x)
    found = train_gpt.rotate(x, rope)
    for t in range(length):
        for j, angle in enumerate((t * 1.0, t * 100.0 ** (-2 / 4))):
            a, b = x[0, t, :, j], x[0, t, :, j + 2]
            c, s = math.cos(angle), math.sin(angle)
            assert torch.allclose(found[0, t, :, j], a * c + b * s, atol=1e-6)
            assert torch.allclose(found[0, t, :, j + 2], b * c - a * s, atol=1e-6)
    assert torch.equal(found[..., 4:], x[..., 4:])


def test_rotary_base_stretches_only_beyond_the_training_context():
    cfg = config(ROPE_YARN=1, ROPE_DIMS=4, EVAL_SEQ_LEN=64)
    model, x = make_model(cfg, lone()), torch.zeros(1, 64, 32)
    for longest, base in ((32, 1e4), (64, 1e4 * 2 ** (4 / 2))):
        ctx = model.filled(context(cfg, torch.zeros(1, 64, dtype=torch.int64))._replace(longest=longest), x)
        assert torch.equal(ctx.rope[0], train_gpt.rope_table(64, 4, base, x)[0])


def test_own_value_is_removed_from_every_head():
    y, v = random(2, 5, 4, 8), random(2, 5, 2, 8, seed=1)
    found = train_gpt.without_own_value(y, v)
    for h in range(4):
        own = v[:, :, h // 2]
        assert (found[:, :, h] * own).sum(-1).abs().max() < 1e-12
        part = (y[:, :, h] * own).sum(-1, keepdim=True) / (own * own).sum(-1, keepdim=True)
        assert torch.allclose(found[:, :, h], y[:, :, h] - part * own, atol=1e-12)


@pytest.mark.parametrize(
    ("knobs", "start", "formula"),
    [
        ({"GATED_ATTN_ENABLED": 1, "GATED_ATTN_INIT_STD": 0}, 0.5, lambda w, x, q: torch.sigmoid(x @ w.T)),
        (
            {"SPARSE_ATTN_GATE_ENABLED": 1, "SPARSE_ATTN_GATE_SCALE": 0.5},
            0.5,
            lambda w, x, q: torch.sigmoid(0.5 * x[..., :12] @ w.T),
        ),
        ({"ATTN_OUT_GATE_ENABLED": 1}, 1.0, lambda w, x, q: 2 * torch.sigmoid(x[..., :12] @ w.T)),
        (
            {"ATTN_OUT_GATE_ENABLED": 1, "ATTN_OUT_GATE_SRC": "q", "GATE_WINDOW": 7},
            1.0,
            lambda w, x, q: 2 * torch.sigmoid(q[..., :7] @ w.T),
        ),
        ({"GATED_ATTENTION": 1}, 0.982, lambda w, x, q: torch.sigmoid(x @ w.T + 4)),
    ],
)
def test_gate_of_a_head(knobs, start, formula):
    cfg, (x, q) = config(**knobs), (random(1, 3, 32), random(1, 3, 32, seed=1))
    ((_, form),) = train_gpt.gate_forms(cfg).items()
    gate = train_gpt.HeadGate(form, cfg).double()
    assert gate(x, q, PLAIN).shape == (1, 3, 4, 1)
    assert (gate(x, q, PLAIN) - start).abs().max() < 1e-3
    with torch.no_grad():
        gate.weight.copy_(random(*gate.weight.shape, seed=2))
    assert torch.allclose(gate(x, q, PLAIN)[..., 0], formula(gate.weight, x, q), atol=1e-12)


def test_gates_that_are_on_together_multiply():
    cfg = config(GATED_ATTN_ENABLED=1, ATTN_OUT_GATE_ENABLED=1)
    model = make_model(cfg, lone())
    assert list(model.blocks[0].attn.gates) == ["dense", "out"]


@pytest.mark.parametrize("int8", [0, 1])
def test_gates_ship_as_the_knob_says(int8):
    tags = param_tags(make_model(config(SPARSE_ATTN_GATE_ENABLED=1, GATED_ATTN_QUANT_GATE=int8), lone()))
    found = {tag.codec.name for name, tag in tags.items() if ".gates." in name}
    assert found == {"int8" if int8 else "half"}


def test_values_of_the_first_layer_are_mixed_into_later_ones():
    cfg = config(VALUE_RESIDUAL=1, VE_ENABLED=1)
    attn = scrambled(cfg).double().blocks[1].attn
    x, table = random(1, 5, 32), random(1, 5, 16, seed=1)
    rope = train_gpt.rope_table(5, 8, 1e4, x)
    seen = {}
    attn.attend = lambda q, k, v, docs, longest: seen.update(v=v) or q
    own = (x @ attn.c_v.weight.T + attn.table_scale * table).view(1, 5, 2, 8)
    out = attn(x, context(cfg, None, rope=rope, table=table))
    assert torch.allclose(seen["v"], own) and torch.equal(out.values, seen["v"])
    first = random(1, 5, 2, 8, seed=2)
    out = attn(x, context(cfg, None, rope=rope, table=table, first=first))
    assert torch.allclose(seen["v"], attn.value_mix[0] * first + attn.value_mix[1] * own)
    assert torch.allclose(out.values, own)


def test_first_values_learn_through_later_layers():
    """What the first layer's own attention adds is cut off: its values matter through the mix alone."""
    for knobs, learns in (({"VALUE_RESIDUAL": 1}, True), ({}, False)):
        cfg = config(**knobs)
        model = scrambled(cfg)
        with torch.no_grad():
            model.blocks[0].attn.proj.weight.zero_()
        objective(model, batch_of(cfg), final_phase(cfg), cfg)[0].backward()
        assert bool(model.blocks[0].attn.c_v.weight.grad.any()) == learns


@torch.no_grad()
@pytest.mark.parametrize(("std", "bound"), [(0.0, 0.0), (0.002, 0.02)])
def test_mix_of_values_does_not_shake_a_fresh_model(std, bound):
    """It begins at halves, as published, but what it changes goes through a projection of zeros or near."""
    found = []
    for mix in (0, 1):
        cfg = config(VALUE_RESIDUAL=mix, RESIDUAL_PROJ_INIT_STD=std)
        ctx = Ctx(batch_of(cfg).tokens, None, cfg.data.seq_len, final_phase(cfg))
        found.append(make_model(cfg, lone()).hidden(ctx).y)
    assert (found[1] - found[0]).norm() <= bound * found[0].norm()
    assert torch.equal(*found) == (std == 0)


def test_value_table_is_read_by_its_layers_alone():
    model = make_model(config(VE_ENABLED=1, VE_LAYERS="2"), lone())
    assert [name for name, _ in model.named_parameters() if "table_scale" in name] == [
        "blocks.2.attn.table_scale"
    ]
    tokens, cfg = torch.tensor([[5, 9]]), model.cfg
    nn.init.normal_(model.value_table.proj.weight)
    found = model.value_table(context(cfg, tokens), torch.float32)
    rows, proj = model.value_table.table.weight[tokens], model.value_table.proj.weight
    assert torch.allclose(found, 0.1 * rows @ proj.T)


def test_input_of_a_layer_is_scaled_by_its_depth():
    cfg = config(LN_SCALE=1)
    model = scrambled(cfg).double()
    block, x = model.blocks[2], random(1, 5, 32)
    seen = []
    for part in (block.attn, block.mlp):
        part.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.visit(2, x, x, model.filled(context(cfg, torch.zeros(1, 5, dtype=torch.int64)), x))
    assert [round(t.square().mean().sqrt().item(), 6) for t in seen] == [round(3**-0.5, 6)] * 2


def test_two_lanes_follow_the_published_update():
    cfg = config(PARALLEL_START_LAYER=2)
    block = scrambled(cfg).double().blocks[2]
    lanes, x0, goes, takes = random(2, 1, 5, 32), random(1, 5, 32, seed=1), random(2), random(2, 2, seed=2)
    rope = train_gpt.rope_table(5, 8, 1e4, x0)
    ctx = context(cfg, torch.zeros(1, 5, dtype=torch.int64), rope=rope, lanes=(goes, takes))
    mix, normed = block.resid_mix, train_gpt.norm
    a = block.attn_scale * block.attn(normed(mix[0] * lanes[0] + mix[1] * x0), ctx).y
    m = block.mlp_scale * block.mlp(normed(lanes[1]), ctx).y
    wanted = [goes[n] * lanes[n] + takes[0, n] * a + takes[1, n] * m for n in (0, 1)]
    assert torch.allclose(block(lanes, x0, ctx).y, torch.stack(wanted), atol=1e-12)


def test_lanes_begin_alike_take_skips_on_the_first_and_are_read_out_as_asked():
    models = {
        lane: make_model(config(PARALLEL_START_LAYER=2, PARALLEL_FINAL_LANE=lane), lone())
        for lane in ("mean", "attn", "mlp")
    }
    lanes, kept = torch.randn(2, 1, 4, 32), torch.randn(1, 4, 32)
    found = models["mean"].skip((0, 2), lanes, kept, PLAIN)
    assert torch.allclose(found[0], lanes[0] + kept) and torch.equal(found[1], lanes[1])
    read = {lane: model.read_out(lanes) for lane, model in models.items()}
    assert torch.equal(read["attn"], lanes[0]) and torch.equal(read["mlp"], lanes[1])
    assert torch.allclose(read["mean"], (lanes[0] + lanes[1]) / 2)


@pytest.mark.parametrize(("asked", "loops", "start"), [(1, 0, 1), (2, 0, 2), (1, 1, 2)])
def test_lanes_begin_behind_encoder_and_loop(asked, loops, start):
    model = make_model(config(PARALLEL_START_LAYER=asked, NUM_LOOPS=loops), lone())
    forms = [isinstance(block, train_gpt.LaneBlock) for block in model.blocks]
    assert forms == [layer >= start for layer in range(3)]


def test_skip_gate_weighs_the_skip_against_the_stream():
    model = make_model(config(SKIP_GATES_ENABLED=1), lone())
    x, kept = torch.randn(1, 4, 32), torch.randn(1, 4, 32)
    assert torch.allclose(model.skip((0, 1), x, kept, PLAIN), (x + kept) / 2)
    with torch.no_grad():
        model.skip_gates.copy_(torch.randn_like(model.skip_gates))
        model.skip_weights.copy_(torch.randn_like(model.skip_weights))
    g, s = torch.sigmoid(model.skip_gates[0]), model.skip_weights[0] * kept
    assert torch.allclose(model.skip((0, 1), x, kept, PLAIN), g * x + (1 - g) * s, atol=1e-6)


def test_delta_gate_holds_back_what_a_layer_adds():
    blocks = [scrambled(config(DTG_ENABLED=gate)).blocks[0] for gate in (0, 1)]
    blocks[1].load_state_dict(blocks[0].state_dict(), strict=False)
    cfg, x, x0 = config(), torch.randn(1, 5, 32), torch.randn(1, 5, 32)
    ctx = context(cfg, torch.zeros(1, 5, dtype=torch.int64), rope=train_gpt.rope_table(5, 8, 1e4, x))
    mix = blocks[0].resid_mix
    start, plain = mix[0] * x + mix[1] * x0, blocks[0](x, x0, ctx).y
    g = torch.sigmoid(start @ blocks[1].delta_weight.T + blocks[1].delta_bias)
    assert torch.allclose(blocks[1](x, x0, ctx).y, start + g * (plain - start), atol=1e-5)


def test_smear_adds_the_token_before_but_never_another_documents():
    cfg = config(SMEAR_GATE_ENABLED=1)
    smear = train_gpt.Smear(cfg).double()
    tokens = torch.tensor([[7, 9, 1, 8, 6]])
    e = random(1, 5, 32)
    starts = train_gpt.starts_of(context(cfg, tokens))
    assert torch.equal(smear(e, starts, PLAIN), e), "the amount begins at zero"
    with torch.no_grad():
        smear.weight.copy_(random(1, 12, seed=1))
        smear.amount.fill_(0.7)
    found = smear(e, starts, PLAIN)
    for t in range(5):
        gate = 0.7 * torch.sigmoid(e[0, t, :12] @ smear.weight[0])
        wanted = e[0, t] + gate * e[0, t - 1] if t not in (0, 2) else e[0, t]
        assert torch.allclose(found[0, t], wanted, atol=1e-12), t


def test_pairs_are_hashed_as_published():
    cfg = config(BIGRAM_VOCAB_SIZE=64)
    pairs = train_gpt.BigramHash(cfg)
    tokens = torch.tensor([[7, 9, 1, 8, 6]])
    rows = pairs.rows_of(tokens, train_gpt.starts_of(context(cfg, tokens)))[0].tolist()
    ids = tokens[0].tolist()
    wanted = [63 if t in (0, 2) else ((36313 * ids[t]) ^ (27191 * ids[t - 1])) % 63 for t in range(5)]
    assert rows == wanted
    assert not pairs.table.weight.any() and pairs.proj.weight.any()
    assert pairs.amount.item() == pytest.approx(0.05)


def test_starts_are_those_of_rows_documents_and_segments():
    cfg = config()
    tokens = torch.tensor([[7, 1, 8, 6], [5, 5, 5, 1]])
    assert train_gpt.starts_of(context(cfg, tokens)).int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 1]]
    docs = torch.tensor([0, 2, 6, 8, 8, 8], dtype=torch.int32)
    packed_tokens = torch.tensor([[7, 5, 8, 6, 5, 5, 5, 5]])
    found = train_gpt.starts_of(context(cfg, packed_tokens)._replace(docs=docs))
    assert found.int().tolist() == [[1, 0, 1, 0, 0, 0, 1, 0]]


def test_heads_ahead_are_scored_inside_the_segment_and_do_not_ship():
    cfg = config(MTP_NUM_HEADS=2)
    model = scrambled(cfg)
    hidden, targets = torch.randn(1, 8, 32), tokens_of(1, 8, cfg)
    docs = torch.tensor([0, 3, 8, 8], dtype=torch.int32)
    loss = 0.0
    for k, head in enumerate(model.ahead.heads, 1):
        logits = 30 * torch.tanh(hidden[0] @ head.weight.T / 30)
        nll = F.cross_entropy(logits[:-k], targets[0, k:], reduction="none")
        inside = [t + k < 3 or t >= 3 for t in range(8 - k)]
        loss += nll[torch.tensor(inside)].sum() / 16
    assert torch.allclose(model.ahead(hidden, targets, docs, model.loss_of), loss, rtol=1e-5)
    shipped = {row[0]: row[1] for row in train_gpt.export(model, cfg).rows}
    assert shipped["ahead.heads.0.weight"] == "none"
    more = len(train_gpt.export(model, cfg).blob) - len(train_gpt.export(scrambled(config()), config()).blob)
    assert more < 200, "names in the header, and no weight"


def test_loss_of_heads_ahead_is_weighed_by_its_knob():
    totals = {}
    for weight in (0.0, 0.2, 1.0):
        cfg = config(MTP_NUM_HEADS=1, MTP_LOSS_WEIGHT=weight)
        totals[weight], terms = objective(scrambled(cfg), batch_of(cfg), final_phase(cfg), cfg)
        assert torch.allclose(totals[weight], terms["nll"] + weight * terms["ahead"])
    assert totals[0.0] < totals[0.2] < totals[1.0]


def test_leaky_square_is_a_quarter_of_the_square_below_zero():
    cfg = config(MLP_NEGATIVE_SLOPE=0.5)
    mlp, x = scrambled(cfg).double().blocks[0].mlp, random(1, 4, 32)
    z = x @ mlp.fc.weight.T
    wanted = torch.where(z > 0, z * z, z * z / 4) @ mlp.proj.weight.T
    assert torch.allclose(mlp(x, context(cfg, None)).y, wanted, atol=1e-12)


def test_orthogonal_start_of_every_matrix_that_is_not_zero():
    model = make_model(config(MATRIX_INIT="orthogonal", BIGRAM_VOCAB_SIZE=64), lone())
    for name, proj in model.named_modules():
        if isinstance(proj, train_gpt.Proj) and proj.weight.any():
            w = proj.weight if proj.weight.shape[0] <= proj.weight.shape[1] else proj.weight.T
            assert torch.allclose(w @ w.T, torch.eye(len(w)), atol=1e-5), name
    again = make_model(config(MATRIX_INIT="orthogonal", BIGRAM_VOCAB_SIZE=64), lone())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not model.blocks[0].attn.proj.weight.any() and not model.blocks[0].mlp.proj.weight.any()


# --------------------------------------------------------------------------------------
# What cannot be
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"ROPE_DIMS": 3}, "ROPE_DIMS=3 wants an even number up to MODEL_DIM/NUM_HEADS=8"),
        ({"ROPE_DIMS": 16}, "ROPE_DIMS=16 wants an even number"),
        ({"ROPE_DIMS": 2, "ROPE_YARN": 1}, "ROPE_YARN=1 wants more than the 2 dimensions"),
        ({"GATE_WINDOW": 40, "SMEAR_GATE_ENABLED": 1}, "GATE_WINDOW=40 is wider than MODEL_DIM=32"),
        ({"VE_ENABLED": 1, "VE_LAYERS": "1,3"}, "VE_LAYERS='1,3' wants layers below NUM_LAYERS=3"),
        ({"VE_ENABLED": 1, "VE_LAYERS": "last"}, "VE_LAYERS='last' wants layers"),
        ({"BIGRAM_VOCAB_SIZE": 1}, "wants at least 2 rows"),
        ({"PARALLEL_START_LAYER": 3}, "leaves no layer for two lanes, which begin at layer 3"),
        ({"PARALLEL_START_LAYER": 1, "NUM_LOOPS": 1, "LOOP_END": 2}, "which begin at layer 3"),
    ],
)
def test_settings_that_cannot_be_are_one_line(knobs, told):
    with pytest.raises(train_gpt.UserError, match=r"^[^\n]*$") as e:
        config(**knobs)
    assert told in str(e.value)


def test_published_names_of_other_scripts_are_heard():
    cfg = read_config(tiny_env(SMEAR_GATE=1, GATE_ATTN_OUT=1, GATE_ATTN_SRC="q", GATE_WIDTH=8))
    assert cfg.input.smear and cfg.attn.out_gate and cfg.attn.out_source == "q" and cfg.attn.gate_window == 8
