"""Evaluate: every target exactly once, by what came before it, whatever goes together in a forward."""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import make_shards
from test_model import config, lone, nats, scrambled
from test_train import Run, run_here
from train_gpt import (
    GPT,
    Config,
    Ctx,
    Score,
    Tokenizer,
    Validation,
    evaluate,
    final_phase,
    packed,
    rows_per_forward,
    sample_text,
    window_edges,
    write_nats,
)

BOS, TARGETS = 1, 333


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """333 targets in short documents."""
    folder = tmp_path_factory.mktemp("data")
    make_shards(folder, train=(600,), val=(200, TARGETS + 1 - 200), mean_length=25)
    return folder


def spelled(vocab: int = 320) -> Tokenizer:
    """A tokenizer in name: token i has i % 5 bytes, every seventh begins with a space."""
    ids = np.arange(vocab)
    return Tokenizer(BOS, np.where(ids < 4, 0, ids % 5), (ids > 3) & (ids % 7 == 0), ids < 4, 0, str)


def opened(folder, **knobs) -> tuple[Config, Validation, GPT]:
    """(configuration, its validation split, a model with weights that all matter)."""
    cfg = config(DATA_PATH=folder, **knobs)
    return cfg, Validation(cfg, spelled()), scrambled(cfg)


# --------------------------------------------------------------------------------------
# Windows
# --------------------------------------------------------------------------------------


@settings(max_examples=400)
@given(targets=st.integers(1, 500), length=st.integers(1, 80), stride=st.integers(1, 80))
def test_windows_score_every_target_once_in_order(targets, length, stride):
    stride = min(stride, length)
    firsts, stops = window_edges(targets, length, stride)
    scored = [i for a, b in zip(firsts, stops, strict=True) for i in range(a, b)]
    assert scored == list(range(targets))
    width = min(length, targets)
    assert (stops >= width).all()  # every window can read `width` tokens before its stop
    assert (stops - firsts <= width).all()
    assert (stops - firsts)[1:].max(initial=0) <= stride
    assert len(stops) == 1 + max(0, math.ceil((targets - length) / stride))


def test_windows_by_hand():
    firsts, stops = window_edges(20, 8, 3)
    assert list(zip(firsts, stops, strict=True)) == [(0, 8), (8, 11), (11, 14), (14, 17), (17, 20)]
    firsts, stops = window_edges(20, 8, 8)
    assert list(zip(firsts, stops, strict=True)) == [(0, 8), (8, 16), (16, 20)]


def test_rows_of_a_forward_share_its_tokens_with_ranks_and_micro_batches():
    cfg = config(VAL_BATCH_TOKENS=1024, GRAD_ACCUM_STEPS=2)
    assert rows_per_forward(32, cfg, lone()) == 16
    assert rows_per_forward(32, cfg, dataclasses.replace(lone(), size=4)) == 4
    assert rows_per_forward(4096, cfg, lone()) == 1


# --------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------


def naive_nats(model, val: Validation, length: int, stride: int) -> np.ndarray:
    """Window by window, one at a time: each reads as much as any, and scores what none did before it."""
    found, done, cfg = np.zeros(val.targets), 0, model.cfg
    length = min(length, val.targets)
    stop = length
    while done < val.targets:
        window = val.tokens[stop - length : stop + 1]
        docs = packed([window], BOS, cfg.eval_len).docs if cfg.data.packing else None
        tokens = torch.from_numpy(window)[None]
        scored = nats(model, tokens[:, :-1], tokens[:, 1:], docs)[0].numpy()
        found[done:stop] = scored[length - (stop - done) :]
        done, stop = stop, min(stop + stride, val.targets)
    return found


