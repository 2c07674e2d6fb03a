"""Turn text documents into the token shards that train_gpt.py reads, with a tokenizer given or trained here.

    python data/prepare.py --docs docs.jsonl --tokenizer fineweb_1024_bpe.model --out runs/docs1024
    python data/prepare.py --docs python --train-tokenizer 1024 --out runs/stdlib
    python data/prepare.py --caseops --docs docs.jsonl --tokenizer caseops.model --out runs/caseops

A shard is little-endian: 256 int32 of header (magic 20240520, version 1, number of tokens N, zeros) and
N uint16 token ids. A document is [BOS] + its SentencePiece ids, no EOS; documents run across shard borders;
the first `--val-docs` documents are the validation split and the change of split ends a shard. This is the
layout of the exporter published with the challenge (openai/parameter-golf,
data/download_hf_docs_and_tokenize.py). With --caseops the text of a document is `caseops.encode` of it, and
beside each validation shard stands a sidecar of the same form, fineweb_val_bytes_%06d.bin, with the bytes of
the document behind each token.

The work may stop at any moment: shards appear under their final name only when whole, manifest.json records
how far the documents are done after each, and the same command goes on from there to the same bytes.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import platform
import re
import shlex
import signal
import sys
import sysconfig
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import sentencepiece as spm

import caseops

if TYPE_CHECKING:
    from tqdm import tqdm

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_VOCAB = 1 << 16  # token ids are stored as uint16
MIN_VOCAB = 261  # 4 special pieces, 256 bytes, one character
SHARD_TOKENS = 100_000_000
FINEWEB_VAL_DOCS = 50_000
SAMPLE_BYTES = 20_000_000
# SentencePiece leaves out training sentences over 4,192 bytes without a word.
SENTENCE_BYTES = 4_000
BATCH_BYTES = 1 << 20
BATCH_DOCS = 1_024
PLAIN_PROGRESS_SECONDS = 5.0
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
FOLDER_SUFFIXES = (".txt", ".md", ".rst", ".py")
PYTHON_SUFFIXES = (".py", ".rst", ".txt")
SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__")
SPLITS = ("val", "train")
MADE_BY = "data/prepare.py"
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
ONE_TEXT_A_LINE = 'allowed is one {"text": "..."} a line; mend the line or drop it'
DROPPED = ("empty", "duplicate", "undecodable")
SIDECAR = "val_bytes"  # the split, by its name, of the bytes behind each validation token
MOST_BYTES = (1 << 16) - 1  # of one token: sidecars are uint16 too
COUNTS = ("documents", "tokens", "source_bytes", "accounted_bytes", *DROPPED)
# The settings of the published tokenizers. One thread: the thread count is stored in the model, so it would
# change the bytes of the file.
TRAINER = {
    "model_type": "bpe",
    "character_coverage": 0.999,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "nmt_nfkc",
    "add_dummy_prefix": False,
    "hard_vocab_limit": False,
    "pad_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "unk_id": 3,
    "num_threads": 1,
    "minloglevel": 2,
}


class InputError(Exception):
    """A fault to report in one line with exit status 2; what is finished is kept."""


class DataError(InputError):
    """A fault inside the documents: mending them makes other documents, so what is finished is of no use."""


# -------------------------------------------------------------------------------------------------- documents


@dataclass(frozen=True)
class Source:
    """An ordered list of documents.

    `kind` is "jsonl" (one file, one document a line), "folder" or "python" (one document a file). `identity`
    tells one state of the source from another in the manifest.
    """

    kind: str
    files: tuple[Path, ...]
    identity: dict[str, Any]


class Item(NamedTuple):
    """One document of the source: its split, its text, and "" or why it is left out (one of DROPPED)."""

    split: str
    text: str
    dropped: str


def open_source(docs: str) -> Source:
    """Resolve the value of `--docs`: a .jsonl file, a folder, or the word "python".

    Raises InputError for a missing path, an unknown extension, or a folder without text files.
    """
    path = Path(docs)
    if docs == "python":
        return python_source(Path(sysconfig.get_path("stdlib")))
    if path.is_dir():
        files = list_text_files(path, FOLDER_SUFFIXES)
        if not files:
            raise InputError(f"--docs {docs}: found no {' '.join(FOLDER_SUFFIXES)} file in this folder")
        return Source("folder", tuple(files), folder_identity(path, files))
    if not path.exists():
        raise InputError(f"--docs {docs}: no such file or folder; give an existing one, or the word python")
    if not path.name.endswith(JSONL_SUFFIXES):
        allowed = ", ".join(JSONL_SUFFIXES)
        raise InputError(f"--docs {docs}: unknown extension; allowed: {allowed}, a folder, the word python")
    stat = path.stat()
    identity = {"path": str(path.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return Source("jsonl", (path,), identity)


def python_source(root: Path) -> Source:
    """The standard library under `root`, in the order of a hash of the file names.

    In the order of names a whole package would be validation; the hash makes it a fair sample, alike each
    time. Raises InputError where the interpreter comes without sources.
    """

    def wanted(path: Path) -> bool:
        # Test data of lib2to3 is Python 2 in odd encodings; _sysconfigdata is the record of one build.
        relative = path.relative_to(root).as_posix()
        return "lib2to3/tests/data/" not in relative and not path.name.startswith("_sysconfigdata")

    files = [path for path in list_text_files(root, PYTHON_SUFFIXES) if wanted(path)]
    if not files:
        raise InputError(f"--docs python: no sources in {root}; use an interpreter that comes with them")
    files.sort(key=lambda path: hashlib.blake2b(path.relative_to(root).as_posix().encode()).digest())
    identity = {"python": platform.python_version(), **folder_identity(root, files)}
    return Source("python", tuple(files), identity)


def list_text_files(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files under `root` with one of `suffixes`, sorted by name; hidden and SKIPPED_FOLDERS are left out."""

    def name_of(path: Path) -> str:
        return path.relative_to(root).as_posix()

    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and name[0] != "."]
        found += [Path(folder, name) for name in names if name.endswith(suffixes)]
    return sorted((path for path in found if path.is_file()), key=name_of)


