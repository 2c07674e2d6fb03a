"""The ternary record's model, beside its codec: written a second time, and piece by piece."""

import math

import pytest
import torch
from torch import nn

import train_gpt
from test_features import batch_of, random
from test_kernels import curve_of
from test_model import PLAIN, config, lone, nats, rms, scrambled, tokens_of
from train_gpt import Ctx, OutProj, Tag, final_phase, make_model, objective, param_tags

RECORD = {
    "EMBED_DIM": 24, "VOCAB_BIAS": 1, "SOFTCAP_TYPE": "poly", "LOGIT_SOFTCAP": 10, "Z_LOSS_WEIGHT": 0.5,
    "ROPE_TYPE": "yarn", "YARN_MAX_LEN": 64, "ROPE_BASE": 5000, "FUSED_QKV": 1, "NORMED_PROJ": "plain",
}  # fmt: skip


# --------------------------------------------------------------------------------------
# The whole model again, from its description alone (frontier 2.13)
# --------------------------------------------------------------------------------------


def slowed(j: int, dims: int, base: float, rho: float) -> float:
    """Frequency of pair j."""
    i = 2 * j
    ramp = min(max((i / dims - 0.25) / 0.75, 0.0), 1.0)
    return base ** (-i / dims) / (1 + ramp * (1 / rho - 1))


def turned(x, base: float, rho: float):
    """(T,H,K)."""
    half = x.shape[-1] // 2
    speed = torch.tensor([slowed(j, 2 * half, base, rho) for j in range(half)], dtype=x.dtype)
    angle = (torch.arange(len(x))[:, None] * speed)[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], -1)


def attention(x, w, at: str, cfg):
    width, groups = cfg.model.head_dim, cfg.model.kv_heads
    rows = w[at + "c_qkv.weight"].split([cfg.model.dim, groups * width, groups * width])
    q, k, v = ((x @ part.T).reshape(len(x), -1, width) for part in rows)
    rho = cfg.data.seq_len / cfg.attn.yarn_len
    q, k = (turned(rms(t), cfg.model.rope_base, rho) for t in (q, k))
    q = q * w[at + "q_gain"][:, None]
    k, v = (t.repeat_interleave(cfg.model.heads // groups, 1) for t in (k, v))
    score = torch.einsum("qhk,phk->hqp", q, k) / width**0.5
    later = torch.ones(score.shape[1:], dtype=torch.bool).triu(1)
    y = torch.einsum("hqp,phk->qhk", score.masked_fill(later, -torch.inf).softmax(-1), v)
    return rms(y.reshape(len(x), -1)) @ w[at + "proj.weight"].T


def block(x, x0, w, at: str, cfg):
    mix = w[at + "resid_mix"]
    x = mix[0] * x + mix[1] * x0
    x = x + w[at + "attn_scale"] * attention(rms(x), w, at + "attn.", cfg)
    up = (rms(x) @ w[at + "mlp.fc.weight"].T).clamp(min=0) ** 2
    return x + w[at + "mlp_scale"] * (rms(up) @ w[at + "mlp.proj.weight"].T)


def logits_again(w, tokens, cfg):
    """(T,V) of one row."""
    x = x0 = rms(w["embed.weight"][tokens] @ w["embed.into.weight"].T)
    half, kept = cfg.model.layers // 2, []
    for layer in range(cfg.model.layers):
        if layer >= half and kept:
            x = x + w["skip_weights"][layer - half] * kept.pop()
        x = block(x, x0, w, f"blocks.{layer}.", cfg)
        if layer < half:
            kept.append(x)
    table = w["embed.weight" if cfg.model.tied else "head.weight"]
    logits = rms(x) @ w["embed.out.weight"].T @ table.T
    return curve_of("poly", logits, cfg.model.softcap) + w["vocab_bias"]


@pytest.mark.parametrize("tied", [1, 0])
def test_nats_and_z_are_those_of_another_implementation(tied):
    cfg = config(**RECORD, TIE_EMBEDDINGS=tied)
    model, tokens = scrambled(cfg, torch.float64).double(), tokens_of(2, 33, cfg)
    w = {name: p.detach() for name, p in model.named_parameters()}
    found, out = model(Ctx(tokens[:, :-1], None, 32, PLAIN), tokens[:, 1:])
    logits = torch.stack([logits_again(w, row[:-1], cfg) for row in tokens])
    want = -logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    assert (found - want).abs().max() < 1e-5  # angles are float32
    z = logits.exp().sum(-1).log().square().mean()
    assert out.aux["z"].item() == pytest.approx(z.item(), rel=1e-6)


def test_reported_nats_never_contain_z():
    """Nor does any evaluation; the total does, by its weight."""
    cfg, plain = config(**RECORD), config(**RECORD | {"Z_LOSS_WEIGHT": 0})
    batch = batch_of(cfg)
    total, terms = objective(scrambled(cfg), batch, final_phase(cfg), cfg)
    alone, others = objective(scrambled(plain), batch, final_phase(plain), plain)
    assert (list(terms), list(others)) == (["nll", "z"], ["nll"])
    assert terms["nll"] == others["nll"] == alone
    assert total.item() == pytest.approx(alone.item() + 0.5 * terms["z"].item(), rel=1e-6)
    pair = batch.tokens, batch.targets
    assert torch.equal(nats(scrambled(cfg), *pair), nats(scrambled(plain), *pair))


# --------------------------------------------------------------------------------------
# Its pieces
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.5, 1.0, 2.0])
def test_angles_slow_down_by_the_published_ramp(rho):
    x = random(1, 9, 2, 16)
    slow = train_gpt.yarn_slowness(16, 1 / rho, x)
    cos, sin = train_gpt.rope_table(9, 16, 5000.0, x, slow)
    for j in range(8):
        angle = 7 * slowed(j, 16, 5000.0, rho)
        assert cos[7, j].item() == pytest.approx(math.cos(angle), abs=1e-5)
        assert sin[7, j].item() == pytest.approx(math.sin(angle), abs=1e-5)
    assert slow[:3].tolist() == [1, 1, 1]  # up to a quarter of the dimensions
    assert slow[7].item() == pytest.approx(1 + (14 / 16 - 0.25) / 0.75 * (1 / rho - 1))


