"""Freeze train_gpt.py for one env file, pack it into one small file, prove it, and count the bytes.

    python build_submission.py records/baseline/env --out runs/submission
    python build_submission.py records/baseline/env --weights runs/baseline/model.ptz --out runs/submission

Each stage is a program with the behaviour of the one before, and --until stops at one of them:

    source   train_gpt.py, told everything by its environment
    frozen   the same text; three constants hold the recipe, and the environment may only change the live
             sections of Config (LIVE_SECTIONS: run, budget, compute)
    packed   the frozen text, compressed, in a file of a few lines that unpacks and runs it

The proof: the tiny twin of each stage (the same edits with the `tiny` value of every knob that has one, and
the recipe's own value of the others) trains, exports and scores on a toy corpus, and its trace.jsonl must be
that of the source, byte for byte. What is written differs from its twin in the values of the constants
alone, and when asked it reads the recipe's configuration out of itself. Nothing is written unless all holds.
The same inputs and the same versions give the same bytes. Exit status: 1 for a broken proof or for too many
bytes, 2 for a fault in what was given.
"""

from __future__ import annotations

import argparse
import ast
import base64
import gc
import hashlib
import importlib
import itertools
import json
import linecache
import lzma
import os
import platform
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import brotli
import numpy as np
import sentencepiece
import torch

import train_gpt
from train_gpt import UserError

ROOT = Path(__file__).resolve().parent
SOURCE = ROOT / "train_gpt.py"
STAGES = ("frozen", "packed")  # what --until may name, in order
PROGRAM, WEIGHTS, REPORT = "train_gpt.py", "model.ptz", "build.json"  # the files of a submission
RECIPE_CONSTANTS = ("FROZEN", "LIVE_DEFAULTS")  # whose values a file and its twin may differ in
# Knobs of the run section that say what one run does, and so belong to no recipe.
ONE_RUN = ("RUN_DIR", "RESUME", "OVERWRITE", "EVAL_ONLY", "ARTIFACT", "SAMPLE", "PRECOMPILE", "NLL_PATH")
# What a twin is told beside the tiny values: run where every run gives the same bits, validate on the way.
TWIN = {"DEVICE": "cpu", "DTYPE": "float32", "COMPILE": "0", "VAL_LOSS_EVERY": "3"}
TWIN_SECONDS = 300  # a tiny run takes one; after so many it is killed, and the proof is broken


class BuildError(Exception):
    """The build went wrong where the input was right. Its text is one line."""


# ---------------------------------------------------------------------------------------- the recipe

# What a shell reads in the same way: one assignment, quoted as a whole or not at all, nothing to expand.
ASSIGNMENT = re.compile(
    r"""[ \t]*(?:export[ \t]+)?(?P<name>[A-Za-z_]\w*)=
        (?:'(?P<single>[^']*)'|"(?P<double>[^"$`\\]*)"|(?P<bare>[\w./,:+@%=-]*))
        (?:[ \t]+\#.*)?[ \t]*""",
    re.VERBOSE | re.ASCII,
)
COMMENT = re.compile(r"[ \t]*(#.*)?")


def read_env_file(path: Path) -> dict[str, str]:
    """KEY=value lines -> name to text, as a shell reads them. Raises UserError naming the first bad line."""
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; name a file of KEY=value lines") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text; name a file of KEY=value lines") from e
    env = {}
    for number, line in enumerate(lines, 1):
        if COMMENT.fullmatch(line):
            continue
        match = ASSIGNMENT.fullmatch(line)
        if not match:
            raise UserError(
                f"{path}:{number}: {line[:80]!r} is not KEY=value, with the value plain or in quotes, and "
                f"without $, ` and \\"
            )
        if match["name"] in env:
            raise UserError(f"{path}:{number}: {match['name']} is set a second time; keep one")
        env[match["name"]] = match["single"] or match["double"] or match["bare"] or ""
    return env


