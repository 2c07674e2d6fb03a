"""Output: the log that readers of this field know, one results file, and a trace that two programs share."""

import dataclasses
import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import train_gpt
from conftest import ROOT, run_program, tiny_env
from test_model import lone
from test_train import BRIEF, Run, run_here, try_here
from train_gpt import Journal, all_knobs, config_hash, knob_values, read_config

# What other people's log readers look for: `TAG val_loss:F val_bpb:F ...`; the last such line is the score.
F = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
SCORE_LINE = re.compile(rf"^\s*([\w-]+(?: [\w-]+)*)[ :]+val_loss[:=]\s*({F})[ ,]+val_bpb[:=]\s*({F})( .*)?$")
KNOBS = {"SLIDING_WINDOW_ENABLED": 1, "ITERATIONS": 12, "VAL_LOSS_EVERY": 5, "VAL_MAX_TOKENS": 0}
TAGS = {
    "pre_quant": ["pre-quantization post-ema"],
    "roundtrip": ["quantized", "final_int8_rans_roundtrip_exact"],
    "sliding": ["quantized_sliding_window", "final_int8_rans_sliding_window_exact"],
}  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory, toy_data) -> Run:
    """One whole run in a process of its own, started from another folder."""
    folder = tmp_path_factory.mktemp("program")
    env = tiny_env(**(BRIEF | toy_data.env | {"RUN_DIR": folder / "run", "VAL_BATCH_TOKENS": 8192} | KNOBS))
    done = run_program([], env, cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "run/stdout.txt").write_text(done.stdout)
    (folder / "run/stderr.txt").write_text(done.stderr)
    return Run(folder / "run", "")


def said(run: Run) -> list[tuple[str, str, str]]:
    """(tag, loss, bits per byte) of every line that a log reader takes for a score."""
    found = [SCORE_LINE.match(line) for line in run.read("train.log").splitlines()]
    return [match.groups()[:3] for match in found if match]


# --------------------------------------------------------------------------------------
# train.log
# --------------------------------------------------------------------------------------


def test_log_begins_with_the_whole_source(program):
    source = (ROOT / "train_gpt.py").read_text()
    assert program.read("train.log").startswith(source + "=" * 100 + "\nRunning Python 3.")
    assert program.log[1].startswith("Running PyTorch 2.")


def test_log_states_every_knob_and_which_were_changed(program):
    stated = [line.removeprefix("knob:").split("=", 1) for line in program.lines("knob:")]
    assert [name for name, _ in stated] == list(all_knobs())
    values = dict(stated)
    assert values["NUM_LAYERS"] == "3 (changed)"
    assert values["MATRIX_LR"] == "0.04"


def shown(scores: dict) -> list[tuple[str, str, str]]:
    rows = [(tag, scores[name]) for name, tags in TAGS.items() for tag in tags]
    return sorted((tag, f"{s['val_loss']:.8f}", f"{s['val_bpb']:.8f}") for tag, s in rows)


def test_scores_read_from_the_log_are_those_of_the_results(program):
    """Exactly: nothing else in the log, source included, looks like a score."""
    assert sorted(said(program)) == shown(program.results["scores"])


@pytest.mark.parametrize("score", ["roundtrip", "sliding"])
def test_last_score_of_the_log_is_the_declared_one(tmp_path, toy_data, score):
    run = run_here(tmp_path, toy_data, SLIDING_WINDOW_ENABLED=1, SCORE=score)
    tag, loss, bpb = said(run)[-1]
    declared = run.results["scores"][run.results["score"]]
    assert run.results["score"] == score
    assert tag == TAGS[score][-1]
    assert (loss, bpb) == (f"{declared['val_loss']:.8f}", f"{declared['val_bpb']:.8f}")
    others = {n: s for n, s in run.results["scores"].items() if n != score}
    assert all(f"{s['val_loss']:.8f}" != loss for s in others.values())


def test_score_reader_takes_the_lines_of_published_logs_and_no_others():
    taken = [
        "final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570",
        "quantized_ttt val_loss:2.79180191 val_bpb:1.08079352 eval_time:366525ms",
        "pre-quantization post-ema val_loss:2.80873254 val_bpb:1.08734790 eval_time:7440ms",
    ]
    left = [
        "step:200/20000 val_loss:2.0790 val_bpb:1.2281 train_time:574747ms step_avg:43.54ms",
        'f"{tag} val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}"',
    ]
    assert all(SCORE_LINE.match(line) for line in taken)
    assert not any(SCORE_LINE.match(line) for line in left)


DIALECT = [
    r"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=.*tokenizer\.model",
    r"train_loader:dataset:\S+ train_shards:2",
    r"val_loader:shards pattern=.*/fineweb_val_\*\.bin tokens:11999",
    r"model_params:32172",
    r"world_size:1 grad_accum_steps:1\b.*",
    r"attention_mode:gqa num_heads:4 num_kv_heads:2\b.*",
    r"tie_embeddings:True embed_lr:0\.05 head_lr:0\.0 matrix_lr:0\.04 scalar_lr:0\.04",
    r"train_batch_tokens:256 train_seq_len:32 iterations:12 warmup_steps:1 max_wallclock_seconds:0\.000",
    r"seed:1337\b.*",
    r"warmup_step:1/1\b.*",
    r"step:12/12 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
    r"step:10/12 val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
    r"peak memory allocated: [1-9]\d* MiB reserved: \d+ MiB",
    r"Code size: \d+ bytes",
    r"Serialized model quantized\+rans: \d+ bytes",
    r"Total submission size quantized\+rans: \d+ bytes",
    r"quantized val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8} eval_time:\d+ms",
    r"final_int8_rans_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}",
]


@pytest.mark.parametrize("line", DIALECT)
def test_line_of_the_baselines_dialect_stands_in_the_log_once(program, line):
    assert len([found for found in program.log if re.fullmatch(line, found)]) == 1


def test_validation_states_the_time_of_the_step_before_it(program):
    found = [re.match(r"step:10/12 (train|val)_loss:.* train_time:(\d+)ms", line) for line in program.log]
    (first, trained), (second, validated) = (match.groups() for match in found if match)
    assert (first, second) == ("train", "val")
    assert 0 < int(trained) <= int(validated)


def test_cap_that_stops_a_run_is_named(tmp_path, toy_data):
    run = run_here(tmp_path, toy_data, ITERATIONS=100_000, MAX_WALLCLOCK_SECONDS=0.3)
    (line,) = run.lines("stopping_early")
    milliseconds, steps = re.fullmatch(
        r"stopping_early: wallclock_cap train_time:(\d+)ms step:(\d+)/100000", line
    ).groups()
    assert int(milliseconds) == round(1000 * run.results["train_seconds"])
    assert int(steps) == run.results["steps"] == len(run.losses) >= 1


def test_word_zlib_stands_only_in_the_source(program):
    assert not any("zlib" in line for line in program.log)


def test_sizes_are_those_of_the_files(program):
    code = (ROOT / "train_gpt.py").stat().st_size
    model = (program.folder / "model.ptz").stat().st_size
    assert program.lines("Code size:") == [f"Code size: {code} bytes"]
    assert program.lines("Serialized model")[-1] == f"Serialized model quantized+rans: {model} bytes"
    (total,) = program.lines("Total submission size")
    assert total == f"Total submission size quantized+rans: {code + model} bytes"
    want = {"code": code, "model": model, "total": code + model, "limit": 16_000_000}
    assert program.results["bytes"] == want


def test_submission_over_the_limit_is_named(tmp_path, toy_data, monkeypatch):
    fits = run_here(tmp_path / "fits", toy_data)
    assert fits.lines("over_budget") == []
    monkeypatch.setattr(train_gpt, "SIZE_LIMIT", fits.results["bytes"]["total"] - 5)
    over = run_here(tmp_path / "over", toy_data)
    assert over.lines("over_budget")[0].startswith("over_budget: 5 bytes above ")


def test_log_on_the_terminal_is_that_of_the_file_without_source_knobs_and_tensors(program):
    quiet = [line for line in program.log if not line.startswith(("Running", "knob:", "tensor:"))]
    assert program.read("stdout.txt").splitlines() == quiet
    assert program.read("stderr.txt") == ""


def test_forecast_stands_before_the_first_step_and_the_projection_after_the_tenth(program):
    words = (
        "forecast: params:32172 artifact_bytes:",
        "warmup_step",
        "step:1/12 ",
        "step:10/12 train",
        "projected",
    )
    places = [next(i for i, line in enumerate(program.log) if line.startswith(word)) for word in words]
    assert places == sorted(places)
    assert places[4] == places[3] + 1
    assert " of 16000000 peak_tensor_memory:" in program.log[places[0]]
    assert [line.split()[0] for line in program.lines("projected")] == ["projected_steps:12"]


def test_memory_of_weights_and_moments_is_four_times_the_weights(tmp_path):
    """Weight, gradient, two moments; five with an average."""
    for factor, decay in ((4, 0.0), (5, 0.9)):
        cfg = read_config({"EMA_DECAY": str(decay)})
        world = dataclasses.replace(lone(), journal=Journal(tmp_path))
        train_gpt.log_plan(train_gpt.empty_model(cfg, world), cfg, world)
        (tmp_path / "train.log").rename(tmp_path / str(factor))
        held = 4 * factor * 17_059_912 / 2**20
        assert f"weights and moments {held:.0f}," in (tmp_path / str(factor)).read_text()


def test_final_table_tells_what_a_person_wants_to_know(program):
    table = [line for line in program.log if line.startswith("  ")]
    found = {line[2:34].strip(): line[34:].strip() for line in table}
    scores, results = program.results["scores"], program.results
    assert found["steps"] == "12"
    assert found["bits per byte, roundtrip"] == f"{scores['roundtrip']['val_bpb']:.4f}"
    assert found["bits per byte, sliding"] == f"{scores['sliding']['val_bpb']:.4f}"
    assert found["order-0 entropy of its tokens"] == f"{results['order0_bpb']:.4f}"
    assert found["bytes of weights"] == f"{results['bytes']['model']:,}"
    assert found["bytes left of 16,000,000"] == f"{16_000_000 - results['bytes']['total']:,}"
    assert program.log[-len(table) :] == table


def test_doubts_about_the_environment_stand_in_the_log(tmp_path, toy_data):
    run = run_here(tmp_path, toy_data, MODEL_DIMS=64, PHASED_TTT_ENABLED=1)
    assert "warning: MODEL_DIMS is not a knob; did you mean MODEL_DIM?" in run.read("train.log")
    assert "warning: PHASED_TTT_ENABLED is accepted but has no effect" in run.read("train.log")


def test_refusal_of_a_run_under_way_is_its_last_line(tmp_path, toy_data):
    run = try_here(tmp_path, toy_data, QK_GAIN_INIT=3e38, MAX_BAD_STEPS=2)
    assert run.error.startswith("2 steps were not finite")
    assert run.log[-1] == f"error: {run.error}"


# --------------------------------------------------------------------------------------
# results.json
# --------------------------------------------------------------------------------------

KEYS = {
    "run_id", "config", "config_hash", "seed", "world_size", "device", "versions", "steps", "train_tokens",
    "train_seconds", "tokens_per_second", "params", "scores", "bytes", "phases", "resumed", "skipped_steps",
    "compile_cache", "process_seconds", "tokenizer_bytes", "extra_files_imported", "system_binaries",
    "source_sha256", "step_seconds", "threads",
}  # fmt: skip


def test_results_have_every_key(program):
    results = program.results
    assert set(results) >= KEYS
    assert set(results["scores"]) == {"pre_quant", "roundtrip", "sliding"}
    assert set(results["bytes"]) == {"code", "model", "total", "limit"}
    assert set(results["versions"]) >= {"python", "torch", "numpy"}
    for score in results["scores"].values():
        assert set(score) == {"val_loss", "val_bpb", "tokens", "bytes", "seconds", "partial"}


def test_results_are_those_of_the_run(program, toy_data):
    results = program.results
    assert results["run_id"] == program.folder.name
    assert (results["seed"], results["world_size"], results["device"]) == (1337, 1, "cpu")
    assert (results["steps"], results["train_tokens"], results["params"]) == (12, 12 * 256, 32172)
    assert results["tokens_per_second"] == pytest.approx(12 * 256 / results["train_seconds"])
    assert 0 < results["train_seconds"] < results["process_seconds"]
    step = results["step_seconds"]
    assert 0 < step["fastest_tenth"] <= step["median"] < results["train_seconds"] / 6
    assert results["threads"] == train_gpt.torch.get_num_threads()
    assert (results["resumed"], results["skipped_steps"], results["compile_cache"]) == (False, 0, "none")
    assert results["tokenizer_bytes"]["bytes"] == toy_data.tokenizer.stat().st_size
    assert results["tokenizer_bytes"]["note"] == "not counted by precedent"
    assert (results["extra_files_imported"], results["system_binaries"]) == ([], [])
    source = (ROOT / "train_gpt.py").read_bytes()
    assert results["source_sha256"] == train_gpt.hashlib.sha256(source).hexdigest()


def test_config_of_the_results_makes_the_run_again(program):
    cfg = read_config(program.results["config"])
    assert knob_values(cfg) == program.results["config"]
    assert config_hash(cfg) == program.results["config_hash"]
    assert f"config_hash:{program.results['config_hash']}" in program.read("train.log")


def test_phases_are_a_ledger_of_the_whole_process(program):
    phases = {phase["name"]: phase["seconds"] for phase in program.results["phases"]}
    assert set(phases) >= {
        "warmup",
        "train",
        "validate",
        "checkpoint",
        "export",
        "eval_pre_quant",
        "eval_roundtrip",
    }
    assert all(seconds >= 0 for seconds in phases.values())
    assert program.results["train_seconds"] <= phases["train"]


def test_no_second_is_charged_to_two_phases():
    """Validation and checkpoints have lines of their own: they are not training."""
    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.time, "perf_counter", lambda: now[0])
        journal = Journal(None)
        with journal.phase("train"):
            now[0] += 10
            with journal.phase("validate"):
                now[0] += 3
            now[0] += 1
        with journal.phase("validate"):
            now[0] += 2
    assert journal.ledger == {"train": 11, "validate": 5}


def test_file_beside_the_program_that_it_imports_is_named(tmp_path, monkeypatch):
    module = ModuleType("helper")
    module.__file__ = str(tmp_path / "helper.py")
    (tmp_path / "helper.py").write_text("")
    before = train_gpt.foreign_files()
    monkeypatch.setitem(sys.modules, "helper", module)
    assert set(train_gpt.foreign_files()) - set(before) == {module.__file__}


# --------------------------------------------------------------------------------------
# trace.jsonl
# --------------------------------------------------------------------------------------

ROWS = (
    {"step", "loss", "lr", "ok"}, {"step", "val_loss"}, {"artifact_sha256"},
    {"score", "val_loss", "tokens", "bytes"},
)  # fmt: skip


def test_trace_holds_steps_validations_artifact_and_scores_and_no_more(program):
    kinds = [ROWS.index(set(row)) for row in program.trace]
    assert kinds == [0] * 5 + [1] + [0] * 5 + [1] + [0] * 2 + [2] + [3] * 3
    assert [row["step"] for row in program.trace if "loss" in row] == list(range(12))
    scores = {row["score"]: float.fromhex(row["val_loss"]) for row in program.trace if "score" in row}
    assert scores == {name: s["val_loss"] for name, s in program.results["scores"].items()}


def test_trace_is_equal_between_two_processes_in_two_folders(program, tmp_path, toy_data):
    again = run_here(tmp_path / "other", toy_data, VAL_BATCH_TOKENS=8192, RUN_ID="other", **KNOBS)
    assert again.read("trace.jsonl") == program.read("trace.jsonl")
    assert "/" not in program.read("trace.jsonl")


def test_losses_of_the_trace_are_those_of_the_log_unrounded(program):
    printed = [re.match(r"step:\d+/12 train_loss:(\S+)", line) for line in program.log]
    assert [match[1] for match in printed if match][:10] == [f"{loss:.4f}" for loss in program.losses[:10]]
    assert all(loss != round(loss, 4) for loss in program.losses)


# --------------------------------------------------------------------------------------
# The bar
# --------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Bar:
    """Stands for tqdm's bar: notes what it is told."""

    made = ()

    def __init__(self, total: int, **_):
        self.total, self.n, self.notes, self.lines, self.closed = total, 0, [], [], False
        Bar.made = (*Bar.made, self)

    def set_postfix_str(self, note: str, refresh: bool):
        self.notes.append(note)

    def update(self, more: int):
        self.n += more

    def write(self, text: str):
        self.lines.append(text)

    def close(self):
        self.closed = True


def test_terminal_with_tqdm_shows_a_bar_and_prints_through_it(tmp_path, toy_data, monkeypatch):
    monkeypatch.setattr(Bar, "made", ())
    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace(tqdm=Bar))
    monkeypatch.setattr(sys, "stdout", Terminal())
    run = run_here(tmp_path, toy_data)
    (bar,) = Bar.made
    assert (bar.total, bar.n, len(bar.notes), bar.closed) == (3, 3, 3, True)
    assert "tok/s" in bar.notes[0]
    assert any(line.startswith("step:3/3") for line in bar.lines)
    assert run.lines("step:3/3")


def test_terminal_without_tqdm_prints_lines(tmp_path, toy_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stdout", Terminal())
    run_here(tmp_path, toy_data)
    assert "step:3/3 train_loss" in sys.stdout.getvalue()


def test_pipe_gets_no_bar(tmp_path, toy_data, monkeypatch):
    monkeypatch.setattr(Bar, "made", ())
    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace(tqdm=Bar))
    run_here(tmp_path, toy_data)
    assert Bar.made == ()


def test_other_ranks_write_nothing(tmp_path, capsys):
    journal = Journal(None)
    journal.log("x")
    journal.trace(step=1)
    journal.progress(1, 2, "note")
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []
    Journal(tmp_path).trace(step=1, loss="0x1p0")
    assert json.loads(Path(tmp_path / "trace.jsonl").read_text()) == {"step": 1, "loss": "0x1p0"}
