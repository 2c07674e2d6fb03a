"""Bytes of the ternary record: expected before training, shipped, and in the format it was published in.

    python tests/bench/ternary_record.py --train  # train records/t74 for 40 short steps (an hour, two cores)
    python tests/bench/ternary_record.py          # ship those weights, add to the raw lines, write the table
    python tests/bench/ternary_record.py --table  # write the table again from the raw lines

The model has the record's size and all its knobs; a step has 4,096 tokens of the ablation's sp8192 shards
(data/README.md), and is one of 40. The published format is what the record's script wrote: five trits a byte,
float16 scales, one byte for each float8 number with its rows' float16 scales, float16 for the rest, all of it
through one LZMA stream at its hardest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from common import ROOT, Bench, facts, parser_for, place_of

import train_gpt as tg
from build_submission import read_env_file

BENCH = Bench("ternary_record")
RUN = ROOT / "runs/bench_t74"
DATA = "data/datasets/ablation_sp8192"
SMALL = {
    "DATA_PATH": DATA, "TOKENIZER_PATH": f"{DATA}/tokenizer.model", "RUN_DIR": str(RUN), "OVERWRITE": "1",
    "ITERATIONS": "40", "MAX_WALLCLOCK_SECONDS": "0", "TRAIN_BATCH_TOKENS": "4096", "TRAIN_SEQ_LEN": "512",
    "TRAIN_SPANS": "1", "WARMUP_STEPS": "0", "MUON_MOMENTUM_WARMUP_STEPS": "10", "DTYPE": "bfloat16",
    "COMPILE": "1", "VAL_MAX_TOKENS": "20000", "VAL_BATCH_TOKENS": "4096", "TRAIN_LOG_EVERY": "5",
    "SLIDING_WINDOW_ENABLED": "0", "SCORE": "roundtrip",
}  # fmt: skip
STEPS = (0.0, 0.02, 0.04)  # TERNARY_SCALE_STEP


def recipe() -> dict[str, str]:
    """The record's knobs at the size of a step that a CPU can take."""
    return read_env_file(ROOT / "records/t74/env") | SMALL


def train() -> None:
    subprocess.run([sys.executable, "train_gpt.py"], env={**os.environ, **recipe()}, cwd=ROOT, check=True)


def trained(cfg: tg.Config, world: tg.World) -> tg.GPT:
    """The weights of the run before they were shipped, in a model of this configuration."""
    files = tg.checkpoint_files(RUN / "checkpoints")
    if not files:
        sys.exit(f"no checkpoint in {RUN}; run `python tests/bench/ternary_record.py --train` first")
    tensors = tg.unpack_checkpoint(files[0].read_bytes(), str(files[0])).tensors
    model = tg.make_model(cfg, world)
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    return model


def published_bytes(shipment: tg.Shipment) -> int:
    """The streams of an artifact with float16 scales, as the record's script packed them."""
    parts: dict[str, list[bytes]] = {}
    for streams in shipment.streams.values():
        for kind, values in streams.items():
            data = tg.to_form(values, -1, "base3") if kind == "ternary.q" else values.tobytes()
            parts.setdefault(kind, []).append(data)
    return len(tg.squeeze(b"".join(b"".join(parts[kind]) for kind in sorted(parts)), "lzma"))


def measure() -> None:
    world = tg.World(0, 1, torch.device("cpu"), torch.bfloat16, False, tg.Journal(None), Path())
    about = facts("date", "source", "python", "numpy", "torch", "cores", "cpu", "load")
    about["run"] = f"{about['date']} {about['source']} {int(time.time())}"
    published = 0
    for step in STEPS:
        cfg = tg.read_config(recipe() | {"TERNARY_SCALE_STEP": str(step)})
        begin = time.perf_counter()
        shipment = tg.export(trained(cfg, world), cfg)
        middle = time.perf_counter()
        model = tg.load(shipment.blob, cfg, world, "the artifact")
        end = time.perf_counter()
        published = published or published_bytes(shipment)
        score, _ = tg.evaluate(model, tg.Validation(cfg, tg.load_tokenizer(cfg)), cfg.eval_len, cfg, world)
        trits = np.concatenate([s["ternary.q"] for s in shipment.streams.values() if "ternary.q" in s])
        row = {
            "step": step, "forecast": tg.predicted_bytes(cfg, world), "bytes": len(shipment.blob),
            "published": published, "val_bpb": score.val_bpb, "targets": score.tokens,
            "zeros": float((trits == 0).mean()), "trits": len(trits),
            "streams": {kind: len(coded.data) for kind, coded in shipment.coded.items()},
            "encode_s": round(middle - begin, 2), "decode_s": round(end - middle, 2),
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        BENCH.add(about | row)


def render(rows: list[dict]) -> str:
    """The latest measurement."""
    last = [r for r in rows if r["run"] == rows[-1]["run"]] if rows else []
    steps, tokens = SMALL["ITERATIONS"], int(SMALL["TRAIN_BATCH_TOKENS"])
    head = [
        "# Bytes of the ternary record",
        "",
        f"`python tests/bench/ternary_record.py`: records/t74 after {steps} steps of {tokens:,} tokens, "
        f"shipped with scales in float16 and in steps. {where(last)}",
        "",
        "| scales | expected before training | artifact | /expected | published format | /published "
        "| bits per byte | change | encode s | decode s |",
        f"|{'---|' * 10}",
        *(line_of(r, last[0]) for r in last),
    ]
    if last:
        bytes_ = ", ".join(f"{kind} {size:,}" for kind, size in last[1]["streams"].items())
        head += ["", f"Streams at {last[1]['step']:.0%}: {bytes_}."]
    return "\n".join(head) + "\n"


def where(rows: list[dict]) -> str:
    if not rows:
        return "Not run."
    r = rows[-1]
    return (
        f"{r['trits']:,} trits, {r['zeros']:.1%} of them zeros; bits per byte of the first {r['targets']:,} "
        f"targets of FineWeb documents. {place_of(r)}"
    )


def line_of(r: dict, first: dict) -> str:
    size, expected, published = r["bytes"], r["forecast"], r["published"]
    cells = [f"in steps of {r['step']:.0%}" if r["step"] else "float16", f"{expected:,}", f"{size:,}"]
    cells += [f"{size / expected:.4f}", f"{published:,}", f"{size / published:.4f}", f"{r['val_bpb']:.5f}"]
    cells += [f"{r['val_bpb'] - first['val_bpb']:+.5f}", f"{r['encode_s']:.1f}", f"{r['decode_s']:.1f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--train", action="store_true", help="only train the weights that are measured")
    words = parser.parse_args()
    if words.train:
        return train()
    if not words.table:
        measure()
    BENCH.write_table(render)


if __name__ == "__main__":
    main()
