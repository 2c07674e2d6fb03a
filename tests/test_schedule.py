"""Schedule: where the run stands -> the values of this step."""

import ast
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from test_chapters import Source, free_names
from train_gpt import Config, Phase, Progress, final_phase, fraction, phase_at, read_config, warm_phases

R1855 = {"WARMDOWN_FRAC": "0.85", "MIN_LR": "0.1", "MAX_WALLCLOCK_SECONDS": "600"}


def config(**knobs: object) -> Config:
    return read_config({key: str(value) for key, value in knobs.items()})


def lr(cfg: Config, step: int = 0, seconds: float = 0.0) -> float:
    return phase_at(Progress(step, seconds), cfg).lr


# ---- the clock decides


EVENTS = {
    "NUM_LOOPS": 1, "ENABLE_LOOPING_AT": 0.5, "MOE_ENABLED": 1, "MOE_START_FRACTION": 0.5, "EMA_DECAY": 0.9,
    "EMA_START_FRACTION": 0.5, "MUON_WD": 0.1, "WD_TAPER_START_FRAC": 0.5, "WD_TAPER_FINAL_MULT": 0.5,
    "LATE_QAT_THRESHOLD": 0.9, "MATRIX_CODEC": "fp4", "WARMDOWN_FRAC": 0.5, "MIN_LR": 0,
}  # fmt: skip


def test_every_event_comes_by_the_clock_though_a_few_of_a_million_steps_are_taken():
    """And before the half of its time, which no step of the million has reached, none of them does."""
    cfg = config(**EVENTS, ITERATIONS=10**6, MAX_WALLCLOCK_SECONDS=100)

    def events(step: int, seconds: float) -> list[bool]:
        p = phase_at(Progress(step, seconds), cfg)
        return [p.lr < 0.9, p.qat, p.loops == 1, p.extra == 0, p.routing == 1, p.averages, p.decay < 1]

    assert events(205, 49.9) == events(10**6 - 1, 49.9) == [False] * 7
    assert events(206, 56.0) == events(411, 99.9) == [True] * 7
    assert phase_at(Progress(411, 100.0), cfg).lr == 0


def test_rate_begins_whole_however_many_steps_were_asked_for():
    for steps in (10, 10**6):
        for seconds in (0, 100):
            cfg = config(ITERATIONS=steps, MAX_WALLCLOCK_SECONDS=seconds, WARMDOWN_FRAC=0.5, WARMUP_STEPS=7)
            assert [lr(cfg, step, step / 2) for step in range(3)] == [1, 1, 1]


# ---- the fraction


def test_share_of_the_run_is_that_of_the_clock_where_there_is_a_cap():
    cfg = config(MAX_WALLCLOCK_SECONDS=600, ITERATIONS=100)
    assert [fraction(Progress(50, s), cfg) for s in (0, 150, 600, 601)] == [0, 0.25, 1, 1]


def test_share_of_the_run_is_that_of_the_steps_without_a_cap():
    cfg = config(MAX_WALLCLOCK_SECONDS=0, ITERATIONS=100)
    assert [fraction(Progress(n, 1e6), cfg) for n in (0, 25, 100, 101)] == [0, 0.25, 1, 1]
    assert fraction(Progress(0, 0), config(MAX_WALLCLOCK_SECONDS=0, ITERATIONS=0)) == 0


# ---- the rate


def test_warmdown_by_fraction_is_that_of_record_1855():
    """From f = 0.15 on (1 - f) / 0.85, with a floor of 0.1 that is reached at f = 0.915."""
    cfg = read_config(R1855)
    found = {f: lr(cfg, 1, f * 600) for f in (0, 0.149, 0.15, 0.5, 0.575, 0.9, 0.914, 0.916, 1, 1.2)}
    by_hand = {0: 1, 0.149: 1, 0.15: 1, 0.5: 0.588235, 0.575: 0.5, 0.9: 0.117647, 0.914: 0.101176}
    assert found == pytest.approx(by_hand | {0.916: 0.1, 1: 0.1, 1.2: 0.1}, abs=1e-6)


def test_warmdown_by_fraction_counts_steps_without_a_cap():
    cfg = config(WARMDOWN_FRAC=0.75, MAX_WALLCLOCK_SECONDS=0, ITERATIONS=400)
    assert [lr(cfg, n) for n in (0, 100, 250, 400)] == pytest.approx([1, 1, 0.5, 0])


