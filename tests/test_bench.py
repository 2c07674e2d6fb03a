"""Benchmarks: what they share, the filter that refuses a busy machine, tables that follow from raw lines."""

import itertools
import math
import os
import re
import subprocess
import sys
import time

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests/bench"))

import common
import cpu_suite
from cpu_suite import AIMS, Finding, Plan, Usage, finding, line, read_stat, render, take_turns, used_by_others

ABOUT = {
    "date": "2026-11-21", "source": "0123456789abcdef", "python": "3.11", "numpy": "2", "torch": "2.13",
    "cores": 2, "threads": 2, "cpu": "a CPU", "dry": False, "command": "python x", "load": 0.1,
}  # fmt: skip
AIM = AIMS[0]  # eager / compiled, 1.5 or more
QUICK = Plan(wanted=3, least=2, sample=0.0, box=0.0, warm=0)


def raw_line(values: list[float], about: dict = ABOUT, aim: cpu_suite.Aim = AIM, tried: int = 7) -> dict:
    return line(aim.section, Finding(aim.what, values, tried, {}), about)


def cells(table: str, aim: cpu_suite.Aim = AIM) -> list[str]:
    row = next(text for text in table.splitlines() if text.startswith(f"| {aim.section} | {aim.what} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


# --------------------------------------------------------------------------------------
# The filter
# --------------------------------------------------------------------------------------


def stat(busy: float, idle: float) -> str:
    """/proc/stat of a machine whose cores were busy and idle for so many seconds, in eight kinds of time."""
    user, nice, system, stolen = (round(busy * share * 100) for share in (0.5, 0.2, 0.2, 0.1))
    numbers = [user, nice, system, round(idle * 80), round(idle * 20), 0, 0, stolen, 0, 0]
    return f"cpu  {' '.join(map(str, numbers))}\ncpu0 1 2 3 4 5 6 7 8 9 10\nintr 5\n"


def moments(*shares: float):
    """A `read` for samples in which others used these shares of two cores' second, and we 0.6 of it."""
    busy = idle = own = 0.0
    for share in shares:
        yield Usage(*read_stat(stat(busy, idle), 100), own)
        busy, idle, own = busy + 2 * share + 0.6, idle + 1.4 - 2 * share, own + 0.6
        yield Usage(*read_stat(stat(busy, idle), 100), own)


def turns(*shares: float, plan: Plan = QUICK, calls: tuple[str, ...] = ("a",)) -> cpu_suite.Found:
    return take_turns("test", dict.fromkeys(calls, int), plan, moments(*shares).__next__)


def test_stat_is_read_in_seconds_and_waiting_is_no_work():
    assert read_stat(stat(3.0, 5.0), 100) == (8.0, 3.0)
    assert read_stat("cpu  1 2 3 4 5 6 7 8 900 900\n", 1) == (36.0, 27.0)  # guests are in user time already


def test_share_of_others_is_busy_time_that_is_not_ours():
    before, after = Usage(100.0, 40.0, 7.0), Usage(102.0, 41.5, 8.0)
    assert used_by_others(before, after) == pytest.approx(0.25)
    assert used_by_others(before, before) == math.inf  # a clock that stands says nothing


@pytest.mark.parametrize(
    ("others", "kept"), [(0.0, 2), (0.10, 2), (0.14, 0), (0.4, 0), (-0.10, 2), (-0.14, 0)]
)
def test_a_sample_counts_only_where_others_did_little(others, kept):
    """Nor where the machine's figures leave our own work out."""
    assert len(turns(others, others).rounds) == kept


def test_one_noisy_sample_costs_the_whole_round_and_another_round_is_made():
    shares = (0, 0, 0, 0.5, 0.5, 0, 0, 0, 0)  # noisy: the second of round 2, the first of round 3
    found = turns(*shares, plan=QUICK._replace(box=60), calls=("a", "b"))
    assert (len(found.rounds), found.tried) == (3, 5)
    assert all(set(r) == {"a", "b"} for r in found.rounds)


def test_rounds_end_with_the_time_but_a_quiet_machine_gets_the_least_number():
    assert turns(0, 0, 0, 0).tried == 2  # no time at all
    assert turns(*[0.5] * 9, plan=QUICK._replace(least=4)).tried == 1
    assert turns(0, 0, 0.5, *[0] * 9, plan=QUICK._replace(least=4)).tried == 3
    begin, busy, calls = time.monotonic(), moments(*[0.5] * 10**4), {"a": lambda: time.sleep(0.01)}
    assert take_turns("test", calls, QUICK._replace(box=0.2), busy.__next__).tried > 2
    assert time.monotonic() - begin < 5


def test_a_busy_machine_gets_no_number():
    found = turns(0, 0, 0.3, plan=QUICK._replace(least=3))
    assert (found.rounds, found.tried) == ([], 3)  # two quiet rounds are too few to tell
    row = line(AIM.section, finding(AIM.what, found, found.ratio("a", "a")), ABOUT)
    assert row["status"] == "contended" and not {"value", "spread", "ms"} & {*row}
    assert cells(render([row]))[3:7] == ["contended", "-", "0 of 3", "-"]


def test_our_children_are_ours_once_they_have_ended_and_others_before():
    burn = [sys.executable, "-c", "import time\nwhile time.process_time() < 0.4: pass"]
    before = cpu_suite.usage()
    child = subprocess.Popen(burn)
    time.sleep(0.5)
    during = cpu_suite.usage()
    child.wait()
    assert used_by_others(before, during) * (during.total - before.total) > 0.1
    assert during.own - before.own < 0.2 < cpu_suite.usage().own - during.own


def test_a_ratio_is_that_of_its_round():
    found = cpu_suite.Found("", [{"a": 3.0, "b": 1.0}, {"a": 8.0, "b": 2.0}, {"a": 50.0, "b": 10.0}], 5)
    assert found.ratio("a", "b") == [3.0, 4.0, 5.0]
    row = line("step", finding("x", found, found.ratio("a", "b")), {})
    assert (row["value"], row["spread"], row["n"], row["rounds"]) == (4.0, [3.0, 5.0], 3, 5)
    assert row["ms"] == {"a": 8.0, "b": 2.0}


# --------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sign", "value", "verdict"),
    [(">=", 1.49, "missed"), (">=", 1.5, "met"), ("<=", 1.51, "missed"), ("<=", 1.5, "met"), ("", 9.0, "-")],
)
def test_verdict(sign, value, verdict):
    assert cpu_suite.Aim("step", "x", sign, 1.5).verdict(value) == verdict


def test_a_ratio_below_its_aim_reads_missed():
    table = render([raw_line([1.2, 1.4, 1.3])])
    assert cells(table)[2:] == [">= 1.5", "1.3", "missed", "3 of 7", "1.2-1.4", "0.1", "1"]
    assert cells(render([raw_line([1.6])]))[4] == "met"


def test_rows_without_a_line_are_not_run():
    table = render([])
    assert all(cells(table, aim)[3:] == ["not run", *"-----"] for aim in AIMS)


def test_the_latest_measurement_stands_and_a_busy_hour_does_not_erase_it():
    old, new = raw_line([2.0]), raw_line([3.0], ABOUT | {"source": "fedcba98"})
    assert cells(render([old, new]))[3] == cells(render([old, new, raw_line([])]))[3] == "3"
    assert cells(render([raw_line([]), old]))[3] == "2"
    assert "fedcba98" in render([old, new]) and "01234567" not in render([old, new])


def test_dry_lines_are_in_no_real_table():
    dry = raw_line([9.0], ABOUT | {"dry": True})
    assert render([dry]) == render([])
    assert cells(render([dry, raw_line([2.0])]))[3] == "2"
    assert "DRY" in render([dry], dry=True) and "DRY" not in render([dry])


def test_the_aims_are_those_of_the_plan():
    signs = {aim.sign for aim in AIMS if aim.section != "artifact"}
    assert signs == {">=", "<="} and len({(a.section, a.what) for a in AIMS}) == len(AIMS)
    assert {a.section for a in AIMS} == {*cpu_suite.SECTIONS}


# --------------------------------------------------------------------------------------
# The whole command, at tiny sizes
# --------------------------------------------------------------------------------------


def suite(*words, **env) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tests/bench/cpu_suite.py", *map(str, words)]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def dry_folder(tmp_path_factory):
    """A dry run; what torch.compile makes of these functions is left to test_compile.py."""
    folder = tmp_path_factory.mktemp("bench")
    done = suite("--dry", "--out", folder, TORCHDYNAMO_DISABLE="1")
    assert done.returncode == 0, done.stderr
    assert "artifact done" in done.stdout and "round 1, 1 quiet" in done.stdout
    return folder


def test_a_dry_run_fills_every_row_and_says_that_it_is_dry(dry_folder):
    rows = common.Bench("cpu_suite", dry_folder).rows()
    assert [(r["section"], r["what"]) for r in rows if not r["dry"]] == []
    assert {(r["section"], r["what"]) for r in rows} == {(a.section, a.what) for a in AIMS}
    assert all(r["status"] == "measured" and r["value"] > 0 and r["n"] == 1 for r in rows)
    table = (dry_folder / "cpu_suite.md").read_text()
    assert "DRY" in table and "not run" not in table and rows[0]["command"] in table


def test_the_table_of_a_run_is_rebuilt_from_its_lines(dry_folder):
    bench = common.Bench("cpu_suite", dry_folder)
    written = bench.table.read_text()
    assert written == render(bench.rows(), dry=True)
    rows = bench.rows()
    rows[0]["value"] += 1
    assert written != render(rows, dry=True)
    bench.table.write_text("")
    assert cpu_main("--table", "--dry", "--out", str(dry_folder)) == 0
    assert bench.table.read_text() == written


def cpu_main(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cpu_suite.py", *words])
        return cpu_suite.main()


def test_a_dry_run_is_refused_beside_the_records(capsys):
    before = sorted((ROOT / "records/bench/raw").iterdir())
    with pytest.raises(SystemExit) as refused:
        cpu_main("--dry", "--out", str(ROOT / "tests/../records/bench"))
    assert refused.value.code == 2 and "another folder" in capsys.readouterr().err
    assert sorted((ROOT / "records/bench/raw").iterdir()) == before


def test_a_contended_section_is_an_exit_status(tmp_path, monkeypatch, capsys):
    def busy(sizes, plan):
        yield Finding(AIM.what, [], 5, {})

    monkeypatch.setitem(cpu_suite.SECTIONS, "step", busy)
    assert cpu_main("--only", "step", "--out", str(tmp_path)) == 1
    assert cells((tmp_path / "cpu_suite.md").read_text())[3] == "contended"


# --------------------------------------------------------------------------------------
# What all benchmarks share
# --------------------------------------------------------------------------------------


def test_raw_lines_are_kept_in_order_and_make_the_table(tmp_path):
    bench = common.Bench("x", tmp_path / "deep")
    assert bench.rows() == []
    for i in range(3):
        bench.add({"i": i})
    assert bench.rows() == [{"i": 0}, {"i": 1}, {"i": 2}]
    assert bench.raw == tmp_path / "deep/raw/x.jsonl"
    assert bench.write_table(lambda rows: f"{len(rows)}\n") == bench.table.read_text() == "3\n"


def test_facts_are_asked_for_by_name_and_in_that_order():
    found = common.facts("load", "cpu", "source", "date", "cores")
    assert list(found) == ["load", "cpu", "source", "date", "cores"]
    assert found["cores"] == os.cpu_count() and re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert re.fullmatch(r"[0-9a-f]{16}", found["source"])
    with pytest.raises(KeyError):
        common.facts("lode")


def test_a_cpu_is_named_with_what_makes_its_bfloat16_fast(monkeypatch):
    text = "processor : 0\nmodel name\t: A CPU @ 2: fast\nflags : fpu avx512_bf16 amx_bf16\nmodel name\t: B\n"
    monkeypatch.setattr(common, "cpu_text", lambda: text)
    assert common.cpu_name_and_matrix_extensions() == "A CPU @ 2: fast amx_bf16 avx512_bf16"
    monkeypatch.setattr(common, "cpu_text", lambda: "CPU part : 0xd40\n")
    assert common.cpu_name() == "an unnamed CPU"


def test_every_entry_of_the_log_has_its_four_parts():
    """Prediction, change, measurement and outcome; newest first."""
    entries = re.split(r"^## ", (ROOT / "records/bench/log.md").read_text(), flags=re.MULTILINE)[1:]
    assert entries
    for entry in entries:
        assert re.findall(r"^\* (\w+):", entry, re.MULTILINE) == ["Prediction", "Change", "Measured", "Kept"]
    dates = [entry[:16] for entry in entries]
    assert all(a >= b for a, b in itertools.pairwise(dates))
