"""Sweeps: every setting is run once, whatever is killed in between; tables say what the raw lines say."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import ROOT, Toy, finish, run_program, start_program, tiny_env

sys.path.insert(0, str(ROOT / "records"))
import sweep

PROGRAM = ROOT / "records/sweep.py"
BRIEF = {"ITERATIONS": 3, "VAL_MAX_TOKENS": 300, "GRAD_ACCUM_STEPS": 1}


class Bench:
    """A folder with a base, a sweep file, and where its runs go."""

    def __init__(self, folder: Path, data: Toy | None = None, **knobs):
        self.folder, self.file, self.runs = folder, folder / "it.sweep", folder / "runs"
        env = tiny_env(**(data.env if data else {}), **BRIEF | knobs)
        (folder / "base.env").write_text("".join(f"{k}='{v}'\n" for k, v in env.items()))

    def write(self, rows: str, heads: str = "seeds = 1 2") -> "Bench":
        self.file.write_text(f"table = it\nbase = base.env\n{heads}\n\n{rows}\n")
        return self

    @property
    def words(self) -> list[str]:
        return [str(self.file), "--runs", str(self.runs)]

    def here(self, *more: str) -> int:
        return sweep.main([*self.words, *more])

    @property
    def raw(self) -> str:
        path = self.folder / "raw/it.jsonl"
        return path.read_text() if path.exists() else ""

    @property
    def lines(self) -> list[dict]:
        assert self.raw.endswith("\n") or not self.raw
        return [json.loads(line) for line in self.raw.splitlines()]

    @property
    def table(self) -> list[list[str]]:
        """Cells of the rows below the head."""
        rows = [line for line in (self.folder / "it.md").read_text().splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[2:]]


@pytest.fixture(autouse=True)
def _own_signals(monkeypatch):
    """What a sweep does about SIGTERM stays with the processes that are started for it."""
    monkeypatch.setattr(sweep, "signal", SimpleNamespace(signal=lambda *_: None, SIGTERM=signal.SIGTERM))


@pytest.fixture
def idle(monkeypatch):
    """Whoever wants a run fails the test."""
    monkeypatch.setattr(sweep, "run_one", lambda job, *_: pytest.fail(f"a run of {job.row.name} was made"))
    return monkeypatch


def as_if_run(job: sweep.Job, bpb: float, **changed) -> dict:
    """The raw line of a run that never was."""
    line = {
        "row": job.row.name, "seed": job.seed, "settings": job.row.settings, "date": "2026-11-21",
        "source": "0123456789abcdef", "machine": "2 cores of it", "config_hash": "c" * 16,
        "versions": {"torch": "2.13.0"}, "device": "cpu", "dtype": "torch.float32", "world_size": 1,
        "params": 9, "steps": 400, "train_tokens": 3_276_800, "train_seconds": 1.0,
        "tokens_per_second": 10_000.4, "step_seconds": None, "process_seconds": 1.0,
        "bytes": {"code": 1, "model": 1_000_000, "total": 2}, "score": "roundtrip",
        "scores": {"pre_quant": [bpb - 1e-6, False], "roundtrip": [bpb, False], "sliding": [bpb / 2, False]},
    }  # fmt: skip
    return line | changed


# --------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------


def test_settings_are_run_once_and_a_failure_stops_nothing(tmp_path, toy_data, capsys, monkeypatch):
    """Three runs and two failing ones; then the failing row alone is tried again, and a new row is run."""
    monkeypatch.setenv("QK_GAIN_INIT", "9")  # an exported knob is no part of the experiment
    bench = Bench(tmp_path, toy_data)
    bench.write(f"B0:\ngone: SEED=1 DATA_PATH={tmp_path}/none\nwide: SEED=1 MLP_MULT=3")
    assert bench.here() == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "it.sweep: 4 of 4 runs to make"
    assert [line.split(":")[0] for line in said[1:]] == [
        "[1/4] B0, seed 1", "[2/4] B0, seed 2", "[3/4] gone, seed 1", "[4/4] wide, seed 1"
    ]  # fmt: skip
    assert f"FAILED, exit status 2: error: DATA_PATH={tmp_path}/none" in said[3]
    assert str(bench.runs / "gone-1.log") in said[3]
    assert [(line["row"], line["seed"]) for line in bench.lines] == [("B0", 1), ("B0", 2), ("wide", 1)]
    failures = [json.loads(line) for line in (bench.runs / "failures.jsonl").read_text().splitlines()]
    assert [(f["row"], f["seed"]) for f in failures] == [("gone", 1)]
    for line, folder in zip(bench.lines, ("B0-1", "B0-2", "wide-1"), strict=True):
        results = json.loads((bench.runs / folder / "results.json").read_text())
        assert results["config"]["QK_GAIN_INIT"] == "1.5"
        assert line["config_hash"] == results["config_hash"]
        assert line["scores"]["roundtrip"] == [results["scores"]["roundtrip"]["val_bpb"], True]
        assert line["source"] == results["source_sha256"][:16]
        assert line["bytes"]["model"] == (bench.runs / folder / "model.ptz").stat().st_size
        assert (line["steps"], line["versions"]) == (3, results["versions"])
    assert [row[0] for row in bench.table] == ["B0", "gone", "wide"]
    assert [row[2] for row in bench.table] == ["2 of 2", "0 of 1", "1 of 1"]
    assert bench.table[1][3] == "not run"

    before, wanted, real = bench.raw, [], sweep.run_one
    monkeypatch.setattr(sweep, "run_one", lambda job, *a: wanted.append(job.row.name) or real(job, *a))
    bench.write(f"B0:\ngone: SEED=1 DATA_PATH={tmp_path}/none\nwide: SEED=1 MLP_MULT=3\nB1: @wide SEED=1")
    assert bench.here() == 1
    assert wanted == ["gone", "B1"]  # the same settings under another name are another row
    assert bench.raw.startswith(before)
    assert bench.lines[3]["settings"] == bench.lines[2]["settings"]
    assert bench.lines[3]["scores"] == bench.lines[2]["scores"]


def started(folder: Path, timeout: float = 60.0) -> None:
    """Wait until the run in that folder has taken a step."""
    deadline = time.monotonic() + timeout
    log = folder / "train.log"
    while not log.exists() or "\nstep:1" not in log.read_text():
        assert time.monotonic() < deadline, "no step was taken"
        time.sleep(0.02)


def test_killed_sweeps_lose_nothing_and_repeat_nothing(tmp_path, toy_data):
    """Killed with its run, or told to end, it makes the run anew; killed alone, it takes the run's result."""
    bench = Bench(tmp_path, toy_data, ITERATIONS=10**6, MAX_WALLCLOCK_SECONDS=2).write("B0:", "seeds = 1")
    folder = bench.runs / "B0-1"

    both = start_program(bench.words, program=PROGRAM)
    started(folder)
    os.killpg(both.pid, signal.SIGKILL)
    both.communicate()
    assert bench.raw == "" and not (folder / "results.json").exists()
    assert bench.table[0][3] == "not run"
    (folder / "train.log").unlink()

    told = start_program(bench.words, program=PROGRAM)
    started(folder)
    told.terminate()
    said = told.communicate(timeout=60)
    assert (told.returncode, said[1].count("\n")) == (130, 1), said
    assert bench.raw == "" and not (folder / "results.json").exists()
    (folder / "train.log").unlink()

    alone = start_program(bench.words, program=PROGRAM)
    started(folder)
    alone.kill()
    alone.communicate(timeout=60)  # also: the run that is left holds none of its pipes
    assert bench.raw == "" and not (folder / "results.json").exists()
    inode = (folder / "train.log").stat().st_ino

    last = finish(start_program(bench.words, program=PROGRAM), 120)
    assert last.returncode == 0, last.stderr
    assert "waiting: this sweep, or a run that it left behind, is at work" in last.stdout
    assert (folder / "train.log").stat().st_ino == inode  # not made again
    results = json.loads((folder / "results.json").read_text())
    assert [line["scores"]["roundtrip"][0] for line in bench.lines] == [
        results["scores"]["roundtrip"]["val_bpb"]
    ]
    assert bench.table[0][2] == "1 of 1"


