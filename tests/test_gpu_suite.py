"""The GPU suite without a GPU: every line of it but CUDA's events runs here, and no figure is invented."""

import json
import subprocess
import sys
import textwrap
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train_gpt as tg
from conftest import ROOT, clean_env

sys.path.insert(0, str(ROOT / "tests/bench"))

import gpu_sections
import gpu_suite
import gpu_timing
import kernels

# --------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------


def suite(folder, *words, program=ROOT / "tests/bench/gpu_suite.py"):
    command = [sys.executable, str(program), "--out", str(folder), *words]
    done = subprocess.run(
        command, env=clean_env(), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    return done, gpu_suite.read_lines(folder / "gpu_suite.jsonl")


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    return *suite(folder, "--dry"), folder


def ends(rows: list[dict]) -> dict[str, str]:
    return {row["section"]: row["state"] for row in rows if row.get("state", "begun") != "begun"}


def test_dry_run_is_whole(dry):
    """Every section ends by itself and says something, no case fails, and one child is enough."""
    done, rows, _ = dry
    assert done.returncode == 0, done.stdout + done.stderr
    assert ends(rows) == dict.fromkeys(gpu_suite.BOXES, "done")
    assert [row for row in rows if "error" in row] == []
    for name in gpu_suite.BOXES:
        assert any("measured" in row for row in rows if row["section"] == name), name
    assert [row["section"] for row in rows].count("machine") == 1
    aimed = [row for row in rows if "aim" in row and row["section"] == "correctness"]
    assert len(aimed) > 20
    assert {gpu_suite.verdict(row | {"dry": False}, "") for row in aimed} == {"met"}


def test_every_dry_line_says_so_and_the_table_has_no_number_of_it(dry):
    done, rows, folder = dry
    assert all(row["dry"] for row in rows)
    table = (folder / "gpu_suite.md").read_text()
    assert "dry run, no GPU: not measured" in table
    assert table == gpu_suite.render(rows)
    assert table in done.stdout
    cells = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    cells = [row for row in cells if row[0] != "| what"]
    assert len(cells) > 100
    assert {row[3] for row in cells} == {"dry"}
    measured = [row for row in rows if row.get("measured") is not None]
    assert sum(row[2] == "not measured" for row in cells) == len(measured) > 100


def test_all_aims_of_the_plan_are_held(dry):
    """Figures of the plan's table, by section."""
    aims = {}
    for row in (row for row in dry[1] if "aim" in row):
        aims.setdefault(row["section"], set()).add(tuple(row["aim"]))
    h200 = "H200"
    assert aims == {
        "correctness": {("<=", 1e-5), ("<=", 3e-3), ("<=", 5e-3), ("<=", 0), ("<=", 0.01)},
        "cross_entropy": {("<=", 0.60, h200), ("<=", 1.2), (">=", 1.5), (">=", 10.0)},
        "mlp": {("<=", 1.45, h200), (">=", 0.72), (">=", 1.1)},
        "muon": {(">=", 0.5), ("<=", 0.2, h200)},
        "training": {(">=", 1.15e6, h200), (">=", 0.80e6, h200), (">=", 0.38), ("<=", 0)},
        "artifact": {("<=", 3.0)},
    }


def test_sections_are_chosen_by_name_and_keep_their_order(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(gpu_suite, "run_sections", lambda names, *rest: asked.append((names, rest[1])))
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--out", str(tmp_path), "--only", "training", "mlp"])
    assert gpu_suite.main() == 0
    assert asked == [(["mlp", "training"], [])]
    command = gpu_suite.read_lines(tmp_path / "gpu_suite.jsonl")[0]["command"]
    assert command == "python tests/bench/gpu_suite.py --only training mlp"


def test_boxes_fit_in_eight_minutes():
    assert sum(gpu_suite.BOXES.values()) <= 480
    assert list(gpu_suite.SECTIONS) == list(gpu_suite.BOXES)
    assert gpu_suite.WHOLE < 9 * 60


PLANTED = """
    import os, sys, time
    sys.path[:0] = [{bench!r}, {root!r}]
    import gpu_suite

    def raising(bench):
        bench.row("before it", 1.0, "ms")
        raise ValueError("first line\\nplanted fault")

    def hanging(bench):
        bench.row("before it hangs", 2.0, "ms")
        time.sleep(60)

    def late(bench):
        bench.deadline = time.monotonic() - 1
        bench.want_time("the rest")

    def hasty(bench):
        bench.left_out.append("the slow one")

    def broken(bench):
        bench.place.synchronize = lambda: 1 / 0
        raise ValueError("the device is lost")

    def falling(bench):
        os._exit(7)

    def good(bench):
        bench.row("after all of them", 3.0, "ms", aim=["<=", 4.0])

    functions = (raising, hanging, late, hasty, broken, falling, good)
    gpu_suite.SECTIONS = {{f.__name__: gpu_suite.Section(1.0, lambda f=f: f) for f in functions}}
    sys.exit(gpu_suite.main())
"""


def test_a_section_that_goes_wrong_is_a_result_and_the_rest_still_run(tmp_path):
    program = tmp_path / "planted.py"
    program.write_text(textwrap.dedent(PLANTED.format(bench=str(ROOT / "tests/bench"), root=str(ROOT))))
    done, rows = suite(tmp_path, "--dry", program=program)
    assert done.returncode == 1
    states = {"raising": "raised", "hanging": "cut", "late": "cut", "hasty": "cut", "broken": "raised"}
    states |= {"falling": "fell", "good": "done"}
    assert ends(rows) == states
    errors = {row["section"]: row.get("error") for row in rows if row.get("state", "begun") != "begun"}
    assert errors["raising"] == "ValueError: planted fault"
    assert errors["hanging"] == "its box of 1 s was over"
    assert errors["late"] == "not measured any more: the rest"
    assert errors["hasty"] == "left out: the slow one"
    assert errors["falling"].startswith("its process ended with status 7")
    assert [row["section"] for row in rows].count("machine") == 4  # anew after hanging, broken and falling
    said = [row["what"] for row in rows if "what" in row]
    assert said == ["before it", "before it hangs", "after all of them"]
    table = (tmp_path / "gpu_suite.md").read_text()
    assert "raised after 0.0 s: ValueError: planted fault" in table
    assert "cut: its box of 1 s was over" in table


# --------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------

MACHINE = {"section": "machine", "device": "NVIDIA H200 (140 GiB)", "driver": "580", "cuda": "13.0",
           "torch": "2.11", "triton": "3.6", "python": "3.12", "source": "abcd", "date": "2026-11-21 10:00"}


def lines(*rows: dict, run: str = "1", **machine: object) -> list[dict]:
    command = {"section": "command", "command": "python tests/bench/gpu_suite.py"}
    return [row | {"run": run} for row in (command, MACHINE | machine, *rows)]


def row(**more: object) -> dict:
    return {"section": "mlp", "what": "a case", "measured": 1.5, "unit": "ms"} | more


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (row(aim=["<=", 1.6]), "| a case | <= 1.6 | 1.5 ms | met | - | - | - |"),
        (row(aim=["<=", 1.4]), "| a case | <= 1.4 | 1.5 ms | missed | - | - | - |"),
        (row(aim=[">=", 1.4]), "| a case | >= 1.4 | 1.5 ms | met | - | - | - |"),
        (row(aim=[">=", 1.6]), "| a case | >= 1.6 | 1.5 ms | missed | - | - | - |"),
        (row(aim=[">=", 1.6], measured=float("nan")), "| a case | >= 1.6 | nan ms | missed | - | - | - |"),
        (row(aim=["<=", 1.6], measured=float("nan")), "| a case | <= 1.6 | nan ms | missed | - | - | - |"),
        (row(aim=["<=", 1.6, "H200"]), "| a case | <= 1.6 (H200) | 1.5 ms | met | - | - | - |"),
        (row(aim=["<=", 1.6, "B300"]), "| a case | <= 1.6 (B300) | 1.5 ms | no B300 | - | - | - |"),
        (row(spread=[1, 1234.5], n=20, note="a|b"), "| a case | - | 1.5 ms | - | 1 to 1,234 | 20 | a/b |"),
        (row(measured=None, error="KeyError"), "| a case | - | KeyError | failed | - | - | - |"),
        (row(measured=None, missing="not there"), "| a case | - | not there | not here | - | - | - |"),
        (row(measured=4.1e12, unit="B/s"), "| a case | - | 4.1 TB/s | - | - | - | - |"),
    ],
)
def test_verdicts(found, said):
    assert said in gpu_suite.render(lines(found)).splitlines()


