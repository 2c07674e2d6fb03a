"""Model: the naive baseline's transformer, causal and closed between documents, with loops as data."""

import copy
import itertools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gpt
from conftest import run_program, tiny_env
from train_gpt import (
    Batch,
    Config,
    Ctx,
    Journal,
    Out,
    Phase,
    Plan,
    UserError,
    World,
    activation_bytes,
    choose_speed,
    chunk_rows,
    empty_model,
    final_phase,
    layer_plan,
    make_model,
    objective,
    packed,
    param_count,
    param_tags,
    read_config,
)

PLAIN = Phase(1.0, 0.95, 0, False)


def config(**knobs) -> Config:
    return read_config(tiny_env(**knobs))


def lone(dtype: torch.dtype = torch.float32) -> World:
    """A world of one CPU that writes nothing."""
    return World(0, 1, torch.device("cpu"), dtype, False, Journal(None), ".")


def scrambled(cfg: Config, dtype: torch.dtype = torch.float32, seed: int = 0) -> train_gpt.GPT:
    """A model in which every weight matters: the projections that start at zero are random too."""
    model = make_model(cfg, lone(dtype))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=random)
            p.copy_(0.3 * noise if p.ndim == 2 else p + 0.3 * noise)
    return model.eval()


def tokens_of(rows: int, length: int, cfg: Config, seed: int = 1) -> torch.Tensor:
    return torch.randint(4, cfg.model.vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def nats(model, tokens, targets, docs=None, phase=None) -> torch.Tensor:
    cfg = model.cfg
    return model(Ctx(tokens, docs, cfg.data.seq_len, phase or final_phase(cfg)), targets)[0]


def packed_nats(model, documents: list[np.ndarray]) -> list[torch.Tensor]:
    """Nats of each document when all stand in one row, boundaries between them."""
    batch = packed([np.concatenate([*documents, [1]])], 1, model.cfg.data.seq_len)
    found = nats(model, batch.tokens, batch.targets, batch.docs)[0]
    return list(found.split([len(d) for d in documents]))


@pytest.mark.parametrize(
    "knobs",
    [
        {}, {"FUSED_CE_ENABLED": 0}, {"SOFTCAP_TYPE": "poly"}, {"Z_LOSS_WEIGHT": 0.1}, {"MTP_NUM_HEADS": 1},
        {"VE_ENABLED": 1, "BIGRAM_VOCAB_SIZE": 64}, {"MATRIX_CODEC": "ternary", "EMBED_CODEC": "ternary"},
    ],
    ids=str,
)  # fmt: skip
def test_ids_and_targets_beyond_the_vocabulary_are_errors_and_never_the_last_one(knobs):
    """Clamped they would train another token's row. The greatest id of all is read as itself."""
    cfg = config(**knobs)
    model, good = scrambled(cfg), tokens_of(1, 33, cfg)
    batch = [good[:, :-1], good[:, 1:]]
    for place, at in itertools.product((0, 1), (0, 5, 31)):
        for bad in (cfg.model.vocab, cfg.model.vocab + 7):
            wrong = [t.clone() for t in batch]
            wrong[place][0, at] = bad
            with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
                objective(model, Batch(*wrong, None), PLAIN, cfg)[0].backward()
    last = [t.clone() for t in batch]
    last[0][0, 3] = last[1][0, 5] = cfg.model.vocab - 1
    objective(model, Batch(*last, None), PLAIN, cfg)[0].backward()
    assert model.embed.weight.grad[cfg.model.vocab - 1].any()


# --------------------------------------------------------------------------------------
# Size and start
# --------------------------------------------------------------------------------------


def test_published_size_has_17059912_parameters():
    """9 layers, width 512, 8/4 heads, MLP 2x, 1,024 tied tokens (naive baseline); without their memory."""
    model = empty_model(Config(), lone())
    assert param_count(model) == 17_059_912
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_params_word_prints_the_count_and_stops():
    run = run_program(["--params"])
    assert (run.returncode, run.stdout, run.stderr) == (0, "model_params:17059912\n", "")


@pytest.mark.parametrize(
    "knobs", [{}, {"TIE_EMBEDDINGS": 0}, {"NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 1}]
)
def test_first_loss_is_the_logarithm_of_the_vocabulary(knobs):
    cfg = config(VOCAB_SIZE=1024, **knobs)
    model, tokens = make_model(cfg, lone()), tokens_of(16, 33, cfg)
    found = nats(model, tokens[:, :-1], tokens[:, 1:]).mean()
    assert abs(found - math.log(1024)) <= 0.01


def test_weights_depend_on_the_seed_alone():
    one, same = (make_model(config(SEED=7), lone()).state_dict() for _ in range(2))
    other = make_model(config(SEED=8), lone()).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embed.weight"], other["embed.weight"])


def test_first_weights_are_those_of_the_baseline():
    """U(+-1/sqrt(n_in)), zeros where a block writes, N(0, 0.005^2) in the tied embedding."""
    model = make_model(config(MODEL_DIM=64, VOCAB_SIZE=1024), lone())
    block = model.blocks[1]
    for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.fc):
        bound = matrix.weight.shape[1] ** -0.5
        assert 0.98 * bound < matrix.weight.abs().max() <= bound
        assert abs(matrix.weight.std() - bound / 3**0.5) < 0.05 * bound
    assert not block.attn.proj.weight.any()
    assert not block.mlp.proj.weight.any()
    assert abs(model.embed.weight.std() - 0.005) < 1e-4
    assert block.resid_mix.tolist() == [[1.0] * 64, [0.0] * 64]
    assert block.attn.q_gain.tolist() == [1.5] * 4


# --------------------------------------------------------------------------------------
# Plan
# --------------------------------------------------------------------------------------


def test_loops_repeat_layers_3_to_5_as_the_record_does():
    cfg = config(NUM_LAYERS=11, NUM_LOOPS=2, LOOP_START=3, LOOP_END=5)
    assert layer_plan(cfg, 2) == Plan((0, 1, 2, 3, 4, 5, 3, 4), (5, 3, 4, 5, 6, 7, 8, 9, 10))
    assert layer_plan(cfg, 0) == Plan((0, 1, 2, 3, 4), (5, 6, 7, 8, 9, 10))
    assert (layer_plan(cfg, 2).skips, layer_plan(cfg, 0).skips) == (8, 5)
    assert make_model(cfg, lone()).skip_weights.shape == (8, cfg.model.dim)


def test_baseline_goes_down_four_layers_and_up_five():
    assert layer_plan(Config(), 0) == Plan((0, 1, 2, 3), (4, 5, 6, 7, 8))
    assert layer_plan(config(NUM_LAYERS=1), 0) == Plan((), (0,))


def test_looped_weights_are_visited_again():
    cfg = config(NUM_LOOPS=1, LOOP_START=1, LOOP_END=1)
    model, tokens, visits = scrambled(cfg), tokens_of(1, 9, cfg), []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: visits.append(i))
    for loops in (0, 1):
        model.hidden(Ctx(tokens, None, 32, PLAIN._replace(loops=loops)))
    assert visits == [0, 1, 2, 0, 1, 1, 2]


# --------------------------------------------------------------------------------------
# Another implementation
# --------------------------------------------------------------------------------------


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def turned(x, base):
    """(T,H,K): rotary embedding of the whole head, halves paired."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[0])[:, None] * base ** (-torch.arange(half) / half)
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos + b * sin, -a * sin + b * cos], -1)


def attention_b0(x, w, cfg, layer):
    """(T,D) of one row, by an explicit softmax over all earlier positions."""
    at, heads = f"blocks.{layer}.attn.", (x.shape[0], -1, cfg.model.head_dim)
    q, k, v = ((x @ w[f"{at}c_{name}.weight"].T).reshape(heads) for name in "qkv")
    q, k = turned(rms(q), cfg.model.rope_base), turned(rms(k), cfg.model.rope_base)
    q = q * w[f"{at}q_gain"][:, None]
    k, v = (t.repeat_interleave(cfg.model.heads // cfg.model.kv_heads, 1) for t in (k, v))
    score = torch.einsum("qhk,phk->hqp", q, k) / cfg.model.head_dim**0.5
    later = torch.ones(score.shape[1:], dtype=torch.bool).triu(1)
    y = torch.einsum("hqp,phk->qhk", score.masked_fill(later, -torch.inf).softmax(-1), v)
    return y.reshape(x.shape[0], -1) @ w[f"{at}proj.weight"].T


def block_b0(x, x0, w, cfg, layer):
    at = f"blocks.{layer}."
    x = w[at + "resid_mix"][0] * x + w[at + "resid_mix"][1] * x0
    x = x + w[at + "attn_scale"] * attention_b0(rms(x), w, cfg, layer)
    up = (rms(x) @ w[at + "mlp.fc.weight"].T).clamp(min=0) ** 2
    return x + w[at + "mlp_scale"] * (up @ w[at + "mlp.proj.weight"].T)


def baseline_nats(w, tokens, targets, cfg):
    """One row through the naive baseline, from the description of it alone; w: name -> weight."""
    x = x0 = rms(w["embed.weight"][tokens])
    half, kept = cfg.model.layers // 2, []
    for layer in range(half):
        x = block_b0(x, x0, w, cfg, layer)
        kept.append(x)
    for layer in range(half, cfg.model.layers):
        if kept:
            x = x + w["skip_weights"][layer - half] * kept.pop()
        x = block_b0(x, x0, w, cfg, layer)
    logits = rms(x) @ w["embed.weight" if cfg.model.tied else "head.weight"].T
    capped = cfg.model.softcap * torch.tanh(logits / cfg.model.softcap)
    return -capped.log_softmax(-1)[torch.arange(len(targets)), targets]


@pytest.mark.parametrize(
    "knobs",
    [
        {}, {"TIE_EMBEDDINGS": 0}, {"NUM_LAYERS": 4, "NUM_HEADS": 6, "NUM_KV_HEADS": 2, "MODEL_DIM": 48},
        {"NUM_HEADS": 2, "NUM_KV_HEADS": 2, "MLP_MULT": 3.1, "ROPE_BASE": 50, "LOGIT_SOFTCAP": 4},
        {"NUM_LAYERS": 1},
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nats_are_those_of_another_implementation_of_the_baseline(knobs, dtype):
    cfg = config(**knobs)
    model, tokens = scrambled(cfg, dtype), tokens_of(2, 33, cfg)
    w = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    found = nats(model, tokens[:, :-1], tokens[:, 1:])
    want = torch.stack([baseline_nats(w, row[:-1], row[1:], cfg) for row in tokens])
    assert found.dtype == dtype
    assert (found - want).abs().max() <= {torch.float32: 1e-4, torch.float64: 1e-5}[dtype]


def test_nats_of_small_weights_agree_to_1e_minus_5():
    cfg = config()
    model, tokens = scrambled(cfg), tokens_of(2, 33, cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.3) if p.ndim == 2 else None
    w = {name: p.detach() for name, p in model.named_parameters()}
    want = torch.stack([baseline_nats(w, row[:-1], row[1:], cfg) for row in tokens])
    assert (nats(model, tokens[:, :-1], tokens[:, 1:]) - want).abs().max() <= 1e-5


# --------------------------------------------------------------------------------------
# Causality and documents
# --------------------------------------------------------------------------------------

CAUSAL = [{}, {"NUM_LOOPS": 2, "LOOP_START": 0, "LOOP_END": 1}, {"DOC_PACKING": 1}, {"TIE_EMBEDDINGS": 0}]
LENGTH = 64


def stream_nats(model, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(T,) nats of one row, cut into documents where the configuration packs."""
    if not model.cfg.data.packing:
        return nats(model, tokens[None], targets[None])[0]
    row = np.append(tokens.numpy(), 5)
    docs = packed([row], 1, model.cfg.data.seq_len).docs
    return nats(model, tokens[None], targets[None], docs)[0]


def stream(cfg: Config, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, targets = tokens_of(2, LENGTH, cfg, seed)
    tokens[[0, 11, 12, 40]] = 1
    return tokens, targets


def edited(model, tokens, targets, t: int) -> tuple[float, float]:
    """Change input t: how far do the nats before it move, how far those from it on."""
    other = tokens.clone()
    other[t] = 4 + (tokens[t] + 17) % (model.cfg.model.vocab - 4)
    moved = (stream_nats(model, tokens, targets) - stream_nats(model, other, targets)).abs()
    return float(moved[:t].max()), float(moved[t:].max())


def cut(model, tokens, targets) -> float:
    """Largest difference of nats between a prefix alone and the same prefix in the whole."""
    whole = stream_nats(model, tokens, targets)
    lengths = (1, 2, 7, 11, 12, 13, 31, 40, 63)
    return max(float((stream_nats(model, tokens[:k], targets[:k]) - whole[:k]).abs().max()) for k in lengths)


def leaky(model, size: float = 1e-3):
    """Plant a leak: a block sees a thousandth of the next position."""
    block = model.blocks[1].attn
    honest = block.forward

    def forward(x, ctx):
        out = honest(x, ctx)
        return out._replace(y=out.y + size * torch.roll(x, -1, 1))

    block.forward = forward
    return model


@pytest.mark.parametrize("knobs", CAUSAL, ids=str)
def test_nothing_before_a_changed_token_moves(knobs):
    cfg = config(**knobs)
    model, (tokens, targets) = scrambled(cfg), stream(cfg, 3)
    for t in (1, 10, 11, 13, 39, 41, 62, 63):
        # Without its BOS a packed document joins the one before: another shape, so other last bits.
        bound = 1e-4 if cfg.data.packing and tokens[t] == 1 else 0.0
        before, after = edited(model, tokens, targets, t)
        assert before <= bound
        assert after > 1e-3
        assert edited(leaky(copy.deepcopy(model)), tokens, targets, t)[0] > bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("knobs", CAUSAL, ids=str)
def test_prefix_is_scored_as_in_the_whole(knobs, dtype, bound):
    cfg = config(**knobs)
    model, (tokens, targets) = scrambled(cfg, dtype), stream(cfg, 4)
    largest, planted = cut(model, tokens, targets), cut(leaky(model), tokens, targets)
    print(f"largest difference {largest:.1e}, with a leak of 1e-3 {planted:.1e}, bound {bound:.0e}")
    assert largest <= bound < planted


def documents(cfg: Config, lengths=(20, 31, 5)) -> list[np.ndarray]:
    made = [tokens_of(1, n, cfg, seed=n)[0].numpy() for n in lengths]
    for document in made:
        document[0] = 1
    return made


@pytest.mark.parametrize("loops", [0, 1])
def test_document_does_not_see_the_one_before(loops):
    cfg = config(DOC_PACKING=1, NUM_LOOPS=loops, LOOP_START=0, LOOP_END=1)
    model, (first, second, third) = scrambled(cfg), documents(cfg)
    changed = first.copy()
    changed[1:] = 4 + changed[1:] % 300
    before, after = packed_nats(model, [first, second, third]), packed_nats(model, [changed, second, third])
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1][:-1], after[1][:-1])
    assert torch.equal(before[2], after[2])