def test_killed_between_run_and_line_takes_the_run_as_it_is(tmp_path, monkeypatch):
    """The run is over, its line not written: the next start does that; a torn temporary file is no line."""
    bench = Bench(tmp_path).write("B0:")

    def run_one(job, the_sweep, runs, lock):
        leave_results(bench, job)
        return ""

    def killed(*_):
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw/it.jsonl.tmp").write_text('{"row": "B')
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run_one", run_one)
    with monkeypatch.context() as m:
        m.setattr(sweep, "append", killed)
        assert bench.here() == 130
    assert bench.raw == ""
    made = []
    monkeypatch.setattr(sweep, "run_one", lambda job, *a: made.append(job.seed) or run_one(job, *a))
    assert bench.here() == 0
    assert made == [2]
    assert [line["seed"] for line in bench.lines] == [1, 2]


def test_lines_are_the_old_ones_until_all_of_the_new_one_is_there(tmp_path, monkeypatch):
    """Killed before the rename, with the new text on disk: not a letter of it is in the raw lines."""
    raw, seen = tmp_path / "raw/it.jsonl", []
    sweep.append(raw, {"row": "B0"})

    def killed(temporary, target):
        seen.append((temporary.read_text(), raw.read_text()))
        raise SystemExit

    with monkeypatch.context() as m:
        m.setattr(Path, "replace", killed)
        with pytest.raises(SystemExit):
            sweep.append(raw, {"row": "x"})
    assert seen == [('{"row": "B0"}\n{"row": "x"}\n', '{"row": "B0"}\n')]
    assert raw.read_text() == '{"row": "B0"}\n'