@dataclass(frozen=True)
class Recipe:
    """The knobs that an env file sets, by their own names, each as the text that `knob_values` gives it."""

    frozen: dict[str, str]
    live: dict[str, str]  # of LIVE_SECTIONS: the recipe's value unless the environment has another

    @property
    def env(self) -> dict[str, str]:
        return {**self.live, **self.frozen}

    @property
    def cfg(self) -> train_gpt.Config:
        return train_gpt.read_config(self.env)


def make_recipe(env: dict[str, str]) -> Recipe:
    """Check the knobs and sort them. Raises UserError for unknown names and what `read_config` refuses."""
    known = {*train_gpt.all_knobs(), *train_gpt.ALIASES, *train_gpt.WITHOUT_EFFECT}
    strangers = [unknown_knob(name) for name in env if name not in known]
    strangers += [f"{name} is about one run, not part of a recipe" for name in ONE_RUN if name in env]
    if strangers:
        raise UserError("; ".join(strangers))
    values, live, frozen = train_gpt.knob_values(train_gpt.read_config(env)), {}, {}
    for name in train_gpt.resolve_aliases(env):
        if name in values:
            section = train_gpt.all_knobs()[name][0]
            (live if section in train_gpt.LIVE_SECTIONS else frozen)[name] = values[name]
    return Recipe(frozen, live)


def unknown_knob(name: str) -> str:
    near = train_gpt.near_misses({name: ""})
    return near[0] if near else f"{name} is not a knob, so no submission can carry it; --knobs lists them"


def tiny_twin(recipe: Recipe) -> Recipe:
    """The recipe with its features as they are and every size small. Raises UserError where that is none."""
    try:
        return make_recipe({**recipe.env, **train_gpt.tiny_env(), **TWIN})
    except UserError as e:
        raise UserError(f"no tiny twin of this recipe: {e}; train_gpt.py wants a `tiny` value for it") from e


# ------------------------------------------------------------------------------------------ freezing


def find_constants(tree: ast.Module, names: tuple[str, ...]) -> list[ast.Assign | ast.AnnAssign]:
    """The assignments of some names. Raises BuildError unless each has one, with a value, at top level."""
    stores = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)]
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[ast.unparse(target)] = node
    for name in names:
        if stores.count(name) != 1 or name not in found:
            raise BuildError(f"{name} is set {stores.count(name)} times in train_gpt.py, want one constant")
    return [found[name] for name in names]


def set_constants(source: str, texts: dict[str, str]) -> str:
    """Put other expressions in the place of constants' values; all other characters stay as they are."""
    raw = source.encode()  # the tree counts columns in bytes
    starts = [0, 0, *itertools.accumulate(len(line) for line in raw.splitlines(keepends=True))]
    edits = []
    for node, text in zip(find_constants(ast.parse(source), tuple(texts)), texts.values(), strict=True):
        first = starts[node.value.lineno] + node.value.col_offset
        last = starts[node.value.end_lineno] + node.value.end_col_offset
        edits.append((first, last, text.encode()))
    for first, last, text in sorted(edits, reverse=True):
        raw = raw[:first] + text + raw[last:]
    return raw.decode()


def dict_text(values: dict[str, str]) -> str:
    """A dict display with a row for each knob."""
    rows = [f'    "{name}": {text_literal(text)},\n' for name, text in values.items()]
    return "{\n" + "".join(rows) + "}" if rows else "{}"


