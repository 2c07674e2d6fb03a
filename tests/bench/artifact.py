"""Bytes of the artifact: every coder on trained and on synthetic weights, against entropy, in one table.

    python tests/bench/artifact.py --train     # train the small baseline whose weights are measured (minutes)
    python tests/bench/artifact.py             # measure, append to the raw lines, write the table
    python tests/bench/artifact.py --only artifacts
    python tests/bench/artifact.py --table     # write the table again from the raw lines

Trained weights: the baseline of records/baseline (17,059,912 parameters) after 100 steps of 4,096 tokens
of the Python library's text, kept under runs/. Synthetic: independent draws at the records' sizes. Every
coder's bytes are decoded again and compared. zpaq runs through lrzip where that is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common import ROOT, Bench, facts, parser_for, place_of
from torch import Tensor

import train_gpt as tg

BENCH = Bench("artifact")
RUN = ROOT / "runs/bench_b0"
DATA = "data/datasets/python_sp1024"  # what run_local.sh makes
SMALL = {
    "DATA_PATH": DATA, "TOKENIZER_PATH": f"{DATA}/tokenizer.model", "RUN_DIR": str(RUN), "OVERWRITE": "1",
    "ITERATIONS": "100", "MAX_WALLCLOCK_SECONDS": "0", "TRAIN_BATCH_TOKENS": "4096", "TRAIN_SEQ_LEN": "512",
    "WARMDOWN_ITERS": "40", "WARMUP_STEPS": "1", "DTYPE": "bfloat16", "COMPILE": "1",
    "VAL_MAX_TOKENS": "30000", "TRAIN_LOG_EVERY": "10",
}  # fmt: skip
TRITS, TRIT_SHARES = 64_880_640, (0.332, 0.336, 0.332)  # the 74M ternary record: zeros are a third
GROUP = 128


def train() -> None:
    """Train the small baseline on text that every machine has; `run_local.sh` makes its shards."""
    subprocess.run([sys.executable, "train_gpt.py"], env={**os.environ, **SMALL}, cwd=ROOT, check=True)


def trained_weights() -> tuple[tg.GPT, tg.Config]:
    """The trained model, from its checkpoint: the weights before any rounding."""
    files = tg.checkpoint_files(RUN / "checkpoints")
    if not files:
        sys.exit(f"no checkpoint in {RUN}; run `python tests/bench/artifact.py --train` first")
    checkpoint = tg.unpack_checkpoint(files[0].read_bytes(), str(files[0]))
    cfg = tg.read_config(checkpoint.meta["knobs"])
    model = tg.make_model(cfg, alone())
    tensors = {n.removeprefix("model."): t for n, t in checkpoint.tensors.items() if n.startswith("model.")}
    model.load_state_dict(tensors)
    return model, cfg


def alone() -> tg.World:
    return tg.World(0, 1, torch.device("cpu"), torch.float32, False, tg.Journal(None), Path())


# ------------------------------------------------------------------------------------ streams


def drawn_trits(rows: int) -> tg.Pool:
    """Independent draws in rows of 768, as frequent as in the ternary record."""
    values = np.random.default_rng(0).choice(np.array([-1, 0, 1], np.int8), rows * 768, p=TRIT_SHARES)
    return tg.Pool([tg.Plane(rows, 768, -1, 1)], values)


def drawn_int6(rows: int) -> tg.Pool:
    """Independent Gaussian draws in rows of 512, with the clip of the int6 records."""
    drawn = np.random.default_rng(0).standard_normal(rows * 512, np.float32)
    values = np.clip(np.rint(drawn * (31 / 12.85)), -31, 31)
    return tg.Pool([tg.Plane(rows, 512, -31, 31)], values.astype(np.int8))


def pool_of(model: tg.GPT, codec: tg.Codec, stream: str) -> tg.Pool:
    """One stream of every matrix of the blocks under a codec."""
    planes, values = [], []
    for name, p in sorted(model.named_parameters(), key=lambda pair: tg.by_kind(pair[0])):
        if name.startswith("blocks") and name.endswith("weight"):
            planes.append(codec.planes(tuple(p.shape))[stream])
            values.append(codec.encode(p.detach())[stream])
    return tg.Pool(planes, np.concatenate(values))


def streams(model: tg.GPT) -> Iterator[tuple[str, tg.Pool]]:
    yield "trits 64.9M", drawn_trits(TRITS // 768)
    yield "int6 Gauss 8.4M", drawn_int6(16384)
    yield "int6 trained", pool_of(model, tg.IntRow(6, 12.85), "int6.q")
    yield "int8 trained, row maximum", pool_of(model, tg.IntRow(8), "int8.q")
    yield "trits trained", pool_of(model, tg.Ternary(GROUP), "ternary.q")
    yield "scales float16", pool_of(model, tg.Ternary(GROUP), "ternary.scale")
    for step in (0.02, 0.04):
        yield f"scales in steps of {step:.0%}", pool_of(model, tg.Ternary(GROUP, step), "ternary.rest")


# ------------------------------------------------------------------------------------- coders


class Way(NamedTuple):
    """A way to write a pool: bytes, and how to read them again."""

    encode: Callable[[tg.Pool], bytes]
    decode: Callable[[bytes, tg.Pool], np.ndarray]


def by_form(form: str, name: str) -> Way:
    def encode(pool: tg.Pool) -> bytes:
        return tg.squeeze(tg.to_form(pool.values, pool.planes[0].low, form), name)

    def decode(data: bytes, pool: tg.Pool) -> np.ndarray:
        return tg.decode_pool(data, pool.planes, f"{form}+{name}" if name else form)

    return Way(encode, decode)


def by_rans(along: tuple[str, ...] | None) -> Way:
    """The entropy coder with one table, or as the program ships it (None: the cheapest classes)."""

    def encode(pool: tg.Pool) -> bytes:
        if along is None:
            name, data = tg.rans_pool(pool)
            return name.encode() + b"\n" + data
        rans = tg.measure(pool, along)[0]
        symbols = (pool.values.astype(np.int16) - pool.planes[0].low).astype(np.uint8)
        return rans.pack() + tg.rans_encode(symbols, rans.classes(pool.planes, along), rans.shares)

    def decode(data: bytes, pool: tg.Pool) -> np.ndarray:
        name, _, data = data.partition(b"\n") if along is None else (b"rans", b"", data)
        return tg.decode_pool(data, pool.planes, name.decode())

    return Way(encode, decode)


def by_lrzip() -> Way:
    """zpaq at its best, as the records call it; -T: do not skip what looks incompressible."""

    def encode(pool: tg.Pool) -> bytes:
        densest = tg.to_form(pool.values, pool.planes[0].low, tg.forms_of(pool.planes[0])[0])
        return lrzip(densest, "-z", "-T", "-L", "9")

    def decode(data: bytes, pool: tg.Pool) -> np.ndarray:
        return tg.decode_pool(lrzip(data, "-d"), pool.planes, tg.forms_of(pool.planes[0])[0])

    return Way(encode, decode)


def lrzip(data: bytes, *words: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in.lrz").write_bytes(data)
        command = ["lrzip", "-q", "-f", *words, "-o", f"{folder}/out", f"{folder}/in.lrz"]
        subprocess.run(command, check=True, capture_output=True)
        return (Path(folder) / "out").read_bytes()


def ways_for(pool: tg.Pool) -> dict[str, Way]:
    forms = tg.forms_of(pool.planes[0])
    names = ("", "brotli", "lzma")
    ways = {f"{form}, {name or 'raw'}": by_form(form, name) for form in forms for name in names}
    ways |= {f"{forms[0]}, zstd": by_form(forms[0], "zstd")} if has_zstd() else {}
    ways |= {f"{forms[0]}, zpaq": by_lrzip()} if shutil.which("lrzip") else {}
    if tg.byte_wide(pool.planes[0]):
        ways |= {"rANS, one table": by_rans(()), "rANS, classes by energy": by_rans(None)}
    return ways


def has_zstd() -> bool:
    try:
        tg.import_zstd()
    except tg.UserError:
        return False
    return True


def measure_stream(name: str, pool: tg.Pool) -> Iterator[dict]:
    entropy = tg.entropy_bytes(pool.planes[0], pool.values)
    for method, way in ways_for(pool).items():
        begin = time.perf_counter()
        data = way.encode(pool)
        middle = time.perf_counter()
        found = way.decode(data, pool)
        end = time.perf_counter()
        if found.tobytes() != pool.values.tobytes():
            sys.exit(f"{method} does not give back the values of {name}")
        yield {
            "table": "streams", "stream": name, "values": pool.count, "entropy": round(entropy, 1),
            "method": method, "bytes": len(data), "encode_s": round(middle - begin, 3),
            "decode_s": round(end - middle, 3),
        }  # fmt: skip


# ---------------------------------------------------------------------------- whole artifacts


def whole(model: tg.GPT, cfg: tg.Config) -> Iterator[dict]:
    """The trained baseline as complete artifacts, and how long a complete load takes."""
    recipes = {
        "int8, row maximum (baseline)": {},
        "int6, clip 12.85, embedding int7, clip 15": {"MATRIX_BITS": 6, "MATRIX_CLIP_SIGMAS": 12.85,
                                                      "EMBED_BITS": 7, "EMBED_CLIP_SIGMAS": 15},
        "ternary, float16 scales, embedding fp8": {"MATRIX_CODEC": "ternary", "EMBED_CODEC": "fp8"},
        "ternary, scales 2%, embedding fp8": {"MATRIX_CODEC": "ternary", "TERNARY_SCALE_STEP": 0.02,
                                              "EMBED_CODEC": "fp8"},
    }  # fmt: skip
    for name, knobs in recipes.items():
        for compressor in ("auto", "brotli"):
            env = tg.knob_values(cfg) | {k: str(v) for k, v in knobs.items()} | {"COMPRESSOR": compressor}
            yield whole_row(name, compressor, model, tg.read_config(env))
    yield from record_ternary()


def whole_row(name: str, compressor: str, model: tg.GPT, cfg: tg.Config) -> dict:
    other = tg.empty_model(cfg, alone())
    other.load_state_dict(model.state_dict(), assign=True)
    begin = time.perf_counter()
    blob = tg.export(other, cfg).blob
    middle = time.perf_counter()
    tensors = tg.open_artifact(blob, cfg, alone(), name).tensors
    end = time.perf_counter()
    tags = tg.param_tags(other)
    for key, p in other.named_parameters():
        if not torch.equal(tensors[key], tags[key].codec.fake_quant(p.detach())):
            sys.exit(f"{name}: {key} does not come back as it was rounded")
    return {
        "table": "artifacts", "artifact": name, "compressor": compressor, "bytes": len(blob),
        "forecast": tg.predicted_bytes(cfg, alone()), "encode_s": round(middle - begin, 2),
        "decode_s": round(end - middle, 2),
    }  # fmt: skip


def record_ternary() -> Iterator[dict]:
    """The 74M ternary record's size: synthetic trits and scales as in the trained model, its format and ours.

    Its format: base-3 and float16 scales, both through lzma. The 2.5M other parameters are left out.
    """
    trits, rng = drawn_trits(TRITS // 768), np.random.default_rng(1)
    own = 0.02 * np.exp(0.1 * rng.standard_normal((TRITS // 768, 1)))  # rows differ by a tenth
    drawn = [rng.standard_normal((len(own), GROUP), np.float32) for _ in range(768 // GROUP)]
    rows = torch.from_numpy(own * np.stack([np.abs(g).mean(1) for g in drawn], 1)).float()  # groups by chance
    begin, half = time.perf_counter(), rows.half().numpy().tobytes()
    theirs = len(tg.squeeze(tg.to_form(trits.values, -1, "base3"), "lzma")) + len(tg.squeeze(half, "lzma"))
    name = "64.9M trits and 506,880 scales"
    yield {
        "table": "artifacts", "artifact": name, "compressor": "record's format: base-3 and float16, lzma",
        "bytes": theirs, "of_record": 1.0, "encode_s": round(time.perf_counter() - begin, 2),
    }  # fmt: skip
    for step in (0.0, 0.02, 0.04):
        codec = tg.Ternary(GROUP, step)
        begin = time.perf_counter()
        size, data = record_pools(codec, rows, trits)
        middle = time.perf_counter()
        for planes, coder, blob in data:
            tg.decode_pool(blob, planes, coder)
        yield {
            "table": "artifacts", "artifact": name,
            "compressor": f"ours, scales {f'in steps of {step:.0%}' if step else 'float16'}", "bytes": size,
            "of_record": round(size / theirs, 4), "encode_s": round(middle - begin, 2),
            "decode_s": round(time.perf_counter() - middle, 2),
        }  # fmt: skip


def record_pools(codec: tg.Ternary, scales: Tensor, trits: tg.Pool) -> tuple[int, list]:
    """Bytes of trits and scales as the program codes them."""
    pools = [trits]
    if codec.log_step:
        mean, rest = codec.exponents(scales.half().float())
        pools.append(tg.Pool([tg.Plane(len(mean), 1, -(2**15), 2**15 - 1)], tg.stream(mean, torch.int16)))
        pools.append(tg.Pool([tg.Plane(*rest.shape, -127, 127)], tg.stream(rest)))
    else:
        pools.append(tg.Pool([tg.Plane(*scales.shape)], tg.stream(scales, torch.half)))
    coded = [tg.code_pool(pool, "auto") for pool in pools]
    data = [(pool.planes, c.coder, c.data) for pool, c in zip(pools, coded, strict=True)]
    return sum(len(c.data) for c in coded), data


# -------------------------------------------------------------------------------------- scales


def scale_error(model: tg.GPT, cfg: tg.Config) -> Iterator[dict]:
    """What log-quantised scales cost: squared error of the ternary matrices, relative to the weights'."""
    for step in (0.0, 0.01, 0.02, 0.04, 0.08):
        codec, lost, held = tg.Ternary(GROUP, step), 0.0, 0.0
        for name, p in model.named_parameters():
            if name.startswith("blocks") and name.endswith("weight"):
                w = p.detach()
                lost += float((codec.fake_quant(w) - w).double().square().sum())
                held += float(w.double().square().sum())
        yield {"table": "scales", "step": step, "error": lost / held}


# --------------------------------------------------------------------------------------- table


def where(rows: list[dict]) -> str:
    """The machine of a section's rows."""
    return place_of(rows[-1]) if rows else "Not run."


def render(rows: list[dict]) -> str:
    """The tables, each of its latest measurement."""
    last = {}
    for name in SECTIONS:
        mine = [r for r in rows if r["table"] == name]
        last[name] = [r for r in mine if r["run"] == mine[-1]["run"]] if mine else []
    head = [
        "# Bytes of the artifact",
        "",
        "`python tests/bench/artifact.py`. Each coder ran once, its bytes were decoded and compared; seconds "
        "are wall time.",
        "",
        "## Streams",
        "",
        f"{where(last['streams'])} `/entropy`: bytes over the order-0 entropy of the whole stream. Trained: "
        "the baseline's 54 matrices after 100 steps.",
        "",
        "| stream | values | method | bytes | bits each | /entropy | encode s | decode s |",
        "|---|---|---|---|---|---|---|---|",
        *(stream_row(r) for r in last["streams"]),
        "",
        "## Whole artifacts",
        "",
        f"{where(last['artifacts'])} `/forecast`: bytes over what the program expects before the first step.",
        "",
        "| artifact | coder | bytes | /forecast | /record's format | encode s | decode s |",
        "|---|---|---|---|---|---|---|",
        *(artifact_row(r) for r in last["artifacts"]),
        "",
        "## Log-quantised scales",
        "",
        f"{where(last['scales'])} Post-training ternary (groups of 128) of the same weights: squared error "
        "over the squared weights.",
        "",
        "| step | relative squared error | change |",
        "|---|---|---|",
        *scale_rows(last["scales"]),
    ]
    return "\n".join(head) + "\n"


def stream_row(r: dict) -> str:
    each = f"{8 * r['bytes'] / r['values']:.4f} | {r['bytes'] / r['entropy']:.4f}"
    seconds = f"{r['encode_s']:.2f} | {r['decode_s']:.2f}"
    return f"| {r['stream']} | {r['values']:,} | {r['method']} | {r['bytes']:,} | {each} | {seconds} |"


def artifact_row(r: dict) -> str:
    forecast = f"{r['bytes'] / r['forecast']:.3f}" if "forecast" in r else "-"
    record = f"{r['of_record']:.4f}" if "of_record" in r else "-"
    decode = f"{r['decode_s']:.2f}" if "decode_s" in r else "-"
    size, encode = f"{r['bytes']:,}", f"{r['encode_s']:.2f}"
    return f"| {' | '.join([r['artifact'], r['compressor'], size, forecast, record, encode, decode])} |"


def scale_rows(rows: list[dict]) -> list[str]:
    plain = next((r["error"] for r in rows if not r["step"]), None)
    return [
        f"| {'float16' if not r['step'] else format(r['step'], '.0%')} | {r['error']:.6f} "
        f"| {r['error'] / plain - 1:+.4%} |"
        for r in rows
    ]


def measure_streams(model: tg.GPT, cfg: tg.Config) -> Iterator[dict]:
    for name, pool in streams(model):
        yield from measure_stream(name, pool)


SECTIONS = {"streams": measure_streams, "artifacts": whole, "scales": scale_error}


def measure(only: str | None) -> None:
    model, cfg = trained_weights()
    about = facts("date", "source", "python", "numpy", "torch", "cores", "cpu", "load")
    about["run"] = f"{about['date']} {about['source']} {int(time.time())}"
    for name in [only] if only else SECTIONS:
        for row in SECTIONS[name](model, cfg):
            print(json.dumps(row), flush=True)
            BENCH.add(about | row)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--train", action="store_true", help="only train the weights that are measured")
    parser.add_argument("--only", choices=["streams", "artifacts", "scales"], help="one section")
    words = parser.parse_args()
    if words.train:
        return train()
    if not words.table:
        measure(words.only)
    BENCH.write_table(render)


if __name__ == "__main__":
    main()