def test_document_is_scored_in_a_pack_as_alone():
    """To the rounding of the rotary angles, which count from the start of the row."""
    cfg = config(DOC_PACKING=1)
    model, (first, second, third) = scrambled(cfg, torch.float64), documents(cfg)
    together, alone = packed_nats(model, [first, second, third])[1], packed_nats(model, [second])[0]
    assert (together - alone).abs().max() <= 1e-5
    row = torch.from_numpy(np.concatenate([first, second]))[None]
    open_nats = nats(model, row, torch.cat([row[:, 1:], row[:, :1]], 1))[0, len(first) :]
    assert (open_nats - alone).abs().max() > 0.01  # without boundaries the test would notice


def test_rows_do_not_see_each_other():
    cfg = config()
    model, tokens = scrambled(cfg), tokens_of(3, 33, cfg)
    whole = nats(model, tokens[:, :-1], tokens[:, 1:])
    for i, row in enumerate(tokens):
        assert (nats(model, row[None, :-1], row[None, 1:])[0] - whole[i]).abs().max() <= 1e-4


# --------------------------------------------------------------------------------------
# Tags, losses, copies
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs",
    [{}, {"TIE_EMBEDDINGS": 0}, {"NUM_LOOPS": 1, "LOOP_START": 0, "LOOP_END": 0}, {"MATRIX_BITS": 16}],
)
def test_every_parameter_names_its_optimizer_and_codec(knobs):
    cfg = config(**knobs)
    model = make_model(cfg, lone())
    tags, params = param_tags(model), dict(model.named_parameters())
    assert list(tags) == list(params)
    kinds = {name: tags[name].optim for name in params}
    assert {n for n, k in kinds.items() if k == "embed"} == {"embed.weight"}
    assert {n for n, k in kinds.items() if k == "head"} == {n for n in params if n == "head.weight"}
    assert all(params[n].ndim == 2 and n.startswith("blocks.") for n, k in kinds.items() if k == "muon")
    assert all("_" in n for n, k in kinds.items() if k == "scalar")


