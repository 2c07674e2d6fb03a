"""build_submission.py: what is shipped behaves as the source does, and what does not is never shipped.

The recipe of most tests is small enough to be trained as it is, so the shipped program itself is run.
"""

import inspect
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest

import build_submission as builder
import train_gpt
from conftest import ROOT, clean_env, read_env, run_program, tiny_env, torchrun

BUILDER = ROOT / "build_submission.py"
# Every kind of feature switched on, on top of the tiny sizes; three aliases and spellings that are not ours.
FEATURES = """# a recipe for tests
export SEED=7          # three of a kind
DOC_PACKING=yes
NUM_LOOPS='1'
EMA_DECAY=.9
LATE_QAT_THRESHOLD="0.9"

MATRIX_BITS=6
TIE_EMBEDDINGS=0
SLIDING_WINDOW_ENABLED=1
SCORE=sliding
VAL_BATCH_SIZE=512
VAL_MAX_TOKENS=1500
"""


def small_recipe() -> str:
    tiny = {name: text for name, text in tiny_env(DEVICE="cpu").items() if name != "VAL_BATCH_TOKENS"}
    return "".join(f"{name}={text}\n" for name, text in tiny.items()) + FEATURES


def build(env_file: Path, out: Path, *words: object) -> str:
    """Run the builder as a user does; what it prints."""
    done = run_program([env_file, "--out", out, *words], program=BUILDER)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def refused(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str]:
    """Run the builder in this process where it must fail; its status, and its only line without its name."""
    status = builder.main([str(word) for word in words])
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert status and len(lines) == 1, captured
    return status, lines[0].removeprefix("build_submission.py: ")


class Built(NamedTuple):
    env_file: Path
    out: Path
    printed: str

    @property
    def program(self) -> Path:
        return self.out / "train_gpt.py"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """The small recipe, built; its folder is read and never changed."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "env").write_text(small_recipe())
    return Built(folder / "env", folder / "out", build(folder / "env", folder / "out"))


@pytest.fixture(scope="module")
def runs(built, toy_data, tmp_path_factory) -> dict[str, Path]:
    """Folders of two runs on the same data: the source told the recipe, the packed program told nothing."""
    folder, paths = tmp_path_factory.mktemp("runs"), {}
    told = {"source": read_env(built.env_file), "packed": {}}
    programs = {"source": ROOT / "train_gpt.py", "packed": built.program}
    for name, env in told.items():
        paths[name] = folder / name
        places = {k: v for k, v in toy_data.env.items() if k != "VOCAB_SIZE"} | {"RUN_DIR": paths[name]}
        done = run_program(env=env | places, program=programs[name], cwd=folder)
        assert done.returncode == 0, done.stderr
    return paths


@pytest.fixture(scope="module")
def unpacked(built) -> types.ModuleType:
    """The packed program as a module, its `main` not called."""
    module = types.ModuleType("shipped")
    module.__file__, sys.modules["shipped"] = str(built.program), module
    exec(compile(built.program.read_text(), built.program, "exec"), module.__dict__)
    yield module
    del sys.modules["shipped"]


@pytest.fixture
def source() -> str:
    return (ROOT / "train_gpt.py").read_text()


def recipe_of(text: str, folder: Path) -> builder.Recipe:
    (folder / "recipe").write_text(text)
    return builder.make_recipe(builder.read_env_file(folder / "recipe"))


# --------------------------------------------------------------------------------------
# The shipped program
# --------------------------------------------------------------------------------------


def test_packed_program_trains_exports_and_scores_as_the_source_does(runs):
    source, packed = ((folder / "trace.jsonl").read_bytes() for folder in runs.values())
    assert source == packed
    traced = {key for line in source.splitlines() for key in json.loads(line)}
    assert {"step", "artifact_sha256", "score"} <= traced
    assert (runs["source"] / "model.ptz").read_bytes() == (runs["packed"] / "model.ptz").read_bytes()


def test_packed_program_tells_its_stage_and_its_own_size(runs, built):
    source, packed = (json.loads((folder / "results.json").read_text()) for folder in runs.values())
    assert (source["stage"], packed["stage"]) == ("source", "packed")
    assert packed["bytes"]["code"] == built.program.stat().st_size
    assert 2 * packed["bytes"]["code"] < source["bytes"]["code"] == (ROOT / "train_gpt.py").stat().st_size
    assert packed["extra_files_imported"] == source["extra_files_imported"]
    assert packed["config_hash"] == source["config_hash"]


def test_packed_program_logs_the_source_that_it_unpacks(runs, unpacked):
    log = (runs["packed"] / "train.log").read_text()
    text = "".join(unpacked.linecache.getlines(str(unpacked.__file__)))
    assert log.startswith(text + "=" * 100)
    assert text.startswith('"""Train, ship and score') and 'SOURCE_STAGE = "packed"' in text
    results = json.loads((runs["packed"] / "results.json").read_text())
    assert results["source_sha256"] == builder.sha256(text.encode())