def folder_identity(root: Path, files: list[Path]) -> dict[str, Any]:
    """Path, number of files and a SHA-256 over name, size and time of each, in the order given."""
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat()
        digest.update(f"{path.relative_to(root).as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return {"path": str(root.resolve()), "files": len(files), "sha256": digest.hexdigest()}


def documents(source: Source) -> Iterator[str | None]:
    """The texts of `source` in order; None for a file that is not UTF-8. Raises DataError on bad .jsonl."""
    if source.kind == "jsonl":
        yield from jsonl_documents(source.files[0])
        return
    for path in source.files:
        try:
            yield path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            yield None


def jsonl_documents(path: Path) -> Iterator[str]:
    """The "text" of each line of a (compressed) .jsonl; empty lines are passed over. Raises DataError."""
    number = 0
    try:
        for number, raw in enumerate(byte_lines(path), 1):
            if raw.strip():
                yield parse_document(raw, f"{path}, line {number}")
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        message = f"{path}: damaged or cut off after line {number} ({error}); fetch the file again"
        raise DataError(message) from None


def parse_document(raw: bytes, where: str) -> str:
    """The "text" of one line of .jsonl. Raises DataError that names `where`."""
    try:
        record = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); {ONE_TEXT_A_LINE}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"the keys {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise DataError(f'{where}: found no string under "text" but {found[:80]}; {ONE_TEXT_A_LINE}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: half a surrogate pair, which UTF-8 does not allow; mend the line"
        ) from None
    return text


def byte_lines(path: Path) -> Iterator[bytes]:
    """Lines of a plain, .gz, .xz or .zst file, split at newlines only."""
    if path.suffix == ".zst":
        yield from split_lines(zst_chunks(path))
        return
    opener: Callable[..., Any] = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, Path.open)
    with opener(path, "rb") as stream:
        yield from stream


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines, without their newline, of text that comes in pieces."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def zst_chunks(path: Path) -> Iterator[bytes]:
    """The decompressed contents of a .zst file of one or more frames.

    zstandard's own stream reader ends without a word where a file is cut off, hence the frames by hand.
    Raises InputError without the zstandard package, DataError on a damaged file, EOFError on a cut one.
    """
    try:
        import zstandard
    except ImportError:
        message = f"--docs {path}: .zst needs the zstandard package; run: pip install zstandard"
        raise InputError(message) from None
    try:
        with path.open("rb") as stream:
            yield from frame_pieces(stream, zstandard.ZstdDecompressor().decompressobj)
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: damaged ({error}); fetch the file again") from None


def frame_pieces(stream: io.BufferedReader, new_decoder: Callable[[], Any]) -> Iterator[bytes]:
    """Decompressed pieces of a stream of frames, a new decoder for each. Raises EOFError on a cut frame."""
    decoder = None
    while data := stream.read(BATCH_BYTES):
        while data:
            decoder = decoder or new_decoder()
            yield decoder.decompress(data)
            data = decoder.unused_data
            decoder = None if decoder.eof else decoder
    if decoder is not None:
        raise EOFError("the last frame is cut off")


def select(source: Source, val_docs: int, max_docs: int | None) -> Iterator[Item]:
    """Every document of `source` in order with its split: the n-th item is the n-th document of the list.

    A train document that is byte for byte a validation document is marked "duplicate" (by a hash of the
    text), so that no scored document is trained on.
    """
    validation = set()
    for index, text in enumerate(itertools.islice(documents(source), max_docs)):
        split = "val" if index < val_docs else "train"
        if not (text and text.strip()):
            yield Item(split, "", "undecodable" if text is None else "empty")
            continue
        key = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        if split == "val":
            validation.add(key)
        duplicate = split == "train" and key in validation
        yield Item(split, "" if duplicate else text, "duplicate" if duplicate else "")


