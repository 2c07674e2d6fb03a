"""Config: every environment variable is read, refused or named, and nothing else decides a run."""

import dataclasses
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import ROOT, read_env, run_program, tiny_env
from train_gpt import Config, UserError, all_knobs, changed_knobs, config_hash, knob_values, read_config

KNOBS = {env: f for env, (_, f) in all_knobs().items()}

# The command line that the challenge's README publishes, and every default that its script spells out.
PUBLISHED = {
    "RUN_ID": "baseline_sp1024", "DATA_PATH": "./data/datasets/fineweb10B_sp1024/",
    "TOKENIZER_PATH": "./data/tokenizers/fineweb_1024_bpe.model", "VOCAB_SIZE": "1024",
}  # fmt: skip
BASELINE = PUBLISHED | {
    "NCCL_IB_DISABLE": "1", "MAX_WALLCLOCK_SECONDS": "600", "TRAIN_LOG_EVERY": "50", "VAL_LOSS_EVERY": "200",
    "NUM_LAYERS": "9", "MODEL_DIM": "512", "NUM_HEADS": "8", "NUM_KV_HEADS": "4", "MLP_MULT": "2",
    "TIE_EMBEDDINGS": "1", "TIED_EMBED_LR": "0.05", "TRAIN_BATCH_TOKENS": "524288", "TRAIN_SEQ_LEN": "1024",
    "ITERATIONS": "20000", "WARMDOWN_ITERS": "1200", "WARMUP_STEPS": "20", "QK_GAIN_INIT": "1.5",
    "ROPE_BASE": "10000", "LOGIT_SOFTCAP": "30", "EMBED_LR": "0.6", "HEAD_LR": "0.008", "MATRIX_LR": "0.04",
    "SCALAR_LR": "0.04", "MUON_MOMENTUM": "0.95", "MUON_BACKEND_STEPS": "5",
    "MUON_MOMENTUM_WARMUP_START": "0.85", "MUON_MOMENTUM_WARMUP_STEPS": "500", "BETA1": "0.9",
    "BETA2": "0.95", "ADAM_EPS": "1e-8",
    "GRAD_CLIP_NORM": "0.0", "VAL_BATCH_SIZE": "524288",
}  # fmt: skip


def of_kind(kind: type) -> list[str]:
    return [env for env, f in KNOBS.items() if type(f.default) is kind]


def bounds(side: int) -> list[tuple[str, float]]:
    found = [(env, f.metadata["within"][side]) for env, f in KNOBS.items()]
    return [(env, bound) for env, bound in found if bound is not None]


def read_one(env: str, text: str) -> object:
    return train_gpt.read_knob(KNOBS[env], {env: text})


# --------------------------------------------------------------------------------------
# One knob
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", of_kind(bool))
def test_boolean_is_read_in_every_spelling(env):
    assert [read_one(env, t) for t in ("1", "true", "YES", "On", " 1 ")] == [True] * 5
    assert [read_one(env, t) for t in ("0", "False", "no", "OFF", "0\n")] == [False] * 5
    for text in ("2", "y", "", "enabled"):
        with pytest.raises(UserError, match=rf"{env}=.* is not allowed; want 0 or 1 "):
            read_one(env, text)


@pytest.mark.parametrize("env", of_kind(int))
def test_whole_number_is_nothing_else(env):
    value = read_one(env, f" {KNOBS[env].default} ")
    assert (value, type(value)) == (KNOBS[env].default, int)
    for text in ("1.5", "1e3", "nine", "", "0x10", "nan", "1 2"):
        with pytest.raises(UserError, match=f"{env}='"):
            read_one(env, text)


@pytest.mark.parametrize("env", of_kind(float))
def test_number_is_finite(env):
    value = read_one(env, f"{KNOBS[env].default}")
    assert (value, type(value)) == (KNOBS[env].default, float)
    for text in ("nan", "inf", "-inf", "1e999", "1,5", "", "one"):
        with pytest.raises(UserError, match=f"{env}='{text}' is not allowed; want a number"):
            read_one(env, text)


@pytest.mark.parametrize(("env", "low"), bounds(0))
def test_least_value_is_allowed_and_the_one_below_is_not(env, low):
    below = low - 1 if type(KNOBS[env].default) is int else math.nextafter(low, -math.inf)
    assert read_one(env, str(low)) == low
    with pytest.raises(UserError, match=f"{env}='{below}' is not allowed; want .*>= {low}"):
        read_one(env, str(below))


@pytest.mark.parametrize(("env", "high"), bounds(1))
def test_greatest_value_is_allowed_and_the_one_above_is_not(env, high):
    above = high + 1 if type(KNOBS[env].default) is int else math.nextafter(high, math.inf)
    assert read_one(env, str(high)) == high
    with pytest.raises(UserError, match=f"{env}='{above}' is not allowed; want .*<= {high}"):
        read_one(env, str(above))


@pytest.mark.parametrize("env", [env for env, f in KNOBS.items() if f.metadata["choices"]])
def test_choice_is_one_of_its_list(env):
    choices = KNOBS[env].metadata["choices"]
    assert [read_one(env, str(c)) for c in choices] == list(choices)
    other = str(max(choices) + 1) if type(choices[0]) is int else choices[0] + "x"
    first = re.escape(train_gpt.shown(choices[0]))
    with pytest.raises(UserError, match=f"{env}='{other}' is not allowed; want {first} or "):
        read_one(env, other)


@pytest.mark.parametrize("env", KNOBS)
def test_default_is_among_the_allowed_values(env):
    assert read_one(env, knob_values(Config())[env]) == KNOBS[env].default


def test_every_field_has_a_variable_of_its_own():
    fields = [f for s in dataclasses.fields(Config) for f in dataclasses.fields(s.default_factory)]
    assert len(KNOBS) == len(fields)
    assert all(f.metadata["env"].isupper() for f in fields)


def test_empty_environment_is_the_defaults():
    assert read_config({}) == Config()


# --------------------------------------------------------------------------------------
# Rules that span knobs
# --------------------------------------------------------------------------------------

# (a broken combination, the least change that mends it, words of the message)
RULES = [
    ({"MODEL_DIM": 510}, {"MODEL_DIM": 528}, "NUM_HEADS=8 does not divide MODEL_DIM=510"),
    ({"NUM_KV_HEADS": 3}, {"NUM_KV_HEADS": 8}, "NUM_KV_HEADS=3 does not divide NUM_HEADS=8"),
    ({"NUM_HEADS": 512}, {"NUM_HEADS": 256}, "MODEL_DIM/NUM_HEADS=1 is odd"),
    ({"MLP_MULT": 0.01, "MODEL_DIM": 64}, {"MODEL_DIM": 112}, "MLP_MULT=0.01 leaves no hidden unit"),
    ({"TRAIN_SPANS": 7}, {"TRAIN_BATCH_TOKENS": 7168}, "TRAIN_SPANS=7 does not divide"),
    ({"TRAIN_SEQ_LEN": 1000}, {"DOC_PACKING": 1}, "TRAIN_SEQ_LEN=1000 does not divide the 65536"),
    ({"NUM_LOOPS": 1, "LOOP_END": 9}, {"LOOP_END": 8}, "LOOP_START=3, LOOP_END=9 want start <= end"),
    ({"NUM_LOOPS": 1, "LOOP_START": 6}, {"LOOP_END": 6}, "LOOP_START=6, LOOP_END=5 want"),
    ({"EVAL_STRIDE": 1025, "SLIDING_WINDOW_ENABLED": 1}, {"EVAL_STRIDE": 1024}, "EVAL_STRIDE=1025 is longer"),
    ({"SCORE": "sliding"}, {"SLIDING_WINDOW_ENABLED": 1}, "SCORE=sliding wants SLIDING_WINDOW_ENABLED=1"),
    ({"SAMPLE": 9}, {"EVAL_ONLY": 1}, "SAMPLE wants EVAL_ONLY=1"),
    ({"RESUME": 1}, {"RUN_ID": "x"}, "RESUME=1 wants RUN_ID or RUN_DIR"),
    ({"RESUME": 1}, {"RUN_DIR": "x"}, "RESUME=1 wants RUN_ID or RUN_DIR"),
]  # fmt: skip


def texts(env: dict) -> dict[str, str]:
    return {key: str(value) for key, value in env.items()}


@pytest.mark.parametrize(("broken", "mended", "words"), RULES)
def test_combination_is_refused_by_name_until_it_is_mended(broken, mended, words):
    with pytest.raises(UserError, match=words):
        read_config(texts(broken))
    read_config(texts(broken | mended))


def test_loop_bounds_do_not_matter_without_loops():
    assert not read_config({"NUM_LAYERS": "2"}).loop.on


def test_stride_does_not_matter_where_nothing_slides():
    assert read_config({"EVAL_SEQ_LEN": "32"}).eval_len == 32


def test_evaluation_context_is_the_training_context_unless_it_is_set():
    assert read_config({"TRAIN_SEQ_LEN": "128"}).eval_len == 128
    assert read_config({"TRAIN_SEQ_LEN": "128", "EVAL_SEQ_LEN": "2048"}).eval_len == 2048


# --------------------------------------------------------------------------------------
# Other names
# --------------------------------------------------------------------------------------


def test_alias_sets_the_knob_that_it_names():
    assert read_config({"VAL_BATCH_SIZE": "77"}) == read_config({"VAL_BATCH_TOKENS": "77"})
    assert read_config({"VAL_BATCH_SIZE": "77", "VAL_BATCH_TOKENS": "77"}).scoring.batch_tokens == 77


def test_two_names_of_one_knob_may_not_disagree():
    with pytest.raises(UserError, match="VAL_BATCH_SIZE='77' is another name of VAL_BATCH_TOKENS='78'"):
        read_config({"VAL_BATCH_SIZE": "77", "VAL_BATCH_TOKENS": "78"})


def test_every_alias_names_a_knob_or_the_reason_why_it_is_refused():
    assert not set(train_gpt.ALIASES) & set(KNOBS)
    assert all(new in KNOBS or new.startswith("refused: ") for new in train_gpt.ALIASES.values())


@pytest.mark.parametrize("old", [old for old, new in train_gpt.ALIASES.items() if new.startswith("refused")])
def test_abandoned_name_is_refused_with_the_reason(old):
    with pytest.raises(UserError, match=rf"{old}='1' is refused: .{{20,}}; unset it"):
        read_config({old: "1"})


# (published names, the same in ours)
SAME = [
    ({"BITNET_GROUP_SIZE": 64, "WARMDOWN_FRACTION": 0.2}, {"TERNARY_GROUP": 64, "WARMDOWN_FRAC": 0.2}),
    ({"SLIDING_EVAL": 1, "SLIDING_EVAL_STRIDE": 16}, {"SLIDING_WINDOW_ENABLED": 1, "EVAL_STRIDE": 16}),
    ({"PARTIAL_ROPE_DIMS": 16, "SMEAR": 1}, {"ROPE_DIMS": 16, "SMEAR_GATE_ENABLED": 1}),
    ({"MTP_HEADS": 2}, {"MTP_NUM_HEADS": 2}),
    ({"FP_STORAGE": "FP8"}, {"EMBED_CODEC": "fp8"}),
    ({"FP_STORAGE": "1"}, {"EMBED_CODEC": "fp8"}),
    ({"FP_STORAGE": "FP4"}, {"EMBED_CODEC": "fp4"}),
    ({"FP_STORAGE": 0}, {"EMBED_CODEC": "int", "EMBED_BITS": 16}),
    ({"ACTIVATION": "relu2"}, {"MLP_NEGATIVE_SLOPE": 0}),
    ({"ACTIVATION": "relu2", "LEAKY_RELU_SLOPE": 0.3}, {"MLP_NEGATIVE_SLOPE": 0}),
    ({"ACTIVATION": "lrelu2"}, {"MLP_NEGATIVE_SLOPE": 0.5}),
    ({"ACTIVATION": "lrelu2", "LEAKY_RELU_SLOPE": 0.3}, {"MLP_NEGATIVE_SLOPE": 0.3}),
    ({"LEAKY_RELU_SLOPE": 0.3}, {"MLP_NEGATIVE_SLOPE": 0.3}),
    ({"ACTIVATION": "lrelu2", "MLP_NEGATIVE_SLOPE": "0.50"}, {"MLP_NEGATIVE_SLOPE": 0.5}),
    ({"DIFF_ATTN": 0, "REFINER": "off", "REFINER_KERNEL": 3, "UNTIE_AT_FRACTION": "0.00"}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("published", "ours"), SAME, ids=str)
def test_published_name_says_what_ours_says(published, ours):
    assert read_config(texts(published)) == read_config(texts(ours))
    assert train_gpt.near_misses(texts(published)) == []


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"FP_STORAGE": "fp16"}, "FP_STORAGE='fp16' is not here; want 0 or fp8 or 1 or fp4"),
        ({"ACTIVATION": "swiglu"}, "ACTIVATION='swiglu' is not here; want relu2 or lrelu2"),
        ({"FP_STORAGE": "fp8", "EMBED_CODEC": "int"}, "FP_STORAGE='fp8' says EMBED_CODEC=fp8, not 'int'"),
        ({"ACTIVATION": "relu2", "MLP_NEGATIVE_SLOPE": 0.5}, "MLP_NEGATIVE_SLOPE=0, not '0.5'"),
        ({"LEAKY_RELU_SLOPE": 0.1, "MLP_NEGATIVE_SLOPE": 0.5}, "MLP_NEGATIVE_SLOPE=0.1, not '0.5'"),
    ],
)
def test_published_name_that_says_something_else_is_refused(env, words):
    with pytest.raises(UserError, match=words):
        read_config(texts(env))


@pytest.mark.parametrize("name", [name for name, (taken, _) in train_gpt.NOT_HERE.items() if taken])
def test_what_is_not_here_is_taken_only_where_it_is_off(name):
    taken, why = train_gpt.NOT_HERE[name]
    assert read_config({name: taken}) == Config()
    assert train_gpt.near_misses({name: taken}) == []
    with pytest.raises(UserError, match=f"{name}='2' is refused: {why}; want {name}={taken}, or unset it"):
        read_config({name: "2"})


def test_published_names_are_told_apart():
    """A name that would be read twice would be read differently."""
    names = [*KNOBS, *train_gpt.ALIASES, *train_gpt.DERIVING, *train_gpt.WITHOUT_EFFECT, *train_gpt.NOT_HERE]
    assert len(set(names)) == len(names)


def test_mistyped_knob_is_named_with_what_was_meant():
    assert train_gpt.near_misses({"MODEL_DIMS": "1"}) == ["MODEL_DIMS is not a knob; did you mean MODEL_DIM?"]
    assert train_gpt.near_misses({"NUM_LAYER": "1"}) == ["NUM_LAYER is not a knob; did you mean NUM_LAYERS?"]
    assert train_gpt.near_misses({"MUON_COLOUR": "1"}) == ["MUON_COLOUR is not a knob; --knobs lists them"]


def test_name_that_changes_nothing_is_accepted_with_a_warning():
    for name in train_gpt.WITHOUT_EFFECT:
        (line,) = train_gpt.near_misses({name: "1"})
        assert line.startswith(f"{name} is accepted but has no effect: ")
        assert read_config({name: "1"}) == Config()


def test_variables_of_other_programs_are_left_alone():
    others = (
        "PATH HOME LANG USER SHELL PWD TMPDIR LD_LIBRARY_PATH VIRTUAL_ENV PYTHONPATH CUDA_VISIBLE_DEVICES "
        "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT NCCL_NET NCCL_DEBUG "
        "OMP_NUM_THREADS MKL_NUM_THREADS TORCHINDUCTOR_CACHE_DIR TORCH_LOGS TORCHELASTIC_RUN_ID"
    )
    assert train_gpt.near_misses(dict.fromkeys(others.split(), "1")) == []
    assert read_config(dict.fromkeys(others.split(), "1")) == Config()


def test_knobs_and_aliases_raise_no_doubt():
    assert train_gpt.near_misses(dict.fromkeys([*KNOBS, *train_gpt.ALIASES], "1")) == []


