"""Data: shards -> the same tokens for any number of ranks; tokens -> bytes of source text."""

import json
import math
import threading

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import make_shards, tiny_env, toy_documents, write_shard
from train_gpt import (
    DocumentSpans,
    Journal,
    Loader,
    Shards,
    StreamSpans,
    Tokenizer,
    UserError,
    Validation,
    World,
    list_shards,
    load_tokenizer,
    packed,
    read_config,
    read_header,
    segment_bounds,
)

BOS = 1


def config(folder, **knobs):
    return read_config(tiny_env(DATA_PATH=folder, **knobs))


def place(rank: int, size: int) -> World:
    """One rank among others that exist only on paper: the loader asks for nothing else."""
    return World(rank, size, torch.device("cpu"), torch.float32, False, Journal(None), ".")


def ids_of(path) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), "<u2", offset=1024)


def batch_rows(batch) -> np.ndarray:
    """Inputs and targets side by side, without the shape of the batch."""
    return np.stack([batch.tokens.flatten().numpy(), batch.targets.flatten().numpy()])


# --------------------------------------------------------------------------------------
# Shards
# --------------------------------------------------------------------------------------


def test_header_gives_the_number_of_tokens(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(77))
    assert read_header(tmp_path / "a.bin") == 77


def corrupt(name: str, blob: bytes) -> bytes:
    words = np.frombuffer(blob[:1024], "<i4").copy()
    words[{"magic": 0, "version": 1}.get(name, 255)] += 1
    return {
        "magic": words.tobytes() + blob[1024:], "version": words.tobytes() + blob[1024:],
        "cut by a token": blob[:-2], "cut by a byte": blob[:-1], "cut in the header": blob[:100],
        "longer": blob + b"\0\0", "empty": b"", "text": b"<html>not found</html>" * 100,
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("magic", "not a token shard: magic 20240521, want 20240520"), ("version", "shard version 2, want 1"),
        ("cut by a token", "truncated or padded: 1176 bytes, its header says 1178"),
        ("cut by a byte", "truncated or padded"), ("longer", "truncated or padded"),
        ("cut in the header", "not a token shard"), ("empty", "not a token shard: magic absent"),
        ("text", "not a token shard"),
    ],
)  # fmt: skip
def test_damaged_shard_is_named_with_its_damage(tmp_path, damage, words):
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, np.arange(77))
    path.write_bytes(corrupt(damage, path.read_bytes()))
    with pytest.raises(UserError, match=words) as found:
        Shards(tmp_path, "train", 320)
    assert str(path) in str(found.value)


def test_shards_are_read_in_the_order_of_their_names_without_sidecars(tmp_path):
    for i, number in enumerate((10, 2, 0)):
        write_shard(tmp_path / f"fineweb_val_{number:06d}.bin", np.full(5, 10 + i))
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", np.full(5, 99))
    write_shard(tmp_path / "fineweb_train_000000.bin", np.full(5, 98))
    shards = Shards(tmp_path, "val", 320)
    assert shards.take(0, shards.total).tolist() == [12] * 5 + [11] * 5 + [10] * 5


@pytest.mark.parametrize("make", ["nothing", "empty folder", "empty validation"])
def test_missing_data_is_named_with_the_command_that_makes_it(tmp_path, make):
    folder = tmp_path / "data"
    if make != "nothing":
        folder.mkdir()
    if make == "empty validation":
        write_shard(folder / "fineweb_val_000000.bin", np.array([1]))
    with pytest.raises(UserError, match=r"prepare") as found:
        list_shards(folder, "val")
    assert str(folder) in str(found.value)


SIZES = (50, 0, 7, 1, 33)


@pytest.fixture(scope="module")
def five_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("five")
    make_shards(folder, train=(), val=())
    ids = np.random.default_rng(5).integers(0, 320, sum(SIZES))
    for i, part in enumerate(np.split(ids, np.cumsum(SIZES)[:-1])):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", part)
    return Shards(folder, "train", 320), ids


