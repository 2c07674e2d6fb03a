"""Export: the artifact holds what was trained through the codecs, explains itself, can be scored alone."""

import dataclasses
import hashlib
import itertools
import json
import re
import shutil
import tracemalloc
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch

import train_gpt
from conftest import run_program, tiny_env, write_shard
from faults import plant, play, small
from test_model import PLAIN, config, lone, nats, scrambled, tokens_of
from test_train import BRIEF, Run, run_here, try_here
from train_gpt import (
    SHAPE_KNOBS,
    SHAPE_SECTIONS,
    Config,
    UserError,
    all_knobs,
    artifact_env,
    empty_model,
    export,
    load,
    make_model,
    open_artifact,
    param_tags,
    predicted_bytes,
    read_artifact_header,
    read_config,
    shape_knobs,
)

LOOPS = {"NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 1}
TERNARY_RECORD = {
    "MATRIX_CODEC": "ternary", "EMBED_CODEC": "fp8", "TERNARY_SCALE_STEP": 0.02, "EMBED_DIM": 24,
    "VOCAB_BIAS": 1, "SOFTCAP_TYPE": "poly", "LOGIT_SOFTCAP": 10, "ROPE_TYPE": "yarn", "FUSED_QKV": 1,
}  # fmt: skip
MODELS = [
    {}, {"MATRIX_BITS": 6}, {"MATRIX_BITS": 16, "EMBED_BITS": 6, "TIE_EMBEDDINGS": 0},
    {"INT8_CLIP_PERCENTILE": 95, "ROW_SCALE_FLOOR": 0.001, **LOOPS}, {"EMBED_BITS": 16, "DOC_PACKING": 1},
    {"MATRIX_BITS": 5, "ATTN_CLIP_SIGMAS": 4, "MLP_CLIP_SIGMAS": 5, "EMBED_BITS": 7, "EMBED_CLIP_SIGMAS": 6},
    {"MATRIX_CODEC": "ternary", "EMBED_CODEC": "fp8", "TERNARY_GROUP": 24},
    {"MATRIX_CODEC": "ternary", "EMBED_CODEC": "fp4", "TERNARY_SCALE_STEP": 0.04},
    {"MATRIX_CODEC": "fp4", "EMBED_CODEC": "ternary", "TIE_EMBEDDINGS": 0},
    {**TERNARY_RECORD, "NORMED_PROJ": "plain"},
    {**TERNARY_RECORD, "NORMED_PROJ": "gain", "TIE_EMBEDDINGS": 0},
]  # fmt: skip


def blob_of(model: torch.nn.Module, cfg: Config) -> bytes:
    return export(model, cfg).blob


def halved(model: torch.nn.Module) -> torch.nn.Module:
    """Gains and scales as float16 keeps them: they have no quantised phase, being no matrices."""
    with torch.no_grad():
        for name, tag in param_tags(model).items():
            if not name.endswith(".weight"):
                p = model.get_parameter(name)
                p.copy_(tag.codec.fake_quant(p.detach()))
    return model


# --------------------------------------------------------------------------------------
# What ships is what was trained
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", MODELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loaded_artifact_answers_as_the_live_model_in_its_quantised_phase(knobs, dtype):
    """Bit for bit, in both modes of the loss."""
    cfg, world = config(**knobs), lone(dtype)
    model, tokens = halved(scrambled(cfg, dtype)), tokens_of(2, 33, cfg)
    shipped = load(blob_of(model, cfg), cfg, world, "the artifact").eval()
    live = PLAIN._replace(qat=True, loops=cfg.loop.count)
    pair = tokens[:, :-1], tokens[:, 1:]
    assert torch.equal(nats(shipped, *pair), nats(model, *pair, phase=live))
    assert cfg.export.matrix_bits == 16 or not torch.equal(nats(shipped, *pair), nats(model, *pair))


@pytest.mark.parametrize("knobs", MODELS, ids=str)
def test_every_parameter_ships_by_its_tag(knobs):
    cfg = config(**knobs)
    model = scrambled(cfg)
    held = open_artifact(blob_of(model, cfg), cfg, lone(), "the artifact")
    for name, tag in param_tags(model).items():
        assert torch.equal(held.tensors[name], tag.codec.fake_quant(model.get_parameter(name).detach()))
        assert held.tensors[name].shape == model.get_parameter(name).shape


def test_artifact_is_the_same_every_time():
    cfg = config(MATRIX_BITS=6)
    assert blob_of(scrambled(cfg), cfg) == blob_of(scrambled(cfg), cfg)
    assert blob_of(scrambled(cfg), cfg) != blob_of(scrambled(cfg, seed=1), cfg)


def test_artifact_of_another_process_is_the_same(tmp_path, toy_data):
    here = run_here(tmp_path / "here", toy_data)
    env = tiny_env(**(BRIEF | toy_data.env | {"RUN_DIR": tmp_path / "there"}))
    there = run_program([], env | {"PYTHONHASHSEED": "3"})
    assert there.returncode == 0, there.stderr
    assert (tmp_path / "there/model.ptz").read_bytes() == here.blob
    assert (tmp_path / "there/trace.jsonl").read_text() == here.read("trace.jsonl")


def test_matrices_of_a_kind_stand_side_by_side():
    cfg = config(NUM_LAYERS=11)
    header, _ = read_artifact_header(blob_of(make_model(cfg, lone()), cfg), "the artifact")
    names = [name for name, _, _ in header["tensors"]]
    kinds = ["".join(c for c in name if not c.isdigit()) for name in names]
    assert len([kind for kind, _ in itertools.groupby(kinds)]) == len(set(kinds))
    queries = [name for name in names if "c_q" in name]
    assert queries == [f"blocks.{i}.attn.c_q.weight" for i in range(11)]


# --------------------------------------------------------------------------------------
# The header
# --------------------------------------------------------------------------------------


def written(folder: Path, cfg: Config) -> Path:
    path = folder / "model.ptz"
    path.write_bytes(blob_of(make_model(cfg, lone()), cfg))
    return path


@pytest.mark.parametrize("knobs", MODELS, ids=str)
def test_knobs_of_the_artifact_rebuild_its_model(tmp_path, knobs):
    cfg = config(**knobs, EVAL_SEQ_LEN=16, MATRIX_LR=0.5)
    again = read_config(artifact_env(written(tmp_path, cfg), {}))
    assert (again.model, again.loop, again.export) == (cfg.model, cfg.loop, cfg.export)
    assert (again.data.seq_len, again.data.packing, again.eval_len) == (32, cfg.data.packing, 16)
    assert again.optim == Config().optim


def test_only_knobs_that_decide_the_forward_are_kept():
    cfg = config(SEED=7, MATRIX_LR=0.5, RUN_ID="x", MATRIX_INIT="orthogonal", QK_GAIN_INIT=5)
    sections = {env: section for env, (section, _) in all_knobs().items()}
    kept = set(shape_knobs(cfg))
    assert kept >= {"NUM_LAYERS", "MODEL_DIM", "TRAIN_SEQ_LEN"}
    assert all(sections[env] in SHAPE_SECTIONS or env in SHAPE_KNOBS for env in kept)
    assert not kept & {"MATRIX_INIT", "QK_GAIN_INIT"}, "what the weights began with is in them"


RECORD = {  # record 1855's shape
    "VOCAB_SIZE": "8192", "NUM_LAYERS": "11", "MLP_MULT": "4.0", "QK_GAIN_INIT": "5.0", "NUM_LOOPS": "2",
    "TRAIN_SEQ_LEN": "2048", "EVAL_SEQ_LEN": "2048", "DOC_PACKING": "1", "TIED_EMBED_INIT_STD": "0.01",
    "MATRIX_BITS": "6", "EMBED_BITS": "8", "INT8_CLIP_PERCENTILE": "99.99984", "ROW_SCALE_FLOOR": "0.007874",
    "MLP_NEGATIVE_SLOPE": "0.5", "MATRIX_INIT": "orthogonal", "ROPE_DIMS": "16", "XSA_LAST_N": "11",
    "LN_SCALE": "1", "SKIP_GATES_ENABLED": "1", "PARALLEL_START_LAYER": "8", "SPARSE_ATTN_GATE_ENABLED": "1",
    "SPARSE_ATTN_GATE_SCALE": "0.5", "GATED_ATTN_QUANT_GATE": "1", "SMEAR_GATE_ENABLED": "1",
    "LQER_ENABLED": "1",
}  # fmt: skip


def test_header_of_a_record_is_within_its_400_bytes():
    cfg = read_config(RECORD)
    assert len(train_gpt.squeeze(json.dumps(shape_knobs(cfg)).encode())) <= 400
    sizes = {"MODEL_DIM": "16", "VOCAB_SIZE": "320", "NUM_LAYERS": "7", "MLP_MULT": "1.5", "ROPE_DIMS": "2"}
    sizes["PARALLEL_START_LAYER"] = "6"
    small = read_config(RECORD | sizes)
    header, _ = read_artifact_header(blob_of(make_model(small, lone()), small), "the artifact")
    assert header["knobs"] == shape_knobs(small)


def test_too_many_shape_knobs_are_refused_before_training(tmp_path, toy_data):
    """Ten minutes of training must not end in an artifact that cannot be written."""
    shape = {
        "MLP_MULT": 2.0000000000001, "TIED_EMBED_INIT_STD": 0.0051234567890123,
        "LOGIT_SOFTCAP": 30.12345678901234, "ROPE_BASE": 10000.123456789012,
        "QK_GAIN_INIT": 1.5123456789012345, "NUM_LOOPS": 1, "LOOP_START": 0,
        "LOOP_END": 1, "ENABLE_LOOPING_AT": 0.3512345678901234, "INT8_CLIP_PERCENTILE": 99.9998412345678,
        "ROW_SCALE_FLOOR": 0.00787401574803149, "EVAL_SEQ_LEN": 16, "DOC_PACKING": 1,
        "MLP_NEGATIVE_SLOPE": 0.51728394650172839, "ROPE_DIMS": 4, "ROPE_YARN": 1, "XSA_LAST_N": 2,
        "GATED_ATTN_ENABLED": 1, "ATTN_OUT_GATE_ENABLED": 1, "ATTN_OUT_GATE_SRC": "q", "GATED_ATTENTION": 1,
        "SPARSE_ATTN_GATE_ENABLED": 1, "SPARSE_ATTN_GATE_SCALE": 0.70710678118654752,
        "VALUE_RESIDUAL": 1, "LN_SCALE": 1, "SKIP_GATES_ENABLED": 1, "PARALLEL_START_LAYER": 2,
        "PARALLEL_FINAL_LANE": "attn", "DTG_ENABLED": 1, "SMEAR_GATE_ENABLED": 1, "BIGRAM_VOCAB_SIZE": 64,
    }  # fmt: skip
    run = try_here(tmp_path, toy_data, **shape)
    assert "400 bytes" in run.error
    assert run.losses == []


# --------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------


def test_damaged_artifact_is_refused_in_words():
    cfg = config()
    blob = blob_of(make_model(cfg, lone()), cfg)
    for at in range(0, len(blob), 97):
        damaged = bytearray(blob)
        damaged[at] ^= 0x10
        with pytest.raises(UserError, match="the artifact"):
            load(bytes(damaged), cfg, lone(), "the artifact")
    for length in (0, 3, 20, 24, 25, 100, len(blob) - 1):
        with pytest.raises(UserError, match="the artifact"):
            load(blob[:length], cfg, lone(), "the artifact")


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"NUM_LAYERS": 4}, r"blocks\.3\.attn\.c_k\.weight is None there and \['int8', \[16, 32\]\] here"),
        ({"MODEL_DIM": 48}, r"weight is \['int8', \[16, 32\]\] there and \['int8', \[24, 48\]\] here"),
        ({"MATRIX_CODEC": "fp8"}, r"\['int8', .*and \['fp8'"),
        ({"TIE_EMBEDDINGS": 0}, "head.weight is None there"),
    ],
)  # fmt: skip
def test_artifact_of_another_model_is_refused_by_the_tensor_that_differs(knobs, words):
    blob = blob_of(make_model(config(), lone()), config())
    with pytest.raises(UserError, match=f"belongs to another model: .*{words}"):
        load(blob, config(**knobs), lone(), "the artifact")