def test_strict_run_stops_at_a_doubt_before_it_writes_anything(tmp_path):
    env = {"STRICT": "1", "MODEL_DIMS": "64", "RUN_DIR": str(tmp_path / "run")}
    with pytest.raises(UserError, match="did you mean MODEL_DIM"):
        train_gpt.run(env)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------
# Config -> text and back
# --------------------------------------------------------------------------------------


RUNGS = ["MATRIX_BITS=5", "EMBED_BITS=2", "MLP_CLIP_SIGMAS=14.5", "EMBED_CLIP_SIGMAS=1e1", "LQER_ENABLED=0"]


def values(f: dataclasses.Field) -> st.SearchStrategy:
    """Texts of valid values of one knob; numbers near the bounds and far from them."""
    low, high = f.metadata["within"]
    if f.metadata["choices"]:
        return st.sampled_from(f.metadata["choices"]).map(str)
    if isinstance(f.default, bool):
        return st.sampled_from(sorted(train_gpt.TRUTH))
    if isinstance(f.default, int):
        return st.integers(low, high).map(str)
    if isinstance(f.default, float):
        return st.floats(low, high, allow_nan=False, allow_infinity=False).map(repr)
    if f.metadata["env"] == "SIZE_LADDER":
        return st.lists(st.sampled_from(RUNGS), max_size=4).map(",".join)
    return st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


BOUND = {  # by a rule that spans knobs
    "MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS", "MLP_MULT", "NUM_LAYERS", "NUM_LOOPS", "LOOP_START", "LOOP_END",
    "TRAIN_BATCH_TOKENS", "TRAIN_SPANS", "TRAIN_SEQ_LEN", "EVAL_SEQ_LEN", "EVAL_STRIDE", "SCORE", "RESUME",
    "SAMPLE", "ROPE_DIMS", "ROPE_YARN", "GATE_WINDOW", "VE_LAYERS", "BIGRAM_VOCAB_SIZE",
    "PARALLEL_START_LAYER", "TURBO_QUANT_TRAIN", "TURBO_QUANT_EXPORT", "TERNARY_GROUP",
    "MOE_ENABLED", "MOE_NUM_EXPERTS", "MOE_TOP_K", "MOE_LAYER_FRAC", "MATRIX_OPTIMIZER", "HEAD_LR_MULT",
    "HELD_OUT_TOKENS", "EXPORT_ALIGNED_TRAIN", "TERNARY_NOISE_SCALE", "TERNARY_THRESHOLD_SEARCH",
    "TERNARY_SCALE_SEARCH", "TERNARY_THRESHOLD_LOW", "TERNARY_THRESHOLD_HIGH",
    "TERNARY_SCALE_MULT_LOW", "TERNARY_SCALE_MULT_HIGH",
}  # fmt: skip
FREE = sorted(set(KNOBS) - BOUND)


@st.composite
def environments(draw) -> dict[str, str]:
    """Any value of the knobs that no rule binds, and sizes that keep the rules."""
    env = draw(st.fixed_dictionaries({}, optional={name: values(KNOBS[name]) for name in FREE}))
    kv, groups, pairs = (draw(st.integers(1, 6)) for _ in range(3))
    sizes = {"NUM_KV_HEADS": kv, "NUM_HEADS": kv * groups, "MODEL_DIM": 2 * pairs * kv * groups}
    sizes |= {"NUM_LAYERS": draw(st.integers(7, 20)), "NUM_LOOPS": draw(st.integers(0, 3))}
    length, spans = draw(st.integers(64, 256)), draw(st.integers(1, 9))
    sizes |= {"TRAIN_SEQ_LEN": length, "TRAIN_SPANS": spans, "TRAIN_BATCH_TOKENS": length * spans * 3}
    sizes |= {"GATE_WINDOW": draw(st.integers(1, 2)), "VE_LAYERS": draw(st.sampled_from(["", "1", "0, 5"]))}
    sizes |= {"PARALLEL_START_LAYER": draw(st.sampled_from([0, sizes["NUM_LAYERS"] - 1]))}
    sizes |= {"ROPE_DIMS": 2 * draw(st.integers(0, pairs)), "BIGRAM_VOCAB_SIZE": 2 * draw(st.integers(0, 9))}
    sizes |= {"MOE_ENABLED": draw(st.integers(0, 1)), "MOE_TOP_K": draw(st.integers(1, 3))}
    sizes |= {"MATRIX_OPTIMIZER": "muon" if sizes["MOE_ENABLED"] else "adamw", "HEAD_LR_MULT": 0.95}
    turbo = draw(st.integers(0, 1))
    sizes |= {"TURBO_QUANT_TRAIN": turbo, "TURBO_QUANT_EXPORT": turbo}
    sizes |= {"TERNARY_GROUP": draw(st.sampled_from([1, 64] if turbo else [1, 96]))}
    return env | texts(sizes) | {"MLP_MULT": repr(draw(st.floats(1, 8)))}