@settings(max_examples=200)
@given(start=st.integers(0, 400), count=st.integers(1, 300))
def test_tokens_run_over_the_edges_of_shards_and_around_the_end(five_shards, start, count):
    shards, ids = five_shards
    assert shards.take(start, count).tolist() == ids[(start + np.arange(count)) % len(ids)].tolist()


def test_every_edge_between_shards_is_crossed(five_shards):
    shards, ids = five_shards
    for start in range(len(ids)):
        assert shards.take(start, 2).tolist() == [ids[start], ids[(start + 1) % len(ids)]]


def test_token_beyond_the_vocabulary_is_refused_when_its_shard_is_touched(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", np.arange(10))
    write_shard(tmp_path / "fineweb_train_000001.bin", np.array([3, 320, 5]))
    shards = Shards(tmp_path, "train", 320)
    assert shards.take(0, 10).tolist() == list(range(10))
    with pytest.raises(UserError, match=r"000001.bin holds token id 320, beyond VOCAB_SIZE=320"):
        shards.take(9, 2)
    assert Shards(tmp_path, "train", 321).take(9, 4).tolist() == [9, 3, 320, 5]


def test_shard_is_opened_and_checked_once(tmp_path, monkeypatch):
    make_shards(tmp_path, train=(100, 100))
    opened, real = [], np.memmap
    monkeypatch.setattr(np, "memmap", lambda path, **kw: opened.append(path.name) or real(path, **kw))
    shards = Shards(tmp_path, "train", 320)
    assert opened == []
    for start in (0, 50, 90, 150, 0):
        shards.take(start, 60)
    assert opened == ["fineweb_train_000000.bin", "fineweb_train_000001.bin"]


def test_fingerprint_tells_names_sizes_and_beginnings_apart(tmp_path):
    prints = []
    for name, size, first in (("000000", 50, 0), ("000000", 51, 0), ("000001", 50, 0), ("000000", 50, 7)):
        folder = tmp_path / f"{name}_{size}_{first}"
        folder.mkdir()
        write_shard(folder / f"fineweb_train_{name}.bin", first + np.arange(size))
        prints.append(Shards(folder, "train", 320).fingerprint())
        assert Shards(folder, "train", 320).fingerprint() == prints[-1]
    assert len(set(prints)) == 4


# --------------------------------------------------------------------------------------
# Spans
# --------------------------------------------------------------------------------------


def test_stream_spans_are_the_stream_cut_without_gap_or_overlap(five_shards):
    shards, ids = five_shards
    cfg = config(".", TRAIN_BATCH_TOKENS=40, TRAIN_SPANS=4, TRAIN_SEQ_LEN=10)
    spans = StreamSpans(shards, cfg)
    found = np.concatenate([spans.span(step, i) for step in range(6) for i in range(4)])
    assert found.tolist() == np.resize(ids, 6 * 4 * 11).tolist()


def test_stream_shorter_than_a_span_is_refused(five_shards):
    shards, _ = five_shards
    cfg = config(".", TRAIN_BATCH_TOKENS=92, TRAIN_SPANS=1, TRAIN_SEQ_LEN=92)
    with pytest.raises(UserError, match=r"hold 91 tokens, a span of .* needs 93"):
        StreamSpans(shards, cfg)


def naive_documents(shards: list[np.ndarray], spans: int, length: int) -> list[np.ndarray]:
    """Record 1855's loader in its own words: a cursor from the first BOS, and the next shard when short."""
    found = []
    for shard in shards:
        cursor = shard.tolist().index(BOS)
        while cursor + spans * length <= len(shard):
            found += [shard[cursor + r * length : cursor + (r + 1) * length] for r in range(spans)]
            cursor += spans * length
    return found


@pytest.mark.parametrize("spans", [1, 2, 8])
def test_document_spans_begin_at_a_shards_first_bos_and_never_leave_it(tmp_path, spans):
    rng, shards = np.random.default_rng(spans), []
    for i, (size, first) in enumerate([(500, 0), (333, 7), (90, 80), (257, 1)]):
        ids = rng.integers(4, 320, size)
        ids[rng.random(size) < 0.05] = BOS
        ids[:first], ids[first] = 9, BOS
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", ids)
        shards.append(ids)
    cfg = config(tmp_path, TRAIN_BATCH_TOKENS=16 * spans, TRAIN_SPANS=spans, DOC_PACKING=1)
    source = DocumentSpans(Shards(tmp_path, "train", 320), cfg, BOS)
    want = naive_documents(shards, spans, 17)
    steps = len(want) // spans
    found = [source.span(step, i).tolist() for step in range(2 * steps) for i in range(spans)]
    assert found == [span.tolist() for span in want] * 2
    assert {span[0] for span in found[::spans]} >= {BOS}


def document_spans(folder, ids: np.ndarray, tokens: int) -> DocumentSpans:
    write_shard(folder / "fineweb_train_000001.bin", ids)
    cfg = config(folder, TRAIN_BATCH_TOKENS=tokens, TRAIN_SPANS=1, TRAIN_SEQ_LEN=8, DOC_PACKING=1)
    return DocumentSpans(Shards(folder, "train", 320), cfg, BOS)


def test_shard_without_documents_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"000001.bin has no BOS token \(id 1\)"):
        document_spans(tmp_path, np.full(100, 7), 8)