def test_environment_that_clashes_with_the_artifact_is_refused_by_knob(tmp_path):
    path = written(tmp_path, config())
    for env, words in (
        ({"NUM_LAYERS": "4"}, r"NUM_LAYERS \(artifact '3', now '4'\)"),
        ({"NUM_LAYERS": "9"}, r"NUM_LAYERS \(artifact '3', now 'default'\)"),
        ({"MATRIX_BITS": "6"}, r"MATRIX_BITS \(artifact 'default', now '6'\)"),
        ({"TRAIN_SEQ_LEN": "64"}, "TRAIN_SEQ_LEN"),
    ):
        with pytest.raises(UserError, match=words):
            artifact_env(path, env)
    assert artifact_env(path, {"NUM_LAYERS": "3", "EVAL_SEQ_LEN": "16"})["EVAL_SEQ_LEN"] == "16"
    with pytest.raises(UserError, match="does not exist"):
        artifact_env(tmp_path / "nothing.ptz", {})


# --------------------------------------------------------------------------------------
# Size
# --------------------------------------------------------------------------------------

CLIPPED = {"MATRIX_CLIP_SIGMAS": 12.85, "EMBED_CLIP_SIGMAS": 20}
SIZED = [
    {},
    {"MATRIX_BITS": 6},
    {"MATRIX_BITS": 16},
    {"MATRIX_BITS": 6, "EMBED_BITS": 6, "TIE_EMBEDDINGS": 0},
    CLIPPED | {"MATRIX_BITS": 6},
    CLIPPED | {"MATRIX_BITS": 5, "EMBED_BITS": 7, "MLP_CLIP_SIGMAS": 7},
    {"MATRIX_CODEC": "ternary", "EMBED_CODEC": "fp8"},
    {"MATRIX_CODEC": "ternary", "TERNARY_SCALE_STEP": 0.02, "EMBED_CODEC": "fp4"},
    {"MATRIX_CODEC": "fp4", "EMBED_CODEC": "ternary"},
]
WIDE = {"MODEL_DIM": 96, "VOCAB_SIZE": 320}