def choose_val_docs(source: Source, wanted: int | None, max_docs: int | None) -> int:
    """How many documents are validation: `wanted`, or 50,000 of a .jsonl, or a twentieth of the files."""
    if wanted is not None:
        return wanted
    if source.kind == "jsonl":
        return FINEWEB_VAL_DOCS
    return max(1, min(len(source.files), max_docs or len(source.files)) // 20)


def check_enough_documents(source: Source, val_docs: int, max_docs: int | None) -> None:
    """Raise InputError unless at least one document is left to train on; reads `val_docs` + 1 documents."""
    limit = val_docs + 1 if max_docs is None else min(val_docs + 1, max_docs)
    found = sum(1 for _ in itertools.islice(documents(source), limit))
    if found <= val_docs:
        which = "--max-docs allows" if found == max_docs else "the source has"
        allowed = f"allowed: 1..{found - 1}" if found > 1 else "allowed: a source of two documents or more"
        raise InputError(
            f"--val-docs {val_docs}: {which} only {found} document(s), and one must be left to train on; "
            f"{allowed}"
        )


# -------------------------------------------------------------------------------------------------- tokenizer


class ByteTables(NamedTuple):
    """What a token counts in bytes, one entry a piece, shape (vocabulary,).

    `base` int64: bytes of the piece without a leading space; `leading` bool: it starts with the space mark;
    `boundary` bool: a space at the start of the next token is not counted (control, unknown, unused pieces).
    """

    base: np.ndarray
    leading: np.ndarray
    boundary: np.ndarray


def byte_tables(processor: spm.SentencePieceProcessor) -> ByteTables:
    """The tables of the challenge's bits-per-byte rule for a plain SentencePiece model."""
    size = processor.vocab_size()
    tables = ByteTables(np.zeros(size, np.int64), np.zeros(size, bool), np.zeros(size, bool))
    for token in range(size):
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            tables.boundary[token] = True
        elif processor.is_byte(token):
            tables.base[token] = 1
        else:
            piece = processor.id_to_piece(token)
            tables.leading[token] = piece.startswith("▁")
            tables.base[token] = len(piece.removeprefix("▁").encode("utf-8"))
    return tables


def accounted_bytes(tables: ByteTables, previous: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Bytes of each target given the token before it; arrays of one shape (n,), result int64 (n,)."""
    return tables.base[targets] + (tables.leading[targets] & ~tables.boundary[previous])


def load_tokenizer(model: bytes, name: str) -> spm.SentencePieceProcessor:
    """A processor of a serialized model. Raises InputError where it is none, or not fit for these shards."""
    try:
        processor = spm.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise InputError(f"{name}: not a SentencePiece model; give the .model file") from None
    size = processor.vocab_size() if model else 0
    if not 0 < size <= MAX_VOCAB:
        raise InputError(f"{name}: {size} pieces; allowed: 1..{MAX_VOCAB}, as token ids have 16 bits")
    if processor.bos_id() < 0:
        raise InputError(f"{name}: no BOS piece, with which every document starts; train it with bos_id=1")
    if processor.is_unknown(processor.piece_to_id("▁")):
        raise InputError(
            f"{name}: no bare space piece '▁', which train_gpt.py needs; train it on text with spaces"
        )
    return processor


def has_marks(processor: spm.SentencePieceProcessor) -> bool:
    """Whether the model knows the four marks of CaseOps text."""
    return not any(processor.is_unknown(processor.piece_to_id(mark)) for mark in caseops.MARKS)


def check_marks(model: bytes, wanted: bool, name: str) -> None:
    """Raise InputError where `--caseops` and the tokenizer do not go together."""
    if has_marks(load_tokenizer(model, name)) == wanted:
        return
    if wanted:
        raise InputError(
            f"{name}: lacks the pieces U+E001 to U+E004 that --caseops writes; give a CaseOps tokenizer, "
            "or train one with --train-tokenizer"
        )
    raise InputError(f"{name}: one of CaseOps text; pass --caseops, or give another tokenizer")


def sentences(text: str) -> Iterator[str]:
    """`text` in pieces of whole words of up to SENTENCE_BYTES bytes.

    Pieces, not lines: the normalization makes every newline a space, so a word at the start of a line has a
    space before it when documents are encoded, and the tokenizer has to learn it like that.
    """
    words: list[str] = []
    size = 0
    for word in text.replace("\0", " ").split():
        length = len(word.encode("utf-8")) + 1
        if words and size + length > SENTENCE_BYTES:
            yield " ".join(words)
            words, size = [], 0
        words.append(word)
        size += length
    if words:
        yield " ".join(words)


def tokenizer_sample(items: Iterable[Item], keep: float, limit: int) -> Iterator[str]:
    """Training sentences from the train documents among `items`: up to `limit` bytes, a share `keep` of them.

    The share is drawn by a hash of the text, so that it spreads over the list and is the same each time.
    """
    total = 0
    for item in items:
        if item.split != "train" or item.dropped:
            continue
        data = item.text.encode("utf-8")
        if int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >= keep * 2.0**64:
            continue
        total += len(data)
        if total > limit:
            return
        yield from sentences(item.text)


def train_tokenizer(training: Iterable[str], vocab_size: int, marks: tuple[str, ...] = ()) -> bytes:
    """Train a BPE model with the published settings; the same sentences give the same bytes.

    `marks` are pieces of their own, ids 4 and up, that are never part of another.

    Raises InputError where the vocabulary does not fit the text.
    """
    writer = io.BytesIO()
    option = f"--train-tokenizer {vocab_size}"
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(training),
            model_writer=writer,
            vocab_size=vocab_size,
            **TRAINER,
            **({"user_defined_symbols": list(marks)} if marks else {}),
        )
    except RuntimeError as error:
        too_few = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        if too_few:
            raise InputError(f"{option}: the training documents need at least {too_few[1]} pieces") from None
        reason = str(error).rpartition("] ")[2] or "the training documents hold no usable text"
        raise InputError(f"{option}: SentencePiece refused: {reason}") from None
    size = load_tokenizer(writer.getvalue(), option).vocab_size()
    if size != vocab_size:
        raise InputError(
            f"{option}: the training documents give only {size} pieces; allowed: {MIN_VOCAB}..{size}; "
            "ask for fewer or add documents"
        )
    return writer.getvalue()


class Encoded(NamedTuple):
    """A batch of encoded documents.

    `ids` uint16 and `sizes` uint32, both (tokens,): the documents end to end, each with its BOS, and bytes
    that each token stands for. `counts`, `source_bytes` and `accounted_bytes`, all int64 (documents,): tokens
    (0 where the text gives none), UTF-8 bytes of the text, and the sum of `sizes`.
    """

    ids: np.ndarray
    sizes: np.ndarray
    counts: np.ndarray
    source_bytes: np.ndarray
    accounted_bytes: np.ndarray


class Encoder:
    """Encodes batches of texts with one model; an instance lives in each worker.

    A model that knows the marks is given CaseOps text: `check_marks` has seen to it that this is wanted.
    """

    def __init__(self, model: bytes) -> None:
        self.processor = load_tokenizer(model, TOKENIZER)
        self.marks = has_marks(self.processor)
        self.tables = byte_tables(self.processor)

    def encode(self, texts: list[str]) -> Encoded:
        """Encode `texts`. Raises InputError for an id outside the vocabulary."""
        pieces, spelled = self.marked(texts) if self.marks else (self.plain(texts), [])
        bos = self.processor.bos_id()
        flat = [[bos, *piece] if piece else [] for piece in pieces]
        counts = np.array([len(piece) for piece in flat], np.int64)
        ids = np.fromiter(itertools.chain.from_iterable(flat), np.int64, int(counts.sum()))
        vocab = self.tables.base.size
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab:
            raise InputError(f"{TOKENIZER}: token ids {ids.min()}..{ids.max()}; allowed: 0..{vocab - 1}")
        if self.marks:
            sizes = np.concatenate([np.zeros(0, np.int64), *spelled])
        else:
            # The first token of each document is BOS and counts nothing, whatever stands before it.
            sizes = accounted_bytes(self.tables, np.roll(ids, 1), ids)
        running = np.concatenate([[0], np.cumsum(sizes)])
        ends = np.cumsum(counts)
        source = np.array([len(text.encode("utf-8")) for text in texts], np.int64)
        accounted = running[ends] - running[ends - counts]
        return Encoded(ids.astype(np.uint16), sizes.astype(np.uint32), counts, source, accounted)

    def plain(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without BOS."""
        return self.processor.encode(texts, out_type=int, num_threads=1) if texts else []

    def marked(self, texts: list[str]) -> tuple[list[list[int]], list[np.ndarray]]:
        """Token ids of each text as CaseOps text, and the bytes of BOS and of each, int64 (1 + tokens,).

        White space at the ends is in no token. A letter spelled in bytes falls to the last of them.
        """
        pieces, sizes = [], []
        for text in map(caseops.encode, texts):
            ids, spans = encode_spans(self.processor, text)
            pieces.append(ids)
            if ids:
                running = np.concatenate([[0], np.cumsum(caseops.char_bytes(text))])
                first, last = np.array([(0, 0), *spans]).T
                sizes.append(running[last] - running[first])
        return pieces, sizes


def encode_spans(processor: spm.SentencePieceProcessor, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of `text`, and the characters first..last-1 of it that each stands for.

    sentencepiece tells them in one way up to 0.2.2, and in another from 0.2.3 on.
    """
    try:
        mapping = processor.encode(text, out_type="offset_mapping")
    except (RuntimeError, ValueError):
        proto = processor.encode(text, out_type="immutable_proto")
        return [piece.id for piece in proto.pieces], [(piece.begin, piece.end) for piece in proto.pieces]
    return mapping["ids"], mapping["offsets"]


_WORKER: dict[str, Encoder] = {}


def start_worker(model: bytes) -> None:
    """Set up a worker process: its encoder, no traceback of its own at Ctrl-C, no life after its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=leave_with, args=(parent.join,), daemon=True).start()
    _WORKER["encoder"] = Encoder(model)


def leave_with(wait: Callable[[], Any]) -> NoReturn:
    """End this process as soon as `wait` returns: a killed parent cannot tell its workers to stop."""
    wait()
    os._exit(1)


def encode_in_worker(texts: list[str]) -> Encoded:
    """Encode one batch with the worker's encoder."""
    return _WORKER["encoder"].encode(texts)


def batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Consecutive `items` in lists of up to BATCH_DOCS items and about BATCH_BYTES characters."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item.text)
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(items: Iterable[Item], model: bytes, workers: int) -> Iterator[tuple[list[Item], Encoded]]:
    """Encode `items` batch by batch, in order, in this process (`workers` 1) or in `workers` spawned ones.

    Raises InputError when a worker dies. Close the iterator to end the workers.
    """
    if workers == 1:
        encoder = Encoder(model)
        for batch in batches(items):
            yield batch, encoder.encode([item.text for item in batch])
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(model,))
    try:
        yield from in_order(pool, batches(items), 2 * workers)
    except BrokenProcessPool:
        raise InputError(
            "a tokenizing worker died, as happens when memory runs out; finished shards are kept: "
            "run the same command with a smaller --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(
    pool: ProcessPoolExecutor, work: Iterable[list[Item]], ahead: int
) -> Iterator[tuple[list[Item], Encoded]]:
    """Results in the order of `work`, at most `ahead` batches under way, so that memory stays bounded."""
    pending: deque[tuple[list[Item], Future[Encoded]]] = deque()
    for batch in work:
        pending.append((batch, pool.submit(encode_in_worker, [item.text for item in batch])))
        if len(pending) > ahead:
            first, future = pending.popleft()
            yield first, future.result()
    for batch, future in pending:
        yield batch, future.result()


# ----------------------------------------------------------------------------------------------------- shards


def shard_bytes(ids: np.ndarray) -> tuple[bytes, memoryview]:
    """Header and body of a shard of `ids` (N,) uint16."""
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, VERSION, ids.size
    return header.tobytes(), memoryview(np.ascontiguousarray(ids, "<u2")).cast("B")


def shard_is_whole(path: Path, tokens: int) -> bool:
    """Whether `path` is a shard of `tokens` tokens, by size and header."""
    if not path.is_file() or path.stat().st_size != HEADER_BYTES + 2 * tokens:
        return False
    with path.open("rb") as stream:
        return np.frombuffer(stream.read(12), "<i4").tolist() == [MAGIC, VERSION, tokens]


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write `parts` to `path`: the name appears only when all of it is on disk. Raises InputError."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as stream:
            stream.writelines(parts)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; "
            "finished shards are kept: mend that and run the same command again"
        ) from None