MODES = [
    {}, {"DOC_PACKING": 1}, {"EVAL_SEQ_LEN": 50}, {"EVAL_SEQ_LEN": 1000},
    {"EVAL_SEQ_LEN": 7, "EVAL_STRIDE": 7}, {"NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 1},
]  # fmt: skip


@pytest.mark.parametrize("stride", [None, 5])
@pytest.mark.parametrize("knobs", MODES, ids=str)
def test_score_is_that_of_a_loop_over_windows(data, knobs, stride):
    """To 1e-5 nats a token, which is what a batch of another shape may move a float32 logit."""
    cfg, val, model = opened(data, **knobs)
    stride = stride or cfg.eval_len
    score, found = evaluate(model, val, stride, cfg, lone())
    want = naive_nats(model, val, cfg.eval_len, stride)
    assert (found.dtype, found.shape) == (np.float32, (TARGETS,))
    assert abs(found - want).max() <= 1e-4
    assert score.val_loss == pytest.approx(want.mean(), rel=1e-6)
    bits = want.sum() / math.log(2)
    assert score.val_bpb == pytest.approx(bits / val.target_bytes(0, TARGETS), rel=1e-6)
    assert (score.tokens, score.bytes, score.partial) == (TARGETS, val.target_bytes(0, TARGETS), False)


@pytest.mark.parametrize("packing", [0, 1])
@pytest.mark.parametrize("stride", [8, 32])
def test_rows_in_a_forward_do_not_matter(data, packing, stride):
    """1, 8 and 64 windows at a time, to 1e-4 nats for each token."""
    found = {}
    for rows in (1, 8, 64):
        cfg, val, model = opened(
            data, DOC_PACKING=packing, GRAD_ACCUM_STEPS=1, VAL_BATCH_TOKENS=32 * rows, EVAL_STRIDE=8
        )
        assert rows_per_forward(32, cfg, lone()) == rows
        calls, real = [], model.forward
        model.forward = lambda ctx, targets, real=real, calls=calls: calls.append(ctx) or real(ctx, targets)
        found[rows] = evaluate(model, val, stride, cfg, lone())[1]
        windows = len(window_edges(TARGETS, 32, stride)[0])
        assert len(calls) == math.ceil(windows / min(rows, windows))
    assert (found[1] > 0).all()
    for rows in (8, 64):
        assert abs(found[rows] - found[1]).max() <= 1e-4


def test_ranks_score_the_whole_between_them(data, monkeypatch):
    """Four ranks, one after another: contiguous shares whose sums are the score."""
    cfg, val, model = opened(data, GRAD_ACCUM_STEPS=1, EVAL_STRIDE=8)
    whole, want = evaluate(model, val, 8, cfg, lone())
    sums = torch.zeros(3, dtype=torch.float64)

    def add(world, t):
        sums.add_(t)
        return torch.tensor([whole.val_loss * TARGETS, TARGETS, whole.bytes], dtype=torch.float64)

    monkeypatch.setattr(train_gpt.World, "sum_", add)
    shares = [evaluate(model, val, 8, cfg, dataclasses.replace(lone(), rank=r, size=4))[1] for r in range(4)]
    assert abs(np.concatenate(shares) - want).max() <= 1e-4
    assert sums.tolist() == pytest.approx([whole.val_loss * TARGETS, TARGETS, whole.bytes], rel=1e-6)


def test_more_ranks_than_windows_leave_some_without_work(data, monkeypatch):
    cfg, val, model = opened(data, EVAL_SEQ_LEN=1000, GRAD_ACCUM_STEPS=1, TRAIN_SPANS=2)
    whole, want = evaluate(model, val, 1000, cfg, lone())
    total = torch.tensor([whole.val_loss * TARGETS, TARGETS, whole.bytes], dtype=torch.float64)
    monkeypatch.setattr(train_gpt.World, "sum_", lambda world, t: total)
    shares = [
        evaluate(model, val, 1000, cfg, dataclasses.replace(lone(), rank=r, size=2))[1] for r in range(2)
    ]
    assert [len(share) for share in shares] == [TARGETS, 0]
    assert np.array_equal(shares[0], want)


def test_target_that_is_lost_stops_the_run(data, monkeypatch):
    cfg, val, model = opened(data)
    monkeypatch.setattr(train_gpt, "window_edges", lambda *_: (np.array([0, 40]), np.array([32, 72])))
    with pytest.raises(AssertionError, match="scored twice or never"):
        evaluate(model, val, 32, cfg, lone())
    monkeypatch.setattr(train_gpt, "window_edges", lambda *_: (np.array([0, 32]), np.array([32, 64])))
    with pytest.raises(AssertionError, match="64 targets were scored, the split has 333"):
        evaluate(model, val, 32, cfg, lone())


@pytest.mark.parametrize("packing", [0, 1])
@pytest.mark.parametrize("stride", [8, 32])
def test_tokens_after_a_target_do_not_move_its_nats(data, packing, stride):
    """Scores of the first t targets are bit-equal when every later token is another one."""
    cfg, val, model = opened(data, DOC_PACKING=packing, EVAL_STRIDE=8)
    before = evaluate(model, val, stride, cfg, lone())[1]
    for t in (1, 31, 32, 100, 200):
        other = Validation(cfg, spelled())
        other.tokens = val.tokens.copy()
        later = slice(t + 1, None)
        other.tokens[later] = np.where(val.tokens[later] == BOS, BOS, 4 + (val.tokens[later] + 9) % 316)
        after = evaluate(model, other, stride, cfg, lone())[1]
        assert np.array_equal(before[:t], after[:t])
        assert not np.array_equal(before[t:], after[t:])


def test_sliding_windows_give_targets_more_context(data):
    """A target far from its window's start depends on the tokens before it, a whole context back."""
    cfg, val, model = opened(data, EVAL_STRIDE=8)
    other = Validation(cfg, spelled())
    other.tokens = val.tokens.copy()
    other.tokens[90] = 4 + (val.tokens[90] + 9) % 316

    def moved(stride: int) -> list[int]:
        pair = [evaluate(model, v, stride, cfg, lone())[1] for v in (val, other)]
        return np.flatnonzero(abs(pair[0] - pair[1]) > 1e-5).tolist()

    # target 89 is the token itself; plain windows end at 96, sliding ones carry it up to 32 further
    assert (min(moved(32)), max(moved(32))) == (89, 95)
    assert min(moved(8)) == 89
    assert 104 <= max(moved(8)) < 90 + 32


def test_model_is_scored_in_evaluation_mode_and_left_as_it_was(data):
    cfg, val, model = opened(data)
    modes, real = [], model.forward
    model.forward = lambda ctx, targets: (
        modes.append((model.training, torch.is_grad_enabled())) or real(ctx, targets)
    )
    for training in (True, False):
        model.train(training)
        evaluate(model, val, 32, cfg, lone())
        assert model.training is training
    assert set(modes) == {(False, False)}


def test_scoring_runs_the_final_phase(data):
    cfg, val, model = opened(data, NUM_LOOPS=2, LOOP_START=0, LOOP_END=1, QAT_ENABLED=1)
    phases, real = [], model.forward

    def forward(ctx: Ctx, targets):
        phases.append(ctx.phase)
        return real(ctx, targets)

    model.forward = forward
    evaluate(model, val, 32, cfg, lone())
    assert set(phases) == {final_phase(cfg)}
    assert (phases[0].loops, phases[0].qat) == (2, False)


# --------------------------------------------------------------------------------------
# Nats of every target
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [{}, {"DOC_PACKING": 1}], ids=str)
@pytest.mark.parametrize("score", ["roundtrip", "sliding"])
def test_written_nats_are_those_of_the_declared_score(tmp_path, toy_data, score, knobs):
    path = tmp_path / "nats.npy"
    run = run_here(tmp_path / "run", toy_data, SLIDING_WINDOW_ENABLED=1, SCORE=score, NLL_PATH=path, **knobs)
    found, said = np.load(path), run.results["scores"]
    assert (found.dtype, found.shape) == (np.float32, (300,))
    assert found.mean(dtype=np.float64) == pytest.approx(said[score]["val_loss"], rel=1e-12)
    bits = found.sum(dtype=np.float64) / math.log(2)
    assert bits / said[score]["bytes"] == pytest.approx(said[score]["val_bpb"], rel=1e-12)
    other = {"roundtrip": "sliding", "sliding": "roundtrip"}[score]
    assert found.mean(dtype=np.float64) != pytest.approx(said[other]["val_loss"], rel=1e-9)