def text_literal(text: str) -> str:
    """The text as Python and JSON both spell it, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def freeze(source: str, recipe: Recipe, stage: str) -> str:
    """The source with the recipe and the name of the stage in its constants. Raises BuildError."""
    texts = {"FROZEN": dict_text(recipe.frozen), "LIVE_DEFAULTS": dict_text(recipe.live)}
    return set_constants(source, texts | {"SOURCE_STAGE": text_literal(stage)})


def without_constants(source: str, names: tuple[str, ...]) -> str:
    """What two sources share when they differ in the values of some constants alone."""
    return set_constants(source, dict.fromkeys(names, "None"))


# ------------------------------------------------------------------------------------------- packing


class Codec(NamedTuple):
    """A compressor whose decoder is wherever train_gpt.py runs: the standard library, or brotli."""

    module: str
    compress: Callable[[bytes], bytes]
    decompress: str  # the expression that undoes it; {} is the data


def raw_deflate(data: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(data) + deflate.flush()


def raw_lzma(data: bytes) -> bytes:
    chain = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0}  # text has no alignment
    return lzma.compress(data, lzma.FORMAT_RAW, filters=[chain])


LZMA_DECODER = "lzma.decompress({}, lzma.FORMAT_RAW, None, [{{'id': lzma.FILTER_LZMA2}}])"
CODECS = {
    "brotli": Codec("brotli", train_gpt.squeeze, "brotli.decompress({})"),
    "lzma": Codec("lzma", raw_lzma, LZMA_DECODER),
    "zlib": Codec("zlib", raw_deflate, "zlib.decompress({}, -15)"),
}
# The unpacked text stands in linecache under the file's own name: read_facts, inspect (also of classes),
# Triton and tracebacks find it there, without a file that eight ranks would race for. No modification time
# (None) keeps linecache from checking it against the file. The last line is short: a traceback may show it.
EXTRACTOR = """# Packed by build_submission.py. A run writes the unpacked source at the head of its train.log.
import base64, io, linecache, {module}
unpacked = {decompress}.decode()
linecache.cache[__file__] = len(unpacked), None, io.StringIO(unpacked).readlines(), __file__
exec(compile(unpacked, __file__, "exec"))
"""


def pack(text: str, name: str) -> bytes:
    """A program that unpacks the text and runs it as `__main__`, of which `__file__` is the packed file."""
    codec = CODECS[name]
    data = base64.b85encode(codec.compress(text.encode())).decode()
    decompress = codec.decompress.format(f'base64.b85decode("{data}")')
    return EXTRACTOR.format(module=codec.module, decompress=decompress).encode()


class Stage(NamedTuple):
    """A program and the text that runs in it: the same, unless it is packed."""

    name: str
    program: bytes
    text: str


def make_stages(source: str, recipe: Recipe, until: str, codec: str) -> dict[str, Stage]:
    """Stage name -> stage, in order, the source first and `until` last."""
    stages = {"source": Stage("source", source.encode(), source)}
    for name in STAGES[: STAGES.index(until) + 1]:
        text = freeze(source, recipe, name)
        stages[name] = Stage(name, pack(text, codec) if name == "packed" else text.encode(), text)
    return stages


def packed_sizes(source: str, recipe: Recipe) -> dict[str, int]:
    """Codec -> bytes of the packed program, the smallest first."""
    text = freeze(source, recipe, "packed")
    sizes = {name: len(pack(text, name)) for name in CODECS}
    return dict(sorted(sizes.items(), key=lambda item: (item[1], item[0])))


# ------------------------------------------------------------------------------------ the toy corpus

SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeiou"]


def toy_sentences(count: int, seed: int) -> list[str]:
    """Sentences of made-up words; a few hold letters that a small tokenizer spells in bytes."""
    rng, sentences = random.Random(seed), []
    for _ in range(count):
        words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(rng.randint(4, 20))]
        words += rng.choices(["café", "Ω", "2026"], k=rng.random() < 0.1)
        sentences.append(" ".join(words).capitalize() + ".")
    return sentences


def make_toy_data(folder: Path) -> dict[str, str]:
    """Write a tokenizer of 320 pieces, a training shard and a validation shard; the knobs that name them."""
    folder.mkdir()
    sentences = {"train": toy_sentences(400, seed=1), "val": toy_sentences(40, seed=2)}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences["train"]),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=int(train_gpt.tiny_env()["VOCAB_SIZE"]),
        byte_fallback=True,
        add_dummy_prefix=False,
        num_threads=1,
        minloglevel=2,
        **{"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3},
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for split, texts in sentences.items():
        ids = np.array([i for text in texts for i in (tokenizer.bos_id(), *tokenizer.encode(text))])
        header = np.zeros(train_gpt.HEADER_BYTES // 4, "<i4")
        header[:3] = train_gpt.MAGIC, train_gpt.VERSION, len(ids)
        shard = header.tobytes() + ids.astype("<u2").tobytes()
        (folder / f"fineweb_{split}_000000.bin").write_bytes(shard)
    return {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(folder / "tokenizer.model")}


# ------------------------------------------------------------------------------------------- running

INHERITED = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH")  # of the environment, and no knob
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "LANG": "C.UTF-8"}


def run_programs(programs: dict[Path, dict[str, str]]) -> None:
    """Run programs at once, each in its own folder with nothing but its own knobs. Raises BuildError.

    One process imports torch and forks a child for each: a child shares the import and nothing else.
    Operators, signal handlers, caches and `__main__` are its own, as in a process started for it.
    """
    base = {name: os.environ[name] for name in INHERITED if name in os.environ} | ONE_THREAD
    jobs = [{"program": str(p), "env": base | env, "limit": TWIN_SECONDS} for p, env in programs.items()]
    done = subprocess.run(
        [sys.executable, "-c", "import build_submission; build_submission.run_jobs()"],
        input=json.dumps(jobs), cwd=ROOT, env=base, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise BuildError(f"the proof could not run: {last_line(done.stdout + done.stderr)}")
    for path, status in zip(programs, json.loads(done.stdout), strict=True):
        if status == -signal.SIGALRM:
            raise BuildError(f"the {path.parent.name} program still runs after {TWIN_SECONDS} s")
        if status:
            told = last_line(path.with_name("output.txt").read_text(errors="replace"))
            raise BuildError(f"the {path.parent.name} program ends with status {status}: {told}")


def run_jobs() -> None:
    """The process that forks: jobs as JSON on stdin -> their exit statuses as JSON on stdout.

    It runs no operator of torch, so there is no thread that a fork would lose.
    """
    importlib.import_module("torch._dynamo")  # or each program imports it for itself, in 0.7 s
    gc.freeze()  # or each child, when it ends, spends half a second on the garbage of the imports
    children = [start_job(job) for job in json.load(sys.stdin)]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))


def start_job(job: dict) -> int:
    """Fork a child that runs a program as `python program` would; its process id. The child never returns.

    Seconds beyond the job's limit end it with SIGALRM, for which nothing in a program listens.
    """
    child = os.fork()
    if child:
        return child
    program = Path(job["program"])
    output = os.open(program.with_name("output.txt"), os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    os.chdir(program.parent)
    os.environ.clear()
    os.environ.update(job["env"])
    signal.alarm(job["limit"])
    runpy.run_path(str(program), run_name="__main__")
    sys.exit()


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


# ----------------------------------------------------------------------------------------- the proof


def prove(twins: dict[str, Stage], tiny: Recipe, folder: Path) -> dict[str, object]:
    """Run every twin and compare with the source what they trace and what they say of themselves.

    Only the source is told the recipe; the others have it in them. Returns the figures for the report;
    raises BuildError naming the first line in which two traces differ.
    """
    data, programs = make_toy_data(folder / "toy"), {}
    for name, twin in twins.items():
        path = folder / name / PROGRAM
        path.parent.mkdir()
        path.write_bytes(twin.program)
        programs[path] = {**(tiny.env if name == "source" else {}), **data, "RUN_DIR": "run"}
    run_programs(programs)
    trace = read_trace(folder / "source")
    if b'"artifact_sha256"' not in trace or b'"score"' not in trace:
        raise BuildError("the source traced no artifact or no score, so there is nothing to compare with")
    for name in twins:
        compare_traces(name, read_trace(folder / name), trace)
    results = {name: json.loads((folder / name / "run" / "results.json").read_text()) for name in twins}
    for name, twin in twins.items():
        compare_results(twin, results[name], results["source"])
    return {"programs": list(twins), "lines": trace.count(b"\n"), "sha256": sha256(trace)}


def read_trace(folder: Path) -> bytes:
    """What a twin traced; nothing where it ended well and yet wrote nothing."""
    path = folder / "run" / "trace.jsonl"
    return path.read_bytes() if path.exists() else b""


def compare_traces(name: str, trace: bytes, source: bytes) -> None:
    """Raise BuildError, with the first line that differs in both, unless they are equal byte for byte."""
    if trace == source:
        return
    pairs = itertools.zip_longest(source.splitlines(), trace.splitlines())
    number, (theirs, ours) = next((i, pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    shown = [line.decode(errors="replace") if line is not None else "no line" for line in (theirs, ours)]
    raise BuildError(
        f"the {name} program behaves otherwise: line {number} of trace.jsonl is {shown[0]} from the source "
        f"and {shown[1]} from it"
    )


def compare_results(twin: Stage, results: dict, source: dict) -> None:
    """Raise BuildError unless a program tells its stage, text and size right, and has the source's knobs."""
    pairs = {
        "stage": (results["stage"], twin.name),
        "source_sha256": (results["source_sha256"], sha256(twin.text.encode())),
        "bytes of code": (results["bytes"]["code"], len(twin.program)),
        "knobs": (results["config"], source["config"]),
    }
    for what, (told, true) in pairs.items():
        if told != true:
            raise BuildError(f"the {twin.name} program reports other {what}: {differing(told, true)}")


