"""Many tiny runs from one process that has imported torch once, each with faults planted in it.

    play(env, plant("strike", at=3), ranks=2) -> Outcome     # what the tests call
    python tests/faults.py serve                             # the process behind it: forks once per rank
    torchrun ... tests/faults.py run '[["at_step", {...}]]'  # the program with the same faults, for torchrun

A plant is a function of the second half of this file. It is called in the child, before the program's own
`main`, and changes what the program meets there: a full disk, a signal in mid-step, a NaN on one rank.
"""

import atexit
import contextlib
import errno
import functools
import hashlib
import importlib
import itertools
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


# --------------------------------------------------------------------------------------
# What tests use
# --------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """How a run ended, one entry a rank. A status is as `subprocess` has it: -9 is SIGKILL."""

    statuses: list[int]
    outs: list[str]
    errs: list[str]
    notes: list[dict]  # what the plants wrote down
    seconds: float

    @property
    def status(self) -> int:
        return self.statuses[0]

    @property
    def out(self) -> str:
        return self.outs[0]

    @property
    def err(self) -> str:
        return self.errs[0]

    @property
    def note(self) -> dict:
        return self.notes[0]


def plant(kind: str, /, **values) -> list:
    return [kind, values]


def play(
    env: dict, *plants: list, ranks=1, args=(), cwd=ROOT, kill_after=None, call=None, timeout=60.0
) -> Outcome:
    """Run the program, or the function `call` of this file, in forked children; see the head of this file.

    After `kill_after` seconds every rank gets SIGKILL. A run that outlives `timeout` is an error.
    """
    request = {
        "env": {k: str(v) for k, v in env.items()},
        "plants": plants, "ranks": ranks, "args": list(map(str, args)), "kill_after": kill_after,
        "cwd": str(cwd), "call": call, "timeout": timeout,
    }  # fmt: skip
    reply = stage().ask(request)
    late, outcome = reply.pop("late"), Outcome(**reply)
    assert not late, f"still running after {timeout} s: {outcome}"
    return outcome


@functools.cache
def stage() -> "Stage":
    return Stage()


class Stage:
    """The process that runs are forked from; it ends with this one."""

    def __init__(self) -> None:
        from conftest import clean_env

        command = [sys.executable, str(Path(__file__).resolve()), "serve"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=clean_env(), cwd=ROOT, **pipes)
        atexit.register(self.close)

    def ask(self, request: dict) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the process behind the tests is gone: {self.process.wait()}"
        return json.loads(line)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(60)


def small(toy, folder: Path, **knobs) -> dict[str, str]:
    """Environment of a run of a fifth of a second: two micro-batches and one checkpoint a step."""
    from conftest import tiny_env

    own = {
        "RUN_DIR": folder / "run", "NLL_PATH": folder / "nll.npy", "WARMUP_STEPS": 0, "VAL_MAX_TOKENS": 500,
        "TRAIN_SPANS": 4, "GRAD_ACCUM_STEPS": 2, "CHECKPOINT_EVERY": 1e-6,
        "MODEL_DIM": 16, "NUM_HEADS": 2, "NUM_KV_HEADS": 1,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    return tiny_env(**(toy.env | own | knobs))


class Ending(NamedTuple):
    """What two runs of one story must agree on, to the last bit."""

    trace: bytes
    artifact: str
    nats: str  # of every target of the declared score
    tensors: str  # all that training changes, as the last checkpoint has them


def ending(env: dict[str, str]) -> Ending:
    run = Path(env["RUN_DIR"])
    newest = max((run / "checkpoints").glob("step_*.ckpt"))
    parts = [sha256(run / "model.ptz"), sha256(Path(env["NLL_PATH"])), sha256_of_tensors(newest)]
    return Ending((run / "trace.jsonl").read_bytes(), *parts)


def sha256_of_tensors(path: Path) -> str:
    import train_gpt

    tensors = train_gpt.unpack_checkpoint(path.read_bytes(), str(path)).tensors
    parts = [name.encode() + t.numpy().tobytes() for name, t in tensors.items()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def only_line(err: str) -> str:
    """The one line of standard error: an error in words, without a traceback."""
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error"), err
    return lines[0]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): sha256(p) for p in files}


