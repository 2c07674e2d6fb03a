"""Whatever is wrong with its input, the program says so in one line, with status 2, and harms nothing."""

import json
import random
import re
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import make_shards, run_program, tiny_env, write_shard
from faults import ending, only_line, plant, play, small, tree
from train_gpt import UserError, near_misses, read_config


@pytest.fixture(scope="module")
def shipped(toy_data, tmp_path_factory) -> dict:
    """The environment of a finished run."""
    env = small(toy_data, tmp_path_factory.mktemp("shipped"), CHECKPOINT_EVERY=0, EMA_DECAY=0.9)
    assert play(env).status == 0
    return env


def refused(env: dict, *fragments: str, **how) -> str:
    """Run; it must end with status 2 and one line of standard error that holds the fragments."""
    outcome = play(env, **how)
    assert outcome.status == 2, outcome
    line = only_line(outcome.err)
    for fragment in fragments:
        assert fragment in line, f"{fragment!r} is not in {line!r}"
    return line


# --------------------------------------------------------------------------------------
# Knobs
# --------------------------------------------------------------------------------------

FIELDS = {env: f for env, (_, f) in train_gpt.all_knobs().items()}
NUMBERS = {e: f for e, f in FIELDS.items() if type(f.default) in (int, float) and not f.metadata["choices"]}
CHOICES = [e for e, f in FIELDS.items() if f.metadata["choices"] or isinstance(f.default, bool)]
BOUNDED = {env: f for env, f in NUMBERS.items() if f.metadata["within"] != (None, None)}


@pytest.mark.parametrize("env", BOUNDED)
def test_a_number_out_of_its_range_is_refused_with_the_range(env):
    bounds, apart = BOUNDED[env].metadata["within"], 1 if type(BOUNDED[env].default) is int else 1e-6
    for bound, sign, away in zip(bounds, (">=", "<="), (-apart, apart), strict=True):
        if bound is None:
            continue
        value, bound = bound + away, f"{sign} {bound}"
        with pytest.raises(UserError, match=f"^{env}='{re.escape(str(value))}' is not allowed; want a ") as e:
            read_config({env: str(value)})
        assert bound in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("env", NUMBERS)
def test_what_is_no_number_is_refused(env):
    whole = type(NUMBERS[env].default) is int
    kind = "a whole number" if whole else "a number"
    for text in ("", "many", "nan", "inf", "-inf", "1,5", "0x10", *["1.5", "1e3"] * whole):
        with pytest.raises(UserError, match=f"^{env}='{text}' is not allowed; want {kind}"):
            read_config({env: text})


@pytest.mark.parametrize("env", CHOICES)
def test_what_is_no_choice_is_refused_with_the_choices(env):
    words = r"\(empty\) or " if "" in FIELDS[env].metadata["choices"] else ".* or "
    for text in {"", "maybe", "2", "-1"} - {*FIELDS[env].metadata["choices"]}:
        with pytest.raises(UserError, match=f"^{env}='{text}' is not allowed; want {words}"):
            read_config({env: text})


