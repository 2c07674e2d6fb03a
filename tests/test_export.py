"""Export: the artifact holds what was trained through the codecs, explains itself, can be scored alone."""

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

import train_gpt
from conftest import run_program, tiny_env, write_shard
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
MODELS = [
    {}, {"MATRIX_BITS": 6}, {"MATRIX_BITS": 16, "EMBED_BITS": 6, "TIE_EMBEDDINGS": 0},
    {"INT8_CLIP_PERCENTILE": 95, "ROW_SCALE_FLOOR": 0.001, **LOOPS}, {"EMBED_BITS": 16, "DOC_PACKING": 1},
    {"MATRIX_BITS": 5, "ATTN_CLIP_SIGMAS": 4, "MLP_CLIP_SIGMAS": 5, "EMBED_BITS": 7, "EMBED_CLIP_SIGMAS": 6},
    {"MATRIX_CODEC": "ternary", "EMBED_CODEC": "fp8", "TERNARY_GROUP": 24},
    {"MATRIX_CODEC": "ternary", "EMBED_CODEC": "fp4", "TERNARY_SCALE_STEP": 0.04},
    {"MATRIX_CODEC": "fp4", "EMBED_CODEC": "ternary", "TIE_EMBEDDINGS": 0},
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
    cfg = config(SEED=7, MATRIX_LR=0.5, RUN_ID="x")
    sections = {env: section for env, (section, _) in all_knobs().items()}
    kept = set(shape_knobs(cfg))
    assert kept >= {"NUM_LAYERS", "MODEL_DIM", "TRAIN_SEQ_LEN"}
    assert all(sections[env] in SHAPE_SECTIONS or env in SHAPE_KNOBS for env in kept)


RECORD = {  # record 1855's shape, as far as there are knobs for it
    "VOCAB_SIZE": "8192", "NUM_LAYERS": "11", "MLP_MULT": "4.0", "QK_GAIN_INIT": "5.0", "NUM_LOOPS": "2",
    "TRAIN_SEQ_LEN": "2048", "EVAL_SEQ_LEN": "2048", "DOC_PACKING": "1", "TIED_EMBED_INIT_STD": "0.01",
    "MATRIX_BITS": "6", "EMBED_BITS": "8", "INT8_CLIP_PERCENTILE": "99.99984", "ROW_SCALE_FLOOR": "0.007874",
}  # fmt: skip


def test_header_of_a_record_is_within_its_400_bytes():
    cfg = read_config(RECORD)
    assert len(json.dumps(shape_knobs(cfg))) <= 400
    small = read_config(
        RECORD | {"MODEL_DIM": "16", "VOCAB_SIZE": "320", "NUM_LAYERS": "6", "MLP_MULT": "1.5"}
    )
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

SIZED = [
    {},
    {"MATRIX_BITS": 6},
    {"MATRIX_BITS": 16},
    {"MATRIX_BITS": 6, "EMBED_BITS": 6, "TIE_EMBEDDINGS": 0},
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


def test_shape_without_memory_has_the_tensors_of_the_model():
    shape, real = empty_model(config(), lone()), make_model(config(), lone())
    assert {n: p.shape for n, p in shape.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }
