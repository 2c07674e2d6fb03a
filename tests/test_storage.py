"""Storage: decode(encode(w)) is fake_quant(w) bit for bit; a damaged container is refused in words."""

import hashlib
import itertools
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import (
    Fp4,
    Fp8,
    Half,
    IntRow,
    LowRank,
    Ternary,
    UserError,
    gptq,
    pack_container,
    through,
    unpack_container,
)

SIMPLE = [
    Half(),
    *(IntRow(b, 0.0, p, f) for b, p, f in itertools.product((6, 8), (100.0, 99.99984, 95.0), (0.0, 1 / 127))),
    *(IntRow(b, s) for b, s in itertools.product((5, 6, 7, 8), (2.5, 12.85))),
]
TERNARY = [Ternary(g, s) for g, s in itertools.product((1, 16, 128), (0.0, 0.02, 0.04))]
ROTATED = [Ternary(g, s, True) for g, s in itertools.product((1, 16, 128), (0.0, 0.04))]
CODECS = [*SIMPLE, *TERNARY, *ROTATED, Fp8(), Fp4()]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
shapes = st.one_of(
    st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 12), st.integers(1, 40)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9)),
    st.tuples(st.integers(1, 3), st.sampled_from([127, 128, 129, 300])),
)  # fmt: skip

codecs, seeds = st.sampled_from(CODECS), st.integers(0, 2**32 - 1)
grids = st.none() | st.tuples(st.floats(0.02, 1.5), st.floats(0.5, 2.0)).map(torch.tensor)
scales = st.sampled_from([1e-8, 1e-6, 1e-3, 0.02, 1.0, 300.0])


def reload(codec, w: torch.Tensor, hessian=None, grid: torch.Tensor | None = None) -> torch.Tensor:
    """Through the bytes of the artifact and back, by nothing but the shape."""
    planes, streams = codec.planes(tuple(w.shape)), codec.encode(w, hessian, grid)
    assert list(streams) == list(planes)
    for kind, values in streams.items():
        plane = planes[kind]
        assert (values.dtype, values.shape) == (plane.dtype, (plane.count,))
        assert plane.low == plane.high or plane.low <= values.min() <= values.max() <= plane.high
    stored = {kind: np.frombuffer(values.tobytes(), planes[kind].dtype) for kind, values in streams.items()}
    return codec.decode(stored, tuple(w.shape))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, the sign of a zero included."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.view(torch.uint8).equal(b.view(torch.uint8))


@settings(max_examples=700)
@given(codec=codecs, dtype=st.sampled_from(DTYPES), shape=shapes, seed=seeds, scale=scales, grid=grids)
def test_what_ships_is_what_was_trained_through(codec, dtype, shape, seed, scale, grid):
    random = torch.Generator().manual_seed(seed)
    w = (scale * torch.randn(shape, generator=random)).to(dtype)
    w[torch.rand(shape, generator=random) < 0.1] = 0
    shipped = reload(codec, w, grid=grid)
    assert shipped.dtype == torch.float32
    assert same_bits(shipped.to(dtype), codec.fake_quant(w, grid))


@st.composite
def odd_rows(draw) -> torch.Tensor:
    """Zeros of both signs, denormals, and huge values beside tiny ones."""
    odd = st.floats(-6e4, 6e4, width=32) | st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 6e-8, 65504.0])
    width = draw(st.integers(1, 20))
    return torch.tensor(draw(st.lists(st.lists(odd, min_size=width, max_size=width), min_size=1, max_size=4)))


# A clip beyond float16 is infinite; the rows below leave room for 12.85 standard deviations of it.
ODD = [c for c in CODECS if not isinstance(c, IntRow) or c.sigmas < 12]


@settings(max_examples=500)
@given(codec=st.sampled_from(ODD), w=odd_rows())
def test_odd_values_ship_as_they_were_trained_through(codec, w):
    shipped = reload(codec, w)
    assert same_bits(shipped, codec.fake_quant(w))
    assert torch.isfinite(shipped).all()


def test_weights_beyond_float16_are_not_shipped_as_something_else():
    """Out of the codecs' range both sides say infinity or not a number: no wrong finite value slips in."""
    w = torch.tensor([[1e9, 1.0], [1.0, -2.0]])
    for codec in (c for c in CODECS if not isinstance(c, Ternary)):
        live, shipped = codec.fake_quant(w), reload(codec, w)
        assert torch.equal(live.isfinite(), shipped.isfinite())
        assert not live[0, 0].isfinite()
        assert torch.equal(live[1], shipped[1])


def test_ternary_scales_beyond_float16_ship_as_they_were_trained_through():
    """As its greatest number: a power of a step has no infinity."""
    w = torch.tensor([[1e9, 1.0], [1.0, -2.0]])
    for codec in TERNARY:
        assert same_bits(codec.fake_quant(w), reload(codec, w))
        grid = torch.tensor([0.4, 1.1])
        assert same_bits(codec.fake_quant(w, grid), reload(codec, w, grid=grid))


COMPILERS = ("g++", "clang++", "c++")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
@pytest.mark.parametrize(
    "codec",
    [Half(), IntRow(6), IntRow(6, 12.85), Ternary(16), Ternary(16, 0.02), ROTATED[4], Fp8(), Fp4()],
    ids=lambda c: f"{c.name}-{getattr(c, 'sigmas', '')}",
)
def test_compiled_quantiser_gives_the_same_bits(codec):
    """With make_fast's option: without it the compiler leaves out the rounding to float16."""
    torch._dynamo.reset()
    fast = torch.compile(codec.fake_quant, dynamic=False, options={"emulate_precision_casts": True})
    for scale in (1e-8, 0.02, 300.0):
        w = scale * torch.randn(24, 200, generator=torch.Generator().manual_seed(3))
        assert same_bits(fast(w), codec.fake_quant(w))


# ---- meaning


def test_half_is_float16():
    w = torch.tensor([1.0, 0.1, -3.14159, 1e-9, 65504.0])
    assert Half().fake_quant(w).tolist() == w.half().float().tolist()


def test_integers_by_hand():
    """Step 1.27/127 in float16; a row of zeros stays zero; rounding to the nearest step."""
    w = torch.tensor([[1.27, -0.5, 0.004, 0.006], [0.0, 0.0, 0.0, 0.0]])
    streams = IntRow(8).encode(w)
    assert streams["int8.q"].tolist() == [127, -50, 0, 1, 0, 0, 0, 0]
    assert streams["step"].tolist() == [np.float16(0.01), 1.0]
    assert IntRow(6).encode(w)["int6.q"][:4].tolist() == [31, -12, 0, 0]
    assert IntRow(6).encode(w)["step"][0] == np.float16(1.27 / 31)
    assert IntRow(5).encode(w)["int5.q"][:4].tolist() == [15, -6, 0, 0]


def test_clip_in_standard_deviations_is_k_sigma_over_the_greatest_integer():
    """SDClip: unbiased deviation of the row, 31 at 6 bits; what lies beyond is clipped."""
    w = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 40.0]])
    streams = IntRow(6, 1.5).encode(w)
    assert streams["step"].tolist() == [np.float16(1.5 * math.sqrt(4 / 3) / 31), np.float16(1.5 * 20 / 31)]
    assert streams["int6.q"].tolist() == [18, -18, 18, -18, 0, 0, 0, 31]


def test_one_column_has_no_deviation_and_is_clipped_at_its_maximum():
    assert IntRow(8, 12.0).encode(torch.tensor([[1.27], [-2.54]]))["int8.q"].tolist() == [127, -127]


def test_floor_is_the_least_step():
    """With the naive baseline's floor every row below one has the step 1/127."""
    w = torch.tensor([[0.5, -0.004], [2.54, 0.1]])
    streams = IntRow(8, floor=1 / 127).encode(w)
    assert streams["step"].tolist() == [np.float16(1 / 127), np.float16(0.02)]
    assert streams["int8.q"].tolist() == [64, -1, 127, 5]