def test_packed_program_answers_questions_as_the_source_does(built, runs):
    params = json.loads((runs["source"] / "results.json").read_text())["params"]
    for word, answer in {"--knobs": train_gpt.knob_table(), "--params": f"model_params:{params}"}.items():
        done = run_program([word], program=built.program)
        assert (done.returncode, done.stdout) == (0, answer + "\n"), done.stderr


def test_source_of_functions_and_classes_is_found_in_the_packed_program(unpacked):
    unpacked.linecache.checkcache()
    assert inspect.getsource(unpacked.softcapped_nll) == inspect.getsource(train_gpt.softcapped_nll)
    assert inspect.getsource(unpacked.GPT.hidden) == inspect.getsource(train_gpt.GPT.hidden)
    assert inspect.getsource(unpacked.Config) == inspect.getsource(train_gpt.Config)


def test_packed_program_runs_on_two_ranks(built, toy_data, tmp_path):
    places = {k: v for k, v in toy_data.env.items() if k != "VOCAB_SIZE"}
    done = torchrun(2, env=places | {"RUN_DIR": tmp_path / "run", "ITERATIONS": 2}, program=built.program)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["world_size"], results["steps"], results["stage"]) == (2, 2, "packed")
    assert sorted(path.name for path in built.out.iterdir()) == ["build.json", "train_gpt.py"]