SHAPES = {
    "NUM_HEADS=3": ("NUM_HEADS=3", "MODEL_DIM=16"),
    "NUM_KV_HEADS=3": ("NUM_KV_HEADS=3", "NUM_HEADS=2"),
    "NUM_HEADS=16 NUM_KV_HEADS=1": ("MODEL_DIM/NUM_HEADS=1", "odd"),
    "MODEL_DIM=8 MLP_MULT=0.1": ("MLP_MULT=0.1", "MODEL_DIM=8"),
    "TRAIN_SPANS=3": ("TRAIN_SPANS=3", "TRAIN_BATCH_TOKENS=256"),
    "TRAIN_SEQ_LEN=48": ("TRAIN_SEQ_LEN=48", "64 tokens of a span"),
    "NUM_LOOPS=1 LOOP_START=2 LOOP_END=3": ("LOOP_END=3", "NUM_LAYERS=3"),
    "NUM_LOOPS=1 LOOP_START=2 LOOP_END=1": ("LOOP_START=2", "LOOP_END=1"),
    "EVAL_STRIDE=33 SLIDING_WINDOW_ENABLED=1": ("EVAL_STRIDE=33", "context of 32"),
    "SCORE=sliding": ("SCORE=sliding", "SLIDING_WINDOW_ENABLED=1"),
    "GRAD_ACCUM_STEPS=3": ("GRAD_ACCUM_STEPS=3", "4 spans", "TRAIN_SPANS"),
    "DEVICE=cuda": ("DEVICE=cuda", "DEVICE=cpu"),
    "TRAIN_BATCH_TOKENS=524288": ("80000 tokens", "131073", "TRAIN_BATCH_TOKENS"),
    "TRAIN_BATCH_TOKENS=65536 DOC_PACKING=1": ("65540 tokens of one step", "TRAIN_BATCH_TOKENS"),
    "COMPILE=1 PATH=": ("COMPILE=1", "g++", "COMPILE=0"),
    "DTYPE=float16": ("DTYPE='float16'", "auto or float32 or bfloat16"),
    "ITERATIONS=-1": ("ITERATIONS='-1'", ">= 0"),
    "VAL_BATCH_SIZE=64 VAL_BATCH_TOKENS=65": ("VAL_BATCH_SIZE='64'", "VAL_BATCH_TOKENS='65'", "set one"),
    "STRICT=1 MODEL_DIMS=64": ("MODEL_DIMS is not a knob; did you mean MODEL_DIM?",),
    "STRICT=1 TRAIN_ROUNDS=2": ("TRAIN_ROUNDS is not a knob", "--knobs"),
    "STRICT=1 ITERATION=1 SEDE=2": ("did you mean ITERATIONS?", "did you mean SEED?"),
}


@pytest.mark.parametrize("given", SHAPES)
def test_knobs_that_do_not_fit_are_refused_by_name(toy_data, tmp_path, given):
    env = small(toy_data, tmp_path) | dict(pair.split("=", 1) for pair in given.split())
    refused(env, *SHAPES[given])
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(("old", "new"), train_gpt.ALIASES.items())
def test_names_of_other_scripts_work_or_explain_themselves(toy_data, old, new):
    if not new.startswith("refused"):
        f = train_gpt.all_knobs()[new][1]
        number = 1 if isinstance(f.default, bool) else 256
        other = (f.metadata["choices"] or [number])[-1]  # never the default
        assert read_config({old: str(other)}) == read_config({new: str(other)}) != read_config({})
        assert near_misses({old: str(other)}) == []
        return
    with pytest.raises(UserError, match=f"^{old}='1' is refused: .*; unset it$"):
        read_config({old: "1"})


@pytest.mark.parametrize("name", train_gpt.WITHOUT_EFFECT)
def test_names_without_effect_give_a_warning_and_nothing_else(name):
    assert read_config({name: "1"}) == read_config({})
    why = train_gpt.WITHOUT_EFFECT[name]
    assert near_misses({name: "1"}) == [f"{name} is accepted but has no effect: {why}"]


def test_a_mistyped_knob_is_a_warning_and_the_run_goes_on(toy_data, tmp_path):
    env = small(toy_data, tmp_path, ITERATIONS=1)
    outcome = play(env | {"MODEL_DIMS": "64", "MATRIXLR": "1", "PATH_TO": "x"})
    assert (outcome.status, outcome.err) == (0, "")
    warnings = [line for line in outcome.out.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: MATRIXLR is not a knob; did you mean MATRIX_LR?",
        "warning: MODEL_DIMS is not a knob; did you mean MODEL_DIM?",
    ]
    assert warnings[0] in Path(env["RUN_DIR"], "train.log").read_text()


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789"


def typo(word: str, chance: random.Random) -> str:
    """The word with one letter changed, put in, or left out, or two neighbours exchanged."""
    at, letter = chance.randrange(len(word)), chance.choice(LETTERS)
    swapped = word[:at] + word[at : at + 2][::-1] + word[at + 2 :]
    ways = [word[:at] + letter + word[at + 1 :], word[:at] + letter + word[at:], word[:at] + word[at + 1 :]]
    return chance.choice([*ways, swapped])


