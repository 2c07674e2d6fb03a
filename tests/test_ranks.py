"""One process or several: the same tokens, losses and decisions, and nobody waits for the dead."""

import json
import random
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import train_gpt
from conftest import ROOT, finish, make_shards, start_command, tiny_env, torchrun
from faults import ending, only_line, plant, play, processes_with, small

PROGRAM = Path(__file__).parent / "faults.py"
EIGHT = {"TRAIN_SPANS": 8, "CHECKPOINT_EVERY": 0, "ITERATIONS": 6, "VAL_MAX_TOKENS": 2000}
EIGHT |= {"MODEL_DIM": 32, "MATRIX_LR": 0.01, "SCALAR_LR": 0.01, "TIED_EMBED_LR": 0.01}
HALVES = {"MATRIX_BITS": 16, "EMBED_BITS": 16}


def losses(env: dict) -> list[float]:
    rows = [json.loads(line) for line in Path(env["RUN_DIR"], "trace.jsonl").read_text().splitlines()]
    return [float.fromhex(row["loss"]) for row in rows if "loss" in row]


def results(env: dict) -> dict:
    return json.loads(Path(env["RUN_DIR"], "results.json").read_text())


def agree(one: dict, other: dict) -> None:
    """Two finished runs have the same losses, and their artifacts the same scores."""
    assert len(losses(one)) == int(one["ITERATIONS"]) >= 5
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    scores = [results(env)["scores"] for env in (one, other)]
    near = 1e-6 if one.get("MATRIX_BITS") == "16" else 5e-6  # an integer may be rounded the other way
    for name, score in scores[0].items():
        assert score["val_loss"] == pytest.approx(scores[1][name]["val_loss"], rel=near)
        assert (score["tokens"], score["bytes"]) == (scores[1][name]["tokens"], scores[1][name]["bytes"])


RECORD = {  # the optimizer of record 1886, at the rates of this file
    "MUON_ROW_NORMALIZE": 1, "POLAR_EXPRESS_NS": 1, "MUON_WD": 0.095, "EMBED_WD": 0.085, "ADAM_WD": 0.02,
    "MUON_MOMENTUM": 0.97, "MUON_MOMENTUM_WARMUP_START": 0.92, "MUON_MOMENTUM_WARMUP_STEPS": 1500,
    "BETA2": 0.99, "GRAD_CLIP_NORM": 0.3, "EMA_DECAY": 0.9965, "WARMDOWN_FRAC": 0.75, "MIN_LR": 0.1,
    "WD_TAPER_FINAL_MULT": 0.5, "LR_WIDTH_SCALING": 1, "MATRIX_LR": 0.001,
}  # fmt: skip
VARIANTS = {
    "record": HALVES | RECORD,
    "halves": HALVES | {"EMA_DECAY": 0.9, "GRAD_CLIP_NORM": 0.3},
    "documents": {"DOC_PACKING": 1, "SLIDING_WINDOW_ENABLED": 1, "SCORE": "sliding", "VAL_MAX_TOKENS": 500},
    "ternary experts": {
        "MOE_ENABLED": 1, "MATRIX_CODEC": "ternary", "MUON_WD": 0.1, "MOE_START_FRACTION": 0.5,
        "MOE_ROUTER_AUX_LOSS_COEF": 0.01, "NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 1,
        "EMA_DECAY": 0.9,
    },
}


@pytest.fixture(scope="module", params=VARIANTS)
def alone(request, toy_data, tmp_path_factory):
    """(knobs, environment) of a run of one process."""
    knobs = EIGHT | VARIANTS[request.param]
    env = small(toy_data, tmp_path_factory.mktemp("alone"), **knobs, GRAD_ACCUM_STEPS=1)
    assert play(env).status == 0
    return knobs, env


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_with_one_process(toy_data, tmp_path, alone, ranks):
    knobs, reference = alone
    for accum in (0, 1):
        env = small(toy_data, tmp_path / str(accum), **knobs, GRAD_ACCUM_STEPS=accum)
        outcome = play(env, plant("note_digest"), ranks=ranks)
        assert outcome.statuses == [0] * ranks, outcome.errs
        agree(reference, env)
        assert len({note["digest"] for note in outcome.notes}) == 1, "all ranks hold the same bits"
        assert results(env)["world_size"] == ranks


