"""What the tests share: time budgets, allowed skips, tiny data, and running the program in a clean process.

Helpers are imported (`from conftest import run_program`); `toy_data` and `shared_data` are fixtures.
"""

import fnmatch
import os
import random
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

for _threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_threads] = "1"  # before torch is imported: the last bits of a sum depend on it

import numpy as np
import pytest
import sentencepiece
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"  # public data files kept beside the project, never inside it
sys.path.insert(0, str(ROOT))

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

# group of tests -> (seconds it may take on two cores, its files). A new file of tests gets a group here.
GROUPS = {
    "chapters and data": (
        180, "chapters scripts config schedule world data prepare caseops download bad_input faults",
    ),
    "builder": (300, "submission"),
    "kernels": (180, "kernels compile triton gpu_suite storage coding bitpacking bench"),
    "models": (180, "features model optimizer train objective ranks"),
    "evaluation": (
        180, "export ternary ternary_model experts calibrate proxy evaluate output causality legality",
    ),
    "distillation": (120, "teachers distillation"),
    "records": (120, "records readme audit sweep"),
    "robustness": (120, "robustness checkpoint resume dependencies regressions"),
}  # fmt: skip
GROUP_OF = {f"test_{name}.py": group for group, (_, names) in GROUPS.items() for name in names.split()}


# --------------------------------------------------------------------------------------
# Counting, skips and budgets
# --------------------------------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the tests marked `full` too")
    parser.addoption("--budgets", action="store_true", help="fail when a group of tests is over its time")


def pytest_configure(config):
    config.pluginmanager.register(Accounts(config), "accounts")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("full") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="only with --full"))
        if item.get_closest_marker("gpu") and not has_cuda():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def allowed_skips(text: str) -> list[tuple[str, str]]:
    """Lines `test id pattern | reason pattern`; blank lines and comments are left out."""
    rows = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(test.strip(), reason.strip()) for test, reason in (row.split("|", 1) for row in rows)]


def forbidden_skip(test: str, reason: str, allowed: list[tuple[str, str]], shared_data: bool) -> bool:
    if shared_data and "shared/data" in reason:
        return True
    return not any(fnmatch.fnmatchcase(test, t) and fnmatch.fnmatchcase(reason, r) for t, r in allowed)


class Accounts:
    """Counts outcomes and seconds, fails the run for a forbidden skip or a late group, prints totals."""

    def __init__(self, config):
        self.config = config
        self.passed, self.failed = set(), set()
        self.skips: dict[str, str] = {}  # test id -> reason
        self.expected: dict[str, str] = {}  # the same for expected failures, which count as passed
        self.seconds: dict[str, float] = defaultdict(float)  # file -> time of its tests
        self.problems: list[str] = []
        self.times: list[str] = []

    def pytest_runtest_logreport(self, report):
        self.seconds[Path(report.nodeid.split("::")[0]).name] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.skipped and not hasattr(report, "wasxfail"):
            self.skips[report.nodeid] = skip_reason(report)
        elif report.when == "call":
            self.passed.add(report.nodeid)
            if report.skipped:
                self.expected[report.nodeid] = report.wasxfail

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.skipped:
            self.skips[report.nodeid + "::"] = skip_reason(report)

    def pytest_sessionfinish(self, session, exitstatus):
        self.problems = [*self.skip_problems(), *self.time_problems()]
        if self.problems and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def skip_problems(self) -> list[str]:
        allowed = allowed_skips((ROOT / "tests" / "skips.txt").read_text())
        bad = [(t, r) for t, r in self.skips.items() if forbidden_skip(t, r, allowed, SHARED_DATA.is_dir())]
        return [f"skip that tests/skips.txt does not allow: {test} ({reason})" for test, reason in bad]

    def time_problems(self) -> list[str]:
        spent: dict[str, float] = defaultdict(float)
        for file, seconds in self.seconds.items():
            spent[GROUP_OF.get(file, file)] += seconds
        strays = [name for name in spent if name not in GROUPS]
        lost = [f"{name} belongs to no group: add it to GROUPS in tests/conftest.py" for name in strays]
        if not self.config.getoption("--budgets") or self.config.getoption("--full"):
            return lost
        self.times = [f"time: {g}, {s:.0f} s of {GROUPS[g][0]} s" for g, s in spent.items() if g in GROUPS]
        over = [(g, s) for g, s in spent.items() if g in GROUPS and s > GROUPS[g][0]]
        return lost + [f"group '{g}' took {s:.0f} s of its {GROUPS[g][0]} s" for g, s in over]

    def pytest_unconfigure(self):
        lines = [*self.times, *(f"problem: {problem}" for problem in self.problems)]
        passed = self.passed - self.failed
        lines += [f"{len(passed)} passed, {len(self.failed)} failed, {len(self.skips)} skipped"]
        lines += [f"skipped: {n}, {reason}" for reason, n in Counter(self.skips.values()).most_common()]
        lines += [f"failed as expected: {n}, {why}" for why, n in Counter(self.expected.values()).items()]
        if self.passed or self.failed or self.skips:
            print("", *lines, sep="\n")


def skip_reason(report) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


# --------------------------------------------------------------------------------------
# Settings and data small enough for a test
# --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    """Folder of public data files beside the project; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data folder")
    return SHARED_DATA


def tiny_env(**overrides) -> dict[str, str]:
    """Environment of a tiny run: the `tiny` value of every knob, then the given ones."""
    import train_gpt

    return train_gpt.tiny_env() | {key: str(value) for key, value in overrides.items()}


def read_env(path: Path) -> dict[str, str]:
    """Variables that a shell has after `source path`, of those the file sets."""
    script = 'set -a; source "$1"; exec env -0'
    command = ["env", "-i", "bash", "--norc", "-euc", script, "bash", str(path.resolve())]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    own = {"PWD", "SHLVL", "_", "OLDPWD", "PATH"}
    pairs = (pair.split("=", 1) for pair in text.split("\0") if pair)
    return {key: value for key, value in pairs if key not in own}


def write_shard(path: Path, ids: np.ndarray) -> None:
    """A shard as the challenge stores it: 256 int32 (magic, version, count, zeros), one uint16 a token."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    path.write_bytes(header.tobytes() + np.asarray(ids).astype("<u2").tobytes())


def make_shards(
    folder: Path, train=(40_000, 40_000), val=(12_000,), *, vocab=320, mean_length=150, seed=0
) -> dict[str, np.ndarray]:
    """Write shards of documents of random ids, each from BOS = 1 on; file name -> ids. They mean no text."""
    rng, written = np.random.default_rng(seed), {}
    for split, sizes in (("train", train), ("val", val)):
        for i, size in enumerate(sizes):
            ids = rng.integers(4, vocab, size)
            ids[rng.random(size) < 1 / mean_length] = 1
            ids[0] = 1
            written[f"fineweb_{split}_{i:06d}.bin"] = ids
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in written.items():
        write_shard(folder / name, ids)
    return written


class Toy(NamedTuple):
    """A folder with two shards of training tokens, one of validation tokens, and their tokenizer."""

    path: Path
    tokenizer: Path
    vocab: int
    documents: dict[str, list[str]]  # file name -> texts; the last one of a file may be cut in its shard

    @property
    def env(self) -> dict[str, str]:
        paths = {"DATA_PATH": str(self.path), "TOKENIZER_PATH": str(self.tokenizer)}
        return paths | {"VOCAB_SIZE": str(self.vocab)}


TOY_WORDS = (
    "the of and to in a is that it was for on are with as his they be at one have this from or had by hot "
    "word but what some we can out other were all there when up use your how said an each she which do "
    "their time if will way about many then them write would like so these her long make thing see him "
    "two has look more day could go come did number sound no most people my over know water than call "
    "first who may down side been now find"
)


def toy_documents(count: int, seed: int) -> list[str]:
    """English-like texts; a few hold digits, capitals, and letters that a small tokenizer spells in bytes."""
    rng, words = random.Random(seed), TOY_WORDS.split()
    rare = ["café", "naïve", "Ωmega", "2024", "3.14", "NASA", "don't", "日本", "🙂"]
    texts = []
    for _ in range(count):
        sentences = []
        for _ in range(rng.randint(1, 12)):
            sentence = [rng.choice(words if rng.random() < 0.97 else rare) for _ in range(rng.randint(4, 16))]
            sentences.append(" ".join(sentence).capitalize() + rng.choice(".?!"))
        texts.append(" ".join(sentences))
    return texts


def train_toy_tokenizer(prefix: Path, texts: list[str], vocab: int) -> Path:
    """A byte-fallback BPE with the special ids and the leading-space rule of the challenge's tokenizers."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(prefix), model_type="bpe", vocab_size=vocab,
        character_coverage=0.999, byte_fallback=True, split_digits=True, add_dummy_prefix=False,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory) -> Toy:
    """About 80,000 training and 12,000 validation tokens of toy text in the challenge's format; see `Toy`."""
    folder, vocab = tmp_path_factory.mktemp("toy"), 320
    model = train_toy_tokenizer(folder / "tokenizer", toy_documents(400, seed=0), vocab)
    encode = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode
    sizes, documents = {"train_000000": 40_000, "train_000001": 40_000, "val_000000": 12_000}, {}
    for seed, (split, size) in enumerate(sizes.items(), 1):
        name = f"fineweb_{split}.bin"
        ids, documents[name] = [], []
        for text in toy_documents(2_000, seed):
            ids += [1, *encode(text)]
            documents[name].append(text)
            if len(ids) >= size:
                break
        write_shard(folder / name, np.array(ids[:size]))
    return Toy(folder, model, vocab, documents)


# --------------------------------------------------------------------------------------
# The program in a process of its own
# --------------------------------------------------------------------------------------


def clean_env(env: dict[str, str] | None = None) -> dict[str, str]:
    """An environment without inherited knobs: one thread, no GPU, English messages, then what is given."""
    names = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    fixed = {"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return kept | fixed | {key: str(value) for key, value in (env or {}).items()}


def start_program(args=(), env=None, *, program=ROOT / "train_gpt.py", cwd=ROOT) -> subprocess.Popen:
    """Start `python program args` in a session of its own: a test may kill it and look at what is left."""
    command = [sys.executable, str(program), *map(str, args)]
    return start_command(command, env, cwd)


def start_command(command: list[str], env: dict[str, str] | None, cwd: Path) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=clean_env(env), cwd=cwd, start_new_session=True, **pipes)


def finish(process: subprocess.Popen, timeout: float) -> subprocess.CompletedProcess:
    """Wait for a process; when that fails or takes too long, kill it and every process it started."""
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        print(out, err, sep="\n")
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_program(args=(), env=None, timeout=120.0, *, program=ROOT / "train_gpt.py", cwd=ROOT):
    """Run `python program args` to its end in a clean environment -> CompletedProcess with text output."""
    return finish(start_program(args, env, program=program, cwd=cwd), timeout)


def torchrun(ranks: int, env=None, args=(), timeout=180.0, *, program=ROOT / "train_gpt.py", cwd=ROOT):
    """Run the program on several CPU ranks -> CompletedProcess; the output of all ranks is mixed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return finish(start_command([*command, str(program), *map(str, args)], env, cwd), timeout)