def test_parameter_without_a_tag_is_an_error():
    model = make_model(config(), lone())
    model.blocks[0].extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(KeyError, match="extra"):
        param_tags(model)


class Toy(nn.Module):
    """A feed-forward with losses of its own."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer, self.tags = layer, {}

    def forward(self, x, ctx):
        losses = {"spread": torch.tensor(10.0**self.layer)}
        return Out(0 * x, losses | ({"once": torch.tensor(5.0)} if self.layer == 2 else {}))


def test_auxiliary_losses_are_summed_by_name_over_layers_and_visits(monkeypatch):
    monkeypatch.setattr(train_gpt, "make_ffn", lambda cfg, layer: Toy(layer))
    cfg = config(NUM_LOOPS=2, LOOP_START=1, LOOP_END=1)
    model, tokens = make_model(cfg, lone()), tokens_of(1, 8, cfg)
    aux = model.hidden(Ctx(tokens, None, 32, final_phase(cfg))).aux
    assert {name: loss.item() for name, loss in aux.items()} == {"spread": 131.0, "once": 5.0}
    batch = Batch(tokens, tokens, None)
    with pytest.raises(KeyError, match="spread"):
        objective(model, batch, PLAIN, cfg)
    monkeypatch.setattr(train_gpt, "loss_weights", lambda cfg: {"nll": 1.0, "spread": 0.01, "once": 2.0})
    total, terms = objective(model, batch, PLAIN, cfg)
    assert total.item() == pytest.approx(terms["nll"].item() + 0.01 * 111 + 2 * 5, rel=1e-6)


def test_objective_is_the_mean_of_the_nats():
    cfg = config()
    model, tokens = scrambled(cfg), tokens_of(3, 33, cfg)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], None)
    total, terms = objective(model, batch, PLAIN, cfg)
    assert list(terms) == ["nll"]
    assert total.item() == pytest.approx(nats(model, batch.tokens, batch.targets).mean().item(), rel=1e-6)


def test_copy_keeps_tags_and_answers():
    cfg = config(MATRIX_BITS=6)
    model, tokens = scrambled(cfg), tokens_of(1, 33, cfg)
    other = copy.deepcopy(model)
    assert param_tags(other) == param_tags(model)
    assert torch.equal(nats(other, tokens[:, :-1], tokens[:, 1:]), nats(model, tokens[:, :-1], tokens[:, 1:]))
    with torch.no_grad():
        other.embed.weight.zero_()
    assert model.embed.weight.any()


@pytest.mark.parametrize("tied", [0, 1])
def test_quantised_phase_runs_on_what_the_codecs_make_of_the_weights(tied):
    cfg = config(MATRIX_BITS=6, EMBED_BITS=8, TIE_EMBEDDINGS=tied)
    model, tokens = scrambled(cfg), tokens_of(2, 33, cfg)
    live = nats(model, tokens[:, :-1], tokens[:, 1:], phase=PLAIN._replace(qat=True))
    raw = nats(model, tokens[:, :-1], tokens[:, 1:])
    with torch.no_grad():
        for name, tag in param_tags(model).items():
            p = model.get_parameter(name)
            p.copy_(tag.codec.fake_quant(p.detach()))
    assert torch.equal(live, nats(model, tokens[:, :-1], tokens[:, 1:]))
    assert not torch.equal(live, raw)


# --------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------


def saved_bytes(cfg: Config, dtype: torch.dtype) -> int:
    """Bytes that a real forward keeps for its backward, weights apart."""
    model, kept = make_model(cfg, lone(dtype)), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    rows = cfg.data.batch_tokens // train_gpt.micro_batches(cfg, 1) // cfg.data.seq_len
    tokens = tokens_of(rows, cfg.data.seq_len, cfg)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        total, _ = objective(model, Batch(tokens, tokens, None), final_phase(cfg), cfg)
    assert total.requires_grad
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "knobs",
    [
        {"TRAIN_SEQ_LEN": 512, "TRAIN_BATCH_TOKENS": 16384, "MODEL_DIM": 64},
        {"TRAIN_SEQ_LEN": 64, "TRAIN_BATCH_TOKENS": 16384, "MODEL_DIM": 128, "GRAD_ACCUM_STEPS": 2},
        {"TRAIN_SEQ_LEN": 256, "TRAIN_BATCH_TOKENS": 8192, "NUM_LOOPS": 2, "LOOP_START": 0, "LOOP_END": 1},
    ],
    ids=str,
)
def test_forecast_of_activations_is_within_30_percent_of_what_is_kept(knobs, dtype):
    """The loss's chunk of logits is added to the forecast: it lives while the activations do."""
    cfg = config(**knobs)
    kept = saved_bytes(cfg, dtype)
    rows = cfg.data.batch_tokens // train_gpt.micro_batches(cfg, 1)
    logits = 12 * chunk_rows(rows, cfg.model.vocab) * cfg.model.vocab
    forecast = activation_bytes(cfg, lone(dtype)) - logits
    print(f"kept {kept:,} bytes, forecast {forecast:,}: {forecast / kept - 1:+.0%}")
    assert 0.7 * kept <= forecast <= 1.3 * kept


