"""Full and failing disks, signals, and the clock: a run says what went wrong, and loses nothing it had."""

import itertools
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import train_gpt
from conftest import finish, start_program
from faults import Outcome, ending, only_line, plant, play, small

MODES = ["open", "write", "fsync", "replace"]
FILES = ["step_000000002", "model.ptz", "results.json"]
REASONS = {"ENOSPC": "No space left on device", "EIO": "Input/output error", "EROFS": "Read-only file system"}


@pytest.fixture(scope="module")
def healthy(toy_data, tmp_path_factory):
    env = small(toy_data, tmp_path_factory.mktemp("healthy"))
    assert play(env).status == 0
    return ending(env)


# --------------------------------------------------------------------------------------
# The disk
# --------------------------------------------------------------------------------------


def check_complaint(outcome: Outcome, env: dict, file: str, reason: str) -> None:
    """One line names file and reason; what was there before still is, and nothing is half-written."""
    run = Path(env["RUN_DIR"])
    assert outcome.status == 2, outcome.err
    line = only_line(outcome.err)
    assert file in line and reason in line and "free space or choose another" in line
    assert not list(run.rglob("*.tmp")), "no temporary file is left"
    found = train_gpt.load_checkpoint(run / "checkpoints", pytest.fail)
    assert found.meta["step"] in ((1, 2) if file.startswith("step") else (6,))
    assert (run / "model.ptz").exists() <= (not file.startswith("step"))
    assert not (run / "results.json").exists() or file == "results.json"


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("file", FILES)
def test_a_failing_disk_ends_the_run_in_words_and_it_can_go_on(toy_data, tmp_path, healthy, file, kind):
    code = random.Random(file + kind).choice(list(REASONS))
    env = small(toy_data, tmp_path)
    outcome = play(env, plant("refuse", code=code, kind=kind, only=file))
    check_complaint(outcome, env, file, REASONS[code])
    assert outcome.note["refused"][0][0] == kind
    assert play(env | {"RESUME": "1"}).status == 0
    assert ending(env) == healthy


@pytest.mark.full
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("code", REASONS)
@pytest.mark.parametrize(("file", "kind"), [*itertools.product(FILES, MODES)])
def test_every_failure_everywhere_ends_the_run_in_words(toy_data, tmp_path, healthy, file, kind, code, at):
    env = small(toy_data, tmp_path)
    eaten = plant("chew", size=20_000)
    outcome = play(env, eaten, plant("refuse", code=code, kind=kind, only=file, at=at, lasting=False))
    if "refused" in outcome.note:
        check_complaint(outcome, env, file, REASONS[code])
        assert play(env | {"RESUME": "1"}, eaten).status == 0
    assert ending(env) == healthy


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_folder_that_cannot_be_flushed_is_an_error_too(toy_data, tmp_path, healthy, ranks):
    env = small(toy_data, tmp_path)
    outcome = play(env, plant("refuse", code="EIO", kind="fsync", only="run/checkpoints", at=4), ranks=ranks)
    assert outcome.statuses == [2] * ranks, "all ranks stop alike"
    assert all("Input/output error" in only_line(err) for err in outcome.errs)
    assert play(env | {"RESUME": "1"}).status == 0
    if ranks == 1:
        assert ending(env) == healthy


@pytest.mark.parametrize(
    "fault",
    [plant("refuse_reading", code="EIO", only="step_000000002"), plant("refuse", code="EIO", kind="unlink")],
)
def test_a_save_that_cannot_be_read_back_or_cleared_up_after_ends_the_run_in_words(
    toy_data, tmp_path, healthy, fault
):
    env = small(toy_data, tmp_path)
    outcome = play(env, fault)
    assert outcome.status == 2, outcome.err
    assert "checkpoints" in only_line(outcome.err) and "Input/output error" in outcome.err
    assert play(env | {"RESUME": "1"}).status == 0
    assert ending(env) == healthy


def test_short_writes_are_continued(toy_data, tmp_path, healthy):
    env = small(toy_data, tmp_path)
    outcome = play(env, plant("chew", size=4099), plant("write_down"))
    assert outcome.status == 0 and len(outcome.note["sites"]) > 200
    assert ending(env) == healthy