def test_warmdown_by_iterations_counts_the_last_steps_without_a_cap():
    cfg = config(WARMDOWN_ITERS=1200, ITERATIONS=20000, MAX_WALLCLOCK_SECONDS=0)
    found = [lr(cfg, n) for n in (0, 18_800, 18_801, 19_400, 19_999, 20_000, 20_001)]
    assert found == pytest.approx([1, 1, 1199 / 1200, 0.5, 1 / 1200, 0, 0])


def test_warmdown_by_iterations_takes_their_time_at_the_mean_step_under_a_cap():
    """1,200 steps of 43.5 ms are 52.2 s: the rate falls from second 547.8 on (naive baseline)."""
    cfg = config(WARMDOWN_ITERS=1200, MAX_WALLCLOCK_SECONDS=600)
    at = {s: lr(cfg, round(s / 0.0435), s) for s in (0, 43.5, 547.7, 573.9, 594.78, 600, 601)}
    assert at == pytest.approx({0: 1, 43.5: 1, 547.7: 1, 573.9: 0.5, 594.78: 0.1, 600: 0, 601: 0}, abs=2e-4)


def test_rate_stays_without_a_warmdown():
    cfg = config(WARMDOWN_ITERS=0, MAX_WALLCLOCK_SECONDS=10)
    assert [lr(cfg, n, float(n)) for n in (0, 5, 10)] == [1, 1, 1]


def test_fraction_wins_over_iterations():
    cfg = config(WARMDOWN_FRAC=0.5, WARMDOWN_ITERS=100, MAX_WALLCLOCK_SECONDS=0, ITERATIONS=100)
    assert lr(cfg, 40) == 1


@settings(max_examples=200)
@given(
    frac=st.floats(0, 1), iters=st.integers(0, 300), floor=st.floats(0, 1), cap=st.sampled_from([0, 37.5]),
    pace=st.floats(0.01, 1), steps=st.lists(st.integers(0, 250), min_size=2, max_size=8),
)  # fmt: skip
def test_rate_never_rises_and_stays_between_the_floor_and_one(frac, iters, floor, cap, pace, steps):
    falling = {"WARMDOWN_FRAC": frac, "WARMDOWN_ITERS": iters, "MIN_LR": floor}
    cfg = config(**falling, MAX_WALLCLOCK_SECONDS=cap, ITERATIONS=200)
    rates = [lr(cfg, n, n * pace) for n in sorted(steps)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(rates))
    assert all(floor <= rate <= 1 for rate in rates)


# ---- momentum, loops, quantisation


def test_momentum_climbs_over_its_steps_and_stays():
    cfg = config(MUON_MOMENTUM_WARMUP_START=0.85, MUON_MOMENTUM=0.95, MUON_MOMENTUM_WARMUP_STEPS=500)
    found = [phase_at(Progress(n, 0), cfg).momentum for n in (0, 250, 500, 5000)]
    assert found == pytest.approx([0.85, 0.9, 0.95, 0.95])
    at_once = config(MUON_MOMENTUM_WARMUP_STEPS=0, MUON_MOMENTUM=0.97)
    assert phase_at(Progress(0, 0), at_once).momentum == pytest.approx(0.97)


def test_decay_is_whole_until_its_share_of_the_run_and_then_falls_to_its_last_value():
    cfg = config(WD_TAPER_START_FRAC=0.7, WD_TAPER_FINAL_MULT=0.5, MAX_WALLCLOCK_SECONDS=600)
    found = [phase_at(Progress(9, s), cfg).decay for s in (0, 420, 510, 600, 601)]
    assert found == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.5])
    by_steps = config(WD_TAPER_START_FRAC=0, WD_TAPER_FINAL_MULT=0, MAX_WALLCLOCK_SECONDS=0, ITERATIONS=10)
    assert [phase_at(Progress(n, 0), by_steps).decay for n in (0, 5, 10)] == pytest.approx([1, 0.5, 0])
    at_once = config(WD_TAPER_START_FRAC=1, WD_TAPER_FINAL_MULT=0.5, MAX_WALLCLOCK_SECONDS=600)
    assert [phase_at(Progress(9, s), at_once).decay for s in (0, 600)] == [1.0, 1.0]