def close(cfg: Config, blob: bytes) -> bool:
    expected = predicted_bytes(cfg, lone())
    print(f"predicted {expected:,} bytes, shipped {len(blob):,}: {expected / len(blob) - 1:+.1%}")
    return abs(expected - len(blob)) <= 0.15 * len(blob)


@pytest.mark.parametrize("knobs", SIZED, ids=str)
def test_predicted_size_is_within_15_percent_for_random_weights(knobs):
    cfg = config(**WIDE, **knobs)
    assert close(cfg, blob_of(scrambled(cfg), cfg))


@pytest.mark.parametrize("knobs", SIZED, ids=str)
def test_predicted_size_is_within_15_percent_after_a_little_training(tmp_path, toy_data, knobs):
    run = run_here(tmp_path, toy_data, ITERATIONS=20, **WIDE, **knobs)
    cfg = config(**WIDE, **knobs)
    assert close(cfg, run.blob)
    assert f"artifact_bytes:{predicted_bytes(cfg, lone())} of 16000000" in run.read("train.log")


@pytest.mark.parametrize("knobs", SIZED[4:8], ids=str)
def test_forecast_is_at_least_95_percent_of_the_size_where_clips_are_wide_or_trits_ship(knobs):
    """Row H21: the forecast counts every parameter, whatever its codec, so none comes as a surprise."""
    cfg = config(**WIDE, **knobs)
    assert predicted_bytes(cfg, lone()) >= 0.95 * len(blob_of(scrambled(cfg), cfg))