@settings(max_examples=60)
@given(environments())
def test_changed_knobs_make_the_same_config_again(env):
    cfg = read_config(env)
    said = changed_knobs(cfg)
    assert read_config(said) == cfg
    assert set(said) <= set(env)
    assert read_config(knob_values(cfg)) == cfg


def another(env: str) -> object:
    """A value of a knob that is not its default, whatever the rules say."""
    f = KNOBS[env]
    if f.metadata["choices"]:
        return next(c for c in f.metadata["choices"] if c != f.default)
    return (not f.default) if isinstance(f.default, bool) else f.default + type(f.default)("1")


def with_knob(cfg: Config, env: str, value: object) -> Config:
    section, f = all_knobs()[env]
    changed = dataclasses.replace(getattr(cfg, section), **{f.name: value})
    return dataclasses.replace(cfg, **{section: changed})


@pytest.mark.parametrize("env", KNOBS)
def test_hash_names_every_knob_but_those_of_the_run(env):
    cfg = with_knob(Config(), env, another(env))
    assert set(changed_knobs(cfg)) == {env}
    assert (config_hash(cfg) == config_hash(Config())) == (all_knobs()[env][0] == "run")


def test_hash_does_not_depend_on_the_process():
    assert config_hash(Config()) == config_hash(read_config(knob_values(Config())))
    script = "import train_gpt; print(train_gpt.config_hash(train_gpt.Config()))"
    found = run_program([script], {"PYTHONHASHSEED": "7"}, program="-c")
    assert found.stdout.strip() == config_hash(Config())


def test_config_cannot_be_assigned():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.dim = 3


def test_tiny_environment_is_a_valid_config_of_small_numbers():
    cfg = read_config(tiny_env())
    assert cfg.budget.seconds == 0
    assert cfg.data.batch_tokens * cfg.budget.iterations < 10_000
    assert cfg.model.layers * cfg.model.dim**2 < 10_000
    assert (cfg.compute.dtype, cfg.compute.compiling) == ("float32", "0")


# --------------------------------------------------------------------------------------
# What users see
# --------------------------------------------------------------------------------------


def test_knob_table_has_a_row_for_every_knob():
    head, rule, *rows = train_gpt.knob_table().splitlines()
    assert (head, rule) == ("| knob | default | meaning | allowed |", "|---|---|---|---|")
    assert [row.split("`")[1] for row in rows] == list(KNOBS)
    cells = {row.split("`")[1]: [cell.strip() for cell in row.strip("|").split("|")] for row in rows}
    assert all(len(row) == 4 for row in cells.values())
    assert cells["STRICT"][1:] == ["0", "an unknown or mistyped knob is an error", "0 or 1"]
    assert cells["RUN_ID"][1::2] == ["(empty)", "text"]
    assert cells["NUM_LOOPS"][1::2] == ["0", "a whole number >= 0 and <= 16"]
    assert cells["MATRIX_BITS"][3] == "5 or 6 or 7 or 8 or 16"


def test_words_on_the_command_line_are_refused():
    with pytest.raises(UserError, match="unknown words '--help me'; want --knobs"):
        train_gpt.command({}, ["--help", "me"])


def test_built_program_keeps_its_knobs_and_hears_the_live_ones(monkeypatch):
    assert train_gpt.thawed({"SEED": "1", "MODEL_DIM": "65"}) == {"SEED": "1", "MODEL_DIM": "65"}
    frozen = {"MODEL_DIM": 64, "NUM_LAYERS": 9, "MLP_MULT": 2.0, "DOC_PACKING": True}
    monkeypatch.setattr(train_gpt, "FROZEN", frozen)
    monkeypatch.setattr(train_gpt, "LIVE", {"SEED": 5, "RUN_ID": ""})
    env = train_gpt.thawed({"MLP_MULT": "2", "DOC_PACKING": "yes", "HOME": "/"})  # 2 is 2.0
    assert (env["MODEL_DIM"], env["NUM_LAYERS"], env["SEED"], env["HOME"]) == ("64", "9", "5", "/")
    assert (env["DOC_PACKING"], env["RUN_ID"]) == ("1", "")
    assert train_gpt.thawed({"SEED": "1"})["SEED"] == "1"
    assert train_gpt.read_live(env) == {"SEED": 5, "RUN_ID": ""}
    with pytest.raises(UserError, match="SEED='-1' is not allowed"):
        train_gpt.read_live(env | {"SEED": "-1"})
    for name, text, held in (("MODEL_DIM", "65", "64"), ("NUM_LAYERS", "3", "9")):
        with pytest.raises(UserError, match=f"{name} is frozen to '{held}', the environment says '{text}'"):
            train_gpt.thawed({name: text})


# --------------------------------------------------------------------------------------
# The naive baseline's published command line
# --------------------------------------------------------------------------------------


def test_published_command_line_gives_a_config_without_doubts():
    assert train_gpt.near_misses(BASELINE) == []
    cfg = read_config(BASELINE)
    assert cfg.scoring.batch_tokens == 524_288
    assert (cfg.model.layers, cfg.model.dim, cfg.model.heads, cfg.model.kv_heads) == (9, 512, 8, 4)
    assert (cfg.data.span, train_gpt.micro_batches(cfg, 8), train_gpt.micro_batches(cfg, 1)) == (65_536, 1, 8)


def test_baseline_env_file_is_the_published_command_line():
    """Up to where a run reads and writes, and to codec and kernels, no variables of the published script."""
    cfg, want = read_config(read_env(ROOT / "records/baseline/env")), read_config(BASELINE)
    assert dataclasses.replace(cfg, run=want.run, export=want.export, compute=want.compute) == want
    codec = {"INT8_CLIP_PERCENTILE": 99.99984, "ROW_SCALE_FLOOR": 1 / 127}
    kernels = {"FUSED_CE_ENABLED": 0, "FUSED_MLP": 0}  # its loss and MLP are torch's own
    assert {env: float(text) for env, text in changed_knobs(cfg).items()} == codec | kernels


def test_published_command_line_runs_at_reduced_size(toy_data, tmp_path):
    small = {
        "NUM_LAYERS": "2", "MODEL_DIM": "16", "NUM_HEADS": "4", "NUM_KV_HEADS": "2",
        "TRAIN_BATCH_TOKENS": "256", "TRAIN_SEQ_LEN": "32", "ITERATIONS": "2", "WARMUP_STEPS": "1",
        "VAL_BATCH_SIZE": "4096",
        "VAL_MAX_TOKENS": "500", "EVAL_STRIDE": "32", "COMPILE": "0", "DTYPE": "float32",
    }  # fmt: skip
    run = run_program([], BASELINE | small | toy_data.env, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "runs/baseline_sp1024/model.ptz").exists()
    assert "warning" not in run.stdout + run.stderr


@pytest.mark.parametrize(
    ("env", "data", "tokenizer"),
    [
        ({}, "d/datasets/fineweb10B_sp1024", "d/tokenizers/fineweb_1024_bpe.model"),
        ({"VOCAB_SIZE": "8192"}, "d/datasets/fineweb10B_sp8192", "d/tokenizers/fineweb_8192_bpe.model"),
        ({"DATA_PATH": "here"}, "here", "d/tokenizers/fineweb_1024_bpe.model"),
        ({"TOKENIZER_PATH": "here"}, "d/datasets/fineweb10B_sp1024", "here"),
    ],
)
def test_published_folder_leads_to_shards_and_tokenizer(env, data, tokenizer):
    cfg = read_config({"DATA_DIR": "./d", **env})
    assert (cfg.run.data, cfg.run.tokenizer) == (data, tokenizer)


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("COMPRESSOR=pergroup", "COMPRESSOR=auto"),
        ("GPTQ_LITE_ENABLED=1", "TERNARY_CLIP_MODE=percentile"),
        ("GPTQ_LITE_ENABLED=0", "TERNARY_CLIP_MODE=none"),
        ("TERNARY_COMPRESS_BROTLI=1", "COMPRESSOR=auto"),
        ("TERNARY_COMPRESS_BROTLI=0", "COMPRESSOR=lzma"),
        *((f"EXPORT_MODE={m}", "MATRIX_CODEC=ternary") for m in
          ("ternary_lzma", "competition_ternary", "competition_gptq")),
        ("LZMA_PRESET=4", "COMPRESSOR=auto"),
    ],
)  # fmt: skip
def test_published_values_that_we_call_otherwise(published, ours):
    found, want = (read_config(dict([text.split("=")])) for text in (published, ours))
    assert found == want


def test_published_mode_that_is_another_is_refused():
    with pytest.raises(UserError, match="MATRIX_CODEC='gptq' is not allowed; want int or ternary"):
        read_config({"EXPORT_MODE": "gptq"})


@pytest.mark.parametrize(("trained", "shipped"), [(0, 1), (1, 0)])
def test_rotation_that_only_one_side_knows_is_refused_in_one_line(trained, shipped):
    with pytest.raises(UserError) as caught:
        read_config({"TURBO_QUANT_TRAIN": str(trained), "TURBO_QUANT_EXPORT": str(shipped)})
    assert str(caught.value) == (
        f"TURBO_QUANT_TRAIN={trained}, TURBO_QUANT_EXPORT={shipped}: what is trained would not be what "
        f"ships; set them alike"
    )


def test_rotation_of_a_group_that_no_hadamard_matrix_fits_is_refused():
    both = {"TURBO_QUANT_TRAIN": "1", "TURBO_QUANT_EXPORT": "1"}
    with pytest.raises(UserError, match=r"^TURBO_QUANT_TRAIN=1 wants a power of two, not TERNARY_GROUP=96$"):
        read_config(both | {"TERNARY_GROUP": "96"})
    assert read_config(both | {"TERNARY_GROUP": "1"}).export.ternary_group == 1


def test_codec_of_attention_and_mlp_is_that_of_matrices_unless_named():
    def found(**env: str) -> tuple[str, ...]:
        return read_config(env).export.codecs

    assert found() == ("int", "int", "int")
    assert found(MATRIX_CODEC="fp4") == ("fp4", "fp4", "int")
    assert found(MATRIX_CODEC="fp4", ATTN_CODEC="int") == ("int", "fp4", "int")
    assert found(MLP_CODEC="ternary", EMBED_CODEC="fp8") == ("int", "ternary", "fp8")


@pytest.mark.parametrize("env", ["MATRIX_CODEC", "ATTN_CODEC", "MLP_CODEC", "EMBED_CODEC"])
def test_any_ternary_codec_trains_through_the_quantiser_from_the_start(env):
    assert read_config({env: "ternary"}).qat_from_start
    assert not read_config({env: "fp8"}).qat_from_start
    assert not read_config({env: "ternary", "QAT_ENABLED": "0"}).qat_from_start
    assert not read_config({env: "ternary", "LATE_QAT_THRESHOLD": "0.5"}).qat_from_start


def test_score_tags_name_every_codec_of_matrices():
    def tag(**env: str) -> str:
        return train_gpt.scheme(read_config(env))

    assert tag() == "int8_rans"
    assert tag(MATRIX_BITS="16", MLP_CODEC="fp8") == "float16_fp8_rans"
    assert tag(MATRIX_CODEC="ternary", COMPRESSOR="lzma") == "ternary_lzma"
    assert tag(MLP_CODEC="ternary", MATRIX_BITS="6") == "int6_ternary_rans"
