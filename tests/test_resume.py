"""A run that was stopped or killed, anywhere, ends as the run that was left alone: to the last bit."""

import itertools
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

import train_gpt
from conftest import make_shards, write_shard
from faults import Ending, ending, only_line, plant, play, small, tree

LOOPS = {"NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 1, "ENABLE_LOOPING_AT": 0.5}
CONFIGS = {
    "plain": {},
    "average": {"EMA_DECAY": 0.9, "GRAD_CLIP_NORM": 0.5},
    "loops from step 3": LOOPS,
    "quantised from step 4": {"LATE_QAT_THRESHOLD": 0.7, "MATRIX_BITS": 6, "WARMUP_STEPS": 1},
    "documents": {"DOC_PACKING": 1, "TRAIN_SEQ_LEN": 24},
    "untied": {"TIE_EMBEDDINGS": 0, "QAT_ENABLED": 1, "MIN_LR": 0.1, "WARMDOWN_FRAC": 0.8},
    "validated": {"VAL_LOSS_EVERY": 2, "SLIDING_WINDOW_ENABLED": 1, "SCORE": "sliding", "VAL_MAX_TOKENS": 99},
    "everything": LOOPS | {"EMA_DECAY": 0.9, "LATE_QAT_THRESHOLD": 0.7, "DOC_PACKING": 1},
}
MEMORY: dict[tuple, Ending] = {}  # configuration and ranks -> how it ends undisturbed


def undisturbed(toy, folder: Path, ranks: int = 1, **knobs) -> Ending:
    key = (ranks, *sorted(knobs.items()))
    if key not in MEMORY:
        env = small(toy, folder / "undisturbed", **knobs)
        outcome = play(env, ranks=ranks)
        assert outcome.statuses == [0] * ranks, outcome
        MEMORY[key] = ending(env)
        shutil.rmtree(env["RUN_DIR"])
    return MEMORY[key]


def go_on(env: dict, ranks: int = 1) -> Ending:
    outcome = play(env | {"RESUME": 1}, ranks=ranks)
    assert outcome.statuses == [0] * ranks, outcome
    return ending(env)


# --------------------------------------------------------------------------------------
# Stopped at a chosen step
# --------------------------------------------------------------------------------------

STOPS = [(2, 1, "term"), (3, 0, "kill"), (5, 1, "kill")]  # at 3 the loops begin, at 4 the quantiser


def check_stops(toy, folder: Path, knobs: dict, ranks: int, stops: list) -> None:
    want = undisturbed(toy, folder, ranks, **knobs)
    for step, micro, action in stops:
        env = small(toy, folder / f"{step}_{micro}_{action}", **knobs)
        every = [plant("at_step", step=step, actions=[action], micro=micro, rank=r) for r in range(ranks)]
        stopped = play(env, *every, ranks=ranks)
        assert stopped.statuses == [{"kill": -9, "term": 143}[action]] * ranks, stopped
        assert go_on(env, ranks) == want, f"{action} in micro-batch {micro} of step {step}"


@pytest.mark.parametrize("config", CONFIGS)
def test_a_stopped_run_ends_as_an_undisturbed_one(toy_data, tmp_path, config):
    check_stops(toy_data, tmp_path, CONFIGS[config], 1, STOPS)


@pytest.mark.parametrize("config", ["average", "everything"])
def test_two_stopped_ranks_end_as_undisturbed_ones(toy_data, tmp_path, config):
    check_stops(toy_data, tmp_path, CONFIGS[config], 2, STOPS)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("config", CONFIGS)
def test_stopped_at_any_step_in_any_way_it_ends_the_same(toy_data, tmp_path, config, ranks):
    stops = [(step, micro, action) for step in range(6) for micro in (0, 1) for action in ("kill", "term")]
    stops = [stop for stop in stops if stop[::2] != (5, "term")]  # a test of its own
    check_stops(toy_data, tmp_path, CONFIGS[config] | {"TRAIN_SPANS": 8, "TRAIN_SEQ_LEN": 8}, ranks, stops)


def test_a_stop_may_fall_on_the_edge_of_a_shard_and_of_an_epoch(toy_data, tmp_path):
    # a step takes 4 spans of 64 + 1 tokens: shards end exactly after steps 3 and 6, where the epoch ends too
    make_shards(tmp_path / "data", train=(780, 780), val=(600,), seed=1)
    for packing in (0, 1):
        knobs = {"DATA_PATH": str(tmp_path / "data"), "DOC_PACKING": packing, "ITERATIONS": 8}
        want = undisturbed(toy_data, tmp_path, **knobs)
        for step, micro, action in [(2, 1, "term"), (6, 0, "kill")]:
            env = small(toy_data, tmp_path / f"{packing}{step}", **knobs)
            play(env, plant("at_step", step=step, actions=[action], micro=micro))
            newest = max(Path(env["RUN_DIR"], "checkpoints").iterdir())
            assert newest.name == f"step_{step + (action == 'term'):09d}.ckpt"
            assert go_on(env) == want


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_in_the_last_micro_batch_of_the_last_step_is_heard(toy_data, tmp_path, ranks):
    want = undisturbed(toy_data, tmp_path, ranks)
    env = small(toy_data, tmp_path / "term")
    stopped = play(env, plant("at_step", step=5, actions=["term"], micro=1, rank=ranks - 1), ranks=ranks)
    folder = Path(env["RUN_DIR"])
    assert (folder / "checkpoints" / "step_000000006.ckpt").exists()
    assert stopped.statuses == [143] * ranks and not (folder / "model.ptz").exists()
    assert "RESUME=1" in stopped.out
    assert go_on(env, ranks) == want


def test_a_finished_run_may_be_resumed_and_ends_the_same(toy_data, tmp_path):
    want = undisturbed(toy_data, tmp_path)
    env = small(toy_data, tmp_path / "twice")
    assert play(env).status == 0
    assert go_on(env) == want and go_on(env) == want


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4), (4, 2)])
def test_a_run_goes_on_on_another_number_of_ranks(toy_data, tmp_path, before, after):
    """The checkpoint holds the whole momentum, of which each rank takes its share."""
    env = small(toy_data, tmp_path / "other", GRAD_ACCUM_STEPS=0)
    stopped = play(env, plant("at_step", step=2, actions=["term"], rank=before - 1), ranks=before)
    assert stopped.statuses == [143] * before
    traces = go_on(env, after).trace, undisturbed(toy_data, tmp_path, GRAD_ACCUM_STEPS=0).trace
    losses = [[float.fromhex(json.loads(row)["loss"]) for row in t.splitlines()[:6]] for t in traces]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --------------------------------------------------------------------------------------