def leave_results(bench: Bench, job: sweep.Job, **changed) -> None:
    """What a run leaves, as far as a sweep reads it."""
    cfg = job.config()
    line = as_if_run(job, 1.5)
    results = {key: line[key] for key in line if key not in {"row", "settings", "date", "source", "machine"}}
    results |= {"source_sha256": "0" * 64, "config": sweep.train_gpt.knob_values(cfg)}
    results |= {"config_hash": sweep.train_gpt.config_hash(cfg)}
    score = {"val_bpb": 1.5, "partial": False}
    results |= {"scores": {"pre_quant": score, "roundtrip": score}} | changed
    folder = sweep.folder_of(job, bench.runs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))


def test_results_of_other_settings_are_not_taken(tmp_path, monkeypatch):
    """An older run in the folder, of another configuration, of other data, or damaged."""
    bench = Bench(tmp_path).write("B0:", "seeds = 1")
    (job,) = sweep.read_sweep(bench.file).jobs
    values, made = sweep.train_gpt.knob_values(job.config()), []
    monkeypatch.setattr(
        sweep, "run_one", lambda job, *_: made.append(job.seed) or "exit status 0, but nothing is there"
    )
    for changed in (
        {"config_hash": "0" * 16},
        {"config": values | {"DATA_PATH": "elsewhere"}},
        {"config": {}},
    ):
        leave_results(bench, job, **changed)
        assert bench.here() == 1
    (bench.runs / "B0-1/results.json").write_text('{"config_hash": "')
    assert bench.here() == 1
    assert made == [1] * 4
    assert bench.raw == ""


def test_a_new_knob_asks_for_no_new_run(tmp_path, idle):
    """A line is known by what differs from the defaults; another value of anything makes it another's."""
    bench = Bench(tmp_path).write("B0: SEED=1\nwide: SEED=1 MLP_MULT=3")
    jobs = sweep.read_sweep(bench.file).jobs
    for job in jobs:
        sweep.append(bench.folder / "raw/it.jsonl", as_if_run(job, 1.0, config_hash="of another day"))
    assert bench.here() == 0
    bench.write("B0: SEED=1\nwide: SEED=1 MLP_MULT=3.5")
    with pytest.raises(pytest.fail.Exception, match="a run of wide was made"):
        bench.here()
    bench.write("B0: SEED=1 TOKENIZER_PATH=other.model")
    with pytest.raises(pytest.fail.Exception, match="a run of B0 was made"):
        bench.here()


def test_ranks_start_the_program_through_torchrun(tmp_path):
    bench = Bench(tmp_path).write("B0:")
    assert sweep.command(sweep.read_sweep(bench.file)) == [sys.executable, str(ROOT / "train_gpt.py")]
    command = sweep.command(sweep.read_sweep(bench.write("B0:", "ranks = 8").file))
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"]


# --------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------


def filled(bench: Bench, bpb: dict[str, list[float]], heads: str = "seeds = 1 2") -> Bench:
    """The runs of row xsa alone say how long their median step took."""
    bench.write(
        "B0: SEED=1,2,3\nxsa: QK_GAIN_INIT=2\nmore: @xsa SEED=1 ROPE_BASE=99\nnever: MLP_MULT=3", heads
    )
    for row in sweep.read_sweep(bench.file).rows:
        for seed, value in zip(row.seeds, bpb.get(row.name, []), strict=False):
            told = {"median": 0.4 + 0.2 * seed, "fastest_tenth": 0.3} if row.name == "xsa" else None
            line = as_if_run(sweep.Job(row, seed), value, step_seconds=told)
            sweep.append(bench.folder / "raw/it.jsonl", line)
    return bench