@pytest.mark.parametrize("accum", [2, 4, 8])
def test_micro_batches_agree_with_one_batch(toy_data, tmp_path, alone, accum):
    knobs, reference = alone
    env = small(toy_data, tmp_path, **knobs, GRAD_ACCUM_STEPS=accum)
    assert play(env).status == 0
    agree(reference, env)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_give_the_same_nats_to_every_target(tmp_path, alone, ranks):
    knobs, reference = alone
    again = reference | {"RUN_DIR": str(tmp_path / "run"), "NLL_PATH": str(tmp_path / "nll.npy")}
    again |= {"EVAL_ONLY": "1", "ARTIFACT": str(Path(reference["RUN_DIR"], "model.ptz"))}
    assert play(again, ranks=ranks).statuses == [0] * ranks
    nats = [np.load(env["NLL_PATH"]) for env in (reference, again)]
    assert nats[0].shape == nats[1].shape == (knobs["VAL_MAX_TOKENS"],) and nats[1].dtype == np.float32
    np.testing.assert_allclose(nats[0], nats[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.full)])
def test_torchrun_agrees_with_one_process(toy_data, tmp_path, ranks):
    knobs = EIGHT | HALVES | {"GRAD_ACCUM_STEPS": 1}
    envs = [small(toy_data, tmp_path / name, **knobs) for name in ("one", "many")]
    assert play(envs[0]).status == 0
    outcome = torchrun(ranks, envs[1], timeout=90)
    assert outcome.returncode == 0, outcome.stderr
    agree(*envs)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_agree_over_100_steps(toy_data, tmp_path, ranks):
    knobs = EIGHT | {"ITERATIONS": 100, "MATRIX_LR": 0.003, "SCALAR_LR": 0.003, "TIED_EMBED_LR": 0.003}
    envs = [small(toy_data, tmp_path / str(n), **knobs, GRAD_ACCUM_STEPS=1) for n in (1, ranks)]
    for env, n in zip(envs, (1, ranks), strict=True):
        assert play(env, ranks=n).statuses == [0] * n
    assert losses(envs[0]) == pytest.approx(losses(envs[1]), rel=1e-5)


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.full)])
def test_the_order_of_tokens_does_not_depend_on_ranks_micro_batches_or_resuming(tmp_path, count):
    make_shards(tmp_path / "data", train=(2100, 900, 3000))
    chance, spans, cpu = random.Random(0), {}, train_gpt.torch.device("cpu")
    knobs = {"DATA_PATH": str(tmp_path / "data"), "TRAIN_BATCH_TOKENS": "256", "TRAIN_SEQ_LEN": "32"}
    knobs |= {"EVAL_STRIDE": "8"}
    for _ in range(count):
        size, packing, step = chance.choice([1, 2, 4, 8]), chance.randrange(2), chance.randrange(60)
        accum = chance.choice([count for count in (1, 2, 4, 8) if count * size <= 8])
        shape = {"GRAD_ACCUM_STEPS": str(accum), "DOC_PACKING": str(packing)}
        cfg = train_gpt.read_config(knobs | shape)
        rows = {}
        for rank in range(size):
            world = train_gpt.World(rank, size, cpu, None, False, train_gpt.Journal(None), Path())
            loader = train_gpt.Loader(cfg, world, 1)  # made anew, as after resuming
            for m, batch in enumerate(loader.host_batches(step)):
                rows[m, rank] = [batch.tokens.flatten().numpy(), batch.targets.flatten().numpy()]
            loader.close()
        whole = np.concatenate([np.stack(rows[key]) for key in sorted(rows)], 1)
        spans.setdefault((packing, step), whole)
        np.testing.assert_array_equal(whole, spans[packing, step])


# --------------------------------------------------------------------------------------
# Gradients and decisions
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_of_ranks_with_different_data_become_their_mean(ranks):
    """Of matrices that ranks share, of an embedding that travels alone, of tensors that travel together."""
    env = tiny_env(VOCAB_SIZE=2048, NUM_LAYERS=2)
    outcome = play(env, ranks=ranks, call="reduce_different_gradients")
    assert outcome.statuses == [0] * ranks, outcome.errs
    mean, notes = (ranks + 1) / 2, outcome.notes
    want = {name: (i + 1) * mean * (name != "skip_weights") for i, name in enumerate(notes[0]["grads"])}
    sizes = {name: size for name, (_, _, size) in notes[0]["grads"].items()}
    assert len(want) > 10 and sizes["embed.weight"] > train_gpt.LARGE_TENSOR
    for note in notes:
        assert {name: [low, high] for name, (low, high, _) in note["grads"].items()} == {
            name: [value, value] for name, value in want.items()
        }
        assert note["loss"] == pytest.approx((ranks - 1) / 2)
        whole = sum(sizes[name] * value**2 for name, value in want.items()) ** 0.5
        assert note["norm"] == pytest.approx(whole) and note["norm"] == notes[0]["norm"]


def test_ranks_clip_their_own_gradients():
    """Of norms N and 2 N, clipped at 1.2 N, the mean has 1.1 N; clipped afterwards it would have 1.2 N."""
    def norm(**knobs) -> float:
        outcome = play(tiny_env(**knobs), ranks=2, call="reduce_different_gradients")
        assert outcome.statuses == [0, 0], outcome.errs
        return outcome.note["norm"]

    first = norm() / 1.5
    assert norm(GRAD_CLIP_NORM=1.2 * first, GRAD_CLIP_LOCAL=1) == pytest.approx(1.1 * first)
    assert norm(GRAD_CLIP_NORM=1.2 * first) == pytest.approx(1.5 * first), "clipped after it is reported"


SHARED = {  # matrices of a shape: 10, 10, 5, 5; then fewer than ranks; then in the dtype in which they travel
    "ten and five": {"NUM_LAYERS": 5},
    "two and one": {"NUM_LAYERS": 1, "TIE_EMBEDDINGS": 0},
    "bfloat16": {"NUM_LAYERS": 3, "DTYPE": "bfloat16"},
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", SHARED)
def test_ranks_that_share_the_matrices_move_them_as_one_does(tmp_path, case, ranks):
    """And all the same, momentum included; a step that must not happen and a restored one leave no trace.

    In bfloat16 gradients are rounded before they are averaged, and five iterations make more of that.
    """
    env, ends = tiny_env(**(RECORD | {"MODEL_DIM": 16} | SHARED[case])), {}
    for size in (1, ranks):
        out = tmp_path / str(size)
        out.mkdir()
        outcome = play(env | {"OUT": str(out)}, ranks=size, call="step_by_shares")
        assert outcome.statuses == [0] * size, outcome.errs
        assert all(note["kept"] for note in outcome.notes)
        assert len({digest for note in outcome.notes for digest in note["ends"]}) == 1
        ends[size] = [dict(np.load(path)) for path in sorted(out.iterdir())]
    assert len(ends[ranks]) == ranks
    for name, want in ends[1][0].items():
        off = np.abs(ends[ranks][-1][name] - want).max(initial=0)
        assert off <= (0.1 if case == "bfloat16" else 1e-5) * np.abs(want).max(initial=0), name


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.full)])
def test_warm_up_leaves_no_momentum_behind_on_any_rank(toy_data, tmp_path, ranks):
    """It is in no `state_dict`, and the published record forgets to put it back under torchrun."""
    knobs = EIGHT | RECORD | {"GRAD_ACCUM_STEPS": 1}
    cold, warm = (small(toy_data, tmp_path / str(n), **knobs, WARMUP_STEPS=n) for n in (0, 2))
    for env in (cold, warm):
        assert play(env, ranks=ranks).statuses == [0] * ranks
    assert losses(cold) == losses(warm)


KINDS = ["activations", "loss", "gradient", "infinity", "opposite"]


@pytest.mark.parametrize(("ranks", "kinds"), [(1, KINDS[:4]), (2, KINDS), (4, KINDS)])
def test_steps_that_are_not_finite_are_skipped_alike_by_all_ranks(toy_data, tmp_path, ranks, kinds):
    chance = random.Random(ranks)
    steps = {step for step in range(40) if chance.random() < 0.55}
    rows = [[step, 0 if kind == "opposite" else chance.randrange(ranks), kind]
            for step, kind in zip(sorted(steps), kinds * 40, strict=False)]  # fmt: skip
    knobs = {"ITERATIONS": 40, "MAX_BAD_STEPS": 99, "CHECKPOINT_EVERY": 0, "EMA_DECAY": 0.9}
    env = small(toy_data, tmp_path, **knobs, GRAD_CLIP_NORM=0.5, GRAD_ACCUM_STEPS=1, WARMUP_STEPS=1)
    outcome = play(env, plant("poison", rows=rows), plant("note_digest"), ranks=ranks)
    assert outcome.statuses == [0] * ranks, outcome.errs
    for note in outcome.notes:  # good and moved, or bad and as it was: weights, moments, average
        assert note["steps"] == [[step not in steps, step in steps] for step in range(40)]
    assert len({note["digest"] for note in outcome.notes}) == 1
    assert results(env)["skipped_steps"] == len(steps) >= 15
    trace = [json.loads(line) for line in Path(env["RUN_DIR"], "trace.jsonl").read_text().splitlines()]
    assert [row["step"] for row in trace if row.get("ok") == 0] == sorted(steps)
    assert outcome.out.count("skipped: loss") == len(steps)


@pytest.mark.parametrize("ranks", [1, 2])
def test_too_many_bad_steps_stop_the_run_in_words(toy_data, tmp_path, ranks):
    rows = [[step, ranks - 1, "loss"] for step in (1, 2, 4)]
    env = small(toy_data, tmp_path, ITERATIONS=9, MAX_BAD_STEPS=3)
    outcome = play(env, plant("poison", rows=rows), ranks=ranks)
    assert outcome.statuses == [2] * ranks
    for err in outcome.errs:
        assert "3 steps were not finite (MAX_BAD_STEPS=3)" in only_line(err)
    assert len(losses(env)) == 5 and not Path(env["RUN_DIR"], "model.ptz").exists()


def test_bad_steps_before_a_stop_are_remembered_after_it(toy_data, tmp_path):
    env = small(toy_data, tmp_path, MAX_BAD_STEPS=3)
    bad = plant("poison", rows=[[step, 0, "loss"] for step in (0, 1, 4)])
    assert play(env, bad, plant("at_step", step=2, actions=["term"])).status == 143
    outcome = play(env | {"RESUME": "1"}, bad)
    assert outcome.status == 2 and "3 steps were not finite" in only_line(outcome.err)


@pytest.mark.parametrize("size", [3, 8, 16])
def test_a_number_of_ranks_that_does_not_divide_the_spans_is_refused(toy_data, tmp_path, size):
    env = small(toy_data, tmp_path, GRAD_ACCUM_STEPS=0)
    outcome = play(env | {"RANK": "0", "WORLD_SIZE": str(size)})
    assert outcome.status == 2
    line = only_line(outcome.err)
    assert f"WORLD_SIZE={size}" in line and "does not divide the 4 spans" in line and "TRAIN_SPANS" in line
    assert not Path(env["RUN_DIR"]).exists()


def test_each_rank_tells_who_complains(toy_data, tmp_path):
    env = small(toy_data, tmp_path, VOCAB_SIZE=400)
    outcome = play(env, ranks=2)
    assert outcome.statuses == [2, 2]
    assert only_line(outcome.errs[0]).startswith("error: VOCAB_SIZE=400")
    assert only_line(outcome.errs[1]).startswith("error (rank 1): VOCAB_SIZE=400")


# --------------------------------------------------------------------------------------
# Ranks that fail
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["kill", "raise", "complain"])
def test_a_rank_that_fails_ends_the_others_in_seconds(toy_data, tmp_path, action):
    env = small(toy_data, tmp_path, ITERATIONS=50)
    outcome = play(env, plant("at_step", step=3, actions=[action], rank=1), ranks=2)
    assert outcome.statuses[1] == {"kill": -9, "raise": 1, "complain": 2}[action]
    assert outcome.statuses[0] not in (0, -9), "it ends by itself, before it is killed"
    assert outcome.seconds < 10


@pytest.mark.parametrize("action", ["kill", pytest.param("raise", marks=pytest.mark.full)])
def test_torchrun_ends_within_a_minute_of_a_failure_and_leaves_no_process(toy_data, tmp_path, action):
    env, begin = small(toy_data, tmp_path, ITERATIONS=100_000), time.monotonic()
    fault = json.dumps([plant("at_step", step=3, actions=[action], rank=1)])
    outcome = torchrun(2, env, ["run", fault], timeout=60, program=PROGRAM)
    assert outcome.returncode != 0 and time.monotonic() - begin < 60
    assert processes_with(env["RUN_DIR"]) == []


def test_sigterm_to_torchrun_saves_on_all_ranks_and_the_run_goes_on(toy_data, tmp_path):
    env = small(toy_data, tmp_path, CHECKPOINT_EVERY=0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    fault = json.dumps([plant("at_step", step=3, actions=["slow"])])  # time enough to be interrupted in
    process = start_command([*command, str(PROGRAM), "run", fault], env, ROOT)
    while not process.stdout.readline().startswith("step:3/"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)  # as a machine does that is about to be taken away
    outcome = finish(process, timeout=60)
    assert outcome.returncode != 0 and "interrupted: saved at step" in outcome.stdout
    assert processes_with(env["RUN_DIR"]) == []
    assert len(list(Path(env["RUN_DIR"], "checkpoints").iterdir())) == 1
    other = small(toy_data, tmp_path / "undisturbed", CHECKPOINT_EVERY=0)
    assert play(env | {"RESUME": "1"}, ranks=2).statuses == play(other, ranks=2).statuses == [0, 0]
    assert ending(env) == ending(other)


@pytest.mark.full
@pytest.mark.parametrize("action", ["stop", "stall"])
def test_a_rank_that_stands_still_ends_the_job_by_the_time_limit_of_collectives(toy_data, tmp_path, action):
    env, begin = small(toy_data, tmp_path, ITERATIONS=100_000, DIST_TIMEOUT=8), time.monotonic()
    fault = json.dumps([plant("at_step", step=3, actions=[action], rank=1)])
    outcome = torchrun(2, env, ["run", fault], timeout=75, program=PROGRAM)
    assert outcome.returncode != 0 and time.monotonic() - begin < 75
    assert "no progress for" in outcome.stderr and "in phase 'train'" in outcome.stderr
    assert processes_with(env["RUN_DIR"]) == []


def test_time_limit_of_collectives_is_the_knobs(monkeypatch):
    given = []

    def join(backend, timeout):
        given.append((backend, timeout.total_seconds()))
        raise InterruptedError

    monkeypatch.setattr(train_gpt.dist, "init_process_group", join)
    for knobs, seconds in (({"DIST_TIMEOUT": 17}, 17.0), ({}, train_gpt.Config().compute.dist_timeout)):
        with pytest.raises(InterruptedError):
            train_gpt.open_world(train_gpt.read_config(tiny_env(**knobs)), {"RANK": "1", "WORLD_SIZE": "2"})
        assert given.pop() == ("gloo", seconds)


def test_a_slow_rank_is_waited_for(toy_data, tmp_path):
    env = small(toy_data, tmp_path, ITERATIONS=5, DIST_TIMEOUT=30)
    outcome = play(env, plant("at_step", step=2, actions=["slow"], rank=1), ranks=2)
    assert outcome.statuses == [0, 0] and outcome.seconds > 2
    assert results(env)["train_seconds"] > 2


def test_the_watchdog_names_the_rank_and_the_phase_that_stands_still(toy_data, tmp_path):
    env = small(toy_data, tmp_path, ITERATIONS=3, DIST_TIMEOUT=2)
    outcome = play(env, plant("at_step", step=1, actions=["slow"]))
    assert outcome.status == 0
    assert re.search(r"^rank 0: no progress for \d s in phase 'train'$", outcome.err, re.MULTILINE)
