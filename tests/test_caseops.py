"""CaseOps: text without capitals and back, shards with byte sidecars, and scores in bytes of the original."""

import importlib
import itertools
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import ROOT, Toy, tiny_env, toy_documents, write_shard
from test_train import run_here, try_here
from train_gpt import Tokenizer, UserError, Validation, load_tokenizer, read_config, recased

sys.path.insert(0, str(ROOT / "data"))
caseops, prepare = importlib.import_module("caseops"), importlib.import_module("prepare")

T, A, C, E = caseops.MARKS
BOS = 1
# Text that meets every rule often: capitals in and out of words, the marks themselves, letters that are not
# ASCII, what the normalization joins, splits, widens and drops, and white space.
ODD = "\u00a0\u200b\u2028\u3000\ufeff\u0301\u0345\ufb01\uff25\u00c9\u00df\u0131\ufdfa\u2460"
# A list, since the alphabet of st.text is a set in which these few would be rare.
chars = st.sampled_from([*"aAbBzZ 01.'-_\n\t▁🙂", T, A, C, E, *ODD]) | st.characters(codec="utf-8")
texts = st.lists(chars, max_size=60).map("".join)


# --------------------------------------------------------------------------------------
# The transform
# --------------------------------------------------------------------------------------

EXAMPLES = {
    "The NASA Launch": f"{T}the {A}nasa {T}launch",
    "iPhone": f"i{C}phone",
    "OpenAI": f"{T}open{C}a{C}i",
    "I": f"{T}i",
    "II": f"{A}ii",
    "IIi": f"{T}i{C}ii",
    "a1B2": f"a1{T}b2",
    "don'T": f"don'{T}t",
    "ÉCOLE École": f"É{A}cole École",
    "xÀY": f"xÀ{T}y",
    f"{T}A{E}": f"{E}{T}{T}a{E}{E}",
    f"a{C}B": f"a{E}{C}{T}b",
    "\ue000 \ue005": "\ue000 \ue005",
    "no capitals, 123": "no capitals, 123",
    "": "",
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_capitals_become_marks(text):
    assert caseops.encode(text) == EXAMPLES[text]
    assert caseops.decode(EXAMPLES[text]) == text


def spelled_out(text: str) -> str:
    """The rules of the transform word by word, as the published recipe has them, without a pattern."""
    out, at = [], 0
    while at < len(text):
        end = at
        while end < len(text) and text[end].isascii() and text[end].isalpha():
            end += 1
        word = text[at:end]
        if not word:
            out.append((E if text[at] in caseops.MARKS else "") + text[at])
            at += 1
            continue
        if word.islower():
            out.append(word)
        elif len(word) >= 2 and word.isupper():
            out.append(A + word.lower())
        elif word[0].isupper() and not any(c.isupper() for c in word[1:]):
            out.append(T + word.lower())
        else:
            head = T if word[0].isupper() else ""
            out.append(head + word[0].lower())
            out += [C + c.lower() if c.isupper() else c for c in word[1:]]
        at = end
    return "".join(out)


@settings(max_examples=1000)
@given(texts)
def test_every_text_comes_back(text):
    coded = caseops.encode(text)
    assert coded == spelled_out(text)
    assert caseops.decode(coded) == text
    assert not re.search(r"[A-Z]", coded)


def test_long_runs_take_linear_time():
    begin = time.process_time()
    sizes = [len(caseops.encode(text * 60_000)) for text in ("a", "aB", "A", "Aa", E)]
    assert sizes == [60_000, 180_000, 60_001, 180_000, 120_000]
    assert time.process_time() - begin < 3, "quadratic time would be ten times as much"


MALFORMED = {
    "dangling title": (f"a {T}", "ends after TITLE"),
    "dangling capitals": (f"{A}", "ends after ALLCAPS"),
    "dangling next": (f"a{C}", "ends after CAPNEXT"),
    "dangling escape": (f"a{E}", "ends after ESC"),
    "title before a space": (f"{T} a", "character 1: TITLE wants a letter"),
    "title before a digit": (f"{T}1", "character 1: TITLE wants a letter"),
    "title before É": (f"{T}É", "character 1: TITLE wants a letter"),
    "capitals before a point": (f"{A}.", "character 1: ALLCAPS wants a letter"),
    "next before a newline": (f"a{C}\n", "character 2: CAPNEXT wants a letter"),
    "next before next": (f"a{C}{C}b", "character 2: CAPNEXT wants a letter"),
    "title before title": (f"{T}{T}a", "character 1: TITLE wants a letter"),
    "title before capitals": (f"{T}{A}ab", "character 1: TITLE wants a letter"),
    "title before next": (f"{T}{C}a", "character 1: TITLE wants a letter"),
    "capitals before next": (f"{A}{C}ab", "character 1: ALLCAPS wants a letter"),
    "next before title": (f"a{C}{T}b", "character 2: CAPNEXT wants a letter"),
    "title before an escape": (f"{T}{E}{T}", "character 1: TITLE wants a letter"),
    "next before an escape": (f"a{C}{E}{C}", "character 2: CAPNEXT wants a letter"),
    "title in a word": (f"a{T}b", "character 1: TITLE inside a word"),
    "capitals in a word": (f"a{A}bc", "character 1: ALLCAPS inside a word"),
    "title in capitals": (f"{A}ab{T}c", "character 3: TITLE inside a word"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_text_is_refused_where_it_goes_wrong(case):
    text, words = MALFORMED[case]
    with pytest.raises(ValueError, match=words) as found:
        caseops.decode(text)
    assert "\n" not in str(found.value)


@settings(max_examples=500)
@given(st.text(st.sampled_from([*"abZ1 ", T, A, C, E]), max_size=12))
def test_any_marks_decode_or_are_refused(text):
    """What decodes is a text, which comes back from its own encoding."""
    try:
        found = caseops.decode(text)
    except ValueError:
        return
    assert caseops.decode(caseops.encode(found)) == found


def test_an_escape_makes_any_character_literal_and_ends_the_word():
    assert caseops.decode(f"{A}ab{E}{C}cd{E}x{T}y") == f"AB{C}cdxY"
    assert caseops.decode(f"{C}abc {A}a{C}bc") == "Abc ABC"


@settings(max_examples=500)
@given(texts)
def test_sampled_text_reads_as_decoded_text(text):
    assert recased(caseops.encode(text)) == text


@pytest.mark.parametrize(
    ("coded", "text"),
    [
        (f"{T}the end{T}", "The end"), (f"a{C}", "a"), (f"a {A}", "a "), (f"a{E}", "a"), (f"{T}{T}ab", "Ab"),
        (f"{A} nasa", " nasa"), (f"{T}{A}nasa", "NASA"), (f"i{C}{C}pod", "iPod"),
        (f"{E}{T}a{E}{E}", f"{T}a{E}"),
        (f"ab{T}c{A}de f", "abCDE f"), (f"{T}\n", "\n"), (f"{E}\n", "\n"),
    ],
)  # fmt: skip
def test_misplaced_marks_of_a_sample_are_left_out(coded, text):
    assert recased(coded) == text


# --------------------------------------------------------------------------------------
# Bytes of tokens
# --------------------------------------------------------------------------------------


class Machine:
    """The decoder one character at a time, over surfaces: how many bytes of the original each stands for."""

    def __init__(self):
        self.escaped = False

    def cost(self, surface: str) -> int:
        total = 0
        for char in surface:
            if self.escaped or char not in caseops.MARKS:
                total += len(char.encode())
                self.escaped = False
            else:
                self.escaped = char == E
        return total


def toy_texts(count: int, seed: int) -> list[str]:
    extra = ["iPhone OpenAI", f"a {T}{E} mark", "XML-RPC McDonald", " edges\u3000", "x\u200by", "ÉCOLE"]
    return [f"{text} {extra[i % len(extra)]}" for i, text in enumerate(toy_documents(count, seed))]


@pytest.fixture(scope="session")
def model() -> bytes:
    coded = (caseops.encode(text) for text in toy_texts(300, seed=0))
    return prepare.train_tokenizer(
        itertools.chain.from_iterable(map(prepare.sentences, coded)), 320, caseops.MARKS
    )


@pytest.fixture(scope="session")
def processor(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="session")
def encoder(model):
    return prepare.Encoder(model)


def test_marks_are_pieces_of_their_own(processor):
    assert [processor.id_to_piece(i) for i in range(9)] == [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        T,
        A,
        C,
        E,
        "<0x00>",
    ]
    assert not any(set(processor.id_to_piece(i)) & set(caseops.MARKS) for i in range(8, 320))
    assert processor.encode(f"{T}the")[0] == 4
    assert prepare.has_marks(processor)


@settings(max_examples=400)
@given(st.lists(texts, min_size=1, max_size=4))
def test_bytes_of_tokens_are_those_of_their_surfaces(encoder, processor, texts):
    """And add up to the document but for what the normalization drops at its ends."""
    encoded = encoder.encode(texts)
    ends = np.cumsum(encoded.counts)
    for i, text in enumerate(texts):
        part = slice(ends[i] - encoded.counts[i], ends[i])
        coded = caseops.encode(text)
        found = processor.encode(coded, out_type="offset_mapping")
        assert encoded.ids[part].tolist() == ([BOS, *found["ids"]] if found["ids"] else [])
        assert found["ids"] == processor.encode(coded)
        assert encoded.source_bytes[i] == len(text.encode())
        if not found["ids"]:
            assert encoded.accounted_bytes[i] == 0
            continue
        machine, spans = Machine(), found["offsets"]
        want = [machine.cost(coded[first:last]) for first, last in spans]
        assert encoded.sizes[part].tolist() == [0, *want]
        assert all(one[1] == two[0] for one, two in itertools.pairwise(spans)), "a gap between surfaces"
        first, last = spans[0][0], spans[-1][1]
        assert encoded.accounted_bytes[i] == len(caseops.decode(coded[first:last]).encode())
        assert processor.encode([coded[:first], coded[last:]]) == [[], []], "the edges are no text"


def test_letter_spelled_in_bytes_falls_to_the_last_of_them(encoder):
    encoded = encoder.encode(["a Ж"])
    assert encoded.sizes.tolist() == [0, 1, 1, 0, 2]


def test_older_sentencepiece_tells_spans_in_another_way(processor):
    coded = caseops.encode("The ﬁrst 日 iPhone")
    ids, spans = prepare.encode_spans(processor, coded)

    def encode(text, out_type):
        if out_type == "offset_mapping":
            raise RuntimeError("unknown out_type=offset_mapping")
        assert (text, out_type) == (coded, "immutable_proto")
        pieces = [SimpleNamespace(id=i, begin=a, end=b) for i, (a, b) in zip(ids, spans, strict=True)]
        return SimpleNamespace(pieces=pieces)

    assert prepare.encode_spans(SimpleNamespace(encode=encode), coded) == (ids, spans)


# --------------------------------------------------------------------------------------
# Shards
# --------------------------------------------------------------------------------------


def write_docs(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def ids_of(folder: Path, split: str) -> np.ndarray:
    paths = sorted(folder.glob(f"fineweb_{split}_0*.bin"))
    return np.concatenate([np.frombuffer(path.read_bytes(), "<u2", offset=1024) for path in paths])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def job(tmp_path, model):
    """(documents, arguments of prepare.py without --out)."""
    (tmp_path / "caseops.model").write_bytes(model)
    documents = toy_texts(60, seed=7)
    docs = write_docs(tmp_path / "docs.jsonl", documents)
    rest = [
        "--tokenizer",
        tmp_path / "caseops.model",
        "--val-docs",
        20,
        "--shard-tokens",
        900,
        "--workers",
        1,
    ]
    return documents, ["--caseops", "--docs", str(docs), *map(str, rest), "--out"]


def one_line(capsys, *parts: str) -> None:
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("prepare.py: "), error
    for part in parts:
        assert part in error, error


def test_shards_and_sidecars_hold_every_document(job, tmp_path, processor, capsys):
    documents, command = job
    out = tmp_path / "out"
    assert prepare.main([*command, str(out)]) == 0
    for split, some in (("val", documents[:20]), ("train", documents[20:])):
        want = [i for text in some for i in (BOS, *processor.encode(caseops.encode(text)))]
        assert ids_of(out, split).tolist() == want
    sidecars = sorted(path.name for path in out.glob("*bytes*"))
    shards = sorted(path.name for path in out.glob("fineweb_val_0*"))
    assert len(shards) > 2 and sidecars == [name.replace("val", "val_bytes") for name in shards]
    for shard, sidecar in zip(shards, sidecars, strict=True):
        assert (out / shard).stat().st_size == (out / sidecar).stat().st_size
    sizes, starts = ids_of(out, "val_bytes").astype(int), np.flatnonzero(ids_of(out, "val") == BOS)
    texts = [text.strip("\u3000 ") for text in documents[:20]]
    assert [int(part.sum()) for part in np.split(sizes, starts)[1:]] == [len(text.encode()) for text in texts]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["request"]["transform"] == "lossless_caps_caseops_v1"
    assert manifest["splits"]["val"]["accounted_bytes"] == sizes.sum()
    assert "VOCAB_SIZE=320 CASEOPS_ENABLED=1 python train_gpt.py" in capsys.readouterr().out


def test_run_stopped_anywhere_gives_the_same_bytes(job, tmp_path):
    _, command = job
    assert prepare.main([*command, str(tmp_path / "whole")]) == 0
    whole = contents(tmp_path / "whole")
    for stop in (1, 2, 3, 4, 5, 6, 9):  # manifest, model, then shard, sidecar, manifest again and again
        out, real, calls = tmp_path / f"out{stop}", prepare.write_whole, itertools.count(1)

        def writing(path, parts, calls=calls, stop=stop, real=real):
            if next(calls) == stop:
                raise KeyboardInterrupt
            real(path, parts)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare, "write_whole", writing)
            assert prepare.main([*command, str(out)]) == 130
        assert prepare.main([*command, str(out)]) == 0
        assert contents(out) == whole


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_missing_and_cut_sidecars_are_made_again(job, tmp_path, damage):
    _, command = job
    out = tmp_path / "out"
    assert prepare.main([*command, str(out)]) == 0
    whole, path = contents(out), out / "fineweb_val_bytes_000001.bin"
    path.unlink() if damage == "gone" else path.write_bytes(whole[path.name][:-2])
    assert prepare.main([*command, str(out)]) == 0
    assert contents(out) == whole


def test_tokenizer_and_transform_must_agree(job, tmp_path, toy_data, capsys):
    _, command = job
    plain = [word for word in command if word != "--caseops"]
    out = str(tmp_path / "out")
    assert prepare.main([*plain, out]) == 2
    one_line(capsys, "caseops.model: one of CaseOps text", "pass --caseops")
    assert prepare.main([*command, out, "--tokenizer", str(toy_data.tokenizer)]) == 2
    one_line(capsys, "lacks the pieces U+E001 to U+E004", "--train-tokenizer")
    assert not Path(out).exists()


def test_folder_changes_its_transform_only_by_force(job, tmp_path, toy_data, capsys):
    _, command = job
    out = tmp_path / "out"
    assert prepare.main([*command, str(out)]) == 0
    plain = [word for word in command if word != "--caseops"]
    plain[plain.index("--tokenizer") + 1] = str(toy_data.tokenizer)
    capsys.readouterr()
    assert prepare.main([*plain, str(out)]) == 2
    one_line(capsys, 'another transform: "lossless_caps_caseops_v1" there, null now', "--force")
    assert prepare.main([*plain, str(out), "--force"]) == 0
    assert not list(out.glob("*bytes*"))
    write_shard(out / "fineweb_val_bytes_000000.bin", np.arange(5))
    capsys.readouterr()
    assert prepare.main([*command, str(out), "--force"]) == 2
    one_line(capsys, "holds fineweb_val_bytes_000000.bin")


def test_trained_tokenizer_knows_the_marks(job, tmp_path):
    _, command = job
    at = command.index("--tokenizer")
    command[at : at + 2] = ["--train-tokenizer", "330"]
    out = tmp_path / "out"
    assert prepare.main([*command, str(out)]) == 0
    made = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    assert (made.vocab_size(), [made.piece_to_id(mark) for mark in caseops.MARKS]) == (330, [4, 5, 6, 7])
    assert ids_of(out, "val").tolist()[:2] == [BOS, 4], "the first document begins with a capital"
    learned = {made.id_to_piece(i) for i in range(264, 330)}
    assert not any(re.search(r"[A-Z]", piece) for piece in learned) and "▁the" in learned
    whole = contents(out)
    assert prepare.main([*command, str(out), "--force"]) == 0
    assert contents(out) == whole


def test_token_of_too_many_bytes_is_refused_with_its_document(tmp_path, model, capsys):
    (tmp_path / "caseops.model").write_bytes(model)
    wide = f"a{' ' * 70_000}b"
    docs = ["--docs", str(write_docs(tmp_path / "docs.jsonl", ["one", wide, "two"])), "--workers", "1"]
    rest = ["--caseops", "--tokenizer", str(tmp_path / "caseops.model"), *docs]
    assert prepare.main([*rest, "--out", str(tmp_path / "out"), "--val-docs", "2"]) == 2
    one_line(capsys, "document 2: one token stands for 70,000 bytes", "allowed: up to 65,535")
    assert prepare.main([*rest, "--out", str(tmp_path / "train"), "--val-docs", "1"]) == 0, (
        "train has no sidecar"
    )


def test_official_split_is_the_default(job, tmp_path, capsys):
    _, command = job
    at = command.index("--val-docs")
    del command[at : at + 2]
    assert prepare.main([*command, str(tmp_path / "out")]) == 2
    one_line(capsys, "--val-docs 50000")


def test_published_documents_and_tokenizer(shared_data, tmp_path):
    """100 documents of FineWeb: 254,624 tokens, and every byte of their 790,495 accounted for."""
    name = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
    rest = [
        "--docs",
        shared_data / "fineweb_docs_100.jsonl",
        "--tokenizer",
        shared_data / "tokenizers" / name,
    ]
    command = [
        "--caseops",
        *map(str, rest),
        "--val-docs",
        "99",
        "--workers",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert prepare.main(command) == 0
    splits = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]
    total = {key: splits["val"][key] + splits["train"][key] for key in splits["val"]}
    assert (total["documents"], total["tokens"]) == (100, 254_624)
    assert total["source_bytes"] == total["accounted_bytes"] == 790_495
    assert ids_of(tmp_path / "out", "val_bytes").sum(dtype=int) == splits["val"]["source_bytes"]
    texts = [
        json.loads(line)["text"] for line in (shared_data / "fineweb_docs_100.jsonl").read_text().splitlines()
    ]
    assert all(caseops.decode(caseops.encode(text)) == text for text in texts)


# --------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coded_data(tmp_path_factory, model) -> Toy:
    """A folder of CaseOps shards with sidecars, and their tokenizer."""
    folder = tmp_path_factory.mktemp("coded")
    (folder / "given.model").write_bytes(model)
    docs = write_docs(folder / "docs.jsonl", toy_texts(150, seed=3))
    rest = ["--tokenizer", folder / "given.model", "--val-docs", 30, "--shard-tokens", 4_000, "--workers", 1]
    command = ["--caseops", "--docs", docs, *rest, "--out", folder / "shards"]
    assert prepare.main(list(map(str, command))) == 0
    return Toy(folder / "shards", folder / "given.model", 320, {})


def copied(data: Toy, folder: Path) -> Toy:
    folder.mkdir()
    for path in data.path.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return data._replace(path=folder)


def opened(data: Toy, **knobs) -> Validation:
    cfg = read_config(tiny_env(**data.env, **{"CASEOPS_ENABLED": 1} | knobs))
    return Validation(cfg, load_tokenizer(cfg))


def test_bytes_of_targets_are_those_of_the_sidecar(coded_data):
    val, want = opened(coded_data), ids_of(coded_data.path, "val_bytes").astype(int)
    assert val.tokens.tolist() == ids_of(coded_data.path, "val").tolist()
    assert len(list(coded_data.path.glob("*bytes*"))) > 1
    cuts = [0, 1, 2, 3_998, 3_999, 4_000, 4_001, val.targets]
    for start, stop in itertools.combinations(cuts, 2):
        assert val.target_bytes(start, stop) == want[start + 1 : stop + 1].sum()
    assert val.target_bytes(5, 5) == 0
    cut = opened(coded_data, VAL_MAX_TOKENS=100)
    assert cut.partial and cut.target_bytes(0, cut.targets) == want[1:101].sum()
    counts = np.bincount(val.tokens[1:])
    entropy = -sum(n * np.log2(n / val.targets) for n in counts if n)
    assert val.order0_bpb() == pytest.approx(entropy / want.sum(), rel=1e-12)


def test_all_scores_of_a_run_count_the_sidecar(coded_data, tmp_path):
    total = int(ids_of(coded_data.path, "val_bytes").sum(dtype=int))
    knobs = {"CASEOPS_ENABLED": 1, "VAL_MAX_TOKENS": 0, "SLIDING_WINDOW_ENABLED": 1, "EVAL_STRIDE": 16}
    run = run_here(tmp_path / "run", coded_data, **knobs, NLL_PATH=tmp_path / "nll.npy")
    scores = run.results["scores"]
    assert set(scores) == {"pre_quant", "roundtrip", "sliding"}
    assert {score["bytes"] for score in scores.values()} == {total}
    nats = np.load(tmp_path / "nll.npy").sum(dtype=np.float64)
    assert scores["roundtrip"]["val_bpb"] == pytest.approx(nats / np.log(2) / total, rel=1e-6)
    knobs |= {"EVAL_ONLY": 1, "ARTIFACT": run.folder / "model.ptz", "VAL_MAX_TOKENS": 500}
    part = run_here(tmp_path / "part", coded_data, **knobs).results["scores"]["roundtrip"]
    assert part["partial"] and part["bytes"] == ids_of(coded_data.path, "val_bytes")[1:501].sum(dtype=int)


def test_sample_of_a_run_reads_as_text(coded_data, tmp_path):
    run = run_here(tmp_path / "run", coded_data, CASEOPS_ENABLED=1, ITERATIONS=30, TRAIN_BATCH_TOKENS=1024)
    knobs = {"CASEOPS_ENABLED": 1, "EVAL_ONLY": 1, "SAMPLE": 100, "ARTIFACT": run.folder / "model.ptz"}
    asked, real = [], train_gpt.recased
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "recased", lambda text: asked.append(text) or real(text))
        told = run_here(tmp_path / "told", coded_data, **knobs).log
    assert set(asked[0]) & set(caseops.MARKS), "30 steps teach how frequent they are"
    assert "\n".join(told).endswith(real(asked[0]).rstrip("\n"))


def zeroed(path: Path) -> None:
    write_shard(path, np.zeros(path.stat().st_size // 2 - 512))


def shifted(path: Path) -> None:
    write_shard(path, np.roll(np.fromfile(path, "<u2")[512:], 1))


def shorter(path: Path) -> None:
    write_shard(path, np.fromfile(path, "<u2")[512:-1])


def damaged(path: Path) -> None:
    path.write_bytes(b"junk" + path.read_bytes()[4:])


FIRST, SECOND = "fineweb_val_bytes_000000.bin", "fineweb_val_bytes_000001.bin"
STRAY = "fineweb_val_bytes_000009.bin"
COMMAND = "python data/prepare.py --caseops"
SPOILT = {  # what is done to the copy -> what the line says
    "no sidecars": (lambda d: [p.unlink() for p in d.glob("*bytes*")], (FIRST, "is missing", COMMAND)),
    "one missing": (lambda d: (d / SECOND).unlink(), (SECOND, "is missing", COMMAND)),
    "one shorter": (lambda d: shorter(d / SECOND), (SECOND, "bytes, its shard", COMMAND)),
    "one too many": (lambda d: write_shard(d / STRAY, np.ones(9)), (STRAY, COMMAND)),
    "zero": (lambda d: zeroed(d / SECOND), (SECOND, "stand for no byte at all")),
    "BOS charged": (lambda d: shifted(d / FIRST), (FIRST, "for a BOS, want 0")),
    "no shard": (lambda d: damaged(d / FIRST), (FIRST, "not a token shard")),
    "no BOS": (
        lambda d: [write_shard(p, np.full(p.stat().st_size // 2 - 512, 9)) for p in d.glob("fineweb_val_0*")],
        ("fineweb_val_000000.bin", "no BOS token (id 1)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
def test_sidecars_that_cannot_serve_are_refused_by_name(coded_data, tmp_path, how):
    data, (spoil, fragments) = copied(coded_data, tmp_path / "data"), SPOILT[how]
    spoil(data.path)
    with pytest.raises(UserError) as found:
        opened(data)
    for fragment in fragments:
        assert fragment in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("how", ["no sidecars", "one shorter", "one too many"])
def test_missing_sidecars_are_told_before_training(coded_data, tmp_path, how):
    data = copied(coded_data, tmp_path / "data")
    SPOILT[how][0](data.path)
    assert SPOILT[how][1][0] in try_here(tmp_path / "run", data, CASEOPS_ENABLED=1).error
    assert not (tmp_path / "run" / "model.ptz").exists()


def test_plain_shards_are_scored_beside_sidecars(toy_data, tmp_path):
    """With whatever is in them: the gate is off."""
    data = copied(toy_data, tmp_path / "data")
    write_shard(data.path / FIRST, np.full(77, 9))
    write_shard(data.path / SECOND, np.zeros(5))
    want, found = (run_here(tmp_path / name, d) for name, d in (("plain", toy_data), ("beside", data)))
    assert found.read("trace.jsonl") == want.read("trace.jsonl")


def test_tokenizer_and_knob_must_agree(coded_data, toy_data):
    with pytest.raises(UserError, match=r"is one of CaseOps text.*; set CASEOPS_ENABLED=1$"):
        opened(coded_data, CASEOPS_ENABLED=0)
    with pytest.raises(UserError, match=r"lacks the pieces U\+E001 to U\+E004.*or set CASEOPS_ENABLED=0$"):
        opened(toy_data)


def test_documents_want_a_bos_in_the_validation_split(tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", np.full(50, 9))
    plain = Tokenizer(BOS, np.ones(320, int), np.zeros(320, bool), np.zeros(320, bool), 0, str)
    packing, stream = (read_config(tiny_env(DATA_PATH=tmp_path, DOC_PACKING=on)) for on in (1, 0))
    with pytest.raises(UserError, match=r"000000.bin holds no BOS token \(id 1\)"):
        Validation(packing, plain)
    assert Validation(stream, plain).targets == 49


def test_published_folder_leads_to_caseops_shards():
    cfg = read_config({"DATA_DIR": "d", "VOCAB_SIZE": "8192", "CASEOPS_ENABLED": "1"})
    root, kind = "d/datasets/fineweb10B_sp8192_caseops/datasets", "lossless_caps_caseops_v1_reserved"
    assert cfg.run.data == f"{root}/datasets/fineweb10B_sp8192_{kind}"
    assert cfg.run.tokenizer == f"{root}/tokenizers/fineweb_8192_bpe_{kind}.model"