def test_table_says_what_ran_where_and_what_did_not():
    table = gpu_suite.render(lines(row(), {"section": "mlp", "state": "done", "seconds": 3.2}))
    assert (
        "Run 1: NVIDIA H200 (140 GiB), driver 580, CUDA 13.0, torch 2.11, triton 3.6, Python 3.12, source "
        "abcd, 2026-11-21 10:00; `python tests/bench/gpu_suite.py`." in table
    )
    assert "done after 3.2 s (box 60 s)." in table
    assert "Not run: ceilings, correctness, cross_entropy, attention, muon, training, artifact." in table


def test_a_dry_line_neither_hides_nor_becomes_a_measurement():
    real = lines(row(), run="1")
    later = [r | {"dry": True} for r in lines(row(measured=9.0), run="2", device="CPU")]
    assert gpu_suite.render(real + later) == gpu_suite.render(real)


def test_the_last_run_of_a_section_counts():
    table = gpu_suite.render(lines(row(measured=7.0), run="1") + lines(row(measured=8.0), run="2"))
    assert "| a case | - | 8 ms |" in table
    assert "7 ms" not in table
    assert table.count("Run ") == 1


def test_without_lines_there_is_nothing_to_say():
    assert gpu_suite.render([]) == "Not run on a GPU.\n\n    python tests/bench/gpu_suite.py\n"