def differing(found: object, wanted: object) -> str:
    """`found, want wanted`, of two dicts only the values that are not equal."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
        found, wanted = ({name: side.get(name) for name in names} for side in (found, wanted))
    return f"{found!r}, want {wanted!r}"


def check_shipped(stages: dict[str, Stage], twins: dict[str, Stage], recipe: Recipe) -> None:
    """What is shipped is its twin, and the source, with the recipe's own values. Raises BuildError."""
    constants = (*RECIPE_CONSTANTS, "SOURCE_STAGE")
    source = without_constants(stages["source"].text, constants)
    for name in list(stages)[1:]:
        text, twin = stages[name].text, twins[name].text
        if without_constants(text, RECIPE_CONSTANTS) != without_constants(twin, RECIPE_CONSTANTS):
            raise BuildError(f"the {name} program differs from its proven twin in more than the recipe")
        if without_constants(text, constants) != source:
            raise BuildError(f"the {name} program differs from the source in more than three constants")
        check_program(stages[name], recipe)


def check_program(stage: Stage, recipe: Recipe) -> None:
    """Load the program itself and ask for its configuration and its text. Raises BuildError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PROGRAM
        path.write_bytes(stage.program)
        scope = runpy.run_path(str(path), run_name=stage.name)
        text = "".join(linecache.getlines(scope["read_facts"].__code__.co_filename))
    try:
        values = scope["knob_values"](scope["read_config"](scope["thawed"]({})))
    except scope["UserError"] as e:
        raise BuildError(f"the {stage.name} program refuses its own recipe: {e}") from e
    wanted = train_gpt.knob_values(recipe.cfg)
    if values != wanted:
        raise BuildError(f"the {stage.name} program has other knobs: {differing(values, wanted)}")
    if text != stage.text:
        raise BuildError(f"the {stage.name} program unpacks to another text than was packed")


# ------------------------------------------------------------------------------------------- weights


class Weights(NamedTuple):
    """An artifact that belongs to the recipe."""

    blob: bytes
    tensors: int
    differ: dict[str, list[str]]  # live knobs -> their value in training, and in the recipe


def read_weights(path: Path, recipe: Recipe) -> Weights:
    """Decode an artifact with the recipe's model and codecs. Raises UserError if it does not belong."""
    cfg = recipe.cfg
    train_gpt.artifact_env(path, train_gpt.knob_values(cfg))
    blob = path.read_bytes()
    artifact = train_gpt.open_artifact(blob, cfg, alone(), str(path))
    differ = trained_otherwise(path, artifact.config_hash, cfg)
    sections = {name: section for name, (section, _) in train_gpt.all_knobs().items()}
    foreign = [name for name in differ if sections.get(name) not in train_gpt.LIVE_SECTIONS]
    if foreign:
        told = [f"{name} (trained with {differ[name][0]}, now {differ[name][1]})" for name in foreign]
        raise UserError(f"{path} belongs to another configuration: {', '.join(told)}")
    return Weights(blob, len(artifact.tensors), differ)