def test_percentile_clips_the_largest_weights_of_each_row():
    w = torch.cat([torch.linspace(-1, 1, 101), torch.tensor([9.0])]).repeat(2, 1) * torch.tensor(
        [[1.0], [3.0]]
    )
    streams = IntRow(8, percentile=90.0).encode(w)
    clip = np.quantile(w.abs().numpy(), 0.9, axis=1)
    assert streams["step"].tolist() == (clip / 127).astype(np.float16).tolist()
    assert streams["int8.q"].reshape(2, -1)[:, -1].tolist() == [127, 127]
    assert IntRow(8).encode(w)["step"][0] == np.float16(9 / 127)


@settings(max_examples=50)
@given(seed=seeds, bits=st.sampled_from([5, 6, 7, 8]))
def test_rounding_error_is_at_most_half_a_step(seed, bits):
    w = 0.02 * torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    step = torch.from_numpy(IntRow(bits).encode(w)["step"]).float()[:, None]
    assert ((IntRow(bits).fake_quant(w) - w).abs() <= 0.5 * step * (1 + 2.0**-4)).all()


def test_vector_is_one_row():
    assert IntRow(8).planes((40,)) == {"int8.q": (1, 40, -127, 127), "step": (1, 1, 0, 0)}
    assert IntRow(8).planes((3, 4, 5)) == {"int8.q": (12, 5, -127, 127), "step": (12, 1, 0, 0)}


def test_codecs_are_compared_by_value():
    assert IntRow(8, 0.0, 99.0) == IntRow(8, 0.0, 99.0) != IntRow(8)
    assert Half() == Half()
    lqer = LowRank(IntRow(6), 4, 64, 4)
    named = (Half(), IntRow(6), IntRow(8), lqer, Ternary(64), Ternary(64, 0.02), Fp8(), Fp4())
    assert [c.name for c in named] == [
        "half", "int6", "int8", "int6+lqer4g64b4", "ternary64", "ternary64log0.02", "fp8", "fp4",
    ]  # fmt: skip
    assert Ternary(64, 0.02, True).name == "ternary64rotatedlog0.02"


# ---- ternary


def test_ternary_by_hand():
    """Scale: mean |w| of the group; an entry of exactly half of it is kept, just below is not."""
    w = torch.tensor([[2.0, -0.5, 0.5, -1.0, 0.499, 3.0, -3.0, 1.501]])  # means 1 and 2
    streams = Ternary(4).encode(w)
    assert streams["ternary.q"].tolist() == [1, -1, 1, -1, 0, 1, -1, 1]
    assert streams["ternary.scale"].tolist() == [1.0, 2.0]
    assert Ternary(4).fake_quant(w).tolist() == [[1, -1, 1, -1, 0, 2, -2, 2]]


def test_short_last_group_has_the_scale_of_its_own_entries():
    """Counting the filling would halve it: two entries of a group of four."""
    streams = Ternary(4).encode(torch.tensor([[1.0, 1.0, 1.0, 1.0, 3.0, -1.0]]))
    assert streams["ternary.scale"].tolist() == [1.0, 2.0]
    assert streams["ternary.q"].tolist() == [1, 1, 1, 1, 1, -1]


def test_groups_never_cross_a_row():
    streams = Ternary(4).encode(torch.tensor([[1.0, 1.0, 1.0], [5.0, 5.0, 5.0]]))
    assert streams["ternary.scale"].tolist() == [1.0, 5.0]


def test_least_ternary_scale_is_two_to_the_minus_14():
    """As float16 holds it; groups of zeros and of 1e-8 have no trits."""
    streams = Ternary(2).encode(torch.tensor([[0.0, 0.0, 1e-8, -1e-8, 4e-5, -4e-5]]))
    assert streams["ternary.scale"].tolist() == [2.0**-14] * 3
    assert streams["ternary.q"].tolist() == [0, 0, 0, 0, 1, -1]


