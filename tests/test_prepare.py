"""data/prepare.py: documents to shards, tokenizer training, byte accounting, restarts and bad input."""

import errno
import gzip
import hashlib
import importlib
import io
import itertools
import json
import lzma
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "prepare.py"
sys.path.insert(0, str(SCRIPT.parent))

prepare = importlib.import_module("prepare")

WORDS = "the of and to in a is that it was for on are with as his they be at one have this from or had by"
RARE = [
    "café",
    "naïve",
    "2024",
    "3.14",
    "don't",
    "日本語",
    "🙂",
    "ﬁne",
    "x\u200by",
    "\tdef f():\n        return 0",
]
examples = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Stop(BaseException):
    """Ends a run between two instructions, as a kill does: nothing of the script catches it."""


def make_texts(count, seed=0):
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        words = [rng.choice(WORDS.split() if rng.random() < 0.9 else RARE) for _ in range(rng.randint(5, 60))]
        texts.append(rng.choice([" ", "\n"]).join(words))
    return texts


def write_docs(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def arguments(docs, out, *rest, workers=1):
    return ["--docs", str(docs), "--out", str(out), "--workers", str(workers), *map(str, rest)]


def shards_of(folder, split):
    """Token ids of every shard of `split`, in order, with the header of each checked."""
    shards = []
    for path in sorted(folder.glob(f"fineweb_{split}_*.bin")):
        data = path.read_bytes()
        header = np.frombuffer(data[:1024], "<i4")
        ids = np.frombuffer(data[1024:], "<u2")
        assert header[:3].tolist() == [20240520, 1, ids.size] and not header[3:].any()
        shards.append(ids.tolist())
    names = [path.name for path in sorted(folder.glob(f"fineweb_{split}_*.bin"))]
    assert names == [f"fineweb_{split}_{index:06d}.bin" for index in range(len(names))]
    return shards


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def one_line(capsys, *parts):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("prepare.py: "), error
    for part in parts:
        assert part in error, error


@pytest.fixture(scope="session")
def model():
    sentences = itertools.chain.from_iterable(map(prepare.sentences, make_texts(300)))
    return prepare.train_tokenizer(sentences, 400)


@pytest.fixture(scope="session")
def processor(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture
def model_file(model, tmp_path):
    path = tmp_path / "given.model"
    path.write_bytes(model)
    return path


# ----------------------------------------------------------------------------------------- byte accounting


def reference_bytes(processor, ids):
    """Bytes of `ids` after the first one, one token at a time, as the challenge words the rule."""
    total = 0
    for before, token in itertools.pairwise(ids):
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            continue
        if processor.is_byte(token):
            total += 1
            continue
        piece = processor.id_to_piece(token)
        special = any(
            test(before) for test in (processor.is_control, processor.is_unknown, processor.is_unused)
        )
        total += len(piece.lstrip("▁").encode()) + (piece.startswith("▁") and not special)
    return total


def test_special_pieces_of_a_trained_model(processor):
    tables = prepare.byte_tables(processor)
    assert [processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()] == [0, 1, 2, 3]
    assert tables.boundary.tolist() == [True] * 4 + [False] * 396
    assert tables.base[:4].tolist() == [0] * 4
    assert tables.base[4:260].tolist() == [1] * 256
    space = processor.piece_to_id("▁")
    assert tables.base[space] == 0 and tables.leading[space]
    the = processor.piece_to_id("▁the")
    assert tables.base[the] == 3 and tables.leading[the]
    bos = processor.bos_id()
    after = prepare.accounted_bytes(tables, np.array([bos, the, 3, 10]), np.array([the, the, the, bos]))
    assert after.tolist() == [3, 4, 3, 0]


@examples
@given(st.lists(st.text(max_size=60) | st.sampled_from(RARE), max_size=6))
def test_accounted_bytes_are_those_of_the_decoded_text(model, processor, texts):
    encoded = prepare.Encoder(model).encode(texts)
    ends = np.cumsum(encoded.counts)
    for index, text in enumerate(texts):
        ids = encoded.ids[ends[index] - encoded.counts[index] : ends[index]].tolist()
        expected = processor.encode(text)
        assert ids == ([1, *expected] if expected else [])
        assert encoded.accounted_bytes[index] == len(processor.decode(expected).encode())
        assert encoded.source_bytes[index] == len(text.encode())


@examples
@given(st.lists(st.integers(0, 399), min_size=2, max_size=200))
def test_accounted_bytes_of_any_ids(processor, ids):
    tables = prepare.byte_tables(processor)
    total = prepare.accounted_bytes(tables, np.array(ids[:-1]), np.array(ids[1:])).sum()
    assert total == reference_bytes(processor, ids)


def test_accounted_bytes_are_of_the_normalized_text(model):
    encoded = prepare.Encoder(model).encode(["\tdef  f():\n\n    return 0\n", "ﬁ", "\u200b"])
    assert encoded.accounted_bytes.tolist() == [len("def f(): return 0"), 2, 0]
    assert encoded.source_bytes.tolist() == [25, 3, 3]
    assert encoded.counts[2] == 0


# ------------------------------------------------------------------------------------------- published data


@pytest.mark.parametrize(
    ("vocab", "tokens", "accounted"), [(1024, 329_104, 790_465), (8192, 217_587, 790_465)]
)
def test_published_documents_and_tokenizers(shared_data, tmp_path, capsys, vocab, tokens, accounted):
    docs = shared_data / "fineweb_docs_100.jsonl"
    tokenizer = shared_data / "tokenizers" / f"fineweb_{vocab}_bpe.model"
    out = tmp_path / "out"
    assert prepare.main(arguments(docs, out, "--tokenizer", tokenizer, "--val-docs", 10)) == 0
    splits = manifest_of(out)["splits"]
    total = {key: splits["val"][key] + splits["train"][key] for key in splits["val"]}
    assert total["documents"] == 100 and total["tokens"] == tokens and total["source_bytes"] == 790_495
    # 30 bytes of the 790,495 fall to the normalization (wide spaces, composed characters), 0.004 %.
    assert total["accounted_bytes"] == accounted
    assert [total[reason] for reason in prepare.DROPPED] == [0, 0, 0]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    texts = [json.loads(line)["text"] for line in docs.read_text(encoding="utf-8").splitlines()]
    assert shards_of(out, "val") == [[token for text in texts[:10] for token in (1, *processor.encode(text))]]
    assert shards_of(out, "train") == [
        [token for text in texts[10:] for token in (1, *processor.encode(text))]
    ]
    assert (out / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    expected = f"DATA_PATH={out} TOKENIZER_PATH={out}/tokenizer.model VOCAB_SIZE={vocab} python train_gpt.py"
    assert expected in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- shards


@examples
@given(
    st.lists(st.text(alphabet="abc \n\u200b", max_size=30), min_size=2, max_size=12),
    st.integers(1, 60),
    st.data(),
)
def test_shards_hold_every_document_in_order(model, processor, texts, shard_tokens, data):
    val_docs = data.draw(st.integers(1, len(texts) - 1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        docs = write_docs(folder / "docs.jsonl", texts)
        (folder / "m.model").write_bytes(model)
        rest = ["--tokenizer", folder / "m.model", "--val-docs", val_docs, "--shard-tokens", shard_tokens]
        status = prepare.main(arguments(docs, folder / "out", *rest))
        encoded = [processor.encode(text) for text in texts]
        stream = {
            "val": [[1, *ids] for ids in encoded[:val_docs] if ids],
            "train": [[1, *ids] for text, ids in zip(texts[val_docs:], encoded[val_docs:], strict=True)
                      if ids and text not in texts[:val_docs]],
        }  # fmt: skip
        if not (stream["val"] and stream["train"]):
            assert status == 2 and list((folder / "out").iterdir()) == []
            return
        assert status == 0
        manifest = manifest_of(folder / "out")
        for split, documents in stream.items():
            expected = list(itertools.chain.from_iterable(documents))
            shards = shards_of(folder / "out", split)
            assert [*itertools.chain.from_iterable(shards)] == expected
            assert all(len(shard) == shard_tokens for shard in shards[:-1])
            totals = manifest["splits"][split]
            assert (totals["documents"], totals["tokens"]) == (len(documents), len(expected))
            assert totals["accounted_bytes"] == reference_bytes(processor, expected)


def test_manifest_records_every_shard(tmp_path, model_file, model):
    docs = write_docs(tmp_path / "docs.jsonl", make_texts(40))
    out = tmp_path / "new" / "out"
    rest = ["--tokenizer", model_file, "--val-docs", 5, "--shard-tokens", 500]
    assert prepare.main(arguments(docs, out, *rest)) == 0
    manifest = manifest_of(out)
    assert manifest["complete"] is True
    assert manifest["tokenizer"] == {
        "file": "tokenizer.model",
        "vocab_size": 400,
        "bos_id": 1,
        "sha256": hashlib.sha256(model).hexdigest(),
    }
    assert set(manifest["versions"]) == {"python", "sentencepiece", "numpy"}
    assert manifest["request"]["docs"]["size"] == docs.stat().st_size
    names = {path.name for path in out.iterdir()}
    assert names == {"manifest.json", "tokenizer.model", *(shard["name"] for shard in manifest["shards"])}
    for shard in manifest["shards"]:
        data = (out / shard["name"]).read_bytes()
        assert len(data) == 1024 + 2 * shard["tokens"]
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
    for split in ("val", "train"):
        tokens = [shard["tokens"] for shard in manifest["shards"] if shard["split"] == split]
        assert sum(tokens) == manifest["splits"][split]["tokens"]


def test_duplicates_of_validation_are_not_trained_on(tmp_path, model_file, capsys):
    texts = ["one of the", "  \n", "it was", "one of the", "", "this", "this", "it was ", "\u200b"]
    docs = write_docs(tmp_path / "docs.jsonl", texts)
    out = tmp_path / "out"
    assert prepare.main(arguments(docs, out, "--tokenizer", model_file, "--val-docs", 3)) == 0
    splits = manifest_of(out)["splits"]
    assert {key: splits["val"][key] for key in ("documents", *prepare.DROPPED)} == {
        "documents": 2, "empty": 1, "duplicate": 0, "undecodable": 0,
    }  # fmt: skip
    assert {key: splits["train"][key] for key in ("documents", *prepare.DROPPED)} == {
        "documents": 3, "empty": 2, "duplicate": 1, "undecodable": 0,
    }  # fmt: skip
    assert "left out: 2 empty, 1 duplicate" in capsys.readouterr().out


def test_max_docs(tmp_path, model_file):
    docs = write_docs(tmp_path / "docs.jsonl", make_texts(30))
    out = tmp_path / "out"
    rest = ["--tokenizer", model_file, "--val-docs", "2", "--max-docs", "7"]
    assert prepare.main(arguments(docs, out, *rest)) == 0
    splits = manifest_of(out)["splits"]
    assert splits["val"]["documents"] == 2 and splits["train"]["documents"] == 5


# --------------------------------------------------------------------------------------------------- sources


def two_frames(data):
    import zstandard

    half = len(data) // 2
    compress = zstandard.ZstdCompressor().compress
    return compress(data[:half]) + compress(data[half:])


def test_compressed_sources_are_the_same_documents(tmp_path):
    texts = [*make_texts(50), "line\u2028separator", "nul\0", 'quote "\\ end']
    plain = write_docs(tmp_path / "docs.jsonl", texts)
    data = plain.read_bytes().replace(b"}\n", b"}\r\n", 3) + b"\n"
    made = {".gz": gzip.compress(data), ".xz": lzma.compress(data), ".zst": two_frames(data)}
    for suffix, packed in made.items():
        path = tmp_path / f"docs.jsonl{suffix}"
        path.write_bytes(packed)
        assert list(prepare.documents(prepare.open_source(str(path)))) == texts
        path.write_bytes(packed[: len(packed) - 9])
        with pytest.raises(prepare.DataError, match=r"damaged or cut off|not JSON"):
            list(prepare.documents(prepare.open_source(str(path))))
        path.write_bytes(b"{}" * 30)
        with pytest.raises((prepare.DataError, OSError), match=r"damaged|Not a gzipped"):
            list(prepare.documents(prepare.open_source(str(path))))


def test_cut_file_is_told_at_the_end_of_a_line_too(tmp_path):
    import zstandard

    compress = zstandard.ZstdCompressor().compress
    lines = b'{"text": "a"}\n' * 9
    path = tmp_path / "docs.jsonl.zst"
    path.write_bytes(compress(lines) + compress(lines)[:-3])
    with pytest.raises(prepare.DataError, match="cut off after line 9 "):
        list(prepare.documents(prepare.open_source(str(path))))
    path.write_bytes(compress(lines) + compress(lines))
    assert len(list(prepare.documents(prepare.open_source(str(path))))) == 18


def test_zst_needs_its_package(tmp_path, monkeypatch, capsys, model_file):
    path = tmp_path / "docs.jsonl.zst"
    path.write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert prepare.main(arguments(path, tmp_path / "out", "--tokenizer", model_file)) == 2
    one_line(capsys, "pip install zstandard")


def make_tree(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def test_folder_is_read_in_order_of_names(tmp_path):
    root = make_tree(tmp_path / "docs", {
        "b.md": b"b", "a/z.txt": b"az", "a/b/c.rst": b"abc", "a.py": b"a", "B.txt": b"B", "c.bin": b"no",
        ".hidden/x.txt": b"no", "a/__pycache__/x.py": b"no", "latin.txt": b"\xe9t\xe9", "empty.txt": b"",
    })  # fmt: skip
    source = prepare.open_source(str(root))
    assert list(prepare.documents(source)) == ["B", "a", "abc", "az", "b", "", None]
    assert [item.dropped for item in prepare.select(source, 1, None)] == [
        "",
        "",
        "",
        "",
        "",
        "empty",
        "undecodable",
    ]
    assert prepare.choose_val_docs(source, None, None) == 1
    assert source.identity["files"] == 7


def test_python_source_is_a_fair_fixed_shuffle(tmp_path):
    files = {f"package{i}/module{j}.py": b"x" * (i + j) for i in range(4) for j in range(15)}
    files |= {"lib2to3/tests/data/bom.py": b"", "site-packages/x.py": b"", "_sysconfigdata__linux_.py": b""}
    files |= {"idlelib/help.txt": b"", "a.so": b"", "dist-packages/y.py": b""}
    one = prepare.python_source(make_tree(tmp_path / "one", files))
    two = prepare.python_source(make_tree(tmp_path / "two", files))
    names = [path.relative_to(tmp_path / "one").as_posix() for path in one.files]
    assert names == [path.relative_to(tmp_path / "two").as_posix() for path in two.files]
    assert set(names) == {name for name in files if name.startswith(("package", "idlelib"))}
    assert names != sorted(names)
    assert prepare.choose_val_docs(one, None, None) == 3
    assert prepare.choose_val_docs(one, None, 20) == 1
    with pytest.raises(prepare.InputError, match="no sources"):
        prepare.python_source(tmp_path / "none")


def test_standard_library_end_to_end(tmp_path):
    out = tmp_path / "out"
    rest = ["--train-tokenizer", "600", "--max-docs", "60", "--shard-tokens", "100000"]
    command = [sys.executable, str(SCRIPT), *arguments("python", out, *rest, workers=2)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    splits = manifest_of(out)["splits"]
    assert sum(splits["val"][key] for key in ("documents", *prepare.DROPPED)) == 3
    assert sum(splits["train"][key] for key in ("documents", *prepare.DROPPED)) == 57
    # The normalization makes every run of white space one space: indentation is not counted.
    assert 0.5 < splits["train"]["accounted_bytes"] / splits["train"]["source_bytes"] < 0.95
    assert f"TOKENIZER_PATH={out}/tokenizer.model VOCAB_SIZE=600 python train_gpt.py" in result.stdout


# ------------------------------------------------------------------------------------------------- tokenizer


def test_training_is_repeatable_and_sees_train_documents_only(tmp_path):
    texts = make_texts(200)
    made = []
    for number, first in enumerate(["zebra zebra zebra", "zebra zebra zebra", "quagga quagga quagga"]):
        docs = write_docs(tmp_path / f"{number}.jsonl", [first, *texts])
        out = tmp_path / f"out{number}"
        assert prepare.main(arguments(docs, out, "--train-tokenizer", 380, "--val-docs", 1)) == 0
        made.append((out / "tokenizer.model").read_bytes())
    assert made[0] == made[1] == made[2]
    processor = sentencepiece.SentencePieceProcessor(model_proto=made[0])
    assert processor.vocab_size() == 380
    assert processor.decode(processor.encode("zebra ★ 12")) == "zebra ★ 12"
    assert all(len(processor.id_to_piece(i)) == 1 for i in processor.encode("1234")[1:])


def test_sample_is_capped_spread_and_fixed():
    items = [prepare.Item("val", "secret", "")] + [
        prepare.Item("train", f"doc {i}", "") for i in range(1_000)
    ]
    assert list(prepare.tokenizer_sample(items, 1.0, 55)) == [f"doc {i}" for i in range(10)]
    spread = list(prepare.tokenizer_sample(items, 0.1, 10**6))
    assert spread == list(prepare.tokenizer_sample(items, 0.1, 10**6))
    assert 60 < len(spread) < 140 and int(spread[-1].split()[1]) > 900
    dropped = [prepare.Item("train", "", "duplicate")]
    assert list(prepare.tokenizer_sample(dropped, 1.0, 100)) == []


@examples
@given(st.text(alphabet="ab é\n\0", max_size=300), st.integers(4, 50))
def test_sentences_keep_every_word(text, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "SENTENCE_BYTES", limit)
        pieces = list(prepare.sentences(text))
    assert " ".join(pieces).split() == text.replace("\0", " ").split()
    assert all(len(piece.encode()) <= limit or " " not in piece for piece in pieces)


def test_folder_sample_spreads_over_the_folder(tmp_path):
    texts = make_texts(300, seed=5)
    root = make_tree(tmp_path / "docs", {f"{i:03d}.txt": text.encode() for i, text in enumerate(texts)})
    out = tmp_path / "out"
    rest = ["--train-tokenizer", 320, "--sample-bytes", 20_000]
    assert prepare.main(arguments(root, out, *rest)) == 0
    assert manifest_of(out)["request"]["val_docs"] == 15


# -------------------------------------------------------------------------------------------------- restarts


@pytest.fixture
def job(tmp_path, model_file):
    """(arguments without --out, contents of an undisturbed run) of a job of several small shards."""
    docs = write_docs(tmp_path / "docs.jsonl", ["first", *make_texts(90), "first", " "])
    rest = ["--tokenizer", model_file, "--val-docs", 9, "--shard-tokens", 400]

    def build(out):
        return arguments(docs, out, *rest)

    assert prepare.main(build(tmp_path / "undisturbed")) == 0
    whole = contents(tmp_path / "undisturbed")
    assert len(whole) > 8
    return build, whole


def stop_at(patch, name, call):
    """Make the `call`-th use of os.<name> end the run, before it has an effect."""
    original = getattr(os, name)
    calls = itertools.count(1)

    def guarded(*args, **kwargs):
        if next(calls) == call:
            raise Stop
        return original(*args, **kwargs)

    patch.setattr(os, name, guarded)


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_stopped_anywhere_and_run_again_gives_the_same_bytes(job, tmp_path, name):
    build, whole = job
    for call in itertools.count(1):
        out = tmp_path / f"out{call}"
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, name, call)
            try:
                assert prepare.main(build(out)) == 0
            except Stop:
                pass
            else:
                break
        for path in out.glob("fineweb_*.bin"):
            assert path.read_bytes() == whole[path.name]
        assert prepare.main(build(out)) == 0
        assert contents(out) == whole
    assert call > 2 * (len(whole) - 2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_name_appears_only_with_its_file_on_disk(job, tmp_path, monkeypatch):
    build, whole = job
    synced, replaced = set(), []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle):
        synced.add(str(Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    def watched_replace(source, target):
        assert str(source) in synced
        assert Path(source).parent == Path(target).parent
        assert not Path(target).exists() or Path(target).name == "manifest.json"
        synced.clear()
        replaced.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    assert prepare.main(build(tmp_path / "out")) == 0
    assert set(replaced) == set(whole)


def test_stopped_again_and_again(job, tmp_path):
    build, whole = job
    out = tmp_path / "out"
    for _ in range(100):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, "replace", 4)
            try:
                assert prepare.main(build(out)) == 0
            except Stop:
                continue
        break
    assert contents(out) == whole


@pytest.mark.parametrize("name", ["replace", "fsync"])
@pytest.mark.parametrize("call", [1, 4, 9])
def test_full_disk_is_one_line_and_leaves_whole_shards(job, tmp_path, capsys, name, call):
    build, whole = job
    out = tmp_path / "out"
    original = getattr(os, name)
    calls = itertools.count(1)

    def full(*args, **kwargs):
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, full)
        assert prepare.main(build(out)) == 2
    one_line(capsys, "cannot write", "No space left on device", "run the same command again")
    assert not list(out.glob("*.tmp"))
    for path in out.glob("fineweb_*.bin"):
        assert path.read_bytes() == whole[path.name]
    assert prepare.main(build(out)) == 0
    assert contents(out) == whole


def children_of(pid):
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text(encoding="ascii").split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_run_again(tmp_path, model_file, workers):
    docs = write_docs(tmp_path / "docs.jsonl", make_texts(6_000, seed=3))
    rest = ["--tokenizer", model_file, "--val-docs", 100, "--shard-tokens", 2_000]
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    assert prepare.main(arguments(docs, undisturbed, *rest)) == 0
    whole = contents(undisturbed)
    command = [sys.executable, str(SCRIPT), *arguments(docs, out, *rest, workers=workers)]
    for wanted in (3, 12):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while len(list(out.glob("fineweb_*.bin"))) < wanted and process.poll() is None:
            time.sleep(0.005)
        children = children_of(process.pid) if process.poll() is None else []
        process.kill()
        process.wait(timeout=30)
        process.stderr.close()
        assert process.returncode == -9
        assert not children or workers > 1
        for _ in range(500):
            children = [child for child in children if Path(f"/proc/{child}/exe").exists()]
            if not children:
                break
            time.sleep(0.02)
        assert not children, "workers outlive a killed run"
        for path in out.glob("fineweb_*.bin"):
            assert path.read_bytes() == whole[path.name]
    assert len(list(out.glob("fineweb_*.bin"))) < len(whole) - 2
    assert prepare.main(arguments(docs, out, *rest)) == 0
    assert contents(out) == whole


def test_second_run_is_up_to_date_at_once(job, tmp_path, capsys, monkeypatch):
    build, whole = job
    monkeypatch.setattr(prepare, "documents", None)
    monkeypatch.setattr(prepare, "encode_all", None)
    started = time.perf_counter()
    assert prepare.main(build(tmp_path / "undisturbed")) == 0
    assert time.perf_counter() - started < 1
    output = capsys.readouterr().out
    assert "up to date" in output and "VOCAB_SIZE=400" in output
    assert contents(tmp_path / "undisturbed") == whole


@pytest.mark.parametrize("name", ["fineweb_train_000001.bin", "fineweb_val_000000.bin", "tokenizer.model"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_missing_and_cut_files_are_made_again(job, tmp_path, name, damage):
    build, whole = job
    out = tmp_path / "undisturbed"
    if damage == "gone":
        (out / name).unlink()
    else:
        (out / name).write_bytes(whole[name][:-1])
    assert prepare.main(build(out)) == 0
    assert contents(out) == whole


def test_trained_tokenizer_is_made_again(tmp_path):
    docs = write_docs(tmp_path / "docs.jsonl", make_texts(60))
    out = tmp_path / "out"
    command = arguments(docs, out, "--train-tokenizer", 330, "--val-docs", 5)
    assert prepare.main(command) == 0
    whole = contents(out)
    (out / "tokenizer.model").unlink()
    assert prepare.main(command) == 0
    assert contents(out) == whole


def test_another_request_is_refused(job, tmp_path, capsys, model):
    build, whole = job
    out = tmp_path / "undisturbed"
    other = tmp_path / "other.model"
    other.write_bytes(prepare.train_tokenizer(make_texts(50), 330))
    changes = {
        ("--val-docs", "10"): ("another val-docs", "9 there, 10 now"),
        ("--shard-tokens", "401"): ("another shard-tokens", "400 there, 401 now"),
        ("--max-docs", "20"): ("another max-docs", "null there, 20 now"),
        ("--tokenizer", str(other)): ("another tokenizer", "sha256"),
    }
    for change, parts in changes.items():
        capsys.readouterr()
        assert prepare.main([*build(out), *change]) == 2
        one_line(capsys, *parts, "--force")
    docs = tmp_path / "docs.jsonl"
    docs.write_text(docs.read_text(encoding="utf-8") + json.dumps({"text": "more"}) + "\n", encoding="utf-8")
    assert prepare.main(build(out)) == 2
    one_line(capsys, "another docs", '"size"')
    assert contents(out) == whole


def test_force_replaces_only_what_the_script_made(job, tmp_path, capsys):
    build, whole = job
    out = tmp_path / "undisturbed"
    kept = {"notes.txt": b"mine", "fineweb_train_000099.bin": b"mine", "other.model": b"mine"}
    make_tree(out, kept)
    capsys.readouterr()
    assert prepare.main([*build(out), "--shard-tokens", "100000", "--force"]) == 2
    one_line(capsys, "holds fineweb_train_000099.bin")
    (out / "fineweb_train_000099.bin").unlink()
    del kept["fineweb_train_000099.bin"]
    for bad in (["--val-docs", "5000"], ["--shard-tokens", "none"]):
        assert prepare.main([*build(out), *bad, "--force"]) == 2
    assert contents(out) == whole | kept
    assert prepare.main([*build(out), "--shard-tokens", "100000", "--force"]) == 0
    names = {"fineweb_val_000000.bin", "fineweb_train_000000.bin", "tokenizer.model", "manifest.json"}
    assert {path.name for path in out.iterdir()} == names | set(kept)


def test_tokenizer_may_come_from_the_folder_itself(tmp_path, model):
    docs = write_docs(tmp_path / "docs.jsonl", make_texts(20))
    out = make_tree(tmp_path / "out", {"tokenizer.model": model})
    command = arguments(docs, out, "--tokenizer", out / "tokenizer.model", "--val-docs", 2)
    assert prepare.main(command) == 0
    assert prepare.main([*command, "--force"]) == 0
    assert (out / "tokenizer.model").read_bytes() == model


def test_workers_do_not_change_a_byte(tmp_path, model_file, monkeypatch):
    docs = write_docs(tmp_path / "docs.jsonl", make_texts(900))
    rest = ["--tokenizer", model_file, "--val-docs", 30, "--shard-tokens", 5_000]
    assert prepare.main(arguments(docs, tmp_path / "one", *rest)) == 0
    monkeypatch.setattr(prepare, "BATCH_DOCS", 50)
    assert prepare.main(arguments(docs, tmp_path / "two", *rest, workers=2)) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert prepare.main(arguments(docs, tmp_path / "one", *rest, workers=7)) == 0


def test_dead_worker_is_one_line(capfd):
    items = [prepare.Item("val", "text", "")]
    with pytest.raises(prepare.InputError, match=r"a tokenizing worker died.*smaller --workers"):
        list(prepare.encode_all(items, b"no model", 2))
    capfd.readouterr()


def test_plain_progress_lines(job, tmp_path, capsys, monkeypatch):
    build, _ = job
    monkeypatch.setattr(prepare, "PLAIN_PROGRESS_SECONDS", 0.0)
    assert prepare.main(build(tmp_path / "out")) == 0
    assert "tokenizing: 93 documents, " in capsys.readouterr().err


class Terminal(io.StringIO):
    """A stream that calls itself a terminal."""

    def isatty(self):
        return True


def test_progress_bar_on_a_terminal(job, tmp_path, monkeypatch):
    build, whole = job
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert prepare.main(build(tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == whole
    assert "tokenizing" in screen.getvalue() and "tokens" in screen.getvalue()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert prepare.main(build(tmp_path / "without")) == 0


# ------------------------------------------------------------------------------------------------- bad input

BAD_LINES = {
    "not json": (b'{"text": "a"', "line 3: not JSON"),
    "no key": (b'{"body": "a"}', "line 3: found no string under \"text\" but the keys ['body']"),
    "not an object": (b'["a"]', 'line 3: found no string under "text" but a list'),
    "not a string": (b'{"text": 5}', 'line 3: found no string under "text"'),
    "not utf-8": (b'{"text": "\xe9"}', "line 3: not JSON"),
    "surrogate": (b'{"text": "\\ud800"}', "line 3: half a surrogate pair"),
    "deep": (b"[" * 200_000, "line 3: not JSON"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_named(tmp_path, capsys, model_file, case):
    line, expected = BAD_LINES[case]
    docs = tmp_path / "docs.jsonl"
    for rest in (["--tokenizer", model_file], ["--train-tokenizer", 300]):
        docs.write_bytes(b'{"text": "a b"}\n{"text": "c d"}\n' + line + b"\n")
        out = tmp_path / "out"
        assert prepare.main(arguments(docs, out, *rest, "--val-docs", 1, "--shard-tokens", 2)) == 2
        one_line(capsys, f"{docs}, {expected}")
        # What two good lines gave is removed: the mended file is another source.
        assert not out.exists() or not list(out.iterdir())
    docs.write_bytes(b'{"text": "a b"}\n{"text": "c d"}\n')
    assert prepare.main(arguments(docs, out, "--tokenizer", model_file, "--val-docs", 1)) == 0


def bad_arguments(tmp_path, model_file):
    """[(arguments, what the line says)]"""
    docs = write_docs(tmp_path / "docs.jsonl", make_texts(8))
    folder = make_tree(tmp_path / "folder", {"only.txt": b"text"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "docs.csv").write_bytes(b"text\n")
    (tmp_path / "junk.model").write_bytes(b"junk")
    (tmp_path / "nothing.model").write_bytes(b"")
    write_docs(tmp_path / "none.jsonl", [])
    out = tmp_path / "out"
    given = ["--tokenizer", model_file]
    return [
        (arguments(tmp_path / "gone.jsonl", out, *given), "gone.jsonl: no such file or folder"),
        (arguments(tmp_path / "docs.csv", out, *given), "unknown extension; allowed: .jsonl, .jsonl.gz"),
        (arguments(tmp_path / "empty", out, *given), "found no .txt .md .rst .py file"),
        (arguments(folder, out, *given), "--val-docs 1: the source has only 1 document(s)"),
        (arguments(tmp_path / "none.jsonl", out, *given), "--val-docs 50000: the source has only 0"),
        (arguments(docs, out, *given), "--val-docs 50000: the source has only 8 document(s)"),
        (arguments(docs, out, *given, "--val-docs", 8), "allowed: 1..7"),
        (arguments(docs, out, *given, "--val-docs", 4, "--max-docs", 4), "--max-docs allows only 4"),
        (arguments(docs, out, *given, "--val-docs", 0), "--val-docs: 0 is out of range; allowed: 1.."),
        (arguments(docs, out, *given, "--shard-tokens", "lots"), "'lots' is no whole number"),
        (arguments(docs, out, *given, "--shard-tokens", 2**31), "out of range"),
        (arguments(docs, out), "one of the arguments --tokenizer --train-tokenizer is required"),
        (arguments(docs, out, *given, "--train-tokenizer", 300), "not allowed with argument"),
        (arguments(docs, out, *given, "--wrong"), "unrecognized arguments: --wrong"),
        (arguments(docs, out, "--tokenizer", tmp_path / "gone.model"), "gone.model: no such file"),
        (arguments(docs, out, "--tokenizer", tmp_path / "junk.model"), "not a SentencePiece model"),
        (arguments(docs, out, "--tokenizer", tmp_path / "nothing.model"), "0 pieces; allowed: 1..65536"),
        (arguments(docs, out, "--train-tokenizer", 260), "260 is out of range; allowed: 261.."),
        (arguments(docs, out, "--train-tokenizer", 65537, "--val-docs", 2), "allowed: 261..65536"),
        (arguments(docs, out, "--train-tokenizer", 261, "--val-docs", 2), "need at least "),
        (arguments(docs, out, "--train-tokenizer", 5000, "--val-docs", 2), "give only"),
        (arguments(docs, docs, *given, "--val-docs", 2), "docs.jsonl: this is a file; give a folder"),
        (arguments(docs, docs / "out", *given, "--val-docs", 2), "docs.jsonl"),
    ]  # fmt: skip


def test_bad_arguments_are_one_line_and_leave_nothing(tmp_path, capsys, model_file):
    for command, expected in bad_arguments(tmp_path, model_file):
        assert prepare.main(command) == 2, command
        one_line(capsys, expected)
        assert not (tmp_path / "out").exists(), command


def test_corpus_without_words(tmp_path, capsys):
    for texts, part in (
        (["a b"] + ["x" * 5_000] * 3, "the training documents hold no usable text"),
        (["a b"] + ["xyz"] * 40, "give only|bare space|smaller"),
    ):
        docs = write_docs(tmp_path / "docs.jsonl", texts)
        command = arguments(docs, tmp_path / "out", "--train-tokenizer", 270, "--val-docs", 1)
        assert prepare.main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and any(word in error for word in part.split("|")), error


def test_models_without_bos_or_space(capsys):
    writer = io.BytesIO()
    options = {**prepare.TRAINER, "bos_id": -1, "vocab_size": 300}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts(30)), model_writer=writer, **options
    )
    with pytest.raises(prepare.InputError, match="no BOS piece"):
        prepare.load_tokenizer(writer.getvalue(), "x.model")
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abcabcabd"] * 9),
        model_writer=writer,
        **{**prepare.TRAINER, "vocab_size": 264},
    )
    with pytest.raises(prepare.InputError, match="no bare space piece"):
        prepare.load_tokenizer(writer.getvalue(), "x.model")


def test_split_left_without_tokens(tmp_path, capsys, model_file):
    for texts, split in ((["one", "one", " ", "one"], "train"), ([" ", "one", "two"], "val")):
        docs = write_docs(tmp_path / f"{split}.jsonl", texts)
        out = tmp_path / split
        assert prepare.main(arguments(docs, out, "--tokenizer", model_file, "--val-docs", 1)) == 2
        one_line(capsys, f"no token in the {split} split")
        assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"manifest.json": b'{"datasets": []}'}, "manifest.json there is not of data/prepare.py"),
        (
            {"manifest.json": b'{"made_by": "data/prepare.py"}'},
            "manifest.json there is not of data/prepare.py",
        ),
        ({"manifest.json": b"no json"}, "manifest.json there is not of data/prepare.py"),
        ({"fineweb_train_000000.bin": b"x"}, "holds fineweb_train_000000.bin (1 such file(s)) not made by"),
        ({"tokenizer.model": b"x"}, "holds tokenizer.model"),
    ],
)
def test_folders_of_others_are_left_alone(tmp_path, capsys, model_file, files, expected):
    docs = write_docs(tmp_path / "docs.jsonl", make_texts(8))
    out = make_tree(tmp_path / "out", files)
    command = arguments(docs, out, "--tokenizer", model_file, "--val-docs", 2)
    for forced in ([], ["--force"]):
        assert prepare.main([*command, *forced]) == 2
        one_line(capsys, expected)
    assert contents(out) == files


def test_vocabulary_must_fit_16_bits(model):
    class Large:
        def __init__(self, **_):
            pass

        def vocab_size(self):
            return 65_537

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare.spm, "SentencePieceProcessor", Large)
        with pytest.raises(prepare.InputError, match=r"65537 pieces; allowed: 1\.\.65536"):
            prepare.load_tokenizer(model, "x.model")


def test_interrupt_is_one_line(job, tmp_path, capsys, monkeypatch):
    build, whole = job

    def interrupted(*_):
        raise KeyboardInterrupt

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Progress, "add", interrupted)
        assert prepare.main(build(tmp_path / "out")) == 130
    one_line(capsys, "interrupted")
    assert prepare.main(build(tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == whole