def alone() -> train_gpt.World:
    """One rank on the CPU that writes nothing."""
    journal = train_gpt.Journal(None)
    return train_gpt.World(0, 1, torch.device("cpu"), torch.float32, False, journal, Path())


def trained_otherwise(path: Path, config_hash: str, cfg: train_gpt.Config) -> dict[str, list[str]]:
    """Knobs in which the run that trained an artifact differs: name -> [there, here].

    Their names are in the run's results.json. Raises UserError where that is not beside the artifact.
    """
    if config_hash == train_gpt.config_hash(cfg):
        return {}
    try:
        results = json.loads(path.with_name("results.json").read_text())
        theirs = results["config"] if results["config_hash"] == config_hash else None
    except (OSError, ValueError, KeyError, TypeError):
        theirs = None
    if not isinstance(theirs, dict):
        raise UserError(
            f"{path} was trained under another configuration (hash {config_hash}, now "
            f"{train_gpt.config_hash(cfg)}), and the results.json of its run, which tells the knobs, is not "
            f"beside it"
        )
    mine = train_gpt.identity(cfg)
    return {k: [theirs.get(k, "unset"), text] for k, text in mine.items() if theirs.get(k, "unset") != text}


# ------------------------------------------------------------------------------------ the submission


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def refuse_other_files(out: Path) -> None:
    """Raise UserError unless the folder is new, empty, or an earlier build."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    others = sorted({path.name for path in out.glob("*")} - {PROGRAM, WEIGHTS, REPORT})
    if others:
        told = ", ".join(others[:3])
        raise UserError(f"--out {out} holds other files ({told}); name a new or empty folder")


def write_submission(out: Path, files: dict[str, bytes]) -> None:
    """Put all files into place at once, or none. Raises BuildError when they are over the limit."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".build_") as folder:
        new = Path(folder) / "new"
        new.mkdir()
        for name, data in files.items():
            (new / name).write_bytes(data)
        total = counted(new)["total"]
        if total > train_gpt.SIZE_LIMIT:
            raise BuildError(
                f"code and weights are {total:,} bytes, {total - train_gpt.SIZE_LIMIT:,} above "
                f"{train_gpt.SIZE_LIMIT:,}; lower MATRIX_BITS or EMBED_BITS, or train a smaller model"
            )
        if out.exists():
            out.rename(Path(folder) / "old")
        new.rename(out)


