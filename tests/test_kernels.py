"""Kernels: the fast forms of the loss and of attention inside documents mean what the plain forms mean."""

import functools
import importlib
import inspect
import math
import random
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gpt
from train_gpt import (
    attend_blocked,
    attend_segments_ref,
    chunk_rows,
    pick_attention,
    sdpa,
    segment_operator,
    segments,
    softcapped_nll,
    softcapped_nll_ref,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

# --------------------------------------------------------------------------------------
# Softcapped cross-entropy
# --------------------------------------------------------------------------------------


def problem(rows=50, width=16, vocab=37, dtype=torch.float32, scale=3.0, seed=0):
    """(hidden, weight, targets): logits of a few times `scale`, so that the cap bends them."""
    random = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(rows, width, generator=random, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=random, dtype=torch.float64)
    targets = torch.randint(vocab, (rows,), generator=random)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def truth(hidden, weight, targets, cap: float, upstream=None):
    """Nats and gradients in float64, from the formula alone."""
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    z = cap * torch.tanh(h @ w.T / cap)
    nll = torch.log(torch.exp(z - cap).sum(1)) + cap - z[torch.arange(len(h)), targets]
    upstream = torch.ones(len(h)) if upstream is None else upstream
    return nll, *torch.autograd.grad(nll, (h, w), upstream.double())


def ours(hidden, weight, targets, cap: float, upstream=None):
    nll = softcapped_nll(hidden, weight, targets, cap, fast=False)
    upstream = torch.ones_like(nll) if upstream is None else upstream
    return nll, *torch.autograd.grad(nll, (hidden, weight), upstream)


def reference(hidden, weight, targets, cap: float, upstream=None):
    """The plain form in the same dtype: how near float32 comes depends on the machine's matrix products."""
    nll = softcapped_nll_ref(hidden, weight, targets, cap)
    upstream = torch.ones_like(nll) if upstream is None else upstream
    return nll, *torch.autograd.grad(nll, (hidden, weight), upstream)


def distance(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found.detach().double() - want.detach()).norm() / want.detach().norm())


@pytest.mark.parametrize("shape", [(50, 16, 37), (1, 8, 5), (64, 32, 64), (3, 64, 1000), (700, 4, 8192)])
@pytest.mark.parametrize("upstream", ["ones", "mean", "any"])
def test_loss_and_gradients_are_those_of_the_formula(shape, upstream):
    args = (*problem(*shape), 30.0)
    g = {"ones": None, "mean": torch.full(shape[:1], 1 / shape[0]), "any": torch.randn(shape[0])}[upstream]
    for found, plain, want in zip(ours(*args, g), reference(*args, g), truth(*args, g), strict=True):
        assert found.dtype == torch.float32
        assert distance(found, want) <= max(1e-6, 1.1 * distance(plain, want))


def test_mean_of_the_nats_has_the_gradient_of_the_mean():
    hidden, weight, targets = problem()
    softcapped_nll(hidden, weight, targets, 30.0, fast=False).mean().backward()
    _, by_hidden, by_weight = truth(hidden, weight, targets, 30.0)
    assert distance(hidden.grad, by_hidden / 50) <= 1e-6
    assert distance(weight.grad, by_weight / 50) <= 1e-6


@pytest.mark.parametrize("rows", [1, 3, 7, 49, 50, 1000])
def test_chunks_do_not_matter(rows, monkeypatch):
    monkeypatch.setattr(train_gpt, "chunk_rows", lambda n, vocab, gpu: min(rows, n))
    args = (*problem(dtype=torch.float64), 30.0, torch.randn(50, dtype=torch.float64))
    for found, want in zip(ours(*args), truth(*args), strict=True):
        assert distance(found, want) <= 1e-14
    with torch.no_grad():
        scored = softcapped_nll(*args[:4], fast=False)
    assert distance(scored, truth(*args)[0]) <= 1e-14


def test_gradient_of_each_nat_alone_is_exact(monkeypatch):
    """gradcheck asks for one row at a time: upstream gradients that are not alike."""
    monkeypatch.setattr(train_gpt, "chunk_rows", lambda n, vocab, gpu: 3)
    hidden, weight, targets = problem(7, 4, 5, torch.float64, scale=1.0)
    assert torch.autograd.gradcheck(
        lambda h, w: softcapped_nll(h, w, targets, 2.0, fast=False), (hidden, weight)
    )


def test_only_the_weight_or_only_the_hidden_states_may_want_gradients():
    hidden, weight, targets = problem()
    _, by_hidden, by_weight = truth(hidden, weight, targets, 30.0)
    nll = softcapped_nll(hidden.detach(), weight, targets, 30.0, fast=False)
    assert distance(torch.autograd.grad(nll.sum(), weight)[0], by_weight) <= 1e-6
    nll = softcapped_nll(hidden, weight.detach(), targets, 30.0, fast=False)
    assert distance(torch.autograd.grad(nll.sum(), hidden)[0], by_hidden) <= 1e-6