def test_ternary_scale_is_rounded_before_its_floor_and_its_threshold():
    """0.1 is 0.0999756 in float16, half of which an entry of 0.04999 passes and of 0.04998 does not."""
    w = torch.tensor([[0.04999, 0.15001], [0.049985, 0.150015]])
    assert Ternary(2).encode(w)["ternary.q"].tolist() == [1, 1, 0, 1]


@settings(max_examples=100)
@given(seed=seeds, step=st.sampled_from([0.02, 0.04, 0.1]), scale=scales)
def test_log_scale_is_within_half_a_step_of_the_true_one(seed, step, scale):
    w = scale * torch.randn(6, 96, generator=torch.Generator().manual_seed(seed))
    _, exact = Ternary(16).parts(w)
    ratio = Ternary(16, step).shipped(exact).double() / exact.double()
    assert (ratio.log2().abs() <= 0.5 * math.log2(1 + step) * (1 + 1e-5)).all()


def test_log_scales_of_a_row_are_its_mean_and_what_differs():
    w = torch.tensor([[1.0, 1.0, 2.0, 2.0, 4.0, 4.0]])
    streams = Ternary(2, 0.5).encode(w)  # powers of 1.5: 1 = 1.5^0, 2 = 1.5^1.71, 4 = 1.5^3.42
    assert streams["ternary.mean"].tolist() == [2]
    assert streams["ternary.rest"].tolist() == [-2, 0, 1]
    assert Ternary(2, 0.5).fake_quant(w).tolist() == [[1, 1, 2.25, 2.25, 3.375, 3.375]]


def test_log_scales_differ_from_their_mean_by_at_most_127():
    """At a step of 0.1 % a factor of 1000 is 6,911 powers: both ends are held at 127 from the mean."""
    w = torch.cat([torch.full((1, 2), 1e-3), torch.ones(1, 2)], 1)
    codec = Ternary(2, 0.001)
    assert codec.encode(w)["ternary.rest"].tolist() == [-127, 127]
    assert same_bits(reload(codec, w), codec.fake_quant(w))


def test_log_scales_leave_the_trits_as_they_are():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    assert (Ternary(16, 0.1).encode(w)["ternary.q"] == Ternary(16).encode(w)["ternary.q"]).all()


# ---- fp8 and fp4


@pytest.mark.parametrize("codec", [Fp8(), Fp4()], ids=repr)
def test_rows_of_zeros_and_of_nearly_nothing_ship_as_numbers(codec):
    """float16(1e-8 / 448) would be zero, and zero by zero is no number (SKC notes 2.2)."""
    w = torch.tensor([[0.0, 0.0], [1e-8, -1e-8], [1e-5, -1e-6]])
    found = reload(codec, w)
    assert found[0].tolist() == [0.0, 0.0]
    assert (found[1].abs() <= 2.0**-24).all()
    assert found[2, 0] == pytest.approx(1e-5, rel=0.06)


def test_fp8_by_hand():
    """Row maximum 448: the numbers of e4m3 themselves; three bits of mantissa, ties to even."""
    w = torch.tensor([[448.0, 1.0625, 1.1875, -17.0, -416.1, 0.0]])
    streams = Fp8().encode(w)
    assert streams["row"].tolist() == [448.0]
    assert Fp8().decode(streams, (1, 6)).tolist() == [[448.0, 1.0, 1.25, -16.0, -416.0, 0.0]]
    assert streams["fp8.q"].view(np.uint8)[:2].tolist() == [0x7E, 0x38]


def test_fp4_by_hand():
    """Units of a seventh of the greatest; both ends at 7."""
    w = torch.tensor([[7.0, -7.0, 1.4, -1.6, 0.4], [0.7, 0.14, -0.16, 0.0, 0.36]])
    streams = Fp4().encode(w)
    assert streams["fp4.q"].tolist() == [7, -7, 1, -2, 0, 7, 1, -2, 0, 4]
    assert streams["row"].tolist() == [7.0, np.float16(0.7)]


def test_row_whose_float16_maximum_is_below_its_own_saturates_instead_of_overflowing():
    top = 1.0004  # float16 has 1.0
    assert Fp8().fake_quant(torch.tensor([[top]])).tolist() == [[1.0]]
    assert Fp4().fake_quant(torch.tensor([[top]])).tolist() == [[1.0]]


# ---- low-rank correction


def numpy_factors(error: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    left, size, right = np.linalg.svd(error.astype(np.float64), full_matrices=False)
    return left[:, :rank] * size[:rank], right[:rank]


def quantised(x: np.ndarray, each: int, low: int, high: int, over: float) -> np.ndarray:
    parts = x.reshape(-1, each)
    scale = (np.abs(parts).max(1, keepdims=True) / over).astype(np.float16).astype(np.float64)
    return (np.clip(np.rint(parts / scale), low, high) * scale).reshape(x.shape)


@pytest.mark.parametrize(
    ("group", "bits", "left", "right"),
    [(8, 4, (48, -2, 1, 1.5), (8, -8, 7, 7.5)), (0, 4, (2, -7, 7, 7), (32, -7, 7, 7)),
     (0, 8, (2, -127, 127, 127), (32, -127, 127, 127)), (48, 4, (2, -7, 7, 7), (32, -7, 7, 7))],
    ids=["asym", "sym", "sym 8 bits", "a group that does not divide falls back"],
)  # fmt: skip
def test_correction_is_the_quantised_svd_of_the_error(group, bits, left, right):
    """A and B of the error's two greatest singular values; the product A B is the same for either sign."""
    w = torch.randn(24, 32, generator=torch.Generator().manual_seed(5))
    base, codec = IntRow(5), LowRank(IntRow(5), 2, group, bits)
    held = base.fake_quant(w)
    a, b = numpy_factors((w - held).numpy(), 2)
    found = reload(codec, w)
    by_hand = [
        held.numpy() + quantised(a * signs, *left) @ quantised(b * signs[:, None], *right)
        for signs in map(np.array, itertools.product((1, -1), repeat=2))
    ]
    assert min(np.abs(found.numpy() - want).max() for want in by_hand) < 1e-5


def test_correction_lowers_the_error_and_more_rank_lowers_it_more():
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(6))
    ranks = [(reload(LowRank(IntRow(4), r, 0, 8), w) - w).norm() for r in (1, 4, 16, 64)]
    assert (IntRow(4).fake_quant(w) - w).norm() > ranks[0] > ranks[1] > ranks[2] > ranks[3]


def test_correction_of_a_matrix_smaller_than_its_rank_has_as_much_rank_as_there_is():
    codec = LowRank(IntRow(4), 4, 0, 8)
    w = torch.randn(2, 30, generator=torch.Generator().manual_seed(7))
    assert codec.planes((2, 30))["lqer.b"] == (2, 30, -127, 127)
    assert (reload(codec, w) - w).abs().max() < 0.02


def test_correction_of_no_error_is_nothing():
    w = torch.tensor([[127.0, -3.0], [5.0, 127.0]])
    assert torch.equal(reload(LowRank(IntRow(8), 2, 4, 4), w), w)


# ---- GPTQ