def test_hopeless_size_is_refused_before_training_unless_a_ladder_is_given(tmp_path, toy_data, monkeypatch):
    forecast = predicted_bytes(config(**WIDE), lone())
    for limit, refused in ((0.84, True), (0.86, False)):
        monkeypatch.setattr(train_gpt, "SIZE_LIMIT", int(limit * forecast))
        run = try_here(tmp_path / str(limit), toy_data, **WIDE)
        assert run.error.startswith(f"the artifact will take about {forecast:,} bytes, at least") == refused
        assert (run.losses == []) == refused
        assert not re.search(r"\n", run.error)
    monkeypatch.setattr(train_gpt, "SIZE_LIMIT", int(0.5 * forecast))
    assert not try_here(tmp_path / "ladder", toy_data, **WIDE, SIZE_LADDER="MATRIX_BITS=4").error


def test_forecast_of_a_validation_is_near_the_artifact(tmp_path, toy_data):
    """From the real weights, with the code: what a user sees coming."""
    run = run_here(
        tmp_path, toy_data, ITERATIONS=4, VAL_LOSS_EVERY=4, CODE_BYTES=12345, **WIDE, MATRIX_BITS=6
    )
    (line,) = run.lines("size_forecast:")
    weights, code, left = map(
        int, re.fullmatch(r"size_forecast: weights:(\d+) code:(\d+) left:(\d+)", line).groups()
    )
    assert code == 12345
    assert weights + code + left == pytest.approx(16_000_000, abs=1)
    assert weights == pytest.approx(len(run.blob), rel=0.1)


# --------------------------------------------------------------------------------------
# What gives way
# --------------------------------------------------------------------------------------

LQER = {"LQER_ENABLED": 1, "LQER_RANK": 2, "LQER_TOP_K": 2, "LQER_ASYM_GROUP": 16}
STEEP = {
    "MATRIX_BITS": 8,
    **LQER,
    "SIZE_LADDER": "MLP_CLIP_SIGMAS=9,EMBED_BITS=5 LQER_ENABLED=0,MATRIX_BITS=4",
}


def laddered(folder: Path, limit: int, monkeypatch, **knobs) -> tuple[Run, Config, bytes]:
    """Ship a random model under a limit of so many bytes, 1,000 of them code."""
    cfg = config(**{**STEEP, **knobs})
    folder.mkdir()
    world = dataclasses.replace(lone(), journal=train_gpt.Journal(folder), run_dir=folder)
    monkeypatch.setattr(train_gpt, "SIZE_LIMIT", limit)
    return Run(folder, ""), cfg, train_gpt.ship(scrambled(cfg), {}, 1000, cfg, world)


def rungs_of(run: Run) -> list[tuple[str, int, int]]:
    """(rung, bytes of weights, bytes left) of each line of the log."""
    pattern = r"size_ladder: (.*) weights:(\d+) code:1000 left:(-?\d+)"
    found = [re.fullmatch(pattern, line).groups() for line in run.lines("size_ladder:")]
    return [(name, int(size), int(left)) for name, size, left in found]


RUNGS = ["as configured", "MLP_CLIP_SIGMAS=9.0", "EMBED_BITS=5", "LQER_ENABLED=0.0", "MATRIX_BITS=4"]


@pytest.fixture(scope="module")
def whole_ladder(tmp_path_factory) -> list[int]:
    """Bytes of the weights after each rung."""
    with pytest.MonkeyPatch.context() as patch:
        run, cfg, blob = laddered(tmp_path_factory.mktemp("ladder") / "run", 100, patch)
    sizes = [size for _, size, _ in rungs_of(run)]
    assert [name for name, *_ in rungs_of(run)] == RUNGS
    assert load(blob, cfg, lone(), "the artifact"), "it ships although the ladder is too short"
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5
    return sizes