def test_nats_of_ranks_are_written_in_the_order_of_the_stream(tmp_path, monkeypatch):
    parts = [np.arange(3, dtype=np.float32), np.arange(3, 5, dtype=np.float32)]
    monkeypatch.setattr(train_gpt.World, "gather", lambda world, item: parts)
    write_nats(parts[0], config(NLL_PATH=tmp_path / "n.npy"), dataclasses.replace(lone(), size=2))
    assert np.load(io.BytesIO((tmp_path / "n.npy").read_bytes())).tolist() == [0, 1, 2, 3, 4]
    write_nats(parts[0], config(NLL_PATH=tmp_path / "m.npy"), dataclasses.replace(lone(), size=2, rank=1))
    assert not (tmp_path / "m.npy").exists()


# --------------------------------------------------------------------------------------
# Partial scores, and when the split is opened
# --------------------------------------------------------------------------------------


def scored_lines(run: Run) -> list[str]:
    return [line for line in run.log if "val_loss:" in line or "bits per byte" in line]


def test_partial_score_says_so_wherever_it_stands(tmp_path, toy_data):
    knobs = {"VAL_LOSS_EVERY": 2, "SLIDING_WINDOW_ENABLED": 1}
    cut = run_here(tmp_path / "cut", toy_data, VAL_MAX_TOKENS=299, **knobs)
    assert len(scored_lines(cut)) == 1 + 5 + 3
    assert [line for line in scored_lines(cut) if "partial" not in line] == []
    assert {score["partial"] for score in cut.results["scores"].values()} == {True}


