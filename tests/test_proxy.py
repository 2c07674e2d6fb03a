"""What ships, chosen by round trips on training text that is never trained on: held-out tokens, the average
and its guard, the best snapshot, and the search of ternary grids; all of it on the training clock."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt
from conftest import write_shard
from faults import ending, plant, play, small
from test_model import config, lone, nats, scrambled
from test_resume import check_stops
from test_train import run_here, try_here
from train_gpt import (
    Average,
    Clock,
    Loader,
    Pace,
    Progress,
    Snapshot,
    Trainer,
    UserError,
    as_rows,
    choose_weights,
    export,
    grids_of,
    held_out_batches,
    load,
    packed,
    phase_at,
    read_config,
    round_trip,
    search_grids,
    settle_weights,
    tokens_held_out,
)

PROXY = {"EXPORT_PROXY_EVAL": 1}
TERNARY = {"MATRIX_CODEC": "ternary", "EMBED_CODEC": "ternary"}
SEARCH = TERNARY | {"TERNARY_THRESHOLD_SEARCH": 1, "TERNARY_SCALE_SEARCH": 1}
ALIGN = SEARCH | {"EXPORT_ALIGNED_TRAIN": 1, "EXPORT_ALIGNED_TRAIN_START_FRACTION": 0.5}


def setting(toy_data, **knobs):
    """(model with random weights, its config, a loader of training tokens)."""
    cfg = config(**toy_data.env | knobs)
    return scrambled(cfg), cfg, Loader(cfg, lone(), 1)


def trainer(toy_data, **knobs) -> Trainer:
    model, cfg, loader = setting(toy_data, **knobs)
    return Trainer(model, loader, cfg, lone(), "source")


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in [*model.named_parameters(), *model.named_buffers()]}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- tokens that are never trained on


MARK = 319  # an id that only the held-out tokens have


def marked_shards(folder: Path, held: int) -> dict:
    """Two shards of documents; the last `held` tokens are all MARK."""
    folder.mkdir()
    for i, size in enumerate((900, 1300)):
        ids = np.random.default_rng(i).integers(4, MARK, size)
        ids[::50] = 1
        if i == 1:
            ids[size - held :] = MARK
        write_shard(folder / f"fineweb_train_{i:06d}.bin", ids)
    return {"DATA_PATH": str(folder), "TRAIN_BATCH_TOKENS": 64, "TRAIN_SPANS": 2}


def trained_on(cfg) -> list[int]:
    """Ids of all tokens of three times around the shards."""
    loader = Loader(cfg, lone(), 1)
    steps = 3 * 2200 // cfg.data.batch_tokens
    found = np.concatenate([loader.spans.span(step, i) for step in range(steps) for i in range(2)])
    loader.close()
    return found.tolist()


def check_held_out(folder: Path, **knobs) -> None:
    cfg = config(**marked_shards(folder, 301) | knobs)
    loader = Loader(cfg, lone(), 1)
    loader.close()
    assert loader.held.tolist() == [MARK] * 301
    assert loader.shards.total == 2200 - 301 and loader.shards.take(1890, 20).max() < MARK
    ids = trained_on(cfg)
    assert MARK not in ids and len(ids) > 2 * 2200


@pytest.mark.parametrize("packing", [0, 1])
@pytest.mark.parametrize("knobs", [PROXY, {"HELD_OUT_TOKENS": 301}], ids=["computed", "told"])
def test_held_out_tokens_are_the_last_ones_and_never_trained_on(tmp_path, packing, knobs):
    check_held_out(tmp_path / "data", **knobs, DOC_PACKING=packing)


@pytest.mark.parametrize("packing", [0, 1])
def test_training_on_held_out_tokens_would_be_noticed(tmp_path, monkeypatch, packing):
    """Planted: the loader's shards do not end before them."""
    real = train_gpt.Shards.__init__

    def whole(shards, folder, split, vocab, held=0):
        real(shards, folder, split, vocab)
        shards.held = held

    monkeypatch.setattr(train_gpt.Shards, "__init__", whole)
    with pytest.raises(AssertionError):
        check_held_out(tmp_path / "data", **PROXY, DOC_PACKING=packing)
    without = marked_shards(tmp_path / "other", 301) | {"DOC_PACKING": packing}
    assert MARK in trained_on(config(**without))