@pytest.mark.parametrize("stop", range(5))
def test_rungs_are_taken_in_order_and_no_further_than_needed(tmp_path, monkeypatch, whole_ladder, stop):
    sizes = whole_ladder
    run, cfg, blob = laddered(tmp_path / "run", sizes[stop] + 1000, monkeypatch)
    found = rungs_of(run)
    assert [name for name, _, _ in found] == RUNGS[: stop + 1]
    assert [left for *_, left in found] == [sizes[stop] - size for size in sizes[: stop + 1]]
    assert len(blob) == len(run.blob) == sizes[stop]
    model = load(blob, cfg, lone(), "the artifact")  # bits and corrections are the file's
    codecs = {name: codec for name, codec, _ in read_artifact_header(blob, "the artifact")[0]["tensors"]}
    assert codecs["embed.weight"].startswith("int8" if stop < 2 else "int5")
    assert codecs["blocks.0.mlp.fc.weight"].startswith("int8" if stop < 4 else "int4")
    assert sum("lqer2g16b4" in codec for codec in codecs.values()) == (2 if stop < 3 else 0)
    near = 0.02 if stop < 1 else 0.5
    for name, p in scrambled(cfg).named_parameters():
        assert (model.get_parameter(name) - p).abs().max() <= near * p.abs().max()


def test_lowered_artifact_scores_alone_as_in_its_run(tmp_path, toy_data, monkeypatch):
    limit = run_here(tmp_path / "whole", toy_data, **LQER).results["bytes"]["total"] - 300
    monkeypatch.setattr(train_gpt, "SIZE_LIMIT", limit)
    run = run_here(tmp_path / "run", toy_data, **LQER, SIZE_LADDER="MATRIX_BITS=6", GRAD_ACCUM_STEPS=1)
    assert run.results["bytes"]["total"] <= limit
    score_again(toy_data, RUN_DIR=tmp_path / "again", ARTIFACT=run.folder / "model.ptz", GRAD_ACCUM_STEPS=1)
    again = Run(tmp_path / "again", "").results["scores"]
    assert figures(again, "roundtrip") == figures(run.results["scores"], "roundtrip")


NO_RUNGS = [
    "MLP_MULT=2", "EMBED_BITS", "EMBED_BITS=9", "EMBED_BITS=1", "EMBED_BITS=x", "LQER_ENABLED=1", "=3",
    "MLP_CLIP_SIGMAS=0", "MLP_CLIP_SIGMAS=nan", "MATRIX_BITS=4;EMBED_BITS=4", "EMBED_BITS=5.5",
]  # fmt: skip


@pytest.mark.parametrize("ladder", NO_RUNGS)
def test_ladder_of_something_else_is_refused_in_one_line(ladder):
    with pytest.raises(
        UserError, match=r"^SIZE_LADDER='.*' is no rung; want KNOB=value of MATRIX_BITS"
    ) as found:
        config(SIZE_LADDER=ladder)
    assert "\n" not in str(found.value)


def test_code_bytes_stand_for_the_files_own(tmp_path, toy_data):
    """In what the ladder leaves, in the total of the log and in the results alike."""
    run = run_here(tmp_path, toy_data, CODE_BYTES=12345)
    total = 12345 + len(run.blob)
    assert run.lines("size_ladder:")[0].endswith(f"code:12345 left:{16_000_000 - total}")
    assert run.results["bytes"]["total"] == total
    assert run.lines("Total submission size")[0].endswith(f": {total} bytes")


# --------------------------------------------------------------------------------------
# Where the bytes are
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [*MODELS, LQER], ids=str)
def test_byte_table_accounts_for_every_byte_of_the_payload(knobs):
    cfg = config(**knobs)
    model = scrambled(cfg)
    tags = param_tags(model)
    tags = train_gpt.corrected(model, tags, {}, cfg) if cfg.gptq.lqer else tags
    shipment = export(model, cfg, tags)
    table, payload = train_gpt.byte_table(shipment), len(read_artifact_header(shipment.blob, "it")[1])
    params = {name: p.numel() for name, p in model.named_parameters()}
    assert {row["name"]: row["params"] for row in table["tensors"]} == params
    assert sum(row["bytes"] for row in table["streams"]) == payload
    assert sum(row["bytes"] for row in table["tensors"]) == pytest.approx(payload, abs=len(params))
    assert sum(row["share"] for row in table["tensors"]) == pytest.approx(payload / len(shipment.blob))
    for row in table["tensors"]:
        assert row["bits"] * row["params"] / 8 == pytest.approx(row["bytes"], abs=0.51)
    for row in table["streams"]:
        assert row["bytes"] == row["tried"][row["coder"]] == min(row["tried"].values())
        assert row["bits"] * row["values"] / 8 == pytest.approx(row["bytes"])


def test_entropy_of_a_tensor_by_hand():
    """Four trits, half of them zero: 1.5 bits each; and a float16 for each of two rows, different ones."""
    plane, values = train_gpt.Plane(2, 4, -1, 1), np.array([0, 0, 1, -1, 0, 1, -1, 0], np.int8)
    assert train_gpt.entropy_bytes(plane, values) == pytest.approx(1.5 * 8 / 8)
    assert train_gpt.entropy_bytes(train_gpt.Plane(4, 1), np.array([1, 1, 2, 2], "<f2")) == pytest.approx(0.5)
    assert train_gpt.entropy_bytes(train_gpt.Plane(4, 1), np.array([1, 1, 1, 1], "<f2")) == 0


