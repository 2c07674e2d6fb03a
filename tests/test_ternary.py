"""Ternary weights in models: calibrated grids, rotation, noise, and the contract with the loaded artifact."""

import shutil

import pytest
import torch

import train_gpt
from test_model import PLAIN, config, lone, nats, scrambled, tokens_of
from train_gpt import Loader, Ternary, Trainer, export, grids_of, load, open_artifact, param_tags

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler"
)
TERNARY = {"MATRIX_CODEC": "ternary"}
CALIBRATED = TERNARY | {"TERNARY_THRESHOLD_SEARCH": 1}


def calibrated(model: torch.nn.Module) -> torch.nn.Module:
    """Grids as a search may leave them, another for each matrix."""
    for i, grid in enumerate(grids_of(model).values()):
        grid.copy_(torch.tensor([0.35 + 0.4 * (i % 5) / 4, 0.9 + 0.2 * (i % 3) / 2]))
    return model


# --------------------------------------------------------------------------------------
# Grids
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("knob", ["TERNARY_THRESHOLD_SEARCH", "TERNARY_SCALE_SEARCH"])
def test_grids_belong_to_ternary_weights_of_runs_that_calibrate(knob):
    model = scrambled(config(**TERNARY, **{knob: 1}))
    ternary = [n for n, tag in param_tags(model).items() if isinstance(tag.codec, Ternary)]
    assert [*grids_of(model)] == ternary and len(ternary) == 6 * 3
    assert all(grid.tolist() == [0.5, 1.0] for grid in grids_of(model).values())
    assert not grids_of(scrambled(config(**TERNARY)))
    assert not grids_of(scrambled(config(MATRIX_CODEC="fp4", **{knob: 1})))


def test_first_grid_changes_nothing():
    plain, grown = (scrambled(config(**knobs)) for knobs in (TERNARY, CALIBRATED))
    pair, live = (tokens_of(2, 32, plain.cfg), tokens_of(2, 32, plain.cfg, 2)), PLAIN._replace(qat=True)
    assert torch.equal(nats(plain, *pair, phase=live), nats(grown, *pair, phase=live))
    want = nats(plain, *pair, phase=live)
    assert not torch.equal(want, nats(calibrated(grown), *pair, phase=live))


def test_grids_are_in_checkpoints_and_in_no_artifact(toy_data):
    cfg = config(**toy_data.env, **CALIBRATED)
    t = Trainer(calibrated(scrambled(cfg)), Loader(cfg, lone(), 1), cfg, lone(), "source")
    t.loader.close()
    kept = {name.removeprefix("model."): v for name, v in t.tensors().items() if name.endswith(".grid")}
    assert {f"{n.removesuffix('.grid')}.weight" for n in kept} == grids_of(t.model).keys()
    before = {name: live.clone() for name, live in t.tensors().items()}
    for grid in grids_of(t.model).values():
        grid.fill_(0.7)
    t.restore(before)
    assert all(torch.equal(before[f"model.{n}"], live) for n, live in kept.items())
    held = open_artifact(export(t.model, cfg).blob, cfg, lone(), "the artifact")
    assert not any("grid" in name for name in held.tensors)
    assert not grids_of(load(export(t.model, cfg).blob, cfg, lone(), "the artifact"))


def test_artifact_and_forecast_see_the_grid(monkeypatch):
    cfg, said = config(**CALIBRATED), []
    monkeypatch.setattr(train_gpt.World, "log", lambda self, text: said.append(text))
    model = scrambled(cfg)
    for grid in grids_of(model).values():
        grid.copy_(torch.tensor([10.0, 1.0]))  # no entry is so large: nothing but zeros
    train_gpt.log_weighed_bytes(model, 0, lone())
    held = open_artifact(export(model, cfg).blob, cfg, lone(), "the artifact").tensors
    assert not any(held[name].any() for name in grids_of(model))
    for grid in grids_of(model).values():
        grid.copy_(torch.tensor([0.5, 1.0]))
    train_gpt.log_weighed_bytes(model, 0, lone())
    few, many = (int(line.split("weights:")[1].split()[0]) for line in said)
    assert few < 0.8 * many


@needs_compiler
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compiled_blocks_see_a_changed_grid_and_make_no_graph_for_it():
    torch._dynamo.reset()
    cfg = config(**CALIBRATED)
    eager, fast = calibrated(scrambled(cfg)), scrambled(cfg)
    train_gpt.make_fast(fast, train_gpt.dataclasses.replace(lone(), compiling=True))
    pair, live = (tokens_of(2, 32, cfg), tokens_of(2, 32, cfg, 2)), PLAIN._replace(qat=True)
    before = nats(fast, *pair, phase=live)
    made = train_gpt.graphs_made()
    after = nats(calibrated(fast), *pair, phase=live)
    assert train_gpt.graphs_made() == made
    want = nats(eager, *pair, phase=live)
    assert (after - want).abs().max() < 1e-5 < 1e-2 < (before - want).abs().max()