def temporary_name(path: Path) -> Path:
    """The name under which `path` is written, in the same folder."""
    return path.with_name(path.name + ".tmp")


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last through a power cut, where the system lets a folder be opened (POSIX)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def shard_name(split: str, index: int) -> str:
    """File name of the `index`-th shard of `split`."""
    return f"fineweb_{split}_{index:06d}.bin"


class Export:
    """Writes encoded documents as shards and keeps manifest.json abreast.

    `cursor` says how far the documents are done: "document" of them whole, and "offset" tokens of the next;
    "splits" are the totals of the whole ones. The record of each finished shard holds the cursor after it.
    """

    def __init__(self, out: Path, manifest: dict[str, Any]) -> None:
        self.out = out
        self.manifest = manifest
        self.cursor = start_cursor(manifest)
        # One row of tokens, and with sidecars one of their bytes.
        rows = 1 + bool(manifest["request"].get("transform"))
        self.buffer = np.empty((rows, manifest["request"]["shard_tokens"]), np.uint16)
        self.fill = 0
        self.split = "val"

    def add(self, batch: list[Item], encoded: Encoded) -> None:
        """Append the documents of `batch`. Raises InputError when a shard cannot be written, and DataError
        for a token that stands for more bytes than a sidecar can say.
        """
        ends = np.cumsum(encoded.counts)
        columns = np.stack([encoded.ids, encoded.sizes][: len(self.buffer)])
        for index, item in enumerate(batch):
            count = int(encoded.counts[index])
            largest = int(encoded.sizes[ends[index] - count : ends[index]].max(initial=0))
            if largest > MOST_BYTES and has_sidecar(self.manifest, item.split):
                raise DataError(
                    f"document {self.cursor['document'] + 1}: one token stands for {largest:,} bytes, as a "
                    f"run of spaces does; allowed: up to {MOST_BYTES:,}; shorten it"
                )
            self.add_tokens(item.split, columns[:, ends[index] - count : ends[index]])
            totals = self.cursor["splits"][item.split]
            if count:
                totals["documents"] += 1
                totals["tokens"] += count
                totals["source_bytes"] += int(encoded.source_bytes[index])
                totals["accounted_bytes"] += int(encoded.accounted_bytes[index])
            else:
                # Text of nothing but invisible characters: the normalization leaves no token.
                totals[item.dropped or "empty"] += 1
            self.cursor["document"] += 1
            self.cursor["offset"] = 0

    def add_tokens(self, split: str, columns: np.ndarray) -> None:
        """Append one document's tokens, (rows, n) as in the buffer, but for those of earlier shards."""
        if split != self.split:
            self.flush()
            self.split = split
        done = self.cursor["offset"]
        while done < columns.shape[1]:
            part = columns[:, done : done + self.buffer.shape[1] - self.fill]
            self.buffer[:, self.fill : self.fill + part.shape[1]] = part
            self.fill += part.shape[1]
            done += part.shape[1]
            if self.fill == self.buffer.shape[1]:
                self.cursor["offset"] = done
                self.flush()

    def flush(self) -> None:
        """Write the tokens at hand as one shard and record it; nothing at hand, nothing written."""
        if not self.fill:
            return
        index = sum(shard["split"] == self.split for shard in self.manifest["shards"])
        entry = {"name": shard_name(self.split, index), "split": self.split, "tokens": self.fill}
        entry["sha256"] = self.write_row(0, entry["name"])
        if has_sidecar(self.manifest, self.split):
            entry["sidecar_sha256"] = self.write_row(1, shard_name(SIDECAR, index))
        self.manifest["shards"].append({**entry, "after": copy_of(self.cursor)})
        self.fill = 0
        write_manifest(self.out, self.manifest)

    def write_row(self, row: int, name: str) -> str:
        """Write one row of what is at hand as the shard `name`; its SHA-256 in hex."""
        parts = shard_bytes(self.buffer[row, : self.fill])
        write_whole(self.out / name, parts)
        digest = hashlib.sha256(parts[0])
        digest.update(parts[1])
        return digest.hexdigest()

    def finish(self) -> None:
        """Write what is at hand and close the manifest. Raises DataError where a split has no token."""
        self.flush()
        splits = self.cursor["splits"]
        for split, totals in splits.items():
            if not totals["tokens"]:
                left_out = ", ".join(f"{totals[reason]} {reason}" for reason in DROPPED)
                raise DataError(f"no token in the {split} split ({left_out}); give other documents")
        self.manifest.update(complete=True, splits=splits)
        write_manifest(self.out, self.manifest)