def test_whole_score_is_never_called_partial(tmp_path, toy_data):
    whole = run_here(tmp_path / "whole", toy_data, VAL_MAX_TOKENS=0, VAL_BATCH_TOKENS=65536, VAL_LOSS_EVERY=2)
    assert not any("partial" in line for line in scored_lines(whole))
    assert {score["tokens"] for score in whole.results["scores"].values()} == {11_999}
    assert {score["partial"] for score in whole.results["scores"].values()} == {False}


def test_line_of_a_score():
    score = Score(2.0, 1.5, 10, 20, 0.25, False)
    assert score.line() == "val_loss:2.00000000 val_bpb:1.50000000 eval_time:250ms"
    assert score._replace(partial=True).line().endswith("eval_time:250ms partial")


def test_validation_split_is_opened_after_the_artifact_is_written(tmp_path, toy_data, monkeypatch):
    artifact, real = tmp_path / "run/model.ptz", train_gpt.Shards.__init__
    seen = []

    def opening(self, folder, split, *rest):
        seen.append((split, artifact.exists()))
        real(self, folder, split, *rest)

    monkeypatch.setattr(train_gpt.Shards, "__init__", opening)
    run_here(tmp_path / "run", toy_data)
    assert seen == [("train", False), ("val", True)]


# --------------------------------------------------------------------------------------
# Sampled text
# --------------------------------------------------------------------------------------


def drawn(model, count: int, seed: int) -> list[int]:
    """Tokens drawn one by one from the shares that the nats of every possible target spell out."""
    generator, ids, vocab = torch.Generator().manual_seed(seed), [BOS], model.cfg.model.vocab
    for _ in range(count):
        row = torch.tensor(ids[-model.cfg.eval_len :]).expand(vocab, -1)
        every = torch.cat([row[:, 1:], torch.arange(vocab)[:, None]], 1)
        share = torch.exp(-nats(model, row, every)[:, -1])
        ids.append(int(torch.multinomial(share, 1, generator=generator)))
    return ids


NARROW = {"EMBED_DIM": 16, "VOCAB_BIAS": 1, "SOFTCAP_TYPE": "poly", "LOGIT_SOFTCAP": 3}
UNTIED = {"TIE_EMBEDDINGS": 0, "LOGIT_SOFTCAP": 3, "NUM_LOOPS": 1}


@pytest.mark.parametrize("knobs", [{}, UNTIED, NARROW], ids=str)
def test_sampled_tokens_are_drawn_from_the_models_own_shares(knobs):
    """Past the context too, which moves on with the text."""
    cfg = config(SAMPLE=12, EVAL_ONLY=1, EVAL_SEQ_LEN=8, SEED=3, **knobs)
    model, told = scrambled(cfg), spelled()._replace(pieces=lambda ids: " ".join(map(str, ids)))
    text = sample_text(model, told, cfg, lone())
    assert text == " ".join(map(str, drawn(model, 12, 3)))
    other = dataclasses.replace(cfg, budget=dataclasses.replace(cfg.budget, seed=4))
    assert text != sample_text(model, told, other, lone())


def test_sampling_prints_text_of_an_artifact_and_scores_nothing(tmp_path, toy_data):
    made = run_here(tmp_path / "run", toy_data)
    knobs = {"EVAL_ONLY": 1, "SAMPLE": 20, "ARTIFACT": made.folder / "model.ptz"}
    one, two = (run_here(tmp_path / name, toy_data, **knobs) for name in "ab")
    texts = [run.log[run.log.index(run.lines("Total submission size")[0]) + 1 :] for run in (one, two)]
    assert texts[0] == texts[1] != []
    assert one.results == {}
    assert one.trace == []
    assert scored_lines(one) == []