def test_empty_shard_among_documents_is_refused_by_name(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", np.array([], int))
    with pytest.raises(UserError, match=r"000000\.bin"):
        document_spans(tmp_path, np.full(100, BOS), 8)


def test_shards_shorter_than_a_step_are_refused(tmp_path):
    with pytest.raises(UserError, match="no training shard holds the 65 tokens of one step"):
        document_spans(tmp_path, np.full(64, BOS), 64)
    assert document_spans(tmp_path, np.full(65, BOS), 64).ends == [1]


# --------------------------------------------------------------------------------------
# Packing
# --------------------------------------------------------------------------------------


def naive_bounds(rows: list[list[int]], longest: int) -> list[int]:
    """Starts of segments, token by token: at a row, at a BOS, and when the segment is full."""
    starts, at, held = [], 0, 0
    for row in rows:
        for i, token in enumerate(row[:-1]):
            if i == 0 or token == BOS or held == longest:
                starts.append(at)
                held = 0
            at, held = at + 1, held + 1
    return starts


@settings(max_examples=200)
@given(
    rows=st.integers(1, 4).flatmap(
        lambda n: st.integers(2, 150).flatmap(
            lambda length: st.lists(
                st.lists(st.sampled_from([BOS, 5, 6, 7]), min_size=length, max_size=length),
                min_size=n, max_size=n,
            )
        )
    ),
    longest=st.integers(1, 40),
)  # fmt: skip
def test_segments_are_documents_cut_at_rows_and_at_the_longest(rows, longest):
    batch = packed([np.array(row) for row in rows], BOS, longest)
    n = sum(len(row) - 1 for row in rows)
    bounds, starts = batch.docs.tolist(), naive_bounds(rows, longest)
    assert bounds[: len(starts)] == starts
    assert set(bounds[len(starts) :]) == {n}
    assert len(bounds) % 64 == 0
    assert len(bounds) - len(starts) <= 64
    assert batch.tokens.tolist() == [[t for row in rows for t in row[:-1]]]
    assert batch.targets.tolist() == [[t for row in rows for t in row[1:]]]
    assert (batch.docs.dtype, batch.tokens.dtype) == (torch.int32, torch.int64)


def test_text_that_begins_inside_a_document_is_a_segment_too():
    assert segment_bounds(np.array([5, 6, BOS, 7]), BOS, 8) == [0, 2]


# --------------------------------------------------------------------------------------
# The loader
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, train=(3_000, 2_100), val=(700,))
    return folder


@pytest.fixture
def loader():
    """Makes loaders, and closes them after the test."""
    made = []

    def make(folder, rank=0, size=1, **knobs):
        made.append(Loader(config(folder, **knobs), place(rank, size), BOS))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Numbered:
    """Spans that say which they are: step and index in place of tokens."""

    def __init__(self, length: int):
        self.length = length

    def span(self, step: int, index: int) -> np.ndarray:
        return np.arange(self.length) + self.length * (8 * step + index)