def test_a_tensor_of_noise_has_more_of_a_stream_than_one_of_zeros():
    cfg = config()
    model = scrambled(cfg)
    torch.nn.init.zeros_(model.blocks[1].mlp.fc.weight)
    rows = {row["name"]: row for row in train_gpt.byte_table(export(model, cfg))["tensors"]}
    assert rows["blocks.1.mlp.fc.weight"]["bytes"] < 0.1 * rows["blocks.0.mlp.fc.weight"]["bytes"]


def test_byte_table_stands_beside_the_artifact_and_in_the_log_file(trained):
    table = json.loads(trained.read("bytes.json"))
    lines = [line.split()[0] for line in trained.lines("tensor:")]
    assert lines == [f"tensor:{row['name']}" for row in table["tensors"]]
    streams = [[row["kind"], row["coder"], row["bytes"]] for row in table["streams"]]
    assert streams == read_artifact_header(trained.blob, "it")[0]["streams"]


def test_model_of_one_layer_ships(tmp_path, toy_data):
    """Its skip weights are none, and none of its bytes are theirs."""
    assert run_here(tmp_path, toy_data, NUM_LAYERS=1).results["bytes"]["model"] > 1000


# --------------------------------------------------------------------------------------
# What another hand has made
# --------------------------------------------------------------------------------------


class Forgery:
    """An artifact of a tiny model, to be put together wrongly under a checksum that is right."""

    def __init__(self, **knobs) -> None:
        self.cfg = config(**knobs)
        self.blob = blob_of(scrambled(self.cfg), self.cfg)
        header, payload = read_artifact_header(self.blob, "it")
        self.header, self.payload = json.dumps(header), bytes(payload)

    def refusal(self, header: object, payload: bytes | None = None) -> str:
        text = header if isinstance(header, bytes) else train_gpt.squeeze(json.dumps(header).encode())
        payload = self.payload if payload is None else payload
        blob = train_gpt.pack_container(b"PGLM", train_gpt.ARTIFACT_VERSION, text, payload)
        with pytest.raises(UserError) as found:
            load(blob, self.cfg, lone(), "it")
        assert str(found.value).startswith("it ") and str(found.value).isprintable()
        assert len(str(found.value)) < 500
        return str(found.value)

    def changed(self, key: str, row: int, column: int, value: object) -> dict:
        header = json.loads(self.header)
        header[key][row][column] = value
        return header


@pytest.fixture(scope="module")
def forgery() -> Forgery:
    return Forgery()


@pytest.mark.parametrize(
    ("key", "column", "value", "words"),
    [
        ("streams", 0, "int7.q", "does not hold the streams"),
        ("streams", 1, "zip", "a coder 'zip' that it cannot have"),
        ("streams", 1, "base3", "cannot be decoded"),
        ("streams", 1, "rans\n", "cannot have"),
        ("streams", 2, -1, "does not hold the streams"),
        ("streams", 2, 10**15, "does not hold the streams"),
        ("streams", 2, 1.5, "a header that this program would not write"),
        ("streams", 2, True, "a header that this program would not write"),
        ("tensors", 0, "a\nb", "a header that this program would not write"),
        ("tensors", 0, "\ud800", "a header that this program would not write"),
        ("tensors", 0, "x" * 10**5, "a header that this program would not write"),
        ("tensors", 1, "int9", "belongs to another model"),
        ("tensors", 1, "int8+lqer4g0b4", "belongs to another model"),
        ("tensors", 1, "half", "belongs to another model"),
        ("tensors", 1, "y" * 10**5, "a header that this program would not write"),
        ("tensors", 2, [10**9, 10**9], "belongs to another model"),
        ("tensors", 2, [], "belongs to another model"),
    ],
)
def test_forged_header_is_refused_in_one_line(forgery, key, column, value, words):
    rows = json.loads(forgery.header)[key]
    row = next(i for i, row in enumerate(rows) if str(row[1 if key == "tensors" else 0]).startswith("int8"))
    assert words in forgery.refusal(forgery.changed(key, row, column, value))


def test_swapped_lost_and_doubled_streams_are_refused(forgery):
    header = json.loads(forgery.header)
    rows = header["streams"]
    for other in (rows[::-1], rows[1:], rows + rows[:1], []):
        assert "does not hold the streams" in forgery.refusal(header | {"streams": other})
    sizes = [[k, c, s + d] for (k, c, s), d in zip(rows, (5, -5, 0), strict=True)]
    assert "cannot be decoded" in forgery.refusal(header | {"streams": sizes})
    below = [[k, c, s] for (k, c, _), s in zip(rows, (-1, len(forgery.payload) + 1, 0), strict=True)]
    assert "a length below zero" in forgery.refusal(header | {"streams": below})


def test_header_that_is_a_bomb_or_nested_without_end_is_refused_without_being_held(forgery):
    bomb = brotli.compress(b"[" * (64 << 20), quality=1)
    tracemalloc.start()
    forgery.refusal(bomb)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    forgery.refusal(train_gpt.squeeze(b"[" * 100_000))