@pytest.mark.full
def test_packed_program_compiles(built, toy_data, tmp_path):
    places = {k: v for k, v in toy_data.env.items() if k != "VOCAB_SIZE"}
    env = places | {"RUN_DIR": tmp_path / "run", "COMPILE": 1}
    done = run_program(env=env, program=built.program, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "compile:1" in (tmp_path / "run" / "train.log").read_text()


def test_environment_changes_live_knobs_and_only_those(unpacked):
    assert unpacked.thawed({"SEED": "8", "DATA_PATH": "x"}) == {
        **unpacked.thawed({}), "SEED": "8", "DATA_PATH": "x"
    }  # fmt: skip
    assert unpacked.read_config(unpacked.thawed({})).budget.seed == 7
    same = {"EMA_DECAY": "0.90", "VAL_BATCH_SIZE": "512", "DOC_PACKING": "1", "HOME": "/"}  # other spellings
    unpacked.read_config(unpacked.thawed(same))
    for name, text in {"EMA_DECAY": "0.8", "MLP_MULT": "3", "VAL_BATCH_SIZE": "1024"}.items():
        with pytest.raises(unpacked.UserError, match=f"is frozen to .*{text}"):
            unpacked.thawed({name: text})


def test_other_value_of_a_frozen_knob_is_one_line_naming_both(built):
    done = run_program(["--params"], env={"NUM_LAYERS": 5, "SEED": 9}, program=built.program)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "NUM_LAYERS is frozen to '3', the environment says '5'" in done.stderr
    assert "SEED" not in done.stderr


# --------------------------------------------------------------------------------------
# What is written
# --------------------------------------------------------------------------------------


def test_two_builds_are_identical(built, tmp_path):
    """In another folder, with another hash seed, and over an earlier build."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train_gpt.py").write_text("an earlier build")
    words = [BUILDER, built.env_file, "--out", tmp_path / "out"]
    env = clean_env({"PYTHONHASHSEED": "5", "MODEL_DIM": "64", "RANK": "3"})
    subprocess.run([sys.executable, *map(str, words)], env=env, cwd=tmp_path, check=True, capture_output=True)
    assert contents(tmp_path / "out") == contents(built.out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_frozen_program_is_the_source_with_three_other_values(built, source, tmp_path):
    recipe = builder.make_recipe(builder.read_env_file(built.env_file))
    frozen = builder.freeze(source, recipe, "frozen")
    other = set(source.splitlines()) ^ set(frozen.splitlines())
    row = re.compile(r'(FROZEN|LIVE_DEFAULTS|SOURCE_STAGE)\b.*|    "[A-Z_0-9]+": ".*",|}  #.*')
    assert all(row.fullmatch(line) for line in other), other
    before = {"FROZEN": "{}", "LIVE_DEFAULTS": "{}", "SOURCE_STAGE": '"source"'}
    assert builder.set_constants(frozen, before) == source
    assert recipe.live["SEED"] == "7" and recipe.frozen["DOC_PACKING"] == "1"
    assert recipe.frozen["VAL_BATCH_TOKENS"] == "512" and "VAL_BATCH_SIZE" not in recipe.frozen
    assert not set(recipe.live) & set(recipe.frozen) and "HEAD_LR" not in recipe.frozen


def test_printed_and_reported_bytes_are_those_on_the_disk(built):
    size = built.program.stat().st_size
    report = json.loads((built.out / "build.json").read_text())
    for name, value in {"packed": size, "code": size, "total": size, "left": 16_000_000 - size}.items():
        assert re.search(rf"^  {name} +{value:,}\b", built.printed, re.M), built.printed
    assert report["bytes"] == {"total": size, "limit": 16_000_000}
    assert report["stages"]["packed"] == {"bytes": size, "sha256": builder.sha256(built.program.read_bytes())}
    assert report["stages"]["source"]["bytes"] == (ROOT / "train_gpt.py").stat().st_size
    assert report["checks"]["equal traces"]["programs"] == ["source", "frozen", "packed"]
    assert size == min(report["packed_bytes_by_codec"].values())


def test_baseline_builds_and_holds_its_parameters(tmp_path, capsys):
    words = [str(ROOT / "records" / "baseline" / "env"), "--out", str(tmp_path / "out")]
    assert builder.main(words) == 0, capsys.readouterr().err
    packed = run_program(["--params"], program=tmp_path / "out" / "train_gpt.py", cwd=tmp_path)
    assert packed.stdout == "model_params:17059912\n"


def test_until_frozen_ships_readable_text(built, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(builder, "prove", lambda *_: {"lines": 0})
    assert builder.main([str(built.env_file), "--out", str(tmp_path / "out"), "--until", "frozen"]) == 0
    text = (tmp_path / "out" / "train_gpt.py").read_text()
    assert 'SOURCE_STAGE = "frozen"' in text and "def main() -> None:" in text
    assert json.loads((tmp_path / "out" / "build.json").read_text())["stage"] == "frozen"


# --------------------------------------------------------------------------------------
# What is caught: each mutant is a builder with one fault
# --------------------------------------------------------------------------------------


def wrong_value(text: str) -> str:
    return text.replace('"EMA_DECAY": "0.9"', '"EMA_DECAY": "0.5"')


def lost_recipe(text: str) -> str:
    return builder.set_constants(text, {"FROZEN": "{}"})


def lost_function(text: str) -> str:
    return text.replace("def layer_plan(", "def layer_plans(")


def swapped(text: str) -> str:
    return text.replace("a * cos + b * sin, b * cos - a * sin", "b * cos - a * sin, a * cos + b * sin")


OTHERWISE = r"the frozen program behaves otherwise: line \d+ of trace.jsonl is {.*} from the source and {"
FAULTS = {
    wrong_value: OTHERWISE,
    swapped: OTHERWISE,
    lost_function: r"the frozen program ends with status 1: NameError: name 'layer_plan' is not defined",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_mutant_is_caught_and_nothing_is_written(fault, built, tmp_path, monkeypatch, capsys):
    freeze = builder.freeze
    monkeypatch.setattr(builder, "freeze", lambda *args: changed(freeze(*args), fault))
    words = [built.env_file, "--out", tmp_path / "out", "--until", "frozen"]
    status, line = refused(capsys, *words)
    assert status == 1 and re.match(FAULTS[fault], line) and line.endswith("; nothing was written"), line
    assert list(tmp_path.iterdir()) == []


def changed(text: str, fault: object) -> str:
    assert fault(text) != text
    return fault(text)


def test_fault_of_the_packer_is_caught(built, tmp_path, monkeypatch, capsys):
    """A text that behaves alike and is another text: the trace is equal, what the program tells is not."""
    pack = builder.pack
    monkeypatch.setattr(builder, "pack", lambda text, codec: pack(text + "# one more line\n", codec))
    status, line = refused(capsys, built.env_file, "--out", tmp_path / "out")
    assert (status, line.split(":")[0]) == (1, "the packed program reports other source_sha256")


def test_first_line_that_differs_is_named_in_both_traces(tmp_path):
    builder.compare_traces("packed", b"a\nb\n", b"a\nb\n")
    for trace, told in {
        b"a\nc\n": "line 2 .* is b .* c",
        b"a\n": "line 2 .* is b .* no line",
        b"": "line 1 .* is a .* no line",
        b"a\nb\nc\n": "line 3 .* is no line .* c",
    }.items():
        with pytest.raises(builder.BuildError, match=f"the packed program behaves otherwise: {told}"):
            builder.compare_traces("packed", trace, b"a\nb\n")
    assert builder.read_trace(tmp_path) == b"", "a program that ends well and traces nothing"


@pytest.mark.parametrize("fault", [wrong_value, lost_recipe, swapped, lost_function])
def test_fault_that_the_twin_does_not_have_is_caught(fault, source, tmp_path):
    """The proof ran twins; the shipped files are held to them."""
    recipe = recipe_of(FEATURES + "MODEL_DIM=64\n", tmp_path)
    twins = builder.make_stages(source, builder.tiny_twin(recipe), "frozen", "brotli")
    stages = builder.make_stages(source, recipe, "frozen", "brotli")
    builder.check_shipped(stages, twins, recipe)
    text = changed(stages["frozen"].text, fault)
    with pytest.raises(builder.BuildError, match=r"other knobs|its own recipe|than the recipe"):
        faulty = stages | {"frozen": builder.Stage("frozen", text.encode(), text)}
        builder.check_shipped(faulty, twins, recipe)


def test_program_that_unpacks_to_another_text_is_caught(source, tmp_path):
    recipe = recipe_of(FEATURES, tmp_path)
    text = builder.freeze(source, recipe, "packed")
    builder.check_program(builder.Stage("packed", builder.pack(text, "lzma"), text), recipe)
    with pytest.raises(builder.BuildError, match="unpacks to another text"):
        builder.check_program(builder.Stage("packed", builder.pack(text + "\n", "lzma"), text), recipe)
    broken = wrong_value(text).replace('"0.5"', '"half"')
    with pytest.raises(builder.BuildError, match="refuses its own recipe: EMA_DECAY"):
        builder.check_program(builder.Stage("packed", builder.pack(broken, "zlib"), broken), recipe)


def test_program_that_never_ends_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "TWIN_SECONDS", 1)
    program = tmp_path / "frozen" / "train_gpt.py"
    program.parent.mkdir()
    program.write_text("while True:\n    pass\n")
    with pytest.raises(builder.BuildError, match="the frozen program still runs after 1 s"):
        builder.run_programs({program: {}})


def test_failed_build_leaves_the_earlier_one_as_it_was(built, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(builder, "prove", lambda *_: {"lines": 0})
    monkeypatch.setattr(train_gpt, "SIZE_LIMIT", 40_000)
    shutil.copytree(built.out, tmp_path / "out")
    status, line = refused(capsys, built.env_file, "--out", tmp_path / "out")
    size = built.program.stat().st_size
    assert status == 1 and f"are {size:,} bytes, {size - 40_000:,} above 40,000" in line
    assert contents(tmp_path / "out") == contents(built.out) and len(list(tmp_path.iterdir())) == 1


# --------------------------------------------------------------------------------------
# Editing and packing
# --------------------------------------------------------------------------------------


def test_constants_are_replaced_where_they_stand_and_nowhere_else():
    text = 'é = "X = {}"; FROZEN: dict = {\n  "a": "ü",\n}  # FROZEN = {}\nSTAGE = ("x")  # née\nx = STAGE\n'
    done = builder.set_constants(text, {"STAGE": '"y"', "FROZEN": '{"b": "c"}'})
    assert done == 'é = "X = {}"; FROZEN: dict = {"b": "c"}  # FROZEN = {}\nSTAGE = ("y")  # née\nx = STAGE\n'


@pytest.mark.parametrize(
    "text",
    ["A = 1\n", "FROZEN: dict\n", "FROZEN = 1\nFROZEN = 2\n", "FROZEN = 1\ndef f():\n    FROZEN = 2\n",
     "A = FROZEN = 1\n", "FROZEN, A = 1, 2\n", "def f():\n    FROZEN = 2\n", "FROZEN += 1\n"],
)  # fmt: skip
def test_constant_that_is_not_there_exactly_once_is_refused(text):
    with pytest.raises(builder.BuildError, match=r"FROZEN is set \d times in train_gpt.py, want one"):
        builder.set_constants(text, {"FROZEN": "{}"})


@pytest.mark.parametrize("text", ["", 'quo"te', "back\\slash", "日本 \u2028 🙂", "{}'{0}"])
def test_any_text_survives_in_a_frozen_dict(text):
    done = builder.set_constants("FROZEN = {}\n", {"FROZEN": builder.dict_text({"DATA_PATH": text})})
    scope = {}
    exec(done, scope)
    assert scope["FROZEN"] == {"DATA_PATH": text}


@pytest.mark.parametrize("codec", builder.CODECS)
def test_every_codec_unpacks_to_the_text_it_was_given(codec, tmp_path):
    """Line numbers too: form feeds and other separators end no line in a Python file."""
    text = (
        "import inspect, sys\nodd = 'é\x0c\x1c\u2028 {}'\n\n"
        "def f():\n    return odd  # here\n\nclass C:\n    x = 1\n\n"
        "print([odd, sys.modules['__main__'].f is f, inspect.getsource(f), inspect.getsource(C)])\n"
    )
    (tmp_path / "packed.py").write_bytes(builder.pack(text, codec))
    done = run_program(program=tmp_path / "packed.py", cwd=tmp_path)
    found = ["é\x0c\x1c\u2028 {}", True, "def f():\n    return odd  # here\n", "class C:\n    x = 1\n"]
    assert done.stdout == f"{found}\n", done.stderr


def test_traceback_of_a_packed_program_does_not_print_the_payload(tmp_path):
    text = "x = 1\n" * 500 + "raise ValueError('no')\n"
    (tmp_path / "packed.py").write_bytes(builder.pack(text, "zlib"))
    told = run_program(program=tmp_path / "packed.py", cwd=tmp_path).stderr
    assert "ValueError: no" in told and "line 501" in told and "b85decode" not in told


# --------------------------------------------------------------------------------------
# Env files and other input
# --------------------------------------------------------------------------------------


def test_env_file_is_read_as_a_shell_reads_it(tmp_path):
    text = (
        "# comment\n\n  \t# indented\nA=1\nexport B=two\n  C='three = # \"x\" $y'  # 4\n\tD=\"a 'b' # c\"\n"
        "E=\nF=''\nG=a/b.c,d:e@f%g-h+i=j\nexport\t H=9\nI='é ü'\t#x\nJ=0"
    )
    (tmp_path / "env").write_text(text)
    assert builder.read_env_file(tmp_path / "env") == read_env(tmp_path / "env")
    assert builder.read_env_file(tmp_path / "env")["C"] == 'three = # "x" $y'


@pytest.mark.parametrize(
    "line",
    ["SEED", "SEED = 1", "SEED=1 ITERATIONS=2", "SEED=$HOME", 'SEED="`date`"', "SEED=a\\ b", "SEED='1",
     "SEED=1#2", "SEED=1;ls", "1SEED=1", "SEED=~", "export SEED", "SEED=1\r", "SEED=*", "SEED+=1", "set -e"],
)  # fmt: skip
def test_bad_line_is_named_with_its_number(line, tmp_path, capsys):
    (tmp_path / "env").write_bytes(f"# first\nNUM_LAYERS=3\n{line}\n".encode())
    status, told = refused(capsys, tmp_path / "env", "--out", tmp_path / "out")
    assert status == 2 and f"{tmp_path / 'env'}:3: " in told and "is not KEY=value" in told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SEED=1\nSEED=2\n", "env:2: SEED is set a second time"),
        ("MODEL_DIMS=512\n", "MODEL_DIMS is not a knob; did you mean MODEL_DIM?"),
        ("NCCL_DEBUG=1\n", "NCCL_DEBUG is not a knob, so no submission can carry it"),
        ("NUM_LAYERS=many\n", "NUM_LAYERS='many' is not allowed; want a whole number >= 1 and <= 256"),
        ("NUM_HEADS=7\n", "NUM_HEADS=7 does not divide MODEL_DIM=512"),
        ("WEIGHT_SHARING=1\n", "WEIGHT_SHARING='1' is refused: abandoned"),
        ("VAL_BATCH_SIZE=8\nVAL_BATCH_TOKENS=9\n", "is another name of VAL_BATCH_TOKENS='9'"),
        ("RESUME=1\nRUN_ID=x\n", "RESUME is about one run, not part of a recipe"),
        ("MLP_MULT=0.02\n", "no tiny twin of this recipe: MLP_MULT=0.02 leaves no hidden unit"),
    ],
)
def test_bad_recipe_is_one_line(text, expected, tmp_path, capsys):
    (tmp_path / "env").write_text(text)
    status, told = refused(capsys, tmp_path / "env", "--out", tmp_path / "out")
    assert status == 2 and expected in told, told
    assert [path.name for path in tmp_path.iterdir()] == ["env"]


def test_bad_command_line_is_one_line(tmp_path, capsys):
    env, out = tmp_path / "env", tmp_path / "out"
    env.write_text("SEED=1\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for words, expected in {
        ("--out", out): "the following arguments are required: ENVFILE; see --help",
        (env,): "the following arguments are required: --out",
        (env, "--out", out, "--until", "minified"): "invalid choice: 'minified'",
        (env, "--out", out, "--weight", "x"): "unrecognized arguments",
        (tmp_path / "no", "--out", out): "cannot read",
        (tmp_path, "--out", out): "cannot read",
        (tmp_path / "binary", "--out", out): "is not UTF-8 text",
        (env, "--out", env): "is a file; name a folder",
        (env, "--out", tmp_path / "other"): "holds other files (thesis.tex)",
        (env, "--out", out, "--weights", tmp_path / "no.ptz"): "no.ptz does not exist",
        (env, "--out", out, "--weights", env): "is not one of ours",
    }.items():
        status, told = refused(capsys, *words)
        assert status == 2 and expected in told, told
    assert not out.exists()


def test_name_without_effect_is_warned_about_and_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(builder, "prove", lambda *_: {"lines": 0})
    (tmp_path / "env").write_text("PHASED_TTT_ENABLED=1\nSEED=3\n")
    assert builder.main([str(tmp_path / "env"), "--out", str(tmp_path / "out")]) == 0
    assert "warning: PHASED_TTT_ENABLED is accepted but has no effect" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "build.json").read_text())
    assert (report["frozen"], report["live"]) == ({}, {"SEED": "3"})


def test_tiny_twin_keeps_the_features_of_the_recipe(tmp_path):
    text = "NUM_LAYERS=11\nNUM_LOOPS=2\nLOOP_START=3\nLOOP_END=5\nTRAIN_SPANS=48\nGRAD_ACCUM_STEPS=6\n"
    text += "TRAIN_BATCH_TOKENS=786432\nTRAIN_SEQ_LEN=2048\nEVAL_SEQ_LEN=2048\nDOC_PACKING=1\n"
    text += "QK_GAIN_INIT=5\nSEED=3\n"
    recipe = recipe_of(text, tmp_path)
    tiny = builder.tiny_twin(recipe).cfg
    assert (tiny.loop.count, tiny.data.packing, tiny.model.qk_gain, tiny.budget.seed) == (2, True, 5.0, 3)
    assert tiny.model.layers < 11 and tiny.data.seq_len < 2048 and tiny.compute.dtype == "float32"
    assert recipe.cfg.model.layers == 11


# --------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------


def test_weights_of_the_recipe_are_shipped_and_counted(built, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(builder, "prove", lambda *_: {"lines": 0})
    weights, out = runs["packed"] / "model.ptz", tmp_path / "out"
    assert builder.main([str(built.env_file), "--out", str(out), "--weights", str(weights)]) == 0
    assert (out / "model.ptz").read_bytes() == weights.read_bytes()
    assert (out / "train_gpt.py").read_bytes() == built.program.read_bytes()
    sizes = [(out / name).stat().st_size for name in ("train_gpt.py", "model.ptz")]
    rows = {"code": sizes[0], "weights": sizes[1], "total": sum(sizes), "left": 16_000_000 - sum(sizes)}
    printed, report = capsys.readouterr().out, json.loads((out / "build.json").read_text())
    for name, value in rows.items():
        assert re.search(rf"^  {name} +{value:,}\b", printed, re.M), printed
    assert report["bytes"]["total"] == sum(sizes)
    assert report["checks"]["weights"]["sha256"] == builder.sha256(weights.read_bytes())
    assert report["checks"]["weights"]["tensors decoded"] > 10


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("NUM_LAYERS=4\n", "NUM_LAYERS (artifact '3', now '4')"),
        ("MATRIX_BITS=8\n", "MATRIX_BITS (artifact '6', now 'default')"),
        ("MATRIX_LR=0.02\n", "belongs to another configuration: MATRIX_LR (trained with 0.04, now 0.02)"),
        ("EVAL_STRIDE=16\n", "EVAL_STRIDE (trained with 8, now 16)"),
    ],
)
def test_weights_of_another_recipe_are_refused(line, expected, built, runs, tmp_path, capsys):
    name = line.split("=")[0]
    kept = [row for row in small_recipe().splitlines(keepends=True) if not row.startswith(name)]
    (tmp_path / "env").write_text("".join(kept) + line)
    weights = runs["packed"] / "model.ptz"
    status, told = refused(capsys, tmp_path / "env", "--out", tmp_path / "out", "--weights", weights)
    assert status == 2 and expected in told, told
    assert not (tmp_path / "out").exists()


def test_weights_of_another_seed_are_told_apart(built, runs, tmp_path, capsys):
    (tmp_path / "env").write_text(small_recipe().replace("SEED=7", "SEED=8"))
    recipe = builder.make_recipe(builder.read_env_file(tmp_path / "env"))
    assert builder.read_weights(runs["packed"] / "model.ptz", recipe).differ == {"SEED": ["7", "8"]}
    shutil.copy(runs["packed"] / "model.ptz", tmp_path)
    words = [tmp_path / "env", "--out", tmp_path / "out", "--weights", tmp_path / "model.ptz"]
    assert "results.json of its run, which tells the knobs, is not beside it" in refused(capsys, *words)[1]
    for text in ("{}", "[]", "not json", '{"config_hash": "0", "config": {}}'):
        (tmp_path / "results.json").write_text(text)
        assert "is not beside it" in refused(capsys, *words)[1]


def test_damaged_weights_are_refused(built, runs, tmp_path, capsys):
    blob = (runs["packed"] / "model.ptz").read_bytes()
    for damaged in (b"", blob[:-1], blob[:1000] + b"x" + blob[1001:]):
        (tmp_path / "model.ptz").write_bytes(damaged)
        words = [built.env_file, "--out", tmp_path / "out", "--weights", tmp_path / "model.ptz"]
        status, told = refused(capsys, *words)
        assert status == 2 and ("damaged" in told or "is not one of ours" in told), told


def test_submission_over_the_limit_is_not_written(built, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(builder, "prove", lambda *_: {"lines": 0})
    weights = runs["packed"] / "model.ptz"
    total = built.program.stat().st_size + weights.stat().st_size
    words = [built.env_file, "--out", tmp_path / "out", "--weights", weights]
    monkeypatch.setattr(train_gpt, "SIZE_LIMIT", total - 1)
    status, told = refused(capsys, *words)
    assert status == 1 and told.startswith(f"code and weights are {total:,} bytes, 1 above {total - 1:,}")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(train_gpt, "SIZE_LIMIT", total)
    assert builder.main([str(word) for word in words]) == 0