# --------------------------------------------------------------------------------------
# What is counted
# --------------------------------------------------------------------------------------


def recipe(**knobs) -> tg.Config:
    env = gpu_timing.read_env(ROOT / "records/r1855/env")
    return tg.read_config(env | {name: str(value) for name, value in knobs.items()})


@pytest.mark.parametrize(
    ("loops", "context", "millions"),
    [(0, 600, 263), (2, 600, 392), (0, 400, 247), (0, 1024, 296), (2, 400, 368), (2, 1024, 444)],
)
def test_flops_a_token_are_those_of_the_published_runs(loops, context, millions):
    """11 passes before looping, 17 after, at three contexts."""
    assert round(gpu_timing.flops_per_token(recipe(), loops, context) / 1e6) == millions


def test_newton_schulz_flops_are_those_of_its_products():
    from torch.utils.flop_counter import FlopCounterMode

    for shape in ((8, 24), (24, 8), (16, 16)):
        with FlopCounterMode(display=False) as counted:
            tg.polar_express(torch.randn(1, *shape), 3)
        assert gpu_sections.newton_schulz_flops(*shape, 3) == counted.get_total_flops()


def test_context_of_documents_is_their_own():
    docs = torch.tensor([0, 3, 4, 6, 6, 6], dtype=torch.int32)
    assert gpu_timing.mean_context(docs) == pytest.approx((1 + 2 + 3 + 1 + 1 + 2) / 6)


def test_drawn_documents_vary_around_their_mean():
    tokens = gpu_timing.draw_row(98304, 8192, 600, 0)
    lengths = torch.from_numpy((tokens[:-1] == tg.BOS).nonzero()[0]).diff().double()
    assert len(tokens) == 98305 and 500 < lengths.mean() < 700 and lengths.std() > 300
    assert tokens.min() >= 1 and tokens.max() < 8192


# --------------------------------------------------------------------------------------
# Launches, and what CUDA alone does
# --------------------------------------------------------------------------------------


class Launches:
    """In the place of a Triton kernel: takes down what it is launched with."""

    def __init__(self) -> None:
        self.calls = []

    def __getitem__(self, grid):
        def launch(*args, **options):
            shapes = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]
            self.calls.append((grid, shapes, options))

        return launch


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("vocab", [37, 1024, 5003, 8192, 16384])
def test_timed_launch_is_the_operators(monkeypatch, vocab, fast):
    """The kernel alone is launched with the block and the warps that training gives it."""
    kernel = Launches()
    monkeypatch.setattr(tg, "runs_triton", lambda t: True)
    monkeypatch.setattr(tg, "one_pass_kernel", lambda: kernel)
    logits, targets = torch.randn(3, vocab), torch.zeros(3, dtype=torch.int64)
    kernels.one_pass_in_place(logits, targets, fast)
    tg.one_pass_operator()(torch.randn(3, 2), torch.randn(vocab, 2), targets, kernels.CAP, fast)
    assert kernel.calls[0] == kernel.calls[1]


class Unreal(gpu_timing.Host):
    """A GPU of real size without any memory: fake tensors, on which everything runs but the kernels.

    They are named the CPU's: without CUDA torch cannot differentiate what is named CUDA's.
    """

    real = True

    def __init__(self) -> None:
        super().__init__()
        self.cases = []

    def compile(self, function):
        return function

    def queue(self, case, cold=True):
        case.prepare()
        self.cases.append(case.run())
        return lambda: 1.0


@pytest.fixture
def unreal(monkeypatch):
    """(bench maker, rows, launches), while tensors have shapes only."""
    kernel, rows = Launches(), []
    monkeypatch.setattr(gpu_timing, "ROUNDS", 1)
    monkeypatch.setattr(tg, "softcapped_nll", lambda *args, fast: tg.softcapped_nll_ref(*args))  # asks data
    monkeypatch.setattr(tg, "runs_triton", lambda t: True)
    monkeypatch.setattr(tg, "takes_descriptors", lambda a, b: True)
    monkeypatch.setattr(tg, "one_pass_kernel", lambda: kernel)
    monkeypatch.setattr(tg, "squared_kernels", lambda: (kernel, kernel))
    monkeypatch.setattr(tg, "descriptors", lambda tensors, blocks: list(tensors))
    with FakeTensorMode():
        yield lambda name: gpu_timing.Bench(name, Unreal(), 60.0, rows.append), rows, kernel


SIZED = [gpu_sections.ceilings, kernels.cross_entropy, kernels.mlp, gpu_sections.muon]


@pytest.mark.parametrize("section", SIZED)
def test_sections_at_their_real_sizes(unreal, section):
    """Shapes, dtypes and names of a GPU's run; no case fails, and the aims are at the shapes they are for."""
    make, rows, kernel = unreal
    section(make(section.__name__))
    assert [r for r in rows if "error" in r] == []
    whats = {r["what"]: r for r in rows}
    if section is kernels.cross_entropy:
        assert whats["one_pass 65,536 x 8,192"]["aim"] == ["<=", 0.60, "H200"]
        assert "aim" not in whats["one_pass 98,304 x 8,192"]
        assert whats["one_pass 98,304 x 8,192: over the bytes' time"]["aim"] == ["<=", 1.20]
        assert {"two_pass 65,536 x 1,024", "two_pass 10,496 x 50,304"} <= whats.keys()
        assert "one_pass 10,496 x 50,304" not in whats
        assert "one_pass with its head, 98,304 x 512 x 8,192" in whats
        counts = {"one_pass": "2,147 GB/s, 50 %", "two_pass": "3,221 GB/s, 75 %"}  # 4 and 6 bytes, in 1 ms
        for form, count in counts.items():
            assert f"; {count} of the copy's" in whats[f"{form} 65,536 x 8,192"]["note"]
        assert whats["two_pass 65,536 x 8,192: over the bytes' time"]["measured"] == pytest.approx(2.0)
        assert ((98304,), [(98304, 8192), (98304,), (98304,), 8192, 30.0, 8192, False]) in [
            call[:2] for call in kernel.calls
        ]
    if section is kernels.mlp:
        assert whats["by_tma 65,536 x 512 x 2,048"]["aim"] == ["<=", 1.45, "H200"]
        assert whats["by_tma 65,536 x 512 x 2,048"]["note"] == "825 TFLOP/s"  # in a millisecond
        assert {len(call[1]) for call in kernel.calls} == {13}
    if section is gpu_sections.muon:
        assert whats["polar_express x5, all stacks"]["note"] == "373 TFLOP/s"
        ternary = whats["ternary fake_quant of 73,924,608 weights, compiled"]
        assert ternary["note"] == "444 GB/s, 10 % of the copy's"  # 6 bytes a weight


