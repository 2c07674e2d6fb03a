"""The scripts, the top level of the project, and what tests/conftest.py promises to the other tests.

Scripts run in a copy of the project whose `torchrun`, `python3` and `.venv` are stand-ins that write down how
they were called, so that nothing is installed and nothing is trained.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from conftest import (
    GROUPS,
    ROOT,
    allowed_skips,
    clean_env,
    forbidden_skip,
    make_shards,
    read_env,
    run_program,
    torchrun,
    toy_documents,
)

LAUNCHERS = ["run_local.sh", "run_8xh100.sh", "run_2gpu_proxy.sh"]
SCRIPTS = [*LAUNCHERS, "tests/run.sh", ".ci/run", "records/baseline/run.sh"]
TOP_LEVEL = {
    *LAUNCHERS, "train_gpt.py", "build_submission.py", "data", "records", "tests", ".ci", "requirements.txt",
    "pyproject.toml", "README.md", "LICENSE", ".gitignore",
}  # fmt: skip
TOOLS = ["bash", "env", "cat", "grep", "sed", "cut", "tr", "sleep", "rm", "mkdir", "cp", "dirname"]
TOOLS += ["realpath", "awk", "sort", "flock"]

# Stands for python3 and .venv/bin/python: makes a venv with itself inside, notes what else it is asked for.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    "-c "*) exit "${FAKE_UNSUPPORTED:-0}" ;;
    "-V") echo "Python ${FAKE_VERSION:-3.11.9}" ;;
    "-m pip --version") ;;
    "-m venv "*) echo venv >>calls; rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip install "*)
        echo "pip: $(cat "${!#}" | grep -vE '^(#|$)' | cut -d' ' -f1 | tr '\\n' ' ')" >>calls
        sleep "${FAKE_PIP_SECONDS:-0}"; exit "${FAKE_PIP_FAILS:-0}" ;;
    *) echo "$* DATA_PATH=$DATA_PATH NUM_LAYERS=$NUM_LAYERS MODEL_DIM=$MODEL_DIM" >>calls ;;
esac
"""
FAKE_TORCHRUN = """#!/usr/bin/env bash
echo "$0 $*"
env | grep -E '^(SEED|TITLE|GRAD_ACCUM_STEPS|MAX_WALLCLOCK_SECONDS)=' | sort
"""


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the scripts; PATH is its folder `fake`: stand-ins and a few system tools, no nvidia-smi."""
    for name in (*SCRIPTS, "requirements.txt", "tests/requirements.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    write_script(tmp_path / "fake" / "python3", FAKE_PYTHON)
    write_script(tmp_path / "fake" / "torchrun", FAKE_TORCHRUN)
    for tool in filter(shutil.which, TOOLS):
        (tmp_path / "fake" / tool).symlink_to(shutil.which(tool))
    (tmp_path / "records/baseline/env").write_text("SEED=1\nTITLE='two words'\nMAX_WALLCLOCK_SECONDS=600\n")
    return tmp_path


def script(project: Path, name: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    env = {"PATH": str(project / "fake")} | env
    options = {"cwd": "/", "capture_output": True, "text": True, "timeout": 60}
    return subprocess.run([project / name, *args], env=env, **options)


def calls(project: Path) -> list[str]:
    return (project / "calls").read_text().splitlines() if (project / "calls").exists() else []


# --------------------------------------------------------------------------------------
# Launch scripts
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_valid_bash_and_executable(name):
    subprocess.run(["bash", "-n", ROOT / name], check=True)
    assert os.access(ROOT / name, os.X_OK)


def test_launch_scripts_are_short():
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in LAUNCHERS}
    assert lengths["run_local.sh"] < 40
    assert max(lengths["run_8xh100.sh"], lengths["run_2gpu_proxy.sh"]) < 25


def assigned_twice(text: str) -> set[str]:
    """Variables of the environment that a text gives a value more than once, its comments left out."""
    lines = [re.split(r"(?:^|\s)#", line)[0] for line in text.splitlines()]
    names = re.findall(r"(?<![\w${!-])([A-Z][A-Z0-9_]*)\+?=(?!=)", "\n".join(lines))
    return {name for name in names if names.count(name) > 1}


ENV_FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("records/*/*env"))


@pytest.mark.parametrize("path", [*SCRIPTS, *ENV_FILES])
def test_no_variable_is_given_two_values_in_one_file(path):
    assert assigned_twice((ROOT / path).read_text()) == set()


def test_no_setting_of_a_sweep_gives_a_variable_two_values():
    sweeps = sorted(ROOT.glob("records/*/*.sweep"))
    assert sweeps
    for line in (line for path in sweeps for line in path.read_text().splitlines()):
        assert assigned_twice(line) == set(), line


def test_a_variable_with_two_values_is_found():
    assert assigned_twice("A=1 B=2 # A=2\n# B=3\nC=$A\n[ $C == B ]\n") == set()
    assert assigned_twice("export SEED=1\nB=2\nexport SEED=2") == {"SEED"}
    assert assigned_twice("SEED=1 torchrun B=1 SEED=1") == {"SEED"}


def test_8xh100_runs_eight_ranks_with_the_env_file(project):
    run = script(project, "run_8xh100.sh")
    assert run.stdout.splitlines() == [
        f"{project}/fake/torchrun --standalone --nproc_per_node=8 train_gpt.py",
        "MAX_WALLCLOCK_SECONDS=600",
        "SEED=1",
        "TITLE=two words",
    ]


def test_env_file_wins_over_exported_and_argument_wins_over_env_file(project):
    assert "SEED=1" in script(project, "run_8xh100.sh", SEED="9").stdout
    assert "SEED=2" in script(project, "run_8xh100.sh", "SEED=2", SEED="9").stdout


def test_another_env_file_and_arguments_with_spaces(project):
    (project / "env").write_text("SEED=5\n")  # a bare name is a file here, not a program on PATH
    run = script(project, "run_8xh100.sh", "env", "TITLE=a b", "NPROC_PER_NODE=4")
    assert "nproc_per_node=4" in run.stdout
    assert "SEED=5\nTITLE=a b\n" in run.stdout


def test_torchrun_of_the_venv_is_preferred(project):
    write_script(project / ".venv/bin/torchrun", FAKE_TORCHRUN)
    assert script(project, "run_8xh100.sh").stdout.startswith(f"{project}/.venv/bin/torchrun --standalone")


def test_several_nodes_rendezvous_at_the_master(project):
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    run = script(project, "run_8xh100.sh", **nodes)
    flags = "--nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=29500 --nproc_per_node=8"
    assert run.stdout.splitlines()[0].endswith(f"{flags} train_gpt.py")
    run = script(project, "run_8xh100.sh", NNODES="2")
    assert run.returncode != 0
    assert "NODE_RANK" in run.stderr


def test_proxy_runs_two_ranks_with_four_times_the_accumulation_and_time(project):
    run = script(project, "run_2gpu_proxy.sh", "SEED=3")
    assert "--standalone --nproc_per_node=2 train_gpt.py" in run.stdout
    assert "GRAD_ACCUM_STEPS=4\nMAX_WALLCLOCK_SECONDS=2400\nSEED=3\n" in run.stdout
    (project / "other").write_text("GRAD_ACCUM_STEPS=2\nMAX_WALLCLOCK_SECONDS=599.5\n")
    other = script(project, "run_2gpu_proxy.sh", "other")
    assert "GRAD_ACCUM_STEPS=8\nMAX_WALLCLOCK_SECONDS=2398\n" in other.stdout
    short = script(project, "run_2gpu_proxy.sh", "MAX_WALLCLOCK_SECONDS=7")
    assert "MAX_WALLCLOCK_SECONDS=7\n" in short.stdout


def test_record_script_runs_its_own_env_file(project):
    (project / "records/baseline/env").write_text("SEED=11\n")
    run = script(project, "records/baseline/run.sh", "TITLE=x")
    assert "--nproc_per_node=8 train_gpt.py\nSEED=11\nTITLE=x\n" in run.stdout


@pytest.mark.parametrize("name", LAUNCHERS)
def test_argument_that_is_no_pair_is_refused_in_one_line(project, name):
    run = script(project, name, "A=1", "oops")
    assert (run.returncode, run.stderr) == (2, "want KEY=value, got: oops\n")
    assert calls(project) == []


@pytest.mark.parametrize("name", ["run_8xh100.sh", "run_2gpu_proxy.sh"])
def test_missing_env_file_is_refused_in_one_line(project, name):
    run = script(project, name, "records/none/env")
    assert (run.returncode, run.stderr) == (2, "no such env file: records/none/env\n")


# --------------------------------------------------------------------------------------
# run_local.sh: the environment, the data, the run
# --------------------------------------------------------------------------------------

DRIVER = Path("/dev/nvidia0").exists()
FOUR = "pip: torch==2.13.0 numpy>=2.0,<3 sentencepiece>=0.2.0,<0.3 brotli>=1.2,<2 "
FOUR += "triton>=3.5,<4; " if DRIVER else ""


def test_local_installs_prepares_and_trains(project):
    run = script(project, "run_local.sh", "NUM_LAYERS=2")
    assert run.returncode == 0, run.stderr
    data = "data/datasets/python_sp1024"
    knobs = f"DATA_PATH={data} NUM_LAYERS=2 MODEL_DIM=256"
    assert [line.strip() for line in calls(project)] == [
        "venv",
        FOUR.strip(),
        f"data/prepare.py --docs python --train-tokenizer 1024 --out {data} {knobs}",
        f"train_gpt.py {knobs}",
    ]


def test_local_sets_only_knobs_of_the_program():
    import train_gpt

    rows = re.search(r"for pair in (DATA_PATH.*?); do", (ROOT / "run_local.sh").read_text(), re.DOTALL)
    assert set(re.findall(r"(\w+)=", rows[1])) <= set(train_gpt.all_knobs())


def test_local_leaves_triton_out_and_says_so_without_a_driver(project):
    run = script(project, "run_local.sh", "--setup")
    said = "no NVIDIA driver found: a CPU build of torch will do, without triton" in run.stdout
    write_script(project / "fake/nvidia-smi", "#!/bin/sh\n")
    script(project, "run_local.sh", "--setup")
    assert said is not DRIVER
    with_triton = ["triton" in line for line in calls(project)]
    assert with_triton == ([False, True] if DRIVER else [False, False, True])


def test_local_argument_wins_over_exported_and_exported_over_default(project):
    script(project, "run_local.sh", "NUM_LAYERS=2", NUM_LAYERS="3", MODEL_DIM="128")
    assert calls(project)[-1].endswith("NUM_LAYERS=2 MODEL_DIM=128")


def test_local_prepares_nothing_for_other_data(project):
    script(project, "run_local.sh", "DATA_PATH=elsewhere")
    assert not [line for line in calls(project) if "prepare" in line]


def test_setup_installs_once_per_content_of_the_requirements(project):
    for _ in range(2):
        script(project, "run_local.sh", "--setup")
    assert calls(project) == ["venv", FOUR]
    with (project / "requirements.txt").open("a") as file:
        file.write("tqdm\n")
    script(project, "run_local.sh", "--setup")
    assert calls(project)[2:] == [FOUR + "tqdm "]


def test_setup_installs_again_for_another_python(project):
    for version in ("3.11.9", "3.12.1"):
        script(project, "run_local.sh", "--setup", FAKE_VERSION=version)
    assert calls(project) == ["venv", FOUR, FOUR]


def test_setup_that_was_interrupted_is_done_again(project):
    run = script(project, "run_local.sh", "--setup", FAKE_PIP_FAILS="1")
    assert run.returncode == 1
    assert script(project, "run_local.sh", "--setup").returncode == 0
    assert calls(project) == ["venv", FOUR, FOUR]


def test_two_setups_at_once_install_once(project):
    command = [project / "run_local.sh", "--setup"]
    env = {"PATH": str(project / "fake"), "FAKE_PIP_SECONDS": "0.5"}
    both = [subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert calls(project) == ["venv", FOUR]


def test_setup_names_the_python_it_needs(project):
    run = script(project, "run_local.sh", "--setup", FAKE_UNSUPPORTED="1", FAKE_VERSION="3.9.2")
    assert (run.returncode, run.stderr) == (2, "Python 3.11 or 3.12 is needed; python3 is Python 3.9.2\n")


def test_tests_run_through_the_same_setup_then_ruff_then_pytest(project):
    run = script(project, "tests/run.sh", "-k", "x")
    assert run.returncode == 0, run.stderr
    done = [line.split(" DATA_PATH")[0] for line in calls(project)]
    assert done[0:2] == ["venv", FOUR]
    assert done[2].startswith("pip: pytest")
    assert done[3:] == ["-m ruff check .", "-m pytest -q --durations=20 --budgets -k x"]


# --------------------------------------------------------------------------------------
# The project's top level
# --------------------------------------------------------------------------------------


def test_top_level_holds_only_the_fixed_names():
    command = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {file.split("/")[0] for file in files} <= TOP_LEVEL


def test_ci_runs_the_tests_and_nothing_else():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert lines == ["#!/usr/bin/env bash", 'cd "$(dirname "$0")/.." && exec tests/run.sh']


def test_every_env_file_of_a_record_has_its_two_line_script():
    for env in (ROOT / "records").glob("*/env"):
        name = env.parent.name
        lines = (env.parent / "run.sh").read_text().splitlines()
        assert lines[1] == f'cd "$(dirname "$0")" && exec ../../run_8xh100.sh records/{name}/env "$@"'
        assert len(lines) == 2
        assert all(key.isupper() for key in read_env(env))


def test_requirements_name_what_the_program_needs():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    names = [line.split("=")[0].split(">")[0] for line in lines if line]
    assert names == ["torch", "numpy", "sentencepiece", "brotli", "triton"]
    assert all(line.endswith('; sys_platform == "linux"') for line in lines if "triton" in line)


# --------------------------------------------------------------------------------------
# What conftest.py promises
# --------------------------------------------------------------------------------------


def test_skip_is_allowed_by_test_and_reason():
    allowed = allowed_skips("# comment\n\ntests/test_a.py::* | no CUDA device\n")
    assert not forbidden_skip("tests/test_a.py::test_x[1]", "no CUDA device", allowed, shared_data=False)
    assert forbidden_skip("tests/test_b.py::test_x", "no CUDA device", allowed, shared_data=False)
    assert forbidden_skip("tests/test_a.py::test_x", "flaky", allowed, shared_data=False)


def test_data_test_may_not_skip_where_the_data_is():
    allowed = allowed_skips((ROOT / "tests/skips.txt").read_text())
    skip = "tests/test_data.py::test_x", "no ../shared/data folder"
    assert not forbidden_skip(*skip, allowed, shared_data=False)
    assert forbidden_skip(*skip, allowed, shared_data=True)


def test_groups_share_23_minutes():
    assert sum(seconds for seconds, _ in GROUPS.values()) == 23 * 60


OUTCOMES = """
import time
import pytest

def test_passes(): pass
def test_fails(): assert {works}
@pytest.mark.xfail(reason="later")
def test_expected(): assert False
@pytest.mark.full
def test_long(): pass
@pytest.mark.gpu
def test_gpu(): pass
@pytest.mark.skip(reason="{reason}")
def test_skipped(): pass
"""


def run_tests(folder: Path, name="test_model.py", args=(), works=True, reason="only with --full"):
    """A pytest run over one file of tests, in a copy of the harness; the limit of `models` is 0.1 s."""
    (folder / "tests").mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(ROOT / "tests/skips.txt", folder / "tests")
    limited = (ROOT / "tests/conftest.py").read_text().replace('"models": (180', '"models": (0.1')
    (folder / "tests/conftest.py").write_text(limited)
    (folder / "tests" / name).write_text(OUTCOMES.format(works=works, reason=reason))
    command = [sys.executable, "-m", "pytest", "-q", *args]
    return subprocess.run(command, cwd=folder, env=clean_env(), capture_output=True, text=True, timeout=60)


def test_run_ends_with_the_counts_and_the_reasons_of_skips(tmp_path):
    run = run_tests(tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-4:] == [
        "3 passed, 0 failed, 3 skipped",
        "skipped: 2, only with --full",
        "skipped: 1, no CUDA device",
        "failed as expected: 1, later",
    ]


def test_run_with_full_runs_the_long_tests(tmp_path):
    assert "4 passed, 0 failed, 2 skipped" in run_tests(tmp_path, args=["--full"]).stdout.splitlines()


def test_run_fails_with_a_failing_test(tmp_path):
    run = run_tests(tmp_path, works=False)
    assert run.returncode == 1
    assert "2 passed, 1 failed, 3 skipped" in run.stdout.splitlines()


def test_run_fails_for_a_skip_that_is_not_listed(tmp_path):
    run = run_tests(tmp_path, reason="flaky")
    assert run.returncode == 1
    assert "does not allow: tests/test_model.py::test_skipped (flaky)" in run.stdout


def test_run_fails_for_a_file_without_a_group(tmp_path):
    run = run_tests(tmp_path, name="test_nowhere.py")
    assert run.returncode == 1
    assert "problem: test_nowhere.py belongs to no group" in run.stdout


def test_run_fails_when_a_group_is_over_its_time(tmp_path):
    slow = "time.sleep(0.2) is None"
    assert run_tests(tmp_path / "a", works=slow).returncode == 0
    run = run_tests(tmp_path / "b", works=slow, args=["--budgets"])
    assert run.returncode == 1
    assert "problem: group 'models' took 0 s of its 0.1 s" in run.stdout


def test_toy_data_is_in_the_format_of_the_challenge(toy_data):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(toy_data.tokenizer))
    assert [processor.id_to_piece(i) for i in range(5)] == ["<pad>", "<s>", "</s>", "<unk>", "<0x00>"]
    assert processor.vocab_size() == toy_data.vocab
    assert processor.piece_to_id("▁") != processor.unk_id()
    sizes = {}
    for name, documents in toy_data.documents.items():
        blob = (toy_data.path / name).read_bytes()
        magic, version, sizes[name] = np.frombuffer(blob, "<i4", 3)
        ids = np.frombuffer(blob, "<u2", offset=1024)
        assert (magic, version, len(ids)) == (20240520, 1, sizes[name])
        starts = np.flatnonzero(ids == 1)
        assert starts[0] == 0
        assert len(starts) == len(documents)
        assert processor.decode(ids[1 : starts[1]].tolist()) == documents[0]
    assert list(sizes.values()) == [40_000, 40_000, 12_000]


def test_toy_documents_survive_the_toy_tokenizer_byte_for_byte(toy_data):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(toy_data.tokenizer))
    for text in toy_documents(100, seed=99):
        assert processor.decode(processor.encode(text)) == text


def test_random_shards_start_documents_with_bos(tmp_path):
    shards = make_shards(tmp_path, train=[1000], val=[500, 200], vocab=64, seed=3)
    assert sorted(shards) == ["fineweb_train_000000.bin", "fineweb_val_000000.bin", "fineweb_val_000001.bin"]
    for name, ids in shards.items():
        stored = np.frombuffer((tmp_path / name).read_bytes(), "<u2", offset=1024)
        assert (stored == ids).all()
        assert ids[0] == 1
        assert ids.max() < 64
        assert set(np.unique(ids)) & {0, 2, 3} == set()


PROBE = """
import os, sys
print(sys.argv[1:], sorted(k for k in os.environ if k in {"NUM_LAYERS", "SEED", "OMP_NUM_THREADS"}))
if "sleep" in sys.argv:
    import subprocess, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)
    time.sleep(600)
if "WORLD_SIZE" in os.environ:
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    os.write(1, b"total %d\\n" % total.item())  # one call, so that the lines of two ranks do not mix
    dist.destroy_process_group()
"""


@pytest.fixture
def probe(tmp_path) -> Path:
    (tmp_path / "probe.py").write_text(PROBE)
    return tmp_path / "probe.py"


def test_program_inherits_no_knobs(probe, monkeypatch):
    monkeypatch.setenv("NUM_LAYERS", "99")
    run = run_program(["--x", 1], {"SEED": 7}, program=probe)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "['--x', '1'] ['OMP_NUM_THREADS', 'SEED']\n"


def test_program_that_takes_too_long_dies_with_its_children(probe, capfd):
    with pytest.raises(subprocess.TimeoutExpired):
        run_program(["sleep"], program=probe, timeout=1.0)
    child = int(capfd.readouterr().out.split("child ")[1].split()[0])
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def alive(pid: int) -> bool:
    """Whether a process runs; a dead one whose parent never asked for it does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_torchrun_starts_gloo_ranks(probe):
    run = torchrun(2, {"SEED": 7}, program=probe)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("total 2\n") == 2