@pytest.mark.parametrize("scale", [1e4, 1e18])
def test_huge_logits_give_finite_losses_and_gradients(scale):
    hidden, weight, targets = problem(scale=scale)
    found, want = ours(hidden, weight, targets, 30.0), truth(hidden, weight, targets, 30.0)
    for a, b, size in zip(found, want, (64, weight.abs().max(), hidden.abs().max()), strict=True):
        assert torch.isfinite(a).all()
        assert (a - b).abs().max() <= 1e-6 * size
    assert 60 < found[0].max() < 60 + 4  # from cap to -cap, and the logarithm of the vocabulary


def test_caps_so_high_that_a_row_could_vanish_below_them():
    """Logits far below a cap of 100: exp(-200) is no float32."""
    hidden, weight = torch.full((3, 1), -500.0), torch.linspace(0.9, 1.1, 9)[:, None]
    args = hidden.requires_grad_(), weight.requires_grad_(), torch.arange(3), 100.0
    found, want = ours(*args), truth(*args)
    assert (found[0] - want[0]).abs().max() <= 2.5e-5  # a float32 near 200 has steps of 1.5e-5
    assert all(distance(a, b) <= 1e-3 for a, b in zip(found, want, strict=True))
    assert bool(((found[0] > 2) & (found[0] < 3)).all())


def test_not_a_number_comes_out_where_it_went_in():
    hidden, weight, targets = problem()
    hidden.data[17, 3] = torch.nan
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            nll = softcapped_nll(hidden, weight, targets, 30.0, fast=False)
        assert torch.isnan(nll).nonzero().flatten().tolist() == [17]
    found = ours(hidden, weight, targets, 30.0)
    assert torch.isnan(found[1]).any(1).nonzero().flatten().tolist() == [17]
    assert torch.isnan(found[2]).any()


def test_bfloat16_activations_keep_float32_losses_and_weights():
    hidden, weight, targets = problem(rows=200)
    want = truth(hidden.bfloat16(), weight.bfloat16(), targets, 30.0)
    half = hidden.detach().bfloat16().requires_grad_()
    found = ours(half, weight, targets, 30.0)
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, torch.float32]
    assert all(distance(a, b) < 0.01 for a, b in zip(found, want, strict=True))


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operator made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [
            t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if torch.is_tensor(t)
        ]
        self.entries = max([self.entries, *made])
        return out


@pytest.mark.parametrize("upstream", ["mean", "any"])
@pytest.mark.parametrize("grad", [True, False])
def test_logits_never_exist_as_a_whole(upstream, grad):
    rows, vocab = 1300, 8192
    hidden, weight, targets = problem(rows, 8, vocab)
    assert chunk_rows(rows, vocab) == 256
    with Largest() as seen, torch.set_grad_enabled(grad):
        nll = softcapped_nll(hidden, weight, targets, 30.0, fast=False)
        if grad:
            (nll.mean() if upstream == "mean" else nll.square().mean()).backward()
    assert seen.entries == 256 * vocab < rows * vocab / 5
    with Largest() as seen:
        softcapped_nll_ref(hidden, weight, targets, 30.0)
    assert seen.entries == rows * vocab  # the same measure sees the logits of the plain form


# --------------------------------------------------------------------------------------
# Logits of other forms: curves, a bias, and their log-sum-exps
# --------------------------------------------------------------------------------------


def curve_of(name: str, x: torch.Tensor, cap: float) -> torch.Tensor:
    """The published formulas, a second time."""
    s = x / cap
    if name == "tanh":
        e = torch.exp(-2 * s.abs())
        return cap * torch.sign(s) * (1 - e) / (1 + e)
    if name == "algebraic":
        return cap * s / torch.sqrt(1 + s**2)
    u = torch.minimum(torch.maximum(s, torch.tensor(-2.0)), torch.tensor(2.0))
    return cap * torch.clip(u * (1 - u**2 / 3 + u**4 / 15), -1, 1)


def formed_truth(args, curve: str, cap: float, weights: tuple):
    """Nats, log-sum-exps and the gradients of their weighted sum, squared and not, in float64."""
    hidden, weight, targets, bias = args
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    z = curve_of(curve, leaves[0] @ leaves[1].T, cap)
    z = z + leaves[2] if bias is not None else z
    lse = z.exp().sum(1).log()
    return told(lse - z[torch.arange(len(z)), targets], lse, leaves, weights)


def told(nll, lse, leaves, weights):
    total = (nll * weights[0].to(nll)).mean() + weights[1] * lse.square().mean()
    return nll, lse, *torch.autograd.grad(total, leaves)


def formed(args, curve: str, cap: float, weights: tuple, loss) -> tuple:
    leaves = [t for t in (args[0], args[1], args[3]) if t is not None]
    return told(*loss(*args, train_gpt.Form(cap, curve)), leaves, weights)


CHUNKED = functools.partial(train_gpt.formed_nll, fast=False)


def formed_problem(bias: bool, dtype=torch.float32, **sizes):
    args = problem(dtype=dtype, **sizes)
    drawn = torch.randn(args[1].shape[0], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return *args, drawn.to(dtype).requires_grad_() if bias else None


@pytest.mark.parametrize("loss", [train_gpt.formed_nll_ref, CHUNKED], ids=["plain", "chunked"])
@pytest.mark.parametrize("upstream", ["mean", "any"])
@pytest.mark.parametrize("z", [0.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("curve", ["tanh", "poly", "algebraic"])
def test_loss_of_any_form_is_that_of_the_formula(curve, bias, z, upstream, loss, monkeypatch):
    monkeypatch.setattr(train_gpt, "chunk_rows", lambda n, vocab, gpu=False: 7)
    args, g = formed_problem(bias), torch.ones(50) if upstream == "mean" else torch.randn(50)
    found, want = formed(args, curve, 10.0, (g, z), loss), formed_truth(args, curve, 10.0, (g, z))
    assert len(found) == len(want) == 4 + bias
    for a, b in zip(found, want, strict=True):
        assert a.dtype == torch.float32
        assert distance(a, b) <= 1e-5
    assert float((args[0] @ args[1].T).detach().abs().max()) > 20  # where the polynomial is cut


@pytest.mark.parametrize("curve", ["tanh", "poly", "algebraic"])
def test_chunks_of_any_form_do_not_matter(curve, monkeypatch):
    args, weights = formed_problem(True, torch.float64), (torch.randn(50), 0.5)
    for rows in (1, 49, 1000):
        monkeypatch.setattr(train_gpt, "chunk_rows", lambda n, vocab, gpu=False, rows=rows: min(rows, n))
        for a, b in zip(
            formed(args, curve, 3.0, weights, CHUNKED), formed_truth(args, curve, 3.0, weights), strict=True
        ):
            assert distance(a, b) <= 1e-13


@pytest.mark.parametrize("curve", ["tanh", "poly", "algebraic"])
@pytest.mark.parametrize("size", [1e4, 1e18, 1e30])
def test_huge_logits_of_any_form_stay_finite(curve, size):
    args = formed_problem(True, scale=size)
    found = formed(args, curve, 10.0, (torch.ones(50), 0.1), CHUNKED)
    assert all(bool(torch.isfinite(t).all()) for t in found)
    assert float(found[0].detach().max()) <= 20 + math.log(37) + 2 * float(args[3].detach().abs().max())


def test_tanh_of_any_form_is_the_loss_of_tanh_alone():
    hidden, weight, targets, _ = formed_problem(False)
    nll, _ = train_gpt.formed_nll_ref(hidden, weight, targets, None, train_gpt.Form(30.0))
    assert distance(nll, softcapped_nll_ref(hidden, weight, targets, 30.0).double()) <= 1e-6


@pytest.mark.parametrize("loss", [train_gpt.formed_nll_ref, CHUNKED], ids=["plain", "chunked"])
def test_negative_targets_count_for_nothing_in_any_form(loss):
    hidden, weight, targets, bias = formed_problem(True)
    some = targets.clone()
    some[::3] = -1
    kept = [hidden.detach()[some >= 0].requires_grad_(), weight, targets[some >= 0], bias]
    leaves, others = (hidden, weight, bias), (kept[0], weight, bias)
    form = train_gpt.Form(10.0, "poly")
    nll, lse = loss(hidden, weight, some, bias, form)
    found = torch.autograd.grad(nll.sum() + lse.square().sum(), leaves)
    few, its = loss(*kept, form)
    want = torch.autograd.grad(few.sum() + its.square().sum(), others)
    assert not nll[::3].any() and not lse[::3].any() and not found[0][::3].any()
    assert distance(found[0][some >= 0], want[0].double()) <= 1e-5
    assert all(distance(a, b.double()) <= 1e-5 for a, b in zip(found[1:], want[1:], strict=True))


def test_bfloat16_activations_of_any_form_keep_float32_losses_and_weights():
    hidden, weight, targets, bias = formed_problem(True, rows=200)
    half = hidden.detach().bfloat16().requires_grad_()
    weights = torch.ones(200), 0.1
    found = formed((half, weight, targets, bias), "poly", 30.0, weights, CHUNKED)
    want = formed_truth((half, weight.bfloat16(), targets, bias), "poly", 30.0, weights)
    assert [t.dtype for t in found] == [torch.float32] * 2 + [torch.bfloat16] + [torch.float32] * 2
    assert all(distance(a, b) < 0.01 for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("grad", [True, False])
def test_logits_of_any_form_never_exist_as_a_whole(grad):
    rows, vocab = 1300, 8192
    hidden, weight, targets, bias = formed_problem(True, rows=rows, width=8, vocab=vocab)
    with Largest() as seen, torch.set_grad_enabled(grad):
        nll, lse = CHUNKED(hidden, weight, targets, bias, train_gpt.Form(10.0, "poly"))
        if grad:
            (nll.mean() + 1e-4 * lse.square().mean()).backward()
    assert seen.entries == 256 * vocab < rows * vocab / 5


# --------------------------------------------------------------------------------------
# Attention inside documents
# --------------------------------------------------------------------------------------


def heads(n: int, dtype=torch.float64, width=8, query=4, key=2):
    """q (1,N,H,K), k and v (1,N,G,K)."""
    return [torch.randn(1, n, h, width, dtype=dtype, requires_grad=True) for h in (query, key, key)]


def naive(q, k, v, docs: list[int]) -> torch.Tensor:
    """Head by head, a softmax over the whole masked square, in float64."""
    number = torch.bucketize(torch.arange(q.shape[1]), torch.tensor(docs), right=True)
    mask = (number[:, None] == number) & torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    group, out = q.shape[2] // k.shape[2], []
    for h in range(q.shape[2]):
        score = q[0, :, h].double() @ k[0, :, h // group].double().T * q.shape[3] ** -0.5
        out.append(score.masked_fill(~mask, -torch.inf).softmax(1) @ v[0, :, h // group].double())
    return torch.stack(out, 1)[None]


FORMS = {"plain": attend_segments_ref, "operator": segment_operator(False), "tiles": segment_operator(True)}
lengths = st.lists(st.sampled_from([1, 1, 2, 3, 5, 17, 33]), min_size=1, max_size=8)


def boundaries(sizes: list[int], padding: int = 3) -> torch.Tensor:
    return torch.tensor(
        [0, *torch.tensor(sizes).cumsum(0).tolist(), *[sum(sizes)] * padding], dtype=torch.int32
    )


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 8 queries by 16 keys, so that short documents span some of them, and no compiler."""
    monkeypatch.setattr(train_gpt, "TILES", (8, 16, 3))
    monkeypatch.setattr(train_gpt, "compiled_once", lambda function: function)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=lengths, shape=st.sampled_from([(4, 2), (2, 2), (6, 2), (3, 1)]))
def test_attention_never_leaves_a_segment(form, sizes, shape):
    docs, qkv = boundaries(sizes), heads(sum(sizes), query=shape[0], key=shape[1])
    found, want = FORMS[form](*qkv, docs), naive(*qkv, docs.tolist())
    assert found.shape == want.shape
    assert (found - want).abs().max() <= 1e-12
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(found, qkv, g), torch.autograd.grad(want, qkv, g), strict=True):
        assert (a - b).abs().max() <= 1e-11


@pytest.mark.parametrize("form", FORMS)
def test_attention_in_float32_is_near_the_truth(form):
    docs, qkv = boundaries([100, 1, 155]), heads(256, torch.float32, width=32)
    assert (FORMS[form](*qkv, docs) - naive(*qkv, docs.tolist())).abs().max() <= 2e-6


def test_whole_rows_attend_as_one_segment_each():
    q, k, v = heads(60)
    rows = [t.view(3, 20, *t.shape[2:]) for t in (q, k, v)]
    want = naive(q, k, v, [0, 20, 40, 60])
    assert (sdpa(*rows).reshape(want.shape) - want).abs().max() <= 1e-12
    assert (
        pick_attention(CPU, torch.float32, False)[1](*rows, None, 20).reshape(want.shape) - want
    ).abs().max() <= 1e-12


def attended(form, qkv, g):
    """What a form gives, and its gradients for the incoming one."""
    out = form(*qkv)
    return out, *torch.autograd.grad(out, qkv, g)


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize("shape", [(4, 2), (2, 2), (3, 1)])
def test_attention_by_blocks_of_queries_is_attention(length, shape):
    """Forward, and each gradient to float32's rounding; two rows, so that they are told apart."""
    both = [heads(length, torch.float32, 16, *shape) for _ in range(2)]
    qkv = [torch.cat(pair).detach().requires_grad_() for pair in zip(*both, strict=True)]
    g = torch.randn(2, length, shape[0], 16)
    found = attended(attend_blocked, qkv, g)
    for row in range(2):
        one = [t[row : row + 1].detach().double().requires_grad_() for t in qkv]
        want = attended(lambda q, k, v: naive(q, k, v, [0, length]), one, g[row : row + 1].double())
        for a, b in zip(found, want, strict=True):
            assert (a[row] - b[0]).abs().max() <= 1e-5


def test_attention_by_blocks_is_near_in_bfloat16():
    """As near to the truth as torch's own, within a factor of two."""
    qkv, g = heads(300, torch.float32, 32), torch.randn(1, 300, 4, 32)
    low = [t.detach().bfloat16().requires_grad_() for t in qkv]
    truth_64 = attended(lambda q, k, v: naive(q, k, v, [0, 300]), [t.double() for t in low], g.double())
    ours_16, torch_16 = (attended(form, low, g.bfloat16()) for form in (attend_blocked, sdpa))
    for ours_one, torch_one, want in zip(ours_16, torch_16, truth_64, strict=True):
        assert distance(ours_one, want) <= 2 * distance(torch_one, want) <= 0.03


def test_long_rows_go_back_by_torch(monkeypatch):
    monkeypatch.setattr(train_gpt.BlockedAttention, "apply", lambda *_: pytest.fail("unrolled 1,025 tokens"))
    q, k, v = heads(1025, torch.float32, 4, 1, 1)
    assert torch.equal(attend_blocked(q, k, v), sdpa(q, k, v))


def test_empty_segments_are_nothing():
    assert segments(torch.tensor([0, 0, 3, 3, 4, 9, 9, 9])) == [(0, 3), (3, 4), (4, 9)]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("tiled", [False, True])
def test_operator_passes_gradcheck(tiled):
    docs, qkv = boundaries([1, 4, 2]), heads(7, width=4)
    assert torch.autograd.gradcheck(lambda *t: segment_operator(tiled)(*t, docs), qkv)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("tiled", [False, True])
def test_operator_is_declared_as_it_behaves(tiled):
    segment_operator(tiled)
    name = f"attend_segments{'_tiled' * tiled}"
    attend, grads = getattr(torch.ops.golf, name), getattr(torch.ops.golf, f"{name}_grad")
    docs, qkv = boundaries([1, 4, 2]), heads(7, torch.float32, width=4)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(attend.default, (*qkv, docs), test_utils=tests)
    forward = attend(*qkv, docs)
    args = (torch.randn(1, 7, 4, 4), [t.detach() for t in qkv], *(t.detach() for t in forward), docs)
    torch.library.opcheck(grads.default, args, test_utils=tests[:2])


@pytest.mark.parametrize("sizes", [[5], [128, 128, 256], [300, 3, 700, 2, 2, 100]], ids=str)
def test_tiles_of_their_real_size_are_near_in_bfloat16(sizes, monkeypatch):
    """As near to the truth as torch's own kernel, within a factor of two."""
    monkeypatch.setattr(train_gpt, "compiled_once", lambda function: function)
    docs, g = boundaries(sizes), torch.randn(1, sum(sizes), 4, 32)
    low = [t.detach().bfloat16().requires_grad_() for t in heads(sum(sizes), torch.float32, 32)]
    truth_64 = attended(lambda *t: naive(*t, docs.tolist()), [t.double() for t in low], g.double())
    ours_16, torch_16 = (
        attended(lambda *t, f=f: f(*t, docs), low, g.bfloat16()) for f in (FORMS["tiles"], FORMS["operator"])
    )
    for ours_one, torch_one, want in zip(ours_16, torch_16, truth_64, strict=True):
        assert distance(ours_one, want) <= 2 * distance(torch_one, want) <= 0.03


# --------------------------------------------------------------------------------------
# FlexAttention
# --------------------------------------------------------------------------------------

FLEX = importlib.import_module("torch.nn.attention.flex_attention")  # torch has a function of that name too


@pytest.fixture
def plain_flex(monkeypatch):
    """FlexAttention as torch computes it uncompiled, its refusal of gradients on a CPU taken out."""
    monkeypatch.setattr(FLEX, "_validate_device", lambda *_: None)
    monkeypatch.setattr(FLEX, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    return functools.partial(train_gpt.attend_flex, (FLEX.flex_attention, FLEX.BlockMask))


def layouts() -> dict[str, list[int]]:
    """Lengths of documents: one alone, the shortest, empty ones between others, and drawn ones."""
    drawn = {}
    for seed in range(4):
        rng = random.Random(seed)
        drawn[f"drawn {seed}"] = [rng.choice([0, 1, 1, 2, 7, 40, 128, 131]) for _ in range(12)]
    fixed = {"one": [300], "one token": [1], "tokens": [1] * 9, "empty between": [5, 0, 0, 3, 1, 0, 140]}
    return fixed | {"tiles": [128, 256, 128], "long and short": [1, 600, 1, 39]} | drawn


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("sizes", layouts().values(), ids=layouts())
def test_tiles_of_flex_are_those_that_the_whole_square_has(sizes, padding):
    """torch's own create_block_mask makes the (N,N) square and looks at it; all ten lists are the same."""
    docs, total = boundaries(sizes, padding), sum(sizes)
    number = torch.bucketize(torch.arange(total), docs, right=True)

    def sees(b, h, i, j):
        return (number[i] == number[j]) & (j <= i)

    want = FLEX.create_block_mask(sees, 1, 1, total, total, "cpu")
    found = train_gpt.document_mask(docs, total, FLEX.BlockMask)
    assert found.shape == want.shape and found.BLOCK_SIZE == want.BLOCK_SIZE
    lists = [name for name in vars(want) if name.endswith(("_num_blocks", "_indices"))]
    assert len(lists) == 8
    for name in lists:
        assert torch.equal(getattr(found, name), getattr(want, name)), name
    seen = FLEX.create_mask(found.mask_mod, 1, 1, total, total, "cpu")
    assert torch.equal(seen, FLEX.create_mask(sees, 1, 1, total, total, "cpu"))


def test_flex_makes_no_square(plain_flex):
    """32,768 tokens in documents of 100: a square of them would have a milliard entries."""
    with Largest() as seen:
        train_gpt.document_mask(boundaries([100] * 327 + [68]), 32_768, FLEX.BlockMask)
    assert seen.entries <= 257**2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("whole", [True, False], ids=["in a compiled block", "compiled by itself"])
def test_flex_is_compiled_once_whatever_the_number_of_documents(monkeypatch, whole):
    """One graph, traced without a break, forward and backward; values and gradients as without."""
    monkeypatch.setattr(FLEX, "_validate_device", lambda *_: None)
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)
    flex = FLEX.flex_attention if whole else compiled(FLEX.flex_attention)
    attend = functools.partial(train_gpt.attend_flex, (flex, FLEX.BlockMask))
    attend = compiled(attend) if whole else attend
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    qkv, g = heads(140, torch.float32), torch.randn(1, 140, 4, 8)
    for sizes in ([140], [3, 130, 7], [1] * 140, [70, 0, 70]):
        docs = boundaries(sizes)
        torch._dynamo.mark_dynamic(docs, 0)
        found = attended(lambda *t, d=docs: attend(*t, d, 140), qkv, g)
        want = attended(lambda *t, d=docs: attend_segments_ref(*t, d), qkv, g)
        for a, b in zip(found, want, strict=True):
            assert (a - b).abs().max() <= 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------
# Which kernel
# --------------------------------------------------------------------------------------


class Spy:
    """Stands for a kernel of another package: notes the shapes it is given, answers with the plain form."""

    def __init__(self, varlen: bool, pair: bool = False):
        self.varlen, self.pair, self.calls = varlen, pair, []

    def __call__(self, q, k, v, *lengths, **options):
        self.calls.append((tuple(q.shape), tuple(k.shape), tuple(v.shape), lengths, options))
        if not self.varlen:
            out = sdpa(q, k, v)
        else:
            docs = options["cu_seqlens_q"] if "cu_seqlens_q" in options else lengths[0]
            out = attend_segments_ref(q[None], k[None], v[None], docs)[0]
        return (out, None) if self.pair else out


def plant(monkeypatch, name: str, **members):
    """A module that can be imported, or with no members one that cannot."""
    module = ModuleType(name)
    for member, value in members.items():
        setattr(module, member, value)
    monkeypatch.setitem(sys.modules, name, module if members else None)


def flash(monkeypatch, name: str, pair: bool = False) -> tuple[Spy, Spy]:
    dense, varlen = Spy(False, pair), Spy(True, pair)
    plant(monkeypatch, name, flash_attn_func=dense, flash_attn_varlen_func=varlen)
    return dense, varlen


@pytest.fixture
def bare(monkeypatch):
    """A Hopper GPU in name, and no package with a kernel."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name in ("flash_attn_interface", "flash_attn", "torch.nn.attention.varlen", "triton"):
        plant(monkeypatch, name)
    return monkeypatch


def check(attend, dense: Spy, varlen: Spy):
    """The kernel gives the plain form's values and was given key heads as they are."""
    docs, (q, k, v) = boundaries([3, 1, 6]), heads(10)
    assert torch.equal(attend(q, k, v, docs, 6), attend_segments_ref(q, k, v, docs))
    assert torch.equal(attend(q, k, v, None, 10), sdpa(q, k, v))
    assert varlen.calls[0][:3] == ((10, 4, 8), (10, 2, 8), (10, 2, 8))
    assert all(call[:3] == ((1, 10, 4, 8), (1, 10, 2, 8), (1, 10, 2, 8)) for call in dense.calls)


@pytest.mark.parametrize("pair", [False, True])
def test_hopper_takes_flash_attention_3_first(bare, pair):
    flash(bare, "flash_attn")
    spies = flash(bare, "flash_attn_interface", pair)
    name, attend = pick_attention(CUDA, torch.bfloat16, False)
    assert name == "flash-attn-3"
    check(attend, *spies)
    options = spies[1].calls[0][4]
    assert (options["max_seqlen_q"], options["max_seqlen_k"], options["causal"]) == (6, 6, True)
    assert torch.equal(options["cu_seqlens_q"], options["cu_seqlens_k"])
    assert spies[0].calls[0][4] == {"causal": True}


def test_other_gpus_take_flash_attention_2_though_3_is_installed(bare):
    flash(bare, "flash_attn_interface")
    spies = flash(bare, "flash_attn")
    for capability in ((8, 0), (12, 0)):
        bare.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert pick_attention(CUDA, torch.bfloat16, False)[0] == "flash-attn-2"
    bare.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    plant(bare, "flash_attn_interface")
    name, attend = pick_attention(CUDA, torch.bfloat16, False)
    assert name == "flash-attn-2"
    check(attend, *spies)


def varlen_of(spy: Spy, era: str):
    """torch.nn.attention.varlen.varlen_attn with the signature of a release."""
    if era == "2.12":

        def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
            assert window_size == (-1, 0)
            assert enable_gqa
            return spy(q, k, v, cu_q, cu_k, max_q, max_k)

    else:

        def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
            assert is_causal
            assert q.shape == k.shape == v.shape
            return spy(q, k, v, cu_q, cu_k, max_q, max_k)

    return varlen_attn


def test_torch_varlen_is_next_and_groups_heads_itself(bare):
    varlen, dense = Spy(True), Spy(False)
    plant(bare, "torch.nn.attention.varlen", varlen_attn=varlen_of(varlen, "2.12"))
    name, attend = pick_attention(CUDA, torch.bfloat16, False)
    assert name == "torch-varlen"
    check(attend, dense, varlen)
    assert varlen.calls[0][3][2:] == (6, 6)


def test_only_a_kernel_that_cannot_group_heads_gets_them_repeated(bare):
    varlen = Spy(True)
    plant(bare, "torch.nn.attention.varlen", varlen_attn=varlen_of(varlen, "2.10"))
    docs, (q, k, v) = boundaries([3, 1, 6]), heads(10)
    name, attend = pick_attention(CUDA, torch.bfloat16, False)
    assert name == "torch-varlen"
    assert (attend(q, k, v, docs, 6) - attend_segments_ref(q, k, v, docs)).abs().max() <= 1e-12
    assert varlen.calls[0][1] == (10, 4, 8)


def test_options_are_those_of_the_installed_torch():
    from torch.nn.attention.varlen import varlen_attn

    options = train_gpt.varlen_options(varlen_attn)
    assert set(options) <= set(inspect.signature(varlen_attn).parameters)
    assert options.get("is_causal") or options["window_size"] == (-1, 0)


def test_without_kernels_attention_is_sdpa(bare):
    name, attend = pick_attention(CUDA, torch.bfloat16, False)
    assert name == "sdpa"
    docs, (q, k, v) = boundaries([3, 1, 6]), heads(10)
    assert torch.equal(attend(q, k, v, docs, 6), attend_segments_ref(q, k, v, docs))


def test_float32_and_cpus_take_no_half_precision_kernel(bare):
    for name in ("flash_attn_interface", "flash_attn"):
        flash(bare, name)
    assert pick_attention(CUDA, torch.float32, False)[0] == "sdpa"
    assert pick_attention(CPU, torch.bfloat16, False)[0] == "sdpa"
    assert pick_attention(CPU, torch.float32, True)[0] == "sdpa"


def test_only_compiled_bfloat16_blocks_on_a_cpu_go_back_by_blocks(monkeypatch):
    name, attend = pick_attention(CPU, torch.bfloat16, True)
    assert name == "sdpa-blocked"
    calls, real = [], train_gpt.BlockedAttention.apply
    monkeypatch.setattr(train_gpt.BlockedAttention, "apply", lambda *t: calls.append(t) or real(*t))
    q, k, v = heads(10)
    assert torch.equal(attend(q, k, v, None, 10), sdpa(q, k, v))
    assert len(calls) == 1
    docs = boundaries([3, 1, 6])
    assert torch.equal(attend(q, k, v, docs, 10), segment_operator(False)(q, k, v, docs))
    assert len(calls) == 1


# --------------------------------------------------------------------------------------
# One contract
# --------------------------------------------------------------------------------------

STAND_INS = ["flash3", "flash2", "varlen"]  # another's kernel, answering with the plain form
BACKENDS = ["plain", "operator", "tiles", "flex", *STAND_INS]


@pytest.fixture
def backend(bare, small_tiles, plain_flex, request):
    """attend(q, k, v, docs, longest) of the named one; those of a GPU as ATTENTION picks them."""
    name = request.param
    if name in FORMS:
        return lambda q, k, v, docs, longest: FORMS[name](q, k, v, docs)
    flash(bare, "flash_attn_interface", pair=True)
    flash(bare, "flash_attn")
    plant(bare, "torch.nn.attention.varlen", varlen_attn=varlen_of(Spy(True), "2.12"))
    plant(bare, "triton", __version__="in name")
    return pick_attention(CUDA, torch.bfloat16, True, choice=name)[1]


@pytest.mark.parametrize("shape", [(4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("sizes", layouts().values(), ids=layouts())
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_backends_agree_forward_and_backward(backend, sizes, shape):
    """With the softmax over the whole masked square in float64; grouped heads; a tail of empty documents."""
    docs, qkv = boundaries(sizes), heads(sum(sizes), torch.float32, 16, *shape)
    g = torch.randn(1, sum(sizes), shape[0], 16)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    want = attended(lambda q, k, v: naive(q, k, v, docs.tolist()), exact, g.double())
    found = attended(lambda q, k, v: backend(q, k, v, docs, max(sizes)), qkv, g)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert (a - b).abs().max() <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_backends_agree_where_every_head_has_keys_of_its_own(backend):
    test_backends_agree_forward_and_backward(backend, [3, 1, 6], (2, 2))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_document_leaves_the_others_as_they_are_to_the_bit(backend):
    """Outputs and gradients of every other document, for each document that is changed."""
    sizes = [3, 1, 9, 0, 20, 7]
    docs, qkv = boundaries(sizes), [t.detach() for t in heads(40, torch.float32)]
    g = torch.randn(1, 40, 4, 8)

    def outcome(given):
        leaves = [t.clone().requires_grad_() for t in given]
        return attended(lambda q, k, v: backend(q, k, v, docs, 20), leaves, g)

    before = outcome(qkv)
    for a, b in segments(docs):
        after = outcome([torch.cat([t[:, :a], t[:, a:b].flip(-1) + 1, t[:, b:]], 1) for t in qkv])
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[:, :a], new[:, :a]) and torch.equal(old[:, b:], new[:, b:])
        assert not torch.equal(before[0][:, a:b], after[0][:, a:b])


@pytest.mark.parametrize("backend", ["flex", *STAND_INS], indirect=True)
def test_whole_rows_need_no_documents(backend):
    q, k, v = (t.view(3, 20, *t.shape[2:]) for t in heads(60))
    assert torch.equal(backend(q, k, v, None, 20), sdpa(q, k, v))


def test_flex_stands_between_torchs_varlen_and_sdpa(bare):
    """Where it can be compiled, in half precision; and it gets what is compiled."""
    plant(bare, "triton", __version__="in name")
    assert pick_attention(CUDA, torch.bfloat16, True)[0] == "flex"
    assert pick_attention(CUDA, torch.bfloat16, True, packing=False)[0] == "sdpa"
    assert pick_attention(CUDA, torch.float32, True)[0] == "sdpa"
    plant(bare, "torch.nn.attention.varlen", varlen_attn=varlen_of(Spy(True), "2.12"))
    assert pick_attention(CUDA, torch.bfloat16, True)[0] == "torch-varlen"
    wrapped = []
    bare.setattr(train_gpt, "compiled_once", lambda function: wrapped.append(function) or function)
    assert pick_attention(CUDA, torch.float32, True, choice="flex")[0] == "flex" and wrapped == []
    assert pick_attention(CUDA, torch.float32, False, choice="flex")[0] == "flex"
    assert wrapped == [FLEX.flex_attention]


def test_attention_is_the_one_that_was_chosen(bare):
    """All are there; each choice is taken, whatever `auto` would prefer."""
    flash(bare, "flash_attn_interface")
    flash(bare, "flash_attn")
    plant(bare, "torch.nn.attention.varlen", varlen_attn=varlen_of(Spy(True), "2.12"))
    plant(bare, "triton", __version__="in name")
    want = {"auto": "flash-attn-3", "flash3": "flash-attn-3", "flash2": "flash-attn-2"}
    want |= {"varlen": "torch-varlen", "flex": "flex", "sdpa": "sdpa"}
    choices = train_gpt.all_knobs()["ATTENTION"][1].metadata["choices"]
    assert {c: pick_attention(CUDA, torch.bfloat16, True, choice=c)[0] for c in choices} == want


@pytest.mark.parametrize(
    ("choice", "capability", "dtype", "packing", "there"),
    [
        ("flash3", (8, 0), torch.bfloat16, True, True),
        ("flash3", (9, 0), torch.float32, True, True),
        ("flash3", (9, 0), torch.bfloat16, True, False),
        ("flash2", (9, 0), torch.float32, True, True),
        ("flash2", (9, 0), torch.bfloat16, True, False),
        ("varlen", (9, 0), torch.float32, True, True),
        ("varlen", (9, 0), torch.bfloat16, False, True),
        ("varlen", (9, 0), torch.bfloat16, True, False),
        ("flex", (9, 0), torch.bfloat16, False, True),
        ("flex", (9, 0), torch.bfloat16, True, False),
    ],
)
def test_choice_that_cannot_run_is_refused_in_one_line(bare, choice, capability, dtype, packing, there):
    bare.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if there:
        for name in ("flash_attn_interface", "flash_attn"):
            flash(bare, name)
        plant(bare, "torch.nn.attention.varlen", varlen_attn=varlen_of(Spy(True), "2.12"))
        plant(bare, "triton", __version__="in name")
    pattern = rf"^ATTENTION={choice} cannot run here, on cuda in {dtype}; it wants .*[^\n]*ATTENTION=auto"
    with pytest.raises(train_gpt.UserError, match=pattern):
        pick_attention(CUDA, dtype, True, packing, choice=choice)


@pytest.mark.parametrize("choice", ["flash3", "flash2", "varlen", "flex"])
def test_kernels_of_a_gpu_are_refused_on_a_cpu_but_not_forecast(choice):
    with pytest.raises(train_gpt.UserError, match=f"ATTENTION={choice} cannot run here, on cpu; it wants "):
        pick_attention(CPU, torch.bfloat16, True, choice=choice)
    assert pick_attention(torch.device("meta"), torch.bfloat16, True, choice=choice)[0] == "forecast"


def test_sdpa_on_a_cpu_is_torchs_own():
    """Neither by blocks nor by tiles, as `auto` has it for compiled bfloat16."""
    assert pick_attention(CPU, torch.bfloat16, True)[0] == "sdpa-blocked"
    name, attend = pick_attention(CPU, torch.bfloat16, True, choice="sdpa")
    assert name == "sdpa" and attend.args[0] == (sdpa, segment_operator(False))