# Killed anywhere
# --------------------------------------------------------------------------------------


def kill_five_times(toy, folder: Path, seed: int, ranks: int, **knobs) -> None:
    chance, want = random.Random(seed), undisturbed(toy, folder, ranks, **knobs)
    env = small(toy, folder / f"killed{seed}", **knobs)
    moments = [chance.uniform(0.0, 0.35 if ranks == 1 else 0.5) for _ in range(5)]
    for i, moment in enumerate(moments):
        play(env | {"RESUME": int(i > 0)}, ranks=ranks, kill_after=moment)
    assert go_on(env, ranks) == want, f"seed {seed}: killed after {moments} seconds"


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_five_random_moments_it_ends_the_same(toy_data, tmp_path, seed):
    kill_five_times(toy_data, tmp_path, seed, 1 + seed % 2, **CONFIGS[list(CONFIGS)[seed]])


@pytest.mark.full
@pytest.mark.parametrize("seed", range(4, 204))
def test_killed_at_random_moments_a_thousand_times_it_ends_the_same(toy_data, tmp_path, seed):
    knobs, ranks = CONFIGS[list(CONFIGS)[seed % 8]], (1, 2, 1, 4)[seed // 8 % 4]
    kill_five_times(toy_data, tmp_path, seed, ranks, **knobs, **{"GRAD_ACCUM_STEPS": 1} if ranks == 4 else {})


SWEEP = {"ITERATIONS": 2, "EMA_DECAY": 0.9}  # three saves, the last of which drops the first generation
PIECES = plant("chew", size=80_000)  # a checkpoint is written in two pieces


def write_points(toy, folder: Path, ranks: int) -> list[list[str]]:
    """[kind, file name] of every call by which a run writes, in order."""
    env = small(toy, folder / "counted", **SWEEP)
    return play(env, PIECES, plant("write_down"), ranks=ranks).note["sites"]


def check_write_point(toy, folder: Path, number: int, point: list[str], ranks: int = 1) -> None:
    """Kill at one write point; what lies on the disk is whole, and the run goes on to the same end."""
    want, env = undisturbed(toy, folder, ranks, **SWEEP), small(toy, folder / f"at{number}", **SWEEP)
    assert play(env, PIECES, plant("strike", at=number), ranks=ranks).status == -9
    files = tree(Path(env["RUN_DIR"]))
    kept = [name for name in files if "step_" in name]
    assert len(kept) <= 3 and sum(name.endswith(".tmp") for name in files) <= 1, files
    for name in kept:
        if not name.endswith(".tmp"):
            train_gpt.unpack_checkpoint(Path(env["RUN_DIR"], name).read_bytes(), name)
    assert go_on(env, ranks) == want, f"write point {number}: {point}"
    assert not [name for name in tree(Path(env["RUN_DIR"])) if name.endswith(".tmp")]
    shutil.rmtree(folder / f"at{number}")


def test_killed_at_every_write_flush_and_rename_it_ends_the_same(toy_data, tmp_path):
    points = write_points(toy_data, tmp_path, 1)
    kinds = {kind for kind, _ in points}
    assert kinds == {"open", "write", "fsync", "replace", "unlink"} and len(points) >= 28
    for number, point in enumerate(points, 1):
        check_write_point(toy_data, tmp_path, number, point)


def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_after(toy_data, tmp_path):
    points = write_points(toy_data, tmp_path, 1)
    runs = [(kind, name) for (kind, name), _ in itertools.groupby(points) if kind != "unlink"]
    kinds, names = zip(*runs, strict=True)
    assert kinds == ("open", "write", "fsync", "replace", "fsync") * (len(runs) // 5)
    for at in range(0, len(runs), 5):
        assert len(set(names[at : at + 4])) == 1 and names[at].endswith(".tmp")
        assert names[at + 4] == ("checkpoints" if "step_" in names[at] else "run")


def test_two_ranks_killed_at_write_points_end_the_same(toy_data, tmp_path):
    points = [*enumerate(write_points(toy_data, tmp_path, 2), 1)]
    for number, point in random.Random(0).sample(points, 6):
        check_write_point(toy_data, tmp_path, number, point, 2)


@pytest.mark.full
def test_two_ranks_killed_at_every_write_point_end_the_same(toy_data, tmp_path):
    for number, point in enumerate(write_points(toy_data, tmp_path, 2), 1):
        check_write_point(toy_data, tmp_path, number, point, 2)


def test_a_run_killed_while_it_resumes_loses_nothing(toy_data, tmp_path):
    want = undisturbed(toy_data, tmp_path, **SWEEP)
    for number in (2, 4, 5, 7):  # the trace is cut by 1 to 5, then the first checkpoint begins
        env = small(toy_data, tmp_path / f"again{number}", **SWEEP)
        for how in (plant("at_step", step=1, actions=["kill"]), plant("strike", at=number)):
            assert play(env, how).status == -9
            env["RESUME"] = "1"
        assert go_on(env) == want


@pytest.mark.parametrize("name", ["warm_up", "export", "evaluate", "score_artifact", "finish"])
def test_killed_outside_training_it_ends_the_same(toy_data, tmp_path, name):
    knobs = {"EMA_DECAY": 0.9, "GRAD_CLIP_NORM": 0.5}
    env = small(toy_data, tmp_path / name, **knobs)
    assert play(env, plant("at_call", name=name, actions=["kill"])).status == -9
    assert go_on(env) == undisturbed(toy_data, tmp_path, **knobs)


def test_killed_long_after_its_last_checkpoint_it_ends_the_same(toy_data, tmp_path):
    want = undisturbed(toy_data, tmp_path, VAL_LOSS_EVERY=2, EMA_DECAY=0.9)
    env = small(toy_data, tmp_path / "late", VAL_LOSS_EVERY=2, EMA_DECAY=0.9, CHECKPOINT_EVERY=0)
    assert play(env, plant("at_step", step=0, actions=["term"])).status == 143
    for step in (2, 5, 4):  # each time from step 1 on again
        assert play(env | {"RESUME": 1}, plant("at_step", step=step, actions=["kill"])).status == -9
    assert go_on(env) == want


def test_killed_before_its_first_checkpoint_a_run_leaves_no_line_of_trace_behind(toy_data, tmp_path):
    want = undisturbed(toy_data, tmp_path)
    env = small(toy_data, tmp_path / "early", CHECKPOINT_EVERY=0)
    assert play(env, plant("at_step", step=4, actions=["kill"])).status == -9
    assert go_on(env) == want


def test_the_temporary_file_of_a_killed_save_does_not_outlive_the_next_save(toy_data, tmp_path):
    env = small(toy_data, tmp_path / "stale")
    assert play(env, plant("strike", at=8)).status == -9  # open, write, fsync of the save of step 1
    assert [p.name for p in Path(env["RUN_DIR"]).rglob("*.tmp")] == ["step_000000001.ckpt.tmp"]
    go_on(env | {"CHECKPOINT_EVERY": 0})
    assert not list(Path(env["RUN_DIR"]).rglob("*.tmp"))


# --------------------------------------------------------------------------------------
# What a resumed run says, and what it refuses
# --------------------------------------------------------------------------------------


@pytest.fixture
def stopped(toy_data, tmp_path) -> dict:
    """The environment of a run that was stopped before step 3."""
    env = small(toy_data, tmp_path / "stopped")
    assert play(env, plant("at_step", step=2, actions=["term"])).status == 143
    return env


def test_a_resumed_run_is_marked_and_its_clock_goes_on(stopped):
    folder = Path(stopped["RUN_DIR"])
    newest = max((folder / "checkpoints").iterdir())
    meta = train_gpt.unpack_checkpoint(newest.read_bytes(), "it").meta
    assert meta["step"] == 3 and meta["seconds"] > 0 and not meta["finished"]
    resumed = play(stopped | {"RESUME": 1})
    results = json.loads((folder / "results.json").read_text())
    assert results["resumed"] is True and results["steps"] == 6
    assert results["train_seconds"] > meta["seconds"]
    assert results["train_tokens"] == 6 * 256
    assert f"resumed:1 step:3 train_time:{meta['seconds'] * 1000:.0f}ms" in resumed.out


def test_an_undisturbed_run_is_not_marked_as_resumed(toy_data, tmp_path):
    env = small(toy_data, tmp_path)
    assert play(env).status == 0
    assert json.loads(Path(env["RUN_DIR"], "results.json").read_text())["resumed"] is False


def test_the_learning_rate_of_a_resumed_run_comes_from_the_schedule(stopped):
    assert play(stopped | {"RESUME": 1}).status == 0
    cfg = train_gpt.read_config(stopped)
    rows = [json.loads(line) for line in Path(stopped["RUN_DIR"], "trace.jsonl").read_text().splitlines()]
    rates = [float.fromhex(row["lr"]) for row in rows if "lr" in row]
    want = [train_gpt.phase_at(train_gpt.Progress(step, 0.0), cfg).lr for step in range(6)]
    assert rates == want and want[5] < want[4] < want[0]


def test_resume_in_an_empty_folder_starts_at_step_0_and_says_so(toy_data, tmp_path):
    env = small(toy_data, tmp_path / "new")
    outcome = play(env | {"RESUME": 1})
    assert outcome.status == 0
    assert f"resume: no checkpoint in {env['RUN_DIR']}/checkpoints yet; starting at step 0" in outcome.out
    assert json.loads(Path(env["RUN_DIR"], "results.json").read_text())["resumed"] is False
    assert ending(env) == undisturbed(toy_data, tmp_path)


def test_resume_wants_the_name_of_a_run(toy_data, tmp_path):
    env = small(toy_data, tmp_path)
    del env["RUN_DIR"]
    outcome = play(env | {"RESUME": 1})
    assert outcome.status == 2
    assert "RESUME=1 wants RUN_ID or RUN_DIR" in only_line(outcome.err)


OTHER = {"MODEL_DIM": 40, "SEED": 7, "ITERATIONS": 12, "MATRIX_LR": 0.01, "NUM_LOOPS": 1, "EMA_DECAY": 0.5}
OTHER |= {"DTYPE": "bfloat16", "MATRIX_BITS": 6, "DOC_PACKING": 1, "MAX_WALLCLOCK_SECONDS": 9.5}


@pytest.mark.parametrize("knob", OTHER)
def test_a_checkpoint_of_another_configuration_is_refused_by_name(stopped, knob):
    before = tree(Path(stopped["RUN_DIR"]) / "checkpoints")
    loops = {"LOOP_START": 1, "LOOP_END": 1} if knob == "NUM_LOOPS" else {}
    outcome = play(stopped | loops | {knob: OTHER[knob], "RESUME": 1})
    line = only_line(outcome.err)
    was = train_gpt.knob_values(train_gpt.read_config(stopped))[knob]
    assert outcome.status == 2
    assert f"{knob} (checkpoint {was!r}, now {str(OTHER[knob])!r})" in line and "RUN_ID" in line
    assert tree(Path(stopped["RUN_DIR"]) / "checkpoints") == before


@pytest.mark.parametrize("kind", ["sizes", "names", "tokens"])
def test_a_checkpoint_of_other_data_is_refused(stopped, toy_data, tmp_path, kind):
    other, checkpoints = tmp_path / "other", Path(stopped["RUN_DIR"], "checkpoints")
    shutil.copytree(toy_data.path, other)
    last, before = max(other.glob("fineweb_train_*")), tree(checkpoints)
    if kind == "sizes":
        write_shard(last, np.fromfile(last, "<u2")[512:-1])
    elif kind == "names":
        last.rename(other / "fineweb_train_000007.bin")
    else:  # prepared anew, from other documents: shards are cut at a fixed size
        make_shards(other)
    outcome = play(stopped | {"RESUME": 1, "DATA_PATH": str(other)})
    assert outcome.status == 2 and f"DATA_PATH={other}" in only_line(outcome.err)
    assert tree(checkpoints) == before


def test_the_knobs_of_the_run_section_may_change_on_resuming(stopped, tmp_path, toy_data):
    want = undisturbed(toy_data, tmp_path)
    changed = {"CHECKPOINT_EVERY": 0, "TRAIN_LOG_EVERY": 3, "STRICT": 1}
    assert go_on(stopped | changed) == want


def without(checkpoint: train_gpt.Checkpoint, name: str) -> train_gpt.Checkpoint:
    keep = [{k: v for k, v in part.items() if k != name} for part in checkpoint]
    return train_gpt.Checkpoint(*keep)


def with_one_row(checkpoint: train_gpt.Checkpoint, name: str) -> train_gpt.Checkpoint:
    return checkpoint._replace(tensors=checkpoint.tensors | {name: checkpoint.tensors[name][:1]})


PARTS = ["step", "skipped", "finished", "seconds", "knobs", "data", "dtype", "compiling", "rng", "ledger"]
TENSORS = ["model.embed.weight", "optimizer.muon.blocks.0.mlp.fc.weight"]


CHANGES = [(without, name) for name in PARTS + TENSORS] + [(with_one_row, name) for name in TENSORS]


@pytest.mark.parametrize(("change", "name"), CHANGES)
def test_a_checkpoint_of_another_version_is_refused_in_words(stopped, change, name):
    """It was written under the same knobs, by a program that keeps other things or other shapes."""
    folder = Path(stopped["RUN_DIR"], "checkpoints")
    for path in folder.iterdir():
        found = train_gpt.unpack_checkpoint(path.read_bytes(), "it")
        assert name in found.meta or name in found.tensors
        path.write_bytes(train_gpt.pack_checkpoint(change(found, name)))
    before, outcome = tree(folder), play(stopped | {"RESUME": 1})
    assert outcome.status == 2, outcome.err
    assert "checkpoint" in only_line(outcome.err) and tree(folder) == before


def test_a_changed_program_is_named_and_goes_on(stopped):
    newest = max(Path(stopped["RUN_DIR"], "checkpoints").iterdir())
    found = train_gpt.unpack_checkpoint(newest.read_bytes(), "it")
    other = found._replace(meta=found.meta | {"source_sha256": "0" * 64})
    newest.write_bytes(train_gpt.pack_checkpoint(other))
    outcome = play(stopped | {"RESUME": 1})
    assert outcome.status == 0
    assert "the source has changed since the checkpoint (000000000000 then" in outcome.out
