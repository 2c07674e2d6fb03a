"""Records: every recipe parses and builds, every table is what its raw lines say."""

import importlib.util
import json
import sys

import pytest
import torch

import train_gpt
from conftest import ROOT, read_env

RECORDS = sorted(p.parent for p in (ROOT / "records").glob("*/env"))
TABLES = {  # records/bench/<name>.md -> the program that writes it, or what records/sweep.py reads
    "artifact": "tests/bench/artifact.py",
    "cpu_ablation": "records/bench/cpu_ablation.sweep",
    "cpu_train": "tests/bench/cpu_train.py",
    "reliability": "tests/bench/reliability.py",
    "run_local": "tests/bench/run_local.py",
}
PARAMS = {"baseline": 17_059_912}  # published counts


def module(path: str):
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / path)
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


def raw_rows(name: str) -> list[dict]:
    return [json.loads(x) for x in (ROOT / f"records/bench/raw/{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("folder", RECORDS, ids=lambda p: p.name)
def test_recipe_parses_strictly_and_builds_the_published_count(folder):
    env = read_env(folder / "env")
    assert train_gpt.near_misses(env) == []
    cfg = train_gpt.read_config(env)
    alone = train_gpt.World(
        0, 1, torch.device("cpu"), torch.float32, False, train_gpt.Journal(None), folder
    )
    assert train_gpt.param_count(train_gpt.empty_model(cfg, alone)) == PARAMS[folder.name]


@pytest.mark.parametrize("folder", RECORDS, ids=lambda p: p.name)
def test_recipe_states_only_what_differs_from_the_defaults(folder):
    env = read_env(folder / "env")
    assert env == train_gpt.changed_knobs(train_gpt.read_config(env))


@pytest.mark.parametrize("folder", RECORDS, ids=lambda p: p.name)
def test_record_folder_is_whole(folder):
    assert (folder / "README.md").is_file()
    assert f'exec ../../run_8xh100.sh records/{folder.name}/env "$@"' in (folder / "run.sh").read_text()


@pytest.mark.parametrize("name", [name for name, path in TABLES.items() if path.endswith(".py")])
def test_table_is_rebuilt_from_its_raw_lines(name):
    rows = raw_rows(name)
    assert rows
    assert (ROOT / f"records/bench/{name}.md").read_text() == module(TABLES[name]).render(rows)


@pytest.mark.parametrize("name", [name for name, path in TABLES.items() if path.endswith(".sweep")])
def test_table_of_a_sweep_is_rebuilt_from_its_raw_lines(name):
    """And rows that have none read `not run`; the file's knobs are those of the program."""
    written = (ROOT / f"records/bench/{name}.md").read_text()
    assert written == module("records/sweep.py").rebuilt(ROOT / TABLES[name])


def test_every_table_has_a_writer():
    assert {p.stem for p in (ROOT / "records/bench").glob("*.md")} == set(TABLES)
    assert {f"records/bench/{p.name}" for p in (ROOT / "records/bench").glob("*.sweep")} <= set(
        TABLES.values()
    )


def test_a_typed_number_is_noticed():
    rows = raw_rows("cpu_train")
    rows[-1]["ms"]["ours"] += 100
    assert module(TABLES["cpu_train"]).render(rows) != (ROOT / "records/bench/cpu_train.md").read_text()