@pytest.mark.parametrize(("beyond", "file"), [(-50_000, "train.log"), (100_000, "step_000000000.ckpt")])
def test_a_file_that_the_system_will_not_let_grow_ends_the_run_in_words(toy_data, tmp_path, beyond, file):
    # the kernel itself refuses, in the middle of a write; train.log begins with the source
    source = Path(train_gpt.__file__).stat().st_size
    env = small(toy_data, tmp_path, MODEL_DIM=128)
    outcome = play(env, plant("limit_file_size", size=source + beyond))
    assert outcome.status == 2 and "File too large" in only_line(outcome.err)
    assert file in outcome.err and not list(Path(env["RUN_DIR"]).rglob("*.tmp"))


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many bytes; gives None where that is not allowed."""
    mounted = []

    def mount(size: int) -> Path | None:
        folder = tmp_path / f"disk{size}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(words, capture_output=True).returncode:
            return None
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(("checkpoints", "file"), [(-0.5, "train.log"), (2.5, "step_000000002.ckpt")])
def test_a_disk_that_is_really_full_ends_the_run_in_words(toy_data, tmp_path, small_disk, checkpoints, file):
    roomy = small(toy_data, tmp_path / "roomy", MODEL_DIM=24)
    assert play(roomy).status == 0
    sizes = {path.suffix: path.stat().st_size for path in Path(roomy["RUN_DIR"]).rglob("*.*")}
    disk = small_disk(sizes[".log"] + int(checkpoints * sizes[".ckpt"]))
    if disk is None:  # the limit on file sizes above asks the same of the same kernel
        return
    env = small(toy_data, tmp_path, RUN_DIR=disk / "run", MODEL_DIM=24)
    outcome = play(env)
    assert outcome.status == 2 and "No space left on device" in only_line(outcome.err)
    assert file in outcome.err and not list(disk.rglob("*.tmp"))
    if checkpoints > 0:
        assert train_gpt.load_checkpoint(disk / "run" / "checkpoints", pytest.fail).meta["step"] == 1
        shutil.rmtree(roomy["RUN_DIR"])
        shutil.copytree(disk / "run", roomy["RUN_DIR"])
        assert play(roomy | {"RESUME": "1"}).status == 0


# --------------------------------------------------------------------------------------
# Signals
# --------------------------------------------------------------------------------------


def test_sigint_asks_for_the_same_as_sigterm(toy_data, tmp_path, healthy):
    for action in ("term", "int"):
        env = small(toy_data, tmp_path / action, CHECKPOINT_EVERY=0)
        outcome = play(env, plant("at_step", step=2, actions=[action]))
        assert (outcome.status, outcome.err) == (143, "")
        assert f"interrupted: saved at step 3; RESUME=1 RUN_DIR={env['RUN_DIR']} continues" in outcome.out
        assert play(env | {"RESUME": "1"}).status == 0
        assert ending(env) == healthy


@pytest.mark.parametrize("number", [2, 7])
def test_a_signal_in_the_middle_of_a_save_is_heard_after_it(toy_data, tmp_path, healthy, number):
    env = small(toy_data, tmp_path)  # the seventh save is the last one
    outcome = play(env, plant("at_call", name="save_checkpoint", actions=["term"], number=number))
    assert outcome.status == 143 and "interrupted: saved at step" in outcome.out
    assert play(env | {"RESUME": "1"}).status == 0
    assert ending(env) == healthy


def test_a_signal_while_the_artifact_is_scored_ends_the_run_and_loses_nothing(toy_data, tmp_path, healthy):
    env = small(toy_data, tmp_path)
    assert play(env, plant("at_call", name="score_artifact", actions=["term"])).status == -signal.SIGTERM
    assert play(env | {"RESUME": "1"}).status == 0
    assert ending(env) == healthy


@pytest.mark.parametrize("actions", [["term", "term"], ["int", "term"], ["int", "int"]])
def test_a_second_signal_leaves_at_once(toy_data, tmp_path, actions):
    env = small(toy_data, tmp_path, CHECKPOINT_EVERY=0)
    outcome = play(env, plant("at_step", step=2, actions=actions))
    assert outcome.status not in (0, 2, 143)
    trace = Path(env["RUN_DIR"], "trace.jsonl").read_text().splitlines()
    assert len(trace) == 2, "the step was not finished"
    assert not list(Path(env["RUN_DIR"]).rglob("*.ckpt*"))


def test_signals_reach_the_program_from_outside(toy_data, tmp_path):
    stalled = '[["at_step", {"step": 2, "actions": ["stall"]}]]'
    env = small(toy_data, tmp_path / "stalled", CHECKPOINT_EVERY=0)
    process = start_program(["run", stalled], env, program=Path(__file__).parent / "faults.py")
    while process.stdout.readline() != "stalled\n":
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)  # waits for the end of the step, which never comes
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    outcome = finish(process, timeout=20)
    assert outcome.returncode not in (0, 2, 143)

    env = small(toy_data, tmp_path / "busy", CHECKPOINT_EVERY=0, ITERATIONS=100_000)
    process = start_program([], env)
    while not process.stdout.readline().startswith("step:3/"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    outcome = finish(process, timeout=30)
    assert (outcome.returncode, outcome.stderr) == (143, "")
    assert "RESUME=1" in outcome.stdout and len(list(Path(env["RUN_DIR"]).rglob("*.ckpt"))) == 1


# --------------------------------------------------------------------------------------
# The clock
# --------------------------------------------------------------------------------------


class Pair:
    """Two ranks in step with each other: sums of host tensors arrive when they are waited for."""

    def __init__(self) -> None:
        self.rounds: list[list] = []

    def ranks(self) -> list["Rank"]:
        return [Rank(self, rank) for rank in range(2)]


class Rank:
    size = 2

    def __init__(self, pair: Pair, rank: int) -> None:
        self.pair, self.main, self.calls = pair, rank == 0, 0

    def synchronize(self) -> None:
        pass

    def sum_later(self, t):
        if self.calls == len(self.pair.rounds):
            self.pair.rounds.append([])
        members = self.pair.rounds[self.calls]
        self.calls += 1
        members.append(t)
        return Arrival(members)


class Arrival:
    def __init__(self, members: list) -> None:
        self.members = members

    def wait(self) -> None:
        if len(self.members) == 2:
            total = self.members[0] + self.members[1]
            for t in self.members:
                t.copy_(total)
            self.members.append(None)
        assert len(self.members) == 3, "a rank is waited for that has not come"


class Alone(Rank):
    size, main = 1, True

    def __init__(self) -> None:
        pass


def jittered(seed: int):
    """Seconds of each step: up to 9 % above a pace that drifts, and jumps when layers begin to loop."""
    chance = random.Random(seed)
    pace, jump, drift = chance.uniform(0.05, 3.0), chance.uniform(1.0, 1.8), chance.uniform(-2e-4, 4e-4)
    for step in itertools.count():
        yield pace * (jump if step > 60 else 1.0) * (1 + drift) ** step * (1 + 0.09 * chance.random())


def train_by(clocks: list, times: list[list[float]], cap: float, durations, interrupt=None) -> int:
    """Step until the clocks say stop. `times` are the ranks' hands, moved here. Returns the steps taken."""
    for clock in clocks:
        clock.start()
    for step in itertools.count():
        if interrupt is not None and interrupt[0] == step:
            clocks[interrupt[1]].interrupted = True
        readings = [clock.tick(step) for clock in clocks]
        verdicts = [clock.ends_in_time() for clock in clocks]
        assert len(set(readings)) == len(set(verdicts)) == 1, "all ranks hear and decide the same"
        if not verdicts[0] or readings[0].stop:
            break
        seconds = next(durations)
        for hand in times:
            hand[0] += seconds
    for clock in clocks:
        clock.drain()
        clock.stop()
    return step