def test_slowed_angles_stay_where_the_context_of_evaluation_grows():
    """The two that are called yarn: the ramp is of training too, ROPE_YARN begins where training ended."""
    both = [config(ROPE_TYPE="yarn", YARN_MAX_LEN=64, EVAL_SEQ_LEN=64, ROPE_YARN=on) for on in (0, 1)]
    tokens, x = torch.zeros(1, 64, dtype=torch.int64), torch.zeros(1, 64, 32)
    tables = []
    for cfg in both:
        model = make_model(cfg, lone())
        for longest in (32, 64):
            tables.append(model.filled(Ctx(tokens, None, longest, final_phase(cfg)), x).rope[0])
    assert torch.equal(tables[0], tables[1]) and torch.equal(tables[0], tables[2])
    assert not torch.equal(tables[0], tables[3])
    assert not torch.equal(tables[0], train_gpt.rope_table(64, 8, 1e4, x)[0])


def test_normed_projection_is_a_norm_a_gain_and_a_matrix():
    x = random(2, 5, 24)
    for kind in ("none", "plain", "gain"):
        cfg = config(NORMED_PROJ=kind)
        proj = OutProj(24, 32, Tag(train_gpt.Half(), "muon"), cfg).double()
        nn.init.normal_(proj.weight)
        want = x if kind == "none" else x / x.square().mean(-1, keepdim=True).sqrt()
        if kind == "gain":
            assert proj.scale.dtype == torch.float64 and bool((proj.scale == 1).all())
            nn.init.normal_(proj.scale)
            want = want * proj.scale
        assert torch.allclose(proj(x, PLAIN), want @ proj.weight.T, atol=1e-9)
        assert list(proj.tags) == ["weight"] + ["scale"] * (kind == "gain")


def test_every_branch_ends_in_a_normed_projection_and_no_kernel_goes_around_it():
    model = make_model(config(NORMED_PROJ="gain"), lone())
    found = [name for name, m in model.named_modules() if isinstance(m, OutProj)]
    assert found == [f"blocks.{i}.{end}" for i in range(3) for end in ("attn.proj", "mlp.proj")]
    assert {p.dtype for name, p in model.named_parameters() if name.endswith("proj.scale")} == {torch.float32}
    for kind in ("none", "plain", "gain"):
        cfg = config(NORMED_PROJ=kind)
        assert cfg.fuses_mlp == (kind == "none")
        assert ("fused" in vars(make_model(cfg, lone()).blocks[0].mlp)) == (kind == "none")


def test_first_token_has_no_own_value_left_to_be_normed():
    """XSA takes all of it but rounding, which a norm would make as large as any other token's output."""
    cfg = config(XSA_LAST_N=3, NORMED_PROJ="plain")
    attn = scrambled(cfg).blocks[0].attn
    tokens = tokens_of(1, 32, cfg)
    model = scrambled(cfg)
    x = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0))
    y = attn(x, model.filled(Ctx(tokens, None, 32, PLAIN), x)).y
    assert not y[:, 0].any() and bool(y[:, 1:].any(-1).all())


def test_one_matrix_for_attention_is_the_three_above_each_other():
    three, one = (scrambled(config(FUSED_QKV=on)) for on in (0, 1))
    weights = dict(three.named_parameters())
    for name, p in one.named_parameters():
        if name.endswith("c_qkv.weight"):
            p.data = torch.cat([weights[name.replace("c_qkv", f"c_{x}")] for x in "qkv"]).detach()
        else:
            p.data = weights[name].detach().clone()
    tokens = tokens_of(2, 33, one.cfg)
    pair = tokens[:, :-1], tokens[:, 1:]
    assert torch.allclose(nats(one, *pair), nats(three, *pair), atol=1e-5)