def processes_with(marker: str) -> list[int]:
    """Live processes that have this text in their environment or command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            told = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            state = (entry / "stat").read_text().rpartition(") ")[2][0]
        except OSError:
            continue
        if marker.encode() in told and state != "Z":
            found.append(int(entry.name))
    return found


# --------------------------------------------------------------------------------------
# The process that forks
# --------------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests until standard input closes. Nothing here may start a thread: children are forks."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a stray print is no reply
    import torch

    sys.path.insert(0, str(ROOT))
    for name in ("train_gpt", "torch._dynamo", "sentencepiece", "brotli"):  # what every run imports
        importlib.import_module(name)
    torch.set_num_threads(1)
    waiting = b""
    while True:
        line, found, rest = waiting.partition(b"\n")
        if found:
            waiting = rest
            replies.write(json.dumps(answer(json.loads(line))) + "\n")
            replies.flush()
            continue
        more = os.read(0, 1 << 16)
        if not more:
            return
        waiting += more


def answer(request: dict) -> dict:
    folder, ranks = Path(tempfile.mkdtemp(prefix="stage")), request["ranks"]
    env = request["env"]
    if ranks > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    begin = time.monotonic()
    children = {}
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            places = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            child(request, env | places, folder / str(rank))
        children[pid] = rank
    statuses, late = wait_for(children, request["kill_after"], request["timeout"])
    reply = {"statuses": statuses, "outs": [], "errs": [], "notes": [], "late": late}
    for rank in range(ranks):
        out, err, note = (folder / f"{rank}.{key}" for key in ("out", "err", "note"))
        reply["outs"].append(out.read_text(errors="replace") if out.exists() else "")
        reply["errs"].append(err.read_text(errors="replace") if err.exists() else "")
        reply["notes"].append(json.loads(note.read_text()) if note.exists() else {})
    shutil.rmtree(folder)
    return reply | {"seconds": time.monotonic() - begin}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(children: dict[int, int], kill_after: float | None, timeout: float) -> tuple[list[int], bool]:
    """Statuses by rank, and whether the time ran out. A failed rank gives the others ten seconds more."""
    watched = {os.pidfd_open(pid): (pid, rank) for pid, rank in children.items()}
    deadline = time.monotonic() + (timeout if kill_after is None else kill_after)
    statuses, late, expected = [0] * len(children), False, kill_after is not None
    while watched:
        ended = select.select(list(watched), [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ended:
            late = late or not expected
            for pid, _ in watched.values():
                os.kill(pid, signal.SIGKILL)
            ended = list(watched)
        for handle in ended:
            pid, rank = watched.pop(handle)
            os.close(handle)
            statuses[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if statuses[rank]:
                deadline, expected = min(deadline, time.monotonic() + 10.0), True
    return statuses, late


def child(request: dict, env: dict[str, str], place: Path) -> None:
    """Become one rank of the program; never returns."""
    status = 1
    try:
        for number, key in ((1, "out"), (2, "err")):
            handle = os.open(place.with_suffix(f".{key}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(handle, number)
        os.environ.update(env)  # on top of what clean_env() leaves
        sys.argv[1:] = request["args"]
        os.chdir(request["cwd"])
        try:
            status = perform(request["plants"], request["call"])
        finally:
            if NOTES:
                place.with_suffix(".note").write_text(json.dumps(NOTES))
    except BaseException:  # noqa: BLE001 (whatever it is, this process must not go on as the parent)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def perform(plants: list, call: str | None = None) -> int:
    """Plant the faults and run the program, or a function of this file. Returns the exit status."""
    import train_gpt

    for name, values in plants:
        globals()[name](**values)
    if call:
        globals()[call]()
        return 0
    try:
        train_gpt.main()
    except SystemExit as e:
        return int(e.code or 0)
    except KeyboardInterrupt:
        traceback.print_exc()
        return 128 + signal.SIGINT
    return 0


# --------------------------------------------------------------------------------------
# Plants: called in the child before the program starts; first those of the disk
# --------------------------------------------------------------------------------------

NOTES: dict = {}  # what a test hears of the child, rank by rank


def my_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def sites(meet, only: str = "") -> None:
    """Call `meet(number, kind, path, go)` in the place of each system call by which files are saved.

    Counted are open for writing, write, fsync, replace and unlink below RUN_DIR (or of a path that holds
    `only`), in the order in which they happen; `go()` is the call itself.
    """
    folder, number, names = os.environ["RUN_DIR"], [0], {}
    real = {kind: getattr(os, kind) for kind in ("open", "write", "fsync", "replace", "unlink")}

    def counted(kind: str, path: object, go):
        path = str(path)
        if not path.startswith(folder) or only not in path:
            return go()
        number[0] += 1
        return meet(number[0], kind, path, go)

    def open_(path, flags, *args, **more):
        def go():
            handle = real["open"](path, flags, *args, **more)
            names[handle] = path
            return handle

        return counted("open", path, go) if flags & os.O_CREAT else go()

    def write(handle, data):
        return counted("write", names.get(handle, ""), lambda: real["write"](handle, data))

    def fsync(handle):
        return counted("fsync", names.get(handle, ""), lambda: real["fsync"](handle))

    def replace(source, target, **more):
        return counted("replace", source, lambda: real["replace"](source, target, **more))

    def unlink(path, **more):
        return counted("unlink", path, lambda: real["unlink"](path, **more))

    os.open, os.write, os.fsync, os.replace, os.unlink = open_, write, fsync, replace, unlink


def write_down() -> None:
    """Note [kind, file name] of each site, to know how many there are."""

    def meet(number, kind, path, go):
        NOTES.setdefault("sites", []).append([kind, Path(path).name])
        return go()

    sites(meet)


def strike(at: int) -> None:
    """SIGKILL this process before its site number `at`."""

    def meet(number, kind, path, go):
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return go()

    sites(meet)


def refuse(code: str, at: int = 1, kind: str = "", lasting: bool = True, only: str = "") -> None:
    """Sites of a kind (empty: all but unlink) fail with OSError(code), from the `at`-th on or only there."""
    seen = Counter()

    def meet(number, site, path, go):
        if kind not in ("", site) or (site == "unlink" and not kind):
            return go()
        seen[kind] += 1
        if seen[kind] == at or (lasting and seen[kind] > at):
            NOTES.setdefault("refused", []).append([site, Path(path).name])
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), path)
        return go()

    sites(meet, only)


def chew(size: int) -> None:
    """os.write takes at most `size` bytes at a time."""
    real = os.write
    os.write = lambda handle, data: real(handle, data[:size])


def refuse_reading(code: str, only: str) -> None:
    """Reading a file whose name holds `only` fails, once."""
    real, failed = Path.read_bytes, []

    def read_bytes(path):
        if only in path.name and not failed:
            failed.append(path)
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), str(path))
        return real(path)

    Path.read_bytes = read_bytes


def limit_file_size(size: int) -> None:
    """The kernel lets no file grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def decay_after_writing(only: str) -> None:
    """A disk that loses a bit of what is written to it: each file with `only` in its name, once renamed."""
    real = os.replace

    def replace(source, target, **more):
        real(source, target, **more)
        if only in str(target):
            blob = bytearray(Path(target).read_bytes())
            blob[len(blob) // 2] ^= 1
            Path(target).write_bytes(blob)

    os.replace = replace


# --------------------------------------------------------------------------------------
# Plants: signals, slow and failing ranks, time
# --------------------------------------------------------------------------------------

ACTIONS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: signal.raise_signal(signal.SIGTERM),
    "int": lambda: signal.raise_signal(signal.SIGINT),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "stall": lambda: print("stalled", flush=True) or time.sleep(3600),
    "slow": lambda: time.sleep(2.0),
}


def at_step(step: int, actions: list[str], micro: int = 0, rank: int = 0) -> None:
    """Do the actions on a rank, before the forward of a step's micro-batch `micro`."""

    def meet(now, part):
        if (now, part) == (step, micro) and rank == my_rank():
            act(actions)

    each_micro_batch(meet)


def at_call(name: str, actions: list[str], number: int = 1, rank: int = 0) -> None:
    """Do the actions on a rank when one of the program's functions is called the `number`-th time."""
    import train_gpt

    function, calls = getattr(train_gpt, name), itertools.count(1)

    def called(*args, **more):
        if next(calls) == number and rank == my_rank():
            act(actions)
        return function(*args, **more)

    setattr(train_gpt, name, called)


def act(actions: list[str]) -> None:
    import train_gpt

    for action in actions:
        if action == "raise":
            raise RuntimeError("planted: this rank fails")
        if action == "complain":
            raise train_gpt.UserError("planted: this rank complains")
        ACTIONS[action]()


def each_micro_batch(meet) -> None:
    """Call `meet(step, micro-batch)` before each forward of training; warm-up does not count."""
    import train_gpt

    take_step, objective, at = train_gpt.take_step, train_gpt.objective, {"step": None, "micro": 0}

    def stepping(t, now):
        at.update(step=t.state.step, micro=0)
        try:
            return take_step(t, now)
        finally:
            at["step"] = None

    def counting(*args):
        if at["step"] is not None:
            meet(at["step"], at["micro"])
            at["micro"] += 1
        return objective(*args)

    train_gpt.take_step, train_gpt.objective = stepping, counting


def fake_clock(seconds: list[float], trips: float = 0.0, slow_rank: int = -1) -> None:
    """Training's clock stands still but for its steps, which take these seconds in turn, and for round trips.

    The time of a round trip is known beforehand, as the warm-up measures it; on `slow_rank` it is four times
    that, which the warm-up has not seen.
    """
    import train_gpt

    now, durations = [100.0], itertools.cycle(seconds)
    train_step, trip = train_gpt.train_step, train_gpt.round_trip

    def stepping(t, batches, phase):
        figures = train_step(t, batches, phase)
        now[0] += next(durations) if t.clock.mark is not None else 0.0  # the warm-up takes no time
        return figures

    def measured(work, world):
        work()
        return trips

    def tripping(model, loader, count, cfg, world, pace=None):
        nats = trip(model, loader, count, cfg, world, pace)
        if pace is not None:
            now[0] += trips * (4 if my_rank() == slow_rank else 1)
            pace.note()
            NOTES.setdefault("trips", []).append(now[0] - 100.0)
        return nats

    train_gpt.train_step, train_gpt.round_trip = stepping, tripping
    train_gpt.second_pass, safety = measured, train_gpt.Clock.SAFETY
    train_gpt.Clock = functools.partial(train_gpt.Clock, now=lambda: now[0])
    train_gpt.Clock.SAFETY = safety


def lower_limit(size: int) -> None:
    """A submission may have so many bytes."""
    import train_gpt

    train_gpt.SIZE_LIMIT = size


def note_times() -> None:
    """NOTES["times"]: what the clock of training shows at the end of each step."""
    import train_gpt

    take_step = train_gpt.take_step

    def taking(t, now):
        take_step(t, now)
        NOTES.setdefault("times", []).append(t.clock.elapsed())

    train_gpt.take_step = taking


# --------------------------------------------------------------------------------------
# Plants: values, and what a test wants to see of the inside
# --------------------------------------------------------------------------------------


def poison(rows: list) -> None:
    """Rows [step, rank, kind]: spoil that rank's part of that step.

    Kinds: activations (as a bad batch would), loss, gradient, infinity; `opposite` puts infinities of two
    signs into the gradients of ranks 0 and 1. Spoilt is a matrix of Muon's in odd steps, and the embedding in
    even ones. NOTES["steps"] gets a row a step: [counted as good, bit for bit as before].
    """
    import train_gpt

    planned, now = {(step, rank): kind for step, rank, kind in rows}, {"kind": None, "step": 0}
    train_step, reduce, embed = train_gpt.train_step, train_gpt.reduce_gradients, train_gpt.Embed.forward
    values = {"gradient": float("nan"), "infinity": float("inf"), "opposite": (-1.0) ** my_rank() * 1e999}

    def embedding(module, ctx):
        x = embed(module, ctx)
        return x * float("nan") if now["kind"] == "activations" else x

    def reducing(optimizer, loss):
        if now["kind"] == "loss":
            loss.fill_(float("nan"))
        elif now["kind"] in values:
            members = optimizer.groups["muon" if now["step"] % 2 else "embed"].values()
            list(members)[-1].grad.view(-1)[0] = values[now["kind"]]
        return reduce(optimizer, loss)

    def stepping(t, batches, phase):
        if t.clock.mark is None:  # the warm-up
            return train_step(t, batches, phase)
        both = "opposite" if planned.get((t.state.step, 0)) == "opposite" and my_rank() < 2 else None
        now.update(kind=both or planned.get((t.state.step, my_rank())), step=t.state.step)
        before = digest(t)
        figures = train_step(t, batches, phase)
        NOTES.setdefault("steps", []).append([bool(figures[2] > 0), digest(t) == before])
        now["kind"] = None
        return figures

    train_gpt.train_step, train_gpt.reduce_gradients, train_gpt.Embed.forward = stepping, reducing, embedding


def digest(t) -> str:
    """sha256 over the bits of every tensor that training changes."""
    parts = [name.encode() + v.detach().contiguous().numpy().tobytes() for name, v in t.tensors().items()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def note_digest() -> None:
    """NOTES["digest"]: the trainer's tensors at its last save, which every rank sees."""
    import train_gpt

    save = train_gpt.save

    def saving(t):
        save(t)
        NOTES["digest"] = digest(t)

    train_gpt.save = saving


def note_opened() -> None:
    """NOTES["opened"]: names of token shards and artifacts in the order in which they are opened."""
    opened = NOTES.setdefault("opened", [])

    def hear(event, args):
        if event == "open" and str(args[0]).endswith((".bin", "model.ptz", "model.ptz.tmp")):
            opened.append(Path(args[0]).name)

    sys.addaudithook(hear)


def broken_compiler(rank: int) -> None:
    """Blocks are compiled, by Dynamo alone, as if that had been the faster; on one rank it fails."""
    import torch

    import train_gpt

    def backend(graph, inputs):
        if my_rank() == rank:
            raise OSError("no working compiler on this rank")
        return graph.forward

    torch.compile = functools.partial(torch.compile, backend=backend)
    train_gpt.measured_choice = lambda cfg, world, dtypes: ("float32", True, "")


# --------------------------------------------------------------------------------------
# What else a child may do: the `call` of play()
# --------------------------------------------------------------------------------------


@contextlib.contextmanager
def gloo():
    """(Config of the environment, World) of one rank; alone where there is one rank."""
    import torch
    import torch.distributed as dist

    import train_gpt

    cfg, ranks = train_gpt.read_config(dict(os.environ)), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    dtype = torch.bfloat16 if cfg.compute.dtype == "bfloat16" else torch.float32
    cpu, silent = torch.device("cpu"), train_gpt.Journal(None)
    try:
        yield cfg, train_gpt.World(my_rank(), ranks, cpu, dtype, False, silent, Path())
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def whole_gradients(optimizer, gradients) -> dict:
    """Name -> averaged gradient, of which Muon's are put together from all ranks."""
    found = {}
    for stack, share in zip(optimizer.muon.stacks, gradients.shares, strict=True):
        stacked, pending = optimizer.world.gather_later(share)
        pending.wait()
        found |= zip(stack.names, stacked.unbind(), strict=False)
    others = {name: p.grad for kind, group in optimizer.groups.items() if kind != "muon"
              for name, p in group.items()}  # fmt: skip
    return found | others


def reduce_different_gradients() -> None:
    """Each rank's gradients are its rank + 1, times the parameter's number; one parameter has none."""
    import torch

    import train_gpt

    with gloo() as (cfg, world):
        model = train_gpt.make_model(cfg, world)
        params = dict(model.named_parameters())
        for i, (name, p) in enumerate(params.items()):
            p.grad = None if name == "skip_weights" else torch.full_like(p, (i + 1.0) * (my_rank() + 1))
        loss = torch.tensor(float(my_rank()))
        optimizer = train_gpt.Optimizer(model, cfg, world)
        if cfg.optim.clips_own:
            train_gpt.clip_own(model, cfg.optim.clip)
        gradients = train_gpt.reduce_gradients(optimizer, loss)
        whole = whole_gradients(optimizer, gradients)
        ranges = {name: [whole[name].min().item(), whole[name].max().item(), p.numel()]
                  for name, p in params.items()}  # fmt: skip
        NOTES.update(grads=ranges, loss=loss.item(), norm=gradients.norm.item())


def step_by_shares() -> None:
    """Five steps on random gradients whose mean over ranks is always the same, noted as weights and momentum.

    The last two are taken twice, the second time from the state that was saved before them, and one step in
    between must not happen. NOTES: seconds, and whether both times ended alike.
    """
    import numpy as np
    import torch

    import train_gpt

    with gloo() as (cfg, world):
        torch.manual_seed(0)
        t = train_gpt.Trainer(train_gpt.make_model(cfg, world), None, cfg, world, "")

        def step(number: int, ok: bool = True) -> None:
            for i, p in enumerate(t.model.parameters()):
                random = torch.Generator().manual_seed(1000 * number + i)
                p.grad = torch.randn(p.shape, generator=random) * (2 * (my_rank() + 1) / (world.size + 1))
            gradients = train_gpt.reduce_gradients(t.optimizer, torch.zeros(()))
            phase = train_gpt.Phase(1 / (number + 1), 0.8 + 0.02 * number, 0, False, 0.9)
            t.optimizer.step(gradients, phase, torch.tensor(ok))

        for number in range(3):
            step(number)
        saved = {name: value.clone() for name, value in t.tensors().items()}
        step(3, ok=False)
        NOTES["kept"] = all(torch.equal(value, saved[name]) for name, value in t.tensors().items())
        ends = []
        for _ in range(2):
            t.restore(saved)
            step(3)
            step(4)
            ends.append(digest(t))
        NOTES.update(ends=ends)
        np.savez(Path(os.environ["OUT"]) / f"{my_rank()}.npz", **t.tensors())


def move_experts() -> None:
    """Three steps in which expert e has gradients on rank e alone, or on the only rank, and the last nowhere.

    NOTES: which experts of a bank moved, which have momentum, a digest, and sums of what they became.
    """
    import torch

    import train_gpt

    with gloo() as (cfg, world):
        t = train_gpt.Trainer(train_gpt.make_model(cfg, world), None, cfg, world, "")
        bank = t.model.blocks[1].mlp.up.weight
        before = bank.detach().clone()
        for number in range(3):
            for i, p in enumerate(t.model.parameters()):
                random = torch.Generator().manual_seed(1000 * number + i)
                p.grad = torch.randn(p.shape, generator=random)
                if p.ndim == 3:
                    for e in range(len(p)):
                        mine = e == 2 or (world.size > 1 and e != world.rank)
                        p.grad[e] *= 0 if mine else world.size
            gradients = train_gpt.reduce_gradients(t.optimizer, torch.zeros(()))
            t.optimizer.step(gradients, train_gpt.Phase(1.0, 0.9, 0, False), torch.tensor(True))
        state = t.optimizer.muon.state()
        NOTES.update(
            moved=[not torch.equal(a, b) for a, b in zip(bank, before, strict=True)],
            momentum=[bool(state[f"blocks.1.mlp.up.weight.{e}"].any()) for e in range(len(bank))],
            sums=bank.detach().double().square().sum((1, 2)).tolist(),
            digest=digest(t),
        )


def share_16_megabytes() -> None:
    """Rank 0's random bytes on every rank, with the seconds that took."""
    import hashlib
    import time

    import torch
    import torch.distributed as dist

    import train_gpt

    dist.init_process_group("gloo")
    cpu, alone = torch.device("cpu"), train_gpt.Journal(None)
    world = train_gpt.World(my_rank(), dist.get_world_size(), cpu, torch.float32, False, alone, Path())
    mine = os.urandom(16_000_000)
    dist.barrier()
    begin = time.perf_counter()
    blob = world.share(lambda: mine)
    seconds = time.perf_counter() - begin
    NOTES.update(seconds=seconds, bytes=len(blob), digest=hashlib.sha256(blob).hexdigest())
    dist.destroy_process_group()


def poll_checkpoints() -> None:
    """Load the newest checkpoint of FOLDER again and again until a file `done` is there, and count failures.

    A failure does not count where the folder has changed meanwhile: the reader was too slow.
    """
    import train_gpt

    folder, steps, most, failures = Path(os.environ["FOLDER"]), [], 0, []
    while not (folder / "done").exists():
        names = sorted(os.listdir(folder))  # noqa: PTH208 (one system call, so one moment)
        most = max(most, len(names))
        try:
            steps.append(train_gpt.load_checkpoint(folder, lambda _: None).meta["step"])
        except (OSError, AttributeError, train_gpt.UserError) as e:
            if sorted(os.listdir(folder)) == names:  # noqa: PTH208
                failures.append(repr(e))
    NOTES.update(loads=len(steps), backwards=steps != sorted(steps), most=most, failures=failures)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        plants, sys.argv[1:] = json.loads(sys.argv[2]), []
        sys.path.insert(0, str(ROOT))
        sys.exit(perform(plants))