def test_artifact_with_a_correction_is_another_model_where_none_is_configured():
    forgery = Forgery(**LQER)
    cfg = config(**LQER)
    blob = export(
        scrambled(cfg), cfg, train_gpt.corrected(scrambled(cfg), param_tags(scrambled(cfg)), {}, cfg)
    ).blob
    assert load(blob, cfg, lone(), "it")
    with pytest.raises(UserError, match=r"belongs to another model: .*lqer2g16b4"):
        load(blob, config(), lone(), "it")
    for name in ("int8+lqer0g0b4", "int8+lqer9999g0b4", "int8+lqer4g0b9", "int8+lqer4g0b4 "):
        row = next(i for i, row in enumerate(json.loads(forgery.header)["tensors"]) if row[1] == "int8")
        assert "belongs to another model" in forgery.refusal(forgery.changed("tensors", row, 1, name))


def test_1000_random_corruptions_of_an_artifact_are_refused_in_words(forgery):
    random = np.random.default_rng(0)
    for _ in range(1000):
        damaged = bytearray(forgery.blob)
        for at in random.integers(len(damaged), size=random.integers(1, 5)):
            damaged[at] ^= random.integers(1, 256)
        damaged = damaged[: random.integers(len(damaged) + 1)] if random.random() < 0.2 else damaged
        if bytes(damaged) != forgery.blob:
            with pytest.raises(UserError, match=r"^it (is|has) "):
                open_artifact(bytes(damaged), forgery.cfg, lone(), "it")


@pytest.mark.parametrize(
    "knobs", [{}, {"MATRIX_CODEC": "ternary", "EMBED_CODEC": "fp4", "TERNARY_SCALE_STEP": 0.02}]
)
def test_random_corruptions_under_a_right_checksum_load_or_are_refused_in_words(knobs):
    forgery, random, refused = Forgery(**knobs), np.random.default_rng(1), 0
    text = train_gpt.squeeze(forgery.header.encode())
    for _ in range(25):
        damaged = bytearray(forgery.payload)
        for at in random.integers(len(damaged), size=random.integers(1, 4)):
            damaged[at] = random.integers(256)
        blob = train_gpt.pack_container(b"PGLM", train_gpt.ARTIFACT_VERSION, text, bytes(damaged))
        try:
            model = load(blob, forgery.cfg, lone(), "it")
            assert {n: p.shape for n, p in model.named_parameters()} == {
                n: p.shape for n, p in scrambled(forgery.cfg).named_parameters()
            }
        except UserError as e:
            refused += 1
            assert re.match(r"it has a stream \S+ that cannot be decoded: .+; export it again$", str(e))
    assert 0 < refused < 25


# --------------------------------------------------------------------------------------
# EVAL_ONLY
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, toy_data):
    knobs = {"SLIDING_WINDOW_ENABLED": 1, "MATRIX_BITS": 6, "DOC_PACKING": 1, **LOOPS}
    return run_here(tmp_path_factory.mktemp("trained") / "run", toy_data, **knobs)


def figures(scores: dict, name: str) -> list:
    return [scores[name][key] for key in ("val_loss", "val_bpb", "tokens", "bytes", "partial")]


def score_again(toy_data, **knobs) -> None:
    """EVAL_ONLY with the knobs of data and machine alone: the artifact knows the rest."""
    limits = {"VAL_MAX_TOKENS": 300, "VAL_BATCH_TOKENS": 512, "DTYPE": "float32", "COMPILE": 0}
    data = {key: value for key, value in toy_data.env.items() if key != "VOCAB_SIZE"}
    env = data | limits | {"EVAL_ONLY": 1} | knobs
    assert train_gpt.run({key: str(value) for key, value in env.items()}) == 0


@pytest.fixture
def copied(tmp_path, trained) -> Run:
    """The run's folder under another name, to write in."""
    shutil.copytree(trained.folder, tmp_path / "runs/mine")
    return Run(tmp_path / "runs/mine", "")


def test_artifact_alone_scores_as_in_the_run_that_made_it(tmp_path, trained, toy_data):
    """To the bit with as many rows in a forward, which VAL_BATCH_TOKENS / GRAD_ACCUM_STEPS decides."""
    knobs = {"SLIDING_WINDOW_ENABLED": 1, "EVAL_STRIDE": 8, "ARTIFACT": trained.folder / "model.ptz"}
    score_again(toy_data, RUN_DIR=tmp_path / "again", GRAD_ACCUM_STEPS=1, **knobs)
    score_again(toy_data, RUN_DIR=tmp_path / "fewer rows", **knobs)
    again, fewer = Run(tmp_path / "again", "").results, Run(tmp_path / "fewer rows", "").results
    for name in ("roundtrip", "sliding"):
        want = figures(trained.results["scores"], name)
        assert figures(again["scores"], name) == want
        assert figures(fewer["scores"], name) == pytest.approx(want, rel=1e-7)
    assert list(again["scores"]) == ["sliding", "roundtrip"]
    assert (again["steps"], again["train_seconds"]) == (0, 0.0)
    for same in ("bytes", "params", "order0_bpb", "source_sha256"):
        assert again[same] == trained.results[same]


