"""Checkpoints: what is loaded is what was saved, damage is never loaded, and one of them is always whole."""

import math
import pickle
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from conftest import tiny_env
from faults import Outcome, ending, only_line, plant, play, small, tree
from train_gpt import Checkpoint, UserError, load_checkpoint, save_checkpoint


def checkpoint(step: int) -> Checkpoint:
    tensors = {"weight": torch.full((40,), float(step)), "count": torch.tensor(step), "none": torch.empty(0)}
    return Checkpoint({"step": step, "seconds": step / 7, "rng": ["00ff"]}, tensors)


def written(folder: Path, *steps: int) -> list[Path]:
    """Checkpoints under their names, as if they had been saved; oldest first."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"step_{step:09d}.ckpt" for step in steps]
    for path, step in zip(paths, steps, strict=True):
        path.write_bytes(train_gpt.pack_checkpoint(checkpoint(step)))
    return paths


def quiet(_: str) -> None:
    pass


def bits(t: torch.Tensor) -> bytes:
    return t.contiguous().flatten().view(torch.uint8).numpy().tobytes()


# --------------------------------------------------------------------------------------
# What is loaded is what was saved
# --------------------------------------------------------------------------------------

DTYPES = list(train_gpt.CHECKPOINT_DTYPES.values())
SPECS = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3))


@given(st.dictionaries(st.text(min_size=1, max_size=8), SPECS, max_size=5), st.integers(0, 2**31 - 1))
def test_every_dtype_and_shape_comes_back_bit_for_bit(specs, seed):
    source, tensors = torch.Generator().manual_seed(seed), {}
    for name, (dtype, shape) in specs.items():
        size = math.prod(shape) * dtype.itemsize
        raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=source).view(dtype).view(shape)
        tensors[name] = raw.mT if len(shape) > 1 else raw  # strides are no part of a value
    meta = {"step": 3, "seconds": 0.1 + 0.2, "name": "é"}
    back = train_gpt.unpack_checkpoint(train_gpt.pack_checkpoint(Checkpoint(meta, tensors)), "it")
    assert back.meta == meta and list(back.tensors) == list(tensors)
    for name, t in tensors.items():
        found = back.tensors[name]
        assert (found.dtype, found.shape, bits(found)) == (t.dtype, t.shape, bits(t))


def test_a_training_state_comes_back_bit_for_bit(toy_data):
    cfg = train_gpt.read_config(tiny_env(**toy_data.env, EMA_DECAY=0.9))
    cpu = torch.device("cpu")
    world = train_gpt.World(0, 1, cpu, torch.float32, False, train_gpt.Journal(None), Path())
    model, loader = train_gpt.make_model(cfg, world), train_gpt.Loader(cfg, world, 1)
    t = train_gpt.Trainer(model, loader, cfg, world, "")
    train_gpt.train_step(t, loader.batches(0), train_gpt.Phase(1.0, 0.9, 0, False))
    loader.close()
    before = {name: bits(v) for name, v in t.tensors().items()}
    kinds = {tuple(name.split(".")[: 2 if name.startswith("optimizer") else 1]) for name in before}
    optimizers = {("optimizer", kind) for kind in ("muon", "embed", "scalar")}
    assert kinds == {("model",), ("average",), *optimizers}
    blob = train_gpt.pack_checkpoint(Checkpoint({}, t.tensors()))
    for live in t.tensors().values():
        live.fill_(7)
    t.restore(train_gpt.unpack_checkpoint(blob, "it").tensors)
    assert {name: bits(v) for name, v in t.tensors().items()} == before


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    (tmp_path / "step_000000001.ckpt").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "step_000000002.ckpt").write_bytes(train_gpt.CHECKPOINT_MAGIC + pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        load_checkpoint(tmp_path, quiet)
    assert not (tmp_path / "exploded").exists()


JUNK = ["", "no JSON", "null", "[]", "{}", '{"meta": {}}', '{"tensors": []}', "[" * 100_000]
JUNK += [f'{{"meta": {{}}, "tensors": {rows}}}' for rows in (1, "[1]", '[["w"]]', '[["w", "int128", [1]]]')]
JUNK += ['{"meta": {}, "tensors": [["w", "float32", [9]]]}', '{"meta": {}, "tensors": [["w", "float32", 1]]}']


@pytest.mark.parametrize("header", JUNK, ids=range(len(JUNK)))
def test_a_checkpoint_made_by_another_hand_is_as_good_as_torn(tmp_path, header):
    _, newest = written(tmp_path, 7, 9)
    magic, version = train_gpt.CHECKPOINT_MAGIC, train_gpt.CHECKPOINT_VERSION
    newest.write_bytes(train_gpt.pack_container(magic, version, header.encode(), b"four"))
    assert load_checkpoint(tmp_path, quiet).meta["step"] == 7


def test_where_none_was_written_there_is_none(tmp_path):
    assert load_checkpoint(tmp_path / "absent", quiet) is None
    (tmp_path / "step_000000001.ckpt.tmp").write_bytes(b"half")
    assert load_checkpoint(tmp_path, quiet) is None


# --------------------------------------------------------------------------------------
# Damage is never loaded
# --------------------------------------------------------------------------------------


def damaged(blob: bytes, seed: int) -> list[bytes]:
    """The same bytes cut short, and with one bit turned."""
    chance = random.Random(seed)
    flipped = bytearray(blob)
    flipped[chance.randrange(len(blob))] ^= 1 << chance.randrange(8)
    return [blob[: chance.randrange(len(blob))], bytes(flipped)]


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.full)])
def test_a_torn_or_flipped_checkpoint_is_never_loaded(tmp_path, count):
    _, newest = written(tmp_path, 7, 9)
    whole = newest.read_bytes()
    for blob in (bad for seed in range(count) for bad in damaged(whole, seed)):
        newest.write_bytes(blob)
        said = []
        found = load_checkpoint(tmp_path, said.append)
        assert found is not None and found.meta["step"] == 7, "the one before is used"
        assert len(said) == 1 and "checkpoint_unreadable" in said[0] and str(newest) in said[0]
        for path in tmp_path.iterdir():  # whatever has become of the torn one
            path.unlink()
        written(tmp_path, 7, 9)


def test_where_all_are_damaged_the_run_stops_and_nothing_is_cleared_away(tmp_path):
    before, newest = written(tmp_path, 7, 9)
    whole = newest.read_bytes()
    for one, other in (damaged(whole, seed) for seed in range(50)):
        before.write_bytes(one)
        newest.write_bytes(other)
        with pytest.raises(UserError, match=r"none of the 2 checkpoints .* can be read; restore one"):
            load_checkpoint(tmp_path, quiet)
        assert (before.read_bytes(), newest.read_bytes()) == (one, other)


def test_every_length_and_every_bit_of_the_header_is_checked():
    blob = train_gpt.pack_checkpoint(Checkpoint({"step": 1}, {"w": torch.ones(2)}))
    bad = [blob[:length] for length in range(len(blob))] + [blob + b"\0"]
    for i, byte in enumerate(blob):
        bad += [blob[:i] + bytes([byte ^ 1 << bit]) + blob[i + 1 :] for bit in range(8)]
    for other in bad:
        with pytest.raises(UserError, match=r"^it (is|has)"):
            train_gpt.unpack_checkpoint(other, "it")
    with pytest.raises(UserError, match="format version 2, this program reads 1"):
        train_gpt.unpack_checkpoint(blob[:4] + b"\2" + blob[5:], "it")


@pytest.fixture(scope="module")
def killed(toy_data, tmp_path_factory) -> dict:
    """The environment of a run that was killed in step 4, with checkpoints of steps 3 and 4."""
    env = small(toy_data, tmp_path_factory.mktemp("killed"))
    assert play(env, plant("at_step", step=4, actions=["kill"])).status == -9
    return env


def copied(env: dict, folder: Path) -> dict:
    shutil.copytree(env["RUN_DIR"], folder / "run")
    return env | {"RUN_DIR": str(folder / "run"), "NLL_PATH": str(folder / "nll.npy"), "RESUME": "1"}


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_a_run_with_a_torn_newest_checkpoint_goes_on_from_the_one_before(killed, tmp_path):
    whole, torn = copied(killed, tmp_path / "whole"), copied(killed, tmp_path / "torn")
    _, fourth = sorted(Path(torn["RUN_DIR"], "checkpoints").iterdir())
    tear(fourth)
    outcome = play(torn)
    assert outcome.status == 0 and "resumed:1 step:3 " in outcome.out
    assert f"checkpoint_unreadable: {fourth} is truncated or damaged" in outcome.out
    assert play(whole).status == 0
    assert ending(torn) == ending(whole)


def test_a_run_without_a_readable_checkpoint_stops_and_touches_nothing(killed, tmp_path):
    env = copied(killed, tmp_path)
    folder = Path(env["RUN_DIR"])
    for path in (folder / "checkpoints").iterdir():
        tear(path)
    before = tree(folder)
    outcome = play(env)
    assert outcome.status == 2 and "resumed" not in outcome.out and "step:1/" not in outcome.out
    assert "none of the 2 checkpoints" in only_line(outcome.err)
    assert tree(folder) | {"train.log": ""} == before | {"train.log": ""}
    refused = play(env | {"RESUME": 0})
    assert refused.status == 2 and "already holds a run" in only_line(refused.err)


def test_a_checkpoint_that_the_disk_cannot_read_is_as_good_as_torn(killed, tmp_path):
    env = copied(killed, tmp_path)
    outcome = play(env, plant("refuse_reading", code="EIO", only="step_000000004"))
    assert outcome.status == 0, outcome.err
    assert "checkpoint_unreadable" in outcome.out and "resumed:1 step:3 " in outcome.out


def test_all_ranks_stop_alike_where_no_checkpoint_can_be_read(killed, tmp_path):
    env = copied(killed, tmp_path)
    for path in Path(env["RUN_DIR"], "checkpoints").iterdir():
        tear(path)
    outcome = play(env, ranks=2)
    assert outcome.statuses == [2, 2]
    assert all("none of the 2 checkpoints" in only_line(err) for err in outcome.errs)


# --------------------------------------------------------------------------------------
# One of them is always whole
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cycles", [200, pytest.param(1000, marks=pytest.mark.full)])
def test_there_is_always_one_whole_checkpoint_and_never_more_than_three_files(tmp_path, cycles):
    checkpoints, heard = tmp_path / "checkpoints", []
    save_checkpoint(checkpoints, checkpoint(0))
    env = {"FOLDER": checkpoints}
    watch = threading.Thread(target=lambda: heard.append(play(env, call="poll_checkpoints")))
    watch.start()  # another process, which loads the newest again and again
    try:
        for step in range(1, cycles):
            save_checkpoint(checkpoints, checkpoint(step))
            names = sorted(p.name for p in checkpoints.iterdir())
            assert names == [f"step_{s:09d}.ckpt" for s in (step - 1, step)]
    finally:
        (checkpoints / "done").touch()
        watch.join()
    outcome: Outcome = heard[0]
    assert outcome.status == 0, outcome.err
    assert outcome.note["failures"] == [] and not outcome.note["backwards"]
    assert outcome.note["most"] == 3 and outcome.note["loads"] > 5


@pytest.mark.parametrize("cut", [1, 2])
def test_torn_checkpoints_do_not_push_out_whole_ones(tmp_path, cut):
    paths = written(tmp_path, 5, 8, 9)  # three lie there after a kill between rename and prune
    for path in paths[-cut:]:
        tear(path)
    found = load_checkpoint(tmp_path, quiet)
    assert found.meta["step"] == {1: 8, 2: 5}[cut]
    for step in (10, 20):
        save_checkpoint(tmp_path, checkpoint(step))
        assert load_checkpoint(tmp_path, quiet).meta["step"] == step, "what was just saved can be loaded"
        tear(max(tmp_path.glob("step_*.ckpt")))
        assert load_checkpoint(tmp_path, quiet) is not None, "and behind it stands another"
        save_checkpoint(tmp_path, checkpoint(step))


def test_a_save_that_does_not_read_back_is_an_error_and_the_one_before_still_loads(toy_data, tmp_path):
    env = small(toy_data, tmp_path)
    outcome = play(env, plant("decay_after_writing", only="step_000000002"))
    assert outcome.status == 2
    assert "step_000000002.ckpt does not read back as it was written" in only_line(outcome.err)
    assert load_checkpoint(Path(env["RUN_DIR"], "checkpoints"), quiet).meta["step"] == 1


def test_a_new_run_does_not_write_among_the_checkpoints_of_another(toy_data, tmp_path):
    env = small(toy_data, tmp_path)
    paths = written(Path(env["RUN_DIR"], "checkpoints"), 100, 200)  # train.log was tidied away
    before = tree(Path(env["RUN_DIR"]))
    outcome = play(env)
    assert outcome.status == 2 and "already holds a run" in only_line(outcome.err)
    assert tree(Path(env["RUN_DIR"])) == before and all(p.exists() for p in paths)