def test_95_of_100_typos_get_the_right_suggestion():
    known = {*FIELDS, *train_gpt.ALIASES, *train_gpt.WITHOUT_EFFECT}
    chance, wrong = random.Random(0), []
    for env in FIELDS:
        typos = (typo(env, chance) for _ in range(99))
        for bad in [text for text in typos if text not in known][:3]:
            said = near_misses({bad: "1"})
            wrong += [(env, bad, said)] * (not any(f"did you mean {env}?" in line for line in said))
    assert len(wrong) <= 0.05 * 3 * len(FIELDS), f"{len(wrong)} of {3 * len(FIELDS)}: {wrong}"


ELSEWHERE = """
    " PATH HOME LANG LC_ALL SHELL USER LOGNAME TERM PWD OLDPWD EDITOR PAGER SHLVL TMPDIR HOSTNAME DISPLAY
    COLUMNS LINES TZ MAIL DEBUG SSH_AUTH_SOCK XDG_RUNTIME_DIR PYTHONPATH PYTHONHASHSEED VIRTUAL_ENV
    CONDA_PREFIX CI CC CXX RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR
    MASTER_PORT NODE_RANK OMP_SCHEDULE TORCHELASTIC_RUN_ID TORCHELASTIC_MAX_RESTARTS TORCH_LOGS
    TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR KMP_AFFINITY NCCL_DEBUG NCCL_IB_DISABLE NCCL_P2P_DISABLE
    OMP_NUM_THREADS MKL_NUM_THREADS CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_DEVICE_ORDER LD_LIBRARY_PATH
    HF_HOME HF_TOKEN WANDB_MODE WANDB_API_KEY SLURM_JOB_ID SLURM_PROCID NVIDIA_VISIBLE_DEVICES
    KUBERNETES_PORT PYTORCH_CUDA_ALLOC_CONF PYTEST_CURRENT_TEST
"""


def test_what_other_programs_put_into_the_environment_is_left_alone():
    assert near_misses(dict.fromkeys(ELSEWHERE.split(), "1")) == []


# --------------------------------------------------------------------------------------
# Data and tokenizers
# --------------------------------------------------------------------------------------