def counted(folder: Path) -> dict[str, int]:
    """Bytes that the challenge counts, as the disk has them; build.json is for people and is left out."""
    sizes = {name: (folder / name).stat().st_size for name in (PROGRAM, WEIGHTS) if (folder / name).exists()}
    return {"code": sizes[PROGRAM], "weights": sizes.get(WEIGHTS, 0), "total": sum(sizes.values())}


def versions() -> dict[str, str]:
    modules = {"torch": torch, "numpy": np, "brotli": brotli, "sentencepiece": sentencepiece}
    return {"python": platform.python_version()} | {name: m.__version__ for name, m in modules.items()}


def report_of(stages: dict[str, Stage], codecs: dict[str, int], recipe: Recipe) -> dict[str, object]:
    """build.json but for its checks: what was built from what. No times, no paths."""
    programs = {name: stage.program for name, stage in stages.items()}
    return {
        "stage": list(stages)[-1],
        "stages": {name: {"bytes": len(p), "sha256": sha256(p)} for name, p in programs.items()},
        "packed_bytes_by_codec": codecs,
        "config_hash": train_gpt.config_hash(recipe.cfg),
        "frozen": recipe.frozen,
        "live": recipe.live,
        "versions": versions(),
    }


def print_table(stages: dict[str, Stage], codecs: dict[str, int], out: Path) -> None:
    """The stages, then what is counted, as the disk has it, against the limit."""
    sizes = counted(out)
    rows = [(name, len(stage.program), "") for name, stage in stages.items()]
    if "packed" in stages:
        rows[-1] = (*rows[-1][:2], ", ".join(f"{name} {size:,}" for name, size in codecs.items()))
    rows += [
        ("code", sizes["code"], PROGRAM),
        ("weights", sizes["weights"], WEIGHTS if sizes["weights"] else "none given"),
        ("total", sizes["total"], ""),
        ("limit", train_gpt.SIZE_LIMIT, ""),
        ("left", train_gpt.SIZE_LIMIT - sizes["total"], f"in {out}"),
    ]
    for name, size, note in rows:
        print(f"  {name:<8}{size:>14,}  {note}".rstrip())