def make_clocks(ranks: int, cap: float, spent: float = 0.0, every: float = 0.0) -> tuple[list, list]:
    cfg = train_gpt.read_config({"MAX_WALLCLOCK_SECONDS": str(cap), "CHECKPOINT_EVERY": str(every)})
    worlds = [Alone()] if ranks == 1 else Pair().ranks()
    hands = [[1000.0 * rank] for rank in range(ranks)]  # ranks do not agree on what time it is
    clocks = [
        train_gpt.Clock(cfg, w, spent, now=lambda h=h: h[0]) for w, h in zip(worlds, hands, strict=True)
    ]
    return clocks, hands


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("seed", range(25))
def test_the_cap_is_never_crossed_and_little_is_left_of_it(seed, ranks):
    for run in range(8):
        cap = random.Random(100 * seed + run).uniform(40.0, 700.0)
        clocks, hands = make_clocks(ranks, cap)
        steps = train_by(clocks, hands, cap, jittered(100 * seed + run))
        assert clocks[0].spent <= cap, f"seed {seed}, run {run}"
        longest = max(clocks[0].times)
        assert steps > 5 and cap - clocks[0].spent < 3 * longest


def test_without_a_cap_the_clock_never_ends_a_run():
    for ranks in (1, 2):
        clocks, hands = make_clocks(ranks, 0)
        train_by(clocks, hands, 0, jittered(1), interrupt=(500, 0))
        assert clocks[0].spent > 25


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_to_any_one_rank_is_heard_by_all_at_the_same_step(ranks):
    for rank in range(ranks):
        clocks, hands = make_clocks(ranks, 1000.0)
        assert train_by(clocks, hands, 1000.0, itertools.repeat(1.0), (7, rank)) == 7 + (ranks - 1)


def test_a_checkpoint_is_due_by_the_clock_of_rank_0_and_for_all_ranks():
    clocks, hands = make_clocks(2, 0, every=10.0)
    saves = []
    for step in range(100):
        heard = [clock.tick(step) for clock in clocks]
        assert heard[0] == heard[1]
        saves += [step] * heard[0].save
        hands[0][0] += 3.0
        hands[1][0] += 11.0
    assert saves[:3] == [5, 9, 13] and len(saves) == 24, "every 12 seconds, heard a step later"


def test_a_pause_is_not_counted():
    clocks, hands = make_clocks(1, 100.0)
    clocks[0].start()
    hands[0][0] += 2.0
    with clocks[0].paused():
        hands[0][0] += 50.0
    hands[0][0] += 3.0
    clocks[0].stop()
    assert clocks[0].spent == pytest.approx(5.0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_does_not_cross_the_cap_either(toy_data, tmp_path, ranks):
    knobs = {"MAX_WALLCLOCK_SECONDS": 9.9, "ITERATIONS": 1000, "CHECKPOINT_EVERY": 0}
    for stop in (3, 6, 7):
        env = small(toy_data, tmp_path / str(stop), **knobs)
        slow, asked = plant("fake_clock", seconds=[1.0]), plant("at_step", step=stop, actions=["term"])
        spent = []
        for plants in ([slow, asked], [slow]):
            outcome = play(env | {"RESUME": str(len(spent))}, *plants, ranks=ranks)
            newest = max(Path(env["RUN_DIR"], "checkpoints").iterdir())
            spent.append(train_gpt.unpack_checkpoint(newest.read_bytes(), "it").meta["seconds"])
        assert outcome.statuses == [0] * ranks
        assert spent[0] <= spent[1] <= 9.9, f"stopped in step {stop}"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_real_run_stays_below_its_cap(toy_data, tmp_path, ranks):
    env = small(toy_data, tmp_path, MAX_WALLCLOCK_SECONDS=1.5, ITERATIONS=100_000, CHECKPOINT_EVERY=0)
    outcome = play(env, plant("note_times"), ranks=ranks)
    assert outcome.statuses == [0] * ranks
    assert "stopping_early: wallclock_cap" in outcome.out
    newest = max(Path(env["RUN_DIR"], "checkpoints").iterdir())
    spent = train_gpt.unpack_checkpoint(newest.read_bytes(), "it").meta["seconds"]
    steps = [after - before for before, after in itertools.pairwise(outcome.note["times"][-20:])]
    stumbled = max(steps[-ranks:]) > train_gpt.Clock.SAFETY * max(steps[:-ranks])  # the machine was busy
    assert spent <= 1.5 or stumbled