@pytest.fixture
def data(toy_data, tmp_path) -> Path:
    """A copy of the toy shards, to be spoilt."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in toy_data.path.glob("*.bin"):
        shutil.copy(path, folder)
    return folder


def header(path: Path, index: int, value: int) -> None:
    words = np.fromfile(path, "<i4")
    words[index] = value
    words.tofile(path)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def retoken(path: Path, ids: list[int], at: int = 7) -> None:
    tokens = np.fromfile(path, "<u2")[512:]
    tokens[at : at + len(ids)] = ids
    write_shard(path, tokens)


TRAIN, LATER, VAL = "fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"
MAKE = ("data/prepare.py", "data/download.py")
SPOILT = {  # what is done to the copy -> knobs, and what the line says
    "magic": (lambda d: header(d / TRAIN, 0, 7), {}, (TRAIN, "magic 7", "want 20240520", *MAKE)),
    "version": (lambda d: header(d / TRAIN, 1, 2), {}, (TRAIN, "shard version 2", "want 1")),
    "later magic": (lambda d: header(d / LATER, 0, 7), {}, (LATER, "magic 7")),
    "short": (lambda d: cut(d / TRAIN, 60_001), {}, (TRAIN, "60001 bytes", "its header says 81024")),
    "padded": (lambda d: header(d / LATER, 2, 39_999), {}, (LATER, "81024 bytes", "its header says 81022")),
    "no header": (lambda d: cut(d / TRAIN, 1000), {}, (TRAIN, "not a token shard")),
    "odd header": (lambda d: cut(d / TRAIN, 1001), {}, (TRAIN, "not a token shard")),
    "empty file": (lambda d: cut(d / TRAIN, 0), {}, (TRAIN, "magic absent", "want 20240520")),
    "id": (lambda d: retoken(d / TRAIN, [320]), {}, (TRAIN, "token id 320", "VOCAB_SIZE=320")),
    "largest id": (lambda d: retoken(d / TRAIN, [65535]), {}, (TRAIN, "token id 65535", "VOCAB_SIZE=320")),
    "no BOS": (
        lambda d: write_shard(d / LATER, np.full(40_000, 9)),
        {"DOC_PACKING": 1},
        (LATER, "no BOS token (id 1)", "data/prepare.py", "DOC_PACKING=0"),
    ),
    "no training shards": (
        lambda d: [p.unlink() for p in d.glob("*train*")], {}, ("no fineweb_train_*.bin", "DATA_PATH=", *MAKE)
    ),
    "no training tokens": (
        lambda d: [write_shard(p, np.zeros(0)) for p in d.glob("*train*")], {}, ("no train token", "data")
    ),
    "no validation shards": (lambda d: (d / VAL).unlink(), {}, ("no fineweb_val_*.bin", "DATA_PATH=", *MAKE)),
    "no validation tokens": (lambda d: write_shard(d / VAL, np.zeros(0)), {}, ("validation", "is empty")),
    "one validation token": (lambda d: write_shard(d / VAL, np.ones(1)), {}, ("validation", "is empty")),
    "sidecars alone": (
        lambda d: (d / VAL).rename(d / "fineweb_val_bytes_000000.bin"), {}, ("no fineweb_val_*.bin",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_shards_are_refused_by_name(toy_data, data, tmp_path, how):
    spoil, knobs, fragments = SPOILT[how]
    spoil(data)
    before = tree(data)
    refused(small(toy_data, tmp_path, DATA_PATH=data, CHECKPOINT_EVERY=0, **knobs), *fragments)
    assert tree(data) == before and not list(tmp_path.rglob("*.ckpt"))


def test_an_empty_shard_among_full_ones_is_no_error(toy_data, data, tmp_path):
    write_shard(data / "fineweb_train_000002.bin", np.zeros(0))
    write_shard(data / "fineweb_val_000001.bin", np.zeros(0))
    env = small(toy_data, tmp_path, DATA_PATH=data, ITERATIONS=2)
    outcome = play(env)
    assert (outcome.status, outcome.err) == (0, "")


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        (lambda d: retoken(d / VAL, [320]), (VAL, "token id 320", "VOCAB_SIZE=320")),
        (lambda d: header(d / VAL, 0, 7), (VAL, "magic 7")),
        (lambda d: cut(d / VAL, 2001), (VAL, "2001 bytes")),
    ],
)
def test_a_spoilt_validation_shard_costs_no_training(toy_data, data, tmp_path, spoil, fragments):
    """It is opened after training only; once it is mended, RESUME=1 goes on from there."""
    env = small(toy_data, tmp_path, DATA_PATH=data, ITERATIONS=2)
    whole = (data / VAL).read_bytes()
    spoil(data)
    refused(env, *fragments)
    assert Path(env["RUN_DIR"], "model.ptz").exists()
    assert not Path(env["RUN_DIR"], "results.json").exists()
    (data / VAL).write_bytes(whole)
    outcome = play(env | {"RESUME": "1"})
    assert outcome.status == 0 and "resumed:1 step:2 " in outcome.out


def test_a_bad_token_in_a_later_shard_stops_the_run_where_it_is_met(toy_data, tmp_path):
    make_shards(tmp_path / "data", train=(600, 600))
    retoken(tmp_path / "data" / LATER, [400])
    env = small(toy_data, tmp_path, DATA_PATH=tmp_path / "data")
    refused(env, LATER, "token id 400", "VOCAB_SIZE=320")
    assert len(list(Path(env["RUN_DIR"], "checkpoints").iterdir())) == 2


def test_a_missing_folder_of_data_says_which_command_makes_it(toy_data, tmp_path):
    refused(small(toy_data, tmp_path, DATA_PATH=tmp_path / "none"), f"DATA_PATH={tmp_path / 'none'}", *MAKE)
    (tmp_path / "file").touch()
    refused(small(toy_data, tmp_path / "b", DATA_PATH=tmp_path / "file"), "is not a folder", *MAKE)


def test_tokenizers_that_do_not_belong_are_refused(toy_data, tmp_path):
    env = small(toy_data, tmp_path)
    refused(env | {"VOCAB_SIZE": "512"}, "VOCAB_SIZE=512", "has 320 pieces", "set VOCAB_SIZE=320")
    refused(env | {"RUN_DIR": str(tmp_path / "b"), "TOKENIZER_PATH": "/none"}, "TOKENIZER_PATH=/none", *MAKE)
    broken = tmp_path / "broken.model"
    for i, blob in enumerate((b"", b"no model", toy_data.tokenizer.read_bytes()[:2000])):
        broken.write_bytes(blob)
        now = {"RUN_DIR": str(tmp_path / str(i)), "TOKENIZER_PATH": str(broken)}
        refused(env | now, f"TOKENIZER_PATH={broken}")


# --------------------------------------------------------------------------------------
# Folders and files that are written
# --------------------------------------------------------------------------------------


def test_a_folder_that_already_holds_a_run_is_left_alone(toy_data, shipped, tmp_path):
    folder = Path(shipped["RUN_DIR"])
    before = tree(folder)
    line = refused(shipped, f"RUN_DIR={folder} already holds a run", "RUN_ID", "RESUME=1", "OVERWRITE=1")
    assert line.startswith("error: ") and tree(folder) == before


@pytest.mark.parametrize("name", ["model.ptz", "results.json", "trace.jsonl"])
def test_a_folder_with_any_file_of_a_run_already_holds_a_run(toy_data, shipped, tmp_path, name):
    env = small(toy_data, tmp_path)
    Path(env["RUN_DIR"]).mkdir()
    shutil.copy(Path(shipped["RUN_DIR"], name), env["RUN_DIR"])
    before = tree(Path(env["RUN_DIR"]))
    refused(env, "already holds a run")
    assert tree(Path(env["RUN_DIR"])) == before


def test_overwriting_clears_what_a_run_has_written_and_nothing_else(toy_data, shipped, tmp_path):
    env = small(toy_data, tmp_path, CHECKPOINT_EVERY=0, EMA_DECAY=0.9)
    shutil.copytree(shipped["RUN_DIR"], env["RUN_DIR"])
    Path(env["RUN_DIR"], "notes.txt").write_text("mine")
    Path(env["RUN_DIR"], "trace.jsonl").write_text("old\n")
    assert play(env | {"OVERWRITE": "1"}).status == 0
    assert Path(env["RUN_DIR"], "notes.txt").read_text() == "mine"
    assert ending(env) == ending(shipped)


@pytest.mark.parametrize("bad", [{"DATA_PATH": "/none"}, {"TOKENIZER_PATH": "/none"}, {"VOCAB_SIZE": "333"}])
def test_a_start_that_is_refused_changes_nothing(toy_data, shipped, tmp_path, bad):
    """Neither does it clear the run that it was to overwrite, nor does it take its own folder."""
    env = small(toy_data, tmp_path, CHECKPOINT_EVERY=0, EMA_DECAY=0.9)
    refused(env | bad)
    assert play(env).status == 0, "the mended start finds its folder free"
    before = tree(Path(env["RUN_DIR"]))
    refused(env | bad | {"OVERWRITE": "1"})
    assert tree(Path(env["RUN_DIR"])) == before


def test_a_folder_that_cannot_be_written_is_refused(toy_data, tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        env = small(toy_data, tmp_path, RUN_DIR=place)
        refused(env, f"RUN_DIR={place} cannot be written", "choose another RUN_DIR")


def test_nats_that_cannot_be_written_end_the_run_in_words_after_the_artifact(toy_data, tmp_path):
    (tmp_path / "file").touch()
    env = small(toy_data, tmp_path, NLL_PATH=tmp_path / "file" / "nll.npy")
    refused(env, f"cannot write {env['NLL_PATH']}: Not a directory")
    assert Path(env["RUN_DIR"], "model.ptz").exists()


# --------------------------------------------------------------------------------------
# Artifacts
# --------------------------------------------------------------------------------------


def scoring(shipped: dict, folder: Path, **knobs) -> dict:
    """The environment that scores a copy of the shipped artifact, into a folder of its own."""
    shutil.copy(Path(shipped["RUN_DIR"], "model.ptz"), folder)
    own = {"EVAL_ONLY": 1, "ARTIFACT": folder / "model.ptz", "RUN_DIR": folder / "scores"}
    return shipped | {k: str(v) for k, v in (own | {"NLL_PATH": folder / "nll.npy"} | knobs).items()}


def test_an_artifact_is_scored_as_its_own_run_has_scored_it(shipped, tmp_path):
    env = scoring(shipped, tmp_path)
    assert play(env).status == 0
    assert Path(env["NLL_PATH"]).read_bytes() == Path(shipped["NLL_PATH"]).read_bytes()
    bare = ("MODEL_DIM", "NUM_LAYERS", "NUM_HEADS", "NUM_KV_HEADS", "VOCAB_SIZE", "TRAIN_SEQ_LEN")
    again = {k: v for k, v in env.items() if k not in bare} | {"RUN_DIR": str(tmp_path / "again")}
    assert play(again).status == 0, "the artifact brings the knobs of its shape"
    both = [json.loads(Path(e["RUN_DIR"], "results.json").read_text())["scores"] for e in (shipped, again)]
    assert both[0]["roundtrip"]["val_loss"].hex() == both[1]["roundtrip"]["val_loss"].hex()


@pytest.mark.parametrize(
    ("knobs", "fragments"),
    [
        ({"MODEL_DIM": 64}, ("MODEL_DIM (artifact '16', now '64')",)),
        ({"MATRIX_BITS": 6}, ("MATRIX_BITS (artifact 'default', now '6')",)),
        ({"TIE_EMBEDDINGS": 0, "MLP_MULT": 3}, ("TIE_EMBEDDINGS", "MLP_MULT")),
        ({"ARTIFACT": "/none/model.ptz"}, ("ARTIFACT=/none/model.ptz does not exist", "model.ptz")),
        ({"ARTIFACT": "/tmp"}, ("ARTIFACT=/tmp",)),
        ({"EVAL_ONLY": "perhaps"}, ("EVAL_ONLY='perhaps'", "0 or 1")),
    ],
)
def test_artifacts_that_do_not_belong_are_refused_by_name(shipped, tmp_path, knobs, fragments):
    env = scoring(shipped, tmp_path, **knobs)
    before = tree(tmp_path)
    refused(env, *fragments)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        (lambda b: b[:-1], ("truncated or damaged",)),
        (lambda b: b[:10], ("is not one of ours",)),
        (lambda b: b"", ("is not one of ours", "want b'PGLM'")),
        (lambda b: b"PK" + b[2:], ("is not one of ours",)),
        (lambda b: b[:4] + b"\7" + b[5:], ("format version 7", "reads 2")),
        (lambda b: b[:2000] + bytes([b[2000] ^ 4]) + b[2001:], ("truncated or damaged",)),
        (lambda b: b + b"\0", ("truncated or damaged",)),
    ],
)
def test_spoilt_artifacts_are_refused_by_name(shipped, tmp_path, spoil, fragments):
    env = scoring(shipped, tmp_path)
    path = Path(env["ARTIFACT"])
    path.write_bytes(spoil(path.read_bytes()))
    before = tree(tmp_path)
    refused(env, str(path), *fragments)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("named", [True, False])
def test_scoring_with_overwrite_does_not_clear_the_run_away(shipped, tmp_path, named):
    folder = tmp_path / "run"
    shutil.copytree(shipped["RUN_DIR"], folder)
    own = {"EVAL_ONLY": "1", "OVERWRITE": "1", "RUN_DIR": str(folder), "NLL_PATH": str(tmp_path / "nll.npy")}
    outcome = play(shipped | own | {"ARTIFACT": str(folder / "model.ptz") if named else ""})
    assert outcome.status in (0, 2) and "Traceback" not in outcome.err
    for name in ("model.ptz", "trace.jsonl", "results.json"):
        assert (folder / name).read_bytes() == Path(shipped["RUN_DIR"], name).read_bytes()


@pytest.mark.parametrize("how", [{}, {"RESUME": "1"}])
def test_the_artifact_of_a_run_is_scored_in_place_and_the_run_stays_as_it_was(shipped, tmp_path, how):
    """ARTIFACT empty means RUN_DIR/model.ptz, and RUN_DIR empty means runs/RUN_ID."""
    folder = tmp_path / "runs" / "mine"
    shutil.copytree(shipped["RUN_DIR"], folder)
    env = {k: v for k, v in shipped.items() if k != "RUN_DIR"}
    outcome = play(env | how | {"EVAL_ONLY": "1", "RUN_ID": "mine", "NLL_PATH": ""}, cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    assert "final_int8_rans_roundtrip_exact" in outcome.out
    for name in ("model.ptz", "trace.jsonl", "results.json"):
        assert (folder / name).read_bytes() == Path(shipped["RUN_DIR"], name).read_bytes()


def test_scoring_wants_no_training_shards(shipped, toy_data, tmp_path):
    (tmp_path / "val").mkdir()
    shutil.copy(toy_data.path / VAL, tmp_path / "val")
    outcome = play(scoring(shipped, tmp_path, DATA_PATH=tmp_path / "val"))
    assert outcome.status == 0, outcome.err


class Opened:
    """An artifact of the tiny model, and what it takes to open it in this process."""

    def __init__(self, shipped: dict) -> None:
        self.blob = Path(shipped["RUN_DIR"], "model.ptz").read_bytes()
        self.cfg, cpu = read_config(shipped), torch.device("cpu")
        self.world = train_gpt.World(0, 1, cpu, torch.float32, False, train_gpt.Journal(None), Path())
        self.header, payload = train_gpt.read_artifact_header(self.blob, "it")
        self.payload = bytes(payload)

    def load(self, blob: bytes):
        return train_gpt.load(blob, self.cfg, self.world, "it")

    def forged(self, header: object, payload: bytes) -> bytes:
        """A container whose checksum is right, around whatever is given."""
        text = train_gpt.squeeze(json.dumps(header).encode())
        return train_gpt.pack_container(train_gpt.ARTIFACT_MAGIC, train_gpt.ARTIFACT_VERSION, text, payload)


@pytest.fixture(scope="module")
def opened(shipped) -> Opened:
    return Opened(shipped)


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), tail=st.binary(max_size=9))
def test_a_cut_or_flipped_artifact_raises_an_error_in_words(opened, where, bit, tail):
    at = int(where * len(opened.blob))
    flipped = opened.blob[:at] + bytes([opened.blob[at] ^ 1 << bit]) + opened.blob[at + 1 :]
    for blob in (flipped, opened.blob[:at], opened.blob[:at] + tail, opened.blob + tail + b"\0"):
        if blob != opened.blob:
            with pytest.raises(UserError, match=r"^it (is|has) "):
                opened.load(blob)


def test_every_bit_of_the_head_is_checked_and_the_whole_artifact_loads(opened):
    assert train_gpt.param_count(opened.load(opened.blob)) > 0
    for at in range(train_gpt.CONTAINER_HEAD):
        for bit in range(8):
            with pytest.raises(UserError):
                opened.load(opened.blob[:at] + bytes([opened.blob[at] ^ 1 << bit]) + opened.blob[at + 1 :])


@given(st.binary(max_size=200))
def test_any_other_bytes_raise_an_error_in_words(opened, noise):
    for blob in (noise, train_gpt.ARTIFACT_MAGIC + noise, train_gpt.ARTIFACT_MAGIC + b"\1" + noise):
        with pytest.raises(UserError):
            opened.load(blob)


JUNK = [None, -1, 0, 10**12, 1.5, "x", [], {}, [[]], ["x"], [["a", "b", "c"]], {"a": 1}, True]


@settings(max_examples=50, phases=[Phase.generate])  # shrinking takes minutes and tells no more
@given(key=st.sampled_from(["tensors", "streams"]), junk=st.sampled_from(JUNK), at=st.integers(0, 99))
def test_an_artifact_made_by_another_hand_raises_an_error_in_words_or_loads(opened, key, junk, at):
    whole = opened.header
    rows = [list(row) for row in whole[key]]
    rows[at % len(rows)][at % 3] = junk
    headers = [junk, whole | {key: junk}, whole | {key: rows}, whole | {key: whole[key][: at % len(rows)]}]
    blobs = [opened.forged(header, opened.payload) for header in headers]
    blobs += [opened.forged(whole, payload) for payload in (opened.payload[: 331 * at], opened.payload[at:])]
    for blob in blobs:
        try:
            opened.load(blob)
        except UserError as e:
            assert str(e).startswith("it ") and "\n" not in str(e)


def test_knobs_in_an_artifact_are_checked_as_any_others(shipped, opened, tmp_path):
    env, whole = scoring(shipped, tmp_path), opened.header
    headers = [junk for junk in JUNK if junk not in ({}, {"a": 1})]
    headers = [*headers, *(whole | {"knobs": junk} for junk in headers)]
    wrong = [None, 16, "x", "-1", "48"]
    headers += [whole | {"knobs": whole["knobs"] | {"MODEL_DIM": width}} for width in wrong]
    for header in headers:
        Path(env["ARTIFACT"]).write_bytes(opened.forged(header, opened.payload))
        refused({k: v for k, v in env.items() if k != "MODEL_DIM"})


# --------------------------------------------------------------------------------------
# Files that stay closed, and packages that stay out
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_opens_no_validation_shard_before_its_artifact_is_written(toy_data, tmp_path, ranks):
    env = small(toy_data, tmp_path, WARMUP_STEPS=1, RESUME=1)
    outcome = play(env, plant("note_opened"), ranks=ranks)
    assert outcome.statuses == [0] * ranks
    opened = outcome.note["opened"]
    assert VAL in opened and TRAIN in opened and opened.index("model.ptz.tmp") < opened.index(VAL)
    assert all(VAL in note["opened"] for note in outcome.notes), "each rank scores its share"


def test_a_run_that_validates_does_open_it_earlier(toy_data, tmp_path):
    opened = play(small(toy_data, tmp_path, VAL_LOSS_EVERY=3), plant("note_opened")).note["opened"]
    assert opened.index("model.ptz.tmp") > opened.index(VAL)


def test_scoring_opens_no_training_shard(shipped, tmp_path):
    opened = play(scoring(shipped, tmp_path), plant("note_opened")).note["opened"]
    assert set(opened) == {VAL, "model.ptz"}


ABSENT = '''
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else super().find_spec(name, path, target)

sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
'''


def needed(*packages: str) -> set[str]:
    """Distributions that these want, and what those want in turn; extras left out."""
    found, waiting = set(), [*packages]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            wants = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another system or Python
            continue
        waiting += [re.match(r"[\w.-]+", want)[0] for want in wants if "extra ==" not in want]
    return found


def test_four_packages_are_enough(toy_data, tmp_path):
    may, absent = needed("torch", "numpy", "sentencepiece", "brotli"), set()
    for top, owners in metadata.packages_distributions().items():
        if not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & may:
            absent.add(top)
    assert absent > {"hypothesis", "pytest", "tqdm", "packaging"}
    assert not absent & {"torch", "numpy", "sentencepiece", "brotli", "sympy", "filelock"}
    site, probe = tmp_path / "sitecustomize.py", tmp_path / "probe.py"
    site.write_text(f"ABSENT = {absent!r}\n{ABSENT}")
    probe.write_text("import hypothesis")
    out = run_program(env={"PYTHONPATH": tmp_path}, program=probe)
    assert "No module named 'hypothesis'" in out.stderr
    env = small(toy_data, tmp_path, PYTHONPATH=tmp_path, DOC_PACKING=1, EMA_DECAY=0.9)
    outcome = run_program(env=env)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    results = json.loads(Path(env["RUN_DIR"], "results.json").read_text())
    assert results["steps"] == 6 and results["extra_files_imported"] == [str(site)]


# --------------------------------------------------------------------------------------
# The command itself
# --------------------------------------------------------------------------------------


def test_the_program_itself_ends_with_status_2_and_one_line(tmp_path):
    outcome = run_program(env={"MODEL_DIM": "wide"}, cwd=tmp_path)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    line, meaning = only_line(outcome.stderr), "width of the residual stream"
    assert line == f"error: MODEL_DIM='wide' is not allowed; want a whole number >= 2 ({meaning})"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--help"], ["--knobs", "more"], ["MODEL_DIM=64"], ["--param"]])
def test_unknown_words_are_refused(words, tmp_path):
    refused({}, f"unknown words {' '.join(words)!r}", "--knobs", "--params", args=words, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_words_that_are_known_answer_and_write_nothing(tmp_path):
    table = play({}, args=["--knobs"], cwd=tmp_path)
    assert table.status == 0 and all(f"| `{env}` |" in table.out for env in train_gpt.all_knobs())
    params = play(tiny_env(), args=["--params"], cwd=tmp_path)
    assert (params.status, params.out.strip()) == (0, "model_params:32172")
    refused({"NUM_HEADS": "7"}, "NUM_HEADS=7", "MODEL_DIM=512", args=["--params"], cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