def has_sidecar(manifest: dict[str, Any], split: str) -> bool:
    """Whether a sidecar stands beside each shard of `split`."""
    return split == "val" and bool(manifest["request"].get("transform"))


def start_cursor(manifest: dict[str, Any]) -> dict[str, Any]:
    """The cursor after the last recorded shard, or that of the beginning."""
    if manifest["shards"]:
        return copy_of(manifest["shards"][-1]["after"])
    return {"document": 0, "offset": 0, "splits": {split: dict.fromkeys(COUNTS, 0) for split in SPLITS}}


def copy_of(cursor: dict[str, Any]) -> dict[str, Any]:
    """A copy of `cursor` that later counting does not change."""
    return {**cursor, "splits": {split: dict(totals) for split, totals in cursor["splits"].items()}}


# --------------------------------------------------------------------------------------------------- manifest


def read_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of an earlier run into `out`, or None. Raises InputError where another tool wrote it."""
    path = out / MANIFEST
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: this is a file; give a folder")
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    ours = isinstance(manifest, dict) and manifest.get("made_by") == MADE_BY
    if not ours or not {"complete", "request", "tokenizer", "shards"} <= manifest.keys():
        raise InputError(f"--out {out}: {MANIFEST} there is not of {MADE_BY}; choose another folder")
    return manifest


def write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest of `out` in one step. Raises InputError."""
    write_whole(out / MANIFEST, [json.dumps(manifest, indent=1).encode("utf-8") + b"\n"])