def test_any_ranks_and_micro_batches_see_the_tokens_of_one_rank_in_its_order(shards_folder, loader):
    """10,000 random steps: all ranks' micro-batches, laid side by side, are the spans in order."""
    shapes = [(size, accum) for size in (1, 2, 4, 8) for accum in (1, 2, 4, 8) if size * accum <= 8]
    loaders = {(s, a): [loader(shards_folder, r, s, GRAD_ACCUM_STEPS=a) for r in range(s)] for s, a in shapes}
    length = 33
    for one in (one for group in loaders.values() for one in group):
        one.spans = Numbered(length)
    rng = np.random.default_rng(0)
    for _ in range(10_000):
        shape, step = shapes[rng.integers(len(shapes))], int(rng.integers(1_000_000))
        ranks = [one.host_batches(step) for one in loaders[shape]]
        assert {len(micro) for micro in ranks} == {shape[1]}
        found = [batch.tokens.flatten() for micro in zip(*ranks, strict=True) for batch in micro]
        spans = [Numbered(length).span(step, i)[:-1] for i in range(8)]
        assert np.array_equal(torch.cat(found).numpy(), np.concatenate(spans))


@pytest.mark.parametrize("packing", [0, 1])
def test_ranks_and_micro_batches_share_real_steps(shards_folder, loader, packing):
    alone = loader(shards_folder, GRAD_ACCUM_STEPS=1, DOC_PACKING=packing)
    ranks = [loader(shards_folder, r, 4, GRAD_ACCUM_STEPS=2, DOC_PACKING=packing) for r in range(4)]
    for step in (0, 1, 19, 40):
        whole = batch_rows(alone.host_batches(step)[0])
        parts = [one.host_batches(step) for one in ranks]
        found = np.concatenate([batch_rows(parts[r][m]) for m in range(2) for r in range(4)], 1)
        assert np.array_equal(found, whole)


def test_targets_are_the_tokens_that_follow(shards_folder, loader):
    batch = loader(shards_folder, GRAD_ACCUM_STEPS=1).host_batches(0)[0]
    stream = np.concatenate([ids_of(p) for p in sorted(shards_folder.glob("fineweb_train_*"))]).astype(int)
    assert batch.tokens.shape == batch.targets.shape == (8, 32)
    for row in range(8):
        assert batch.tokens[row].tolist() == stream[row * 33 : row * 33 + 32].tolist()
        assert batch.targets[row].tolist() == stream[row * 33 + 1 : row * 33 + 33].tolist()


@pytest.mark.parametrize("packing", [0, 1])
def test_prepared_steps_equal_asked_for_steps(shards_folder, loader, packing):
    threaded, direct = (loader(shards_folder, DOC_PACKING=packing) for _ in range(2))
    for step in (0, 1, 2, 3, 9, 4, 4, 5):
        for found, want in zip(threaded.batches(step), direct.host_batches(step), strict=True):
            assert torch.equal(found.tokens, want.tokens)
            assert torch.equal(found.targets, want.targets)
            assert (found.docs is None and want.docs is None) or torch.equal(found.docs, want.docs)


@pytest.mark.parametrize("packing", [0, 1])
def test_no_prepared_step_writes_over_an_earlier_one(shards_folder, loader, packing):
    """Copies of earlier ones may still be under way: each step has memory of its own."""
    one, direct = (loader(shards_folder, DOC_PACKING=packing) for _ in range(2))
    kept = []
    for step in range(5):
        kept.append(one.batches(step))
        one.ready[step + 1].result()
    for step, batches in enumerate(kept):
        for found, want in zip(batches, direct.host_batches(step), strict=True):
            assert torch.equal(found.tokens, want.tokens) and torch.equal(found.targets, want.targets)
    places = [batch.tokens.data_ptr() for batches in kept for batch in batches]
    assert len({*places}) == len(places)