def correlated(rows: int, cols: int, seed: int, spread: float = 1.0):
    """Weights, and the sum of x x' over inputs that share a few directions."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * cols, cols, generator=random) + 2 * torch.randn(
        4 * cols, 3, generator=random
    ) @ torch.randn(3, cols, generator=random)
    x *= torch.logspace(0, spread, cols)[torch.randperm(cols, generator=random)]
    return torch.randn(rows, cols, generator=random), x.T @ x


def naive_gptq(w, step, top, h) -> np.ndarray:
    """One column after another in float64, the inverse of what is left made anew each time (OBQ order)."""
    w, h = w.double().numpy().copy(), h.double().numpy().copy()
    dead = np.diag(h) == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    h[np.diag_indices_from(h)] += 0.01 * np.diag(h).mean()
    left = sorted(range(len(h)), key=lambda j: (-h[j, j], j))
    q = np.zeros_like(w)
    step = step.double().numpy()[:, 0]
    while left:
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        j = left[0]
        q[:, j] = np.clip(np.rint(w[:, j] / step), -top, top)
        error = (w[:, j] - q[:, j] * step) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return q


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bits", [4, 6])
def test_gptq_is_the_papers(seed, bits):
    w, h = correlated(7, 20, seed)
    codec = IntRow(bits, 4.0)
    found = gptq(w, codec.step(w), codec.top, h).numpy()
    np.testing.assert_array_equal(found, naive_gptq(w, codec.step(w), codec.top, h))


def test_gptq_over_several_blocks_is_the_papers():
    """300 columns are blocks of 128, 128 and 44; float32 may tip a value that lies between two integers."""
    w, h = correlated(4, 300, 11)
    codec = IntRow(4, 3.0)
    found = gptq(w, codec.step(w), codec.top, h).numpy()
    want = naive_gptq(w, codec.step(w), codec.top, h)
    assert (found != want).mean() < 0.01
    assert not found.any(0).all() or np.abs(found - want).max() <= 1


def loss_of(w, h, integers, step) -> float:
    error = (w - integers * step).double()
    return float(torch.einsum("ri,ij,rj->", error, h.double(), error))


@settings(max_examples=40)
@given(seed=seeds, bits=st.sampled_from([4, 5, 6]), cols=st.sampled_from([24, 130]))
def test_gptq_errs_less_where_inputs_are_correlated(seed, bits, cols):
    w, h = correlated(8, cols, seed)
    codec = IntRow(bits, 6.0)
    step, plain = codec.step(w), torch.from_numpy(codec.encode(w)[f"int{bits}.q"]).view(8, cols)
    assert loss_of(w, h, gptq(w, step, codec.top, h), step) < 0.9 * loss_of(w, h, plain, step)


def test_gptq_is_round_to_nearest_where_inputs_are_independent_and_alike():
    w, codec = correlated(8, 300, 2)[0], IntRow(6, 10.0)
    found = codec.encode(w, 7.0 * torch.eye(300))
    assert (found["int6.q"] == codec.encode(w)["int6.q"]).all()


def test_column_that_never_saw_an_input_becomes_zero():
    w, h = correlated(6, 20, 3)
    h[[4, 17]], h[:, [4, 17]] = 0.0, 0.0
    q = gptq(w, IntRow(6).step(w), 31, h)
    assert not q[:, [4, 17]].any()
    assert q.any(0).sum() == 18


def test_calibration_that_saw_nothing_at_all_is_zero_and_no_error():
    w = torch.randn(3, 5)
    assert not gptq(w, IntRow(6).step(w), 31, torch.zeros(5, 5)).any()


def test_columns_in_another_order_give_the_same_integers_in_that_order():
    """The most active column goes first, wherever it stands."""
    w, h = correlated(5, 150, 4)
    step, order = IntRow(5).step(w), torch.randperm(150, generator=torch.Generator().manual_seed(1))
    one = gptq(w, step, 15, h)
    other = gptq(w[:, order], step, 15, h[order][:, order])
    assert (one[:, order] != other).float().mean() < 0.01


def test_gptq_touches_neither_weights_nor_hessian():
    w, h = correlated(5, 20, 5)
    before = w.clone(), h.clone()
    gptq(w, IntRow(5).step(w), 15, h)
    assert torch.equal(w, before[0]) and torch.equal(h, before[1])


@settings(max_examples=30)
@given(seed=seeds, bits=st.sampled_from([5, 8]), cols=st.sampled_from([1, 9, 140]))
def test_what_gptq_ships_is_its_integers_times_the_step(seed, bits, cols):
    w, h = correlated(6, cols, seed)
    codec = IntRow(bits, 5.0)
    step = codec.step(w)
    want = gptq(w, step, codec.top, h) * step
    assert same_bits(reload(codec, w, h), want)
    assert want.abs().max() <= codec.top * step.max()


# ---- straight through


@pytest.mark.parametrize(
    "codec",
    [Half(), IntRow(6), IntRow(8, 0.0, 60.0), IntRow(6, 3.0), *TERNARY[3:5], *ROTATED[2:4], Fp8(), Fp4()],
    ids=repr,
)
def test_gradient_passes_the_quantiser_unchanged(codec):
    """And its value is not touched: w + (q - w), the usual way, is not q where a weight was clipped far."""
    w = torch.randn(64, 300)
    w[:, 0] *= 1e4
    w.requires_grad_()
    quantised, g = codec.fake_quant(w), torch.randn(64, 300)
    assert torch.equal(quantised, codec.fake_quant(w.detach()))
    assert not torch.equal(quantised, w)
    quantised.backward(g)
    assert same_bits(w.grad, g)


def test_weight_is_not_aliased_by_its_quantised_form():
    w = torch.ones(3, requires_grad=True)
    value = torch.zeros(3)
    out = through(w, value)
    out.data.add_(1)
    assert value.tolist() == [0, 0, 0]


# --------------------------------------------------------------------------------------
# The container
# --------------------------------------------------------------------------------------

HEADER, PAYLOAD = b'{"a":1}', bytes(range(40))
BLOB = pack_container(b"PGLM", 1, HEADER, PAYLOAD)


def open_blob(blob: bytes):
    return unpack_container(blob, b"PGLM", 1, "the file")


def test_container_holds_header_and_payload():
    header, payload = open_blob(BLOB)
    assert (header, bytes(payload)) == (HEADER, PAYLOAD)
    assert open_blob(pack_container(b"PGLM", 1, b"", b"")) == (b"", b"")


def test_container_is_laid_out_as_written_down():
    """Magic, version, 16 bytes of sha256 over the rest, length of the header, header, payload."""
    rest = (7).to_bytes(4, "little") + HEADER + PAYLOAD
    assert b"PGLM\x01" + hashlib.sha256(rest).digest()[:16] + rest == BLOB


def test_container_is_the_same_every_time():
    assert pack_container(b"PGLM", 1, HEADER, PAYLOAD) == BLOB
    assert len({pack_container(b"PGLM", v, h, PAYLOAD) for v in (1, 2) for h in (HEADER, b"{}")}) == 4


def test_every_flipped_bit_is_noticed():
    for at, bit in itertools.product(range(len(BLOB)), range(8)):
        damaged = bytearray(BLOB)
        damaged[at] ^= 1 << bit
        with pytest.raises(UserError, match="the file"):
            open_blob(bytes(damaged))


def test_every_missing_or_added_byte_is_noticed():
    for length in range(len(BLOB)):
        with pytest.raises(UserError, match="the file"):
            open_blob(BLOB[:length])
    with pytest.raises(UserError, match="truncated or damaged"):
        open_blob(BLOB + b"\0")


@settings(max_examples=300)
@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda tail: BLOB[:25] + tail))
def test_any_other_bytes_are_refused_in_words(blob):
    with pytest.raises(UserError, match="the file"):
        open_blob(blob)


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (b"PK\x03\x04" + BLOB[4:], r"is not one of ours: it begins with b'PK"),
        (b"PGLM\x02" + BLOB[5:], "has format version 2, this program reads 1"),
        (BLOB[:-1], "is truncated or damaged"),
        (b"", "is not one of ours"),
    ],
)
def test_refusal_says_what_is_wrong(blob, words):
    with pytest.raises(UserError, match=words):
        open_blob(blob)