def test_training_is_reported_by_the_clock_against_both_rates():
    """Three steps of 786,432 tokens in 1.5 s, of which one was not finite."""
    rows, figures = [], [torch.tensor([5.0 - i, 1.0, float(i != 1)]) for i in range(3)]
    bench = gpu_timing.Bench("training", gpu_timing.Host(), 60.0, rows.append)
    bench.limits = {"bytes": 4e12, "flops": 790e12}
    found = gpu_sections.Stretch([400.0, 450.0, 600.0], 1.5, figures, 60.0)
    speed = gpu_sections.report_training(bench, "ours", recipe(), 0, 600.0, found)
    assert speed == pytest.approx(3 * 786_432 / 1.5)
    said = {r["what"].split(": ")[1]: r for r in rows}
    assert said["MFU of 989 TFLOP/s"]["measured"] == pytest.approx(262.8e6 * speed / 989e12, rel=1e-3)
    there = said["MFU of the matmul rate measured here"]
    assert there["measured"] == pytest.approx(262.8e6 * speed / 790e12, rel=1e-3)
    assert (there["aim"], there["note"]) == ([">=", 0.38], "263M FLOP a token at 600 keys a query")
    step = said["a step"]
    assert (step["measured"], step["spread"], step["n"]) == (450.0, [400.0, 600.0], 3)
    assert (said["steps that were not finite"]["measured"], said["tokens/s"]["n"]) == (1, 3)
    assert said["tokens/s"]["note"].startswith("micro-batches of 98,304 tokens, 786,432 a step")


def test_real_step_is_the_records(unreal):
    cfg = gpu_sections.record(unreal[0]("training"))
    assert cfg == recipe()
    assert (cfg.data.span, tg.micro_batches(cfg, 1)) == (98304, 8)


def test_events_are_asked_as_cuda_has_them(monkeypatch):
    """Gpu's own lines, with torch.cuda's real signatures in the place of a device."""
    event = mock.create_autospec(torch.cuda.Event)
    event.return_value.elapsed_time.return_value = 2.5
    monkeypatch.setattr(torch.cuda, "Event", event)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, mock.create_autospec(getattr(torch.cuda, name)))
    about = SimpleNamespace(name="A GPU", total_memory=80 << 30, multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", mock.create_autospec(
        torch.cuda.get_device_properties, return_value=about))
    monkeypatch.setattr(tg, "pick_device", lambda cfg, local: torch.device("cpu"))
    monkeypatch.setattr(gpu_timing, "driver", lambda: "580.1")
    place, did, rows = gpu_timing.Gpu(), [], []
    bench = gpu_timing.Bench("mlp", place, 60.0, rows.append)
    found = bench.time({"a": lambda: did.append("a"), "b": gpu_timing.Case(
        lambda: did.append("b"), lambda: did.append("before b"))})
    assert {name: (t.ms, t.n) for name, t in found.items()} == {"a": (2.5, 20), "b": (2.5, 20)}
    assert did == ["a"] * 3 + ["before b", "b"] * 3 + ["a", "before b", "b"] * 20
    assert event.call_args_list == [mock.call(enable_timing=True)] * 80
    about = gpu_timing.machine(place)
    assert about["device"] == "A GPU (80 GiB, 132 SMs, sm_90)"
    assert about["driver"] == "580.1" and about["torch"] == torch.__version__
    for ask in (place.synchronize, place.empty_cache, place.forget_peak, place.peak_bytes):
        ask()
    assert rows == []


class Counting(gpu_timing.Host):
    real = True


def test_a_case_that_fails_is_a_line_and_the_others_go_on():
    rows = []
    bench = gpu_timing.Bench("mlp", Counting(), 60.0, rows.append)

    def broken():
        raise RuntimeError("out of\nshared memory")

    assert list(bench.time({"bad": broken, "good": lambda: None})) == ["good"]
    assert [(r["what"], r["error"]) for r in rows] == [("bad", "RuntimeError: shared memory")]


def test_training_that_fails_leaves_the_other_to_be_measured(monkeypatch):
    rows = []
    bench = gpu_timing.Bench("training", gpu_timing.Host(), 60.0, rows.append)

    def train_as(bench, who, knobs, count):
        if who == "ours":
            raise RuntimeError("no kernel")
        bench.row(who, 1.0, "tokens/s")
        return {0: 1.0}

    monkeypatch.setattr(gpu_sections, "train_as", train_as)
    gpu_sections.training(bench)
    said = [(r["what"], r.get("error")) for r in rows]
    assert said == [("ours", "RuntimeError: no kernel"), ("unfused", None)]
    assert [gpu_suite.failed(r) for r in rows] == [True, False]
    bench.deadline = 0.0
    monkeypatch.setattr(gpu_sections, "train_as", lambda bench, who, *_: bench.want_time(who))
    with pytest.raises(gpu_timing.BoxEndedError, match="any more: ours"):
        gpu_sections.training(bench)