def test_muon_orthogonalises_queries_keys_and_values_together():
    cfg = config(FUSED_QKV=1, NUM_LAYERS=1, MUON_BACKEND_STEPS=5)
    model = make_model(cfg, lone())
    p = model.blocks[0].attn.c_qkv.weight
    before, optimizer = p.detach().clone(), train_gpt.Optimizer(model, cfg, lone())
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    gradients = train_gpt.reduce_gradients(optimizer, torch.zeros(()))
    phase = PLAIN._replace(momentum=0.0)
    step = train_gpt.orthogonalize(p.grad[None], 5)[0]
    optimizer.step(gradients, phase, torch.tensor(True))
    rate = cfg.optim.matrix_lr * (p.shape[0] / p.shape[1]) ** 0.5
    assert p.shape == (64, 32)
    assert torch.allclose(before - p.detach(), rate * step, atol=1e-6)


@pytest.mark.parametrize(("optimizer", "kind"), [("muon", "muon"), ("adam", "embed")])
@pytest.mark.parametrize("tied", [1, 0])
def test_matrices_of_a_narrow_embedding_ship_as_it_does(optimizer, kind, tied):
    cfg = config(EMBED_DIM=16, EMBED_PROJ_OPTIMIZER=optimizer, EMBED_CODEC="fp8", TIE_EMBEDDINGS=tied)
    model = make_model(cfg, lone())
    tags, shapes = param_tags(model), {n: tuple(p.shape) for n, p in model.named_parameters()}
    want = {"embed.weight": ((320, 16), "embed"), "embed.into.weight": ((32, 16), kind)}
    want |= {"embed.out.weight": ((16, 32), kind)} | ({} if tied else {"head.weight": ((320, 16), "head")})
    found = {n: (shapes[n], tags[n].optim) for n in shapes if n.startswith(("embed", "head"))}
    assert found == want
    assert {(tags[n].codec.name, tags[n].kind) for n in want} == {("fp8", "embed")}
    assert make_model(config(), lone()).embed.weight.shape == (320, 32)


def test_normal_start_has_its_spread_and_ends_have_theirs():
    sizes = {"MODEL_DIM": 64, "NUM_HEADS": 4, "EMBED_DIM": 48, "FUSED_QKV": 1}
    model = make_model(config(MATRIX_INIT="normal", MATRIX_INIT_STD=0.05, **sizes), lone())
    for name, m in model.named_modules():
        if isinstance(m, OutProj):
            assert not m.weight.any(), name
        elif isinstance(m, train_gpt.Proj):
            assert m.weight.std().item() == pytest.approx(0.05, rel=0.1), name
    assert model.embed.weight.std().item() == pytest.approx(0.005, rel=0.1)
    for init in ("normal", "orthogonal", "uniform"):
        ends = make_model(config(MATRIX_INIT=init, RESIDUAL_PROJ_INIT_STD=0.002, **sizes), lone())
        for block_ in ends.blocks:
            for proj in (block_.attn.proj, block_.mlp.proj):
                assert proj.weight.std().item() == pytest.approx(0.002, rel=0.1)


def test_heads_ahead_read_the_model_width_and_bend_alike():
    cfg = config(MTP_NUM_HEADS=1, EMBED_DIM=16, VOCAB_BIAS=1, SOFTCAP_TYPE="poly", LOGIT_SOFTCAP=10)
    model = scrambled(cfg)
    hidden, targets = torch.randn(1, 8, 32), tokens_of(1, 8, cfg)
    logits = curve_of("poly", hidden[0, :-1] @ model.ahead.heads[0].weight.T, 10.0)
    want = -logits.log_softmax(-1).gather(1, targets[0, 1:, None]).sum() / 8
    assert torch.allclose(model.ahead(hidden, targets, None, model.loss_of), want, rtol=1e-5)


@pytest.mark.parametrize(
    ("knobs", "cpu", "gpu"),
    [
        ({}, "chunked", "one_pass"),
        ({"SOFTCAP_TYPE": "poly"}, "chunked_poly", "chunked_poly"),
        ({"Z_LOSS_WEIGHT": 1e-4}, "chunked_z", "chunked_z"),
        ({"VOCAB_BIAS": 1, "FUSED_CE_ENABLED": 0}, "plain_bias", "plain_bias"),
        ({**RECORD, "FUSED_CE_FORM": "two_pass"}, "chunked_poly_bias_z", "chunked_poly_bias_z"),
    ],
)
def test_loss_is_named_by_what_no_kernel_knows(knobs, cpu, gpu, monkeypatch):
    monkeypatch.setattr(train_gpt, "has_triton", lambda: True)
    cfg = config(**knobs)
    assert train_gpt.pick_loss(cfg, torch.device("cpu"), False)[0] == cpu
    assert train_gpt.pick_loss(cfg, torch.device("cuda"), False)[0] == gpu
    assert cfg.fuses_ce == (knobs == {})
    rows, vocab = 65536, 8192
    less = train_gpt.loss_bytes("one_pass", rows, vocab, 2, True)
    assert train_gpt.loss_bytes(gpu, rows, vocab, 2, True) >= less