def made_files(out: Path, manifest: dict[str, Any]) -> list[Path]:
    """Every file of `out` that the runs behind `manifest` may have made.

    The next shard of each split is one of them: a run may be stopped after a rename and before its record.
    """
    names = []
    for split in SPLITS:
        count = sum(shard["split"] == split for shard in manifest["shards"])
        kinds = [split, *[SIDECAR] * has_sidecar(manifest, split)]
        names += [shard_name(kind, index) for kind in kinds for index in range(count + 1)]
    return [out / name for name in (*names, TOKENIZER, MANIFEST)]


def remove_made(out: Path, manifest: dict[str, Any], only_temporary: bool = False) -> None:
    """Remove what the runs behind `manifest` made in `out`, or only what they left half-written."""
    for path in made_files(out, manifest):
        temporary_name(path).unlink(missing_ok=True)
        if not only_temporary:
            path.unlink(missing_ok=True)


def check_same_request(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise InputError naming the first difference between the recorded request and this one."""
    for key in new:
        if old.get(key) == new[key]:
            continue
        found, asked = old.get(key), new[key]
        if isinstance(found, dict) and isinstance(asked, dict):
            parts = [part for part in {**found, **asked} if found.get(part) != asked.get(part)]
            found, asked = ({part: side.get(part) for part in parts} for side in (found, asked))
        raise InputError(
            f"--out {out}: made with another {key.replace('_', '-')}: {json.dumps(found)} there, "
            f"{json.dumps(asked)} now; choose another folder or pass --force to replace what is there"
        )


def check_fresh_folder(out: Path, model: bytes | None, manifest: dict[str, Any] | None) -> None:
    """Raise InputError where `out` holds files, not of `manifest`, that the run would mix with its own."""
    own = made_files(out, manifest) if manifest is not None else []
    strange = sorted(path.name for path in out.glob("fineweb_*.bin") if path not in own)
    tokenizer = out / TOKENIZER
    if not strange and tokenizer not in own and tokenizer.exists() and tokenizer.read_bytes() != model:
        strange = [TOKENIZER]
    if strange:
        raise InputError(
            f"--out {out}: holds {strange[0]} ({len(strange)} such file(s)) not made by {MADE_BY}; "
            "choose another folder or move them away"
        )


def keep_whole_shards(out: Path, manifest: dict[str, Any]) -> bool:
    """Cut the record at the first shard that is missing or not whole; whether all were there."""

    def is_whole(shard: dict[str, Any]) -> bool:
        names = [shard["name"]]
        if has_sidecar(manifest, shard["split"]):
            names.append(shard["name"].replace("_val_", f"_{SIDECAR}_"))
        return all(shard_is_whole(out / name, shard["tokens"]) for name in names)

    recorded = manifest["shards"]
    manifest["shards"] = list(itertools.takewhile(is_whole, recorded))
    return len(manifest["shards"]) == len(recorded)


# -------------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Settings:
    """The command line, checked. Exactly one of `tokenizer` and `train_tokenizer` is set."""

    docs: str
    tokenizer: Path | None
    train_tokenizer: int | None
    out: Path
    val_docs: int | None
    max_docs: int | None
    shard_tokens: int
    sample_bytes: int
    workers: int
    force: bool
    caseops: bool


class Progress:
    """A tqdm bar on a terminal that has tqdm, else a plain line on stderr every few seconds."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.documents = self.tokens = self.bytes = 0
        self.bar = self.make_bar()

    @staticmethod
    def make_bar() -> "tqdm | None":
        """A bar in bytes of text, or None."""
        if not sys.stderr.isatty():
            return None
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        return tqdm(desc="tokenizing", unit="B", unit_scale=True)

    def add(self, encoded: Encoded) -> None:
        """Count a batch and show it."""
        size = int(encoded.source_bytes.sum())
        self.documents += len(encoded.counts)
        self.tokens += encoded.ids.size
        self.bytes += size
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.tokens:,} tokens", refresh=False)
            self.bar.update(size)
        elif now - self.last >= PLAIN_PROGRESS_SECONDS:
            self.last = now
            rate = self.bytes / (now - self.start) / 1e6
            text = f"tokenizing: {self.documents:,} documents, {self.tokens:,} tokens, {rate:.1f} MB/s"
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the last state of the bar on the terminal."""
        if self.bar is not None:
            self.bar.close()


def read_model(path: Path | None, marks: bool) -> bytes | None:
    """The bytes of `--tokenizer`, checked; None where one is to be trained. Raises InputError.

    `marks` says whether it has to know the marks of CaseOps text.
    """
    if path is None:
        return None
    if not path.is_file():
        raise InputError(
            f"--tokenizer {path}: no such file; give a SentencePiece .model, or --train-tokenizer"
        )
    model = path.read_bytes()
    check_marks(model, marks, f"--tokenizer {path}")
    return model


def make_request(settings: Settings, source: Source, model: bytes | None) -> dict[str, Any]:
    """Everything that decides the bytes of the shards, as stored in the manifest."""
    if model is None:
        tokenizer = {"train": settings.train_tokenizer, "sample_bytes": settings.sample_bytes}
    else:
        tokenizer = {"sha256": hashlib.sha256(model).hexdigest()}
    return {
        "docs": source.identity,
        "transform": caseops.NAME if settings.caseops else None,
        "tokenizer": tokenizer,
        "val_docs": choose_val_docs(source, settings.val_docs, settings.max_docs),
        "max_docs": settings.max_docs,
        "shard_tokens": settings.shard_tokens,
    }


def train_on_source(settings: Settings, source: Source, val_docs: int) -> bytes:
    """Train the tokenizer on a sample of the train documents of `source`. Raises InputError."""
    assert settings.train_tokenizer is not None
    total = 0 if source.kind == "jsonl" else sum(path.stat().st_size for path in source.files)
    # Files are listed by name, so their first 20 MB could be one corner of the folder; a .jsonl is taken from
    # its start, as the length of a compressed one shows only at its end.
    keep = min(1.0, settings.sample_bytes / total) if total else 1.0
    items, marks = select(source, val_docs, settings.max_docs), ()
    if settings.caseops:
        items, marks = (item._replace(text=caseops.encode(item.text)) for item in items), tuple(caseops.MARKS)
    sample = tokenizer_sample(items, keep, settings.sample_bytes)
    return train_tokenizer(sample, settings.train_tokenizer, marks)


def new_manifest(request: dict[str, Any], model: bytes) -> dict[str, Any]:
    """The manifest of a run that has written nothing yet."""
    processor = load_tokenizer(model, TOKENIZER)
    return {
        "made_by": MADE_BY,
        "complete": False,
        "request": request,
        "tokenizer": {
            "file": TOKENIZER,
            "vocab_size": processor.vocab_size(),
            "bos_id": processor.bos_id(),
            "sha256": hashlib.sha256(model).hexdigest(),
        },
        "versions": {
            "python": platform.python_version(),
            "sentencepiece": spm.__version__,
            "numpy": np.__version__,
        },
        "splits": {},
        "shards": [],
    }


def start_or_resume(
    settings: Settings, source: Source, model: bytes | None
) -> tuple[dict[str, Any], bytes | None]:
    """The manifest to go on from and the model at hand; (manifest, None) where everything is up to date.

    `model` is the one given, or None. Raises InputError on a folder of something else, on too few documents,
    and where no tokenizer can be trained.
    """
    request = make_request(settings, source, model)
    manifest = read_manifest(settings.out)
    if manifest is not None and not settings.force:
        check_same_request(settings.out, manifest["request"], request)
        return resume(settings, source, manifest, model)
    check_fresh_folder(settings.out, model, manifest)
    check_enough_documents(source, request["val_docs"], settings.max_docs)
    model = model or train_on_source(settings, source, request["val_docs"])
    if manifest is not None:
        remove_made(settings.out, manifest)
    manifest = new_manifest(request, model)
    settings.out.mkdir(parents=True, exist_ok=True)
    # The manifest first: it is what tells a later run that a tokenizer.model in this folder is its own.
    write_manifest(settings.out, manifest)
    write_whole(settings.out / TOKENIZER, [model])
    return manifest, model


def resume(
    settings: Settings, source: Source, manifest: dict[str, Any], model: bytes | None
) -> tuple[dict[str, Any], bytes | None]:
    """As start_or_resume, for a folder with a manifest of the same request."""
    out = settings.out
    remove_made(out, manifest, only_temporary=True)
    tokenizer = out / TOKENIZER
    wanted = manifest["tokenizer"]["sha256"]
    present = tokenizer.read_bytes() if tokenizer.exists() else b""
    same = hashlib.sha256(present).hexdigest() == wanted
    if keep_whole_shards(out, manifest) and manifest["complete"] and same:
        return manifest, None
    manifest["complete"] = False
    if not same:
        present = model or train_on_source(settings, source, manifest["request"]["val_docs"])
        if hashlib.sha256(present).hexdigest() != wanted:
            raise InputError(f"--out {out}: {TOKENIZER} is gone and training gives another one; pass --force")
        write_whole(tokenizer, [present])
    return manifest, present


def run(settings: Settings) -> None:
    """Prepare the shards of `settings`, anew or from where an earlier run stopped. Raises InputError."""
    source = open_source(settings.docs)
    manifest, model = start_or_resume(settings, source, read_model(settings.tokenizer, settings.caseops))
    if model is None:
        print("up to date: nothing to do")
        print_summary(settings.out, manifest)
        return
    export = Export(settings.out, manifest)
    done = export.cursor["document"]
    if manifest["shards"]:
        print(f"going on after {len(manifest['shards'])} finished shard(s), at document {done:,}")
    request = manifest["request"]
    items = itertools.islice(select(source, request["val_docs"], request["max_docs"]), done, None)
    try:
        write_shards(items, model, settings.workers, export)
    except DataError:
        remove_made(settings.out, manifest)
        raise
    print_summary(settings.out, manifest)


def write_shards(items: Iterator[Item], model: bytes, workers: int, export: Export) -> None:
    """Encode `items` and write them all. Raises InputError."""
    stream = encode_all(items, model, workers)
    with contextlib.closing(stream), contextlib.closing(Progress()) as progress:
        for batch, encoded in stream:
            export.add(batch, encoded)
            progress.add(encoded)
    export.finish()


def print_summary(out: Path, manifest: dict[str, Any]) -> None:
    """Totals of a complete manifest and the command to train on them."""
    for split, totals in manifest["splits"].items():
        shards = sum(shard["split"] == split for shard in manifest["shards"])
        documents, tokens = totals["documents"], totals["tokens"]
        size, accounted = totals["source_bytes"], totals["accounted_bytes"]
        print(
            f"{split:5s} {documents:,} documents, {tokens:,} tokens in {shards} shard(s), "
            f"{size:,} bytes of text, {accounted:,} bytes accounted ({accounted / tokens:.3f} a token)"
        )
        left_out = [f"{totals[reason]:,} {reason}" for reason in DROPPED if totals[reason]]
        if left_out:
            print(f"      left out: {', '.join(left_out)}")
    vocab_size = manifest["tokenizer"]["vocab_size"]
    where, tokenizer = shlex.quote(str(out)), shlex.quote(str(out / TOKENIZER))
    print(f"shards, {TOKENIZER} ({vocab_size} pieces) and {MANIFEST} are in {out}; to train:")
    knobs = f"VOCAB_SIZE={vocab_size}" + " CASEOPS_ENABLED=1" * has_sidecar(manifest, "val")
    print(f"DATA_PATH={where} TOKENIZER_PATH={tokenizer} {knobs} python train_gpt.py")


# ----------------------------------------------------------------------------------------------- command line


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports a fault as InputError, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        raise InputError(f"{message}; see --help")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A parser of whole numbers in low..high, underscores and commas allowed."""

    def parse(text: str) -> int:
        try:
            value = int(text.replace(",", ""))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number; allowed: {low}..{high}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range; allowed: {low}..{high}")
        return value

    return parse


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = OneLineParser(description="Turn documents into token shards.", allow_abbrev=False)
    count = whole_number(1, 2**31 - 1)
    add = parser.add_argument
    add("--docs", required=True, help=f"{' '.join(JSONL_SUFFIXES)}, a folder of text, or the word python")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", type=Path, metavar="MODEL", help="a SentencePiece .model file")
    which.add_argument(
        "--train-tokenizer",
        type=whole_number(MIN_VOCAB, MAX_VOCAB),
        metavar="VOCAB",
        help="train one of so many pieces on the train documents",
    )
    add("--out", required=True, type=Path, metavar="FOLDER", help="where the shards go")
    add("--val-docs", type=count, metavar="N", help="validation documents: 50,000 of .jsonl, 1/20 of files")
    add("--max-docs", type=count, metavar="N", help="stop after so many documents of the source")
    add(
        "--shard-tokens",
        type=whole_number(1, 10**9),
        default=SHARD_TOKENS,
        metavar="N",
        help="tokens in a full shard",
    )
    add("--sample-bytes", type=count, default=SAMPLE_BYTES, metavar="N", help="text to train a tokenizer on")
    add("--workers", type=whole_number(1, 1024), default=os.cpu_count() or 1, metavar="N", help="processes")
    add("--caseops", action="store_true", help="small letters and marks for capitals, and byte sidecars")
    add("--force", action="store_true", help="replace what an earlier run of this script made in FOLDER")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; 0, 2 with one line on stderr, or 130 when interrupted."""
    try:
        run(Settings(**vars(build_parser().parse_args(argv))))
    except InputError as error:
        message, status = str(error), 2
    except OSError as error:
        message, status = f"{error.filename or 'the system'}: {error.strerror or error}", 2
    except KeyboardInterrupt:
        message, status = "interrupted; the same command goes on after the last finished shard", 130
    else:
        return 0
    print(f"prepare.py: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