def test_decay_does_not_fall_unless_told():
    cfg = config(MUON_WD=0.1, WARMDOWN_FRAC=0.5, MAX_WALLCLOCK_SECONDS=600)
    assert {phase_at(Progress(9, s), cfg).decay for s in range(0, 601, 50)} == {1.0}
    assert {phase.decay for phase in (final_phase(cfg), *warm_phases(cfg))} == {1.0}


def test_loops_begin_at_their_share_of_the_run():
    cfg = config(NUM_LOOPS=2, ENABLE_LOOPING_AT=0.35, MAX_WALLCLOCK_SECONDS=600)
    assert [phase_at(Progress(9, s), cfg).loops for s in (0, 209.9, 210, 600)] == [0, 0, 2, 2]
    off = config(NUM_LOOPS=0, ENABLE_LOOPING_AT=0)
    assert phase_at(Progress(9, 600), off).loops == 0


def test_quantiser_is_on_from_the_start_or_below_its_rate():
    always = config(QAT_ENABLED=1, MAX_WALLCLOCK_SECONDS=600)
    assert phase_at(Progress(0, 0), always).qat
    late = config(LATE_QAT_THRESHOLD=0.15, WARMDOWN_FRAC=0.5, MAX_WALLCLOCK_SECONDS=600)
    found = [phase_at(Progress(9, s), late).qat for s in (0, 300, 554.9, 555.1, 600)]
    assert found == [False, False, False, True, True]
    never = config(MAX_WALLCLOCK_SECONDS=600)
    assert not phase_at(Progress(9, 600), never).qat


def test_phase_at_the_start_and_at_the_end_are_whole():
    cfg = read_config(R1855 | {"NUM_LOOPS": "2", "LATE_QAT_THRESHOLD": "0.2"})
    assert phase_at(Progress(0, 0.0), cfg) == Phase(1.0, 0.85, 0, False)
    assert phase_at(Progress(5000, 600.0), cfg) == Phase(0.1, 0.95, 2, True)


def test_loaded_artifact_is_scored_with_all_loops_and_its_weights_as_they_are():
    cfg = config(NUM_LOOPS=2, QAT_ENABLED=1)
    assert (final_phase(cfg).loops, final_phase(cfg).qat) == (2, False)


# ---- graphs


@settings(max_examples=300)
@given(
    loops=st.integers(0, 3), looping_at=st.floats(0, 1), qat=st.booleans(), late=st.floats(0, 1),
    frac=st.floats(0, 1), cap=st.sampled_from([0, 60]), at=st.tuples(st.integers(0, 120), st.floats(0, 70)),
)  # fmt: skip
def test_every_graph_that_a_run_can_meet_is_warmed_up_once(loops, looping_at, qat, late, frac, cap, at):
    cfg = config(
        NUM_LOOPS=loops, ENABLE_LOOPING_AT=looping_at, QAT_ENABLED=int(qat), LATE_QAT_THRESHOLD=late,
        WARMDOWN_FRAC=frac, MAX_WALLCLOCK_SECONDS=cap, ITERATIONS=100, WARMDOWN_ITERS=30,
    )  # fmt: skip
    warmed = [(p.loops, p.qat) for p in warm_phases(cfg)]
    met = phase_at(Progress(*at), cfg)
    assert (met.loops, met.qat) in warmed
    assert len(set(warmed)) == len(warmed)
    assert len(warmed) <= (1 + (loops > 0)) * (1 + (late > 0 and not qat))


# ---- purity


def test_schedule_names_no_torch_no_clock_and_no_environment():
    source = Source((ROOT / "train_gpt.py").read_text())
    chapter = next(c for c in source.chapters if c.name == "Schedule")
    nodes = [n for n in source.tree.body if chapter.first <= n.lineno <= chapter.last]
    names = {name.id for node in nodes for name in free_names(node)}
    own = {name for name, owner in source.owner.items() if owner.name == "Schedule"}
    assert {"phase_at", "warm_phases", "Phase"} <= own
    harmless = {"Config", "NamedTuple", "itertools", "int", "float", "bool", "list", "min", "max", "sorted"}
    assert names - own <= harmless
    assert not any(isinstance(n, (ast.Import, ast.ImportFrom)) for node in nodes for n in ast.walk(node))