def test_forecast_needs_no_memory_for_the_published_size():
    assert activation_bytes(Config(), lone(torch.bfloat16)) > 1e9


def test_forecast_runs_no_kernel_of_a_gpu(monkeypatch):
    """FlashAttention on tensors without memory is at best undefined."""

    def kernel(*_, **__):
        pytest.fail("a kernel was called for the forecast")

    flash = SimpleNamespace(flash_attn_func=kernel, flash_attn_varlen_func=kernel)
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    world = World(0, 1, torch.device("cuda"), torch.bfloat16, True, Journal(None), ".")
    assert empty_model(config(), world).attention_name == "flash-attn-2"
    plain = config(FUSED_CE_ENABLED=0)
    assert activation_bytes(plain, world) == activation_bytes(plain, lone(torch.bfloat16))


def test_forecast_of_the_loss_is_what_the_plain_form_makes_and_one_copy_fused():
    """Plain: the logits, their float32 form, a division, tanh, the product, log-softmax, as counted here."""
    made = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(t for t in tree_leaves(out) if torch.is_tensor(t) and t.shape == (40, 640))
            return out

    hidden, weight = torch.randn(40, 8).bfloat16(), torch.randn(640, 8)
    with Note():
        train_gpt.softcapped_nll_ref(hidden, weight, torch.zeros(40, dtype=torch.int64), 30.0)
    assert len(made) == 6  # held here, so that no memory is counted twice
    found = sum(t.untyped_storage().nbytes() for t in made)
    assert found == train_gpt.loss_bytes("plain", 40, 640, 2, True)
    assert train_gpt.loss_bytes("one_pass", 40, 640, 2, True) == 40 * 640 * 2