@pytest.mark.parametrize("packing", [0, 1])
def test_batches_are_cast_on_the_host_and_copied_once(shards_folder, loader, packing, monkeypatch):
    one = loader(shards_folder, DOC_PACKING=packing)
    host = one.host_batches(0)
    assert {t.dtype for b in host for t in (b.tokens, b.targets)} == {torch.int64}
    calls, real = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: calls.append((a, k)) or real(t, *a, **k))
    batches = one.batches(0)
    tensors = [t for batch in batches for t in batch if t is not None]
    assert calls == [((one.world.device,), {"non_blocking": True})] * len(tensors)
    assert len(tensors) == (2 + packing) * len(batches)


def test_next_step_is_prepared_by_a_thread_meanwhile(shards_folder, loader):
    one = loader(shards_folder)
    threads, real = [], one.host_batches
    one.host_batches = lambda step: threads.append((step, threading.current_thread().name)) or real(step)
    one.batches(7)
    one.ready[8].result()
    one.batches(8)
    assert [step for step, _ in threads[:2]] == [7, 8]
    assert all(name.startswith("loader") for _, name in threads)


def test_bad_token_found_by_the_thread_stops_the_run(tmp_path, loader):
    write_shard(tmp_path / "fineweb_train_000000.bin", np.full(5_000, 320))
    with pytest.raises(UserError, match="token id 320"):
        loader(tmp_path).batches(0)


# --------------------------------------------------------------------------------------
# Bytes
# --------------------------------------------------------------------------------------


def tokenizer_of(path, vocab: int) -> Tokenizer:
    return load_tokenizer(config(".", TOKENIZER_PATH=path, VOCAB_SIZE=vocab))


def counted(tokenizer: Tokenizer, ids: list[int]) -> int:
    ids = np.array(ids)
    return int(tokenizer.count_bytes(ids[:-1], ids[1:]).sum())


@pytest.fixture(scope="module")
def toy_tokenizer(toy_data):
    return tokenizer_of(toy_data.tokenizer, toy_data.vocab)


# Letters first, then drawn: st.text over both alphabets in one would draw a common letter once in 2,500.
LETTERS = st.sampled_from("etaoin  shrdlu.,0123") | st.characters(codec="utf-8")
TEXTS = st.lists(LETTERS, max_size=60).map("".join)


@settings(max_examples=150)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_counted_bytes_are_those_of_the_decoded_text(toy_data, toy_tokenizer, texts):
    """Documents of any characters, one after another: each from its BOS on."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(toy_data.tokenizer))
    documents = [sp.encode(text) for text in texts]
    want = sum(len(sp.decode(ids).encode()) for ids in documents)
    assert counted(toy_tokenizer, [BOS, *(i for ids in documents for i in (*ids, BOS))]) == want


def test_counted_bytes_are_those_of_toy_documents(toy_data, toy_tokenizer):
    sp = sentencepiece.SentencePieceProcessor(model_file=str(toy_data.tokenizer))
    for text in toy_documents(30, seed=5):
        assert counted(toy_tokenizer, [BOS, *sp.encode(text)]) == len(text.encode())


@pytest.mark.parametrize("vocab", [1024, 8192])
def test_counted_bytes_are_those_of_real_documents(shared_data, vocab):
    path = shared_data / "tokenizers" / f"fineweb_{vocab}_bpe.model"
    tokenizer = tokenizer_of(path, vocab)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    lines = (shared_data / "fineweb_docs_100.jsonl").read_text().splitlines()
    total = 0
    for text in (json.loads(line)["text"] for line in lines):
        ids = sp.encode(text)
        assert counted(tokenizer, [BOS, *ids]) == len(sp.decode(ids).encode())
        total += counted(tokenizer, [BOS, *ids])
    assert len(lines) == 100
    assert total > 700_000


def test_byte_rules_are_those_of_the_challenge(toy_data, toy_tokenizer):
    """Control pieces cost nothing; a byte piece one; a leading space one more unless a document begins."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(toy_data.tokenizer))
    word, letter, smile = (sp.piece_to_id(piece) for piece in ("▁w", "t", "🙂"))
    assert 3 not in {word, letter, smile}
    spaced = {(BOS, word): 1, (3, word): 1, (letter, word): 2, (word, word): 2, (4, word): 2}
    others = {
        (letter, BOS): 0,
        (letter, 3): 0,
        (letter, 4): 1,
        (BOS, 259): 1,
        (BOS, smile): 4,
        (word, letter): 1,
    }
    assert {pair: counted(toy_tokenizer, list(pair)) for pair in spaced | others} == spaced | others
    assert toy_tokenizer.bos == BOS
    assert toy_tokenizer.file_bytes == toy_data.tokenizer.stat().st_size


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"TOKENIZER_PATH": "nowhere.model"}, "TOKENIZER_PATH=nowhere.model does not exist"),
        ({"TOKENIZER_PATH": __file__}, "is not a SentencePiece model"),
        ({"VOCAB_SIZE": 321}, "VOCAB_SIZE=321, but .* has 320 pieces; set VOCAB_SIZE=320"),
    ],
)
def test_tokenizer_that_cannot_serve_is_refused(toy_data, knobs, words):
    with pytest.raises(UserError, match=words):
        load_tokenizer(read_config(tiny_env() | toy_data.env | {k: str(v) for k, v in knobs.items()}))