def test_table_is_what_the_lines_say(tmp_path, idle):
    bench = filled(Bench(tmp_path), {"B0": [2.0, 2.1, 2.2], "xsa": [1.8, 1.9], "more": [1.5]})
    assert bench.here("--table") == 0
    want = """\
| row | knobs | runs | bpb | sd | difference | in sd | round trip | parameters | steps | tokens/s | artifact bytes | source |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
| B0 | `SEED=1,2,3` | 3 of 3 | 2.1000 | 0.1000 | - | - | +0.0000010 | 9 | 400 | 10,000* | 1,000,000 | 01234567 |
| xsa | `QK_GAIN_INIT=2` | 2 of 2 | 1.8500 | 0.0707 | -0.2500 to B0 | -2.5, better | +0.0000010 | 9 | 400 | 11,947 | 1,000,000 | 01234567 |
| more | `@xsa SEED=1 ROPE_BASE=99` | 1 of 1 | 1.5000 | - | -0.3500 to xsa | -3.5, better | +0.0000010 | 9 | 400 | 10,000* | 1,000,000 | 01234567 |
| never | `MLP_MULT=3` | 0 of 2 | not run | - | - | - | - | - | - | - | - | - |

* 2026-11-21, 2 cores of it, 1 x cpu in float32, torch 2.13.0
"""  # noqa: E501
    text = (tmp_path / "it.md").read_text()
    assert text.startswith(
        "# it\n\n`python records/sweep.py it.sweep`: base `base.env`, score: the declared one"
    )
    assert text[text.index("| row |") :] == want


@pytest.mark.parametrize(
    ("bpb", "verdict"),
    [(1.69, "-4.1, clearly better"), (1.89, "-2.1, better"), (1.91, "-1.9, no difference"),
     (2.29, "+1.9, no difference"), (2.31, "+2.1, worse"), (2.51, "+4.1, clearly worse")],
)  # fmt: skip
def test_verdict_counts_standard_deviations_of_the_first_row(tmp_path, bpb, verdict, idle):
    bench = filled(Bench(tmp_path), {"B0": [2.0, 2.1, 2.2], "xsa": [bpb, bpb]})
    bench.here("--table")
    assert bench.table[1][6] == verdict


def test_differences_wait_for_what_they_want(tmp_path, idle):
    """No unit from one run of the first row, no difference to a row that was not run."""
    bench = filled(Bench(tmp_path), {"B0": [2.0], "more": [1.5]})
    bench.here("--table")
    assert [row[2] for row in bench.table] == ["1 of 3", "0 of 2", "1 of 1", "0 of 2"]
    assert bench.table[2][5:7] == ["xsa not run", "-"]
    filled(bench, {"xsa": [1.75, 1.75]}).here("--table")
    assert [row[5:7] for row in bench.table[1:3]] == [["-0.2500 to B0", "-"], ["-0.2500 to xsa", "-"]]


def test_tabled_score_is_the_one_named(tmp_path, capsys, idle):
    bench = filled(Bench(tmp_path), {"B0": [2.0, 2.2]}, "seeds = 1\nscore = sliding\nabout = One line.")
    assert bench.here("--table") == 0
    assert bench.table[0][3] == "1.0500"
    assert "\nOne line.\n" in (tmp_path / "it.md").read_text()
    filled(bench, {}, "score = ttt")
    assert bench.here("--table") == 2
    assert "score = ttt: a run of row 'B0' has pre_quant, roundtrip, sliding" in capsys.readouterr().err


def test_later_line_wins_partial_scores_say_so_and_strangers_are_counted(tmp_path, idle):
    bench = filled(Bench(tmp_path), {"B0": [2.0, 2.1, 2.2]})
    job = sweep.read_sweep(bench.file).jobs[0]
    raw = tmp_path / "raw/it.jsonl"
    part = {name: [1.7, True] for name in ("pre_quant", "roundtrip")}
    sweep.append(raw, as_if_run(job, 1.7, scores=part, source="f" * 16))
    sweep.append(raw, as_if_run(job, 9.0, row="renamed"))
    raw.write_text(raw.read_text().rstrip("\n"))  # a file that an editor has left without its last newline
    sweep.append(raw, as_if_run(job, 9.0, settings={"MLP_MULT": "7.0"}))
    bench.here("--table")
    assert bench.table[0][2:5] == ["3 of 3", "2.0000 (partial)", "0.2646"]
    assert bench.table[0][12] == "01234567, ffffffff"
    assert "* 3 raw line(s) belong to no row above" in (tmp_path / "it.md").read_text()