def test_what_is_held_out_follows_from_what_is_read():
    want = {0: {}, 301: PROXY, 201: SEARCH, 2000: PROXY | {"HELD_OUT_TOKENS": 2000}}
    for count, knobs in want.items():
        assert tokens_held_out(config(**knobs)) == count
    assert tokens_held_out(config(**TERNARY, EMA_DECAY=0.9)) == 301
    assert tokens_held_out(config(**TERNARY, EMA_DECAY=0.9, EMA_GUARD=0)) == 0
    assert tokens_held_out(config(EMA_DECAY=0.9)) == 0


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        (PROXY | {"HELD_OUT_TOKENS": 200}, "HELD_OUT_TOKENS=200 is less than the 301 tokens that"),
        ({"EXPORT_ALIGNED_TRAIN": 1}, "EXPORT_ALIGNED_TRAIN=1 wants ternary weights trained as such, and"),
        (ALIGN | {"QAT_ENABLED": 0}, "EXPORT_ALIGNED_TRAIN=1 wants ternary weights trained as such"),
        ({"TERNARY_SCALE_SEARCH": 1}, "TERNARY_SCALE_SEARCH=1 want ternary weights, e.g. MATRIX_CODEC=tern"),
        ({"TERNARY_NOISE_SCALE": 0.1}, "TERNARY_NOISE_SCALE=0.1 wants ternary weights trained as such"),
        ({"TERNARY_THRESHOLD_LOW": 0.8}, "TERNARY_THRESHOLD_LOW=0.8 is above TERNARY_THRESHOLD_HIGH=0.75"),
        ({"TERNARY_SCALE_MULT_HIGH": 0.5}, "TERNARY_SCALE_MULT_LOW=0.9 is above TERNARY_SCALE_MULT_HIGH=0.5"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_line(knobs, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        config(**knobs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [40_000, 60_000])
def test_too_few_tokens_to_hold_out_are_a_line(tmp_path, toy_data, count):
    error = try_here(tmp_path, toy_data, HELD_OUT_TOKENS=count).error
    assert f"holds 40000 tokens, of which {count} are to be held out and some left for training" in error
    assert "\n" not in error


def test_ids_of_held_out_tokens_are_checked_too(tmp_path):
    shared = marked_shards(tmp_path / "data", 301)
    with pytest.raises(UserError, match="holds token id 319, beyond VOCAB_SIZE=319"):
        Loader(config(**shared, **PROXY, VOCAB_SIZE=319), lone(), 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_choosing_what_ships_opens_no_validation_shard(tmp_path, toy_data, ranks):
    env = small(toy_data, tmp_path, **ALIGN, **PROXY, EMA_DECAY=0.5)
    outcome = play(env, plant("note_opened"), ranks=ranks)
    assert outcome.statuses == [0] * ranks, outcome.errs
    opened = outcome.note["opened"]
    assert opened.index("model.ptz.tmp") < opened.index("fineweb_val_000000.bin")
    assert len(json.loads(Path(env["RUN_DIR"], "results.json").read_text())["shipped"]["nats"]) == 3


# ---- the round trip


CODECS = {
    "ternary": TERNARY, "int6": {"MATRIX_BITS": 6, "EMBED_BITS": 7}, "fp4": {"MATRIX_CODEC": "fp4"},
    "halves": {"MATRIX_BITS": 16, "EMBED_BITS": 16}, "packed": TERNARY | {"DOC_PACKING": 1},
    "looped": {"NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 1}, "longer": {"EVAL_SEQ_LEN": 48},
}  # fmt: skip


@pytest.mark.parametrize("knobs", CODECS.values(), ids=CODECS)
def test_round_trip_is_the_score_of_the_artifact_on_those_tokens(toy_data, monkeypatch, knobs):
    """Loaded from real bytes and averaged by hand: 300 targets in windows of the evaluation's length."""
    model, cfg, loader = setting(toy_data, **PROXY, **knobs)
    loaded = load(export(model, cfg).blob, cfg, lone(), "it").eval()
    width, total, count = cfg.eval_len, 0.0, 0
    for at in range(0, 300 - width + 1, width):
        window = loader.held[at : at + width + 1]
        batch = packed([window], 1, width) if cfg.data.packing else as_rows([window], width)
        ctx = train_gpt.Ctx(batch.tokens, batch.docs, width, train_gpt.final_phase(cfg))
        with torch.no_grad():
            total += float(loaded(ctx, batch.targets)[0].double().sum())
        count += width
    for coder in ("code_pool", "squeeze", "export"):
        monkeypatch.setattr(train_gpt, coder, None)  # row D08: nothing is coded
    before, state = weights_of(model), torch.get_rng_state()
    found = round_trip(model.train(), loader, 300, cfg, lone())
    assert found == pytest.approx(total / count, rel=1e-6)
    assert model.training and all(p.grad is None and not p.is_inference() for p in model.parameters())
    assert same(weights_of(model), before) and torch.equal(torch.get_rng_state(), state)
    round_trip(model.eval(), loader, 300, cfg, lone())
    assert not model.training
    loader.close()


def test_a_step_can_be_taken_after_a_round_trip(toy_data):
    """Row D06: no inference tensors."""
    t = trainer(toy_data, **PROXY)
    round_trip(t.model, t.loader, 300, t.cfg, t.world)
    figures = train_gpt.train_step(t, t.loader.batches(0), phase_at(Progress(0, 0.0), t.cfg))
    t.loader.close()
    assert figures[2] == 1


def test_windows_are_shared_by_ranks_without_overlap(toy_data):
    _, cfg, loader = setting(toy_data, **PROXY)
    for size in (1, 2, 4, 16):
        ranks = [dataclasses.replace(lone(), rank=rank, size=size) for rank in range(size)]
        batches = [b for w in ranks for b in held_out_batches(loader, 300, cfg, w)]
        rows = [tuple(row) for batch in batches for row in batch.tokens.tolist()]
        want = [tuple(loader.held[at : at + 32].tolist()) for at in range(0, 288, 32)]
        assert sorted(rows) == sorted(want)
    loader.close()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compiled_model_makes_no_graph_for_it(toy_data):
    torch._dynamo.reset()
    model, cfg, loader = setting(toy_data, **SEARCH)
    want = round_trip(model, loader, 200, cfg, lone())
    world, phase = dataclasses.replace(lone(), compiling=True), phase_at(Progress(0, 0.0), cfg)
    for block in (fast := model).blocks:
        block.compile(fullgraph=True, dynamic=False, backend="eager")  # graphs are counted, not code
    batch = as_rows([loader.held[:33]], 32)
    compiled, made = nats(fast, batch.tokens, batch.targets, phase=phase), train_gpt.graphs_made()
    assert made > 0
    assert round_trip(fast, loader, 200, cfg, world) == want
    search_grids(fast, loader, cfg, world, Pace(None, world))
    with torch.no_grad():
        for grid in grids_of(fast).values():
            grid.copy_(torch.tensor([0.5, 1.0]))
    assert torch.equal(nats(fast, batch.tokens, batch.targets, phase=phase), compiled)
    assert train_gpt.graphs_made() == made
    torch._dynamo.reset()
    loader.close()


# ---- the average


def averaged_by_hand(folder, toy_data, **knobs) -> tuple[Average, dict, list[dict]]:
    """A run's average at its end, what it began with, and the weights after each step."""
    seen, weights = {}, []
    real = train_gpt.train_step

    def watched(t, batches, phase):
        before = weights_of(t.model)
        figures = real(t, batches, phase)
        if t.clock.mark is not None:
            seen.setdefault("first", before) if phase.averages else None
            seen["average"] = t.average
            weights.append(weights_of(t.model) if phase.averages else None)
        return figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "train_step", watched)
        patch.setattr(Average, "ship", lambda self: None)
        run_here(folder, toy_data, EMA_DECAY=0.75, ITERATIONS=6, **knobs)
    return seen["average"], seen["first"], weights


def check_average(folder, toy_data, start: float, first_step: int) -> None:
    average, mean, weights = averaged_by_hand(folder, toy_data, EMA_START_FRACTION=start)
    assert [w is None for w in weights] == [step < first_step for step in range(6)]
    for after in weights[first_step:]:
        mean = {name: 0.75 * mean[name] + 0.25 * after[name] for name in mean}
    for name, found in average.mean.items():
        torch.testing.assert_close(found, mean[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("start", "first_step"), [(0, 0), (0.5, 3), (0.8, 5)])
def test_average_begins_as_the_weights_at_its_activation(tmp_path, toy_data, start, first_step):
    check_average(tmp_path, toy_data, start, first_step)


def test_an_average_of_the_first_weights_would_be_noticed(tmp_path, toy_data, monkeypatch):
    """Row H24, planted: the shadow of step 0 decays into what ships."""
    monkeypatch.setattr(Average, "begin", lambda self: None)
    check_average(tmp_path / "at once", toy_data, 0, 0)
    with pytest.raises(AssertionError, match="not close"):
        check_average(tmp_path / "late", toy_data, 0.5, 3)


def test_an_average_that_never_began_does_not_ship(tmp_path, toy_data):
    late, none = (run_here(tmp_path / str(n), toy_data, **knobs) for n, knobs in enumerate(
        [{"EMA_DECAY": 0.9, "EMA_START_FRACTION": 1}, {}]))  # fmt: skip
    assert late.results["shipped"]["weights"] == "live"
    assert [s["val_loss"] for s in late.results["scores"].values()] == [
        s["val_loss"] for s in none.results["scores"].values()
    ]


def test_activation_goes_by_the_clock(tmp_path, toy_data):
    """Row B10: of a million steps a few are taken, and the average and the search begin all the same."""
    knobs = ALIGN | {"EMA_DECAY": 0.9, "EMA_START_FRACTION": 0.4, "ITERATIONS": 10**6, "EMA_GUARD": 0}
    env = small(toy_data, tmp_path, **knobs, MAX_WALLCLOCK_SECONDS=20, CALIB_MAX_EVALS=3)
    outcome = play(env, plant("fake_clock", seconds=[1.0], trips=0.5))
    assert outcome.status == 0, outcome.err
    log = Path(env["RUN_DIR"], "train.log").read_text()
    # 20 s less 3 round trips of 0.5 s in the end: 40 % of 18.5 s is over at second 8, half of it at second 10
    assert "average:begun step:8 frac:0.432" in log
    found = re.findall(r"grid_search: weights:(\w+:\d+) evals:(\d+)", log)
    assert found == [("ema:10", "3"), ("ema:16", "3")]
    shipped = json.loads(Path(env["RUN_DIR"], "results.json").read_text())["shipped"]
    assert (shipped["origin"], shipped["search"]["weights"]) == ("ema:16", "ema:16")


def test_average_changes_places_with_the_weights_and_back_exactly(toy_data):
    """Rows D17 and D18."""
    t = trainer(toy_data, EMA_DECAY=0.9)
    t.loader.close()
    for mean in t.average.mean.values():
        mean.normal_()
    live, mean = weights_of(t.model), {name: m.clone() for name, m in t.average.mean.items()}
    with t.average.applied():
        assert same(weights_of(t.model), mean)
        with pytest.raises(AssertionError, match="already"), t.average.applied():
            pass
        with pytest.raises(AssertionError, match="already"):
            t.average.ship()
    assert same(weights_of(t.model), live) and same(t.average.mean, mean)
    with pytest.raises(RuntimeError, match="in between"), t.average.applied():
        raise RuntimeError("in between")
    assert same(weights_of(t.model), live) and not t.average.swapped


def test_published_switches_of_the_average():
    def decay(**env) -> str:
        return train_gpt.spelled(read_config(env).optim.ema_decay)

    assert decay(EMA_ENABLED="0", EMA_DECAY="0.99") == decay() == "0.0"
    assert decay(EMA_ENABLED="1") == "0.997"
    assert decay(EMA_ENABLED="1", EMA_DECAY="0.9965", EMA_EVAL_APPLY="1") == "0.9965"
    assert decay(EMA_ENABLED="1", EMA_EVAL_APPLY="0") == "0.0"
    assert decay(EMA_EVAL_APPLY="1") == "0.0" and decay(EMA_EVAL_APPLY="yes", EMA_DECAY=".5") == "0.5"
    assert train_gpt.near_misses({"EMA_ENABLED": "1", "EMA_EVAL_APPLY": "1"}) == []
    with pytest.raises(UserError, match="EMA_ENABLED='maybe' is not allowed; want 0 or 1"):
        decay(EMA_ENABLED="maybe")


# ---- which weights ship


@pytest.mark.parametrize("better", ["live", "ema"])
def test_guard_ships_the_average_only_where_it_is_better(toy_data, better):
    t = trainer(toy_data, EMA_DECAY=0.9, EMA_GUARD=1)
    t.state.averaging, t.state.step = True, 5
    with torch.no_grad():
        for name, p in t.model.named_parameters():
            worse = 3 * torch.randn_like(p)
            (p if better == "ema" else t.average.mean[name]).copy_(worse)
    sides = {"live": weights_of(t.model), "ema": {n: m.clone() for n, m in t.average.mean.items()}}
    settle_weights(t)
    assert t.shipped["weights"] == better and t.shipped["origin"] == f"{better}:5"
    assert same(weights_of(t.model), sides[better])
    assert min(t.shipped["nats"], key=t.shipped["nats"].get) == better
    assert t.shipped["nats"][better] == round_trip(t.model, t.loader, 300, t.cfg, t.world)
    t.loader.close()


def test_guard_is_on_by_itself_with_ternary_weights_alone():
    def guarded(**knobs) -> bool:
        return train_gpt.guards_average(config(EMA_DECAY=0.9, **knobs))

    assert guarded(**TERNARY) and guarded(MATRIX_CODEC="ternary") and guarded(EMA_GUARD=1)
    assert not guarded() and not guarded(**TERNARY, EMA_GUARD=0)
    assert not train_gpt.guards_average(config(**TERNARY, EMA_GUARD=1)), "there is no average"


def scripted(toy_data, values: list[float], **knobs) -> tuple[Trainer, list[dict]]:
    """A run of six steps whose round trips give these nats, and the weights in the model at each."""
    t, seen, numbers = trainer(toy_data, **PROXY | {"ITERATIONS": 6} | knobs), [], iter(values)

    def trip(model, *_):
        seen.append(weights_of(model))
        return next(numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "round_trip", trip)
        train_gpt.train(t, lambda *_: None)
        settle_weights(t)
    t.loader.close()
    assert next(numbers, None) is None, "as many round trips as numbers"
    return t, seen


def test_best_weights_of_training_ship(toy_data):
    """Round trips after steps 2, 4 and 6 and at the end; the second is the best."""
    t, seen = scripted(toy_data, [5.0, 3.0, 4.0, 4.0])
    assert same(weights_of(t.model), seen[1]) and not same(seen[1], seen[2]) and same(seen[2], seen[3])
    assert (t.shipped["weights"], t.shipped["origin"]) == ("best", "live:4")
    assert t.shipped["nats"] == {"live": 4.0, "best": 3.0}
    assert all(kept.device.type == "cpu" for kept in t.best.kept.values())


def test_best_weights_are_kept_by_the_host(monkeypatch):
    """Row D07: wherever the model is; on the device there is room for one."""
    moved, real = [], torch.Tensor.to

    def to(tensor, *where, **how):
        moved.append((where, how))
        return real(torch.zeros(tensor.shape), *where, **how)

    world = dataclasses.replace(lone(), device=torch.device("meta"))
    model = train_gpt.empty_model(config(**TERNARY), world)
    monkeypatch.setattr(torch.Tensor, "to", to)
    kept = Snapshot(model).kept
    assert (
        moved == [(("cpu",), {"copy": True})] * len(kept)
        and kept.keys() == dict(model.named_parameters()).keys()
    )
    assert {t.device.type for t in kept.values()} == {"cpu"}


def test_last_weights_ship_where_they_are_the_best(toy_data):
    t, seen = scripted(toy_data, [5.0, 4.5, 4.0, 4.0])
    assert (t.shipped["weights"], t.shipped["origin"]) == ("live", "live:6")
    assert same(weights_of(t.model), seen[3])


def test_best_weights_only_ship_when_asked(toy_data):
    t, seen = scripted(toy_data, [5.0, 3.0, 4.0, 4.0], EXPORT_PROXY_USE_BEST=0)
    assert t.best is None and t.shipped["weights"] == "live" and same(weights_of(t.model), seen[3])
    assert not [name for name in t.tensors() if name.startswith("best.")]


@pytest.mark.parametrize("cut", [math.inf, math.nan])
def test_a_round_trip_that_failed_is_never_the_best(toy_data, cut):
    t, _ = scripted(toy_data, [cut, cut, cut, 4.0])
    assert (t.shipped["weights"], t.best.origin) == ("live", "")


def test_weights_whose_round_trip_is_no_number_do_not_ship(toy_data):
    """Nothing is less than NaN, so a plain comparison would keep them."""
    t, seen = scripted(toy_data, [5.0, 3.0, math.nan, math.nan])
    assert t.shipped["weights"] == "best" and same(weights_of(t.model), seen[1])
    t, _ = scripted(toy_data, [math.nan, 4.0], EXPORT_PROXY_EVAL=0, EMA_DECAY=0.5, EMA_GUARD=1)
    assert t.shipped["weights"] == "ema" and t.shipped["nats"] == {"live": math.inf, "ema": 4.0}


@pytest.mark.parametrize(("values", "kind"), [([5.0, 3.0, 4.0, 4.0], "best"), ([5.0, 4.0, 3.0, 3.0], "ema")])
def test_exactly_one_source_ships(toy_data, values, kind):
    """Rows D15 and D16: what is weighed and kept is the average, and it ships once."""
    copies = []
    with pytest.MonkeyPatch.context() as patch:
        for source, real in ((Average, Average.ship), (Snapshot, Snapshot.ship)):
            patch.setattr(source, "ship", lambda self, real=real: copies.append(type(self)) or real(self))
        t, seen = scripted(toy_data, values, EMA_DECAY=0.5)
    assert t.shipped["weights"] == kind and copies[-1] is (Snapshot if kind == "best" else Average)
    assert len(copies) == (2 if kind == "best" else 1)
    assert same(weights_of(t.model), seen[1 if kind == "best" else 3])
    assert not same(seen[3], t.average.live) or kind == "ema"


def test_weights_and_grids_are_as_before_a_round_trip_in_training(tmp_path, toy_data):
    """Rows B09, D18 and H13: a run that weighs its weights trains as one that only holds the tokens out."""
    knobs = TERNARY | {"EMA_DECAY": 0.9, "EMA_GUARD": 0, "ITERATIONS": 5, "HELD_OUT_TOKENS": 400}
    plain, weighed = (run_here(tmp_path / str(n), toy_data, **knobs, EXPORT_PROXY_EVAL=n,
                               EXPORT_PROXY_USE_BEST=0) for n in (0, 1))  # fmt: skip
    assert plain.losses == weighed.losses and len(plain.losses) == 5
    payloads = [bytes(train_gpt.read_artifact_header(run.blob, "it")[1]) for run in (plain, weighed)]
    assert payloads[0] == payloads[1]
    assert len(weighed.lines("proxy:")) == 2 and not plain.lines("proxy:")
    assert [row["step"] for row in weighed.trace if "proxy" in row] == [1, 3]


def test_results_and_log_say_what_shipped_and_why(tmp_path, toy_data):
    run = run_here(tmp_path, toy_data, **PROXY, EMA_DECAY=0.5, EMA_GUARD=1, ITERATIONS=4)
    shipped = run.results["shipped"]
    assert {*shipped["nats"]} == {"live", "ema", "best"} and shipped["held_out_tokens"] == 301
    assert f"shipped: weights:{shipped['weights']} of:{shipped['origin']} live:" in run.lines("shipped:")[0]
    assert {"proxy", "choose"} <= {phase["name"] for phase in run.results["phases"]}
    plain = run_here(tmp_path / "plain", toy_data)
    assert plain.results["shipped"] == {
        "weights": "live", "origin": "live:3", "nats": {}, "held_out_tokens": 0,
    }  # fmt: skip


# ---- on the clock


def fake(seconds: float = 100.0, **knobs) -> tuple[Clock, list[float]]:
    now = [0.0]
    cfg = config(MAX_WALLCLOCK_SECONDS=seconds, ITERATIONS=1000, **knobs)
    clock = Clock(cfg, lone(), 0.0, lambda: now[0])
    clock.start()
    return clock, now


def test_time_aside_counts_and_is_no_step():
    clock, now = fake()
    for step in range(6):
        assert clock.tick(step).seconds == now[0]
        now[0] += 1.0
        if step % 2:
            with clock.aside():
                assert clock.heard.seconds == now[0]
                now[0] += 10.0
            assert clock.heard.seconds == now[0]
    assert now[0] == clock.elapsed() == 36
    assert list(clock.times) == [0.0] + [1.0] * 6
    assert clock.ends_in_time() and clock.left(60) == 4


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_and_round_trips_end_before_the_cap(tmp_path, toy_data, ranks):
    """Steps of 1 s, a round trip of 3 s after every second one, 20 s in all; one rank is slow in them."""
    knobs = PROXY | {"ITERATIONS": 10**6, "MAX_WALLCLOCK_SECONDS": 20, "EMA_DECAY": 0.5, "EMA_GUARD": 1}
    env = small(toy_data, tmp_path, **knobs)
    fault = plant("fake_clock", seconds=[1.0], trips=3.0, slow_rank=1)
    outcome = play(env, fault, plant("note_times"), ranks=ranks)
    assert outcome.statuses == [0] * ranks, outcome.errs
    times, trips = outcome.note["times"], outcome.note["trips"]
    assert max(times) <= 20 - 2 * 3.0, "both round trips of the end have their time"
    assert max(trips) <= 20 and len(trips) >= 3
    results = json.loads(Path(env["RUN_DIR"], "results.json").read_text())
    assert results["train_seconds"] <= 20 and len(results["shipped"]["nats"]) == 3


def test_time_for_the_end_is_measured_and_kept(tmp_path, toy_data):
    knobs = SEARCH | PROXY | {"MAX_WALLCLOCK_SECONDS": 4, "ITERATIONS": 10**6, "GPTQ_ENABLED": 1}
    run = run_here(tmp_path, toy_data, **knobs, CALIB_MAX_EVALS=6, EXPORT_PROXY_EVERY=20)
    stopped = int(re.search(r"train_time:(\d+)ms", run.lines("stopping_early")[0])[1])
    reserve = int(re.search(r"reserve:(\d+)ms", run.lines("calibration:")[0])[1])
    assert 0 < reserve < 2000 and stopped <= 4000 - reserve / 2  # all of it on fake clocks
    assert run.results["train_seconds"] <= 4
    assert run.results["shipped"]["search"]["evals"] <= 6


def test_a_cap_without_time_for_the_choice_is_refused_in_words(tmp_path, toy_data, monkeypatch):
    monkeypatch.setattr(train_gpt, "second_pass", lambda work, world: 3.0)
    run = try_here(tmp_path, toy_data, **PROXY, MAX_WALLCLOCK_SECONDS=2)
    assert run.error.startswith("MAX_WALLCLOCK_SECONDS=2.0 leaves no time to train: calibration takes 3.0 s")
    assert "lower GPTQ_CALIBRATION_BATCHES, EXPORT_PROXY_TOKENS or CALIB_MAX_SECONDS" in run.error


# ---- the search


def landscape(model, want: dict[str, tuple[float, float]]):
    """A stand-in for the round trip: squared distances of grids from where they should be, in parts of 1."""
    calls = []

    def trip(*_):
        calls.append({name: tuple(grid.tolist()) for name, grid in grids_of(model).items()})
        pairs = [pair for name in want for pair in zip(calls[-1][name], want[name], strict=True)]
        return 1.0 + sum((a - b) ** 2 for a, b in pairs)

    return trip, calls


def searched(toy_data, monkeypatch, want: dict, **knobs) -> tuple[dict, list, torch.nn.Module]:
    model, cfg, loader = setting(toy_data, **SEARCH | knobs)
    loader.close()
    trip, calls = landscape(model, want)
    monkeypatch.setattr(train_gpt, "round_trip", trip)
    return search_grids(model, loader, cfg, lone(), Pace(None, lone())), calls, model


FC = [f"blocks.{i}.mlp.fc.weight" for i in range(3)]
WIDE = {"TERNARY_THRESHOLD_STEPS": 5, "TERNARY_SCALE_MULT_STEPS": 3, "EMBED_CODEC": "int"}


def test_search_finds_threshold_and_multiplier_of_what_matters(toy_data, monkeypatch):
    want = {FC[2]: (0.65, 1.1), FC[0]: (0.35, 0.9)}
    knobs = WIDE | {"TERNARY_CALIB_TOP_N": 2, "CALIB_PREFILTER_MULT": 3}
    found, calls, model = searched(toy_data, monkeypatch, want, **knobs)
    grids = {name: [round(x, 6) for x in grid.tolist()] for name, grid in grids_of(model).items()}
    assert {name: tuple(grids[name]) for name in want} == want
    assert found["grids"] == {name: list(pair) for name, pair in want.items()}
    assert all(grid == [0.5, 1.0] for name, grid in grids.items() if name not in want)
    assert found["nats"][1] == pytest.approx(1.0) and found["nats"][0] == pytest.approx(1 + 2 * 0.0325)
    assert found["evals"] == len(calls) and not found["cut"]


def test_only_the_largest_matrices_are_tried_at_all(toy_data, monkeypatch):
    """Row D10: one round trip, one for each of top x prefilter matrices, then those of the searched."""
    for prefilter, most, tried in ((2, 12, 4), (3, 12, 6), (3, 5, 5)):
        knobs = {"CALIB_PREFILTER_MULT": prefilter, "CALIB_MAX_CANDIDATES": most, "TERNARY_CALIB_TOP_N": 2}
        _, calls, model = searched(toy_data, monkeypatch, {}, **WIDE, **knobs, CALIB_MAX_EVALS=999)
        touched = {name for call in calls for name, pair in call.items() if pair != (0.5, 1.0)}
        sizes = {name: model.get_parameter(name).numel() for name in grids_of(model)}
        assert len(touched) == tried
        assert min(sizes[n] for n in touched) >= max(sizes[n] for n in sizes if n not in touched)
        assert len(calls) <= 1 + tried + 2 * (5 + 3)


@pytest.mark.parametrize("most", [1, 2, 7, 20])
def test_search_never_takes_more_round_trips_than_told(toy_data, monkeypatch, most):
    """Row D09; and what it leaves is never worse than what it found."""
    found, calls, _ = searched(
        toy_data, monkeypatch, {FC[1]: (0.75, 0.9)}, **WIDE, CALIB_MAX_EVALS=most, CALIB_SECOND_PASS=1
    )
    assert len(calls) == found["evals"] == most and found["cut"]
    assert found["nats"][1] <= found["nats"][0]


def test_second_pass_goes_on_from_the_first(toy_data, monkeypatch):
    counts = []
    for again in (0, 1):
        found, calls, _ = searched(
            toy_data, monkeypatch, {FC[1]: (0.75, 0.9)}, **WIDE, CALIB_SECOND_PASS=again, CALIB_MAX_EVALS=999
        )
        counts.append(len(calls))
        assert found["nats"][1] == pytest.approx(1.0)
    assert counts[1] > counts[0]


def test_search_that_gains_nothing_leaves_the_plain_grid(toy_data, monkeypatch):
    want = dict.fromkeys(FC, (0.5, 1.0))
    found, _, model = searched(toy_data, monkeypatch, want, **WIDE)
    assert found["nats"] == [1.0, 1.0]
    assert all(grid.tolist() == [0.5, 1.0] for grid in grids_of(model).values())


def test_search_on_real_text_lowers_the_nats_of_the_round_trip(toy_data):
    """Row D01: and some trits change."""
    model, cfg, loader = setting(toy_data, **SEARCH, CALIB_MAX_EVALS=99, TERNARY_THRESHOLD_STEPS=4)
    before = {n: model.get_parameter(n).clone() for n in grids_of(model)}
    plain = round_trip(model, loader, 200, cfg, lone())
    found = search_grids(model, loader, cfg, lone(), Pace(None, lone()))
    assert found["nats"] == [plain, round_trip(model, loader, 200, cfg, lone())]
    assert found["nats"][1] < plain - 1e-3
    assert all(torch.equal(model.get_parameter(n), w) for n, w in before.items())
    loader.close()


def timed_search(toy_data, monkeypatch, spans: list[float], **knobs) -> tuple[dict, float, Trainer]:
    """A search at the end on a clock that each forward moves on; figures, seconds, and the trainer."""
    t, now, takes = trainer(toy_data, **SEARCH, **knobs), [0.0], iter(spans)
    t.clock = Clock(t.cfg, t.world, 0.0, lambda: now[0])
    real = train_gpt.GPT.forward

    def forward(model, ctx, targets):
        now[0] += next(takes)
        return real(model, ctx, targets)

    monkeypatch.setattr(train_gpt.GPT, "forward", forward)
    settle_weights(t)
    t.loader.close()
    return t.shipped["search"], t.clock.spent, t


def test_search_ends_before_its_seconds_are_over(toy_data, monkeypatch):
    """Row D32: six spans a round trip, 0.5 s each, 10 s: three of them are whole."""
    found, spent, _ = timed_search(toy_data, monkeypatch, [0.5] * 999, CALIB_MAX_SECONDS=10)
    assert found["cut"] and found["evals"] in (3, 4) and 9 <= spent <= 10


def test_one_slow_round_trip_is_left_and_changes_nothing(toy_data, monkeypatch):
    """Row C06: the second round trip crawls. It is given up in time and its try forgotten."""
    spans = [0.1] * 6 + [4.0] * 99
    found, spent, t = timed_search(toy_data, monkeypatch, spans, CALIB_MAX_SECONDS=10)
    assert found["cut"] and found["evals"] == 2 and spent <= 10
    assert all(grid.tolist() == [0.5, 1.0] for grid in grids_of(t.model).values())
    assert found["nats"][0] == found["nats"][1] < math.inf


def test_search_begins_nothing_for_which_there_is_no_time(toy_data, monkeypatch):
    """A round trip was measured to take 4 s in warm-up; 3 s are left."""
    monkeypatch.setattr(train_gpt, "second_pass", lambda work, world: 4.0)
    monkeypatch.setattr(train_gpt, "round_trip", None)
    t = trainer(toy_data, **SEARCH, CALIB_MAX_SECONDS=3)
    train_gpt.keep_time(t)
    monkeypatch.undo()
    settle_weights(t)
    t.loader.close()
    assert t.shipped["search"]["nats"] == [math.inf] * 2 and t.clock.spent < 1


def test_search_never_passes_the_cap_of_training(toy_data, monkeypatch):
    found, spent, _ = timed_search(
        toy_data, monkeypatch, [0.5] * 999, CALIB_MAX_SECONDS=30, MAX_WALLCLOCK_SECONDS=7
    )
    assert found["cut"] and spent <= 7


def test_search_with_no_time_at_all_ships_the_plain_grid(toy_data, monkeypatch):
    found, spent, t = timed_search(toy_data, monkeypatch, [], CALIB_MAX_SECONDS=0)
    assert found["cut"] and spent == 0 and found["nats"] == [math.inf] * 2
    assert "null" in json.dumps(train_gpt.shipped_facts(t, t.cfg))
    assert all(grid.tolist() == [0.5, 1.0] for grid in grids_of(t.model).values())


def test_without_a_search_nothing_is_searched(tmp_path, toy_data, monkeypatch):
    """Row D31."""
    monkeypatch.setattr(train_gpt, "search_grids", None)
    assert not run_here(tmp_path, toy_data, **TERNARY).lines("grid_search:")


# ---- once in training


def searches_of(folder, toy_data, **knobs) -> list[str]:
    run = run_here(folder, toy_data, **ALIGN | {"ITERATIONS": 6} | knobs)
    return [line.split()[1] for line in run.lines("grid_search:")]


def test_aligned_training_searches_once_and_again_for_weights_that_changed(tmp_path, toy_data):
    """Rows D24 and D26."""
    assert searches_of(tmp_path / "both", toy_data) == ["weights:live:3", "weights:live:6"]
    late = {"EXPORT_ALIGNED_TRAIN_START_FRACTION": 1}
    assert searches_of(tmp_path / "late", toy_data, **late) == ["weights:live:6"]


def test_search_is_not_repeated_for_the_same_weights(toy_data, monkeypatch):
    done = []
    monkeypatch.setattr(train_gpt, "search", lambda t, origin, kept: done.append(origin))
    t = trainer(toy_data, **ALIGN)
    t.state.step = 4
    for calibrated in ("live:4", "live:3", "ema:4"):
        t.state.calibrated = calibrated
        settle_weights(t)
    t.loader.close()
    assert done == ["live:4", "live:4"]


def test_weights_are_chosen_then_clipped_then_their_grids_searched(toy_data, monkeypatch):
    """SKC notes 4.1; and clipped weights are others than those that were searched in training."""
    done = []
    t = trainer(toy_data, **ALIGN, **PROXY, TERNARY_CLIP_MODE="percentile")
    t.state.calibrated = "live:0"
    for name in ("choose_weights", "clip_weights", "search"):
        real = getattr(train_gpt, name)
        monkeypatch.setattr(
            train_gpt, name, lambda *args, name=name, real=real: done.append(name) or real(*args)
        )
    settle_weights(t)
    t.loader.close()
    assert done == ["choose_weights", "clip_weights", "search"]
    assert t.shipped["origin"] == t.shipped["search"]["weights"] == "live:0:clipped"


def test_best_weights_bring_the_grids_they_had(toy_data):
    t = trainer(toy_data, **ALIGN, **PROXY)
    t.loader.close()
    for grid in grids_of(t.model).values():
        grid.fill_(0.6)
    t.best.take(-1.0, "live:2", "live:2")
    for grid in grids_of(t.model).values():
        grid.fill_(0.4)
    t.state.calibrated = "live:3"
    t.loader = Loader(t.cfg, lone(), 1)
    choose_weights(t)
    t.loader.close()
    assert all(grid.tolist() == pytest.approx([0.6, 0.6]) for grid in grids_of(t.model).values())
    assert t.state.calibrated == t.shipped["origin"] == "live:2", "so nothing is searched again"


def test_training_goes_on_through_the_grids_that_were_found(tmp_path, toy_data):
    """The losses part after the step at which the grids came in."""
    plain, aligned = (
        run_here(tmp_path / str(n), toy_data, **ALIGN | {"EXPORT_ALIGNED_TRAIN": n}, ITERATIONS=6).losses
        for n in (0, 1)
    )
    assert [a == b for a, b in zip(plain, aligned, strict=True)] == [True] * 3 + [False] * 3


# ---- ranks, and runs that were stopped


EVERYTHING = ALIGN | PROXY | {"EMA_DECAY": 0.6, "EMA_START_FRACTION": 0.3}


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_on_what_ships(tmp_path, toy_data, ranks):
    """Rows C01, C05 and H12: one rank's clock runs four times as fast in round trips, nobody waits for it."""
    envs = [small(toy_data, tmp_path / str(n), **EVERYTHING, GRAD_ACCUM_STEPS=1) for n in (1, ranks)]
    outcomes = [
        play(env, plant("note_digest"), plant("fake_clock", seconds=[1.0], trips=0.1, slow_rank=1), ranks=n)
        for env, n in zip(envs, (1, ranks), strict=True)
    ]
    assert outcomes[1].statuses == [0] * ranks, outcomes[1].errs
    assert len({note["digest"] for note in outcomes[1].notes}) == 1, "weights, grids and best snapshot too"
    results = [json.loads(Path(env["RUN_DIR"], "results.json").read_text()) for env in envs]
    one, many = (r["shipped"] for r in results)
    assert (one["weights"], one["origin"]) == (many["weights"], many["origin"])
    assert [*one["nats"].values()] == pytest.approx([*many["nats"].values()], rel=1e-4)
    assert one["search"]["evals"] == many["search"]["evals"] > 5


STOPPED = {
    "best weights": PROXY | {"MATRIX_LR": 0.3, "EXPORT_PROXY_EVERY": 1, "DOC_PACKING": 1},
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("config", STOPPED)
def test_a_stopped_run_ships_the_bytes_of_an_undisturbed_one(tmp_path, toy_data, config):
    stops = [(1, 0, "kill"), (3, 1, "term"), (5, 0, "kill")]  # before and after the average and the search
    check_stops(toy_data, tmp_path, STOPPED[config], 1, stops)


def test_two_stopped_ranks_ship_the_bytes_of_undisturbed_ones(tmp_path, toy_data):
    check_stops(toy_data, tmp_path, EVERYTHING, 2, [(3, 1, "term"), (5, 0, "kill")])


def test_a_finished_run_may_be_resumed_and_chooses_the_same(tmp_path, toy_data):
    env = small(toy_data, tmp_path, **EVERYTHING)
    assert play(env).status == 0
    first = ending(env)
    assert play(env | {"RESUME": 1}).status == 0
    assert ending(env) == first


def test_progress_of_a_schedule_knows_the_reserve():
    cfg = config(MAX_WALLCLOCK_SECONDS=100, EMA_DECAY=0.9, EMA_START_FRACTION=0.5)
    assert [phase_at(Progress(9, seconds, 20.0), cfg).averages for seconds in (39.9, 40.0)] == [False, True]


def test_every_phase_of_a_run_knows_the_reserve(tmp_path, toy_data, monkeypatch):
    """Validation sees the loops and the quantiser that training has: its clock ends where theirs does."""
    seen, real = [], train_gpt.phase_at
    monkeypatch.setattr(train_gpt, "phase_at", lambda at, cfg: seen.append(at) or real(at, cfg))
    knobs = {"GPTQ_ENABLED": 1, "GPTQ_RESERVE_SECONDS": 5, "MAX_WALLCLOCK_SECONDS": 100}
    run_here(tmp_path, toy_data, **knobs, ITERATIONS=2, VAL_LOSS_EVERY=1)
    assert len(seen) == 2 + 2 + 1 and {at.reserve for at in seen} == {5.0}
