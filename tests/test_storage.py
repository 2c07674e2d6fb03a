"""Storage: decode(encode(w)) is fake_quant(w) bit for bit; a damaged container is refused in words."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import Half, IntRow, UserError, pack_container, through, unpack_container

CODECS = [
    Half(),
    *(IntRow(b, p, f) for b, p, f in itertools.product((6, 8), (100.0, 99.99984, 95.0), (0.0, 1 / 127))),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
shapes = st.one_of(
    st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 12), st.integers(1, 40)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9)),
)  # fmt: skip

codecs, seeds = st.sampled_from(CODECS), st.integers(0, 2**32 - 1)
scales = st.sampled_from([1e-8, 1e-6, 1e-3, 0.02, 1.0, 300.0])


def reload(codec, w: torch.Tensor) -> torch.Tensor:
    """Through the bytes of the artifact and back, by nothing but the shape."""
    stored = {name: values.tobytes() for name, values in codec.encode(w).items()}
    sizes = codec.sizes(tuple(w.shape))
    assert {name: len(blob) for name, blob in stored.items()} == {
        name: count * np.dtype(dtype).itemsize for name, (dtype, count) in sizes.items()
    }
    streams = {name: np.frombuffer(blob, sizes[name][0]) for name, blob in stored.items()}
    return codec.decode(streams, tuple(w.shape))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, the sign of a zero included."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.view(torch.uint8).equal(b.view(torch.uint8))


@settings(max_examples=500)
@given(codec=codecs, dtype=st.sampled_from(DTYPES), shape=shapes, seed=seeds, scale=scales)
def test_what_ships_is_what_was_trained_through(codec, dtype, shape, seed, scale):
    random = torch.Generator().manual_seed(seed)
    w = (scale * torch.randn(shape, generator=random)).to(dtype)
    w[torch.rand(shape, generator=random) < 0.1] = 0
    shipped = reload(codec, w)
    assert shipped.dtype == torch.float32
    assert same_bits(shipped.to(dtype), codec.fake_quant(w))


@st.composite
def odd_rows(draw) -> torch.Tensor:
    """Zeros of both signs, denormals, and huge values beside tiny ones."""
    odd = st.floats(-6e4, 6e4, width=32) | st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 6e-8, 65504.0])
    width = draw(st.integers(1, 20))
    return torch.tensor(draw(st.lists(st.lists(odd, min_size=width, max_size=width), min_size=1, max_size=4)))


@settings(max_examples=500)
@given(codec=codecs, w=odd_rows())
def test_odd_values_ship_as_they_were_trained_through(codec, w):
    shipped = reload(codec, w)
    assert same_bits(shipped, codec.fake_quant(w))
    assert torch.isfinite(shipped).all()


def test_weights_beyond_float16_are_not_shipped_as_something_else():
    """Out of the codecs' range both sides say infinity or not a number: no wrong finite value slips in."""
    w = torch.tensor([[1e9, 1.0], [1.0, -2.0]])
    for codec in CODECS:
        live, shipped = codec.fake_quant(w), reload(codec, w)
        assert torch.equal(live.isfinite(), shipped.isfinite())
        assert not live[0, 0].isfinite()
        assert torch.equal(live[1], shipped[1])


# ---- meaning


def test_half_is_float16():
    w = torch.tensor([1.0, 0.1, -3.14159, 1e-9, 65504.0])
    assert Half().fake_quant(w).tolist() == w.half().float().tolist()


def test_integers_by_hand():
    """Step 1.27/127 in float16; a row of zeros stays zero; rounding to the nearest step."""
    w = torch.tensor([[1.27, -0.5, 0.004, 0.006], [0.0, 0.0, 0.0, 0.0]])
    streams = IntRow(8).encode(w)
    assert streams["q"].tolist() == [127, -50, 0, 1, 0, 0, 0, 0]
    assert streams["step"].tolist() == [np.float16(0.01), 1.0]
    assert IntRow(6).encode(w)["q"][:4].tolist() == [31, -12, 0, 0]
    assert IntRow(6).encode(w)["step"][0] == np.float16(1.27 / 31)


def test_floor_is_the_least_step():
    """With the naive baseline's floor every row below one has the step 1/127."""
    w = torch.tensor([[0.5, -0.004], [2.54, 0.1]])
    streams = IntRow(8, floor=1 / 127).encode(w)
    assert streams["step"].tolist() == [np.float16(1 / 127), np.float16(0.02)]
    assert streams["q"].tolist() == [64, -1, 127, 5]


def test_percentile_clips_the_largest_weights_of_each_row():
    w = torch.cat([torch.linspace(-1, 1, 101), torch.tensor([9.0])]).repeat(2, 1) * torch.tensor(
        [[1.0], [3.0]]
    )
    streams = IntRow(8, percentile=90.0).encode(w)
    clip = np.quantile(w.abs().numpy(), 0.9, axis=1)
    assert streams["step"].tolist() == (clip / 127).astype(np.float16).tolist()
    assert streams["q"].reshape(2, -1)[:, -1].tolist() == [127, 127]
    assert IntRow(8).encode(w)["step"][0] == np.float16(9 / 127)


@settings(max_examples=50)
@given(seed=seeds, bits=st.sampled_from([6, 8]))
def test_rounding_error_is_at_most_half_a_step(seed, bits):
    w = 0.02 * torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    step = torch.from_numpy(IntRow(bits).encode(w)["step"]).float()[:, None]
    assert ((IntRow(bits).fake_quant(w) - w).abs() <= 0.5 * step * (1 + 2.0**-4)).all()


def test_vector_is_one_row():
    assert IntRow(8).sizes((40,)) == {"q": ("|i1", 40), "step": ("<f2", 1)}
    assert IntRow(8).sizes((3, 4, 5)) == {"q": ("|i1", 60), "step": ("<f2", 3)}


def test_codecs_are_compared_by_value():
    assert IntRow(8, 99.0) == IntRow(8, 99.0) != IntRow(8)
    assert Half() == Half()
    assert [c.name for c in (Half(), IntRow(6), IntRow(8))] == ["half", "int6", "int8"]


# ---- straight through


@pytest.mark.parametrize("codec", [Half(), IntRow(6), IntRow(8, 60.0)], ids=repr)
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