# --------------------------------------------------------------------------------------
# Faults in what is given
# --------------------------------------------------------------------------------------

FAULTS = {  # rows -> what the line says, with its number
    "B0: NUM_LAYERS": ":5: row 'B0': 'NUM_LAYERS' is not KEY=value",
    "B0: =3": ":5: row 'B0': '=3' is not KEY=value",
    "B0:\nx: NUM_LAYER=3": ":6: NUM_LAYER is not a knob; did you mean NUM_LAYERS?",
    "B0:\nx: NO_SUCH_THING=3": ":6: NO_SUCH_THING is not a knob",
    "B0:\nx: NUM_LAYERS=many": ":6: NUM_LAYERS='many' is not allowed; want a whole number",
    "B0:\nx: NUM_HEADS=3": ":6: NUM_HEADS=3 does not divide MODEL_DIM=32",
    "B0:\nx: MLP_MULT=3 MLP_MULT=4": ":6: row 'x' sets a knob twice",
    "B0:\nB0: MLP_MULT=3": ":6: row 'B0' stands a second time",
    "a b:\na,b: MLP_MULT=3": ":6: row 'a,b' stands a second time, or one whose folder has the same name",
    "B0:\nx: @y MLP_MULT=3": ":6: row 'x': there is no row 'y' above it",
    "B0:\nx: SEED=1,one": ":6: seeds '1,one': want different whole numbers",
    "B0:\nx: SEED=1,1": ":6: seeds '1,1': want different whole numbers",
    "B0:\nx: RUN_DIR=mine": ":6: RUN_DIR is about one run; the sweep sets it",
    "B0:\nx: DATA_PATH='a b": ":6: row 'x': \"DATA_PATH='a b\" is not KEY=value KEY=value",
    "B0:\nMLP_MULT=3": ":6: 'MLP_MULT' is no header; want one of table, base, seeds",
    "B0:\nx MLP_MULT=3": ":6: 'x MLP_MULT=3' is neither `name = value` nor",
    "B0:\nseeds = 3": ":6: 'seeds' stands after the first row",
    "table = it": ":5: 'table' stands a second time",
    "ranks = 0\nB0:": ":5: ranks = '0': want a whole number from 1 on",
    "seeds = \nB0:": ":5: 'seeds' stands a second time",
    "# nothing": ": want `table = name`, `base = file` and one row or more",
}


@pytest.mark.parametrize("rows", FAULTS, ids=lambda rows: rows.replace("\n", "; "))
def test_fault_in_the_file_is_one_line_before_any_run(tmp_path, capsys, rows, idle):
    bench = Bench(tmp_path)
    assert bench.write(rows).here() == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"sweep.py: {bench.file}{FAULTS[rows]}")
    assert said.err.count("\n") == 1 and said.out == ""
    assert not bench.runs.exists() and not (tmp_path / "it.md").exists()


def test_other_faults_are_one_line_too(tmp_path, capsys, idle):
    bench = Bench(tmp_path).write("B0:")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/it.jsonl").write_text('{"row": "B0"}\n{"row": \n')
    assert bench.here() == 2
    assert f"{tmp_path}/raw/it.jsonl:2: '{{\"row\": ' is no JSON" in capsys.readouterr().err
    (tmp_path / "base.env").write_text("NUM_LAYERZ=3\n")
    assert bench.here() == 2
    assert f"sweep.py: {tmp_path}/base.env: NUM_LAYERZ is not a knob; did you mean" in capsys.readouterr().err
    (tmp_path / "base.env").write_text("NUM_LAYERS=$THREE\n")
    assert bench.here() == 2
    assert f"{tmp_path}/base.env:1: 'NUM_LAYERS=$THREE' is not KEY=value" in capsys.readouterr().err
    (tmp_path / "base.env").unlink()
    assert bench.here() == 2
    assert f"cannot read {tmp_path}/base.env: No such file" in capsys.readouterr().err
    assert sweep.main([str(tmp_path / "none.sweep")]) == 2
    assert f"cannot read {tmp_path}/none.sweep: No such file" in capsys.readouterr().err
    assert sweep.main([]) == 2
    assert "FILE; see --help" in capsys.readouterr().err


def test_help_is_the_head_of_the_file():
    shown = run_program(["--help"], program=PROGRAM)
    assert shown.returncode == 0
    assert "xsa: XSA_LAST_N=6" in shown.stdout