# ---------------------------------------------------------------------------------------------- main


def build(env_file: Path, weights_file: Path | None, out: Path, until: str) -> None:
    """From an env file to a folder that can be handed in. Raises UserError and BuildError."""
    env = read_env_file(env_file)
    recipe = make_recipe(env)
    for doubt in train_gpt.near_misses(env):
        print(f"warning: {doubt}", file=sys.stderr)
    tiny = tiny_twin(recipe)
    weights = read_weights(weights_file, recipe) if weights_file else None
    for name, (there, here) in weights.differ.items() if weights else ():
        print(f"note: the weights were trained with {name}={there}, the recipe says {here}")
    refuse_other_files(out)
    source = SOURCE.read_text(encoding="utf-8")
    codecs = packed_sizes(source, recipe)
    stages, twins = (make_stages(source, r, until, next(iter(codecs))) for r in (recipe, tiny))
    with tempfile.TemporaryDirectory() as folder:
        proof = prove(twins, tiny, Path(folder))
    check_shipped(stages, twins, recipe)
    print(f"proved: {', '.join(twins)} write the same {proof['lines']} lines of trace.jsonl")
    files = {PROGRAM: stages[until].program} | ({WEIGHTS: weights.blob} if weights else {})
    report = report_of(stages, codecs, recipe) | {"checks": checks(proof, weights)}
    report["bytes"] = {"total": sum(map(len, files.values())), "limit": train_gpt.SIZE_LIMIT}
    write_submission(out, files | {REPORT: json.dumps(report, indent=1).encode() + b"\n"})
    print_table(stages, codecs, out)


def checks(proof: dict, weights: Weights | None) -> dict[str, object]:
    """What was found true, for build.json."""
    found = {
        "equal traces": proof,
        "shipped file": "its proven twin but for the recipe, the source but for three constants",
        "its configuration": "the env file's",
    }
    if weights:
        told = {"sha256": sha256(weights.blob), "tensors decoded": weights.tensors}
        found["weights"] = told | {"live knobs that differ": weights.differ}
    return found


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports a fault as UserError, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description="Freeze, pack and prove train_gpt.py.", allow_abbrev=False)
    add = parser.add_argument
    add("env_file", metavar="ENVFILE", type=Path, help="the recipe: KEY=value lines")
    add("--weights", type=Path, metavar="MODEL", help="model.ptz of a run, to ship and to count")
    add("--out", required=True, type=Path, metavar="FOLDER", help="new, empty or an earlier build")
    add("--until", choices=STAGES, default=STAGES[-1], help="the last stage to make")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Build; 0, or 1 or 2 with one line on stderr, or 130 when interrupted."""
    try:
        words = read_arguments(argv)
        build(words.env_file, words.weights, words.out.absolute(), words.until)
    except BuildError as e:
        message, status = f"{e}; nothing was written", 1
    except UserError as e:
        message, status = str(e), 2
    except OSError as e:
        message, status = f"{e.filename or 'the system'}: {e.strerror or e}", 2
    except KeyboardInterrupt:
        message, status = "interrupted; nothing was written", 130
    else:
        return 0
    print(f"build_submission.py: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