# --------------------------------------------------------------------------------------
# Validation
# --------------------------------------------------------------------------------------

SPELLED = Tokenizer(  # ids 0, BOS, "a", "▁", "▁be", three-byte letter
    BOS, np.array([0, 0, 1, 0, 2, 3]), np.array([0, 0, 0, 1, 1, 0], bool), np.array([1, 1, 0, 0, 0, 0], bool),
    0, str,
)  # fmt: skip
STREAM = [BOS, 4, 2, 4, 5, BOS, 2, 2]


def validation(folder, **knobs) -> Validation:
    write_shard(folder / "fineweb_val_000000.bin", np.array(STREAM[:3]))
    write_shard(folder / "fineweb_val_000001.bin", np.array(STREAM[3:]))
    return Validation(config(folder, VOCAB_SIZE=6, **knobs), SPELLED)


def test_every_token_but_the_first_is_a_target(tmp_path):
    val = validation(tmp_path)
    assert val.tokens.tolist() == STREAM
    assert (val.targets, val.partial) == (7, False)


def test_bytes_of_targets_add_up(tmp_path):
    val = validation(tmp_path)
    by_hand = [2, 1, 3, 3, 0, 1, 1]  # no space after BOS, one before the second "be"
    assert [val.target_bytes(i, i + 1) for i in range(7)] == by_hand
    assert [val.target_bytes(0, i) for i in range(8)] == np.cumsum([0, *by_hand]).tolist()


def test_order_0_entropy_is_that_of_the_targets(tmp_path):
    counts = [2, 3, 1, 1]  # of 4, 2, 5, BOS among the seven targets
    bits = -sum(n * math.log2(n / 7) for n in counts)
    assert validation(tmp_path).order0_bpb() == pytest.approx(bits / 11, rel=1e-12)


def test_cut_validation_is_partial_and_says_so(tmp_path):
    cut = validation(tmp_path, VAL_MAX_TOKENS=6)
    assert (cut.targets, cut.tokens.tolist(), cut.partial) == (6, STREAM[:7], True)
    for whole in (0, 7, 8):
        assert not validation(tmp_path, VAL_MAX_TOKENS=whole).partial


def test_validation_of_one_token_is_refused(tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", np.array([BOS, 2]))
    assert Validation(config(tmp_path, VOCAB_SIZE=6), SPELLED).targets == 1
    write_shard(tmp_path / "fineweb_val_000000.bin", np.array([BOS]))
    with pytest.raises(UserError, match="empty"):
        Validation(config(tmp_path, VOCAB_SIZE=6), SPELLED)


def test_token_counts_come_from_file_sizes_alone(tmp_path, monkeypatch):
    make_shards(tmp_path, train=(100, 50), val=(70,))
    (tmp_path / "fineweb_val_000000.bin").chmod(0)
    monkeypatch.setattr(train_gpt.Path, "open", lambda *_: pytest.fail("a shard was opened"))
    assert train_gpt.token_count(config(tmp_path), "val") == 70
    assert train_gpt.token_count(config(tmp_path), "train") == 150