def test_packing_on_a_gpu_without_a_kernel_for_it_is_refused_before_compiling():
    cfg = config(DOC_PACKING=1)
    world = World(0, 1, torch.device("cuda"), torch.float32, True, Journal(None), ".")
    model = empty_model(cfg, world)
    with pytest.raises(UserError, match="DOC_PACKING=1 finds no kernel"):
        train_gpt.make_fast(model, world)


# --------------------------------------------------------------------------------------
# Arithmetic
# --------------------------------------------------------------------------------------

GPU = World(0, 1, torch.device("cuda"), torch.float32, False, Journal(None), ".")


@pytest.mark.parametrize(
    ("capability", "knobs", "dtype", "compiling"),
    [
        ((9, 0), {"DTYPE": "auto", "COMPILE": "auto"}, torch.bfloat16, True),
        ((8, 0), {"DTYPE": "bfloat16", "COMPILE": "0"}, torch.bfloat16, False),
        ((9, 0), {"DTYPE": "float32", "COMPILE": "1"}, torch.float32, True),
        ((7, 5), {"DTYPE": "auto", "COMPILE": "1"}, torch.float32, True),
        ((7, 5), {"DTYPE": "bfloat16", "COMPILE": "1"}, torch.float32, True),
    ],
)
def test_gpu_computes_in_bfloat16_where_it_can(monkeypatch, capability, knobs, dtype, compiling):
    """And says so where it was asked for and cannot."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    said = []
    monkeypatch.setattr(World, "log", lambda world, text: said.append(text))
    world = choose_speed(config(**knobs), GPU)
    assert (world.dtype, world.compiling) == (dtype, compiling)
    assert [line.split()[0] for line in said] == ["dtype:float32"] * (capability < (8, 0))


def test_cpu_takes_the_fastest_of_what_it_measured(monkeypatch):
    seconds = {
        ("float32", False): 4.0,
        ("float32", True): 3.0,
        ("bfloat16", False): 2.0,
        ("bfloat16", True): 1.0,
    }
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    said, asked = [], []

    def probe(cfg, world, dtype, compiling):
        asked.append((names[dtype], compiling))
        return seconds[names[dtype], compiling]

    monkeypatch.setattr(train_gpt, "probe", probe)
    monkeypatch.setattr(World, "log", lambda world, text: said.append(text))
    monkeypatch.setattr(train_gpt.shutil, "which", lambda name: "/usr/bin/g++")
    for best in sorted(seconds):
        seconds[best] = 0.5
        world = choose_speed(config(DTYPE="auto", COMPILE="auto"), lone())
        assert (names[world.dtype], world.compiling) == best
        seconds[best] = 9.0
    assert sorted(set(asked)) == sorted(seconds)
    assert said[0].startswith(
        "cpu_probe:float32_eager:4000.0ms float32_compiled:3000.0ms bfloat16_eager:500.0ms"
    )
    assert said[0].endswith(" chosen:bfloat16_compile0")
    asked.clear()
    world = choose_speed(config(DTYPE="bfloat16", COMPILE="0"), lone())
    assert (world.dtype, world.compiling, asked) == (torch.bfloat16, False, [])


def test_probe_times_a_block_of_the_run():
    assert 0 < train_gpt.probe(config(), lone(), torch.bfloat16, False) < 5