@pytest.mark.parametrize("overwrite", [0, 1])
def test_run_folder_is_scored_in_place_and_keeps_its_artifact(copied, toy_data, overwrite):
    """`EVAL_ONLY=1 RUN_DIR=...` means that folder's model.ptz, and OVERWRITE is for runs that train."""
    before = copied.blob, copied.read("trace.jsonl")
    score_again(toy_data, RUN_DIR=copied.folder, OVERWRITE=overwrite)
    assert copied.blob == before[0]
    assert copied.read("trace.jsonl").startswith(before[1])


def test_run_named_by_its_id_is_scored(tmp_path, copied, toy_data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    score_again(toy_data, RUN_ID="mine")


def test_scoring_an_artifact_needs_no_training_shards(tmp_path, trained, toy_data):
    """Evaluation has no access to training data, not even to its names."""
    only = tmp_path / "val"
    only.mkdir()
    shutil.copy(toy_data.path / "fineweb_val_000000.bin", only)
    knobs = {"ARTIFACT": trained.folder / "model.ptz", "GRAD_ACCUM_STEPS": 1}
    score_again(toy_data, RUN_DIR=tmp_path / "again", DATA_PATH=only, **knobs)
    found = Run(tmp_path / "again", "").results
    assert figures(found["scores"], "roundtrip") == figures(trained.results["scores"], "roundtrip")


def test_export_reads_no_validation_token(tmp_path, toy_data):
    """The same artifact from a folder whose validation split is another one."""
    other = tmp_path / "data"
    shutil.copytree(toy_data.path, other)
    write_shard(other / "fineweb_val_000000.bin", torch.randint(4, 320, (700,)).numpy())
    runs = [
        run_here(tmp_path / str(i), toy_data, DATA_PATH=path) for i, path in enumerate((toy_data.path, other))
    ]
    assert runs[0].blob == runs[1].blob
    assert runs[0].results["scores"] != runs[1].results["scores"]


def test_trace_names_the_artifact_by_its_hash(trained):
    hashes = [row["artifact_sha256"] for row in trained.trace if "artifact_sha256" in row]
    assert hashes == [hashlib.sha256(trained.blob).hexdigest()]


def test_tied_embedding_is_counted_once():
    """In the count, in the forecast, in the artifact, and in what the optimizer moves."""
    tied, untied = config(**WIDE), config(**WIDE, TIE_EMBEDDINGS=0)
    head, models = tied.model.vocab * tied.model.dim, [scrambled(cfg) for cfg in (tied, untied)]
    assert train_gpt.param_count(models[1]) - train_gpt.param_count(models[0]) == head
    bits = param_tags(models[1])["head.weight"].codec.bits((tied.model.vocab, tied.model.dim))
    forecast = [predicted_bytes(cfg, lone()) for cfg in (tied, untied)]
    assert forecast[1] - forecast[0] == pytest.approx(bits / 8, abs=1)
    names = [open_artifact(blob_of(m, m.cfg), m.cfg, lone(), "it").tensors.keys() for m in models]
    assert names[1] - names[0] == {"head.weight"}
    assert names[0] == dict(models[0].named_parameters(remove_duplicate=False)).keys()
    sums = [train_gpt.Optimizer(m, m.cfg, lone()).table() for m in models]
    counts = [sum(int(line.split("params:")[1]) for line in lines) for lines in sums]
    assert counts == [train_gpt.param_count(m) for m in models]


@pytest.mark.parametrize("here", ["lzma", "brotli"])
def test_artifact_is_decoded_as_it_says_and_not_as_is_configured_here(here):
    there = {"lzma": "brotli", "brotli": "lzma"}[here]
    cfg, other = (config(COMPRESSOR=name) for name in (there, here))
    model = scrambled(cfg)
    shipment = export(model, cfg)
    coders = [row["coder"] for row in train_gpt.byte_table(shipment)["streams"]]
    assert any(there in coder for coder in coders) and not any(here in coder for coder in coders)
    held = [open_artifact(shipment.blob, c, lone(), "it").tensors for c in (cfg, other)]
    assert held[0].keys() == held[1].keys()
    assert all(torch.equal(held[0][name], held[1][name]) for name in held[0])


def test_two_ranks_lower_an_artifact_as_one_does(toy_data, tmp_path):
    """Row C11: what gives way is found by one rank, and nothing in it waits for the others."""
    knobs = LQER | {"GRAD_ACCUM_STEPS": 1, "SIZE_LADDER": "EMBED_BITS=6,MATRIX_BITS=6", "GPTQ_ENABLED": 1}
    alone = small(toy_data, tmp_path / "alone", **knobs)
    assert play(alone).status == 0
    total = json.loads(Path(alone["RUN_DIR"], "results.json").read_text())["bytes"]["total"]
    env = small(toy_data, tmp_path / "two", **knobs)
    outcome = play(env, plant("lower_limit", size=total - 200), ranks=2)
    assert outcome.statuses == [0, 0], outcome.errs
    assert Path(env["RUN_DIR"], "train.log").read_text().count("size_ladder: ") >= 2
    assert json.loads(Path(env["RUN_DIR"], "results.json").read_text())["bytes"]["total"] <= total - 200


def test_shape_without_memory_has_the_tensors_of_the_model():
    shape, real = empty_model(config(), lone()), make_model(config(), lone())
    assert {n: p.shape for n, p in shape.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }
