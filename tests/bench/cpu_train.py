"""Training speed on this CPU: our step against a plain PyTorch GPT of the same shape, in one run.

    python tests/bench/cpu_train.py                 # measure, append to the raw lines, write the table
    python tests/bench/cpu_train.py --table         # write the table again from the raw lines
    python tests/bench/cpu_train.py --only v1024 --dtype bfloat16 --compile 1

The plain model is written with stock modules: nn.Linear, F.scaled_dot_product_attention, F.cross_entropy
on whole logits, torch.optim.AdamW. Ours is the program's own train_step with Muon and the chunked loss.
Variants take turns, step by step, and the ratio of medians is what counts: machines are noisy. The limit
is the sum of the step's matrix multiplies and attention calls, timed alone in the same turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import Bench, cpu_name_and_matrix_extensions, facts, parser_for
from torch import Tensor, nn

import train_gpt as tg

BENCH = Bench("cpu_train")
LAYERS, DIM, HEADS, KV, TOKENS = 4, 256, 4, 2, 8192


class Case(NamedTuple):
    """What is trained. `bar` and `limit_bar`: least ratios of speed to the plain model and to the limit."""

    vocab: int
    length: int  # tokens of a sequence
    document: int  # their mean, in tokens; 0: no documents
    bar: float
    limit_bar: float | None
    layers: int = LAYERS
    dim: int = DIM
    tokens: int = TOKENS


CASES = {
    "v1024": Case(1024, 512, 0, 1.0, 0.65),
    "v8192": Case(8192, 512, 0, 1.3, 0.60),
    "packed": Case(1024, 2048, 800, 1.2, None),
}


class PlainBlock(nn.Module):
    """Pre-norm attention and squared-ReLU MLP, as a textbook has them."""

    def __init__(self) -> None:
        super().__init__()
        width = DIM // HEADS
        self.q, self.k = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, KV * width, bias=False)
        self.v, self.o = nn.Linear(DIM, KV * width, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.up, self.down = nn.Linear(DIM, 2 * DIM, bias=False), nn.Linear(2 * DIM, DIM, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(DIM), nn.RMSNorm(DIM)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        h = self.norm1(x)
        q, k, v = (m(h).view(b, t, -1, DIM // HEADS).transpose(1, 2) for m in (self.q, self.k, self.v))
        q, k = (self.turn(F.rms_norm(z, z.shape[-1:]), cos, sin) for z in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, DIM))
        return x + self.down(F.relu(self.up(self.norm2(x))).square())

    @staticmethod
    def turn(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = z.chunk(2, -1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


class PlainGPT(nn.Module):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, DIM)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(DIM)
        nn.init.normal_(self.embed.weight, 0.0, 0.005)

    def forward(self, tokens: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            x = self.embed(tokens).to(dtype)
            j = torch.arange(0, DIM // HEADS, 2) / (DIM // HEADS)
            angle = torch.arange(tokens.shape[1])[:, None] * 10000.0**-j
            for block in self.blocks:
                x = block(x, angle.cos().to(dtype), angle.sin().to(dtype))
            logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(30.0 * torch.tanh(logits.float() / 30.0).flatten(0, 1), targets.flatten())


def draw(case: Case) -> np.ndarray:
    """One row of tokens + 1 ids; documents begin with BOS (id 1) where the case has documents."""
    rng = np.random.default_rng(0)
    row = rng.integers(4, case.vocab, case.tokens + 1)
    if case.document:
        starts = np.cumsum(rng.geometric(1 / case.document, case.tokens // 8))
        row[starts[: case.tokens // case.document + 1] % case.tokens] = 1
    return row


def plain_step(case: Case, dtype: torch.dtype, compiling: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    model = PlainGPT(case.vocab)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    forward = torch.compile(model) if compiling else model
    batch = tg.as_rows([draw(case)], case.length)

    def step() -> None:
        forward(batch.tokens, batch.targets, dtype).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_step(case: Case, dtype: torch.dtype, compiling: bool) -> Callable[[], None]:
    knobs = {"VOCAB_SIZE": case.vocab, "NUM_LAYERS": case.layers, "MODEL_DIM": case.dim, "NUM_HEADS": HEADS,
             "NUM_KV_HEADS": KV, "TRAIN_SEQ_LEN": case.length, "TRAIN_BATCH_TOKENS": case.tokens,
             "TRAIN_SPANS": 1, "DOC_PACKING": int(case.document > 0)}
    cfg = tg.read_config({k: str(v) for k, v in knobs.items()})
    world = tg.World(0, 1, torch.device("cpu"), dtype, compiling, tg.Journal(None), Path())
    model = tg.make_fast(tg.make_model(cfg, world), world)
    trainer = tg.Trainer(model, None, cfg, world, "")
    row, length = draw(case), case.length
    batch = tg.packed([row], 1, length) if case.document else tg.as_rows([row], length)
    phase = tg.Phase(1e-3, 0.9, 0, False)
    return lambda: tg.train_step(trainer, [batch], phase)


def limit_step(case: Case, dtype: torch.dtype) -> Callable[[], None]:
    """The step's matrix multiplies and attention, forward and backward, and nothing else."""
    dim, tokens, length = case.dim, case.tokens, case.length
    kv = KV * dim // HEADS
    shapes = [(dim, dim), (dim, kv), (dim, kv), (dim, dim), (dim, 2 * dim), (2 * dim, dim)] * case.layers
    shapes += [(dim, case.vocab)]
    pairs = [(torch.randn(tokens, a, dtype=dtype), torch.randn(b, a, dtype=dtype)) for a, b in shapes]
    grads = [torch.randn(tokens, b, dtype=dtype) for _, b in shapes]
    heads = [torch.randn(tokens // length, n, length, dim // HEADS, dtype=dtype, requires_grad=True)
             for n in (HEADS, KV, KV)]

    def step() -> None:
        for (x, w), g in zip(pairs, grads, strict=True):
            _ = x @ w.T, g @ w, g.T @ x
        for _ in range(case.layers):
            y = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            torch.autograd.grad(y, heads, torch.ones_like(y))

    return step


def timed(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each variant, a step each in turn."""
    for step in steps.values():
        step(), step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - begin) * 1000)
    return times


def measure(name: str, dtype: str, compiling: bool, rounds: int) -> dict:
    case, kind = CASES[name], getattr(torch, dtype)
    steps = {"plain": plain_step(case, kind, compiling), "ours": our_step(case, kind, compiling)}
    if case.limit_bar:
        steps["limit"] = limit_step(case, kind)
    times = timed(steps, rounds)
    ms = {who: round(statistics.median(t), 2) for who, t in times.items()}
    spread = {who: [round(min(t), 2), round(max(t), 2)] for who, t in times.items()}
    rss = {who: rss_of(who, name, dtype, compiling) for who in ("plain", "ours")}
    setting = {"case": name, "dtype": dtype, "compile": int(compiling), "rounds": rounds}
    return setting | {"ms": ms, "spread_ms": spread, "rss_mib": rss}


def rss_of(who: str, case: str, dtype: str, compiling: bool) -> float:
    """Peak resident MiB of three steps in a process of their own."""
    words = ["--rss", who, "--only", case, "--dtype", dtype, "--compile", str(int(compiling))]
    out = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])


def print_rss(who: str, name: str, dtype: str, compiling: bool) -> None:
    make = plain_step if who == "plain" else our_step
    step = make(CASES[name], getattr(torch, dtype), compiling)
    for _ in range(3):
        step()
    status = Path("/proc/self/status").read_text().splitlines()
    high = next(line for line in status if line.startswith("VmHWM"))
    print(round(int(high.split()[1]) / 1024, 1))  # getrusage would report the parent's peak


def versions() -> dict:
    return {**facts("date", "torch", "source", "python"), "threads": torch.get_num_threads(),
            **facts("cores", "load"), "cpu": cpu_name_and_matrix_extensions()}


def render(rows: list[dict]) -> str:
    """The table, from the latest raw line of each case."""
    latest = {(r["case"], r["dtype"], r["compile"]): r for r in rows}
    head = ["# Training speed on a CPU", "",
            "`python tests/bench/cpu_train.py`: 4 layers, width 256, 4/2 heads, 8,192 tokens a step; "
            "forward, backward and update.",
            "Ours (Muon, chunked loss) against a plain PyTorch GPT (AdamW, whole logits) and against the "
            "bare matrix multiplies and attention. `v1024` and `v8192` are sequences of 512; `packed` 2,048, "
            "documents of 800 tokens on average, and the plain model attends to whole rows.",
            "Medians of interleaved steps; `/plain` and `/limit` are ratios of speed: more is better. RSS is "
            "the peak of a process of its own.", "",
            "| case | dtype | compile | plain ms | ours ms | tokens/s | /plain | bar | /limit | bar | "
            "RSS MiB plain, ours | spread ours | when |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    return "\n".join([*head, *(table_row(r) for r in latest.values())]) + "\n"


def table_row(r: dict) -> str:
    ms, case = r["ms"], CASES[r["case"]]
    limit = f"{ms['limit'] / ms['ours']:.2f} | {case.limit_bar}" if "limit" in ms else "- | -"
    rss = f"{r['rss_mib']['plain']:.0f}, {r['rss_mib']['ours']:.0f}"
    low, high = r["spread_ms"]["ours"]
    where = f"{r['date']}, torch {r['torch']}, {r['threads']} threads, source {r['source'][:8]}"
    where += f", {r['cpu']}" if "cpu" in r else ""
    return (f"| {r['case']} | {r['dtype']} | {r['compile']} | {ms['plain']:.0f} | {ms['ours']:.0f} | "
            f"{case.tokens / ms['ours'] * 1000:,.0f} | {ms['plain'] / ms['ours']:.2f} | {case.bar} | "
            f"{limit} | {rss} | {low:.0f}-{high:.0f} | {where} |")


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--only", choices=[*CASES], help="one case")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", choices=["0", "1"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rss", choices=["plain", "ours"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rss:
        return print_rss(args.rss, args.only, args.dtype, args.compile == "1")
    if not args.table:
        for case in [args.only] if args.only else CASES:
            for dtype in [args.dtype] if args.dtype else ("float32", "bfloat16"):
                for compiling in [args.compile == "1"] if args.compile else (False, True):
                    row = versions() | measure(case, dtype, compiling, args.rounds)
                    print(json.dumps(row), flush=True)
                    BENCH.add(row)
    print(BENCH.write_table(render))


if __name__ == "__main__":
    main()
