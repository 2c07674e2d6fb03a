"""README: its example works as printed, its tables are those of the program, its commands exist."""

import re
from pathlib import Path

import pytest

import train_gpt
from conftest import ROOT, run_program, tiny_env

README = (ROOT / "README.md").read_text()
SOURCE = (ROOT / "train_gpt.py").read_text()


def with_example(source: str) -> str:
    """The program with the README's feature: the row among the knobs, class and factory in their chapter."""
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    row = re.search(r"^mlp_glu: .*$", example, re.MULTILINE)[0]
    feature = example[example.index("class GLU") :]
    source = source.replace("    tied: bool = knob(", f"    {row}\n    tied: bool = knob(", 1)
    start = source.index("def make_ffn(")
    end = source.index("\n\n\n", start)
    return source[:start] + feature.rstrip() + source[end:]


def test_example_of_a_feature_runs_as_printed_and_changes_the_model(tmp_path, toy_data):
    program = tmp_path / "train_gpt.py"
    program.write_text(with_example(SOURCE))
    sizes = {}
    for flag in ("0", "1"):
        env = tiny_env(**toy_data.env, MLP_GLU=flag, RUN_DIR=str(tmp_path / flag), STRICT="1")
        outcome = run_program(env=env, program=program, cwd=tmp_path)
        assert outcome.returncode == 0, outcome.stderr
        sizes[flag] = (tmp_path / flag / "model.ptz").stat().st_size
    assert sizes["1"] > sizes["0"] * 1.1
    assert "`MLP_GLU`" in run_program(["--knobs"], program=program, cwd=tmp_path).stdout


def test_chapter_table_is_the_programs():
    banners = re.findall(r"^# (\d+)\. ([A-Z][\w-]*) --", SOURCE, re.MULTILINE)
    table = README[README.index("| chapter |") : README.index("## Add a knob")]
    assert re.findall(r"(\d+) ([A-Z][\w-]*)", table) == banners


PATHS = re.findall(r"(?:\./|python )((?:\w+/)*\w+\.(?:sh|py))", README)


@pytest.mark.parametrize("path", sorted(set(PATHS)))
def test_every_command_of_the_readme_exists(path):
    assert (ROOT / path).is_file()


def test_every_knob_in_a_command_of_the_readme_is_one():
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    named = set(re.findall(r"\b([A-Z][A-Z_]+)=", blocks))
    assert named and named <= set(train_gpt.all_knobs())


def test_readme_says_what_was_not_measured():
    assert "not been run on a GPU" in README
    assert Path(ROOT / "records/bench/cpu_train.md").is_file()