def test_nothing_is_compiled_when_little_of_the_box_is_left():
    rows = []
    bench = gpu_timing.Bench("mlp", Counting(), 10.0, rows.append)
    never = gpu_timing.Case(lambda: pytest.fail("it was compiled"), compiles=True)
    assert list(bench.time({"good": lambda: None, "slow": never})) == ["good"]
    assert [(r["what"], r["missing"]) for r in rows] == [("slow", "not measured: the box was nearly over")]
    assert bench.left_out == ["slow"]
    bench.deadline = 0.0
    with pytest.raises(gpu_timing.BoxEndedError, match="not measured any more: good"):
        bench.time({"good": lambda: None})


def test_a_missing_thing_costs_one_line(monkeypatch):
    rows = []
    bench = gpu_timing.Bench("cross_entropy", Counting(), 60.0, rows.append)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    assert kernels.liger_loss(bench) is None and kernels.liger_loss(bench) is None
    monkeypatch.setattr(tg, "has_triton", lambda: False)
    kernels.mlp(bench)
    assert [(r["what"], r["missing"]) for r in rows] == [
        ("Liger-Kernel", "not installed"), ("kernels by Triton", "triton is not installed")
    ]


@pytest.mark.parametrize("fault", ["nats", "slopes", "product"])
def test_a_wrong_kernel_misses_its_aim(monkeypatch, fault):
    """Wrong by two percent: the line says so."""
    rows = []
    bench = gpu_timing.Bench("correctness", gpu_timing.Host(), 60.0, rows.append)
    if fault == "product":
        right = kernels.product
        monkeypatch.setattr(kernels, "product", lambda *args: 1.02 * right(*args))
        kernels.check_mlp(bench, "by_pointer", 14, 16, 40)
    else:
        right, scale = kernels.nats_and_slopes, {"nats": (1.02, 1.0), "slopes": (1.0, 1.02)}[fault]
        monkeypatch.setattr(kernels, "nats_and_slopes", lambda *args: [
            s * t for s, t in zip(scale, right(*args), strict=True)])
        kernels.check_loss(bench, "one_pass", 14, 40)
    missed = [r["what"] for r in rows if gpu_suite.verdict(r | {"dry": False}, "") == "missed"]
    assert len(missed) == (2 if fault == "product" else 1)
    assert fault == "product" or missed[0].endswith(fault)


# --------------------------------------------------------------------------------------
# One kernel at will
# --------------------------------------------------------------------------------------


def test_on_a_cpu_the_interpreter_alone_is_asked(monkeypatch, capsys):
    figures = {"one_pass 5x37": [1e-7, 2e-7], "two_pass 5x37": [3e-7], "mlp 1x8x5": [4e-7]}
    monkeypatch.setattr(kernels, "interpreted_figures", lambda: figures)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--kernel", "two_pass"])
    kernels.main()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("No CUDA device: correctness only")
    assert said[2:] == ["two_pass 5x37: [3e-07]"]
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    kernels.main()
    said = capsys.readouterr().out
    assert all(name in said for name in figures) and "approximate: the interpreter has no such" in said


@pytest.mark.parametrize("kernel", ["one_pass", "squared_mlp"])
def test_on_a_gpu_a_kernel_is_checked_and_timed(monkeypatch, capsys, kernel):
    monkeypatch.setattr(kernels, "Gpu", gpu_timing.Host)
    monkeypatch.setattr(kernels, "WIDTH", 16)
    monkeypatch.setattr(kernels, "HIDDEN", 40)
    kernels.on_a_gpu(kernel, 14, 40)
    first, *said = capsys.readouterr().out.splitlines()
    assert json.loads(first)["torch"] == torch.__version__
    wanted = {"one_pass": ["one_pass 14 x 40: nats", "eager / one_pass 14 x 40", "one_pass with its head"],
              "squared_mlp": ["squared MLP by_tma 14 x 16 x 40: product", "torch's product alone"]}[kernel]
    assert all(any(line.startswith(want) for line in said) for want in wanted)


def test_a_row_too_long_for_registers_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "Gpu", gpu_timing.Host)
    kernels.on_a_gpu("one_pass", 8, 20000)
    said = capsys.readouterr().out.splitlines()[1:]
    assert said == ["one_pass does not take rows of 20,000 logits; two_pass does"]
    assert kernels.takes("one_pass", 16384) and not kernels.takes("approximate", 16385)
    assert kernels.takes("two_pass", 50304)
