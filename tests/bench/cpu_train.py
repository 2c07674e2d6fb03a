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
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402  (the project's folder is put on the path first)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import train_gpt as tg  # noqa: E402

RAW = ROOT / "records/bench/raw/cpu_train.jsonl"
TABLE = ROOT / "records/bench/cpu_train.md"
LAYERS, DIM, HEADS, KV, TOKENS = 4, 256, 4, 2, 8192
CASES = {  # name -> (vocabulary, sequence, mean document or 0, least ratio to plain, to limit)
    "v1024": (1024, 512, 0, 1.0, 0.65),
    "v8192": (8192, 512, 0, 1.3, 0.60),
    "packed": (1024, 2048, 800, 1.2, None),
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


def draw(case: str) -> tuple[np.ndarray, ...]:
    """One row of TOKENS + 1 ids; documents begin with BOS (id 1) where the case has documents."""
    vocab, _, mean, _, _ = CASES[case]
    rng = np.random.default_rng(0)
    row = rng.integers(4, vocab, TOKENS + 1)
    if mean:
        row[np.cumsum(rng.geometric(1 / mean, TOKENS // 8))[:TOKENS // mean + 1] % TOKENS] = 1
    return row


def plain_step(case: str, dtype: torch.dtype, compiling: bool) -> Callable[[], None]:
    vocab, length = CASES[case][:2]
    torch.manual_seed(0)
    model = PlainGPT(vocab)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    forward = torch.compile(model) if compiling else model
    batch = tg.as_rows([draw(case)], length)

    def step() -> None:
        forward(batch.tokens, batch.targets, dtype).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_step(case: str, dtype: torch.dtype, compiling: bool) -> Callable[[], None]:
    vocab, length, mean = CASES[case][:3]
    knobs = {"VOCAB_SIZE": vocab, "NUM_LAYERS": LAYERS, "MODEL_DIM": DIM, "NUM_HEADS": HEADS,
             "NUM_KV_HEADS": KV, "TRAIN_SEQ_LEN": length, "TRAIN_BATCH_TOKENS": TOKENS, "TRAIN_SPANS": 1,
             "DOC_PACKING": int(mean > 0)}
    cfg = tg.read_config({k: str(v) for k, v in knobs.items()})
    world = tg.World(0, 1, torch.device("cpu"), dtype, compiling, tg.Journal(None), Path())
    model = tg.make_fast(tg.make_model(cfg, world), world)
    trainer = tg.Trainer(model, None, cfg, world, "")
    batch = tg.packed([draw(case)], 1, length) if mean else tg.as_rows([draw(case)], length)
    phase = tg.Phase(1e-3, 0.9, 0, False)
    return lambda: tg.train_step(trainer, [batch], phase)


def limit_step(case: str, dtype: torch.dtype) -> Callable[[], None]:
    """The step's matrix multiplies and attention, forward and backward, and nothing else."""
    vocab, length = CASES[case][:2]
    kv = KV * DIM // HEADS
    shapes = [(DIM, DIM), (DIM, kv), (DIM, kv), (DIM, DIM), (DIM, 2 * DIM), (2 * DIM, DIM)] * LAYERS
    shapes += [(DIM, vocab)]
    pairs = [(torch.randn(TOKENS, a, dtype=dtype), torch.randn(b, a, dtype=dtype)) for a, b in shapes]
    grads = [torch.randn(TOKENS, b, dtype=dtype) for _, b in shapes]
    heads = [torch.randn(TOKENS // length, n, length, DIM // HEADS, dtype=dtype, requires_grad=True)
             for n in (HEADS, KV, KV)]

    def step() -> None:
        for (x, w), g in zip(pairs, grads, strict=True):
            _ = x @ w.T, g @ w, g.T @ x
        for _ in range(LAYERS):
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


def measure(case: str, dtype: str, compiling: bool, rounds: int) -> dict:
    kind = getattr(torch, dtype)
    steps = {"plain": plain_step(case, kind, compiling), "ours": our_step(case, kind, compiling)}
    if CASES[case][4]:
        steps["limit"] = limit_step(case, kind)
    times = timed(steps, rounds)
    ms = {name: round(statistics.median(t), 2) for name, t in times.items()}
    spread = {name: [round(min(t), 2), round(max(t), 2)] for name, t in times.items()}
    rss = {who: rss_of(who, case, dtype, compiling) for who in ("plain", "ours")}
    setting = {"case": case, "dtype": dtype, "compile": int(compiling), "rounds": rounds}
    return setting | {"ms": ms, "spread_ms": spread, "rss_mib": rss}


def rss_of(who: str, case: str, dtype: str, compiling: bool) -> float:
    """Peak resident MiB of three steps in a process of their own."""
    words = ["--rss", who, "--only", case, "--dtype", dtype, "--compile", str(int(compiling))]
    out = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])


def print_rss(who: str, case: str, dtype: str, compiling: bool) -> None:
    make = plain_step if who == "plain" else our_step
    step = make(case, getattr(torch, dtype), compiling)
    for _ in range(3):
        step()
    status = Path("/proc/self/status").read_text().splitlines()
    high = next(line for line in status if line.startswith("VmHWM"))
    print(round(int(high.split()[1]) / 1024, 1))  # getrusage would report the parent's peak


def versions() -> dict:
    source = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()[:16]
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "torch": torch.__version__, "source": source,
            "python": platform.python_version(), "threads": torch.get_num_threads(), "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 2), "cpu": cpu_name()}


def cpu_name() -> str:
    """Model and the matrix extensions that decide the speed of bfloat16."""
    about = Path("/proc/cpuinfo").read_text()
    names = [line.split(":")[1].strip() for line in about.splitlines() if line.startswith("model name")]
    return " ".join([*names[:1], *(flag for flag in ("amx_bf16", "avx512_bf16") if f" {flag}" in about)])


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
    ms, (_, _, _, bar, limit_bar) = r["ms"], CASES[r["case"]]
    limit = f"{ms['limit'] / ms['ours']:.2f} | {limit_bar}" if "limit" in ms else "- | -"
    rss = f"{r['rss_mib']['plain']:.0f}, {r['rss_mib']['ours']:.0f}"
    low, high = r["spread_ms"]["ours"]
    where = f"{r['date']}, torch {r['torch']}, {r['threads']} threads, source {r['source'][:8]}"
    where += f", {r['cpu']}" if "cpu" in r else ""
    return (f"| {r['case']} | {r['dtype']} | {r['compile']} | {ms['plain']:.0f} | {ms['ours']:.0f} | "
            f"{TOKENS / ms['ours'] * 1000:,.0f} | {ms['plain'] / ms['ours']:.2f} | {bar} | {limit} | {rss} | "
            f"{low:.0f}-{high:.0f} | {where} |")


def read_raw() -> list[dict]:
    return [json.loads(line) for line in RAW.read_text().splitlines()] if RAW.exists() else []


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", choices=[*CASES], help="one case")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", choices=["0", "1"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--table", action="store_true", help="only write the table from the raw lines")
    parser.add_argument("--rss", choices=["plain", "ours"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rss:
        return print_rss(args.rss, args.only, args.dtype, args.compile == "1")
    if not args.table:
        RAW.parent.mkdir(parents=True, exist_ok=True)
        for case in [args.only] if args.only else CASES:
            for dtype in [args.dtype] if args.dtype else ("float32", "bfloat16"):
                for compiling in [args.compile == "1"] if args.compile else (False, True):
                    row = versions() | measure(case, dtype, compiling, args.rounds)
                    print(json.dumps(row), flush=True)
                    with RAW.open("a") as f:
                        f.write(json.dumps(row) + "\n")
    TABLE.write_text(render(read_raw()))
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
