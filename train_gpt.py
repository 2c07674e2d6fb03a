"""Train, ship and score a small language model in 16,000,000 bytes. One file, read top to bottom.

    python train_gpt.py                                        # CPU or one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py      # knobs are environment variables
    python train_gpt.py --knobs                                # print them (the README's table)
    python train_gpt.py --params                               # print model_params:N and stop

A run trains under a clock, writes its artifact, loads that artifact into a fresh model and scores
the loaded model: the number printed last belongs to the bytes on disk, never to the weights in memory.

 1 Config        2 Schedule      3 Journal       4 World         5 Clock
 6 Data          7 Kernels       8 Storage       9 Coding       10 Layers
11 Mixers       12 Feed-forward 13 Memory       14 Model        15 Speed
16 Objective    17 Optimizer    18 Checkpoint   19 Calibrate    20 Train
21 Export       22 Evaluate     23 Report       24 Main

B rows, T tokens, D width, H query heads, G key/value heads, K head dim, V vocabulary, N = B*T.
Losses are nats per token unless a name says bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import inspect
import io
import itertools
import json
import linecache
import lzma
import math
import os
import platform
import re
import shutil
import signal
import statistics
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# build_submission.py writes the next four.
FROZEN: dict[str, object] = {}  # knob -> value, of those for which the program does not ask its environment,
LIVE: dict[str, object] = {}  # and of those for which it does
SOURCE_STAGE = "source"  # which stage of the build the program is
FOLDED = False  # whether frozen values stand in its code, and what they leave dead is gone
LIVE_KNOBS = ("RUN_ID", "RUN_DIR", "DATA_PATH", "TOKENIZER_PATH", "SEED")  # what any built program is told
BOS = 1  # begins every document; all tokenizers of the challenge agree on it (frontier 1.1)
SIZE_LIMIT = 16_000_000  # bytes of code and weights together; decimal, not MiB (challenge README)

# ======================================================================================
# 1. Config -- every environment variable, and nothing else
# uses:
# ======================================================================================


class UserError(Exception):
    """Something the user can mend. Its text is one line: what, found, allowed, how to mend."""


def knob(  # noqa: PLR0913 -- a knob is one row
    env: str, default: object, doc: str, *,
    choices: tuple = (), within: tuple = (None, None), tiny: object = None, on: object = None,
) -> object:  # fmt: skip
    """One knob, one row: name, default, meaning, allowed values, its value in a tiny test run, and the value
    that switches its feature on there; a bool and a choice need no such value. Where the default is off, the
    tiny value is that of a feature that is on."""
    on = tiny if on is None and not default else on
    meta = {"env": env, "doc": doc, "choices": choices, "within": within, "tiny": tiny, "on": on}
    return field(default=default, metadata=meta)


def of_config(function: Callable) -> Callable:
    """Marks a function of cfg alone whose value is a literal; the builder puts that in place of its calls."""
    return function


# fmt: off
@dataclass(frozen=True)
class RunConfig:
    """Where a run reads and writes and how often it speaks; nothing here changes a weight."""

    id: str = knob("RUN_ID", "", "name of the run; empty means date and time")
    dir: str = knob("RUN_DIR", "", "folder that receives everything; empty means runs/<RUN_ID>")
    data: str = knob("DATA_PATH", "data/datasets/fineweb10B_sp1024", "folder of .bin shards")
    tokenizer: str = knob("TOKENIZER_PATH", "data/tokenizers/fineweb_1024_bpe.model",
                          "SentencePiece model of the shards")
    strict: bool = knob("STRICT", False, "an unknown or mistyped knob is an error")
    overwrite: bool = knob("OVERWRITE", False, "clear a RUN_DIR that already holds a run")
    resume: bool = knob("RESUME", False, "continue from the newest readable checkpoint in RUN_DIR")
    checkpoint_every: float = knob("CHECKPOINT_EVERY", 0.0, "seconds between checkpoints; 0 = on SIGTERM and "
                                   "SIGINT and at the end; below 0 = none", within=(-1.0, None))
    eval_only: bool = knob("EVAL_ONLY", False, "score ARTIFACT and stop, without training")
    artifact: str = knob("ARTIFACT", "", "artifact to score with EVAL_ONLY=1; empty means RUN_DIR/model.ptz")
    sample: int = knob("SAMPLE", 0, "with EVAL_ONLY=1: print so many sampled tokens instead of a score",
                       within=(0, 100000))
    precompile: bool = knob("PRECOMPILE", False, "fill the compile cache with the warm-up's graphs and stop")
    compile_cache: str = knob("COMPILE_CACHE", "", "folder that keeps compiled code between runs; empty "
                              "means the compiler's own")
    nll_path: str = knob("NLL_PATH", "", ".npy that receives the nats of every target of the declared score")
    progress: bool = knob("PROGRESS", True, "a live bar on a terminal that has tqdm")
    forecast: bool = knob("FORECAST", True, "say early what bytes and memory the run takes, refuse "
                          "what cannot fit, and write bytes.json")
    log_every: int = knob("TRAIN_LOG_EVERY", 200, "steps between log lines", within=(0, None), tiny=1)
    val_every: int = knob("VAL_LOSS_EVERY", 1000, "steps between validations, 0 = off",
                          within=(0, None), tiny=0)
    score: str = knob("SCORE", "roundtrip", "which score the run declares as its own",
                      choices=("roundtrip", "sliding"))

    @property
    def saves(self) -> bool:
        """Whether there are checkpoints; without them a signal ends the run at once."""
        return self.checkpoint_every >= 0


@dataclass(frozen=True)
class BudgetConfig:
    seed: int = knob("SEED", 1337, "seed of the initial weights", within=(0, 2**63 - 1))
    iterations: int = knob("ITERATIONS", 20000, "most optimizer steps to take", within=(0, None), tiny=6)
    seconds: float = knob("MAX_WALLCLOCK_SECONDS", 600.0, "training stops before this; 0 = no cap",
                          within=(0.0, None), tiny=0.0)
    warmup_steps: int = knob("WARMUP_STEPS", 20, "steps per graph that prime the compiler and are undone",
                             within=(0, None), tiny=1)
    max_bad_steps: int = knob("MAX_BAD_STEPS", 10, "stop with an error after this many non-finite steps",
                              within=(1, None))


@dataclass(frozen=True)
class ComputeConfig:
    device: str = knob("DEVICE", "auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = knob("DTYPE", "auto", "activations; auto = bfloat16 where it is fast",
                      choices=("auto", "float32", "bfloat16"), tiny="float32")
    compiling: str = knob("COMPILE", "auto", "torch.compile the blocks; auto = yes on CUDA, measured on CPU",
                        choices=("auto", "0", "1"), tiny="0")
    clock_sync_every: int = knob("CLOCK_SYNC_EVERY", 0, "steps between waits for the device; 0 = 1 below "
                                 "200 ms a step, else 4", within=(0, 1000))
    dist_timeout: float = knob("DIST_TIMEOUT", 600.0, "seconds before a collective fails", within=(1.0, None))
    fused_ce: bool = knob("FUSED_CE_ENABLED", True, "training loss without the logits' float32 copies: by "
                          "Triton on a GPU, by chunks on a CPU")
    ce_form: str = knob("FUSED_CE_FORM", "auto", "how Triton makes that loss; auto = one_pass; approximate = "
                        "that with the hardware's tanh; two_pass = as record 1855",
                        choices=("auto", "one_pass", "approximate", "two_pass"))
    fused_mlp: bool = knob("FUSED_MLP", True, "on a GPU in bfloat16: the MLP's activation inside Triton's "
                           "matrix product")
    attention: str = knob("ATTENTION", "auto", "kernel of attention; auto = the first that can run here",
                          choices=("auto", "flash3", "flash2", "varlen", "flex", "sdpa"), tiny="auto")
    compile_mode: str = knob("COMPILE_MODE", "default", "how hard torch.compile tries on the blocks; none "
                             "with CUDA graphs, in whose memory gradients could not add up",
                             choices=("default", "max-autotune-no-cudagraphs"))


@dataclass(frozen=True)
class DataConfig:
    batch_tokens: int = knob("TRAIN_BATCH_TOKENS", 524288, "tokens per optimizer step, all ranks together",
                             within=(1, None), tiny=256)
    seq_len: int = knob("TRAIN_SEQ_LEN", 1024, "longest context in training", within=(1, None), tiny=32)
    spans: int = knob("TRAIN_SPANS", 8, "contiguous pieces of text per step; ranks x micro-batches divide it",
                      within=(1, None), tiny=8)
    accum: int = knob("GRAD_ACCUM_STEPS", 0, "micro-batches per rank and step; 0 = TRAIN_SPANS / ranks",
                      within=(0, None), tiny=0)
    packing: bool = knob("DOC_PACKING", False, "spans begin at a BOS, and attention stays inside documents")
    caseops: bool = knob("CASEOPS_ENABLED", False, "shards of CaseOps text: validation bytes are read from "
                         "their sidecars (data/README.md)")

    @property
    def span(self) -> int:
        """Tokens that one span is trained on; it holds one more, the last target."""
        return self.batch_tokens // self.spans


@dataclass(frozen=True)
class ModelConfig:
    vocab: int = knob("VOCAB_SIZE", 1024, "tokens in the vocabulary", within=(2, 65536), tiny=320)
    layers: int = knob("NUM_LAYERS", 9, "blocks of the model", within=(1, 256), tiny=3)
    dim: int = knob("MODEL_DIM", 512, "width of the residual stream", within=(2, None), tiny=32)
    heads: int = knob("NUM_HEADS", 8, "query heads per block", within=(1, None), tiny=4)
    kv_heads: int = knob("NUM_KV_HEADS", 4, "key and value heads", within=(1, None), tiny=2)
    mlp_mult: float = knob("MLP_MULT", 2.0, "MLP width over MODEL_DIM", within=(0.01, None))
    tied: bool = knob("TIE_EMBEDDINGS", True, "the head is the embedding")
    embed_std: float = knob("TIED_EMBED_INIT_STD", 0.005, "spread of a tied embedding at the start",
                            within=(0.0, None))
    embed_dim: int = knob("EMBED_DIM", 0, "width of the embedding, with a matrix to MODEL_DIM behind it and "
                          "one back in front of the head; 0 = MODEL_DIM, no matrices", within=(0, None),
                          tiny=16)
    embed_optim: str = knob("EMBED_PROJ_OPTIMIZER", "muon", "who trains those two matrices; adam = as the "
                            "embedding", choices=("muon", "adam"))
    vocab_bias: bool = knob("VOCAB_BIAS", False, "a learned bias of each logit, behind the cap")
    softcap: float = knob("LOGIT_SOFTCAP", 30.0, "cap of the logits", within=(1e-3, None))
    curve: str = knob("SOFTCAP_TYPE", "tanh", "how logits bend, s = logits / cap: cap * tanh(s); poly = a "
                      "polynomial of degree 5, cut at the cap (T74); algebraic = cap * s / sqrt(1 + s^2)",
                      choices=("tanh", "poly", "algebraic"))
    z_loss: float = knob("Z_LOSS_WEIGHT", 0.0, "weight of the mean square of the logits' log-sum-exp in "
                         "training; never part of a reported loss", within=(0.0, None), on=0.1)
    rope_base: float = knob("ROPE_BASE", 10000.0, "base of the rotary frequencies", within=(1.0, None))
    qk_gain: float = knob("QK_GAIN_INIT", 1.5, "learned gain of each query head at the start")
    slope: float = knob("MLP_NEGATIVE_SLOPE", 0.0, "slope of the MLP's ReLU below zero, before it is squared",
                        within=(0.0, 1.0), on=0.5)
    init: str = knob("MATRIX_INIT", "uniform", "matrices that do not begin at zero: U(+-1/sqrt(inputs)), "
                     "orthogonal, or normal of MATRIX_INIT_STD", choices=("uniform", "orthogonal", "normal"))
    init_std: float = knob("MATRIX_INIT_STD", 0.02, "spread of normal matrices at the start",
                           within=(0.0, None))
    out_std: float = knob("RESIDUAL_PROJ_INIT_STD", 0.0, "spread at the start of the matrices that end "
                          "attention and MLP; 0 = they begin at zero", within=(0.0, None), on=0.01)
    normed: str = knob("NORMED_PROJ", "none", "RMS norm of what the matrices that end attention and MLP "
                       "read: plain, or with a learned gain; the MLP is not fused then",
                       choices=("none", "plain", "gain"))

    @property
    def embed_width(self) -> int:
        """Width of the embedding's rows and of what the head reads."""
        return self.embed_dim or self.dim

    @property
    def extras(self) -> str:
        """What the logits have beyond a tanh, in words for the log; Triton's kernels do not know of it."""
        curve = "" if self.curve == "tanh" else "_" + self.curve
        return curve + "_bias" * self.vocab_bias + "_z" * (self.z_loss > 0)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def hidden(self) -> int:
        return int(self.mlp_mult * self.dim)


@dataclass(frozen=True)
class LoopConfig:
    """Depth recurrence: layers first..last are visited count extra times (record 1855, 2.8)."""

    count: int = knob("NUM_LOOPS", 0, "extra visits of the looped layers; 0 = none", within=(0, 16), on=1)
    first: int = knob("LOOP_START", 3, "first looped layer, counted from 0", within=(0, None), tiny=1)
    last: int = knob("LOOP_END", 5, "last looped layer, itself included", within=(0, None), tiny=1)
    at: float = knob("ENABLE_LOOPING_AT", 0.35, "share of the run before looping", within=(0.0, 1.0))

    @property
    def on(self) -> bool:
        return self.count > 0


@dataclass(frozen=True)
class AttnConfig:
    """What attention does besides attending (records 549, 1667, 1855, 1886; frontier 2.4 and 2.11)."""

    rope_dims: int = knob("ROPE_DIMS", 0, "dimensions of a head that rotary embedding turns; 0 = all",
                          within=(0, None), tiny=4)
    rope_ntk: bool = knob("ROPE_YARN", False, "stretch the rotary base where contexts are longer than in "
                          "training (NTK); has nothing to do with ROPE_TYPE=yarn")
    rope_type: str = knob("ROPE_TYPE", "rope", "rotary frequencies as they are, or yarn = the slow ones, by "
                          "a ramp, as for contexts of YARN_MAX_LEN, in training too; not ROPE_YARN",
                          choices=("rope", "yarn"))
    yarn_len: int = knob("YARN_MAX_LEN", 2048, "context for which ROPE_TYPE=yarn slows them from "
                         "TRAIN_SEQ_LEN", within=(1, None))
    fused_qkv: bool = knob("FUSED_QKV", False, "queries, keys and values from one matrix, which Muon "
                           "orthogonalises as a whole")
    xsa_last: int = knob("XSA_LAST_N", 0, "last layers whose heads drop what lies along their own value",
                         within=(0, None), on=2)
    dense_gate: bool = knob("GATED_ATTN_ENABLED", False, "a gate per head that reads every channel")
    dense_std: float = knob("GATED_ATTN_INIT_STD", 0.01, "spread of its weights at the start",
                            within=(0.0, None))
    sparse_gate: bool = knob("SPARSE_ATTN_GATE_ENABLED", False, "a gate per head that reads GATE_WINDOW "
                             "channels")
    sparse_std: float = knob("SPARSE_ATTN_GATE_INIT_STD", 0.0, "spread of its weights at the start",
                             within=(0.0, None))
    sparse_scale: float = knob("SPARSE_ATTN_GATE_SCALE", 1.0, "factor before its sigmoid", on=0.5)
    out_gate: bool = knob("ATTN_OUT_GATE_ENABLED", False, "a gate per head that begins at 1 and ends below 2")
    out_source: str = knob("ATTN_OUT_GATE_SRC", "proj", "what it reads: attention's input, or its queries",
                           choices=("proj", "q"))
    bias_gate: bool = knob("GATED_ATTENTION", False, "a gate per head with a bias, nearly open at the start")
    gate_window: int = knob("GATE_WINDOW", 12, "leading channels that narrow gates read", within=(1, None))
    gate_int8: bool = knob("GATED_ATTN_QUANT_GATE", False, "ship gates of heads as int8 rows, not float16")
    value_residual: bool = knob("VALUE_RESIDUAL", False, "later layers mix the first layer's values in")

    @property
    def gated(self) -> bool:
        return self.dense_gate or self.sparse_gate or self.out_gate or self.bias_gate


@dataclass(frozen=True)
class ResidualConfig:
    """How layers join the residual stream (record 1855; frontier 2.3, 2.6, 2.9, 2.11)."""

    ln_scale: bool = knob("LN_SCALE", False, "scale the input of layer i by 1/sqrt(i+1)")
    skip_gates: bool = knob("SKIP_GATES_ENABLED", False, "learn, per channel, how much of a skip comes in")
    lanes_from: int = knob("PARALLEL_START_LAYER", 0, "first layer of two parallel lanes, one for attention "
                           "and one for the MLP, behind encoder and loop; 0 = one lane", within=(0, None),
                           tiny=2)
    final_lane: str = knob("PARALLEL_FINAL_LANE", "mean", "what of the two lanes is read out",
                           choices=("mean", "attn", "mlp"))
    delta_gate: bool = knob("DTG_ENABLED", False, "a gate per token on what a layer adds; not on lanes")

    @property
    def lanes_on(self) -> bool:
        return self.lanes_from > 0


@dataclass(frozen=True)
class InputConfig:
    """What joins the embedding of a token (records 549 and 1855; frontier 2.7 and 2.11)."""

    smear: bool = knob("SMEAR_GATE_ENABLED", False, "add a gated part of the token before, within a document")
    bigram_rows: int = knob("BIGRAM_VOCAB_SIZE", 0, "rows of a table of hashed token pairs; 0 = none",
                            within=(0, None), tiny=64)
    bigram_dim: int = knob("BIGRAM_DIM", 128, "width of that table", within=(1, None), tiny=16)
    values: bool = knob("VE_ENABLED", False, "a table of tokens is added to the values of VE_LAYERS")
    values_dim: int = knob("VE_DIM", 128, "width of that table", within=(1, None), tiny=16)
    values_layers: str = knob("VE_LAYERS", "", "layers that read it, e.g. 9,10; empty means the last two")

    @property
    def bigram_on(self) -> bool:
        return self.bigram_rows > 0


@dataclass(frozen=True)
class AheadConfig:
    """Heads that predict tokens further ahead, in training only (record 549; Gloeckle et al., 2024)."""

    heads: int = knob("MTP_NUM_HEADS", 0, "extra heads for the tokens after the next; they do not ship",
                      within=(0, 8), on=1)
    weight: float = knob("MTP_LOSS_WEIGHT", 0.2, "weight of their mean loss", within=(0.0, None))

    @property
    def on(self) -> bool:
        return self.heads > 0


@dataclass(frozen=True)
class MoeConfig:
    """Feed-forwards of several experts, of which each token takes a few (SKC notes 2.13)."""

    on: bool = knob("MOE_ENABLED", False, "the feed-forwards of the last layers are mixtures of experts")
    experts: int = knob("MOE_NUM_EXPERTS", 3, "experts of a layer, each a whole MLP", within=(1, 256))
    top_k: int = knob("MOE_TOP_K", 1, "experts that a token takes", within=(1, 256))
    balance: float = knob("MOE_ROUTER_AUX_LOSS_COEF", 0.001, "weight of the loss that spreads tokens over "
                          "experts, which is 1 where they are spread evenly", within=(0.0, None))
    start: float = knob("MOE_START_FRACTION", 0.65, "share of the run in which a token takes one expert "
                        "more, by a flatter choice", within=(0.0, 1.0))
    layer_frac: float = knob("MOE_LAYER_FRAC", 0.67, "share of the layers, the first ones, that keep an MLP",
                             within=(0.0, 1.0), tiny=0.3)

    @property
    def extra(self) -> int:
        """Experts that a token takes at first beyond MOE_TOP_K."""
        return int(self.on and self.start > 0 and self.top_k < self.experts)


@dataclass(frozen=True)
class OptimConfig:
    matrices: str = knob("MATRIX_OPTIMIZER", "muon", "what trains matrices", choices=("muon", "adamw"))
    matrix_lr: float = knob("MATRIX_LR", 0.04, "Muon, all matrices", within=(0.0, None))
    scalar_lr: float = knob("SCALAR_LR", 0.04, "Adam, gains and scales", within=(0.0, None))
    scales_mult: float = knob("SCALES_LR_MULT", 1.0, "multiplies SCALAR_LR for scales and routers, not for "
                              "what gates weigh", within=(0.0, 1000.0))
    tied_embed_lr: float = knob("TIED_EMBED_LR", 0.05, "Adam, tied embedding", within=(0.0, None))
    embed_lr: float = knob("EMBED_LR", 0.6, "Adam, untied embedding", within=(0.0, None))
    head_lr: float = knob("HEAD_LR", 0.008, "Adam, untied head", within=(0.0, None))
    head_mult: float = knob("HEAD_LR_MULT", 1.0, "multiplies HEAD_LR and TIED_EMBED_LR", within=(0.0, 1000.0))
    head_low: bool = knob("ALLOW_HEAD_LR_UNDERSCALE", False, "let HEAD_LR_MULT be below 0.9")
    beta1: float = knob("BETA1", 0.9, "Adam, decay of the first moment", within=(0.0, 0.99999))
    beta2: float = knob("BETA2", 0.95, "Adam, decay of the second moment", within=(0.0, 0.99999))
    eps: float = knob("ADAM_EPS", 1e-8, "Adam, added to the root of the second moment", within=(0.0, None))
    momentum: float = knob("MUON_MOMENTUM", 0.95, "Muon, final momentum", within=(0.0, 0.99999))
    momentum_start: float = knob("MUON_MOMENTUM_WARMUP_START", 0.85, "Muon, first momentum",
                                 within=(0.0, 0.99999))
    momentum_steps: int = knob("MUON_MOMENTUM_WARMUP_STEPS", 500, "Muon, steps from first to final momentum",
                               within=(0, None))
    ns_steps: int = knob("MUON_BACKEND_STEPS", 5, "Muon, Newton-Schulz iterations", within=(1, 20))
    clip: float = knob("GRAD_CLIP_NORM", 0.0, "largest norm of the whole gradient; 0 = no clipping",
                       within=(0.0, None), on=0.5)
    row_normalize: bool = knob("MUON_ROW_NORMALIZE", False, "Muon, rows of norm 1 before orthogonalisation")
    polar_express: bool = knob("POLAR_EXPRESS_NS", False, "Muon, coefficients that change by iteration")
    muon_wd: float = knob("MUON_WD", 0.0, "Muon, weight decay: w <- w (1 - rate x decay), then the update",
                          within=(0.0, 100.0), on=0.5)
    embed_wd: float = knob("EMBED_WD", 0.0, "Adam, the same of the embedding, and of an untied head",
                           within=(0.0, 100.0), on=0.5)
    adam_wd: float = knob("ADAM_WD", 0.0, "Adam, the same of gains and scales", within=(0.0, 100.0), on=0.5)
    wd_of_scales: bool = knob("ADAM_WD_SCALES", True, "0: ADAM_WD holds for what gates weigh alone")
    active_norm: float = knob("MUON_ACTIVE_GRAD_EPS", 1e-9, "Muon, with experts: norm of a gradient up to "
                              "which its matrix rests and does not decay", within=(0.0, None))
    wd_taper_start: float = knob("WD_TAPER_START_FRAC", 0.7, "share of the run before MUON_WD begins to fall",
                                 within=(0.0, 1.0))
    wd_taper_final: float = knob("WD_TAPER_FINAL_MULT", 1.0, "what is left of it at the end; 1 = no fall",
                                 within=(0.0, 1.0), on=0.5)
    clip_local: bool = knob("GRAD_CLIP_LOCAL", False, "GRAD_CLIP_NORM holds for each rank's own gradient, "
                            "before they are averaged")
    width_scaling: bool = knob("LR_WIDTH_SCALING", False, "MATRIX_LR times 512 / MODEL_DIM")
    ema_decay: float = knob("EMA_DECAY", 0.0, "average of the weights that is shipped; 0 = ship the weights",
                            within=(0.0, 0.999999), on=0.9)
    ema_start: float = knob("EMA_START_FRACTION", 0.0, "share of the run before the average begins, as the "
                            "weights of that moment", within=(0.0, 1.0), on=0.5)
    ema_guard: str = knob("EMA_GUARD", "auto", "ship the average only where its round trip on held-out "
                          "training text beats that of the weights; auto = with ternary weights",
                          choices=("auto", "0", "1"))

    @property
    def ema_on(self) -> bool:
        return self.ema_decay > 0

    @property
    def clips_own(self) -> bool:
        return self.clip > 0 and self.clip_local

    @property
    def clips_mean(self) -> bool:
        return self.clip > 0 and not self.clip_local


@dataclass(frozen=True)
class ScheduleConfig:
    warmdown_frac: float = knob("WARMDOWN_FRAC", 0.0, "last fraction of the run with falling rate; 0 = use "
                                "WARMDOWN_ITERS", within=(0.0, 1.0), on=0.7)
    warmdown_iters: int = knob("WARMDOWN_ITERS", 1200, "last steps, with falling rate, at the measured pace",
                               within=(0, None), tiny=3)
    min_lr: float = knob("MIN_LR", 0.0, "floor of the learning-rate multiplier", within=(0.0, 1.0))
    qat: str = knob("QAT_ENABLED", "auto", "train through the quantiser of the artifact from step 0; auto = "
                    "with ternary weights and no LATE_QAT_THRESHOLD", choices=("auto", "0", "1"))
    late_qat: float = knob("LATE_QAT_THRESHOLD", 0.0, "train through it once the rate factor is below this",
                           within=(0.0, 1.0), on=0.9)


@dataclass(frozen=True)
class ExportConfig:
    """What the numbers of the artifact mean; these knobs travel in its header."""

    matrix_codec: str = knob("MATRIX_CODEC", "int", "matrices: int of MATRIX_BITS, ternary, fp8 or fp4",
                             choices=("int", "ternary", "fp8", "fp4"))
    own_attn: str = knob("ATTN_CODEC", "", "the same for attention alone; empty = MATRIX_CODEC",
                         choices=("", "int", "ternary", "fp8", "fp4"))
    own_mlp: str = knob("MLP_CODEC", "", "the same for the MLP alone; empty = MATRIX_CODEC",
                        choices=("", "int", "ternary", "fp8", "fp4"))
    matrix_bits: int = knob("MATRIX_BITS", 8, "bits of integer matrices; 16 = float16",
                            choices=(5, 6, 7, 8, 16))
    embed_codec: str = knob("EMBED_CODEC", "int", "the same for embedding and head, int of EMBED_BITS",
                            choices=("int", "ternary", "fp8", "fp4"))
    embed_bits: int = knob("EMBED_BITS", 8, "bits of an integer embedding; 16 = float16",
                           choices=(5, 6, 7, 8, 16))
    ternary_group: int = knob("TERNARY_GROUP", 128, "columns that share a ternary scale", within=(1, 65536),
                              tiny=16)
    ternary_step: float = knob("TERNARY_SCALE_STEP", 0.0, "ternary scales are powers of 1 + this; 0: float16",
                               within=(0.0, 0.5))
    turbo_train: bool = knob("TURBO_QUANT_TRAIN", False, "turn each ternary group by a Hadamard matrix "
                             "before it is rounded, and back after")
    turbo_export: bool = knob("TURBO_QUANT_EXPORT", False, "the same in the artifact; as TURBO_QUANT_TRAIN")
    clip_percentile: float = knob("INT8_CLIP_PERCENTILE", 100.0, "where a row is clipped; 100 = its maximum",
                                  within=(50.0, 100.0), on=99.5)
    scale_floor: float = knob("ROW_SCALE_FLOOR", 0.0, "least quantisation step; naive baseline 1/127",
                              within=(0.0, 1.0))

    @property
    def attn_codec(self) -> str:
        return self.own_attn or self.matrix_codec

    @property
    def mlp_codec(self) -> str:
        return self.own_mlp or self.matrix_codec

    @property
    def codecs(self) -> tuple[str, ...]:
        return self.attn_codec, self.mlp_codec, self.embed_codec


@dataclass(frozen=True)
class TernaryConfig:
    """How ternary matrices become so, in training and by search; the artifact needs none of it."""

    threshold_search: bool = knob("TERNARY_THRESHOLD_SEARCH", False, "search the threshold of each ternary "
                                  "matrix, half of the scale otherwise")
    scale_search: bool = knob("TERNARY_SCALE_SEARCH", False, "search a multiplier of its scales")
    as_trained: bool = knob("TERNARY_QAT", False, "no search: ship what was trained through")
    noise: float = knob("TERNARY_NOISE_SCALE", 0.0, "noise on ternary weights in training, in units of "
                        "their scale; SKC 0.02 to 0.05", within=(0.0, 1.0), on=0.05)
    clip_mode: str = knob("TERNARY_CLIP_MODE", "none", "clip ternary, fp8 and fp4 matrices where that lowers "
                          "their error: at percentiles, or at standard deviations of a row",
                          choices=("none", "percentile", "row_std"))
    clip_count: int = knob("GPTQ_LITE_PERCENTILES", 5, "so many percentiles are tried, 99.5, 99.6 and so on",
                           within=(1, 5))
    clip_rows: float = knob("TERNARY_CLIP_ROWS_K", 12.85, "standard deviations tried by row_std",
                            within=(0.1, 1000.0))
    clip_embed: float = knob("TERNARY_EMBED_CLIP_ROWS_K", 20.0, "the same for embedding and head",
                             within=(0.1, 1000.0))

    @property
    def calibrates(self) -> bool:
        """Whether a threshold or a multiplier may differ from the plain one."""
        return (self.threshold_search or self.scale_search) and not self.as_trained


@dataclass(frozen=True)
class ProxyConfig:
    """Which weights ship, by round trips on training text that is never trained on (SKC notes 2.17, 4.7)."""

    held_out: int = knob("HELD_OUT_TOKENS", 0, "last tokens of the last training shard that are not trained "
                         "on; 0 = as many as the choice of what ships reads", within=(0, None), on=2000)
    on: bool = knob("EXPORT_PROXY_EVAL", False, "weigh the weights by a round trip through their codecs, in "
                    "training and at its end")
    every: int = knob("EXPORT_PROXY_EVERY", 300, "steps between round trips", within=(1, None), tiny=2)
    tokens: int = knob("EXPORT_PROXY_TOKENS", 32768, "held-out tokens that a round trip reads",
                       within=(1, None), tiny=300)
    use_best: bool = knob("EXPORT_PROXY_USE_BEST", True, "ship the best weights so weighed, not the last")
    align: bool = knob("EXPORT_ALIGNED_TRAIN", False, "search ternary thresholds and multipliers once in "
                       "training too, and go on with them")
    align_at: float = knob("EXPORT_ALIGNED_TRAIN_START_FRACTION", 0.8, "share of the run before that",
                           within=(0.0, 1.0))

    @property
    def keeps(self) -> bool:
        """Whether a copy of the best weights is kept."""
        return self.on and self.use_best


@dataclass(frozen=True)
class SearchConfig:
    """The search of ternary thresholds and multipliers, on held-out training text (SKC notes 4.5)."""

    low: float = knob("TERNARY_THRESHOLD_LOW", 0.35, "least threshold tried, in scales", within=(0.0, 4.0))
    high: float = knob("TERNARY_THRESHOLD_HIGH", 0.75, "greatest threshold tried", within=(0.0, 4.0))
    steps: int = knob("TERNARY_THRESHOLD_STEPS", 4, "how many thresholds are tried", within=(1, 1000), tiny=2)
    scale_low: float = knob("TERNARY_SCALE_MULT_LOW", 0.9, "least multiplier of scales tried",
                            within=(0.01, 100.0))
    scale_high: float = knob("TERNARY_SCALE_MULT_HIGH", 1.1, "greatest multiplier tried",
                             within=(0.01, 100.0))
    scale_steps: int = knob("TERNARY_SCALE_MULT_STEPS", 3, "how many multipliers are tried",
                             within=(1, 1000), tiny=2)
    top: int = knob("TERNARY_CALIB_TOP_N", 4, "matrices searched: those that a first try changes most",
                    within=(1, None), tiny=2)
    prefilter: int = knob("CALIB_PREFILTER_MULT", 2, "largest matrices that get a first try, times "
                          "TERNARY_CALIB_TOP_N", within=(1, None))
    candidates: int = knob("CALIB_MAX_CANDIDATES", 12, "most matrices that get one", within=(1, None))
    evals: int = knob("CALIB_MAX_EVALS", 32, "most round trips of a search", within=(1, None))
    seconds: float = knob("CALIB_MAX_SECONDS", 30.0, "most seconds of a search", within=(0.0, None))
    again: bool = knob("CALIB_SECOND_PASS", False, "search the same matrices a second time")
    tokens: int = knob("CALIB_PROXY_MAX_TOK", 4096, "held-out tokens that each of its round trips reads",
                       within=(1, None), tiny=200)


@dataclass(frozen=True)
class GptqConfig:
    """How the numbers of the artifact are found (records 1855 and 1886; frontier 6)."""

    on: bool = knob("GPTQ_ENABLED", False, "round integer matrices by what they see in training text")
    batches: int = knob("GPTQ_CALIBRATION_BATCHES", 16, "spans of training text that calibration reads",
                        within=(1, None), tiny=4)
    reserve: float = knob("GPTQ_RESERVE_SECONDS", 0.0, "seconds of the cap for calibration; 0 = measured",
                          within=(0.0, None))
    matrix_sigmas: float = knob("MATRIX_CLIP_SIGMAS", 0.0, "clip of integer matrices in standard deviations "
                                "of a row; 0 = INT8_CLIP_PERCENTILE", within=(0.0, 1000.0))
    attn_sigmas: float = knob("ATTN_CLIP_SIGMAS", 0.0, "the same for attention; 0 = MATRIX_CLIP_SIGMAS",
                              within=(0.0, 1000.0))
    mlp_sigmas: float = knob("MLP_CLIP_SIGMAS", 0.0, "the same for the MLP; 0 = MATRIX_CLIP_SIGMAS",
                             within=(0.0, 1000.0))
    embed_sigmas: float = knob("EMBED_CLIP_SIGMAS", 0.0, "the same for embedding and head; 0 = "
                               "INT8_CLIP_PERCENTILE", within=(0.0, 1000.0))
    lqer: bool = knob("LQER_ENABLED", False, "ship a low-rank correction of the worst integer matrices")
    lqer_rank: int = knob("LQER_RANK", 4, "rank of the correction", within=(1, 999), tiny=2)
    lqer_top: int = knob("LQER_TOP_K", 3, "matrices that get one", within=(1, None))
    lqer_bits: int = knob("LQER_FACTOR_BITS", 4, "bits of its factors where they are symmetric",
                          within=(2, 8))
    lqer_asym: bool = knob("LQER_ASYM_ENABLED", True, "two bits for the left factor, four for the right")
    lqer_group: int = knob("LQER_ASYM_GROUP", 64, "entries of the right factor that share a scale",
                           within=(1, 65536))


@dataclass(frozen=True)
class SizeConfig:
    """Bytes: how streams are compressed, and what gives way when the artifact is too large."""

    compressor: str = knob("COMPRESSOR", "auto", "coder of the streams; auto = the smallest",
                           choices=("auto", "raw", "brotli", "lzma", "zstd", "rans"))
    ladder: str = knob("SIZE_LADDER", "", "what gives way, in order, while the total is over the limit, e.g. "
                       "MLP_CLIP_SIGMAS=14,EMBED_BITS=6,LQER_ENABLED=0")
    code_bytes: int = knob("CODE_BYTES", 0, "bytes of code that the limit counts; 0 = this file's own",
                           within=(0, None))


@dataclass(frozen=True)
class ScoringConfig:
    seq_len: int = knob("EVAL_SEQ_LEN", 0, "context in evaluation; 0 = TRAIN_SEQ_LEN", within=(0, None),
                        tiny=0)
    batch_tokens: int = knob("VAL_BATCH_TOKENS", 524288, "tokens per evaluation forward, all ranks and spans "
                             "together", within=(1, None), tiny=512)
    sliding: bool = knob("SLIDING_WINDOW_ENABLED", False, "score a second time with sliding windows")
    stride: int = knob("EVAL_STRIDE", 64, "targets scored per sliding window", within=(1, None), tiny=8)
    max_tokens: int = knob("VAL_MAX_TOKENS", 0, "score only so many targets (partial); 0 = all",
                           within=(0, None), on=1000)


# fmt: on
@dataclass(frozen=True)
class Config:
    """Everything the program was told. Nothing ever assigns to it: a profile is an env file."""

    run: RunConfig = field(default_factory=RunConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    attn: AttnConfig = field(default_factory=AttnConfig)
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    input: InputConfig = field(default_factory=InputConfig)
    ahead: AheadConfig = field(default_factory=AheadConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    ternary: TernaryConfig = field(default_factory=TernaryConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    gptq: GptqConfig = field(default_factory=GptqConfig)
    size: SizeConfig = field(default_factory=SizeConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)

    @property
    def eval_len(self) -> int:
        return self.scoring.seq_len or self.data.seq_len

    @property
    def rope_dims(self) -> int:
        return self.attn.rope_dims or self.model.head_dim

    @property
    def qat_from_start(self) -> bool:
        """Ternary weights that were not trained as such are noise; integers are found after training too."""
        alone = (
            self.schedule.qat == "auto" and "ternary" in self.export.codecs and self.schedule.late_qat == 0
        )
        return self.schedule.qat == "1" or alone

    @property
    def quantises(self) -> bool:
        return self.qat_from_start or self.schedule.late_qat > 0

    @property
    def lanes_start(self) -> int:
        """First layer with two lanes: those before it are visited on the way down, or more than once."""
        behind_loop = self.loop.last + 1 if self.loop.on else 0
        return max(self.residual.lanes_from, self.model.layers // 2, behind_loop)

    @property
    def experts_start(self) -> int:
        """First layer whose feed-forward is a mixture of experts."""
        return math.ceil(self.model.layers * self.moe.layer_frac - 1e-9)

    @property
    def fuses_ce(self) -> bool:
        """Its sums start at the cap and cannot vanish: exp(-2 * 40) is a normal float32."""
        return self.compute.fused_ce and self.model.softcap <= 40.0 and not self.model.extras

    @property
    def fuses_mlp(self) -> bool:
        """Its kernel multiplies at once by what a norm would have to see whole."""
        return self.compute.fused_mlp and self.model.normed == "none"

    @property
    def two_passes(self) -> bool:
        """A row of 16,384 logits takes 128 registers of each thread of 16 warps; longer ones do not fit."""
        return self.compute.ce_form == "two_pass" or self.model.vocab > 16384

    @property
    def table_layers(self) -> tuple[int, ...]:
        """Layers that read the table of values; none where VE_LAYERS is no list of layers."""
        layers = range(self.model.layers)
        parts = self.input.values_layers.split(",")
        found = [i for i in layers if str(i) in map(str.strip, parts)]
        return tuple(found) if len(found) == len(parts) else () if any(parts) else tuple(layers[-2:])

    def check(self) -> None:
        """Rules that span knobs, a line each. Raises UserError naming the first that is broken."""
        ladder_rungs(self.size.ladder)
        for rules in (shape_rules, feature_rules, run_rules, codec_rules, expert_rules, choice_rules):
            for text in (text for holds, text in rules(self) if not holds):
                raise UserError(text)


# fmt: off
def shape_rules(cfg: Config) -> list[tuple[bool, str]]:
    """(whether it holds, the line that says what is wrong), as of all the rules below."""
    dim, heads, groups, each = cfg.model.dim, cfg.model.heads, cfg.model.kv_heads, cfg.model.head_dim
    first, last, layers, span = cfg.loop.first, cfg.loop.last, cfg.model.layers, cfg.data.span
    tokens, spans, length = cfg.data.batch_tokens, cfg.data.spans, cfg.data.seq_len
    return [
        (dim % heads == 0, f"NUM_HEADS={heads} does not divide MODEL_DIM={dim}"),
        (heads % groups == 0, f"NUM_KV_HEADS={groups} does not divide NUM_HEADS={heads}"),
        (each % 2 == 0, f"MODEL_DIM/NUM_HEADS={each} is odd, but rotary embedding turns pairs"),
        (cfg.model.hidden >= 1, f"MLP_MULT={cfg.model.mlp_mult} leaves no hidden unit at MODEL_DIM={dim}"),
        (tokens % spans == 0, f"TRAIN_SPANS={spans} does not divide TRAIN_BATCH_TOKENS={tokens}"),
        (cfg.data.packing or span % length == 0, f"TRAIN_SEQ_LEN={length} does not divide the {span} tokens "
         "of a span (TRAIN_BATCH_TOKENS/TRAIN_SPANS)"),
        (not cfg.loop.on or first <= last < layers, f"LOOP_START={first}, LOOP_END={last} want start <= end "
         f"< NUM_LAYERS={layers}"),
    ]


def feature_rules(cfg: Config) -> list[tuple[bool, str]]:
    narrow = cfg.attn.sparse_gate or cfg.attn.out_gate or cfg.input.smear
    layers, turned, lanes = cfg.model.layers, cfg.rope_dims, cfg.residual.lanes_from
    return [
        (turned % 2 == 0 and turned <= cfg.model.head_dim, f"ROPE_DIMS={turned} wants an even number up to "
         f"MODEL_DIM/NUM_HEADS={cfg.model.head_dim}"),
        (turned > 2 or not cfg.attn.rope_ntk, f"ROPE_YARN=1 wants more than the {turned} dimensions of "
         "ROPE_DIMS"),
        (not narrow or cfg.attn.gate_window <= cfg.model.dim, f"GATE_WINDOW={cfg.attn.gate_window} is wider "
         f"than MODEL_DIM={cfg.model.dim}"),
        (bool(cfg.table_layers), f"VE_LAYERS={cfg.input.values_layers!r} wants layers below NUM_LAYERS="
         f"{layers}, e.g. 1,2"),
        (cfg.input.bigram_rows != 1, "BIGRAM_VOCAB_SIZE=1 wants at least 2 rows, one for beginnings"),
        (not lanes or cfg.lanes_start < layers, f"PARALLEL_START_LAYER={lanes} leaves no layer for two "
         f"lanes, which begin at layer {cfg.lanes_start} of NUM_LAYERS={layers}; lower it"),
    ]


def run_rules(cfg: Config) -> list[tuple[bool, str]]:
    slides, named = cfg.scoring.sliding, bool(cfg.run.id or cfg.run.dir)
    return [
        (not slides or cfg.scoring.stride <= cfg.eval_len, f"EVAL_STRIDE={cfg.scoring.stride} is longer than "
         f"the evaluation context of {cfg.eval_len}"),
        (cfg.run.score != "sliding" or slides, "SCORE=sliding wants SLIDING_WINDOW_ENABLED=1"),
        (not cfg.run.sample or cfg.run.eval_only, "SAMPLE wants EVAL_ONLY=1 and an ARTIFACT"),
        (not cfg.run.resume or named, "RESUME=1 wants RUN_ID or RUN_DIR, to know which run"),
    ]


def codec_rules(cfg: Config) -> list[tuple[bool, str]]:
    training, export, group = cfg.export.turbo_train, cfg.export.turbo_export, cfg.export.ternary_group
    return [
        (training == export, f"TURBO_QUANT_TRAIN={training:d}, TURBO_QUANT_EXPORT={export:d}: what is "
         "trained would not be what ships; set them alike"),
        (not training or group.bit_count() == 1, "TURBO_QUANT_TRAIN=1 wants a power of two, not "
         f"TERNARY_GROUP={group}"),
    ]


def expert_rules(cfg: Config) -> list[tuple[bool, str]]:
    """Rules of MOE_ENABLED=1, and of rates."""
    start, taken, layers = cfg.experts_start, cfg.moe.top_k, cfg.model.layers
    return [
        (cfg.optim.head_mult >= 0.9 or cfg.optim.head_low, f"HEAD_LR_MULT={cfg.optim.head_mult:g} is below "
         "0.9, and 0.7 made the loss 2.2 % worse; raise it, or set ALLOW_HEAD_LR_UNDERSCALE=1"),
        (not cfg.moe.on or taken <= cfg.moe.experts, f"MOE_TOP_K={taken} is more than "
         f"MOE_NUM_EXPERTS={cfg.moe.experts}"),
        (not cfg.moe.on or start < layers, f"MOE_LAYER_FRAC={cfg.moe.layer_frac:g} leaves none of "
         f"NUM_LAYERS={layers} to experts, which begin at layer {start}; lower it"),
        (not cfg.moe.on or cfg.optim.matrices == "muon", "MOE_ENABLED=1 wants MATRIX_OPTIMIZER=muon: Adam "
         "would decay and move experts that no token took"),
    ]


def choice_rules(cfg: Config) -> list[tuple[bool, str]]:
    """Of what is chosen by round trips."""
    low, high, least, most = cfg.search.low, cfg.search.high, cfg.search.scale_low, cfg.search.scale_high
    return [
        (low <= high, f"TERNARY_THRESHOLD_LOW={low} is above TERNARY_THRESHOLD_HIGH={high}"),
        (least <= most, f"TERNARY_SCALE_MULT_LOW={least} is above TERNARY_SCALE_MULT_HIGH={most}"),
        (not cfg.proxy.align or (searches(cfg) and cfg.quantises), "EXPORT_ALIGNED_TRAIN=1 wants ternary "
         "weights trained as such, and TERNARY_THRESHOLD_SEARCH=1 or TERNARY_SCALE_SEARCH=1"),
        (not cfg.ternary.noise or (has_ternary(cfg) and cfg.quantises), f"TERNARY_NOISE_SCALE="
         f"{cfg.ternary.noise:g} wants ternary weights trained as such, e.g. MATRIX_CODEC=ternary"),
        (not cfg.ternary.calibrates or has_ternary(cfg), "TERNARY_THRESHOLD_SEARCH=1 and TERNARY_SCALE_SEARCH"
         "=1 want ternary weights, e.g. MATRIX_CODEC=ternary"),
        (tokens_held_out(cfg) >= held_out_read(cfg), f"HELD_OUT_TOKENS={cfg.proxy.held_out} is less than the "
         f"{held_out_read(cfg)} tokens that EXPORT_PROXY_TOKENS and CALIB_PROXY_MAX_TOK read; raise it, or 0 "
         "for just as many"),
    ]
# fmt: on


@of_config
def has_ternary(cfg: Config) -> bool:
    return "ternary" in cfg.export.codecs


@of_config
def guards_average(cfg: Config) -> bool:
    """An average shrinks ternary weights towards their zeros (SKC notes 2.17)."""
    asked = cfg.optim.ema_guard == "1" or (cfg.optim.ema_guard == "auto" and has_ternary(cfg))
    return cfg.optim.ema_on and asked


@of_config
def weighs(cfg: Config) -> bool:
    """Whether some weights are held against others by a round trip."""
    return cfg.proxy.on or guards_average(cfg)


@of_config
def searches(cfg: Config) -> bool:
    return cfg.ternary.calibrates and has_ternary(cfg)


@of_config
def held_out_read(cfg: Config) -> int:
    """Tokens of held-out text that somebody reads; the last of them is a target only."""
    counts = (cfg.proxy.tokens * weighs(cfg), cfg.search.tokens * searches(cfg))
    return max(counts) + 1 if any(counts) else 0


@of_config
def tokens_held_out(cfg: Config) -> int:
    return cfg.proxy.held_out or held_out_read(cfg)


# What SIZE_LADDER may lower: knob -> (kinds of tensors, field of their codec).
LADDER = {
    "MATRIX_BITS": (("attn", "mlp"), "bits_each"),
    "EMBED_BITS": (("embed",), "bits_each"),
    "MATRIX_CLIP_SIGMAS": (("attn", "mlp"), "sigmas"),
    "ATTN_CLIP_SIGMAS": (("attn",), "sigmas"),
    "MLP_CLIP_SIGMAS": (("mlp",), "sigmas"),
    "EMBED_CLIP_SIGMAS": (("embed",), "sigmas"),
    "LQER_ENABLED": ((), ""),
}


def ladder_rungs(text: str) -> list[tuple[str, float]]:
    """`KNOB=value,KNOB=value` -> what to lower, in order. Raises UserError for anything else."""
    rungs = []
    for rung in filter(None, re.split(r"[\s,]+", text)):
        name, _, value = rung.partition("=")
        number = parse(value, float)
        low, high = {"bits_each": (2, 8), "sigmas": (0.1, 1000), "": (0, 0)}[LADDER.get(name, ((), ""))[1]]
        if name not in LADDER or number is None or not low <= number <= high or (low == 2 and number % 1):
            raise UserError(
                f"SIZE_LADDER={text!r}: {rung!r} is no rung; want KNOB=value of {', '.join(LADDER)}, bits 2 "
                f"to 8 and LQER_ENABLED=0"
            )
        rungs.append((name, int(number) if low == 2 else number))
    return rungs


# Old or other scripts' names -> ours, or the sentence that refuses them. One name, one meaning.
ALIASES = {
    "VAL_BATCH_SIZE": "VAL_BATCH_TOKENS",  # naive baseline
    "SMEAR_GATE": "SMEAR_GATE_ENABLED",  # this and the next four: record 1667
    "SMEAR_GATE_WIDTH": "GATE_WINDOW",
    "GATE_ATTN_OUT": "ATTN_OUT_GATE_ENABLED",
    "GATE_ATTN_SRC": "ATTN_OUT_GATE_SRC",
    "GATE_WIDTH": "GATE_WINDOW",
    "BITNET_GROUP_SIZE": "TERNARY_GROUP",  # this and the next six: SKC and record T74
    "WARMDOWN_FRACTION": "WARMDOWN_FRAC",
    "SLIDING_EVAL": "SLIDING_WINDOW_ENABLED",
    "SLIDING_EVAL_STRIDE": "EVAL_STRIDE",
    "PARTIAL_ROPE_DIMS": "ROPE_DIMS",
    "SMEAR": "SMEAR_GATE_ENABLED",
    "MTP_HEADS": "MTP_NUM_HEADS",
    "CONTROL_TENSOR_NAME_PATTERNS": "refused: each parameter names its optimizer and codec where it is made",
    "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS": "refused: each parameter names its codec where it is made",
    "GPTQ_LITE_ENABLED": "TERNARY_CLIP_MODE",  # this and the next two: SKC (pull request 1609)
    "TERNARY_COMPRESS_BROTLI": "COMPRESSOR",
    "EXPORT_MODE": "MATRIX_CODEC",
    "TURBO_QUANT_KV": "refused: there is no key/value cache to quantise",
    "WEIGHT_SHARING": "refused: abandoned; NUM_LOOPS shares weights in depth",
    "INSIDE_OUT_TRAINING": "refused: abandoned, it gained nothing in its own ablation",
    "EXPORT_PROXY_EVERY_FRACTION": "refused: EXPORT_PROXY_EVERY counts steps",
    "DEQ_FEEDBACK": "refused: abandoned, it gained nothing in its own ablation",
}
# Published values that we call otherwise: record 1855's lrzip over one file per kind of matrix, and SKC's
# modes, which all ship ternary matrices and differ in whether brotli is tried; "gptq" is no GPTQ there.
VALUE_ALIASES = {
    "COMPRESSOR": {"pergroup": "auto", "1": "auto", "0": "lzma"},
    "MATRIX_OPTIMIZER": {"adam": "adamw"},
    "TERNARY_CLIP_MODE": {"1": "percentile", "0": "none"},
    "MATRIX_CODEC": dict.fromkeys(("ternary_lzma", "competition_ternary", "competition_gptq"), "ternary"),
}
# Published names from which the values of others follow.
DERIVING = ("DATA_DIR", "FP_STORAGE", "ACTIVATION", "LEAKY_RELU_SLOPE", "EMA_ENABLED", "EMA_EVAL_APPLY")
STORAGE = {  # of FP_STORAGE, which holds for all but the ternary matrices
    "0": {"EMBED_CODEC": "int", "EMBED_BITS": "16"},
    "fp8": {"EMBED_CODEC": "fp8"},
    "1": {"EMBED_CODEC": "fp8"},
    "fp4": {"EMBED_CODEC": "fp4"},
}
WITHOUT_EFFECT = {  # published -> why nothing follows from it
    "PHASED_TTT_ENABLED": "no published script reads it",
    "EXPORT_PROXY_NUM_SEQS": "no published script reads it",
    "TERNARY_CALIB_DISTRIBUTED": "ranks always share the round trips of a search",
    "FULL_TERNARY_CALIBRATION": "every ternary matrix has a threshold and a multiplier of its own",
    "LZMA_PRESET": "lzma, where it is tried, always works at its hardest",
    "ROPE_TRAIN_SEQ_LEN": "no published script reads it",
    "ADAM_LR": "record T74's Adam goes by SCALAR_LR and TIED_EMBED_LR",
    "CORR_WEIGHT_LR": "nothing in record T74's model has this rate",
    "TEMP_SCALING": "record T74's forward ignores the temperature",
    "SLIDING_BATCH_SIZE": "VAL_BATCH_TOKENS says how much is scored at once",
}
ONE_SIZE = "a step has its full size from the first on"
# Published names of what is not here: the only value that is taken, and what another would ask for. Names
# that stand with no value belong to the one before them.
NOT_HERE = {
    "ATTN_PROJ_TYPE": ("standard", "attention projects by matrices alone"),
    "LOGIT_HEAD_TYPE": ("standard", "the head is a matrix"),
    "TVERSKY_NUM_FEATURES": ("0", "there are no Tversky features"),
    "TVERSKY_MEMBERSHIP": ("", ""),
    "TVERSKY_FEATURE_POOLS": ("", ""),
    "DIFF_ATTN": ("0", "there is no differential attention"),
    "MLP_GROUPS": ("0", "the MLP is not grouped"),
    "REFINER": ("0", "there is no refiner"),
    "REFINER_KERNEL": ("", ""),
    "BIGRAM_HASH": ("0", "the table of token pairs is BIGRAM_VOCAB_SIZE here"),
    "TRAINING_DEPTH_RECURRENCE": ("0", "depth recurrence is NUM_LOOPS here"),
    "EVAL_DEPTH_RECURRENCE": ("0", "depth recurrence is NUM_LOOPS here"),
    "BATCH_TOKENS_START": ("0", ONE_SIZE),
    "BATCH_SCHEDULE_FRACTION": ("", ""),
    "SEQ_LEN_START": ("0", ONE_SIZE),
    "SEQ_SCHEDULE_FRACTION": ("", ""),
    "UNTIE_AT_FRACTION": ("0", "TIE_EMBEDDINGS holds for the whole run"),
    "CHURN_LOG_EVERY": ("0", "no churn of trits is logged"),
}
TRUTH = dict.fromkeys(("0", "false", "no", "off"), False) | dict.fromkeys(("1", "true", "yes", "on"), True)


@functools.cache
def all_knobs() -> dict[str, tuple[str, dataclasses.Field]]:
    """Environment name -> (section name, field)."""
    sections = (
        (s.name, f) for s in dataclasses.fields(Config) for f in dataclasses.fields(s.default_factory)
    )
    return {f.metadata["env"]: (name, f) for name, f in sections}


def resolve_aliases(env: dict[str, str]) -> dict[str, str]:
    """Rename what other scripts call by another name. Raises UserError for refused names and clashes."""
    out = dict(env)
    for old, new in ALIASES.items():
        if old not in env:
            continue
        if new.startswith("refused"):
            raise UserError(f"{old}={env[old]!r} is {new}; unset it")
        if env.get(new, env[old]) != env[old]:
            raise UserError(f"{old}={env[old]!r} is another name of {new}={env[new]!r}; set one of them")
        out[new] = out.pop(old)
    for name in VALUE_ALIASES.keys() & out.keys():
        out[name] = VALUE_ALIASES[name].get(out[name], out[name])
    refuse_what_is_not_here(out)
    out = with_derived(out)
    out |= published_average(out)
    return {**published_paths(out), **out} if "DATA_DIR" in out else out


def refuse_what_is_not_here(env: dict[str, str]) -> None:
    for name, (taken, why) in NOT_HERE.items():
        if taken and meant(env.get(name, taken)) != meant(taken):
            raise UserError(f"{name}={env[name]!r} is refused: {why}; want {name}={taken}, or unset it")


def meant(text: str) -> object:
    """The number or truth that a text tells, else its words: 0, 0.00 and off are the same."""
    word = text.strip().lower()
    number = TRUTH.get(word, parse(word, float))
    return word if number is None else number


def with_derived(env: dict[str, str]) -> dict[str, str]:
    """With our names for what DERIVING says in others. Raises UserError for a clash or a strange value."""
    told = {name: env[name].strip().lower() for name in DERIVING[1:] if name in env}
    if "LEAKY_RELU_SLOPE" in told:
        told.setdefault("ACTIVATION", "lrelu2")  # as published
    slopes = {"relu2": "0", "lrelu2": told.get("LEAKY_RELU_SLOPE", "0.5")}
    tables = {"FP_STORAGE": STORAGE, "ACTIVATION": {k: {"MLP_NEGATIVE_SLOPE": v} for k, v in slopes.items()}}
    out = dict(env)
    for name in (name for name in tables if name in told):
        if told[name] not in tables[name]:
            raise UserError(f"{name}={env[name]!r} is not here; want {' or '.join(tables[name])}")
        for knob_name, value in tables[name][told[name]].items():
            if meant(out.setdefault(knob_name, value)) != meant(value):
                raise UserError(
                    f"{name}={told[name]!r} says {knob_name}={value}, not {env[knob_name]!r}; drop one"
                )
    return out


def known_names() -> list[str]:
    """Every name that a recipe may have; ours first."""
    return [*all_knobs(), *ALIASES, *DERIVING, *WITHOUT_EFFECT, *NOT_HERE]


def published_average(env: dict[str, str]) -> dict[str, str]:
    """EMA_DECAY where SKC's switches are set: 0 where one is off, else as given or 0.997, their default.

    EMA_EVAL_APPLY=0 kept an average that was neither scored nor shipped. Raises UserError for no truth value.
    """
    switches = {name: env[name] for name in ("EMA_ENABLED", "EMA_EVAL_APPLY") if name in env}
    for name, text in switches.items():
        if parse(text.strip(), bool) is None:
            raise UserError(f"{name}={text!r} is not allowed; want 0 or 1")
    if not all(parse(text.strip(), bool) for text in switches.values()):
        return {"EMA_DECAY": "0"}
    return {"EMA_DECAY": env.get("EMA_DECAY", "0.997")} if "EMA_ENABLED" in switches else {}


def published_paths(env: dict[str, str]) -> dict[str, str]:
    """Where the published scripts look below DATA_DIR for shards and tokenizer (frontier 1.1)."""
    vocab, root = env.get("VOCAB_SIZE", "1024"), Path(env["DATA_DIR"])
    data, model = f"fineweb10B_sp{vocab}", f"fineweb_{vocab}_bpe"
    if TRUTH.get(env.get("CASEOPS_ENABLED", "0").lower()):
        root, kind = root / f"datasets/{data}_caseops/datasets", "lossless_caps_caseops_v1_reserved"
        data, model = f"{data}_{kind}", f"{model}_{kind}"
    return {"DATA_PATH": str(root / "datasets" / data), "TOKENIZER_PATH": f"{root}/tokenizers/{model}.model"}


def read_config(env: dict[str, str]) -> Config:
    """Build the one Config. Raises UserError with the knob's name, value, and what is allowed."""
    env = resolve_aliases(env)
    sections = {}
    for section in dataclasses.fields(Config):
        kind = section.default_factory
        sections[section.name] = kind(**{f.name: read_knob(f, env) for f in dataclasses.fields(kind)})
    cfg = Config(**sections)
    cfg.check()
    return cfg


def read_live(env: dict[str, str]) -> dict[str, object]:
    """The whole configuration of a folded program: knob -> value. Raises UserError where one is not allowed.

    Its `cfg.section.field` are literals by now, or `cfg["SEED"]`, where the environment still decides.
    """
    live = {name: parse(env[name].strip(), type(value)) for name, value in LIVE.items()}
    for name, value in live.items():
        if value is None or (isinstance(value, int) and not 0 <= value < 2**63):
            raise UserError(f"{name}={env[name]!r} is not allowed")
    return live


def micro_batches(cfg: Config, ranks: int) -> int:
    """How many per rank and step."""
    return cfg.data.accum or cfg.data.spans // ranks


def read_knob(f: dataclasses.Field, env: dict[str, str]) -> object:
    if f.metadata["env"] not in env:
        return f.default
    text, kind = env[f.metadata["env"]].strip(), type(f.default)
    value = parse(text, kind)
    low, high = f.metadata["within"]
    choices = f.metadata["choices"]
    bad = value is None or (choices and value not in choices)
    if bad or (low is not None and value < low) or (high is not None and value > high):
        raise UserError(
            f"{f.metadata['env']}={text!r} is not allowed; want {allowed(f)} ({f.metadata['doc']})"
        )
    return value


def parse(text: str, kind: type) -> object:
    """Text -> a value of the kind, or None where it is not one."""
    if kind is bool:
        return TRUTH.get(text.lower())
    try:
        value = kind(text)
    except ValueError:
        return None
    return value if kind is not float or math.isfinite(value) else None


def allowed(f: dataclasses.Field) -> str:
    low, high = f.metadata["within"]
    if f.metadata["choices"]:
        return " or ".join(shown(c) for c in f.metadata["choices"])
    if isinstance(f.default, bool):
        return "0 or 1"
    kind = {int: "a whole number", float: "a number", str: "text"}[type(f.default)]
    bounds = [f">= {low}"] * (low is not None) + [f"<= {high}"] * (high is not None)
    return " ".join([kind, " and ".join(bounds)]).strip()


def one_edit_apart(a: str, b: str) -> bool:
    """Whether one letter added, dropped, changed, or swapped with its neighbour turns a into b."""
    start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    a, b = a[start:][::-1], b[start:][::-1]
    end = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    a, b = a[end:], b[end:]
    return max(len(a), len(b)) == 1 or (len(a) == 2 and a == b[::-1])


def thawed(env: dict[str, str]) -> dict[str, str]:
    """What a built program runs by: the knobs it was built for, the live ones under the environment's.

    Raises UserError where the environment wants another value of a frozen knob; another spelling of the
    same value (2, 2.0) is no clash. The source itself freezes nothing.
    """
    clash = [
        f"{name} is frozen to {spelled(value)!r}, the environment says {env[name]!r}"
        for name, value in FROZEN.items()
        if name in env and parse(env[name].strip(), type(value)) != value
    ]
    if clash:
        raise UserError(
            f"this program was built for another environment: {'; '.join(clash)}; unset or rebuild"
        )
    held, live = ({name: spelled(value) for name, value in knobs.items()} for knobs in (FROZEN, LIVE))
    return {**live, **env, **held}


def near_misses(env: dict[str, str]) -> list[str]:
    """One sentence for each variable that looks like a mistyped or unknown knob (`MODEL_DIMS`)."""
    known = known_names()
    families = {name.split("_")[0] for name in known if "_" in name} - {"ENABLE", "MAX", "RUN", "TEMP"}
    lines = [
        f"{name} is accepted but has no effect: {why}" for name, why in WITHOUT_EFFECT.items() if name in env
    ]
    for name in sorted(set(env) - set(known)):
        close = [k for k in known if one_edit_apart(name, k)] or difflib.get_close_matches(
            name, known, 1, 0.88
        )
        if close:
            lines.append(f"{name} is not a knob; did you mean {close[0]}?")
        elif name.split("_")[0] in families:
            lines.append(f"{name} is not a knob; --knobs lists them")
    return lines


def spelled(value: object) -> str:
    """The text that sets a knob to a value."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def knob_values(cfg: Config) -> dict[str, str]:
    """Environment name -> the text that sets its present value."""
    if FOLDED:
        return {env: spelled(value) for env, value in {**FROZEN, **cfg}.items()}
    return {env: spelled(getattr(getattr(cfg, name), f.name)) for env, (name, f) in all_knobs().items()}


def changed_knobs(cfg: Config) -> dict[str, str]:
    """The knobs that differ from their defaults: what an env file has to say."""
    default = knob_values(Config())
    return {env: text for env, text in knob_values(cfg).items() if text != default[env]}


def identity(cfg: Config) -> dict[str, str]:
    """The knobs that decide the weights or their score: all but the run section's names and paths."""
    return {env: text for env, text in knob_values(cfg).items() if env not in run_knobs(cfg)}


@of_config
def run_knobs(cfg: Config) -> tuple[str, ...]:
    return tuple(env for env, (section, _) in all_knobs().items() if section == "run")


def config_hash(cfg: Config) -> str:
    return hashlib.sha256(json.dumps(identity(cfg), sort_keys=True).encode()).hexdigest()[:16]


def knob_table() -> str:
    """The README's table, in Markdown."""
    rows = [
        f"| `{env}` | {shown(f.default)} | {f.metadata['doc']} | {allowed(f)} |"
        for env, (_, f) in all_knobs().items()
    ]
    return "\n".join(["| knob | default | meaning | allowed |", "|---|---|---|---|", *rows])


def shown(value: object) -> str:
    return "(empty)" if value == "" else str(int(value)) if isinstance(value, bool) else str(value)


def tiny_values() -> dict[str, object]:
    """Knob -> its value in a run of seconds, of features that are on."""
    rows = {env: f.metadata["tiny"] for env, (_, f) in all_knobs().items()}
    return {env: value for env, value in rows.items() if value is not None}


def tiny_env() -> dict[str, str]:
    """The environment of a run of seconds, for tests: small, and nothing on that is off by default."""
    rows, knobs = tiny_values(), all_knobs()
    return {env: spelled(value) for env, value in rows.items() if knobs[env][1].default or not value}


# ======================================================================================
# 2. Schedule -- where the run stands -> the values of this step; pure, no torch
# uses: Config
# ======================================================================================


class Progress(NamedTuple):
    """Where a run stands, as rank 0 tells it: the step about to be taken and the seconds spent."""

    step: int
    seconds: float
    reserve: float = 0.0  # seconds of the cap that calibration needs after the last step


class Phase(NamedTuple):
    """Every value that varies with the step. Blocks read it through Ctx; nothing stores it."""

    lr: float  # multiplies the rate of every group
    momentum: float  # Muon
    loops: int  # extra visits of the looped layers
    qat: bool  # weights pass through their codec
    decay: float = 1.0  # multiplies the weight decay of matrices
    routing: float = 1.0  # how far experts are from their first, flatter choice to their last
    extra: int = 0  # experts that a token takes beyond MOE_TOP_K until then
    averages: bool = True  # the average of the weights follows them, where there is one


def fraction(at: Progress, cfg: Config) -> float:
    """Share of the run that is over, 0 to 1: of the clock where there is a cap, else of the steps."""
    if cfg.budget.seconds > 0:
        return min(at.seconds / (cfg.budget.seconds - at.reserve), 1.0)
    return min(at.step / max(cfg.budget.iterations, 1), 1.0)


def warmdown_by_fraction(at: Progress, cfg: Config) -> float:
    """1 until the last WARMDOWN_FRAC of the run, then linear to 0 (records 1855, 1886; 5.6)."""
    left = 1.0 - fraction(at, cfg)
    return min(1.0, left / cfg.schedule.warmdown_frac)


def warmdown_by_iters(at: Progress, cfg: Config) -> float:
    """1 until WARMDOWN_ITERS steps are left, as counted or as timed at the mean step (naive baseline)."""
    iters = max(cfg.schedule.warmdown_iters, 1)
    if cfg.budget.seconds <= 0:
        return min(1.0, max(cfg.budget.iterations - at.step, 0) / iters)
    step_seconds = at.seconds / max(at.step, 1)
    left = max(cfg.budget.seconds - at.reserve - at.seconds, 0.0)
    return min(1.0, left / max(iters * step_seconds, 1e-9))


def decay_taper(at: Progress, cfg: Config) -> float:
    """1 until WD_TAPER_START_FRAC of the run, then linear to WD_TAPER_FINAL_MULT at its end (record 1729)."""
    late = fraction(at, cfg) - cfg.optim.wd_taper_start
    late = max(late, 0.0) / max(1.0 - cfg.optim.wd_taper_start, 1e-9)
    return 1.0 - late * (1.0 - cfg.optim.wd_taper_final)


def routing_at(at: Progress, cfg: Config) -> float:
    """From 0 to 1 over the first MOE_START_FRACTION of the run, then 1."""
    return min(fraction(at, cfg) / cfg.moe.start, 1.0) if cfg.moe.start > 0 else 1.0


def phase_at(at: Progress, cfg: Config) -> Phase:
    """The schedule, whole: a pure function of progress and configuration."""
    falling = warmdown_by_fraction if cfg.schedule.warmdown_frac > 0 else warmdown_by_iters
    lr = 1.0 if cfg.schedule.warmdown_frac == 0 and cfg.schedule.warmdown_iters == 0 else falling(at, cfg)
    lr = max(lr, cfg.schedule.min_lr)
    warm = min(at.step / cfg.optim.momentum_steps, 1.0) if cfg.optim.momentum_steps else 1.0
    momentum = (1 - warm) * cfg.optim.momentum_start + warm * cfg.optim.momentum
    loops = cfg.loop.count if cfg.loop.on and fraction(at, cfg) >= cfg.loop.at else 0
    qat = cfg.qat_from_start or lr < cfg.schedule.late_qat
    decay = decay_taper(at, cfg) if cfg.optim.wd_taper_final < 1 else 1.0
    routing = routing_at(at, cfg) if cfg.moe.on else 1.0
    extra = cfg.moe.extra * (routing < 1)
    averages = fraction(at, cfg) >= cfg.optim.ema_start
    return Phase(lr, momentum, loops, qat, decay, routing, extra, averages)


def final_phase(cfg: Config) -> Phase:
    """The phase of a loaded artifact, and of validation: all loops on, MOE_TOP_K experts a token, weights as
    they are (they come out of the codec)."""
    return Phase(0.0, cfg.optim.momentum, cfg.loop.count, False)


def warm_phases(cfg: Config) -> list[Phase]:
    """One phase for each distinct forward graph that the run will meet, in order."""
    quant = {cfg.qat_from_start, cfg.quantises}
    loops, extras = {0, cfg.loop.count}, {0, cfg.moe.extra}
    variants = itertools.product(sorted(quant), sorted(loops), sorted(extras, reverse=True))
    return [Phase(1.0, cfg.optim.momentum, n, q, routing=1.0 - e, extra=e) for q, n, e in variants]


# ======================================================================================
# 3. Journal -- what a run writes and says
# uses: Config
# ======================================================================================


class Journal:
    """What a run says: train.log, trace.jsonl, the terminal, and a ledger of seconds per phase.

    Every line is flushed when it is written: a killed run keeps all but its last line. A journal made
    `waiting` keeps its lines to itself until `begin`, so that a start that is refused leaves no trace.
    `dir` None (every rank but 0) writes nothing.
    """

    def __init__(self, folder: Path | None, waiting: bool = False) -> None:
        self.dir, self.bar, self.started = folder, None, time.perf_counter()
        self.held: list[tuple[str, str]] | None = [] if waiting else None
        self.ledger: dict[str, float] = {}
        self.doing, self.booked, self.stalled_since = "other", self.started, time.monotonic()

    def log(self, text: str, *, file_only: bool = False) -> None:
        if self.dir is None:
            return
        self.append("train.log", text)
        if not file_only:
            (self.bar.write if self.bar else functools.partial(print, flush=True))(text)

    def warn(self, text: str) -> None:
        """Straight to the terminal, on any rank."""
        print(text, file=sys.stderr, flush=True)

    def trace(self, **values: object) -> None:
        """Append what two equal programs must agree on: no times, no paths, no code sizes."""
        if self.dir is not None:
            self.append("trace.jsonl", json.dumps(values))

    def begin(self) -> None:
        """Take the folder and write what was held back."""
        if self.dir is None:
            return
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(
                f"RUN_DIR={self.dir} cannot be written ({e.strerror}); choose another RUN_DIR"
            ) from e
        held, self.held = self.held or [], None
        for name, line in held:
            self.append(name, line)

    def append(self, name: str, line: str) -> None:
        if self.held is not None:
            self.held.append((name, line))
            return
        try:
            with (self.dir / name).open("a", encoding="utf-8") as f:
                f.write(line + "\n")
        except OSError as e:
            raise UserError(
                f"cannot write {self.dir / name}: {e.strerror}; free space or choose another RUN_DIR"
            ) from e

    def cut_trace(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will take again, and whatever follows them."""
        if self.dir is None or not (self.dir / "trace.jsonl").exists():
            return
        lines = (self.dir / "trace.jsonl").read_text().splitlines()
        kept = itertools.takewhile(
            lambda line: line.startswith('{"step": ') and json.loads(line)["step"] < step,
            (line for line in lines if line.endswith("}")),
        )
        text = "".join(line + "\n" for line in kept)
        write_atomic(self.dir / "trace.jsonl", text.encode())

    @contextlib.contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Charge the seconds of a block to a name of the ledger; a block inside it has its own line."""
        outer = self.doing
        self.charge(name)
        try:
            yield
        finally:
            self.charge(outer)

    def charge(self, doing: str) -> None:
        """Book the seconds since the last booking to what was being done, and begin something else."""
        now = time.perf_counter()
        if now > self.booked:
            self.ledger[self.doing] = self.ledger.get(self.doing, 0.0) + now - self.booked
        self.doing, self.booked = doing, now
        self.beat()

    def beat(self) -> None:
        """Tell the watchdog that the run is alive."""
        self.stalled_since = time.monotonic()

    def progress(self, step: int, total: int, note: str) -> None:
        """A live bar on a terminal that has tqdm; nothing when piped."""
        if self.dir is None or not sys.stdout.isatty():
            return
        self.bar = self.bar or open_bar(total)
        if self.bar:
            self.bar.total = total
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(step - self.bar.n)

    def close_bar(self) -> None:
        if self.bar:
            self.bar.close()
        self.bar = None


RUN_FILES = ("train.log", "trace.jsonl", "results.json", "model.ptz", "checkpoints")


def clear_run(folder: Path) -> None:
    """Remove what a run has written there, and nothing else. Raises UserError where that cannot be."""
    try:
        for name in RUN_FILES[:-1]:
            (folder / name).unlink(missing_ok=True)
        if (folder / RUN_FILES[-1]).is_dir():
            shutil.rmtree(folder / RUN_FILES[-1])
    except OSError as e:
        raise UserError(f"RUN_DIR={folder} cannot be cleared ({e.strerror}); choose another RUN_DIR") from e


def open_bar(total: int) -> object | None:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, unit="step", dynamic_ncols=True, smoothing=0.1)


def write_atomic(path: Path, data: bytes) -> None:
    """Write, flush, fsync, rename, fsync the folder: `path` holds all of `data` or what it held before.

    Raises UserError with the system's reason (no space, read-only) and leaves no temporary file.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(handle, view[: 1 << 24]) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {e.strerror}; free space or choose another RUN_DIR") from e


# ======================================================================================
# 4. World -- ranks and devices; the only chapter that names torch.distributed
# uses: Config Journal
# ======================================================================================


LARGE_TENSOR = 32_768  # elements from which a tensor travels alone (record 1855)
RENAMED = torch.__version__ >= (2, 13)  # it warns of two collectives under the names they had before


class Pending(NamedTuple):
    """Collectives under way. On CUDA `wait` holds back the device's queue, not the host."""

    works: tuple = ()
    into: tuple[Tensor, ...] = ()  # what is copied, once they are done,
    out: tuple[Tensor, ...] = ()  # and from where

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        if self.into:
            torch._foreach_copy_(list(self.into), list(self.out))


@dataclass(frozen=True)
class World:
    """One rank's place among the others. Every method is a no-op alone, so callers never ask."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype  # of activations; weights are always float32
    compiling: bool
    journal: Journal
    run_dir: Path
    fallback: str = ""  # why nothing is compiled, where that was not asked for

    @property
    def compiles_updates(self) -> bool:
        """On a CPU graphs saved 3 % of the updates' time and took 5 s each to make (records/bench/log.md)."""
        return self.compiling and self.device.type == "cuda"

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum_(self, t: Tensor) -> Tensor:
        """Sum over ranks, in place. Host tensors travel over gloo, device tensors over NCCL."""
        if self.size > 1:
            dist.all_reduce(t)
        return t

    def mean_later(self, tensors: list[Tensor]) -> Pending:
        """Start averaging over ranks, in place. Large tensors travel by themselves, the others of a dtype
        in one buffer: a call for each would take 1.3 times as long (compile notes 6)."""
        if self.size == 1:
            return Pending()
        torch._foreach_div_(tensors, self.size)
        small = [t for t in tensors if t.numel() <= LARGE_TENSOR]
        works = [dist.all_reduce(t, async_op=True) for t in tensors if t.numel() > LARGE_TENSOR]
        into, out = [], []
        for dtype in dict.fromkeys(t.dtype for t in small):
            some = [t for t in small if t.dtype == dtype]
            flat = torch.cat([t.flatten() for t in some])
            works.append(dist.all_reduce(flat, async_op=True))
            parts = flat.split([t.numel() for t in some])
            into += some
            out += [part.view_as(t) for part, t in zip(parts, some, strict=True)]
        return Pending(tuple(works), tuple(into), tuple(out))

    def mean_share_later(self, whole: Tensor) -> tuple[Tensor, Pending]:
        """Start averaging over ranks, each of which keeps its share of the first dimension; they divide it.

        It travels in the dtype of activations: half the bytes where that is bfloat16 (frontier 5.4).
        """
        if self.size == 1:
            return whole, Pending()
        whole = whole.to(self.dtype).div_(self.size)
        share = torch.empty_like(whole[: len(whole) // self.size])
        scatter = dist.reduce_scatter_single if RENAMED else dist.reduce_scatter_tensor
        return share, Pending((scatter(share, whole, async_op=True),))

    def gather_later(self, share: Tensor) -> tuple[Tensor, Pending]:
        """Start putting every rank's share together again, on all ranks. Alone it is the share itself."""
        if self.size == 1:
            return share, Pending()
        whole = share.new_empty(self.size * len(share), *share.shape[1:])
        gather = dist.all_gather_single if RENAMED else dist.all_gather_into_tensor
        return whole, Pending((gather(whole, share.contiguous(), async_op=True),))

    def sum_later(self, t: Tensor) -> object:
        """Start summing a host tensor over ranks; `.wait()` on what is returned finishes it."""
        return dist.all_reduce(t, async_op=True)

    def gather(self, item: object) -> list[object]:
        """Every rank's item, in rank order, on every rank."""
        if self.size == 1:
            return [item]
        items = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def share(self, make: Callable[[], object]) -> object:
        """What `make` returns on rank 0, on every rank; a UserError there is raised on every rank."""
        box = [None]
        if self.main:
            try:
                box = [make()]
            except UserError as e:
                box = [e]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def log(self, text: str) -> None:
        self.journal.log(text)

    def peak_bytes(self) -> tuple[int, int]:
        """Most memory allocated and reserved so far: device memory on CUDA, resident memory on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        status = Path("/proc/self/status")  # getrusage would also count the parent before the exec
        lines = status.read_text().splitlines() if status.exists() else []
        peak = max((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), default=0)
        return peak, peak


def open_world(cfg: Config, env: dict[str, str]) -> World:
    """Join the other ranks (torchrun's variables), open RUN_DIR and the journal. Raises UserError."""
    rank, size, local = (int(env.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    share = size * micro_batches(cfg, size)
    if share == 0 or cfg.data.spans % share:
        raise UserError(
            f"WORLD_SIZE={size} x GRAD_ACCUM_STEPS={micro_batches(cfg, size)} does not divide the "
            f"{cfg.data.spans} spans of a step; change TRAIN_SPANS or the number of ranks"
        )
    device = pick_device(cfg, local)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=cfg.compute.dist_timeout))
    world = World(rank, size, device, torch.float32, False, Journal(None), Path())
    run_dir = world.share(lambda: choose_run_dir(cfg))
    journal = Journal(run_dir if rank == 0 else None, waiting=True)
    return dataclasses.replace(world, run_dir=run_dir, journal=journal)


def pick_device(cfg: Config, local: int) -> torch.device:
    if cfg.compute.device == "cuda" and not torch.cuda.is_available():
        raise UserError("DEVICE=cuda, but torch sees no CUDA device; use DEVICE=cpu or auto")
    if cfg.compute.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK={local}, but this machine has {torch.cuda.device_count()} CUDA devices; start fewer "
            f"ranks or set DEVICE=cpu"
        )
    torch.cuda.set_device(local)
    torch.set_float32_matmul_precision("high")  # the records' setting: TF32 for what is left in float32
    return torch.device("cuda", local)


def close_world(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def choose_run_dir(cfg: Config) -> Path:
    """Where this run writes. Raises UserError rather than write over another run; makes nothing yet.

    Scoring a run's own artifact goes into a folder beside the run's files.
    """
    name = cfg.run.id or time.strftime("%Y%m%d_%H%M%S") + f"_{os.getpid()}"
    folder = Path(cfg.run.dir or f"runs/{name}")
    if cfg.run.eval_only and Path(cfg.run.artifact or folder / "x").resolve().parent == folder.resolve():
        folder = folder / time.strftime("eval_%Y%m%d_%H%M%S")
    used = any((folder / name).exists() for name in RUN_FILES)
    if used and not (cfg.run.resume or cfg.run.overwrite):
        raise UserError(
            f"RUN_DIR={folder} already holds a run; choose another RUN_ID, or set RESUME=1 to continue "
            f"it or OVERWRITE=1 to clear it"
        )
    return folder


def open_journal(cfg: Config, world: World) -> None:
    """From here on the run writes: what it was asked to write over goes. Raises UserError on all ranks."""
    if cfg.run.overwrite and not cfg.run.resume:
        world.share(lambda: clear_run(world.run_dir))
    world.share(world.journal.begin)


# ======================================================================================
# 5. Clock -- rank 0's seconds, signals, and a watchdog
# uses: Config World
# ======================================================================================


class Reading(NamedTuple):
    """What rank 0's clock says, the same on every rank."""

    seconds: float  # of training
    stop: bool  # some rank was asked to stop
    save: bool  # a checkpoint is due


class Clock:
    """Rank 0's stopwatch of training seconds, heard by every rank; the only clock of a run.

    Alone the reading is fresh. In company it travels over a host collective while the step runs and
    is one step old, and `ends_in_time` looks one step further ahead to make up for it. Validation
    and checkpoints pause the clock; they have lines of their own in the ledger.
    """

    SAFETY = 1.1  # the next step may be this much slower than the slowest of the last 20

    def __init__(
        self, cfg: Config, world: World, spent: float, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.cfg, self.world, self.now = cfg, world, now
        self.spent, self.mark, self.saved, self.interrupted = spent, None, now(), False
        self.heard, self.pending = Reading(spent, False, False), None
        self.times: deque[float] = deque(maxlen=20)
        self.paces: list[float] = []  # of every step of this process
        self.cap, self.reserve, self.fresh = cfg.budget.seconds, 0.0, False

    def keep(self, reserve: float) -> None:
        """End the steps so many seconds before the cap. Raises UserError where that leaves none."""
        if 0 < self.cfg.budget.seconds <= reserve:
            raise UserError(
                f"MAX_WALLCLOCK_SECONDS={self.cfg.budget.seconds} leaves no time to train: calibration takes "
                f"{reserve:.1f} s of it; raise it or lower GPTQ_CALIBRATION_BATCHES, EXPORT_PROXY_TOKENS or "
                f"CALIB_MAX_SECONDS"
            )
        if self.cfg.budget.seconds > 0:
            self.cap, self.reserve = self.cfg.budget.seconds - reserve, reserve

    def elapsed(self) -> float:
        return self.spent + (self.now() - self.mark if self.mark is not None else 0.0)

    def start(self) -> None:
        self.mark = self.now()

    def stop(self) -> None:
        self.spent, self.mark = self.elapsed(), None

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        self.world.synchronize()
        self.stop()
        try:
            yield
        finally:
            self.start()

    def tick(self, step: int) -> Reading:
        """The reading at (about) the start of this step. Every rank calls it once a step."""
        if self.sync_due(step):
            self.world.synchronize()
        every = self.cfg.run.checkpoint_every
        due = every > 0 and self.now() - self.saved >= every
        self.saved = self.now() if due else self.saved
        mine = [self.elapsed(), float(self.interrupted), float(due)]
        mine = torch.tensor(mine if self.world.main else [0.0, mine[1], 0.0], dtype=torch.float64)
        if self.world.size == 1:
            return self.hear(mine)
        last, self.pending = self.pending, (mine, self.world.sum_later(mine))
        if last is not None:
            last[1].wait()
            return self.hear(last[0])
        return self.heard

    def hear(self, mine: Tensor) -> Reading:
        seconds, stop, save = mine.tolist()
        if not self.fresh:
            self.times.append(seconds - self.heard.seconds)
            if not FOLDED:
                self.paces.append(self.times[-1])
        self.heard, self.fresh = Reading(seconds, stop > 0, save > 0), False
        return self.heard

    @contextlib.contextmanager  # without a `finally`: after an error no rank may wait for the others
    def aside(self) -> Generator[None]:
        """A block of training time that is no step: it counts, and the pace of steps does not know of it.

        Every rank enters and leaves it, and has a fresh reading at both ends.
        """
        due = False
        if self.pending is not None:
            (mine, work), self.pending = self.pending, None
            work.wait()
            due = self.hear(mine).save
        self.hear(self.read())
        yield  # noqa: RUF075
        self.fresh = True
        self.hear(self.read())
        self.heard, self.fresh = self.heard._replace(save=due), True

    def read(self) -> Tensor:
        """(3,) what `hear` wants, now and from all ranks."""
        self.world.synchronize()
        seconds = self.elapsed() if self.world.main else 0.0
        return self.world.sum_(torch.tensor([seconds, float(self.interrupted), 0.0], dtype=torch.float64))

    def left(self, kept: float) -> float:
        """Seconds from the last reading to the cap, less those kept for later; infinite without a cap."""
        cap = self.cfg.budget.seconds
        return cap - kept - self.heard.seconds if cap > 0 else math.inf

    def sync_due(self, step: int) -> bool:
        """Every CLOCK_SYNC_EVERY steps, and at each of the last 20 that the cap leaves room for."""
        typical = statistics.median(self.times) if self.times else 0.0
        every = self.cfg.compute.clock_sync_every or (1 if typical < 0.2 else 4)
        return step % every == 0 or (self.cap > 0 and self.cap - self.heard.seconds < 20 * typical)

    def ends_in_time(self) -> bool:
        """Whether the step about to start will be over before the cap, at the pace of the slowest of 20."""
        if self.cap <= 0:
            return True
        ahead = 1 if self.world.size == 1 else 2
        worst = max(self.times, default=0.0) * self.SAFETY
        return self.heard.seconds + ahead * worst < self.cap

    def projected_steps(self, step: int) -> int:
        """Final step count at the median pace of the last 20 steps."""
        if self.cap <= 0 or not self.times:
            return self.cfg.budget.iterations
        left = self.cap - self.heard.seconds
        more = int(left / max(statistics.median(self.times), 1e-9))
        return min(step + max(more, 0), self.cfg.budget.iterations)

    def remember(self, pace: list[float]) -> None:
        """Take over the step times of the resumed run, so that its first step cannot cross the cap."""
        self.times.extend(pace)

    def drain(self) -> None:
        """Finish the reading that is still on its way, so that ranks leave the loop even."""
        if self.pending is not None:
            self.pending[1].wait()
            self.pending = None


@contextlib.contextmanager
def stop_on_signal(clock: Clock) -> Generator[None]:
    """SIGTERM and SIGINT ask the training loop to save and leave at the next step's edge."""
    names = (signal.SIGTERM, signal.SIGINT)

    def ask(_number: int, _frame: object) -> None:
        if clock.interrupted:
            raise KeyboardInterrupt("asked a second time: leaving without a checkpoint")
        clock.interrupted = True

    before = {s: signal.signal(s, ask) for s in names}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextlib.contextmanager
def watchdog(world: World, limit: float) -> Generator[None]:
    """Name the phase and rank that stood still for half the collective time-out, before it kills the job."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(min(limit / 10, 5.0)):
            still = time.monotonic() - world.journal.stalled_since
            if still > limit / 2:
                world.journal.warn(
                    f"rank {world.rank}: no progress for {still:.0f} s in phase '{world.journal.doing}'"
                )
                world.journal.beat()

    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        done.set()


# ======================================================================================
# 6. Data -- shards of tokens -> batches; tokens -> bytes of source text
# uses: Config World
# ======================================================================================

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024  # the challenge's shard format (frontier 1.1)
CASE_MARKS = "\ue001\ue002\ue003\ue004"  # title, all capitals, next letter, literal (data/caseops.py)


class Batch(NamedTuple):
    """What one forward reads. `docs` are int32 boundaries of segments along N = B*T, or None."""

    tokens: Tensor  # (B,T) int64
    targets: Tensor  # (B,T) int64, the tokens that follow
    docs: Tensor | None


def read_header(path: Path) -> int:
    """Tokens in a shard. Raises UserError for a wrong magic, version, or length."""
    with path.open("rb") as f:
        raw = f.read(HEADER_BYTES)
    head = np.frombuffer(raw[: len(raw) // 4 * 4], dtype="<i4")
    if len(raw) < HEADER_BYTES or head[0] != MAGIC:
        raise UserError(
            f"{path} is not a token shard: magic {head[0] if len(head) else 'absent'}, want {MAGIC}; "
            f"prepare it with data/prepare.py or data/download.py"
        )
    if head[1] != VERSION:
        raise UserError(f"{path} has shard version {head[1]}, want {VERSION}; prepare it again")
    size, want = path.stat().st_size, HEADER_BYTES + 2 * int(head[2])
    if size != want:
        raise UserError(
            f"{path} is truncated or padded: {size} bytes, its header says {want}; fetch it again"
        )
    return int(head[2])


class Shards:
    """The shards of one split in lexicographic order, as one long array of tokens.

    Token ids are checked against the vocabulary once per shard, when it is first touched. The last `held`
    tokens are no part of the array: `held_out` alone gives them.
    """

    def __init__(self, folder: Path, split: str, vocab: int, held: int = 0) -> None:
        self.paths = list_shards(folder, split)
        self.vocab, self.open, self.held = vocab, {}, held
        sizes = [read_header(p) for p in self.paths]
        if 0 < held >= sizes[-1]:
            raise UserError(
                f"{self.paths[-1]} holds {sizes[-1]} tokens, of which {held} are to be held out and some "
                f"left for training; lower HELD_OUT_TOKENS, EXPORT_PROXY_TOKENS or CALIB_PROXY_MAX_TOK"
            )
        self.ends = list(itertools.accumulate([*sizes[:-1], sizes[-1] - held]))
        if self.total == 0:
            raise UserError(f"{folder} holds no {split} token; prepare it again")

    @property
    def total(self) -> int:
        return self.ends[-1]

    def shard(self, i: int) -> np.ndarray:
        if i not in self.open:
            self.open[i] = self.checked(i, self.unchecked(i))
        return self.open[i]

    def checked(self, i: int, tokens: np.ndarray) -> np.ndarray:
        blocks = np.array_split(tokens, max(1, len(tokens) >> 24)) if len(tokens) else []
        top = max((int(block.max()) for block in blocks), default=0)
        if top >= self.vocab:
            raise UserError(
                f"{self.paths[i]} holds token id {top}, beyond VOCAB_SIZE={self.vocab}; the shards "
                f"belong to another tokenizer"
            )
        return tokens

    def unchecked(self, i: int) -> np.ndarray:
        count = self.ends[i] - (self.ends[i - 1] if i else 0)
        if count == 0:  # an empty file cannot be mapped
            return np.zeros(0, "<u2")
        return np.memmap(self.paths[i], dtype="<u2", mode="r", offset=HEADER_BYTES)[:count]

    def held_out(self) -> np.ndarray:
        """(held,) tokens that training never sees, the last of all; wanted only where there are some."""
        last = np.memmap(self.paths[-1], dtype="<u2", mode="r", offset=HEADER_BYTES)
        return self.checked(len(self.paths) - 1, last[-self.held :])

    def first(self, i: int, token: int) -> int | None:
        """Position of a token's first occurrence in a shard, reading no further than that."""
        tokens = self.unchecked(i)
        for at in range(0, len(tokens), 1 << 20):
            found = np.flatnonzero(tokens[at : at + (1 << 20)] == token)
            if len(found):
                return at + int(found[0])
        return None

    def take(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from position `start`, over shard edges and around the end."""
        parts, start = [], start % self.total
        while count > 0:
            i = next(k for k, end in enumerate(self.ends) if start < end)
            first = self.ends[i - 1] if i else 0
            part = self.shard(i)[start - first : start - first + count]
            parts.append(part)
            count -= len(part)
            start = (start + len(part)) % self.total
        return np.concatenate(parts)

    def fingerprint(self) -> str:
        """Names, sizes and beginnings, to tell one data set from another without reading it all."""
        total = hashlib.sha256()
        for i, path in enumerate(self.paths):
            total.update(f"{path.name} {self.ends[i]} ".encode() + self.unchecked(i)[: 1 << 15].tobytes())
        return total.hexdigest()[:16]


def list_shards(folder: Path, split: str) -> list[Path]:
    """The files of a split, sorted; byte sidecars (`fineweb_val_bytes_*`) are a split of their own."""
    make = "make them with: python data/prepare.py --help, or python data/download.py sp1024"
    if not folder.is_dir():
        raise UserError(f"DATA_PATH={folder} is not a folder; {make}")
    start = f"fineweb_{split}"
    paths = sorted(p for p in folder.glob(f"{start}_*.bin") if "_bytes_" not in p.name.removeprefix(start))
    if not paths:
        raise UserError(f"DATA_PATH={folder} holds no fineweb_{split}_*.bin; {make}")
    if split == "val" and all(p.stat().st_size < HEADER_BYTES + 4 for p in paths):
        raise UserError(
            f"the validation split in DATA_PATH={folder} is empty; prepare it with --val-docs >= 1"
        )
    return paths


def find_validation(cfg: Config) -> None:
    """Raises UserError unless the validation split is there, by names and file sizes: it stays closed."""
    folder, make = Path(cfg.run.data), "python data/prepare.py --caseops or python data/download.py caseops"
    shards = list_shards(folder, "val")
    if not cfg.data.caseops:
        return
    sidecars = [p.with_name(p.name.replace("_val_", "_val_bytes_", 1)) for p in shards]
    for shard, sidecar in zip(shards, sidecars, strict=True):
        size = sidecar.stat().st_size if sidecar.is_file() else 0
        if size != shard.stat().st_size:
            found = f"has {size} bytes, its shard {shard.stat().st_size}" if size else "is missing or empty"
            raise UserError(f"CASEOPS_ENABLED=1, but {sidecar} {found}; make both with: {make}")
    strays = sorted(set(folder.glob("fineweb_val_bytes_*.bin")) - set(sidecars))
    if strays:
        raise UserError(f"{strays[0]} is beside no shard; remove it, or make its folder with: {make}")


def token_count(cfg: Config, split: str) -> int:
    """Tokens of a split by file size alone: the validation split stays closed until it is scored."""
    return sum((p.stat().st_size - HEADER_BYTES) // 2 for p in list_shards(Path(cfg.run.data), split))


class StreamSpans:
    """Spans cut from the concatenated shards, one after another, around and around (naive baseline)."""

    def __init__(self, shards: Shards, cfg: Config) -> None:
        self.shards, self.cfg = shards, cfg
        if shards.total < cfg.data.span + 1:
            raise UserError(
                f"the training shards hold {shards.total} tokens, a span of TRAIN_BATCH_TOKENS/TRAIN_SPANS "
                f"needs {cfg.data.span + 1}; lower TRAIN_BATCH_TOKENS"
            )

    def span(self, step: int, index: int) -> np.ndarray:
        """(span+1,) tokens: a pure function of the step, so any rank can ask for any span."""
        length = self.cfg.data.span + 1
        return self.shards.take((step * self.cfg.data.spans + index) * length, length)


class DocumentSpans:
    """Spans that begin at each shard's first BOS; a shard's last, partial step is dropped (record 1855)."""

    def __init__(self, shards: Shards, cfg: Config, bos: int) -> None:
        self.shards, self.cfg = shards, cfg
        self.length = cfg.data.span + 1
        self.starts, steps = [], []
        for i, path in enumerate(shards.paths):
            start = shards.first(i, bos)
            if start is None:
                raise UserError(
                    f"{path} has no BOS token (id {bos}), so no document can be found; prepare it with "
                    f"data/prepare.py or set DOC_PACKING=0"
                )
            self.starts.append(start)
            steps.append((len(shards.unchecked(i)) - start) // (self.length * cfg.data.spans))
        self.ends = list(itertools.accumulate(steps))
        if self.ends[-1] == 0:
            raise UserError(
                f"no training shard holds the {self.length * cfg.data.spans} tokens of one step; lower "
                f"TRAIN_BATCH_TOKENS or prepare larger shards"
            )

    def span(self, step: int, index: int) -> np.ndarray:
        """(span+1,) tokens: a pure function of the step, so any rank can ask for any span."""
        step %= self.ends[-1]
        i = next(k for k, end in enumerate(self.ends) if step < end)
        within = step - (self.ends[i - 1] if i else 0)
        at = self.starts[i] + (within * self.cfg.data.spans + index) * self.length
        return self.shards.shard(i)[at : at + self.length]


def make_spans(shards: Shards, cfg: Config, bos: int) -> StreamSpans | DocumentSpans:
    if cfg.data.packing:
        return DocumentSpans(shards, cfg, bos)
    return StreamSpans(shards, cfg)


def segment_bounds(tokens: np.ndarray, bos: int, longest: int) -> list[int]:
    """Starts of the segments of (N,) tokens: at each BOS, and every `longest` tokens within a document."""
    starts = np.flatnonzero(tokens == bos).tolist()
    starts = starts if starts and starts[0] == 0 else [0, *starts]
    edges = [*starts, len(tokens)]
    return [cut for a, b in itertools.pairwise(edges) for cut in range(a, b, longest)]


def packed(rows: list[np.ndarray], bos: int, longest: int) -> Batch:
    """Rows of L+1 tokens -> one (1, rows*L) batch whose segments never cross a row or a document.

    The boundaries end with N and are padded with N to a multiple of 64 entries, so that only a few
    shapes are ever compiled (record 1855); every consumer tolerates the empty segments.
    """
    bounds, at = [], 0
    for row in rows:
        bounds += [at + b for b in segment_bounds(row[:-1], bos, longest)]
        at += len(row) - 1
    bounds += [at] * (64 - len(bounds) % 64)
    inputs, targets = np.concatenate([r[:-1] for r in rows]), np.concatenate([r[1:] for r in rows])
    return Batch(as_ids(inputs)[None], as_ids(targets)[None], torch.tensor(bounds, dtype=torch.int32))


def as_rows(spans: list[np.ndarray], length: int) -> Batch:
    """Spans of L+1 tokens -> (rows, length) inputs and targets, without segment boundaries."""
    inputs, targets = np.concatenate([s[:-1] for s in spans]), np.concatenate([s[1:] for s in spans])
    return Batch(as_ids(inputs).view(-1, length), as_ids(targets).view(-1, length), None)


def as_ids(tokens: np.ndarray) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64))


def to_device(batch: Batch, world: World) -> Batch:
    """Asynchronous where the host memory is pinned."""
    return Batch(*(t if t is None else t.to(world.device, non_blocking=True) for t in batch))


class Loader:
    """This rank's micro-batches of a step, with the next step prepared by a thread meanwhile.

    The order of tokens is a pure function of the step: resuming needs the step alone, and 1, 2, 4 or
    8 ranks, with however many micro-batches, see the same tokens in the same spans.
    """

    def __init__(self, cfg: Config, world: World, bos: int) -> None:
        self.cfg, self.world, self.bos = cfg, world, bos
        self.shards = Shards(Path(cfg.run.data), "train", cfg.model.vocab, tokens_held_out(cfg))
        self.spans = make_spans(self.shards, cfg, bos)
        if tokens_held_out(cfg):
            self.held = self.shards.held_out()
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.ready: dict[int, Future] = {}

    def host_batches(self, step: int) -> list[Batch]:
        count = micro_batches(self.cfg, self.world.size)
        each = self.cfg.data.spans // (self.world.size * count)
        firsts = [(m * self.world.size + self.world.rank) * each for m in range(count)]
        groups = [[self.spans.span(step, i) for i in range(first, first + each)] for first in firsts]
        pin = self.world.device.type == "cuda"
        batches = [self.batch(group) for group in groups]
        return [Batch(*(t.pin_memory() if pin and t is not None else t for t in b)) for b in batches]

    def batch(self, spans: list[np.ndarray]) -> Batch:
        if self.cfg.data.packing:
            return packed(spans, self.bos, self.cfg.data.seq_len)
        return as_rows(spans, self.cfg.data.seq_len)

    def batches(self, step: int) -> list[Batch]:
        future = self.ready.pop(step, None) or self.pool.submit(self.host_batches, step)
        self.ready = {step + 1: self.pool.submit(self.host_batches, step + 1)}
        return [to_device(b, self.world) for b in future.result()]

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


class Tokenizer(NamedTuple):
    """What the score needs to know of a SentencePiece model: bytes per token, and who eats a space."""

    bos: int
    base_bytes: np.ndarray  # (V,) int64, UTF-8 bytes without the leading space
    leading_space: np.ndarray  # (V,) bool
    boundary: np.ndarray  # (V,) bool: control, unknown, unused; no space is charged after them
    file_bytes: int
    pieces: Callable[[list[int]], str]

    def count_bytes(self, before: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Bytes of source text that each target stands for, given the token before it (frontier 1.3)."""
        return self.base_bytes[targets] + (self.leading_space[targets] & ~self.boundary[before])


def load_tokenizer(cfg: Config) -> Tokenizer:
    """Raises UserError when the file is missing, unreadable, or of another vocabulary."""
    from sentencepiece import SentencePieceProcessor

    path = Path(cfg.run.tokenizer)
    if not path.is_file():
        raise UserError(
            f"TOKENIZER_PATH={path} does not exist; data/prepare.py and data/download.py make one"
        )
    try:
        sp = SentencePieceProcessor(model_file=str(path))
    except RuntimeError as e:
        raise UserError(f"TOKENIZER_PATH={path} is not a SentencePiece model; fetch or train it again") from e
    if sp.vocab_size() != cfg.model.vocab:
        raise UserError(
            f"VOCAB_SIZE={cfg.model.vocab}, but TOKENIZER_PATH={path} has {sp.vocab_size()} pieces; set "
            f"VOCAB_SIZE={sp.vocab_size()}"
        )
    if sp.piece_to_id("▁") == sp.unk_id():
        raise UserError(
            f"TOKENIZER_PATH={path} has no bare ▁ piece, so spaces cannot be counted; train another"
        )
    ids = range(sp.vocab_size())
    silent = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids])
    byte = np.array([sp.is_byte(i) for i in ids])
    space = np.array([sp.id_to_piece(i).startswith("▁") for i in ids]) & ~silent & ~byte
    text = np.array([len(sp.id_to_piece(i).removeprefix("▁").encode()) for i in ids], dtype=np.int64)
    base = np.where(silent, 0, np.where(byte, 1, text))
    if sp.bos_id() != BOS and (cfg.input.smear or cfg.input.bigram_on):
        raise UserError(
            f"SMEAR_GATE_ENABLED and BIGRAM_VOCAB_SIZE want BOS to be piece {BOS}; in TOKENIZER_PATH={path} "
            f"it is piece {sp.bos_id()}; train another"
        )
    check_marks(all(sp.piece_to_id(mark) != sp.unk_id() for mark in CASE_MARKS), cfg)
    return Tokenizer(sp.bos_id(), base, space, silent, path.stat().st_size, sp.decode)


def check_marks(known: bool, cfg: Config) -> None:
    """Raises UserError where the tokenizer is one of CaseOps text and the run is not, or conversely."""
    if cfg.data.caseops and not known:
        raise UserError(
            f"CASEOPS_ENABLED=1, but TOKENIZER_PATH={cfg.run.tokenizer} lacks the pieces U+E001 to U+E004 of "
            f"CaseOps text; name the tokenizer of these shards, or set CASEOPS_ENABLED=0"
        )
    if known and not cfg.data.caseops:
        raise UserError(
            f"TOKENIZER_PATH={cfg.run.tokenizer} is one of CaseOps text, whose bytes are not those of its "
            f"pieces; set CASEOPS_ENABLED=1"
        )


def read_sidecars(folder: Path, tokens: np.ndarray, bos: int) -> np.ndarray:
    """(N,) uint16 bytes of source text that each of the N validation tokens stands for (record 1855).

    Raises UserError for a sidecar that cannot be one: not a byte in it, or bytes for a BOS.
    """
    sidecars = Shards(folder, "val_bytes", 1 << 16)
    counts, make = sidecars.take(0, sidecars.total), "prepare or fetch the validation split again"
    for path, part in zip(sidecars.paths, np.split(counts, sidecars.ends[:-1]), strict=True):
        if len(part) and not part.any():
            raise UserError(f"{path} says that {len(part)} tokens stand for no byte at all; {make}")
    charged = np.flatnonzero((tokens == bos) & (counts > 0))
    if len(charged):
        at = int(charged[0])
        path = next(p for p, end in zip(sidecars.paths, sidecars.ends, strict=True) if at < end)
        raise UserError(f"{path} charges {counts[at]} bytes for a BOS, want 0: it is of other shards; {make}")
    return counts


def recased(text: str) -> str:
    """Capitals back in CaseOps text, as `decode` of data/caseops.py, but misplaced marks are left out."""
    marks = r"\ue004(.)|\ue002([A-Za-z]+)|[\ue001\ue003]([A-Za-z])|[\ue001-\ue004]"
    return re.sub(marks, lambda m: m[1] or (m[2] or m[3] or "").upper(), text, flags=re.DOTALL)


class Validation:
    """The validation split, opened only when something is scored; every target but the first token's."""

    def __init__(self, cfg: Config, tokenizer: Tokenizer) -> None:
        shards = Shards(Path(cfg.run.data), "val", cfg.model.vocab)
        self.tokens = shards.take(0, shards.total).astype(np.int64)
        self.cfg, self.tokenizer = cfg, tokenizer
        if (cfg.data.packing or cfg.data.caseops) and not (self.tokens == tokenizer.bos).any():
            raise UserError(
                f"{shards.paths[0]} holds no BOS token (id {tokenizer.bos}), nor does any other validation "
                f"shard, so no document can be found; prepare the split again"
            )
        if cfg.data.caseops:
            find_validation(cfg)
            self.sidecar = read_sidecars(Path(cfg.run.data), self.tokens, tokenizer.bos)
        self.partial = 0 < cfg.scoring.max_tokens < len(self.tokens) - 1
        if self.partial:
            self.tokens = self.tokens[: cfg.scoring.max_tokens + 1]
        if len(self.tokens) < 2:
            raise UserError(
                f"the validation split in DATA_PATH={cfg.run.data} holds {len(self.tokens)} tokens, want >= 2"
            )

    @property
    def targets(self) -> int:
        return len(self.tokens) - 1

    def target_bytes(self, start: int, stop: int) -> int:
        """Source bytes of targets start..stop-1; target i is token i+1."""
        if self.cfg.data.caseops:
            return int(self.sidecar[start + 1 : stop + 1].sum(dtype=np.int64))
        counted = self.tokenizer.count_bytes(self.tokens[start:stop], self.tokens[start + 1 : stop + 1])
        return int(counted.sum())

    def order0_bpb(self) -> float:
        """Bits per byte of a coder that knows only the frequencies of these tokens: the score to beat."""
        counts = np.bincount(self.tokens[1:])
        share = counts[counts > 0] / self.targets
        bits = -float((share * np.log2(share)).sum())
        return bits * self.targets / max(self.target_bytes(0, self.targets), 1)


# ======================================================================================
# 7. Kernels -- the plain form is the meaning, the fast form is the speed
# uses: Config
# ======================================================================================


def segments(docs: Tensor) -> list[tuple[int, int]]:
    """Non-empty (start, end) pairs of a boundary list."""
    return [(a, b) for a, b in itertools.pairwise(docs.tolist()) if a < b]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B,T,H,K), (B,T,G,K) x2 -> (B,T,H,K), causal; query head h reads key head h // (H/G)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def attend_segments_ref(q: Tensor, k: Tensor, v: Tensor, docs: Tensor) -> Tensor:
    """Causal attention that never leaves a segment: one SDPA call each. q (1,N,H,K), k and v (1,N,G,K)."""
    return torch.cat([sdpa(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in segments(docs)], 1)


@functools.cache
def segment_operator(tiled: bool, /) -> Callable:
    """attend_segments_ref for CPUs as one opaque operator: its data-dependent loop fits a compiled block.

    SDPA cannot be differentiated inside an operator, so this calls the two flash kernels under it, or
    for the backward `segment_gradients`.
    """
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    @torch.library.custom_op(f"golf::attend_segments{'_tiled' * tiled}", mutates_args=())
    def attend(q: Tensor, k: Tensor, v: Tensor, docs: Tensor) -> tuple[Tensor, Tensor]:
        rows = [[t[:, a:b].transpose(1, 2) for t in (q, k, v)] for a, b in segments(docs)]
        out, lse = zip(*(forward(*row, 0.0, True) for row in rows), strict=True)
        return torch.cat(out, 2).transpose(1, 2).contiguous(), torch.cat(lse, 2).contiguous()

    @torch.library.custom_op(f"golf::attend_segments{'_tiled' * tiled}_grad", mutates_args=())
    def grads(g: Tensor, qkv: list[Tensor], y: Tensor, lse: Tensor, docs: Tensor) -> list[Tensor]:
        if tiled and not FOLDED:
            return segment_gradients(g, qkv, y, lse, docs)
        found = []
        for a, b in segments(docs):
            row = [t[:, a:b].transpose(1, 2) for t in (g, *qkv, y)]
            found.append(backward(*row, lse[:, :, a:b].contiguous(), 0.0, True))
        return [torch.cat(parts, 2).transpose(1, 2).contiguous() for parts in zip(*found, strict=True)]

    def keep(ctx: object, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs, *output)

    def differentiate(ctx: object, g: Tensor, _: Tensor) -> tuple:
        q, k, v, docs, y, lse = ctx.saved_tensors
        return *grads(g, [q, k, v], y, lse, docs), None

    attend.register_fake(lambda q, k, v, docs: (q.new_empty(q.shape), wide(q.new_empty(1, *q.shape[2:0:-1]))))
    grads.register_fake(lambda g, qkv, y, lse, docs: [t.new_empty(t.shape) for t in qkv])
    attend.register_autograd(differentiate, setup_context=keep)
    return lambda q, k, v, docs: attend(q, k, v, docs)[0]


class BlockedAttention(torch.autograd.Function):
    """sdpa for compiled CPU blocks: its flash forward, and a backward by blocks of 128 queries.

    At 16 rows of 512 tokens, forward and backward took 26 ms against 43 ms of torch's own (2 cores,
    bfloat16, compiled). Dao et al., FlashAttention-2, algorithm 2, with one loop unrolled.
    """

    @staticmethod
    def forward(ctx: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (t.transpose(1, 2) for t in (q, k, v))
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*rows, 0.0, True)
        ctx.save_for_backward(q, k, v, y.transpose(1, 2), lse)
        return y.transpose(1, 2)

    @staticmethod
    def backward(ctx: object, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y, lse = ctx.saved_tensors
        grouped = (q.shape[0], q.shape[1], k.shape[2], -1, q.shape[3])  # B, T, G, H/G, K
        over = (wide(g) * wide(y)).sum(-1, keepdim=True).view(*grouped[:4], 1)
        rows = [t.reshape(grouped).permute(0, 2, 3, 1, 4) for t in (q, g)] + [over.permute(0, 2, 3, 1, 4)]
        rows.append(lse.reshape(rows[2].shape))
        keys = [t.transpose(1, 2).flatten(0, 1) for t in (k, v)]  # (B*G, T, K)
        by_query, by_key = [], [torch.zeros_like(t, dtype=torch.float32) for t in keys]
        for a in range(0, q.shape[1], 128):
            b = min(a + 128, q.shape[1])
            block = [t[:, :, :, a:b].flatten(0, 1).flatten(1, 2) for t in rows]
            at = torch.arange(a, b, device=q.device).repeat(rows[0].shape[2])
            seen = at[:, None] >= torch.arange(b, device=q.device)
            dq, dk, dv = block_gradients(block, [t[:, :b] for t in keys], seen)
            by_query.append(dq.view(*rows[0].shape[:3], b - a, -1))
            by_key[0][:, :b] += dk
            by_key[1][:, :b] += dv
        dk, dv = (t.to(q.dtype).view(k.shape[0], k.shape[2], *t.shape[1:]).transpose(1, 2) for t in by_key)
        return torch.cat(by_query, 3).permute(0, 3, 1, 2, 4).reshape(q.shape), dk, dv


def block_gradients(block: list[Tensor], keys: list[Tensor], seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a block of L queries, the first its own, and of the b keys and values that it may see.

    block: queries, incoming gradients (..., R*L, K), row sums of gradient times output, log-sum-exps
    (..., R*L, 1), R heads one after another; keys: keys, values (..., b, K); seen: (..., R*L, b).
    """
    (q, g, over, lse), (k, v) = block, keys
    scale = q.shape[-1] ** -0.5
    p = torch.where(seen, torch.exp(wide(q @ k.mT) * scale - lse), 0.0)
    slope = (p * (wide(g @ v.mT) - over) * scale).to(q.dtype)
    return slope @ k, wide(slope.mT @ q), wide(p.to(q.dtype).mT @ g)


TILES = 128, 256, 8  # queries, keys, pairs a call: the fastest of seven choices on 8,192 bfloat16 tokens


def segment_gradients(g: Tensor, qkv: list[Tensor], y: Tensor, lse: Tensor, docs: Tensor) -> list[Tensor]:
    """Backward of attend_segments_ref by pairs of tiles of equal shape, so that one graph serves them all.

    Torch's own kernel is slow on short segments: 8,192 bfloat16 tokens in documents of 800 took 83 ms a
    layer, these 69 ms (2 cores). In float32 it is the faster one.
    """
    (rows, cols, count), total, heads, groups = TILES, *g.shape[1:3], qkv[1].shape[2]
    short = cols + -total % cols  # at least one tile of keys that nothing real sees
    at = torch.arange(total + short)
    first = F.pad(docs[torch.searchsorted(docs, at[:total], right=True) - 1], (0, short), value=total)
    over = (wide(g) * wide(y)).sum(-1, keepdim=True)
    q, *kv = (F.pad(t, (0, 0, 0, 0, 0, short)) for t in qkv)
    by_query = [q, *(F.pad(t, (0, 0, 0, 0, 0, short)) for t in (g, over, lse.transpose(1, 2)[..., None]))]
    by_query += [t.view(1, -1, 1, 1).expand(1, -1, heads, 1) for t in (at, first)]
    tiles = [query_tiles(t, rows, groups) for t in by_query]
    keys = [t.view(-1, cols, groups, t.shape[3]).transpose(1, 2).contiguous() for t in kv]
    keys.append(at.view(-1, 1, 1, cols))
    pairs = touching(first[::rows] // cols, at[rows - 1 :: rows] // cols, count)
    sums = [wide(torch.zeros_like(t)) for t in (tiles[0], *keys[:2])]
    for i, j in zip(*(half.split(count) for half in pairs), strict=True):
        parts = compiled_once(tile_gradients)([t[i] for t in tiles], [t[j] for t in keys])
        for into, index, part in zip(sums, (i, j, j), parts, strict=True):
            into.index_add_(0, index, part)
    dq = sums[0].view(-1, groups, heads // groups, rows, q.shape[3]).permute(0, 3, 1, 2, 4)
    found = (dq.reshape(q.shape), *(t.transpose(1, 2).reshape(kv[0].shape) for t in sums[1:]))
    return [t[:, :total].to(g.dtype).contiguous() for t in found]


def query_tiles(t: Tensor, rows: int, groups: int) -> Tensor:
    """(1,N,H,K) -> (N/rows, G, H/G * rows, K): the queries of one tile that share a key head, together."""
    t = t.reshape(-1, rows, groups, t.shape[2] // groups, t.shape[3])
    return t.permute(0, 2, 3, 1, 4).flatten(2, 3).contiguous()


def touching(low: Tensor, high: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Pairs (i, j), low[i] <= j <= high[i], as two lists as long as a multiple of `count`.

    What fills them up is the first queries with the last keys, which are padding.
    """
    i = torch.repeat_interleave(torch.arange(len(low)), high - low + 1)
    starts = torch.cumsum(high - low + 1, 0) - (high - low + 1)
    j = torch.arange(len(i)) - starts[i] + low[i]
    fill = -len(i) % count
    return F.pad(i, (0, fill)), F.pad(j, (0, fill), value=int(high[-1]))


def tile_gradients(block: list[Tensor], keys: list[Tensor]) -> tuple[Tensor, ...]:
    """block_gradients in float32, of tiles that bring their positions and the first that they may see."""
    (*rows, at, first), (k, v, place) = block, keys
    found = block_gradients(rows, [k, v], (at >= place) & (place >= first))
    return tuple(wide(t) for t in found)


def attend_blocked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """sdpa by blocks up to 1,024 tokens; beyond, unrolling costs more compilation than it saves time."""
    return BlockedAttention.apply(q, k, v) if q.shape[1] <= 1024 else sdpa(q, k, v)


def attend_sdpa(kernels: tuple, q: Tensor, k: Tensor, v: Tensor, docs: Tensor | None, longest: int) -> Tensor:
    """Causal attention by kernels = (whole rows, segments); neither asks how long a segment gets."""
    rows, inside = kernels
    return rows(q, k, v) if docs is None else inside(q, k, v, docs)


def attend_flash(
    kernels: tuple, q: Tensor, k: Tensor, v: Tensor, docs: Tensor | None, longest: int
) -> Tensor:
    """FlashAttention 3 or 2 (Dao et al.), kernels = (dense, varlen); grouped key heads are not expanded."""
    dense, varlen = kernels
    if docs is None:
        out = dense(q, k, v, causal=True)
    else:
        cu = {"cu_seqlens_q": docs, "cu_seqlens_k": docs, "max_seqlen_q": longest, "max_seqlen_k": longest}
        out = varlen(q[0], k[0], v[0], **cu, causal=True)
    out = out[0] if type(out) is tuple else out  # early FA3 releases also return the log-sum-exp
    return out.view(q.shape)


def attend_torch(
    varlen: Callable, q: Tensor, k: Tensor, v: Tensor, docs: Tensor | None, longest: int
) -> Tensor:
    """torch.nn.attention.varlen, with its release's spelling of the options bound to it."""
    if docs is None:
        return sdpa(q, k, v)
    if "enable_gqa" not in varlen.keywords:  # before 2.12 it cannot group heads
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    return varlen(q[0], k[0], v[0], docs, docs, longest, longest)[None]


def ordered_tiles(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) bool -> for BlockMask, how many of each row, and their columns, those wanted first."""
    columns = torch.argsort(wanted.int(), dim=1, descending=True, stable=True)
    return wanted.sum(1).int()[None, None], columns.int()[None, None]


def document_mask(docs: Tensor, total: int, kind: type) -> object:
    """Causal attention inside documents as FlexAttention's BlockMask, which `kind` is.

    A query sees the keys from the first of its document to itself. Which tiles of 128 by 128 hold some of
    those, and which nothing else, follows from the boundaries: no (N,N) square is made, as
    create_block_mask does. Empty documents have no token.
    """
    at = torch.arange(total, dtype=docs.dtype, device=docs.device)
    first = docs[torch.searchsorted(docs, at, right=True) - 1]  # (N,): it never falls
    tile = torch.arange(-(-total // 128), device=docs.device)
    low = first[tile * 128] // 128
    clear = (first[(tile * 128 + 127).clamp(max=total - 1)] + 127) // 128  # whole in sight of the last query
    seen = (tile >= low[:, None]) & (tile <= tile[:, None])
    full = seen & (tile >= clear[:, None]) & (tile < tile[:, None]) & (tile[:, None] < total // 128)
    tiles, shape = (*ordered_tiles(seen & ~full), *ordered_tiles(full)), (total, total)
    return kind.from_kv_blocks(
        *tiles, BLOCK_SIZE=128, mask_mod=lambda b, h, i, j: (j <= i) & (j >= first[i]), seq_lengths=shape
    )


def attend_flex(kernels: tuple, q: Tensor, k: Tensor, v: Tensor, docs: Tensor | None, longest: int) -> Tensor:
    """FlexAttention (Dong et al., 2024), kernels = (flex_attention, BlockMask).

    Its generated CUDA kernel has not been run: tests run torch's plain form of it, on a CPU.
    """
    if docs is None:
        return sdpa(q, k, v)
    flex, kind = kernels
    mask = document_mask(docs, q.shape[1], kind)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return flex(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


ATTENTION_WANTS = {  # ATTENTION -> what there has to be
    "flash3": "a Hopper GPU, bfloat16 and the package flash_attn_interface",
    "flash2": "CUDA, bfloat16 and the package flash_attn",
    "varlen": "CUDA, bfloat16, DOC_PACKING=1 and torch >= 2.10",
    "flex": "CUDA, DOC_PACKING=1 and the package triton",
}


def no_attention(choice: str, where: object) -> UserError:
    return UserError(
        f"ATTENTION={choice} cannot run here, on {where}; it wants {ATTENTION_WANTS[choice]}; ATTENTION=auto "
        f"takes what there is"
    )


def pick_attention(
    device: torch.device, dtype: torch.dtype, compiling: bool,
    packing: bool = True, gpu: bool = False, choice: str = "auto",
) -> tuple[str, Callable]:  # fmt: skip
    """(name, function) of the fastest attention at hand: FA3, FA2, torch's varlen kernel, Flex, SDPA.

    All have one contract: q (B,N,H,K), k and v (B,N,G,K), docs, longest -> (B,N,H,K). Without packing no
    batch has segments, and no kernel for them is wanted; with `gpu` none for a CPU is. Raises UserError
    where `choice`, which is ATTENTION, cannot run here.
    """
    if not gpu and device.type != "cuda":
        return host_attention(device, compiling and dtype == torch.bfloat16, packing, choice)
    half, found = dtype != torch.float32, None
    if half:
        found = flash_attention(device, choice)
    if packing and not found:
        found = segment_attention(half, compiling, choice)
    if found:
        return found
    if choice not in {"auto", "sdpa"}:
        raise no_attention(choice, f"{device.type} in {dtype}")
    return "sdpa", functools.partial(attend_sdpa, (sdpa, attend_segments_ref if packing else None))


def flash_attention(device: torch.device, choice: str) -> tuple[str, Callable] | None:
    """FlashAttention 3 on a Hopper GPU, else 2, of what is installed and may be chosen."""
    if choice in {"auto", "flash3"}:
        with contextlib.suppress(ImportError):
            from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

            if torch.cuda.get_device_capability(device)[0] == 9:
                kernels = flash_attn_func, flash_attn_varlen_func
                return "flash-attn-3", functools.partial(attend_flash, kernels)
    if choice in {"auto", "flash2"}:
        with contextlib.suppress(ImportError):
            from flash_attn import flash_attn_func, flash_attn_varlen_func

            return "flash-attn-2", functools.partial(attend_flash, (flash_attn_func, flash_attn_varlen_func))
    return None


def segment_attention(half: bool, compiling: bool, choice: str) -> tuple[str, Callable] | None:
    """Torch's own kernels for documents, of those that may be chosen; Flex in float32 only when asked for."""
    if half and choice in {"auto", "varlen"}:
        with contextlib.suppress(ImportError):
            from torch.nn.attention.varlen import varlen_attn

            varlen = functools.partial(varlen_attn, **varlen_options(varlen_attn))
            return "torch-varlen", functools.partial(attend_torch, varlen)
    if choice == "flex" or (half and choice == "auto"):
        with contextlib.suppress(ImportError):
            import triton  # noqa: F401 -- what compiles it; torch does without
            from torch.nn.attention.flex_attention import BlockMask, flex_attention

            # uncompiled it makes all N * N scores; inside a compiled block it is compiled anyway
            flex = flex_attention if compiling else compiled_once(flex_attention)
            return "flex", functools.partial(attend_flex, (flex, BlockMask))
    return None


def host_attention(device: torch.device, blocked: bool, packing: bool, choice: str) -> tuple[str, Callable]:
    """Attention on a CPU; in float32 torch's backward is as good as ours by blocks. Raises UserError."""
    if not FOLDED and device.type == "meta":  # a forecast: flash kernels all keep the same five tensors
        inside = attend_segments_ref if packing else None
        return "forecast", functools.partial(attend_sdpa, (BlockedAttention.apply, inside))
    if choice not in {"auto", "sdpa"}:
        raise no_attention(choice, device)
    if FOLDED:  # on a CPU a built program runs for its proof alone, uncompiled unless told
        return "sdpa", functools.partial(attend_sdpa, (sdpa, wanted_operator(False, packing)))
    blocked = blocked and choice == "auto"
    kernels = (attend_blocked if blocked else sdpa, wanted_operator(blocked, packing))
    return "sdpa-blocked" if blocked else "sdpa", functools.partial(attend_sdpa, kernels)


def wanted_operator(tiled: bool, packing: bool) -> Callable | None:
    return segment_operator(tiled) if packing else None


def varlen_options(varlen: Callable) -> dict:
    """How this torch release spells `causal` and `grouped key heads` (2.10: is_causal; 2.12: both new)."""
    names = inspect.signature(varlen).parameters
    causal = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    return causal | ({"enable_gqa": True} if "enable_gqa" in names else {})


class Form(NamedTuple):
    """How logits bend: below which cap, along which curve."""

    cap: float
    curve: str = "tanh"  # or "poly", "algebraic"


def softcap(logits: Tensor, form: Form) -> Tensor:
    """float32 logits -> within -cap and cap, of slope 1 at zero.

    With s = logits / cap: cap tanh(s); record T74's polynomial, which reaches the cap at s = 1.69 and stays
    there (frontier 2.13); or cap s / sqrt(1 + s^2) (SKC notes 2.16), where 1e9 stands for all beyond.
    """
    s = logits / form.cap
    if form.curve == "poly":
        s = s.clamp(-2.0, 2.0)
        square = s * s
        return form.cap * (s * (1.0 + square * (square / 15.0 - 1.0 / 3.0))).clamp(-1.0, 1.0)
    if form.curve == "algebraic":
        s = s.clamp(-1e9, 1e9)
        return form.cap * (s * torch.rsqrt(1.0 + s * s))
    return form.cap * torch.tanh(s)


def softcap_slope(logits: Tensor, form: Form) -> Tensor:
    """The derivative of `softcap`, by formula."""
    s = logits / form.cap
    if form.curve == "poly":
        square = (s * s).clamp_max(4.0)
        inside = (s * (1.0 + square * (square / 15.0 - 1.0 / 3.0))).abs() <= 1.0
        return torch.where(inside, 1.0 + square * (square / 3.0 - 1.0), 0.0)
    if form.curve == "algebraic":
        return (1.0 + s.clamp(-1e9, 1e9).square()) ** -1.5
    return 1.0 - torch.tanh(s).square()


def final_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> Tensor:
    """hidden (N,E), weight (V,E), bias (V,) or None -> float32 logits (N,V), bent, then biased."""
    logits = softcap(wide(hidden @ weight.to(hidden.dtype).T), form)
    return logits if bias is None else logits + bias


def softcapped_nll_ref(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """hidden (N,D), weight (V,D), targets (N,) -> nats (N,): the meaning of every faster form."""
    logits = cap * torch.tanh(wide(hidden @ weight.to(hidden.dtype).T) / cap)
    return F.cross_entropy(logits, targets, reduction="none")


def formed_nll_ref(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, form: Form
) -> tuple[Tensor, Tensor]:
    """The same for logits of any form: nats (N,), and log-sum-exps (N,), which z-loss squares.

    A negative target counts for nothing in either, as in torch.
    """
    logits, known = final_logits(hidden, weight, bias, form), targets >= 0
    lse = torch.logsumexp(logits, 1)
    own = logits.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    return torch.where(known, lse - own, 0.0), torch.where(known, lse, 0.0)


def formed_slopes(
    logits: Tensor, targets: Tensor, bias: Tensor | None, by_nats: Tensor, by_lse: Tensor, form: Form
) -> tuple[Tensor, Tensor]:
    """logits (N,V) before the cap, gradients (N,) by nats and log-sum-exps -> by logits, by bent logits."""
    final = softcap(logits, form) if bias is None else softcap(logits, form) + bias
    by_nats, by_lse = (torch.where(targets >= 0, g, 0.0)[:, None] for g in (by_nats, by_lse))
    hit = torch.arange(logits.shape[1], device=targets.device) == targets[:, None]
    slopes = (by_nats + by_lse) * torch.softmax(final, 1) - by_nats * hit.to(final.dtype)
    return slopes * softcap_slope(logits, form), slopes


def softcapped_slopes_ref(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """logits (N,V) before the cap, targets (N,) -> nats (N,) and their slopes by the logits (N,V).

    cap * tanh(x/cap) = cap - 2 cap r with r = sigmoid(-2x/cap), and tanh' = 4 r (1 - r): one exponential less
    than by tanh and log-sum-exp, a tenth of the time on a CPU. A negative target counts for nothing, as in
    torch.
    """
    r = torch.sigmoid(wide(logits) * (-2.0 / cap))
    z, own, known = -2.0 * cap * r, targets.clamp_min(0)[:, None], targets[:, None] >= 0
    top = 0.0 if cap <= 40.0 else z.amax(1, keepdim=True)  # exp(-80) is a normal float32
    e = torch.exp(z - top)
    total = e.sum(1, keepdim=True)
    nll = torch.where(known, torch.log(total) + top - z.gather(1, own), 0.0)[:, 0]
    hit = torch.arange(logits.shape[1], device=targets.device) == targets[:, None]
    p = e * total.reciprocal().masked_fill(~known, 0.0)
    return nll, (p - hit.to(z.dtype)) * (4.0 * r * (1.0 - r))


def softcapped_nll_and_grads(
    hidden: Tensor, weight: Tensor, targets: Tensor, cap: float
) -> tuple[Tensor, ...]:
    """Nats (N,), their gradients by hidden (N,D), and the sum of their gradients by weight (V,D).

    The logits die with the call.
    """
    nll, slopes = softcapped_slopes_ref(hidden @ weight.T, targets, cap)
    slopes = slopes.to(hidden.dtype)
    return nll, slopes @ weight, wide(slopes.T @ hidden)


def wide(t: Tensor) -> Tensor:
    """At least float32."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


@functools.cache
def compiled_once(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


def chunk_rows(rows: int, vocab: int, gpu: bool = False) -> int:
    """Rows whose float32 logits take about 8 MB: at V=1024 and 8192 the fastest of 1 to 16 MB on a CPU.

    On a GPU 1 GB: it has no cache to stay in, and a call for every 8 MB would keep it waiting.
    """
    return max(1, min(rows, (1 << (28 if gpu else 21)) // vocab))


class ChunkedNLL(torch.autograd.Function):
    """Linear layer, softcap and cross-entropy in one, never holding more than a chunk of logits.

    The gradients are made while the logits are at hand, for an incoming gradient of one; the mean of
    the nats asks for a constant one, so backward is a multiplication. Other gradients are exact too:
    rows scale one by one, and only the weight's gradient is made a second time.
    """

    @staticmethod
    def forward(
        ctx: object, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float, step: Callable
    ) -> Tensor:
        cast = weight.detach().to(hidden.dtype)
        rows = chunk_rows(len(hidden), len(weight), hidden.is_cuda)
        nll = hidden.new_empty(len(hidden), dtype=wide(hidden[:0]).dtype)
        by_hidden, by_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for at in range(0, len(hidden), rows):
            part = slice(at, at + rows)
            nll[part], by_hidden[part], more = step(hidden[part], cast, targets[part], cap)
            by_weight += more
        ctx.save_for_backward(by_hidden, by_weight, hidden, weight, targets)
        ctx.cap, ctx.step = cap, step
        return nll

    @staticmethod
    def backward(ctx: object, g: Tensor) -> tuple:
        by_hidden, by_weight, hidden, weight, targets = ctx.saved_tensors
        if g.stride() == (0,) or bool((g == g[0]).all()):
            by_weight = by_weight * g[0]
        else:
            by_weight = weighted_gradient(hidden, weight, targets, ctx.cap, g)
        return (by_hidden * g[:, None]).to(hidden.dtype), by_weight, None, None, None


def weighted_gradient(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float, g: Tensor) -> Tensor:
    """d sum(g * nats) / d weight, chunk by chunk, by plain autograd."""
    leaf = weight.detach().requires_grad_()
    rows = chunk_rows(len(hidden), len(weight), hidden.is_cuda)
    total = torch.zeros_like(weight)
    for at in range(0, len(hidden), rows):
        part = slice(at, at + rows)
        with torch.enable_grad():
            nll = softcapped_nll_ref(hidden[part].detach(), leaf, targets[part], cap)
        total += torch.autograd.grad(nll, leaf, g[part])[0]
    return total


def softcapped_nll(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float, fast: bool) -> Tensor:
    """hidden (N,D), weight (V,D), targets (N,) -> nats (N,) in float32; `fast` compiles the inner step."""
    pick = compiled_once if fast else (lambda f: f)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return ChunkedNLL.apply(hidden, weight, targets, cap, pick(softcapped_nll_and_grads))
    rows, cast = chunk_rows(len(hidden), len(weight), hidden.is_cuda), weight.detach().to(hidden.dtype)
    parts = [
        pick(softcapped_nll_ref)(hidden[at : at + rows], cast, targets[at : at + rows], cap)
        for at in range(0, len(hidden), rows)
    ]
    return torch.cat(parts)


def formed_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, g: tuple[Tensor, Tensor], form: Form
) -> tuple[Tensor, Tensor, Tensor]:
    """g (N,) by nats and by log-sum-exps -> by hidden (N,E), weight (V,E), bias (V,). No logits remain."""
    by_logits, by_final = formed_slopes(wide(hidden @ weight.T), targets, bias, *g, form)
    by_logits = by_logits.to(hidden.dtype)
    return by_logits @ weight, wide(by_logits.T @ hidden), by_final.sum(0)


class ChunkedForm(torch.autograd.Function):
    """formed_nll_ref without ever holding more than a chunk of logits, which backward makes a second time.

    Not in forward, as ChunkedNLL does: z-loss sends each row a gradient of its own, known only later.
    """

    @staticmethod
    def forward(
        ctx: object, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, how: tuple
    ) -> tuple[Tensor, Tensor]:
        form, fast = how
        ctx.form, ctx.pick = form, compiled_once if fast else (lambda f: f)
        ctx.save_for_backward(hidden, weight, targets, bias)
        cast, rows = weight.to(hidden.dtype), chunk_rows(len(hidden), len(weight), hidden.is_cuda)
        parts = [slice(at, at + rows) for at in range(0, len(hidden), rows)]
        found = [ctx.pick(formed_nll_ref)(hidden[p], cast, targets[p], bias, form) for p in parts]
        nll, lse = (torch.cat(both) for both in zip(*found, strict=True))
        return nll, lse

    @staticmethod
    def backward(ctx: object, by_nats: Tensor, by_lse: Tensor) -> tuple:
        hidden, weight, targets, bias = ctx.saved_tensors
        cast, rows = weight.to(hidden.dtype), chunk_rows(len(hidden), len(weight), hidden.is_cuda)
        by_hidden, by_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        by_bias = None if bias is None else torch.zeros_like(bias)
        for at in range(0, len(hidden), rows):
            p = slice(at, at + rows)
            g = by_nats[p].contiguous(), by_lse[p].contiguous()
            by_hidden[p], more, moved = ctx.pick(formed_gradients)(
                hidden[p], cast, targets[p], bias, g, ctx.form
            )
            by_weight += more
            if bias is not None:
                by_bias += moved
        return by_hidden, by_weight, None, by_bias, None


def formed_nll(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, form: Form, fast: bool
) -> tuple[Tensor, Tensor]:
    """formed_nll_ref by chunks; `fast` compiles what is done to each."""
    return ChunkedForm.apply(hidden, weight, targets, bias, (form, fast))


def tanh_alone(loss: Callable, cap: float) -> Callable:
    """A loss that knows nothing but the cap, in the place of one of any form; it tells no log-sum-exps."""
    return lambda hidden, weight, targets, bias=None: (loss(hidden, weight, targets, cap), None)


def has_triton() -> bool:
    try:
        import triton  # noqa: F401 -- is it there?
    except ImportError:
        return False
    return True


def runs_triton(t: Tensor) -> bool:
    """Whether operators launch their kernels for this tensor; elsewhere they run their plain twins."""
    return t.is_cuda


@functools.cache
def one_pass_kernel() -> Callable:
    """Softcapped cross-entropy by Triton, a program for each row of logits (N,V), which stays in registers.

    cap * tanh(x/cap) - cap = -2 cap r and tanh' = 4 r (1 - r), with r = 1 / (1 + exp(2x/cap)). Nothing
    exceeds zero, so no maximum is looked for first: nats and, in the place of the logits, their slopes come
    from one read of memory. FAST takes the hardware's tanh: two special functions a logit instead of three,
    and an error of up to 2^-11 in it.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def whole(  # noqa: ANN202, PLR0913
        logits, targets, nll, cols, cap, BLOCK: tl.constexpr, FAST: tl.constexpr  # noqa: ANN001
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        place = logits + row * cols + at
        target = tl.load(targets + row).to(tl.int32)
        x = tl.load(place, mask=at < cols, other=0.0).to(tl.float32)
        if FAST:
            bent = tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [x / cap], dtype=tl.float32, is_pure=True, pack=1
            )
            z = cap * bent - cap
        else:
            r = 1.0 / (1.0 + tl.exp(x * (2.0 / cap)))
            z = -2.0 * cap * r
        own = tl.sum(tl.where(at == target, z, 0.0), 0)
        p = tl.where(at < cols, tl.exp(z), 0.0)
        total = tl.sum(p, 0)
        tl.store(nll + row, tl.where(target < 0, 0.0, tl.log(total) - own))
        slope = p / total - (at == target).to(tl.float32)
        slope *= (1.0 - bent * bent) if FAST else 4.0 * r * (1.0 - r)
        slope = tl.where(target < 0, 0.0, slope)
        tl.store(place, slope.to(logits.dtype.element_ty), mask=at < cols)

    return whole


@functools.cache
def two_pass_kernels() -> tuple:
    """(scan, slopes): the same in two readings, as record 1855 does it, for rows of any length."""
    import triton
    import triton.language as tl

    @triton.jit
    def scan(logits, targets, nll, lse, cols, cap, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202, PLR0913
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + row).to(tl.int32)
        logits += row * cols
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, cols, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits + at, mask=at < cols, other=0.0).to(tl.float32)
            z = -2.0 * cap / (1.0 + tl.exp(x * (2.0 / cap)))
            sums += tl.where(at < cols, tl.exp(z), 0.0)
        total = tl.log(tl.sum(sums, 0))
        own = tl.load(logits + target, mask=target >= 0, other=0.0).to(tl.float32)
        z = -2.0 * cap / (1.0 + tl.exp(own * (2.0 / cap)))
        tl.store(lse + row, total)
        tl.store(nll + row, tl.where(target < 0, 0.0, total - z))

    @triton.jit
    def slopes(g, logits, targets, lse, out, cols, cap, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202, PLR0913
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + row).to(tl.int32)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row * cols + at, mask=at < cols, other=0.0).to(tl.float32)
        r = 1.0 / (1.0 + tl.exp(x * (2.0 / cap)))
        p = tl.exp(-2.0 * cap * r - tl.load(lse + row))
        slope = (p - (at == target).to(tl.float32)) * 4.0 * r * (1.0 - r) * tl.load(g + row)
        slope = tl.where(target < 0, 0.0, slope)
        tl.store(out + row * cols + at, slope.to(out.dtype.element_ty), mask=at < cols)

    return scan, slopes


@functools.cache
def one_pass_operator() -> Callable:
    """hidden (N,D), weight (V,D), targets (N,), cap, fast -> nats (N,) float32, and slopes by logits (N,V).

    Incoming gradients scale the hidden states and what comes out for them, (N,D), and not the slopes:
    whatever they are, the logits are read once and written once.
    """

    @torch.library.custom_op("golf::one_pass_nll", mutates_args=())
    def nll(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float, fast: bool) -> tuple[Tensor, Tensor]:
        logits = hidden @ weight.to(hidden.dtype).T
        if not runs_triton(hidden):
            found, slopes = softcapped_slopes_ref(logits, targets, cap)
            return found, slopes.to(hidden.dtype)
        (rows, cols), found = logits.shape, logits.new_empty(len(logits), dtype=torch.float32)
        block = 1 << (cols - 1).bit_length()
        warps = max(4, min(16, block // 1024))
        one_pass_kernel()[rows,](logits, targets, found, cols, cap, block, fast, num_warps=warps)
        return found, logits

    def keep(ctx: object, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:2], output[1])

    def differentiate(ctx: object, g: Tensor, _: Tensor) -> tuple:
        hidden, weight, slopes = ctx.saved_tensors
        by_hidden = ((slopes @ weight.to(hidden.dtype)) * g[:, None]).to(hidden.dtype)
        by_weight = slopes.T @ (hidden * g[:, None]).to(hidden.dtype)
        return by_hidden, by_weight.to(weight.dtype), None, None, None

    def shapes(hidden: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return wide(hidden.new_empty(len(hidden))), hidden.new_empty(len(hidden), len(weight))

    nll.register_fake(shapes)
    nll.register_autograd(differentiate, setup_context=keep)
    return nll


@functools.cache
def two_pass_operator() -> Callable:
    """(logits (N,V), targets (N,), cap) -> nats (N,) and log-sum-exps above the cap (N,), in float32."""

    @torch.library.custom_op("golf::two_pass_nll", mutates_args=())
    def nll(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
        if not runs_triton(logits):
            z = cap * torch.tanh(wide(logits) / cap)
            return softcapped_slopes_ref(logits, targets, cap)[0], torch.logsumexp(z, 1) - cap
        found, lse = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        two_pass_kernels()[0][len(logits),](logits, targets, found, lse, logits.shape[1], cap, 1024)
        return found, lse

    @torch.library.custom_op("golf::two_pass_nll_grad", mutates_args=())
    def grad(g: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, cap: float) -> Tensor:
        if not runs_triton(logits):
            return (softcapped_slopes_ref(logits, targets, cap)[1] * g[:, None]).to(logits.dtype)
        (rows, cols), out = logits.shape, torch.empty_like(logits)
        grid = rows, -(-cols // 1024)
        two_pass_kernels()[1][grid](g.contiguous(), logits, targets, lse, out, cols, cap, 1024)
        return out

    def keep(ctx: object, inputs: tuple, output: tuple) -> None:
        logits, targets, ctx.cap = inputs
        ctx.save_for_backward(logits, targets, output[1])

    def differentiate(ctx: object, g: Tensor, _: Tensor) -> tuple:
        return grad(g, *ctx.saved_tensors, ctx.cap), None, None

    nll.register_fake(lambda logits, *_: tuple(wide(logits.new_empty(len(logits))) for _ in range(2)))
    grad.register_fake(lambda g, logits, *_: torch.empty_like(logits))
    nll.register_autograd(differentiate, setup_context=keep)
    return nll


def one_pass_loss(fast: bool) -> Callable:
    """A function like softcapped_nll_ref, for gradients; bound once, as no compiler enters a cache."""
    one = one_pass_operator()
    return lambda hidden, weight, targets, cap: one(hidden, weight, targets, cap, fast)[0]


def two_pass_loss() -> Callable:
    two = two_pass_operator()
    return lambda hidden, weight, targets, cap: two(hidden @ weight.to(hidden.dtype).T, targets, cap)[0]


def fused_nll(
    operator: Callable, compiling: bool, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float
) -> Tensor:
    """softcapped_nll_ref by an operator; without gradients, as scores are made, softcapped_nll."""
    if not torch.is_grad_enabled():
        return softcapped_nll(hidden, weight, targets, cap, compiling)
    return operator(hidden, weight, targets, cap)


def pick_loss(cfg: Config, device: torch.device, compiling: bool) -> tuple[str, Callable]:
    """(name, function), as FUSED_CE_ENABLED asks and the form of the logits allows.

    The function takes hidden (N,E), weight (V,E), targets (N,) and perhaps a bias (V,), and gives nats (N,)
    and log-sum-exps (N,), or None in their place where no loss wants them.
    """
    if cfg.model.extras:
        return pick_formed_loss(cfg, compiling)
    cap = cfg.model.softcap
    if not cfg.compute.fused_ce:
        return "plain", tanh_alone(
            compiled_once(softcapped_nll_ref) if compiling else softcapped_nll_ref, cap
        )
    if cfg.fuses_ce and device.type == "cuda" and has_triton():
        if cfg.two_passes:
            return "two_pass", tanh_alone(functools.partial(fused_nll, two_pass_loss(), compiling), cap)
        fast = cfg.compute.ce_form == "approximate"
        name = "approximate" if fast else "one_pass"
        return name, tanh_alone(functools.partial(fused_nll, one_pass_loss(fast), compiling), cap)
    return "chunked", tanh_alone(functools.partial(softcapped_nll, fast=compiling), cap)


def pick_formed_loss(cfg: Config, compiling: bool) -> tuple[str, Callable]:
    """The same for logits that no Triton kernel knows; the name says what they have."""
    form = Form(cfg.model.softcap, cfg.model.curve)
    name = ("chunked" if cfg.compute.fused_ce else "plain") + cfg.model.extras
    if cfg.compute.fused_ce:
        return name, lambda h, w, t, bias=None: formed_nll(h, w, t, bias, form, compiling)
    plain = compiled_once(formed_nll_ref) if compiling else formed_nll_ref
    return name, lambda h, w, t, bias=None: plain(h, w, t, bias, form)


def loss_bytes(name: str, rows: int, vocab: int, item: int, gpu: bool) -> int:
    """Bytes of the logits (rows,V), and of what is made of them, while the loss that pick_loss named runs.

    `item` is the size of an activation's number. Plain: the logits and five float32 forms of them, and three
    more where the form is not tanh alone.
    """
    if name.startswith("chunked"):
        return (3 if name == "chunked" else 6) * 4 * chunk_rows(rows, vocab, gpu) * vocab
    if name.startswith("plain"):
        return (item + (20 if name == "plain" else 32)) * rows * vocab
    return (2 * item if name == "two_pass" else item) * rows * vocab


@functools.cache
def squared_kernels() -> tuple:
    """(by_tma, by_pointer): matrix products (R,K) x (C,K) -> (R,C) with a squared leaky ReLU at their end.

    Forward writes the product and the square of its leaky ReLU; BACK reads such a product and multiplies
    by the slope there (frontier 4.2). PROGRAMS stay and walk over tiles of M by N. by_tma takes descriptors
    for Hopper's copy engine, of `pre` and `out` half a tile wide; by_pointer runs on any GPU.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def by_tma(  # noqa: ANN202, PLR0913
        a, b, pre, out, rows, cols, inner, slope,  # noqa: ANN001
        BACK: tl.constexpr, PROGRAMS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    ):  # fmt: skip
        across = tl.cdiv(cols, N)
        for tile in tl.range(tl.program_id(0), tl.cdiv(rows, M) * across, PROGRAMS):
            m, n = tile // across * M, tile % across * N
            acc = tl.zeros((M, N), tl.float32)
            for k in range(0, inner, K):
                acc = tl.dot(a.load([m, k]), b.load([n, k]).T, acc)
            halves = tl.split(tl.permute(tl.reshape(acc, (M, 2, N // 2)), (0, 2, 1)))
            for half in tl.static_range(2):
                at = n + half * (N // 2)
                if BACK:
                    x = pre.load([m, at]).to(tl.float32)
                    out.store(
                        [m, at], (2.0 * halves[half] * tl.where(x > 0, x, slope * slope * x)).to(out.dtype)
                    )
                else:
                    half_tile = halves[half].to(pre.dtype)
                    pre.store([m, at], half_tile)
                    x = half_tile.to(tl.float32)
                    y = tl.where(x > 0, x, slope * x)
                    out.store([m, at], (y * y).to(out.dtype))

    @triton.jit
    def by_pointer(  # noqa: ANN202, PLR0913
        a, b, pre, out, rows, cols, inner, slope,  # noqa: ANN001
        BACK: tl.constexpr, PROGRAMS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    ):  # fmt: skip
        across = tl.cdiv(cols, N)
        for tile in tl.range(tl.program_id(0), tl.cdiv(rows, M) * across, PROGRAMS):
            i = tile // across * M + tl.arange(0, M)[:, None]
            j = tile % across * N + tl.arange(0, N)[None, :]
            acc = tl.zeros((M, N), tl.float32)
            for k in range(0, inner, K):
                c = k + tl.arange(0, K)
                left = a + i.to(tl.int64) * inner + c[None, :]
                right = b + j.to(tl.int64) * inner + c[:, None]
                left = tl.load(left, mask=(i < rows) & (c < inner)[None, :], other=0.0)
                acc = tl.dot(left, tl.load(right, mask=(j < cols) & (c < inner)[:, None], other=0.0), acc)
            here = (i < rows) & (j < cols)
            place = i.to(tl.int64) * cols + j
            if BACK:
                x = tl.load(pre + place, mask=here, other=0.0).to(tl.float32)
                y = 2.0 * acc * tl.where(x > 0, x, slope * slope * x)
                tl.store(out + place, y.to(out.dtype.element_ty), mask=here)
            else:
                tl.store(pre + place, acc.to(pre.dtype.element_ty), mask=here)
                x = acc.to(pre.dtype.element_ty).to(tl.float32)
                y = tl.where(x > 0, x, slope * x)
                tl.store(out + place, (y * y).to(out.dtype.element_ty), mask=here)

    return by_tma, by_pointer


TMA_TILE = 128, 256, 64  # M, N, K of record 1886; 4 stages forward and 3 back fill 224 of Hopper's 227 KB


def squared_product(a: Tensor, b: Tensor, pre: Tensor, slope: float, back: bool) -> Tensor:
    """Launch on contiguous a (R,K), b (C,K), pre (R,C), which forward fills; returns (R,C)."""
    (rows, inner), cols, out = a.shape, b.shape[0], torch.empty_like(pre)
    tensors, sizes = (a, b, pre, out), (rows, cols, inner, slope, back)
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 2
    if takes_descriptors(a, b):
        (m, n, k), stages = TMA_TILE, 3 if back else 4
        views = descriptors(tensors, ([m, k], [n, k], [m, n // 2], [m, n // 2]))
        squared_kernels()[0][programs,](*views, *sizes, programs, m, n, k, num_warps=8, num_stages=stages)
    else:
        tile = (128, 128, 32) if a.is_cuda else (32, 32, 32)
        squared_kernels()[1][programs,](*tensors, *sizes, programs, *tile, num_warps=8, num_stages=3)
    return out


def takes_descriptors(a: Tensor, b: Tensor) -> bool:
    """Hopper or later, and rows that begin at multiples of 16 bytes."""
    hopper = a.is_cuda and torch.cuda.get_device_capability(a.device)[0] >= 9
    return hopper and a.dtype == torch.bfloat16 and a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0


def descriptors(tensors: tuple[Tensor, ...], blocks: tuple[list[int], ...]) -> list:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return [TensorDescriptor.from_tensor(t, block) for t, block in zip(tensors, blocks, strict=True)]


def squared_mlp_ref(x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """x (N,D), up (H,D), down (D,H) of one dtype -> leaky_relu(x up^T)^2 down^T (N,D)."""
    return F.leaky_relu(x @ up.T, slope).square() @ down.T


@functools.cache
def squared_operator() -> Callable:
    """squared_mlp_ref by the Triton kernels: either way the activation costs no trip to memory of its own.

    Returns what it gives, and for its backward x up^T and its squared leaky ReLU, (N,H) each.
    """

    @torch.library.custom_op("golf::squared_mlp", mutates_args=())
    def mlp(x: Tensor, up: Tensor, down: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
        if runs_triton(x):
            pre = x.new_empty(len(x), len(up))
            post = squared_product(x.contiguous(), up.contiguous(), pre, slope, False)
        else:
            pre = x @ up.T
            post = F.leaky_relu(pre, slope).square()
        return post @ down.T, pre, post

    @torch.library.custom_op("golf::squared_mlp_grad", mutates_args=())
    def grad(g: Tensor, down: Tensor, pre: Tensor, slope: float) -> Tensor:
        if runs_triton(g):
            return squared_product(g.contiguous(), down.T.contiguous(), pre, slope, True)
        return (g @ down) * 2.0 * torch.where(pre > 0, pre, slope * slope * pre)

    def keep(ctx: object, inputs: tuple, output: tuple) -> None:
        ctx.slope = inputs[3]
        ctx.save_for_backward(*inputs[:3], *output[1:])

    def differentiate(ctx: object, g: Tensor, *_: Tensor) -> tuple:
        x, up, down, pre, post = ctx.saved_tensors
        by_pre = grad(g, down, pre, ctx.slope)
        return by_pre @ up, by_pre.T @ x, g.T @ post, None

    def shapes(x: Tensor, up: Tensor, down: Tensor, _: float) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(x.new_empty(len(x), n) for n in (len(down), len(up), len(up)))

    mlp.register_fake(shapes)
    grad.register_fake(lambda g, down, pre, _: torch.empty_like(pre))
    mlp.register_autograd(differentiate, setup_context=keep)
    return mlp


def squared_mlp() -> Callable:
    """A function like squared_mlp_ref; bound once, as no compiler enters a cache."""
    mlp = squared_operator()
    return lambda x, up, down, slope: mlp(x, up, down, slope)[0]


def grouped_ref(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """x (N,K), w (E,R,K), ends (E,) ascending to N -> (N,R): rows of x before ends[e], and not before
    ends[e-1], times w[e]^T."""
    edges = itertools.pairwise([0, *ends.tolist()])
    return torch.cat([x[a:b] @ matrix.T for (a, b), matrix in zip(edges, w, strict=True)])


def grouped_weight_grad_ref(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """g (N,R), x (N,K) -> (E,R,K): the gradient of w, zeros where a group is empty."""
    return torch.stack([g[a:b].T @ x[a:b] for a, b in itertools.pairwise([0, *ends.tolist()])])


def grouped_weight_grad(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The same by torch's grouped product, whose empty groups are not relied upon."""
    taken = ends.diff(prepend=ends.new_zeros(1)) > 0
    return torch._grouped_mm(g.T, x, ends).masked_fill(~taken[:, None, None], 0.0)


def groups_at_once(x: Tensor, w: Tensor) -> bool:
    """Whether torch's grouped product takes these: bfloat16 on Hopper or later, rows of whole 16 bytes."""
    hopper = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    return hopper and x.dtype == torch.bfloat16 and all(n % 8 == 0 for n in w.shape[1:])


@functools.cache
def grouped_operator() -> Callable:
    """grouped_ref as one opaque operator, whose groups may have any size inside a compiled block.

    A host reads `ends` for its slices; on a GPU torch multiplies all groups in one kernel, where it can.
    """

    @torch.library.custom_op("golf::grouped", mutates_args=())
    def product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x, w.mT, ends) if groups_at_once(x, w) else grouped_ref(x, w, ends)

    @torch.library.custom_op("golf::grouped_grad", mutates_args=())
    def grads(g: Tensor, x: Tensor, w: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        g = g.contiguous()  # a gradient may be expanded
        if groups_at_once(x, w):
            return torch._grouped_mm(g, w, ends), grouped_weight_grad(g, x, ends)
        return grouped_ref(g, w.mT, ends), grouped_weight_grad_ref(g, x, ends)

    def keep(ctx: object, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def differentiate(ctx: object, g: Tensor) -> tuple:
        return *grads(g, *ctx.saved_tensors), None

    product.register_fake(lambda x, w, ends: x.new_empty(len(x), w.shape[1]))
    grads.register_fake(lambda g, x, w, ends: (x.new_empty(x.shape), w.new_empty(w.shape)))
    product.register_autograd(differentiate, setup_context=keep)
    return lambda x, w, ends: product(x, w, ends)  # an operator cannot be copied with its module


class Reorder(torch.autograd.Function):
    """Rows by a permutation; backward by its inverse, where indexing would add rows up in any order."""

    @staticmethod
    def forward(ctx: object, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: object, g: Tensor) -> tuple[Tensor, None, None]:
        return g[ctx.saved_tensors[0]], None, None


# ======================================================================================
# 8. Storage -- how a tensor ships: decode(encode(w)) equals fake_quant(w), bit for bit
# uses: Config
# ======================================================================================


class Plane(NamedTuple):
    """What one stream holds of one tensor: a matrix of integers low..high, or of float16 (low == high)."""

    rows: int
    cols: int
    low: int = 0
    high: int = 0

    @property
    def dtype(self) -> np.dtype:
        """Integers that need more than a byte take two."""
        if self.low == self.high:
            return np.dtype("<f2")
        return np.dtype("|i1" if self.low >= -128 and self.high < 128 else "<i2")

    @property
    def count(self) -> int:
        return self.rows * self.cols


Streams = dict[str, np.ndarray]  # what a codec makes of one tensor: stream name -> values, row by row
Shape = tuple[int, ...]


def as_rows_of(w: Tensor) -> Tensor:
    """(..., C) -> (R,C) in float32, without gradient; a vector is one row, experts stand below each other."""
    return w.detach().float().reshape(-1, w.shape[-1])


def row_shape(shape: Shape) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1]


def stream(values: Tensor, dtype: torch.dtype = torch.int8) -> np.ndarray:
    return values.to(dtype).flatten().cpu().numpy()


def unstream(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.copy()).float()


@dataclass(frozen=True)
class Half:
    """float16, for gains, scales and whatever is too small to be worth more thought."""

    name: ClassVar[str] = "half"

    def fake_quant(self, w: Tensor, grid: Tensor | None = None) -> Tensor:
        return through(w, w.detach().half().to(w.dtype))

    def encode(self, w: Tensor, hessian: Tensor | None = None, grid: Tensor | None = None) -> Streams:
        return {"half": stream(w.detach(), torch.half)}

    def decode(self, streams: Streams, shape: Shape) -> Tensor:
        return unstream(streams["half"]).view(shape)

    def planes(self, shape: Shape) -> dict[str, Plane]:
        """Stream name -> its form, which is all that decoding has to know."""
        return {"half": Plane(*row_shape(shape))}

    def bits(self, shape: Shape) -> float:
        """Expected size after compression: float16 noise loses 11 % to brotli (measured on gains)."""
        return 14.3 * math.prod(shape)


@dataclass(frozen=True)
class IntRow:
    """Symmetric integers with one float16 step per row: round to nearest, or GPTQ where a Hessian is given.

    step = clip / top, top = 2^(bits-1) - 1. clip = sigmas * the row's standard deviation (SDClip; frontier
    records), or with sigmas 0 a percentile of |w| in the row (naive baseline). Rows are all dimensions
    but the last; a vector is one row.
    """

    bits_each: int
    sigmas: float = 0.0
    percentile: float = 100.0
    floor: float = 0.0

    @property
    def name(self) -> str:
        return f"int{self.bits_each}"

    @property
    def top(self) -> int:
        return 2 ** (self.bits_each - 1) - 1

    def step(self, rows: Tensor) -> Tensor:
        """(R,C) -> (R,1), as the artifact holds it. A row of zeros has step 1."""
        clip = rows.abs().amax(1, keepdim=True)
        if self.sigmas > 0 and rows.shape[1] > 1:
            # at least a sixteenth: a row that hardly varies about its mean would be clipped to nothing
            clip = torch.maximum(self.sigmas * rows.std(1, keepdim=True), clip / 16)
        elif self.percentile < 100.0:
            clip = torch.quantile(rows.abs(), self.percentile / 100.0, dim=1, keepdim=True)
        step = (clip / self.top).clamp_min(self.floor).half().float()
        return torch.where(step > 0, step, torch.ones_like(step))  # float16 may underflow (frontier trap 32)

    def fake_quant(self, w: Tensor, grid: Tensor | None = None) -> Tensor:
        rows = as_rows_of(w)
        step = self.step(rows)
        return through(w, (nearest(rows / step, self.top) * step).view(w.shape).to(w.dtype))

    def encode(self, w: Tensor, hessian: Tensor | None = None, grid: Tensor | None = None) -> Streams:
        rows = as_rows_of(w)
        step = self.step(rows)
        q = nearest(rows / step, self.top) if hessian is None else gptq(rows, step, self.top, hessian)
        return {f"{self.name}.q": stream(q), "step": stream(step, torch.half)}

    def decode(self, streams: Streams, shape: Shape) -> Tensor:
        step = unstream(streams["step"])[:, None]
        return (unstream(streams[f"{self.name}.q"]).view(len(step), -1) * step).view(shape)

    def planes(self, shape: Shape) -> dict[str, Plane]:
        rows, cols = row_shape(shape)
        return {f"{self.name}.q": Plane(rows, cols, -self.top, self.top), "step": Plane(rows, 1)}

    def bits(self, shape: Shape) -> float:
        """Expected size: the entropy of a Gaussian in steps of clip / top, and the steps themselves.

        h = log2(sigma / step * sqrt(2 pi e)) (frontier 6.3 agrees to 0.01 bit). Without sigmas the clip
        is the maximum of a row, of C Gaussians about sqrt(2 ln C) sigma.
        """
        rows, cols = row_shape(shape)
        sigmas = self.sigmas or math.sqrt(2 * math.log(max(cols, 2)))
        each = max(math.log2(self.top / sigmas * math.sqrt(2 * math.pi * math.e)), 0.1)
        return min(each, self.bits_each) * rows * cols + 14.3 * rows


def nearest(x: Tensor, top: float) -> Tensor:
    """Round to the nearest integer within +-top; none is minus zero, which no integer stream can hold."""
    return x.round().clamp(-top, top) + 0.0


def gptq(rows: Tensor, step: Tensor, top: int, hessian: Tensor) -> Tensor:
    """(R,C) weights, (R,1) steps, (C,C) sum of x x' -> integers (R,C) with least error of x w'.

    Each column's rounding error is spread over the columns still to be rounded (Frantar et al., 2022),
    the most active column first, 128 columns at a time; damping 1 % of the mean activity; a column
    that never saw an input becomes zero (frontier 6.3).
    """
    h, w = hessian.double(), rows.clone()
    dead = h.diagonal() == 0
    h[dead, dead], w[:, dead] = 1.0, 0.0
    h.diagonal().add_(0.01 * h.diagonal().mean())
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    w, h = w[:, order], h[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    q = torch.empty_like(w)
    for a in range(0, w.shape[1], 128):
        block, own = w[:, a : a + 128].clone(), upper[a : a + 128, a : a + 128]
        errors = torch.empty_like(block)
        for j in range(block.shape[1]):
            q[:, a + j] = nearest(block[:, j : j + 1] / step, top)[:, 0]
            errors[:, j] = (block[:, j] - q[:, a + j] * step[:, 0]) / own[j, j]
            block[:, j + 1 :] -= errors[:, j : j + 1] * own[j, j + 1 :]
        w[:, a + 128 :] -= errors @ upper[a : a + 128, a + 128 :]
    return q[:, torch.argsort(order)]


@dataclass(frozen=True)
class LowRank:
    """Integers plus a low-rank correction of their error, A B with A (R,r), B (r,C) (LQER; record 1855).

    group > 0: A in two bits with one scale, B in four bits with a scale for each `group` entries.
    group = 0: both in `factor_bits`, with a scale for each row. Decoded only: no training through it.
    """

    base: IntRow
    rank: int
    group: int
    factor_bits: int

    @property
    def name(self) -> str:
        return f"{self.base.name}+lqer{self.rank}g{self.group}b{self.factor_bits}"

    def fake_quant(self, w: Tensor, grid: Tensor | None = None) -> Tensor:
        return self.base.fake_quant(w)

    def encode(self, w: Tensor, hessian: Tensor | None = None, grid: Tensor | None = None) -> Streams:
        base = self.base.encode(w, hessian)
        error = as_rows_of(w).cpu() - self.base.decode(base, tuple(w.shape)).view(row_shape(w.shape))
        left, size, right = torch.linalg.svd(error, full_matrices=False)
        a, b = left[:, : self.rank] * size[: self.rank], right[: self.rank]
        return base | self.factor_streams((a, b), tuple(w.shape))

    def factor_streams(self, factors: tuple[Tensor, Tensor], shape: Shape) -> Streams:
        found = {}
        for factor, (key, low, high, cols) in zip(factors, self.forms(shape), strict=True):
            parts = factor.reshape(-1, cols)
            scale = (parts.abs().amax(1, keepdim=True) / min(-low, high + 0.5)).half().float()
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            found[key] = stream((parts / scale).round().clamp(low, high) + 0.0)
            found[f"{key}.scale"] = stream(scale, torch.half)
        return found

    def forms(self, shape: Shape) -> list[tuple[str, int, int, int]]:
        """(stream, least and greatest integer, entries to a scale) of A and of B."""
        (rows, cols), rank = row_shape(shape), self.rank_of(shape)
        if self.group and rank * cols % self.group == 0:
            return [("lqer.a2", -2, 1, rows * rank), ("lqer.b4", -8, 7, self.group)]
        top = 2 ** (self.factor_bits - 1) - 1
        return [("lqer.a", -top, top, rank), ("lqer.b", -top, top, cols)]

    def rank_of(self, shape: Shape) -> int:
        return min(self.rank, *row_shape(shape))

    def decode(self, streams: Streams, shape: Shape) -> Tensor:
        (rows, cols), rank = row_shape(shape), self.rank_of(shape)
        left, right = (
            unstream(streams[key]).view(-1, each) * unstream(streams[f"{key}.scale"])[:, None]
            for key, _, _, each in self.forms(shape)
        )
        return self.base.decode(streams, shape) + (left.view(rows, rank) @ right.view(rank, cols)).view(shape)

    def planes(self, shape: Shape) -> dict[str, Plane]:
        rank, found = self.rank_of(shape), self.base.planes(shape)
        for (key, low, high, each), size in zip(self.forms(shape), row_shape(shape), strict=True):
            count = rank * size // each
            found |= {key: Plane(count, each, low, high), f"{key}.scale": Plane(count, 1)}
        return found

    def bits(self, shape: Shape) -> float:
        return self.base.bits(shape) + 4.0 * self.rank_of(shape) * sum(row_shape(shape))


@dataclass(frozen=True)
class Ternary:
    """-1, 0 or 1 times a scale per group of columns (BitNet b1.58; SKC notes 2.1 and 4.2).

    scale = mean |w| of the group's own entries, rounded to float16, then at least 2^-14; an entry of half
    the scale or more is not zero. With log_step > 0 the scale that ships is a power of 1 + log_step,
    stored as the row's mean exponent and what differs from it: about 5 bits instead of 11. A grid (2,)
    holds other numbers than the half and 1, by which the scale is multiplied before it ships, for the
    whole tensor (SKC notes 2.1); trits and scales are all that decoding needs. Rotated groups are turned
    by a Hadamard matrix first and back after decoding (2.3); their filling is turned with them and ships.
    """

    group: int = 128
    log_step: float = 0.0
    rotated: bool = False

    @property
    def name(self) -> str:
        log = f"log{self.log_step}" if self.log_step else ""
        return f"ternary{self.group}{'rotated' if self.rotated else ''}{log}"

    def grouped(self, shape: Shape) -> tuple[int, int, int]:
        """(R,G,g): rows, groups of a row, entries of a group; the last may be shorter."""
        rows, cols = row_shape(shape)
        return rows, -(-cols // self.group), self.group

    def trits(self, shape: Shape) -> int:
        """Of a row, as many as ship."""
        return math.prod(self.grouped(shape)[1:]) if self.rotated else shape[-1]

    def groups(self, rows: Tensor) -> Tensor:
        """(R,C) -> (R,G,g), the last group filled with zeros."""
        return F.pad(rows, (0, -rows.shape[1] % self.group)).view(len(rows), -1, self.group)

    def parts(
        self, rows: Tensor, grid: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(R,C) -> trits (R,G,g) and scales (R,G), which a power of 1 + log_step may still replace."""
        z = hadamard(self.groups(rows)) if self.rotated else self.groups(rows)
        real = self.group if self.rotated else self.groups(torch.ones_like(rows[:1])).sum(2)  # no filling
        scale = (z.abs().sum(2) / real).half().float().clamp_min(2.0**-14)
        z = z if noise is None else z + noise * scale[..., None]
        least = 0.5 if grid is None else grid[0]
        q = torch.where(z.abs() / scale[..., None] >= least, z.sign(), 0.0) + 0.0
        return q, scale if grid is None else (scale * grid[1]).half().float().clamp_min(2.0**-14)

    def exponents(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(R,G) -> the row's mean exponent (R,1), and each group's difference from it, a byte; all finite."""
        power = torch.log2(scale.double().clamp_max(65504.0)) / math.log2(1 + self.log_step)
        mean = power.mean(1, keepdim=True).round()
        return mean, (power.round() - mean).clamp(-127, 127)

    def power(self, exponent: Tensor) -> Tensor:
        """In float64, so that any machine's exp2 gives the same float32."""
        return torch.exp2(exponent.double() * math.log2(1 + self.log_step)).float()

    def shipped(self, scale: Tensor) -> Tensor:
        return self.power(sum(self.exponents(scale))) if self.log_step else scale

    def joined(self, q: Tensor, scale: Tensor, cols: int) -> Tensor:
        """Trits (R,G,g) and scales (R,G) -> weights (R,C)."""
        z = q * scale[..., None]
        return (hadamard(z) if self.rotated else z).flatten(1)[:, :cols]

    def fake_quant(self, w: Tensor, grid: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """`noise` (R,G,g) moves entries by so many scales before they are rounded, outside the gradient."""
        rows = as_rows_of(w)
        q, scale = self.parts(rows, grid, noise)
        quantised = self.joined(q, self.shipped(scale), rows.shape[1])
        return through(w, quantised.reshape(w.shape).to(w.dtype))

    def encode(self, w: Tensor, hessian: Tensor | None = None, grid: Tensor | None = None) -> Streams:
        q, scale = self.parts(as_rows_of(w), grid)
        trits = {"ternary.q": stream(q.flatten(1)[:, : self.trits(tuple(w.shape))])}
        if not self.log_step:
            return trits | {"ternary.scale": stream(scale, torch.half)}
        mean, rest = self.exponents(scale)
        return trits | {"ternary.mean": stream(mean, torch.int16), "ternary.rest": stream(rest)}

    def decode(self, streams: Streams, shape: Shape) -> Tensor:
        rows, cols = row_shape(shape)
        q = self.groups(unstream(streams["ternary.q"]).view(rows, -1))
        if self.log_step:
            mean = unstream(streams["ternary.mean"])[:, None]
            scale = self.power(mean + unstream(streams["ternary.rest"]).view(rows, -1))
        else:
            scale = unstream(streams["ternary.scale"]).view(rows, -1)
        return self.joined(q, scale, cols).reshape(shape)

    def planes(self, shape: Shape) -> dict[str, Plane]:
        rows, groups, _ = self.grouped(shape)
        trits = {"ternary.q": Plane(rows, self.trits(shape), -1, 1)}
        if not self.log_step:
            return trits | {"ternary.scale": Plane(rows, groups)}
        mean, rest = Plane(rows, 1, -(2**15), 2**15 - 1), Plane(rows, groups, -127, 127)
        return trits | {"ternary.mean": mean, "ternary.rest": rest}

    def bits(self, shape: Shape) -> float:
        """Expected size: a third of the trits are zeros, full entropy, of which rows and columns that differ
        take up to 1 % (bench/ternary_record.md, artifact.md); there a scale took 9.5 to 10.4 or 4.4 bits."""
        rows, groups, _ = self.grouped(shape)
        return 1.58 * rows * self.trits(shape) + (4.5 if self.log_step else 10.4) * rows * groups


def hadamard(z: Tensor) -> Tensor:
    """(...,g) -> z H / sqrt(g), H Sylvester's Hadamard matrix, g a power of two; its own inverse.

    Sums and differences of pairs at distance 1, 2, 4, ..., which round alike on any device, then one factor.
    """
    size, apart = z.shape[-1], 1
    while apart < size:
        a, b = z.unflatten(-1, (-1, 2, apart)).unbind(-2)
        z = torch.stack([a + b, a - b], -2).flatten(-3)
        apart *= 2
    return z * size**-0.5


def row_scale(rows: Tensor) -> Tensor:
    """(R,C) -> (R,1): the greatest |w| as float16 stores it, never 0 (SKC notes 2.2)."""
    return rows.abs().amax(1, keepdim=True).clamp_min(1e-8).half().float().clamp_min(2.0**-24)


@dataclass(frozen=True)
class Fp8:
    """float8 e4m3 of w / (a / 448), with the greatest |w| of each row, a, in float16 (SKC notes 2.2)."""

    name: ClassVar[str] = "fp8"

    def cast(self, rows: Tensor, a: Tensor) -> Tensor:
        """Clamped first: whether an overflowing cast saturates depends on the torch release."""
        return (rows / (a / 448.0)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)

    def fake_quant(self, w: Tensor, grid: Tensor | None = None) -> Tensor:
        rows = as_rows_of(w)
        a = row_scale(rows)
        return through(w, (self.cast(rows, a).float() * (a / 448.0)).view(w.shape).to(w.dtype))

    def encode(self, w: Tensor, hessian: Tensor | None = None, grid: Tensor | None = None) -> Streams:
        rows = as_rows_of(w)
        a = row_scale(rows)
        q = self.cast(rows, a).view(torch.int8)
        return {"fp8.q": stream(q), "row": stream(a, torch.half)}

    def decode(self, streams: Streams, shape: Shape) -> Tensor:
        a = unstream(streams["row"])[:, None]
        q = torch.from_numpy(streams["fp8.q"].copy()).view(torch.float8_e4m3fn).float()
        return (q.view(len(a), -1) * (a / 448.0)).view(shape)

    def planes(self, shape: Shape) -> dict[str, Plane]:
        rows, cols = row_shape(shape)
        return {"fp8.q": Plane(rows, cols, -128, 127), "row": Plane(rows, 1)}

    def bits(self, shape: Shape) -> float:
        """Expected size: 5.3 to 6.2 of the 8 bits are entropy (performance notes 4, bench/ternary_record)."""
        return 6.0 * math.prod(shape) + 14.3 * row_shape(shape)[0]


@dataclass(frozen=True)
class Fp4:
    """Four-bit integers -7..7 in units of a / 7, with the greatest |w| of each row, a, in float16.

    Called fp4 where it was published; the grid is uniform (SKC notes 2.2).
    """

    name: ClassVar[str] = "fp4"

    def fake_quant(self, w: Tensor, grid: Tensor | None = None) -> Tensor:
        rows = as_rows_of(w)
        step = row_scale(rows) / 7.0
        return through(w, (nearest(rows / step, 7) * step).view(w.shape).to(w.dtype))

    def encode(self, w: Tensor, hessian: Tensor | None = None, grid: Tensor | None = None) -> Streams:
        rows = as_rows_of(w)
        a = row_scale(rows)
        return {"fp4.q": stream(nearest(rows / (a / 7.0), 7)), "row": stream(a, torch.half)}

    def decode(self, streams: Streams, shape: Shape) -> Tensor:
        step = unstream(streams["row"])[:, None] / 7.0
        return (unstream(streams["fp4.q"]).view(len(step), -1) * step).view(shape)

    def planes(self, shape: Shape) -> dict[str, Plane]:
        rows, cols = row_shape(shape)
        return {"fp4.q": Plane(rows, cols, -7, 7), "row": Plane(rows, 1)}

    def bits(self, shape: Shape) -> float:
        return 3.4 * math.prod(shape) + 14.3 * row_shape(shape)[0]


@dataclass(frozen=True)
class Absent:
    """No bytes at all, for what only training needs; the loaded model has zeros there."""

    name: ClassVar[str] = "none"

    def fake_quant(self, w: Tensor, grid: Tensor | None = None) -> Tensor:
        return torch.zeros_like(w)

    def encode(self, w: Tensor, hessian: Tensor | None = None, grid: Tensor | None = None) -> Streams:
        return {}

    def decode(self, streams: Streams, shape: Shape) -> Tensor:
        return torch.zeros(shape)

    def planes(self, shape: Shape) -> dict[str, Plane]:
        return {}

    def bits(self, shape: Shape) -> float:
        return 0.0


Codec = Half | IntRow | LowRank | Ternary | Fp8 | Fp4 | Absent


def through(w: Tensor, quantised: Tensor) -> Tensor:
    """Straight-through: the value of the quantised weight exactly, the gradient of the weight."""
    return quantised if not w.requires_grad else StraightThrough.apply(w, quantised)


class StraightThrough(torch.autograd.Function):
    """w + (q - w) rounds; this returns q itself, so training sees the very bits that ship."""

    @staticmethod
    def forward(ctx: object, w: Tensor, quantised: Tensor) -> Tensor:
        return quantised.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> tuple[Tensor, None]:
        return g, None


@dataclass(frozen=True)
class Tag:
    """What the optimizer and the artifact need to know of a parameter, declared where it is made.

    Tags live on modules (`module.tags = {"weight": Tag(...)}`): attributes of an nn.Parameter are
    lost by deepcopy. Compare codecs by value, never by identity.
    """

    codec: Codec
    optim: str  # a row of optimizer_table: "muon", "embed", "head", "scalar", "other", ...
    kind: str = "gain"  # or "attn", "mlp", "embed": whose codec a knob and SIZE_LADDER name


# The container of artifacts and checkpoints: 4 bytes magic, 1 byte version, 16 bytes of sha256 over
# the rest, 4 bytes header length, header (JSON), payload. No pickle, no code, no padding.
CONTAINER_HEAD = 4 + 1 + 16 + 4


def pack_container(magic: bytes, version: int, header: bytes, payload: bytes) -> bytes:
    rest = len(header).to_bytes(4, "little") + header + payload
    return magic + bytes([version]) + hashlib.sha256(rest).digest()[:16] + rest


def unpack_container(blob: bytes, magic: bytes, version: int, what: str) -> tuple[bytes, memoryview]:
    """(header, payload), or UserError in words: not one, another version, cut short, or damaged."""
    if len(blob) < CONTAINER_HEAD or blob[:4] != magic:
        raise UserError(f"{what} is not one of ours: it begins with {bytes(blob[:4])!r}, want {magic!r}")
    if blob[4] != version:
        raise UserError(f"{what} has format version {blob[4]}, this program reads {version}")
    if hashlib.sha256(memoryview(blob)[21:]).digest()[:16] != blob[5:21]:
        raise UserError(f"{what} is truncated or damaged: its checksum does not match; copy it again")
    length = int.from_bytes(blob[21:25], "little")
    return bytes(blob[25 : 25 + length]), memoryview(blob)[25 + length :]


# ======================================================================================
# 9. Coding -- streams of numbers in about as few bytes as their statistics allow
# uses: Config Storage
# ======================================================================================


class Pool(NamedTuple):
    """One stream of every tensor that has it: the form of each part, and the values one after another."""

    planes: list[Plane]
    values: np.ndarray

    @property
    def count(self) -> int:
        return sum(plane.count for plane in self.planes)


def byte_wide(plane: Plane) -> bool:
    """Whether the values are integers of at most a byte: what the entropy coder takes."""
    return plane.dtype == np.dtype("|i1")


def ideal_bytes(counts: np.ndarray) -> float:
    """(K,S) how often each of S symbols occurs in each of K classes -> their entropy, in bytes."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return float(-(counts * np.log2(np.where(counts > 0, shares, 1.0))).sum() / 8)


def entropy_bytes(plane: Plane, values: np.ndarray) -> float:
    """Order-0 entropy of a stream: the least bytes for a coder that knows how often each value occurs."""
    if byte_wide(plane):
        counts = np.bincount(values.view(np.uint8), minlength=256)
    else:
        counts = np.unique(values.view(np.uint16), return_counts=True)[1]
    return ideal_bytes(counts[None])


# Plain byte forms. Digits: so many values share a byte, in this base.
DIGITS = {"base3": (3, 5), "two_bits": (4, 4), "nibbles": (16, 2)}


def forms_of(plane: Plane) -> list[str]:
    """The forms that can hold a stream, the densest first; `split` puts all low bytes before the high."""
    if plane.dtype.itemsize == 2:
        return ["bytes", "split"]
    if plane.low == -1 and plane.high == 1:
        return ["base3", "mask", "two_bits"]
    return ["nibbles", "bytes"] if plane.high - plane.low < 16 else ["bytes"]


def to_form(values: np.ndarray, low: int, form: str) -> bytes:
    """Values as bytes: digits of a number, a mask of non-zeros and their signs, or as they are."""
    if form in DIGITS:
        base, each = DIGITS[form]
        digits = np.zeros(-(-len(values) // each) * each, np.uint8)
        digits[: len(values)] = values.astype(np.int16) - low
        return (digits.reshape(-1, each) @ (base ** np.arange(each)).astype(np.uint8)).tobytes()
    if form == "mask":
        return np.packbits(values != 0).tobytes() + np.packbits(values[values != 0] < 0).tobytes()
    return values.view(np.uint8).reshape(-1, 2).T.tobytes() if form == "split" else values.tobytes()


def form_bytes(plane: Plane, count: int, form: str) -> int:
    """The most bytes that `to_form` makes of so many values."""
    if form in DIGITS:
        return -(-count // DIGITS[form][1])
    return 2 * -(-count // 8) if form == "mask" else count * plane.dtype.itemsize


def from_form(data: bytes, plane: Plane, count: int, form: str) -> np.ndarray:
    """What to_form was given. Raises ValueError where the bytes are not of that length."""
    raw, head = np.frombuffer(data, np.uint8), -(-count // 8)
    if form == "mask":
        on = np.unpackbits(raw[:head], count=count).astype(bool)
        if len(raw) != head + -(-int(on.sum()) // 8):
            raise ValueError(f"{len(raw)} bytes for a mask of {count} values")
        values = np.zeros(count, np.int8)
        values[on] = 1 - 2 * np.unpackbits(raw[head:], count=int(on.sum())).astype(np.int8)
        return values
    if len(raw) != form_bytes(plane, count, form):
        raise ValueError(f"{len(raw)} bytes for {count} values in the form {form}")
    if form in DIGITS:
        base, each = DIGITS[form]
        digits = raw[:, None] // (base ** np.arange(each)).astype(np.uint8) % base
        return (digits.ravel()[:count].astype(np.int16) + plane.low).astype(np.int8)
    return np.frombuffer(raw.reshape(2, -1).T.tobytes() if form == "split" else data, plane.dtype)


def lzma_chain(size: int) -> list[dict]:
    """Raw LZMA2 with a window no larger than the data: the preset's own costs 64 MB to read, 700 to write."""
    window = min(max(1 << max(size - 1, 0).bit_length(), 4096), 1 << 26)
    return [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}]


def squeeze(data: bytes, name: str = "brotli") -> bytes:
    """Compress; `raw` leaves the bytes as they are."""
    if name == "lzma":
        return lzma.compress(data, lzma.FORMAT_RAW, filters=lzma_chain(len(data)))
    if name == "zstd":
        return import_zstd().ZstdCompressor(level=22).compress(data)
    import brotli

    return brotli.compress(data, quality=11, lgwin=24) if name == "brotli" else data


def expand(data: bytes, name: str, most: int) -> bytes:
    """Decompress at most so many bytes: nothing larger is ever held. Raises ValueError for anything else."""
    readers = {"lzma": expand_lzma, "zstd": expand_zstd, "brotli": expand_brotli}
    out = readers[name](data, most) if name else data
    if len(out) > most:
        raise ValueError(f"a stream that expands beyond the {most} bytes that its tensors have")
    return out


def expand_lzma(data: bytes, most: int) -> bytes:
    try:
        return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=lzma_chain(most)).decompress(data, most + 1)
    except lzma.LZMAError as e:
        raise ValueError(f"lzma: {e}") from e


def expand_zstd(data: bytes, most: int) -> bytes:
    zstandard = import_zstd()
    try:
        return zstandard.ZstdDecompressor().stream_reader(data).read(most + 1)
    except zstandard.ZstdError as e:
        raise ValueError(f"zstd: {e}") from e


def expand_brotli(data: bytes, most: int) -> bytes:
    """By brotli's own limit: 54 bytes can ask for 64 MB."""
    import brotli

    reader = brotli.Decompressor()
    try:
        out = reader.process(data, output_buffer_limit=most + 1)
        while not reader.is_finished() and not reader.can_accept_more_data() and len(out) <= most:
            out += reader.process(b"", output_buffer_limit=most + 1 - len(out))
    except brotli.error as e:
        raise ValueError(f"brotli: {e}") from e
    if not reader.is_finished() and len(out) <= most:
        raise ValueError("a compressed stream that does not end where it should")
    return out


def import_zstd() -> object:
    try:
        import zstandard
    except ImportError as e:
        raise UserError(
            "COMPRESSOR=zstd wants the package zstandard: pip install zstandard, or choose another"
        ) from e
    return zstandard


# Static rANS (Duda, 2013): states of 32 bits that give and take words of 16, many states in turn so that
# numpy works on all at once. A symbol costs -log2 of its share in its class; shares of a class sum to 2^14.
SHARE_BITS, STATE_LOW = 14, 1 << 16
MOST_CLASSES = 64
ENERGY_STEPS = 4  # classes to a doubling of the expected magnitude; 2 and 8 were worse on trained weights


def lanes_for(count: int) -> int:
    """States in turn: a power of two, at most 2,048; each costs 2 bytes, and few make many small steps.

    One for 512 symbols in small pools, which would be slow otherwise, and for 8,192 in large ones.
    """
    lanes = min(count >> 9, max(256, count >> 13), 2048)
    return 1 << max(0, lanes.bit_length() - 1)


def to_shares(counts: np.ndarray) -> np.ndarray:
    """(K,S) counts -> whole shares that sum to 2^14 in each class, none of a present symbol 0.

    What rounding leaves over or short goes, one by one, where it pays most or costs least; a class
    without symbols is all of symbol 0.
    """
    counts = counts + (counts.sum(1, keepdims=True) == 0) * (np.arange(counts.shape[1]) == 0)
    exact = counts * ((1 << SHARE_BITS) / counts.sum(1, keepdims=True))
    shares = np.maximum(np.rint(exact).astype(np.int64), counts > 0)
    while (left := (1 << SHARE_BITS) - shares.sum(1)).any():
        worth = counts / np.maximum(shares, 1)  # of one share more or less, to first order
        spare = np.where(shares > 1, worth, np.inf).argmin(1)
        shares[np.arange(len(shares)), np.where(left > 0, worth.argmax(1), spare)] += np.sign(left)
    return shares


def rans_encode(symbols: np.ndarray, classes: np.ndarray, shares: np.ndarray) -> bytes:
    """Symbols (N,) 0..S-1 in classes (N,) 0..K-1, by shares (K,S) -> final states, then words."""
    lanes, width, words = lanes_for(len(symbols)), shares.shape[1], []
    share, start = (t.astype(np.uint64).ravel() for t in (shares, np.cumsum(shares, 1) - shares))
    state = np.full(lanes, STATE_LOW, np.uint64)
    for at in range((len(symbols) - 1) // lanes * lanes, -1, -lanes):
        index = classes[at : at + lanes] * np.intp(width) + symbols[at : at + lanes]
        f, x = share[index], state[: len(index)]
        full = x >= f << np.uint64(32 - SHARE_BITS)
        words.append(x[full].astype("<u2"))
        high, low = np.divmod(np.where(full, x >> np.uint64(16), x), f)
        state[: len(index)] = (high << np.uint64(SHARE_BITS)) + low + start[index]
    return state.astype("<u4").tobytes() + b"".join(word.tobytes() for word in reversed(words))


def rans_decode(data: bytes, classes: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The symbols (N,). Raises ValueError unless every state comes back to where it began."""
    count, width, mask = len(classes), shares.shape[1], np.uint32((1 << SHARE_BITS) - 1)
    lanes = lanes_for(count)
    if len(data) < 4 * lanes or len(data) % 2:
        raise ValueError("an entropy-coded stream that is cut short")
    state = np.frombuffer(data[: 4 * lanes], "<u4").copy()
    words = np.pad(np.frombuffer(data[4 * lanes :], "<u2").astype(np.uint32), (0, lanes))
    names = np.concatenate([np.repeat(np.arange(width, dtype=np.uint8), row) for row in shares])
    share, start = (t.astype(np.uint32).ravel() for t in (shares, np.cumsum(shares, 1) - shares))
    out, used = np.empty(count, np.uint8), 0
    for at in range(0, count, lanes):
        own = classes[at : at + lanes].astype(np.uint32)
        x = state[: len(own)]
        slot = x & mask
        symbol = names[(own << np.uint32(SHARE_BITS)) + slot]
        index = own * np.uint32(width) + symbol
        x = share[index] * (x >> np.uint32(SHARE_BITS)) + slot - start[index]
        short = np.flatnonzero(x < STATE_LOW)
        x[short] = x[short] << np.uint32(16) | words[used : used + len(short)]
        out[at : at + lanes], state[: len(own)], used = symbol, x, used + len(short)
        if used > len(words) - lanes:
            raise ValueError("an entropy-coded stream that is cut short")
    if used != len(words) - lanes or (state != STATE_LOW).any():
        raise ValueError("an entropy-coded stream that does not end where it should")
    return out


def energies(pool: Pool, along: tuple[str, ...]) -> np.ndarray:
    """log2 of the mean |value| of each row and column named, in steps of a quarter, tensor after tensor.

    With both, columns count from the mean of the tensor, so that the two add up to a magnitude.
    """
    found, at = [], 0
    for plane in pool.planes:
        size = np.abs(pool.values[at : at + plane.count].astype(np.float32)).reshape(plane.rows, plane.cols)
        at += plane.count
        rows, cols, whole = (np.log2(m + 1 / 64) for m in (size.mean(1), size.mean(0), size.mean()))
        found += [rows] * ("rows" in along) + [cols - whole * ("rows" in along)] * ("cols" in along)
    return np.rint(np.concatenate([*found, np.zeros(0)]) * ENERGY_STEPS).astype(np.int8)


def energy_classes(levels: np.ndarray, planes: list[Plane], along: tuple[str, ...]) -> list[np.ndarray]:
    """The class of each value of each tensor, (R*C,) int16, before the least one is made zero."""
    found, at = [], 0
    for plane in planes:
        rows = levels[at : at + plane.rows * ("rows" in along)]
        at += len(rows)
        cols = levels[at : at + plane.cols * ("cols" in along)]
        at += len(cols)
        total = np.zeros((plane.rows, plane.cols), np.int16)
        total += rows.astype(np.int16)[:, None] if len(rows) else np.int16(0)
        found.append((total + (cols.astype(np.int16) if len(cols) else np.int16(0))).ravel())
    return found


class Rans(NamedTuple):
    """What a decoder has to know besides the words."""

    levels: np.ndarray  # (rows and columns,) int8
    least: int  # class that becomes 0
    shares: np.ndarray  # (K,S)

    def classes(self, planes: list[Plane], along: tuple[str, ...]) -> np.ndarray:
        found = np.concatenate(energy_classes(self.levels, planes, along))
        return np.clip(found - self.least, 0, len(self.shares) - 1).astype(np.uint8)

    def pack(self) -> bytes:
        head = np.array([len(self.shares), self.least + 256], "<u2").tobytes()
        side = squeeze(head + self.levels.tobytes() + self.shares.astype("<u2").tobytes())
        return len(side).to_bytes(4, "little") + side


def measure(pool: Pool, along: tuple[str, ...]) -> tuple[Rans, float]:
    """Classes by the energy of rows and columns, their shares, and the bytes that both should take."""
    levels = energies(pool, along)
    parts, at, width = energy_classes(levels, pool.planes, along), 0, width_of(pool.planes)
    least = min(int(part.min()) for part in parts)
    top = min(max(int(part.max()) for part in parts) - least, MOST_CLASSES - 1)
    counts = np.zeros(((top + 1) * width,), np.int64)
    for part in parts:
        symbols = pool.values[at : at + len(part)].astype(np.int64) - pool.planes[0].low
        at += len(part)
        counts += np.bincount(np.minimum(part - least, top) * width + symbols, minlength=len(counts))
    rans = Rans(levels, least, to_shares(counts.reshape(-1, width)))
    return rans, ideal_bytes(counts.reshape(-1, width)) + len(rans.pack())


def width_of(planes: list[Plane]) -> int:
    return planes[0].high - planes[0].low + 1


WAYS = ((), ("rows",), ("cols",), ("rows", "cols"))  # whose energy may sort values into classes


def rans_pool(pool: Pool) -> tuple[str, bytes]:
    """(coder, bytes) by the cheapest of the four ways to sort values into classes."""
    found = {along: measure(pool, along) for along in WAYS}
    along = min(found, key=lambda way: (found[way][1], len(way)))
    rans = found[along][0]
    symbols = (pool.values.astype(np.int16) - pool.planes[0].low).astype(np.uint8)
    words = rans_encode(symbols, rans.classes(pool.planes, along), rans.shares)
    return "+".join(["rans", *along]), rans.pack() + words


def rans_unpool(data: bytes, planes: list[Plane], along: tuple[str, ...]) -> np.ndarray:
    """The values. Raises ValueError unless shares and states are as an encoder leaves them."""
    width, length = width_of(planes), int.from_bytes(data[:4], "little")
    count = sum(p.rows * ("rows" in along) + p.cols * ("cols" in along) for p in planes)
    side = expand(data[4 : 4 + length], "brotli", 4 + count + 2 * MOST_CLASSES * width)
    classes, least = np.frombuffer(side[:4].ljust(4, b"\0"), "<u2").astype(int)
    if not 0 < classes <= MOST_CLASSES or least > 512 or len(side) != 4 + count + 2 * classes * width:
        raise ValueError("an entropy-coded stream whose tables have another size")
    shares = np.frombuffer(side[4 + count :], "<u2").astype(np.int64).reshape(classes, width)
    if (shares.sum(1) != 1 << SHARE_BITS).any():
        raise ValueError("an entropy-coded stream whose shares do not add up")
    rans = Rans(np.frombuffer(side[4 : 4 + count], np.int8), int(least) - 256, shares)
    symbols = rans_decode(data[4 + length :], rans.classes(planes, along), shares)
    return (symbols.astype(np.int16) + planes[0].low).astype(np.int8)


class Coded(NamedTuple):
    """A pool as bytes: by which coder, and what every coder that was tried would have taken."""

    coder: str
    data: bytes
    tried: dict[str, int]


def code_pool(pool: Pool, compressor: str) -> Coded:
    """The smallest of the coders that COMPRESSOR allows; on a tie the first of them.

    auto measures the entropy coder, and byte compressors where they may win: on small streams, which
    tables burden, and on float16. On many small integers none came below the entropy coder.
    """
    plane, entropy = pool.planes[0], compressor in ("auto", "rans") and byte_wide(pool.planes[0])
    small = pool.values.nbytes <= 1 << 16
    names = {"auto": ["brotli", "lzma"], "rans": ["brotli"], "raw": [""]}.get(compressor, [compressor])
    found = [rans_pool(pool)] if entropy else []
    if not entropy or (small and compressor == "auto"):
        forms = {form: to_form(pool.values, plane.low, form) for form in forms_of(plane)}
        found += [(f"{form}+{n}".strip("+"), squeeze(data, n)) for n in names for form, data in forms.items()]
    tried = {name: len(data) for name, data in found}
    coder, data = min(found, key=lambda pair: len(pair[1]))
    return Coded(coder, data, tried)


def decode_pool(data: bytes, planes: list[Plane], coder: str) -> np.ndarray:
    """The values of a pool. Raises ValueError, in words, for whatever no encoder would have written."""
    head, *rest = coder.split("+")
    if head == "rans" and byte_wide(planes[0]) and tuple(rest) in WAYS:
        return rans_unpool(data, planes, tuple(rest))
    if head not in forms_of(planes[0]) or rest not in ([], ["brotli"], ["lzma"], ["zstd"]):
        raise ValueError(f"a coder {coder!r} that it cannot have")
    count = sum(plane.count for plane in planes)
    most = form_bytes(planes[0], count, head)
    values = from_form(expand(bytes(data), "".join(rest), most), planes[0], count, head)
    low, high = values.min(initial=0), values.max(initial=0)
    if byte_wide(planes[0]) and not (planes[0].low <= low and high <= planes[0].high):
        raise ValueError("integers beyond their range")
    return values


# ======================================================================================
# 10. Layers -- the parts that blocks are made of
# uses: Config Schedule Storage
# ======================================================================================


class Ctx(NamedTuple):
    """What a block may read besides x; built once per forward."""

    tokens: Tensor  # (B,T) int64
    docs: Tensor | None  # segment boundaries along B*T, or None
    longest: int  # no segment is longer
    phase: Phase
    rope: tuple[Tensor, Tensor] | None = None  # cos, sin: (T, K/2); this and the rest are filled by the model
    scale: Tensor | None = None  # () of this layer's input
    lanes: tuple[Tensor, Tensor] | None = None  # (2,) and (2,2): how this layer's lanes go on and take in
    first: Tensor | None = None  # (B,T,G,K) values of the first layer
    table: Tensor | None = None  # (B,T,G*K) values looked up by token
    routing: Tensor | None = None  # () of the phase, for experts
    shares: Tensor | None = None  # (E,) of this layer's experts in all choices of the step before


class Out(NamedTuple):
    """What every mixer, feed-forward and block returns."""

    y: Tensor  # (B,T,D)
    aux: dict[str, Tensor]  # unweighted scalar losses by name
    values: Tensor | None = None  # (B,T,G,K), where a later layer wants them
    counts: Tensor | None = None  # (E,) how often each expert was taken; of a model (L,E)


NO_AUX: dict[str, Tensor] = {}


def add_aux(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum by name: each layer adds to the loss it shares with the others."""
    return a | {name: a[name] + loss if name in a else loss for name, loss in b.items()}


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without weight."""
    return F.rms_norm(x, x.shape[-1:])


def matrix_tag(kind: str, cfg: Config) -> Tag:
    """How the matrices of a mixer ("attn") or a feed-forward ("mlp") ship."""
    sigmas = (cfg.gptq.attn_sigmas if kind == "attn" else cfg.gptq.mlp_sigmas) or cfg.gptq.matrix_sigmas
    name = cfg.export.attn_codec if kind == "attn" else cfg.export.mlp_codec
    return Tag(codec_named(name, cfg.export.matrix_bits, sigmas, cfg), "muon", kind)


def embed_codec(cfg: Config) -> Codec:
    """Of the embedding and of a head of its own."""
    return codec_named(cfg.export.embed_codec, cfg.export.embed_bits, cfg.gptq.embed_sigmas, cfg)


def codec_named(name: str, bits: int, sigmas: float, cfg: Config) -> Codec:
    """The one place where a codec's name becomes a codec; bits and sigmas are those of integers."""
    if "ternary" in cfg.export.codecs and name == "ternary":
        return Ternary(cfg.export.ternary_group, cfg.export.ternary_step, cfg.export.turbo_train)
    if "fp8" in cfg.export.codecs and name == "fp8":
        return Fp8()
    if "fp4" in cfg.export.codecs and name == "fp4":
        return Fp4()
    return Half() if bits == 16 else IntRow(bits, sigmas, cfg.export.clip_percentile, cfg.export.scale_floor)


def starts_of(ctx: Ctx) -> Tensor:
    """(B,T) bool: first tokens of documents, segments and rows: nothing reaches them from before."""
    found = ctx.tokens == BOS
    found[:, 0] = True
    if ctx.docs is None:
        return found
    edge = torch.zeros(found.numel() + 1, dtype=torch.bool, device=found.device)  # boundaries end with N
    return found | edge.index_fill(0, ctx.docs.long(), True)[:-1].view_as(found)


class Tap:
    """What a matrix sees: the sum of x x' over its inputs, in float32 (Frantar et al., 2022: the Hessian)."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, width, device=device)

    def add(self, x: Tensor) -> None:  # (..., width)
        rows = x.detach().flatten(0, -2).float()
        self.total.addmm_(rows.T, rows)


class Weighted(nn.Module):
    """A module of one weight with one tag. Quantisation-aware training and export meet here and only here.

    `grid` (2,) is what the codec of a calibrated ternary weight reads: threshold and multiplier. A buffer, so
    that compiled graphs see what is written into it; the artifact has no need of it. `jitter` is the noise
    under which a ternary weight is trained, drawn anew by whoever takes the step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", None, persistent=False)
        self.jitter = None

    def effective(self, phase: Phase) -> Tensor:
        """The weight, or what the artifact will hold of it; in training perhaps that of its neighbour."""
        if not phase.qat:
            return self.weight
        if self.jitter is not None and torch.is_grad_enabled():
            return self.tags["weight"].codec.fake_quant(self.weight, self.grid, self.jitter.noise)
        return self.tags["weight"].codec.fake_quant(self.weight, self.grid)


class Jitter:
    """Gaussian noise (R,G,g) on one weight, from a counter, so that nothing of it is kept between runs.

    It is the same for every rank and micro-batch of a step, another for each step and weight, and a resumed
    run meets it again. Compiled blocks find it in place: made in them, six hashes take minutes to compile.
    """

    def __init__(self, shape: tuple[int, int, int], std: float, key: int, device: torch.device) -> None:
        self.std, self.key, self.noise = std, key, torch.empty(shape, device=device)
        self.draw(0)

    @torch.no_grad()
    def draw(self, step: int) -> None:
        """Pairs of normal numbers by Box and Muller (1958)."""
        count, key = self.noise.numel(), mixed((self.key ^ mixed(step)) & 0xFFFFFFFF)
        one = mixed(torch.arange(-(-count // 2), device=self.noise.device) ^ key)
        two = mixed(one + 0x3C6EF372 & 0xFFFFFFFF)
        radius = ((one.float() + 1.0) * 2.0**-32).log().mul(-2.0).clamp_min(0.0).sqrt() * self.std
        angle = two.float() * (2.0 * math.pi * 2.0**-32)
        whole = torch.cat([radius * angle.cos(), radius * angle.sin()])
        self.noise.copy_(whole[:count].view_as(self.noise))


def mixed(x: Tensor | int) -> Tensor | int:
    """32 bits, in int64 -> 32 bits that look random; a bijection (constants of hash-prospector, Wellons)."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x735A2D97 & 0xFFFFFFFF
    return x ^ (x >> 15)


def gain(p: Tensor, phase: Phase) -> Tensor:
    """A gain, scale or bias, or the float16 that the artifact will hold of it."""
    return Half().fake_quant(p) if phase.qat else p


class Proj(Weighted):
    """Every matrix multiply.

    The weight is float32; it is cast to the activation's dtype where it is used, so there is no
    autocast and a CPU runs the same lines. Initial weights: U(+-1/sqrt(n_in)), or zeros.
    """

    def __init__(self, n_in: int, n_out: int, tag: Tag, zero: bool = False) -> None:
        super().__init__()
        start = torch.zeros(n_out, n_in)
        self.weight = nn.Parameter(start if zero else start.uniform_(-(n_in**-0.5), n_in**-0.5))
        self.tags, self.tap = {"weight": tag}, None

    def forward(self, x: Tensor, phase: Phase) -> Tensor:  # (..., n_in) -> (..., n_out)
        if self.tap is not None:  # calibration; a forward hook would be ignored once compiled
            self.tap.add(x)
        return F.linear(x, self.effective(phase).to(x.dtype))


class OutProj(Proj):
    """The matrix that ends attention or the MLP: it begins at zero, or small, and may norm what it reads.

    Ternary weights want inputs of one size (record T74; with a gain, SKC notes 2.1).
    """

    def __init__(self, n_in: int, n_out: int, tag: Tag, cfg: Config) -> None:
        super().__init__(n_in, n_out, tag, zero=True)
        self.cfg = cfg
        if cfg.model.out_std > 0:
            nn.init.normal_(self.weight, 0.0, cfg.model.out_std)
        if cfg.model.normed == "gain":
            self.scale = nn.Parameter(torch.ones(n_in))
            self.tags["scale"] = Tag(Half(), "scalar")

    def forward(self, x: Tensor, phase: Phase) -> Tensor:
        if self.cfg.model.normed != "none":
            x = norm(x)
        if self.cfg.model.normed == "gain":
            x = x * gain(self.scale, phase).to(x.dtype)
        return super().forward(x, phase)


class Table(Weighted):
    """Rows looked up by number, in the codec and with the rate of the embedding."""

    def __init__(self, rows: int, width: int, std: float, cfg: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width).normal_(0.0, std))
        self.tags = {"weight": Tag(embed_codec(cfg), "embed", "embed")}

    def forward(self, ids: Tensor, phase: Phase) -> Tensor:  # (B,T) -> (B,T,width)
        return F.embedding(ids, self.effective(phase))


class Embed(Weighted):
    """Token embedding. All activations follow its dtype; the weight itself stays float32.

    Narrower than the model it has two matrices, `into` the model's width and, in front of the head, `out`.
    """

    def __init__(self, cfg: Config, dtype: torch.dtype) -> None:
        super().__init__()
        std = cfg.model.embed_std if cfg.model.tied else 1.0
        self.weight = nn.Parameter(torch.empty(cfg.model.vocab, cfg.model.embed_width).normal_(0.0, std))
        self.tags, self.dtype, self.cfg = {"weight": Tag(embed_codec(cfg), "embed", "embed")}, dtype, cfg
        if cfg.model.embed_dim:
            tag = Tag(embed_codec(cfg), "embed" if cfg.model.embed_optim == "adam" else "muon", "embed")
            self.into = Proj(cfg.model.embed_dim, cfg.model.dim, tag)
            self.out = Proj(cfg.model.dim, cfg.model.embed_dim, tag)

    def forward(self, ctx: Ctx) -> Tensor:  # (B,T) -> (B,T,D)
        e = F.embedding(ctx.tokens, self.effective(ctx.phase)).to(self.dtype)
        return self.into(e, ctx.phase) if self.cfg.model.embed_dim else e


def yarn_slowness(dims: int, stretch: float, like: Tensor) -> Tensor:
    """(dims/2,) divisors of the rotary frequencies: 1 for the first quarter, then rising to `stretch`.

    Record T74's ramp over i/dims (frontier 2.13; SKC notes 2.4), not that of Peng et al. (2023).
    """
    i = torch.arange(0, dims, 2, device=like.device, dtype=torch.float32)
    return 1.0 + ((i / dims - 0.25) / 0.75).clamp(0.0, 1.0) * (stretch - 1.0)


def rope_table(
    length: int, dims: int, base: float, like: Tensor, slowness: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """cos and sin (T, dims/2) of position * base^(-2j/dims) / slowness, made in float32, in `like`'s dtype.

    Made anew in each forward: a table kept in a buffer is lost by meta construction, and 2 T K
    operations are nothing beside attention.
    """
    j = torch.arange(0, dims, 2, device=like.device, dtype=torch.float32)
    position = torch.arange(length, device=like.device, dtype=torch.float32)[:, None]
    angle = position * (base ** (-j / dims) / slowness)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """(B,T,H,K): turn the pairs (x_i, x_{i+R/2}) of the first R by their positions' angles (Su et al., 2021).

    R is twice the width of the tables; what lies beyond is the same at every position (frontier 2.4).
    """
    cos, sin = (t[:, None, :] for t in rope)
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], -1)


# ======================================================================================
# 11. Mixers -- tokens meet here
# uses: Config Schedule Storage Layers
# ======================================================================================


class GateForm(NamedTuple):
    """One kind of head gate, as numbers: height * sigmoid(slope * W x[:window] + bias)."""

    window: int
    std: float = 0.0  # of W at the start
    slope: float = 1.0
    height: float = 1.0
    bias: float | None = None  # learned, from this value on
    of_queries: bool = False  # x is the queries before their norm, else attention's input


def gate_forms(cfg: Config) -> dict[str, GateForm]:
    """The gates that are on (frontier 2.4 step 7; 2.11)."""
    forms = {}
    if cfg.attn.dense_gate:
        forms["dense"] = GateForm(cfg.model.dim, cfg.attn.dense_std)
    if cfg.attn.sparse_gate:
        forms["sparse"] = GateForm(cfg.attn.gate_window, cfg.attn.sparse_std, cfg.attn.sparse_scale)
    if cfg.attn.out_gate:
        of_queries = cfg.attn.out_source == "q"
        forms["out"] = GateForm(cfg.attn.gate_window, height=2.0, of_queries=of_queries)
    if cfg.attn.bias_gate:
        forms["bias"] = GateForm(cfg.model.dim, bias=4.0)
    return forms


class HeadGate(Weighted):
    """A factor for each token and head."""

    def __init__(self, form: GateForm, cfg: Config) -> None:
        super().__init__()
        self.form = form
        self.weight = nn.Parameter(torch.zeros(cfg.model.heads, form.window).normal_(0.0, form.std))
        self.tags = {"weight": Tag(IntRow(8) if cfg.attn.gate_int8 else Half(), "other")}
        if form.bias is not None:
            self.bias = nn.Parameter(torch.full((cfg.model.heads,), form.bias))
            self.tags["bias"] = Tag(Half(), "other")

    def forward(self, x: Tensor, queries: Tensor, phase: Phase) -> Tensor:  # (B,T,D), (B,T,H*K) -> (B,T,H,1)
        read = (queries if self.form.of_queries else x)[..., : self.form.window]
        z = self.form.slope * F.linear(read, self.effective(phase).to(x.dtype))
        if self.form.bias is not None:
            z = z + gain(self.bias, phase).to(x.dtype)
        return self.form.height * torch.sigmoid(z)[..., None]


def without_own_value(y: Tensor, v: Tensor) -> Tensor:
    """(B,T,H,K), (B,T,G,K) -> (B,T,H,K): y less its component along the value of its own position (XSA).

    What a token attends to in itself the residual stream has already (record 1855; frontier 2.4 step 6).
    """
    own = F.normalize(v, dim=-1)[..., None, :]
    heads = y.unflatten(2, (v.shape[2], -1))
    return (heads - (heads * own).sum(-1, keepdim=True) * own).flatten(2, 3)


def beyond_rounding(rest: Tensor, whole: Tensor) -> Tensor:
    """(...,K) twice: what is left of a vector, or zeros where that is no more than rounding leaves.

    Of a document's first token XSA leaves nothing else, and a norm would make it as large as any other.
    """
    left, before = (t.detach().norm(dim=-1, keepdim=True) for t in (rest, whole))
    return rest * (left > 4.0 * torch.finfo(rest.dtype).eps * before)


class Attention(nn.Module):
    """Causal grouped-query attention with normalised queries and keys and a learned gain per head."""

    def __init__(self, cfg: Config, layer: int, attend: Callable) -> None:
        super().__init__()
        self.cfg, self.attend = cfg, attend
        width, tag = cfg.model.head_dim, matrix_tag("attn", cfg)
        self.widths = [n * width for n in (cfg.model.heads, cfg.model.kv_heads, cfg.model.kv_heads)]
        if cfg.attn.fused_qkv:
            self.c_qkv = Proj(cfg.model.dim, sum(self.widths), tag)
        else:
            self.c_q, self.c_k, self.c_v = (Proj(cfg.model.dim, n, tag) for n in self.widths)
        self.proj = OutProj(cfg.model.heads * width, cfg.model.dim, tag, cfg)
        self.q_gain = nn.Parameter(torch.full((cfg.model.heads,), cfg.model.qk_gain))
        self.tags = {"q_gain": Tag(Half(), "scalar")}
        self.own_removed = layer >= cfg.model.layers - cfg.attn.xsa_last
        self.reads_table = cfg.input.values and layer in cfg.table_layers
        if cfg.attn.gated:
            self.gates = nn.ModuleDict({name: HeadGate(form, cfg) for name, form in gate_forms(cfg).items()})
        if cfg.attn.value_residual:
            self.value_mix = nn.Parameter(torch.full((2,), 0.5))
            self.tags["value_mix"] = Tag(Half(), "scalar")
        if cfg.input.values and self.reads_table:
            self.table_scale = nn.Parameter(torch.ones(1))
            self.tags["table_scale"] = Tag(Half(), "scalar")

    def forward(self, x: Tensor, ctx: Ctx) -> Out:  # (B,T,D)
        heads = (*x.shape[:2], -1, self.cfg.model.head_dim)
        queries, k, v = self.read(x, ctx.phase)
        v = self.values(v, ctx).view(heads)
        first = v
        if self.cfg.attn.value_residual and ctx.first is not None:
            mix = gain(self.value_mix, ctx.phase).to(v.dtype)
            v = mix[0] * ctx.first + mix[1] * v
        q, k = (rotate(norm(t.view(heads)), ctx.rope) for t in (queries, k))
        q = q * gain(self.q_gain, ctx.phase).to(q.dtype)[:, None]
        y = self.attend(q, k, v, ctx.docs, ctx.longest)
        if self.cfg.attn.xsa_last and self.own_removed:
            y, whole = without_own_value(y, v), y
            if self.cfg.model.normed != "none":
                y = beyond_rounding(y, whole)
        if self.cfg.attn.gated:
            for gate in self.gates.values():
                y = y * gate(x, queries, ctx.phase)
        first = first if self.cfg.attn.value_residual else None
        return Out(self.proj(y.flatten(2), ctx.phase), NO_AUX, first)

    def read(self, x: Tensor, phase: Phase) -> tuple[Tensor, ...]:  # (B,T,D) -> (B,T,H*K), (B,T,G*K) twice
        if self.cfg.attn.fused_qkv:
            return self.c_qkv(x, phase).split(self.widths, -1)
        return tuple(c(x, phase) for c in (self.c_q, self.c_k, self.c_v))

    def values(self, v: Tensor, ctx: Ctx) -> Tensor:  # (B,T,G*K)
        """With what the token's own row of the table adds."""
        if self.cfg.input.values and self.reads_table:
            return v + gain(self.table_scale, ctx.phase).to(v.dtype) * ctx.table
        return v


def make_mixer(cfg: Config, layer: int, attend: Callable) -> nn.Module:
    """The one place where a layer's mixer is chosen."""
    return Attention(cfg, layer, attend)


# ======================================================================================
# 12. Feed-forward -- each token by itself
# uses: Config Schedule Kernels Storage Layers
# ======================================================================================


class MLP(nn.Module):
    """down(relu(up(x))^2) (So et al., 2021); the records since 549 square a leaky ReLU of slope 0.5."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        tag = matrix_tag("mlp", cfg)
        self.fc = Proj(cfg.model.dim, cfg.model.hidden, tag)
        self.proj = OutProj(cfg.model.hidden, cfg.model.dim, tag, cfg)
        if cfg.fuses_mlp:
            self.fused = squared_mlp()

    def forward(self, x: Tensor, ctx: Ctx) -> Out:  # (B,T,D)
        if self.cfg.fuses_mlp and self.fuses(x):
            up, down = (p.effective(ctx.phase).to(x.dtype) for p in (self.fc, self.proj))
            return Out(self.fused(x.flatten(0, -2), up, down, self.cfg.model.slope).view(x.shape), NO_AUX)
        h = self.fc(x, ctx.phase)
        h = F.leaky_relu(h, self.cfg.model.slope) if self.cfg.model.slope else F.relu(h)
        return Out(self.proj(h.square(), ctx.phase), NO_AUX)

    def fuses(self, x: Tensor) -> bool:
        """In training on a GPU, while nobody listens to the projections, if the kernel was found right."""
        heard = self.fc.tap is not None or self.proj.tap is not None
        trains = x.is_cuda and x.dtype == torch.bfloat16 and torch.is_grad_enabled()
        return trains and self.fused is not None and not heard


class Bank(Weighted):
    """A matrix (R,C) for each expert, in one parameter (E,R,C): each row is scaled and stored by itself.

    No tap: expert matrices of integers are rounded to nearest, and get no low-rank correction.
    """

    def __init__(self, n_in: int, n_out: int, cfg: Config, zero: bool = False) -> None:
        super().__init__()
        start = torch.zeros(cfg.moe.experts, n_out, n_in)
        self.weight = nn.Parameter(start if zero else start.uniform_(-(n_in**-0.5), n_in**-0.5))
        self.tags, self.product = {"weight": matrix_tag("mlp", cfg)}, grouped_operator()

    def forward(self, x: Tensor, ends: Tensor, phase: Phase) -> Tensor:  # (N,C), (E,) -> (N,R)
        return self.product(x, self.effective(phase).to(x.dtype), ends)


class OutBank(Bank):
    """Of the matrices that end the experts' MLPs: they begin as OutProj does, and each has a gain of its own.

    The gain multiplies a matrix's columns, which is the same as its inputs, and is done once.
    """

    def __init__(self, n_in: int, n_out: int, cfg: Config) -> None:
        super().__init__(n_in, n_out, cfg, zero=True)
        self.cfg = cfg
        if cfg.model.out_std > 0:
            nn.init.normal_(self.weight, 0.0, cfg.model.out_std)
        if cfg.model.normed == "gain":
            self.scale = nn.Parameter(torch.ones(cfg.moe.experts, n_in))
            self.tags["scale"] = Tag(Half(), "router")  # as a resting expert's must not decay

    def forward(self, x: Tensor, ends: Tensor, phase: Phase) -> Tensor:
        w = self.effective(phase)
        if self.cfg.model.normed != "none":
            x = norm(x)
        if self.cfg.model.normed == "gain":
            w = w * gain(self.scale, phase)[:, None]
        return self.product(x, w.to(x.dtype), ends)


class Routes(NamedTuple):
    """Which experts each token takes, the best first, and by which weight."""

    chosen: Tensor  # (N,k) int64
    weights: Tensor  # (N,k) of the logits' dtype; a row sums to 1
    probs: Tensor  # (N,E) of the same


def route(logits: Tensor, top_k: int, extra: int, routing: Tensor) -> Routes:
    """(N,E) -> the top_k most probable experts and, while routing < 1, the `extra` next (SKC notes 2.13).

    Weights of either kind are its mass times p / (sum of its p, without gradient): they sum to the mass,
    and the gradient of p reaches the router even where one expert takes all. At routing 1 the extra ones
    have no mass left and the temperature is 1, so that nothing jumps when they go. Of equally probable
    experts the first is taken.
    """
    taken = top_k + extra
    if extra:
        logits = logits / (1.0 + (1.0 - routing) * (logits.shape[1] / taken - 1.0))
    logs = logits.log_softmax(1)
    chosen = logs.detach().argsort(dim=1, descending=True, stable=True)[:, :taken]
    picked = logs.gather(1, chosen)
    weights = parts_of_one(picked[:, :top_k])
    if extra:
        mass = routing + (1.0 - routing) * (top_k / taken)
        weights = torch.cat([mass * weights, (1.0 - mass) * parts_of_one(picked[:, top_k:])], 1)
    return Routes(chosen, weights, logs.exp())


def parts_of_one(logs: Tensor) -> Tensor:
    """(N,k) logarithms of p -> p / (their sum, without gradient), also where every p underflows."""
    return (logs - logs.logsumexp(1, keepdim=True).detach()).exp()


def balance_loss(shares: Tensor, probs: Tensor) -> Tensor:
    """(E,) shares of the step before, (N,E) -> E * sum of share times mean p: 1 where either is even.

    The shares are those of all ranks and micro-batches, so the loss is linear in the batch and its split
    does not matter. Less their mean, which changes nothing as p sums to 1: of even shares the gradient is
    zero then, not rounding that Adam would make steps of.
    """
    even = 1.0 / len(shares)
    return 1.0 + len(shares) * ((shares - even) * probs.mean(0)).sum()


class Experts(nn.Module):
    """A mixture of MLPs: each token is read by a few of them, chosen by a router (Fedus et al., 2021).

    No token is left out, however many want one expert. A router of zeros sends all tokens to the first.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.router = nn.Parameter(torch.empty(cfg.moe.experts, cfg.model.dim).normal_(0.0, 0.02))
        self.tags = {"router": Tag(Half(), "router")}
        self.up = Bank(cfg.model.dim, cfg.model.hidden, cfg)
        self.down = OutBank(cfg.model.hidden, cfg.model.dim, cfg)

    def forward(self, x: Tensor, ctx: Ctx) -> Out:  # (B,T,D)
        rows, router = x.flatten(0, -2), gain(self.router, ctx.phase)
        logits = F.linear(rows.to(router.dtype), router)  # float32, whatever the activations are
        found = route(logits, self.cfg.moe.top_k, ctx.phase.extra, ctx.routing)
        numbers = torch.arange(self.cfg.moe.experts, device=x.device)
        counts = (found.chosen[..., None] == numbers).sum((0, 1))
        order = found.chosen.flatten().argsort(stable=True)  # assignments, expert by expert
        inverse = order.argsort()
        taken = found.chosen.shape[1]
        h = Reorder.apply(rows.repeat_interleave(taken, 0), order, inverse)
        y = Reorder.apply(self.read(h, counts.cumsum(0).int(), ctx.phase), inverse, order)
        y = (y.unflatten(0, (-1, taken)) * found.weights[..., None].to(y.dtype)).sum(1)
        return Out(y.view(x.shape), {"balance": balance_loss(ctx.shares, found.probs)}, counts=counts.float())

    def read(self, h: Tensor, ends: Tensor, phase: Phase) -> Tensor:
        """(N,D) -> (N,D): rows before ends[e], and not before ends[e-1], by the MLP of expert e."""
        h = self.up(h, ends, phase)
        h = F.leaky_relu(h, self.cfg.model.slope) if self.cfg.model.slope else F.relu(h)
        return self.down(h.square(), ends, phase)


def make_ffn(cfg: Config, layer: int) -> nn.Module:
    """The one place where a layer's feed-forward is chosen."""
    if cfg.moe.on and layer >= cfg.experts_start:
        return Experts(cfg)
    return MLP(cfg)


# ======================================================================================
# 13. Memory -- what a token brings besides its embedding
# uses: Config Schedule Storage Layers
# ======================================================================================


class Smear(nn.Module):
    """e_t + lambda * sigmoid(w e_t[:window]) * e_(t-1), never over the start of a document (record 1855).

    Without the mask the last token of one text leaks into the next (frontier trap 1).
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, cfg.attn.gate_window))
        self.amount = nn.Parameter(torch.zeros(1))
        self.tags = {"weight": Tag(Half(), "other"), "amount": Tag(Half(), "scalar")}

    def forward(self, e: Tensor, starts: Tensor, phase: Phase) -> Tensor:  # (B,T,D), (B,T) bool
        now, before = e[:, 1:], e[:, :-1]
        weight, amount = (gain(p, phase).to(e.dtype) for p in (self.weight, self.amount))
        gate = amount * torch.sigmoid(F.linear(now[..., : weight.shape[1]], weight)) * ~starts[:, 1:, None]
        return torch.cat([e[:, :1], now + gate * before], 1)


class BigramHash(nn.Module):
    """Rows of a table by hashed pairs of tokens, brought to the model's width (record 549).

    The table begins at zero, the matrix does not: both at zero would never receive a gradient.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.table = Table(cfg.input.bigram_rows, cfg.input.bigram_dim, 0.0, cfg)
        self.proj = Proj(cfg.input.bigram_dim, cfg.model.dim, matrix_tag("mlp", cfg))
        self.amount = nn.Parameter(torch.full((1,), 0.05))
        self.tags = {"amount": Tag(Half(), "scalar")}

    def rows_of(self, tokens: Tensor, starts: Tensor) -> Tensor:
        """(B,T) -> (B,T): the pair's row; the last row is for tokens with nothing before them."""
        last = self.table.weight.shape[0] - 1
        before = F.pad(tokens[:, :-1], (1, 0))
        return torch.where(starts, last, ((36313 * tokens) ^ (27191 * before)) % last)

    def forward(self, ctx: Ctx, starts: Tensor, dtype: torch.dtype) -> Tensor:  # -> (B,T,D)
        found = self.table(self.rows_of(ctx.tokens, starts), ctx.phase).to(dtype)
        return gain(self.amount, ctx.phase).to(dtype) * self.proj(found, ctx.phase)


class ValueTable(nn.Module):
    """Values looked up by token, shared by the layers that read them (record 549)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        width = cfg.model.kv_heads * cfg.model.head_dim
        self.table = Table(cfg.model.vocab, cfg.input.values_dim, 0.01, cfg)
        self.proj = Proj(cfg.input.values_dim, width, matrix_tag("attn", cfg), zero=True)
        self.amount = nn.Parameter(torch.full((1,), 0.1))
        self.tags = {"amount": Tag(Half(), "scalar")}

    def forward(self, ctx: Ctx, dtype: torch.dtype) -> Tensor:  # -> (B,T,G*K)
        found = self.table(ctx.tokens, ctx.phase).to(dtype)
        return gain(self.amount, ctx.phase).to(dtype) * self.proj(found, ctx.phase)


# ======================================================================================
# 14. Model -- one forward for training, validation, evaluation and whoever comes later
# uses: Config Schedule World Kernels Storage Layers Mixers Feed-forward Memory
# ======================================================================================


class Plan(NamedTuple):
    """Which layers are visited in which order: encoder outputs are skipped to the decoder, last first."""

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]

    @property
    def skips(self) -> int:
        return min(len(self.encoder), len(self.decoder))


def layer_plan(cfg: Config, loops: int) -> Plan:
    """The U-Net and depth recurrence as data. 9 layers: 0-3 down, 4-8 up; loops repeat first..last (2.8)."""
    layers = list(range(cfg.model.layers))
    if cfg.loop.on:
        looped = layers[cfg.loop.first : cfg.loop.last + 1]
        layers = layers[: cfg.loop.first] + looped * (loops + 1) + layers[cfg.loop.last + 1 :]
    half = len(layers) // 2
    return Plan(tuple(layers[:half]), tuple(layers[half:]))


class Block(nn.Module):
    """x <- mix(x, x0); x <- x + s_a * mixer(norm x); x <- x + s_m * ffn(norm x), all scales per channel."""

    def __init__(self, cfg: Config, layer: int, attend: Callable) -> None:
        super().__init__()
        self.cfg = cfg
        self.attn, self.mlp = make_mixer(cfg, layer, attend), make_ffn(cfg, layer)
        self.attn_scale = nn.Parameter(torch.ones(cfg.model.dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model.dim))
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(cfg.model.dim), torch.zeros(cfg.model.dim)]))
        self.tags = dict.fromkeys(("attn_scale", "mlp_scale", "resid_mix"), Tag(Half(), "scalar"))
        if cfg.residual.delta_gate and not (cfg.residual.lanes_on and layer >= cfg.lanes_start):
            self.delta_weight = nn.Parameter(torch.zeros(1, cfg.model.dim))
            self.delta_bias = nn.Parameter(torch.full((1,), 2.0))
            self.tags |= dict.fromkeys(("delta_weight", "delta_bias"), Tag(Half(), "other"))

    def forward(self, x: Tensor, x0: Tensor, ctx: Ctx) -> Out:  # (B,T,D) twice
        mix = gain(self.resid_mix, ctx.phase).to(x.dtype)
        start = mix[0] * x + mix[1] * x0
        a = self.mixed(start, ctx)
        x = start + a.y
        m = self.fed(x, ctx)
        x = x + m.y
        if self.cfg.residual.delta_gate:
            weight, bias = (gain(p, ctx.phase).to(x.dtype) for p in (self.delta_weight, self.delta_bias))
            x = start + torch.sigmoid(F.linear(start, weight, bias)) * (x - start)
        return Out(x, add_aux(a.aux, m.aux), a.values, m.counts)

    def mixed(self, x: Tensor, ctx: Ctx) -> Out:
        a = self.attn(self.entering(x, ctx), ctx)
        return a._replace(y=gain(self.attn_scale, ctx.phase).to(x.dtype) * a.y)

    def fed(self, x: Tensor, ctx: Ctx) -> Out:
        m = self.mlp(self.entering(x, ctx), ctx)
        return m._replace(y=gain(self.mlp_scale, ctx.phase).to(x.dtype) * m.y)

    def entering(self, x: Tensor, ctx: Ctx) -> Tensor:
        return norm(x) * ctx.scale if self.cfg.residual.ln_scale else norm(x)


class LaneBlock(Block):
    """Mixer and feed-forward side by side, each reading its own lane, both writing to both (frontier 2.9)."""

    def forward(self, x: Tensor, x0: Tensor, ctx: Ctx) -> Out:  # (2,B,T,D), (B,T,D)
        mix = gain(self.resid_mix, ctx.phase).to(x.dtype)
        a = self.mixed(mix[0] * x[0] + mix[1] * x0, ctx)
        m = self.fed(x[1], ctx)
        goes_on, takes_in = (t.to(x.dtype)[..., None, None, None] for t in ctx.lanes)
        x = goes_on * x + takes_in[0] * a.y + takes_in[1] * m.y
        return Out(x, add_aux(a.aux, m.aux), a.values, m.counts)


def make_block(cfg: Config, layer: int, attend: Callable) -> Block:
    """The one place where a layer's form is chosen."""
    if cfg.residual.lanes_on and layer >= cfg.lanes_start:
        return LaneBlock(cfg, layer, attend)
    return Block(cfg, layer, attend)


class Ahead(nn.Module):
    """Heads for the tokens after the next one; they shape the hidden states and do not ship (record 549)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        tag = Tag(Absent(), "head", "none")
        self.heads = nn.ModuleList(
            Proj(cfg.model.dim, cfg.model.vocab, tag, zero=True) for _ in range(cfg.ahead.heads)
        )

    def forward(self, hidden: Tensor, targets: Tensor, docs: Tensor | None, loss_of: Callable) -> Tensor:
        """Sum of the nats of all targets 2, 3, ... tokens ahead inside the segment, over heads times B*T."""
        found, loss = segment_numbers(targets, docs), 0.0
        for k, head in enumerate(self.heads, 1):
            near, far = hidden[:, :-k].flatten(0, 1), targets[:, k:].flatten()
            nll, _ = loss_of(near, head.weight, far)
            loss = loss + (nll * (found[:, :-k] == found[:, k:]).flatten()).sum()
        return loss / (targets.numel() * len(self.heads))


def segment_numbers(tokens: Tensor, docs: Tensor | None) -> Tensor:
    """(B,T) -> (B,T): which segment each position belongs to; all the same where there is none."""
    if docs is None:
        return torch.zeros_like(tokens)
    at = torch.arange(tokens.numel(), dtype=docs.dtype, device=docs.device)
    return torch.searchsorted(docs, at, right=True).view_as(tokens)


class GPT(nn.Module):
    """The transformer of the challenge: the naive baseline's (frontier 2.12) and, by knobs, the records'."""

    def __init__(self, cfg: Config, world: World) -> None:
        super().__init__()
        self.cfg = cfg
        gpu = cfg.compute.device == "cuda" and not cfg.run.forecast
        self.attention_name, attend = pick_attention(
            world.device, world.dtype, world.compiling, cfg.data.packing, gpu, cfg.compute.attention
        )
        self.loss_name, self.loss_of = pick_loss(cfg, world.device, world.compiling)
        self.embed = Embed(cfg, world.dtype)
        self.blocks = nn.ModuleList(make_block(cfg, i, attend) for i in range(cfg.model.layers))
        skips = max(layer_plan(cfg, n).skips for n in (0, cfg.loop.count))
        self.skip_weights = nn.Parameter(torch.ones(skips, cfg.model.dim))
        self.tags = {"skip_weights": Tag(Half(), "scalar")}
        if cfg.residual.skip_gates:
            self.skip_gates = nn.Parameter(torch.zeros(skips, cfg.model.dim))
            self.tags["skip_gates"] = Tag(Half(), "scalar")
        if cfg.input.smear:
            self.smear = Smear(cfg)
        if cfg.input.bigram_on:
            self.bigram = BigramHash(cfg)
        if cfg.input.values:
            self.value_table = ValueTable(cfg)
        if not cfg.model.tied:
            tag = Tag(embed_codec(cfg), "head", "embed")
            self.head = Proj(cfg.model.embed_width, cfg.model.vocab, tag, zero=True)
        if cfg.model.vocab_bias:
            self.vocab_bias = nn.Parameter(torch.zeros(cfg.model.vocab))
            self.tags["vocab_bias"] = Tag(Half(), "scalar")
        if cfg.ahead.on:
            self.ahead = Ahead(cfg)
        if cfg.moe.on:  # given a device, since a model is also made without memory; it does not ship
            size = (cfg.model.layers - cfg.experts_start, cfg.moe.experts)
            even = torch.full(size, 1.0 / cfg.moe.experts, device=world.device)
            self.register_buffer("shares", even, persistent=False)

    def forward(self, ctx: Ctx, targets: Tensor) -> tuple[Tensor, Out]:
        """Nats of every target (B,T) in float32, and the hidden states with their auxiliary losses."""
        out = self.hidden(ctx)
        read, weight, bias = self.head_reads(out.y, ctx.phase)
        nll, lse = self.loss_of(read.flatten(0, 1), weight, targets.flatten(), bias)
        if self.cfg.model.z_loss > 0:
            out = out._replace(aux=add_aux(out.aux, {"z": lse.square().mean()}))
        return nll.view(targets.shape), out

    def head_reads(self, y: Tensor, phase: Phase) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states (...,D): what meets the head (...,E), its weight (V,E), and its bias (V,) if any."""
        weight = self.embed.effective(phase) if self.cfg.model.tied else self.head.effective(phase)
        bias = gain(self.vocab_bias, phase) if self.cfg.model.vocab_bias else None
        return self.embed.out(y, phase) if self.cfg.model.embed_dim else y, weight, bias

    def logits(self, y: Tensor, phase: Phase) -> Tensor:  # (N,D) -> (N,V)
        form = Form(self.cfg.model.softcap, self.cfg.model.curve)
        return final_logits(*self.head_reads(y, phase), form)

    def hidden(self, ctx: Ctx) -> Out:
        """Embed, go down the encoder, come up the decoder with skips, normalise: (B,T) -> (B,T,D)."""
        x0 = self.enter(ctx)
        x = x0.view_as(x0)  # another object: a graph is specialised on inputs being one and the same
        plan, kept, aux, ctx = layer_plan(self.cfg, ctx.phase.loops), [], NO_AUX, self.filled(ctx, x)
        calls: list[tuple[int, Tensor]] = []
        for j, layer in enumerate([*plan.encoder, *plan.decoder], -len(plan.encoder)):
            if 0 <= j < plan.skips:
                x = self.skip((j, layer), x, kept[-1 - j], ctx.phase)
            out, ctx = self.visit(layer, x, x0, ctx)
            x, aux = out.y, add_aux(aux, out.aux)
            if j < 0:  # still on the way down
                kept.append(x)
            if self.cfg.moe.on:
                calls.append((layer, out.counts))
        if self.cfg.moe.on:
            return Out(norm(self.read_out(x)), *self.tally(aux, calls))
        return Out(norm(self.read_out(x)), aux)

    def tally(self, aux: dict[str, Tensor], calls: list[tuple[int, Tensor | None]]) -> tuple:
        """Balance as the mean of all calls of experts; how often each was taken (layers,E), by all calls."""
        calls = [(layer, counts) for layer, counts in calls if counts is not None]
        layers = range(self.cfg.experts_start, self.cfg.model.layers)
        rows = [sum(counts for at, counts in calls if at == layer) for layer in layers]
        return aux | {"balance": aux["balance"] / len(calls)}, None, torch.stack(rows)

    def enter(self, ctx: Ctx) -> Tensor:
        """(B,T) -> (B,T,D), normalised."""
        e = self.embed(ctx)
        if self.cfg.input.bigram_on:
            e = e + self.bigram(ctx, starts_of(ctx), e.dtype)
        if self.cfg.input.smear:
            e = self.smear(e, starts_of(ctx), ctx.phase)
        return norm(e)

    def filled(self, ctx: Ctx, x: Tensor) -> Ctx:
        """With what all blocks read alike."""
        if self.cfg.data.packing and ctx.docs is not None:  # the one shape that varies is their number
            torch._dynamo.mark_dynamic(ctx.docs, 0)
        base = self.cfg.model.rope_base
        if self.cfg.attn.rope_ntk and ctx.longest > self.cfg.data.seq_len:
            stretch = ctx.longest / self.cfg.data.seq_len
            base = base * stretch ** (self.cfg.rope_dims / (self.cfg.rope_dims - 2))
        slowness = 1.0
        if self.cfg.attn.rope_type == "yarn":
            stretch = self.cfg.attn.yarn_len / self.cfg.data.seq_len
            slowness = yarn_slowness(self.cfg.rope_dims, stretch, x)
        ctx = ctx._replace(rope=rope_table(x.shape[1], self.cfg.rope_dims, base, x, slowness))
        if self.cfg.moe.on:
            ctx = ctx._replace(routing=torch.full((), ctx.phase.routing, device=x.device))
        return ctx._replace(table=self.value_table(ctx, x.dtype)) if self.cfg.input.values else ctx

    def visit(self, layer: int, x: Tensor, x0: Tensor, ctx: Ctx) -> tuple[Out, Ctx]:
        """One block, told its own scalars as tensors: as numbers each would be a graph of its own."""
        if self.cfg.residual.ln_scale:
            ctx = ctx._replace(scale=x.new_full((), (layer + 1) ** -0.5))
        if self.cfg.moe.on and layer >= self.cfg.experts_start:
            ctx = ctx._replace(shares=self.shares[layer - self.cfg.experts_start])
        out = self.blocks[layer](x, x0, ctx)
        if self.cfg.attn.value_residual and ctx.first is None:
            ctx = ctx._replace(first=out.values)
        return out, ctx

    def skip(self, at: tuple[int, int], x: Tensor, kept: Tensor, phase: Phase) -> Tensor:
        """x before a layer, with what the encoder gives this step of the decoder; at is (step, layer)."""
        s = gain(self.skip_weights[at[0]], phase).to(kept.dtype) * kept
        if self.cfg.residual.skip_gates:
            return torch.lerp(s, x, torch.sigmoid(gain(self.skip_gates[at[0]], phase)).to(s.dtype))
        return x + s

    def read_out(self, x: Tensor) -> Tensor:
        """(B,T,D), what the last layer leaves."""
        return x


class LaneGPT(GPT):
    """A GPT whose layers from `cfg.lanes_start` on run in two lanes, x (2,B,T,D): attention's and the MLP's.

    Both begin as what comes in, skips join the first (record 1855; frontier 2.9).
    """

    def __init__(self, cfg: Config, world: World) -> None:
        super().__init__(cfg, world)
        # a row for every layer, as published: layers with one lane leave theirs alone
        self.parallel_resid_lambdas = nn.Parameter(torch.full((cfg.model.layers, 2), 1.1))
        self.parallel_post_lambdas = nn.Parameter(torch.ones(cfg.model.layers, 2, 2))
        names = ("parallel_resid_lambdas", "parallel_post_lambdas")
        self.tags |= dict.fromkeys(names, Tag(Half(), "scalar"))

    def split(self, layer: int, x: Tensor) -> Tensor:
        """Two lanes where the layer wants them and there is one."""
        return torch.stack([x, x]) if layer >= self.cfg.lanes_start and x.ndim == 3 else x

    def visit(self, layer: int, x: Tensor, x0: Tensor, ctx: Ctx) -> tuple[Out, Ctx]:
        if layer >= self.cfg.lanes_start:
            rows = (self.parallel_resid_lambdas[layer], self.parallel_post_lambdas[layer])
            ctx = ctx._replace(lanes=tuple(gain(row, ctx.phase) for row in rows))
        return super().visit(layer, self.split(layer, x), x0, ctx)

    def skip(self, at: tuple[int, int], x: Tensor, kept: Tensor, phase: Phase) -> Tensor:
        x = self.split(at[1], x)
        if x.ndim == 3:
            return super().skip(at, x, kept, phase)
        return torch.stack([super().skip(at, x[0], kept, phase), x[1]])

    def read_out(self, x: Tensor) -> Tensor:
        """Of the lanes their mean or one of them."""
        if self.cfg.residual.final_lane == "mean":
            return x.mean(0)
        return x[0] if self.cfg.residual.final_lane == "attn" else x[1]


def new_model(cfg: Config, world: World) -> GPT:
    """The one place where the model's form is chosen."""
    return LaneGPT(cfg, world) if cfg.residual.lanes_on else GPT(cfg, world)


def make_model(cfg: Config, world: World) -> GPT:
    """A freshly initialised model on the world's device, equal on every rank and on every device type.

    Weights are drawn on the CPU, in order of declaration.
    """
    torch.manual_seed(cfg.budget.seed)
    model = new_model(cfg, world)
    if cfg.model.init != "uniform":
        start_otherwise(model, cfg)
    if cfg.ternary.calibrates:
        for m in ternary_modules(model):
            m.grid = torch.tensor([0.5, 1.0])  # which changes nothing yet
    if cfg.ternary.noise:
        for i, m in enumerate(ternary_modules(model)):
            shape = m.tags["weight"].codec.grouped(tuple(m.weight.shape))
            m.jitter = Jitter(shape, cfg.ternary.noise, cfg.budget.seed * 1_000_003 + i, world.device)
    return model.to(world.device)


def ternary_modules(model: nn.Module) -> list[Weighted]:
    """Whose weight ships as trits, in order of declaration."""
    weighted = (m for m in model.modules() if isinstance(m, Weighted))
    return [m for m in weighted if isinstance(m.tags["weight"].codec, Ternary)]


def grids_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> grid, of the weights that have one."""
    weighted = {f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, Weighted)}
    return {name: m.grid for name, m in weighted.items() if m.grid is not None}


@torch.no_grad()
def start_otherwise(model: GPT, cfg: Config) -> None:
    """What neither begins at zero nor ends a branch: orthogonal of gain 1 (frontier 2.1), or normal."""
    for proj in (m for m in model.modules() if isinstance(m, (Proj, Bank))):
        if isinstance(proj, (OutProj, OutBank)) or not proj.weight.any():
            continue
        for matrix in matrices_of(proj.weight):
            if cfg.model.init == "orthogonal":
                nn.init.orthogonal_(matrix)
            else:
                matrix.normal_(0.0, cfg.model.init_std)


def matrices_of(t: Tensor) -> list[Tensor]:
    """A matrix, or those of a bank of experts (E,R,C)."""
    return [t] if t.ndim == 2 else [t[e] for e in range(len(t))]


def empty_model(cfg: Config, world: World) -> GPT:
    """The model's shape without its memory, for counting and planning."""
    with torch.device("meta"):
        return new_model(cfg, world)


def param_tags(model: nn.Module) -> dict[str, Tag]:
    """Full parameter name -> Tag, in order of declaration. KeyError where a module forgot to declare one."""
    return {
        f"{path}.{name}" if path else name: module.tags[name]
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }


def param_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def activation_bytes(cfg: Config, world: World) -> int:
    """Bytes that one micro-batch keeps for its backward, counted on the meta device without running it."""
    kept: dict[int, Tensor] = {}  # by storage: a tensor saved by two operators is kept once

    def note(t: Tensor) -> Tensor:
        if not t.requires_grad or t.grad_fn is not None:  # weights are counted elsewhere
            kept[t.untyped_storage()._cdata] = t
        return t

    rows = cfg.data.span * cfg.data.spans // (micro_batches(cfg, world.size) * world.size * cfg.data.seq_len)
    tokens = torch.zeros(max(rows, 1), cfg.data.seq_len, dtype=torch.int64, device="meta")
    ctx = Ctx(tokens, None, cfg.data.seq_len, final_phase(cfg)._replace(extra=cfg.moe.extra))
    nowhere = dataclasses.replace(world, device=torch.device("meta"))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        empty_model(cfg, nowhere).hidden(ctx)
    loss, item = pick_loss(cfg, world.device, False)[0], world.dtype.itemsize
    logits = loss_bytes(loss, tokens.numel(), cfg.model.vocab, item, world.device.type == "cuda")
    return sum(t.untyped_storage().nbytes() for t in kept.values()) + logits


# ======================================================================================
# 15. Speed -- compiler, arithmetic and kernels that suit this machine
# uses: Config Schedule World Kernels Layers Model
# ======================================================================================


def make_fast(model: GPT, world: World) -> GPT:
    """Compile the blocks in place (one code object, one graph for all layers) and the loss's inner step.

    In place keeps state_dict's names; regional compilation makes depth recurrence free (compile notes 1).
    COMPILE_MODE is spelled out in options, because torch.compile takes a mode or options. Its modes with
    CUDA graphs are not offered: what autograd keeps as `p.grad` is a graph's output, and the replay for the
    next micro-batch invalidates or overwrites it (pytorch issues 169545: an error, 96693: wrong sums).
    """
    plain = world.device.type != "cpu" and model.attention_name == "sdpa"
    if model.cfg.data.packing and world.compiling and plain:
        raise UserError(
            "DOC_PACKING=1 finds no kernel for documents of any length here: want DTYPE=bfloat16 and "
            "flash-attn or torch >= 2.10, or ATTENTION=flex; or set COMPILE=0, which is slow"
        )
    if world.compiling:
        # kinds x qat x grad x shape; 8 is a hard error with fullgraph
        torch._dynamo.config.recompile_limit = 64
        options = {}
        if model.cfg.compute.compile_mode != "default":
            options |= torch._inductor.list_mode_options(model.cfg.compute.compile_mode)
        if model.cfg.quantises:
            # inductor leaves out a rounding to float16 and back, as in a codec's scale, unless told not to
            options |= {"emulate_precision_casts": True}
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False, options=options)
    return model


def compile_failure(work: Callable[[], object]) -> str:
    """Do what compiles; the reason in one line where that failed, else nothing.

    The compiler raises RuntimeErrors of many kinds, and so do programs with a fault, which will meet it
    again uncompiled. A full memory is no such reason: without compilation it would be fuller.
    """
    kinds = [RuntimeError, OSError]
    with contextlib.suppress(ImportError):
        from triton.errors import TritonError

        kinds.append(TritonError)
    try:
        work()
    except torch.OutOfMemoryError:
        raise
    except tuple(kinds) as e:
        text = " ".join(f"{type(e).__name__}: {e}".split()).partition(" Set TORCHDYNAMO_VERBOSE")[0]
        return text if len(text) <= 240 else text[:240] + "..."
    return ""


def eagerly(reason: str, cfg: Config, world: World) -> World:
    """The world that goes on without compilation. Raises UserError where it was asked for."""
    if cfg.compute.compiling == "1" or cfg.run.precompile:
        asked = "COMPILE=1" if cfg.compute.compiling == "1" else "PRECOMPILE=1"
        raise UserError(
            f"{asked}, but compilation fails: {reason}; mend that, or set COMPILE=0, which is slow"
        )
    world.log(
        f"compile: fell back to eager: {reason}; expect about 1.7 times the step time (bfloat16 on a CPU; "
        f"not measured on CUDA)"
    )
    return dataclasses.replace(world, compiling=False, fallback=reason)


def probe(cfg: Config, world: World, dtype: torch.dtype, compiling: bool) -> float:
    """Seconds for forward and backward of one block at the run's own micro-batch, best of two."""
    trial = dataclasses.replace(world, dtype=dtype, compiling=compiling)
    model = make_fast(make_model(cfg, trial), trial)
    tokens = torch.zeros(max(1, 2048 // cfg.data.seq_len), cfg.data.seq_len, dtype=torch.int64)
    x = torch.randn(*tokens.shape, cfg.model.dim, dtype=dtype, requires_grad=True)
    ctx, seconds = model.filled(Ctx(tokens, None, cfg.data.seq_len, final_phase(cfg)), x), []
    deadline = time.perf_counter() + 0.5 + 60 * compiling
    for trial_number in range(4):
        begin = time.perf_counter()
        model.visit(0, x, x, ctx)[0].y.float().square().mean().backward()
        seconds.append(time.perf_counter() - begin)
        if trial_number and time.perf_counter() > deadline:
            break
    return min(seconds[1:])


def choose_speed(cfg: Config, world: World) -> World:
    """Fill in the world's dtype and compile setting; on a CPU `auto` is decided by measurement."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if cfg.compute.device == "cuda" or world.device.type == "cuda":
        old = torch.cuda.get_device_capability(world.device)[0] < 8
        if old and cfg.compute.dtype != "float32":
            world.log("dtype:float32 this device has no bfloat16 arithmetic (compute capability below 8.0)")
        dtype = torch.float32 if old else dtypes.get(cfg.compute.dtype, torch.bfloat16)
        return dataclasses.replace(world, dtype=dtype, compiling=cfg.compute.compiling != "0")
    if FOLDED and cfg.compute.compiling != "1":  # a built program runs here for its proof alone
        return dataclasses.replace(world, dtype=dtypes.get(cfg.compute.dtype, torch.float32), compiling=False)
    dtype, compiling, why = world.share(lambda: measured_choice(cfg, world, dtypes))
    return dataclasses.replace(world, dtype=dtypes[dtype], compiling=compiling, fallback=why)


def measured_choice(cfg: Config, world: World, dtypes: dict[str, torch.dtype]) -> tuple[str, bool, str]:
    """(dtype name, compile or not, why it cannot) for this CPU. Compilation wants a C++ compiler."""
    kinds = [cfg.compute.dtype] if cfg.compute.dtype != "auto" else list(dtypes)
    modes, why = [cfg.compute.compiling == "1"] if cfg.compute.compiling != "auto" else [False, True], ""
    if True in modes and not any(shutil.which(c) for c in ("g++", "clang++", "c++")):
        if modes == [True]:
            raise UserError(
                "COMPILE=1 wants a C++ compiler on a CPU, and neither g++ nor clang++ is on the PATH; "
                "install one or set COMPILE=0"
            )
        why = "no C++ compiler on the PATH"
        world.log(f"compile:0 {why}")
        modes = [False]
    if len(kinds) * len(modes) == 1:
        return kinds[0], modes[0], why
    seconds: dict[tuple[str, bool], float] = {}

    def measure() -> None:
        seconds.update({(k, c): probe(cfg, world, dtypes[k], c) for k in kinds for c in modes})

    if True in modes and (why := compile_failure(measure)):
        eagerly(why, cfg, world)
        modes = [False]
    if modes == [False]:
        measure()
    return *fastest(seconds, world), why


def fastest(seconds: dict[tuple[str, bool], float], world: World) -> tuple[str, bool]:
    best = min(seconds, key=seconds.get)
    world.log(
        "cpu_probe:"
        + " ".join(f"{k}_{'compiled' if c else 'eager'}:{s * 1000:.1f}ms" for (k, c), s in seconds.items())
        + f" chosen:{best[0]}_compile{int(best[1])}"
    )
    return best


def unlike(fast: Callable, plain: Callable, inputs: list[Tensor]) -> str:
    """Why `fast` cannot stand for `plain` here, or nothing: results and gradients, to 1 % of their norm."""
    if not has_triton():
        return "triton is not installed"
    from triton.errors import TritonError

    sides = []
    try:
        for function, dtype in ((fast, inputs[0].dtype), (plain, torch.float32)):
            leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
            y = function(*leaves)
            sides.append([y, *torch.autograd.grad(y.float().square().mean(), leaves)])
    except (TritonError, RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[-1]}"
    pairs = zip(*([t.detach().float() for t in side] for side in sides), strict=True)
    worst = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return "" if worst <= 0.01 else f"its results are off by {worst:.3g} of their norm"


def failing_kernels(model: GPT, cfg: Config, world: World) -> dict[str, str]:
    """Knob -> what is wrong with its kernel on this device, of those that the run would use."""
    random = torch.Generator(world.device).manual_seed(0)
    width, narrow = cfg.model.dim, cfg.model.embed_width

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=world.device).to(world.dtype)

    tried = {}
    if cfg.fuses_ce:
        targets = torch.arange(384, device=world.device) % cfg.model.vocab
        both = model.loss_of, tanh_alone(softcapped_nll_ref, cfg.model.softcap)
        forms = [lambda hidden, weight, f=f: f(hidden, weight, targets)[0] for f in both]
        inputs = [3.0 * draw(384, narrow), draw(cfg.model.vocab, narrow) / width**0.5]
        tried["FUSED_CE_ENABLED"] = unlike(*forms, inputs)
    if cfg.fuses_mlp and world.dtype == torch.bfloat16:
        forms = [functools.partial(f, slope=cfg.model.slope) for f in (squared_mlp(), squared_mlp_ref)]
        inputs = [draw(384, width), draw(cfg.model.hidden, width), draw(width, cfg.model.hidden)]
        tried["FUSED_MLP"] = unlike(*forms, inputs)
    return {name: why for name, why in tried.items() if why}


def settle_kernels(model: GPT, cfg: Config, world: World) -> None:
    """Hold each Triton kernel against its plain form on this device; do without one that fails, aloud."""
    if FOLDED or world.device.type != "cuda":  # a built program has been a run before
        return
    failed = world.share(lambda: failing_kernels(model, cfg, world))
    for name, why in failed.items():
        world.log(f"kernel_left_out: {name} ({why}); the plain form runs instead, {name}=0 asks for it")
    if "FUSED_CE_ENABLED" in failed:
        loss = functools.partial(softcapped_nll, fast=world.compiling)
        model.loss_name, model.loss_of = "chunked", tanh_alone(loss, cfg.model.softcap)
    if "FUSED_MLP" in failed:
        for block in model.blocks:
            block.mlp.fused = None


# ======================================================================================
# 16. Objective -- weighted sum of losses by name
# uses: Config Data Layers Model Schedule
# ======================================================================================


@of_config
def loss_weights(cfg: Config) -> dict[str, float]:
    """Weight of each loss in the total. A loss without a row here is a KeyError, not a silence."""
    return {"nll": 1.0, "ahead": cfg.ahead.weight, "z": cfg.model.z_loss, "balance": cfg.moe.balance}


def objective(model: GPT, batch: Batch, phase: Phase, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """(total, unweighted terms): means over the batch, in nats per token where they are likelihoods.

    With experts the terms hold beside the losses `counts` (L,E), how often each was taken.
    """
    nll, out = model(Ctx(batch.tokens, batch.docs, cfg.data.seq_len, phase), batch.targets)
    terms = {"nll": nll.mean(), **out.aux}
    if cfg.ahead.on:
        terms["ahead"] = model.ahead(out.y, batch.targets, batch.docs, model.loss_of)
    weights = loss_weights(cfg)
    total = sum(weights[name] * loss for name, loss in terms.items())
    if cfg.moe.on:
        terms["counts"] = out.counts
    return total, terms


# ======================================================================================
# 17. Optimizer -- Muon for matrices, Adam for the rest, both grouped by tag
# uses: Config Schedule World Kernels Model
# ======================================================================================


KINDS = ("muon", "embed", "head", "scalar", "other", "router", "diagonal")  # rows of optimizer_table
REFERENCE_WIDTH = 512  # LR_WIDTH_SCALING is 1 here: the published rates were found at this MODEL_DIM

# Slope, cubic and quintic coefficient of each iteration, best for singular values down to about 1e-3 (Amsel
# et al., 2025: The Polar Express); the constants of record 1855.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g: Tensor, steps: int) -> Tensor:
    """(S,R,C) -> the nearest semi-orthogonal matrices, roughly: quintic Newton-Schulz (Jordan, Muon, 2024).

    The coefficients maximise the slope at zero, and leave singular values in [0.47, 1.21].
    """
    return newton_schulz(g, [(3.4445, -4.7750, 2.0315)] * steps)


def polar_express(g: Tensor, steps: int) -> Tensor:
    """The same by POLAR_EXPRESS, whose last row goes on where there are more steps; leaves [0.85, 1.15]."""
    return newton_schulz(g, [POLAR_EXPRESS[min(i, len(POLAR_EXPRESS) - 1)] for i in range(steps)])


def newton_schulz(g: Tensor, coefficients: list[tuple[float, float, float]]) -> Tensor:
    """(S,R,C) -> matrices whose singular values s went through s <- a s + b s^3 + c s^5, iteration by
    iteration, from norm 1 on."""
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in coefficients:
        s = x @ x.mT  # then a x + (b s + c s s) x, in two products that add: each sum is rounded once
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@of_config
def matrix_rate(cfg: Config) -> float:
    return cfg.optim.matrix_lr * (REFERENCE_WIDTH / cfg.model.dim if cfg.optim.width_scaling else 1.0)


@of_config
def optimizer_table(cfg: Config) -> dict[str, tuple[str, float, float]]:
    """Kind of parameter -> (algorithm, rate, weight decay), both at a phase's factor 1 (SKC notes 3.2).

    scalar: gains, scales, what is mixed with what. other: weights and biases of gates. router: routers, and
    gains of experts, never decayed. diagonal: of a recurrence that must not grow, see `keep_diagonals`.
    """
    matrices, scales = "adam", cfg.optim.scalar_lr * cfg.optim.scales_mult
    if cfg.optim.matrices == "muon":
        coefficients = "polar_express" if cfg.optim.polar_express else "newton_schulz"
        matrices = f"muon{'+row_norm' * cfg.optim.row_normalize}+{coefficients}x{cfg.optim.ns_steps}"
    tied = cfg.optim.tied_embed_lr * cfg.optim.head_mult
    return {
        "muon": (matrices, matrix_rate(cfg), cfg.optim.muon_wd),
        "embed": ("adam", tied if cfg.model.tied else cfg.optim.embed_lr, cfg.optim.embed_wd),
        "head": ("adam", cfg.optim.head_lr * cfg.optim.head_mult, cfg.optim.embed_wd),
        "scalar": ("adam", scales, cfg.optim.adam_wd if cfg.optim.wd_of_scales else 0.0),
        "other": ("adam", cfg.optim.scalar_lr, cfg.optim.adam_wd),
        "router": ("adam", scales, 0.0),
        "diagonal": ("adam", 0.01, 0.0),
    }


class Stack(NamedTuple):
    """Matrices of one shape, in an order that all ranks know; each rank orthogonalises a share of them."""

    names: list[str]
    owners: list[nn.Parameter]  # which have the gradients
    params: list[Tensor]  # the matrices, live: parameters, or of a bank of experts each by itself
    padding: Tensor  # (P,R,C) zeros: so many more, and the ranks divide the stack
    momentum: Tensor  # (share,R,C), of this rank's


def muon_update(
    momentum: Tensor, grads: Tensor, beta: Tensor, ok: Tensor, cfg: Config, dtype: torch.dtype
) -> Tensor:
    """(S,R,C): the orthogonal part of the update, with Nesterov's momentum, which moves where `ok` is True.

    Compiled it is one graph for each shape; beta is a 0-d tensor, since a number would be a graph each.
    """
    new = momentum * beta + grads
    update = grads + beta * new
    if cfg.moe.on:  # an expert that no token took rests: its momentum stays, and does not move it
        ok = ok & (grads.norm(dim=(-2, -1), keepdim=True) > cfg.optim.active_norm)
        update = update * ok
    torch.where(ok, new, momentum, out=momentum)
    if cfg.optim.row_normalize:  # MuonEq-R (record 1855)
        update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
    if cfg.optim.polar_express:
        return polar_express(update.to(dtype), cfg.optim.ns_steps)
    return orthogonalize(update.to(dtype), cfg.optim.ns_steps)


class Muon:
    """Momentum, then orthogonalisation; matrices of one shape go through it as one batch, shared by ranks.

    A bank of experts is as many matrices, `name.0`, `name.1`, ... `ok` is a 0-d bool tensor: where it is
    False nothing changes, without asking the host.
    """

    def __init__(self, params: dict[str, nn.Parameter], cfg: Config, world: World) -> None:
        self.cfg, self.world, self.rate = cfg, world, matrix_rate(cfg)
        self.names = [matrix for name, p in params.items() for matrix in matrix_names(name, p)]
        shapes: dict[tuple, dict[str, nn.Parameter]] = {}
        for name, p in params.items():
            shapes.setdefault(tuple(p.shape[-2:]), {})[name] = p
        stacks = [self.stack(members) for members in shapes.values()]
        self.stacks = sorted(stacks, key=lambda s: -len(s.names) * s.params[0].numel())  # largest first

    @torch.no_grad()
    def stack(self, members: dict[str, nn.Parameter]) -> Stack:
        names = [matrix for name, p in members.items() for matrix in matrix_names(name, p)]
        params = [matrix for p in members.values() for matrix in matrices_of(p)]
        share = -(-len(names) // self.world.size)
        padding = params[0].new_zeros(share * self.world.size - len(names), *params[0].shape)
        momentum = params[0].new_zeros(share, *params[0].shape)
        return Stack(names, list(members.values()), params, padding, momentum)

    def share_gradients(self) -> list[tuple[Tensor, Pending]]:
        """Start averaging the gradients; of each stack, the share (share,R,C) that will be here."""
        grads = [[g for p in stack.owners for g in matrices_of(p.grad)] for stack in self.stacks]
        return [
            self.world.mean_share_later(torch.stack([*found, *stack.padding]))
            for found, stack in zip(grads, self.stacks, strict=True)
        ]

    def update(self, stack: Stack, grads: Tensor, phase: Phase, ok: Tensor) -> Tensor:
        """(share,R,C): what the gradients make of this rank's matrices, before rate and shape."""
        move = compiled_once(muon_update) if self.world.compiles_updates else muon_update
        beta = grads.new_full((), phase.momentum)
        return move(stack.momentum, grads, beta, ok, self.cfg, self.world.dtype)

    def apply(self, stack: Stack, update: Tensor, phase: Phase, ok: Tensor) -> None:
        """Decay and move all matrices of a stack, by the updates (S,R,C) of all ranks.

        With experts those whose update is nothing do not decay: they rest, on whichever rank that was found.
        """
        rows, cols = update.shape[1:]
        if self.cfg.optim.muon_wd > 0:
            decay = phase.lr * self.rate * self.cfg.optim.muon_wd * phase.decay
            kept = 1.0 - decay * ok
            if self.cfg.moe.on:
                kept = list((1.0 - decay * (ok & update.any(-1).any(-1)))[: len(stack.params)].unbind())
            torch._foreach_mul_(stack.params, kept)
        rate = phase.lr * self.rate * max(1.0, rows / cols) ** 0.5
        moves = update[: len(stack.params)].float().mul_(rate).masked_fill_(~ok, 0.0)
        torch._foreach_sub_(stack.params, list(moves.unbind()))

    def state(self) -> dict[str, Tensor]:
        """Momentum by name, whole on every rank: alone the live tensors, else copies of what ranks hold."""
        found = {}
        for stack in self.stacks:
            whole, pending = self.world.gather_later(stack.momentum)
            pending.wait()
            found |= zip(stack.names, whole.unbind(), strict=False)  # the padding has no name
        return {name: found[name] for name in self.names}

    def restore(self, saved: dict[str, Tensor], prefix: str) -> None:
        """Take this rank's share of the momentum that some number of ranks saved."""
        for stack in self.stacks:
            share = len(stack.momentum)
            mine = stack.names[self.world.rank * share : (self.world.rank + 1) * share]
            for name, live in zip(mine, stack.momentum, strict=False):
                live.copy_(saved[prefix + name])


def matrix_names(name: str, p: Tensor) -> list[str]:
    """The name of a matrix, or of each of a bank of experts."""
    return [name] if p.ndim == 2 else [f"{name}.{e}" for e in range(len(p))]


class Gradients(NamedTuple):
    """What ranks have averaged: Muon's by shares, a tensor (share,R,C) a stack; the others whole."""

    norm: Tensor  # 0-d float32, of the whole averaged gradient; equal on all ranks
    shares: list[Tensor]
    whole: list[Tensor]  # the live `p.grad`


class Optimizer:
    """All parameter groups of a model. Rates come from the phase at every step, never from a stored group.

    Every rank holds all weights and Adam's moments, and a share of Muon's momentum (frontier 5.4). A
    parameter without gradient is still moved by Adam's moments and decay: routers, of which each row has
    one through the softmax, lose nothing by it, experts would, of whose gains a few steps are no matter.
    """

    def __init__(self, model: GPT, cfg: Config, world: World) -> None:
        self.world, self.groups, self.cfg = world, group_params(model), cfg
        table = optimizer_table(cfg)
        self.rules = {kind: table[kind] for kind in self.groups}
        self.rates = {kind: rate for kind, (_, rate, _) in self.rules.items()}
        kinds = [kind for kind, (algorithm, _, _) in self.rules.items() if algorithm == "adam"]
        self.muon = Muon(self.groups["muon"] if "muon" not in kinds else {}, cfg, world)
        rows = [
            {"params": [*self.groups[k].values()], "kind": k, "weight_decay": self.rules[k][2]} for k in kinds
        ]
        betas = (cfg.optim.beta1, cfg.optim.beta2)
        self.adam = torch.optim.AdamW(rows, lr=0.0, betas=betas, eps=cfg.optim.eps, fused=True)
        self.adam.grad_scale = None
        # embedding, head, then the others as they were declared: the norm's last bits depend on the order
        place = {n: {"embed": 0, "head": 1}.get(k, 2) for k in kinds for n in self.groups[k]}
        params = [(n, p) for n, p in model.named_parameters() if n in place]
        self.whole = [p for _, p in sorted(params, key=lambda item: place[item[0]])]

    @torch.no_grad()
    def step(self, gradients: Gradients, phase: Phase, ok: Tensor) -> None:
        """One update of every group, or of none where `ok` (0-d bool) is False.

        While the updates of one shape travel, the next is orthogonalised, and at the end Adam steps: it
        cannot step sooner, because `ok` and the clipping want the norm of all gradients.
        """
        travelling: deque[tuple[Stack, Tensor, Pending]] = deque()
        for stack, grads in zip(self.muon.stacks, gradients.shares, strict=True):
            update = self.muon.update(stack, grads, phase, ok)
            travelling.append((stack, *self.world.gather_later(update)))
            if len(travelling) > 1:
                self.land(travelling.popleft(), phase, ok)
        for group in self.adam.param_groups:
            group["lr"] = phase.lr * self.rates[group["kind"]]
            if self.cfg.optim.matrices == "adamw" and group["kind"] == "muon":
                group["weight_decay"] = self.rules["muon"][2] * phase.decay
        self.adam.found_inf = (~ok).float()  # torch's own switch for a step that must not happen
        self.adam.step()
        if travelling:
            self.land(travelling.popleft(), phase, ok)
        keep_diagonals(self.groups.get("diagonal", {}), ok)

    def land(self, travelled: tuple[Stack, Tensor, Pending], phase: Phase, ok: Tensor) -> None:
        stack, update, pending = travelled
        pending.wait()
        self.muon.apply(stack, update, phase, ok)

    def state(self) -> dict[str, Tensor]:
        """Every tensor by name, for a checkpoint; the live ones, but for Muon's on several ranks."""
        out = {f"muon.{name}": t for name, t in self.muon.state().items()}
        for kind, members in self.groups.items():
            for name, p in members.items():
                out |= {f"{kind}.{name}.{key}": t for key, t in self.adam.state.get(p, {}).items()}
        return out

    def prime(self) -> None:
        """Make Adam allocate its moments without moving anything, so that `state` is whole before step 0."""
        for group in self.adam.param_groups:
            for p in group["params"]:
                moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                self.adam.state[p] = {"step": torch.zeros((), device=p.device), **moments}

    def table(self) -> list[str]:
        """Lines for the log: who trains what, at which rate and decay."""
        return [
            f"optimizer_group:{kind} algorithm:{algorithm} lr:{rate:g} wd:{decay:g} "
            f"tensors:{len(self.groups[kind])} params:{sum(p.numel() for p in self.groups[kind].values())}"
            for kind, (algorithm, rate, decay) in self.rules.items()
        ]


def group_params(model: GPT) -> dict[str, dict[str, nn.Parameter]]:
    """Optimizer kind -> {name: parameter}: disjoint and complete, asserted. KeyError for a new kind."""
    groups: dict[str, dict[str, nn.Parameter]] = {kind: {} for kind in KINDS}
    params = dict(model.named_parameters())
    for name, tag in param_tags(model).items():
        groups[tag.optim][name] = params[name]
    assert sorted(n for g in groups.values() for n in g) == sorted(params), (
        "a parameter is in no group or in two"
    )
    assert all(p.ndim in (2, 3) for p in groups["muon"].values()), "Muon orthogonalises matrices only"
    return {kind: members for kind, members in groups.items() if members}


@torch.no_grad()
def keep_diagonals(members: dict[str, nn.Parameter], ok: Tensor) -> None:
    """Into +-0.999 after a step that happened: at 1 a state would never fade, beyond it would grow."""
    for p in members.values():
        p.copy_(torch.where(ok, p.clamp(-0.999, 0.999), p))


class Average:
    """Exponential moving average of the weights in float32, from those at `begin` on (frontier 5.7)."""

    def __init__(self, model: GPT, decay: float) -> None:
        self.decay, self.swapped = decay, False
        self.live = dict(model.named_parameters())
        self.mean = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def begin(self) -> None:
        """Forget what was averaged and start at the weights as they are: nothing older is in the average."""
        for name, mean in self.mean.items():
            mean.copy_(self.live[name])

    @torch.no_grad()
    def update(self, ok: Tensor) -> None:
        means = list(self.mean.values())
        steps = torch._foreach_sub([self.live[name].detach() for name in self.mean], means)
        torch._foreach_mul_(steps, (1.0 - self.decay) * ok.float())
        torch._foreach_add_(means, steps)

    @torch.no_grad()
    def ship(self) -> None:
        """Put the average in the place of the weights."""
        assert not self.swapped, "the average is in the weights' place already"
        for name, mean in self.mean.items():
            self.live[name].copy_(mean)

    @contextlib.contextmanager
    def applied(self) -> Generator[None]:
        """Average and weights change places meanwhile, tensor by tensor: no second copy of the model."""
        assert not self.swapped, "the average is in the weights' place already"
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for name, mean in self.mean.items():
            weights = self.live[name].detach().clone()
            self.live[name].copy_(mean)
            mean.copy_(weights)
        self.swapped = not self.swapped


@torch.no_grad()
def reduce_gradients(optimizer: Optimizer, *figures: Tensor) -> Gradients:
    """Average gradients, and figures as the loss with them, over ranks: no DDP and none of its silent traps.

    Muon's stacks leave first, the largest ahead, and come back as shares; the others come back whole, in
    place. A parameter that took no part in this step counts as zero.
    """
    for p in (p for members in optimizer.groups.values() for p in members.values()):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    whole = [p.grad for p in optimizer.whole]
    coming = optimizer.muon.share_gradients()
    rest = optimizer.world.mean_later([*whole, *figures])
    for _, pending in coming:
        pending.wait()
    shares = [share.float() for share, _ in coming]
    own = torch.stack(torch._foreach_norm(shares)) if shares else figures[0].new_zeros(1)
    square = optimizer.world.sum_(own.square().sum().reshape(1))
    rest.wait()
    norms = torch.stack([square[0].sqrt(), *torch._foreach_norm(whole)])
    return Gradients(norms.norm(), shares, whole)


def clip_mean(gradients: Gradients, limit: float) -> None:
    """Scale the averaged gradient to a norm of at most `limit`; alike on any number of ranks."""
    torch._foreach_mul_([*gradients.shares, *gradients.whole], shrinking(gradients.norm, limit))


@torch.no_grad()
def clip_own(model: GPT, limit: float) -> None:
    """Scale this rank's gradient to a norm of at most `limit`, before ranks average theirs (record 1855).

    Each rank counts for at most `limit`, so the mean differs from the mean that is clipped afterwards,
    more so with more ranks; a gradient accumulated on one rank is clipped once, as a whole. What is then
    reported is the norm of the mean of clipped gradients.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    torch._foreach_mul_(grads, shrinking(torch.stack(torch._foreach_norm(grads)).norm(), limit))


def shrinking(norm: Tensor, limit: float) -> Tensor:
    """What a gradient of this norm is multiplied by; not a number where the norm is not finite."""
    return (limit / (norm + 1e-6)).clamp(max=1.0) + 0.0 * norm


# ======================================================================================
# 18. Checkpoint -- two generations, each complete or absent; nothing is unpickled
# uses: Config Journal Storage
# ======================================================================================

CHECKPOINT_MAGIC, CHECKPOINT_VERSION = b"PGCK", 1


class Checkpoint(NamedTuple):
    """All that a run needs to go on as if it had never stopped."""

    meta: dict  # JSON: step, seconds, counters, knobs, hashes, rng
    tensors: dict[str, Tensor]  # on the CPU


def pack_checkpoint(checkpoint: Checkpoint) -> bytes:
    """Header: meta and [name, dtype, shape] rows; payload: the raw tensors in that order."""
    rows = [
        [name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in checkpoint.tensors.items()
    ]
    header = json.dumps({"meta": checkpoint.meta, "tensors": rows}).encode()
    payload = b"".join(
        t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for t in checkpoint.tensors.values()
    )
    return pack_container(CHECKPOINT_MAGIC, CHECKPOINT_VERSION, header, payload)


def unpack_checkpoint(blob: bytes, what: str) -> Checkpoint:
    """Raises UserError for a file that is damaged, or whole but of another hand."""
    header, payload = unpack_container(blob, CHECKPOINT_MAGIC, CHECKPOINT_VERSION, what)
    try:
        header, tensors, at = json.loads(header), {}, 0
        for name, kind, shape in header["tensors"]:
            dtype = CHECKPOINT_DTYPES[kind]
            raw = bytearray(payload[at : at + math.prod(shape) * dtype.itemsize])
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            tensors[name], at = flat.view(shape), at + len(raw)
        return Checkpoint(header["meta"], tensors)
    except (KeyError, RecursionError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(f"{what} is whole, but this program did not write it ({type(e).__name__})") from e


CHECKPOINT_DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
}


def checkpoint_files(folder: Path) -> list[Path]:
    """Newest first. Temporary files of an interrupted save are not checkpoints."""
    return sorted(folder.glob("step_*.ckpt"), reverse=True)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a new generation, read it back, and only then drop all but it and the newest readable other.

    Raises UserError when it cannot be written, or when what was read back is not what was written.
    """
    blob, path = pack_checkpoint(checkpoint), folder / f"step_{checkpoint.meta['step']:09d}.ckpt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.tmp"):  # of a save that was killed
            stale.unlink()
        write_atomic(path, blob)
        if path.read_bytes() != blob:
            raise UserError(
                f"{path} does not read back as it was written; is the disk failing? use another RUN_DIR"
            )
        others = [old for old in checkpoint_files(folder) if old != path]
        spare = next((old for old in others if readable(old)), None)
        for old in others:
            if old != spare:
                old.unlink()
    except OSError as e:
        raise UserError(f"cannot keep checkpoints in {folder}: {e.strerror}; use another RUN_DIR") from e


def readable(path: Path) -> bool:
    """Whether a checkpoint is whole; what is not must never push out what is."""
    try:
        unpack_container(path.read_bytes(), CHECKPOINT_MAGIC, CHECKPOINT_VERSION, str(path))
    except (UserError, OSError):
        return False
    return True


def load_checkpoint(folder: Path, log: Callable[[str], None]) -> Checkpoint | None:
    """The newest readable generation; None where none was ever written.

    An unreadable one is named and the previous one used. When none can be read the run stops with
    UserError: it never starts again at step 0 over somebody's work.
    """
    files = checkpoint_files(folder)
    for path in files:
        try:
            return unpack_checkpoint(path.read_bytes(), str(path))
        except (UserError, OSError) as e:
            log(f"checkpoint_unreadable: {e}")
    if files:
        raise UserError(
            f"none of the {len(files)} checkpoints in {folder} can be read; restore one, or set "
            f"RESUME=0 OVERWRITE=1 to start again at step 0"
        )
    return None


CHECKPOINT_META = (  # what resuming reads
    *("step", "skipped", "finished", "averaging", "seconds", "pace", "ledger", "best", "calibrated"),
    *("knobs", "data", "source_sha256", "dtype", "compiling", "rng"),
)


def refuse_other_run(meta: dict, cfg: Config, data: str) -> None:
    """Raise UserError naming the knobs in which a checkpoint's run differs from this one."""
    missing = [name for name in CHECKPOINT_META if name not in meta]
    if missing:
        raise UserError(
            f"the checkpoint has no {missing[0]!r}: another version of this program wrote it; continue with "
            f"that version, or choose another RUN_ID"
        )
    mine, theirs = identity(cfg), meta["knobs"]
    names = [env for env in sorted({*mine, *theirs}) if mine.get(env) != theirs.get(env)]
    differ = [f"{env} (checkpoint {theirs.get(env)!r}, now {mine.get(env)!r})" for env in names]
    if differ:
        raise UserError(
            f"the checkpoint belongs to another configuration: {', '.join(differ)}; set them back or "
            f"choose another RUN_ID"
        )
    if meta["data"] != data:
        raise UserError(
            f"the checkpoint was trained on other shards than DATA_PATH={cfg.run.data} holds (fingerprint "
            f"{meta['data']}, now {data}); bring them back or choose another RUN_ID"
        )


# ======================================================================================
# 19. Calibrate -- what ships, and what every matrix sees: by training text, inside the training clock
# uses: Config Schedule World Clock Data Storage Layers Model
# ======================================================================================


@contextlib.contextmanager
def tapped(model: GPT) -> Generator[dict[str, Tap]]:
    """Taps on all projections with integer codecs, by parameter name; the model runs uncompiled meanwhile."""
    projs = {f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, Proj)}
    projs = {name: m for name, m in projs.items() if isinstance(m.tags["weight"].codec, IntRow)}
    for proj in projs.values():
        proj.tap = Tap(proj.weight.shape[1], proj.weight.device)
    try:
        with torch.compiler.set_stance("force_eager"):  # a graph of its own would cost more than it saves
            yield {name: proj.tap for name, proj in projs.items()}
    finally:
        for proj in projs.values():
            proj.tap = None


@torch.no_grad()
def gather_hessians(
    model: GPT, loader: Loader, step: int, cfg: Config, world: World, clock: Clock | None = None
) -> dict[str, Tensor]:
    """Parameter name -> sum of x x' over the inputs of its matrix, (C,C) float32, the same on every rank.

    Reads the GPTQ_CALIBRATION_BATCHES spans that training would have read next, so no rank count
    changes the sum but for its rounding; looped layers add up all their visits. The head sees the
    final hidden states. A clock ends the reading where one more span would cross the cap.
    """
    head, pace = Tap(cfg.model.embed_width, world.device), Pace(clock, world)
    model.eval()
    with tapped(model) as taps:
        for k in range(world.rank, cfg.gptq.batches, world.size):
            span = loader.spans.span(step + k // cfg.data.spans, k % cfg.data.spans)
            batch = to_device(loader.batch([span]), world)
            ctx = Ctx(batch.tokens, batch.docs, cfg.data.seq_len, final_phase(cfg))
            head.add(model.head_reads(model.hidden(ctx).y, ctx.phase)[0])
            world.journal.beat()
            pace.note()
            if not pace.has_room():
                world.journal.warn(
                    f"calibration: cut short after span {k + 1} of {cfg.gptq.batches}, by the cap"
                )
                break
    model.train()
    taps = {name: tap for name, tap in taps.items() if name != "head.weight"}
    taps["embed.weight" if cfg.model.tied else "head.weight"] = head
    return {name: world.sum_(tap.total) for name, tap in taps.items()}


@torch.no_grad()
def clip_weights(model: GPT, cfg: Config, world: World) -> None:
    """Clip each ternary, fp8 and fp4 matrix where its quantised form is closest to the weights as they were.

    Published as "GPTQ-lite" (SKC notes 4.6), without anything of GPTQ. Rank 0 chooses for all. A limit
    that gains nothing is not taken, so the squared error never grows; but closer to the weights is further
    from what was trained where training went through the quantiser. Gaussian weights: fp4 errs up to 27 %
    less, ternary and fp8 never gain.
    """
    params, tags, grids = dict(model.named_parameters()), param_tags(model), grids_of(model)
    names = [n for n, tag in tags.items() if isinstance(tag.codec, Ternary | Fp8 | Fp4)]

    def choose() -> dict[str, tuple[int, float, float]]:
        found = {}
        for name in names:
            w, codec = params[name].detach(), tags[name].codec
            tried = [w, *(clipped(w, limit) for limit in clip_limits(w, tags[name].kind, cfg))]
            held = [codec.fake_quant(t, grids.get(name)) for t in tried]
            errors = [float((q - w).double().square().sum()) for q in held]
            found[name] = errors.index(min(errors)), errors[0], min(errors)
        return found

    chosen = world.share(choose)
    for name, (best, _, _) in chosen.items():
        if best:
            limit = clip_limits(params[name].detach(), tags[name].kind, cfg)[best - 1]
            params[name].copy_(clipped(params[name], limit))
    before, after = (sum(row[i] for row in chosen.values()) for i in (1, 2))
    world.log(
        f"clip_search: mode:{cfg.ternary.clip_mode} matrices:{len(names)} "
        f"clipped:{sum(row[0] > 0 for row in chosen.values())} error:{before:.6g} to {after:.6g}"
    )


def clip_limits(w: Tensor, kind: str, cfg: Config) -> list[Tensor]:
    """Limits of |w| to try: one for each row, or for the whole matrix one for each percentile."""
    rows = as_rows_of(w)
    if cfg.ternary.clip_mode == "row_std":
        k = cfg.ternary.clip_embed if kind == "embed" else cfg.ternary.clip_rows
        return [k * rows.std(1, keepdim=True)] if rows.shape[1] > 1 else []
    beyond = [int((0.005 - 0.001 * i) * rows.numel()) for i in range(cfg.ternary.clip_count)]
    top = rows.abs().flatten().topk(beyond[0] + 1).values
    return [top[n] for n in beyond]


def clipped(w: Tensor, limit: Tensor) -> Tensor:
    rows = w.reshape(-1, w.shape[-1])
    return rows.clamp(-limit, limit).view(w.shape)


class Pace:
    """Of pieces of work: whether the clock leaves time for one more like the slowest.

    `until` is the end in seconds of this rank's clock; without it that is the cap.
    """

    def __init__(self, clock: Clock | None, world: World, until: float | None = None) -> None:
        self.clock, self.world, self.slowest, self.until = clock, world, 0.0, until
        if until is None:
            self.until = (clock.cfg.budget.seconds if clock else 0.0) or math.inf
        self.begin()

    def begin(self) -> None:
        """What went before is no piece."""
        self.before = self.clock.elapsed() if self.clock else 0.0

    def note(self) -> None:
        """A piece is done."""
        if self.until < math.inf:
            self.world.synchronize()
            now = self.clock.elapsed()
            self.slowest, self.before = max(self.slowest, now - self.before), now

    def has_room(self) -> bool:
        return self.until == math.inf or self.clock.elapsed() + self.slowest * Clock.SAFETY < self.until


def measured_reserve(model: GPT, loader: Loader, cfg: Config, world: World) -> float:
    """Seconds of the cap that calibration will take, the same on every rank: the second of two passes."""
    if cfg.gptq.reserve > 0:
        return cfg.gptq.reserve
    return second_pass(lambda: gather_hessians(model, loader, 0, cfg, world), world)


def second_pass(work: Callable[[], object], world: World) -> float:
    """Seconds that the slowest rank takes for what it has done once before, and a little more."""
    for _ in range(2):
        world.synchronize()
        begin = time.perf_counter()
        work()
        world.synchronize()
        took = time.perf_counter() - begin
    return max(world.gather(took)) * Clock.SAFETY


def held_out_batches(loader: Loader, count: int, cfg: Config, world: World) -> Generator[Batch]:
    """This rank's share of the windows that the first `count` held-out targets fill, a span's at a time."""
    tokens = loader.held[: count + 1]
    width = min(cfg.eval_len, len(tokens) - 1)
    starts = range(0, len(tokens) - width, width)[world.rank :: world.size]
    rows = max(1, cfg.data.span // width)
    for at in range(0, len(starts), rows):
        windows = [tokens[a : a + width + 1] for a in starts[at : at + rows]]
        batch = packed(windows, loader.bos, cfg.eval_len) if cfg.data.packing else as_rows(windows, width)
        yield to_device(batch, world)


@torch.no_grad()
def round_trip(
    model: GPT, loader: Loader, count: int, cfg: Config, world: World, pace: Pace | None = None
) -> float:
    """Nats per held-out token of the weights as they would ship, the same on every rank; nothing is coded.

    Every weight passes through its codec, all loops are on. Integers are rounded to nearest: GPTQ and
    low-rank corrections are not in it. The model runs uncompiled, because graphs of its own would be made
    inside the clock. Infinite where some rank's pace had no time for it; all take part in the one sum.
    """
    pace, was_training = pace or Pace(None, world), model.training
    sums, phase = torch.zeros(3, dtype=torch.float64), final_phase(cfg)._replace(qat=True)
    model.eval()
    pace.begin()
    with torch.compiler.set_stance("force_eager"):
        for batch in held_out_batches(loader, count, cfg, world):
            if not pace.has_room():
                sums[2] = 1
                break
            nll, _ = model(Ctx(batch.tokens, batch.docs, cfg.eval_len, phase), batch.targets)
            sums += torch.tensor([nll.double().sum().item(), nll.numel(), 0], dtype=torch.float64)
            pace.note()
            world.journal.beat()
    model.train(was_training)
    nats, tokens, cut = world.sum_(sums).tolist()
    return nats / tokens if not cut else math.inf


class Snapshot:
    """The weights of the best round trip so far and the grids they had, in host memory.

    An origin says whose weights they were, and at which step: `ema:300`.
    """

    def __init__(self, model: GPT) -> None:
        self.live = dict([*model.named_parameters(), *model.named_buffers()])
        self.kept = {name: t.detach().to("cpu", copy=True) for name, t in self.live.items()}
        self.nats, self.origin, self.calibrated = math.inf, "", ""

    @torch.no_grad()
    def take(self, nats: float, origin: str, calibrated: str) -> None:
        for name, kept in self.kept.items():
            kept.copy_(self.live[name])
        self.nats, self.origin, self.calibrated = nats, origin, calibrated

    @torch.no_grad()
    def ship(self) -> None:
        for name, kept in self.kept.items():
            self.live[name].copy_(kept)


class Trial:
    """Counts the round trips of a search, and refuses more than are allowed."""

    def __init__(self, measure: Callable[[], float], most: int) -> None:
        self.measure, self.most, self.count, self.stopped = measure, most, 0, False

    def nats(self) -> float:
        """Infinite once the number or the time is used up."""
        self.stopped = self.stopped or self.count >= self.most
        if self.stopped:
            return math.inf
        self.count += 1
        found = self.measure()
        self.stopped = found == math.inf
        return found

    def along(self, grid: Tensor, at: int, values: list[float], best: float) -> float:
        """The least nats over one number of a grid, which stays there; `best` are those of the present."""
        keep = float(grid[at])
        for value in values:
            if abs(value - keep) < 1e-6:
                continue
            grid[at] = value
            found = self.nats()
            if found < best:
                best, keep = found, value
        grid[at] = keep
        return best


def search_axes(cfg: Config) -> list[tuple[int, list[float]]]:
    """(which number of a grid, the values to try)."""
    axes = []
    if cfg.ternary.threshold_search:
        axes.append((0, np.linspace(cfg.search.low, cfg.search.high, cfg.search.steps).tolist()))
    if cfg.ternary.scale_search:
        low, high = cfg.search.scale_low, cfg.search.scale_high
        axes.append((1, np.linspace(low, high, cfg.search.scale_steps).tolist()))
    return axes


def worth_searching(
    grids: dict[str, Tensor], sizes: dict[str, int], first: float, trial: Trial, cfg: Config
) -> list[str]:
    """The TERNARY_CALIB_TOP_N grids that matter most: of the largest matrices, those that a first try changes
    most. It takes the value nearest the middle of each range that is not the present one.
    """
    some = min(cfg.search.top * cfg.search.prefilter, cfg.search.candidates)
    largest = sorted(grids, key=lambda name: (-sizes[name], name))[:some]
    if len(largest) <= cfg.search.top:
        return largest
    change = dict.fromkeys(largest, 0.0)
    for name in largest:
        before = grids[name].clone()
        for at, values in search_axes(cfg):
            others = [v for v in values if abs(v - float(before[at])) > 1e-6]
            middle = (values[0] + values[-1]) / 2
            grids[name][at] = min(others, key=lambda v: abs(v - middle), default=before[at])
        found = trial.nats()
        grids[name].copy_(before)
        change[name] = abs(found - first) if found < math.inf else 0.0
    return sorted(largest, key=lambda name: -change[name])[: cfg.search.top]


@torch.no_grad()
def search_grids(model: GPT, loader: Loader, cfg: Config, world: World, pace: Pace) -> dict:
    """Threshold and multiplier of the ternary matrices that matter most, one number after another, by nats of
    the round trip on held-out training text (SKC notes 4.5); figures for the report.

    All ranks do the same with the same numbers, so grids stay equal; they are filled in place.
    """
    grids, sizes = grids_of(model), {name: p.numel() for name, p in model.named_parameters()}
    trial = Trial(lambda: round_trip(model, loader, cfg.search.tokens, cfg, world, pace), cfg.search.evals)
    first = best = trial.nats()
    names = worth_searching(grids, sizes, first, trial, cfg)
    for name in names * (2 if cfg.search.again else 1):
        for at, values in search_axes(cfg):
            best = trial.along(grids[name], at, values, best)
    found = {name: [round(x, 6) for x in grids[name].tolist()] for name in names}
    return {"evals": trial.count, "cut": trial.stopped, "nats": [first, best], "grids": found}


# ======================================================================================
# 20. Train -- under rank 0's clock, and never past it
# uses: Config Schedule World Clock Data Model Speed Objective Optimizer Checkpoint Calibrate
# ======================================================================================


@dataclass
class TrainState:
    """What training changes besides weights; everything here goes into a checkpoint."""

    step: int = 0
    skipped: int = 0
    resumed: bool = False
    finished: bool = False
    averaging: bool = False  # the average of the weights has begun
    calibrated: str = ""  # for whose weights grids were searched last, as a Snapshot's origin


class Report(NamedTuple):
    """Figures of a step, perhaps still on their way from the device."""

    step: int
    phase: Phase
    figures: Tensor  # (3,) loss, gradient norm, ok
    event: object | None  # CUDA event after the copy


class Trainer:
    """The things one training loop needs at hand, and nothing computed from them."""

    def __init__(self, model: GPT, loader: Loader, cfg: Config, world: World, source: str) -> None:
        self.model, self.loader, self.cfg, self.world, self.source = model, loader, cfg, world, source
        self.optimizer = Optimizer(model, cfg, world)
        self.optimizer.prime()
        self.average = Average(model, cfg.optim.ema_decay) if cfg.optim.ema_on else None
        self.best = Snapshot(model) if cfg.proxy.keeps else None
        self.state, self.shipped = TrainState(), {"weights": "live"}
        self.clock, self.looping = Clock(cfg, world, 0.0), False
        # seconds of a round trip, of one of the search, and of what comes when weights are chosen
        self.trip, self.each, self.later = 0.0, 0.0, 0.0
        if not FOLDED:
            self.graphs = 0  # made by the end of warm-up
        self.reports: deque[Report] = deque()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a step changes, whole and by name: the live ones, but for momentum that ranks
        share. They gather it, so every rank has to call this."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        model = {f"model.{name}": p.detach() for name, p in named}
        optimizer = {f"optimizer.{name}": t for name, t in self.optimizer.state().items()}
        means = self.average.mean if self.cfg.optim.ema_on else {}
        best = self.best.kept if self.cfg.proxy.keeps else {}
        rest = {f"average.{name}": t for name, t in means.items()}
        return model | optimizer | rest | {f"best.{name}": t for name, t in best.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Copy saved values into the live tensors. Raises UserError where they are not the same ones.

        Momentum too: what ranks share is no part of any `state_dict`, and what warm-up left in it would
        bend the first tens of steps.
        """
        lives = self.tensors()
        if self.cfg.run.resume:
            refuse_other_tensors(lives, tensors)
        for name, live in lives.items():
            live.copy_(tensors[name])
        self.optimizer.muon.restore(tensors, "optimizer.muon.")


def refuse_other_tensors(lives: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Raise UserError naming the first tensor that a checkpoint has otherwise than this program."""
    shapes = [{name: tuple(t.shape) for name, t in side.items()} for side in (lives, saved)]
    wrong = [n for n in sorted({*lives, *saved}) if shapes[0].get(n) != shapes[1].get(n)]
    if wrong:
        raise UserError(
            f"the checkpoint has {wrong[0]} as {shapes[1].get(wrong[0])}, this program as "
            f"{shapes[0].get(wrong[0])}: another version wrote it; continue with that version"
        )


def train_step(t: Trainer, batches: list[Batch], phase: Phase) -> Tensor:
    """One optimizer step over this rank's micro-batches.

    Returns [loss, gradient norm, ok] as float32 on the device, averaged over ranks. A non-finite loss
    or gradient leaves weights, moments and averages untouched, decided on the device and alike on
    every rank.
    """
    figures = [torch.zeros((), device=t.world.device)]
    if t.cfg.moe.on:
        figures.append(torch.zeros_like(t.model.shares))
    t.model.zero_grad(set_to_none=True)
    if t.cfg.ternary.noise:
        draw_noise(t)
    for batch in batches:
        total, terms = objective(t.model, batch, phase, t.cfg)
        (total / len(batches)).backward()
        figures[0] += terms["nll"].detach() / len(batches)
        if t.cfg.moe.on:
            figures[1] += terms["counts"]
    if t.cfg.optim.clips_own:
        clip_own(t.model, t.cfg.optim.clip)
    gradients, loss = reduce_gradients(t.optimizer, *figures), figures[0]
    ok = torch.isfinite(loss) & torch.isfinite(gradients.norm)
    if t.cfg.optim.clips_mean:
        clip_mean(gradients, t.cfg.optim.clip)
    t.optimizer.step(gradients, phase, ok)
    if t.cfg.optim.ema_on and phase.averages:
        t.average.update(ok)
    if t.cfg.moe.on:
        keep_shares(t, figures[1], ok)
    return torch.stack([loss, gradients.norm, ok.float()])


def draw_noise(t: Trainer) -> None:
    """What ternary weights are trained under in this step."""
    for m in ternary_modules(t.model):
        m.jitter.draw(t.state.step)


def keep_shares(t: Trainer, counts: Tensor, ok: Tensor) -> None:
    """Of all ranks and micro-batches: what the balance of the next step is held against."""
    shares = counts / counts.sum(1, keepdim=True)
    t.model.shares.copy_(torch.where(ok, shares, t.model.shares))


def try_graphs(t: Trainer) -> None:
    """Make every graph of training once, without a word to other ranks: none waits for one that cannot."""
    ok = torch.tensor(True, device=t.world.device)
    for phase in warm_phases(t.cfg):
        objective(t.model, t.loader.batches(0)[0], phase, t.cfg)[0].backward()
        t.world.journal.beat()
    with torch.no_grad():
        for stack in t.optimizer.muon.stacks:
            t.optimizer.muon.update(stack, torch.zeros_like(stack.momentum), phase, ok)
            t.world.journal.beat()
    t.model.zero_grad(set_to_none=True)


def warm_up(t: Trainer) -> None:
    """Take real steps in every graph the run will meet, then put everything back as it was.

    Undone: weights, moments, averages, and the random state; the loader has no state to undo.
    """
    if t.cfg.budget.warmup_steps == 0:
        return
    before = {name: live.clone() for name, live in t.tensors().items()}
    rng = rng_state(t.world)
    for phase in warm_phases(t.cfg):
        for i in range(t.cfg.budget.warmup_steps):
            train_step(t, t.loader.batches(i), phase)
            t.world.journal.beat()
            if i + 1 == t.cfg.budget.warmup_steps:
                t.world.log(f"warmup_step:{i + 1}/{i + 1} loops:{phase.loops} qat:{int(phase.qat)}")
    t.restore(before)
    set_rng_state(rng, t.world)
    t.model.zero_grad(set_to_none=True)


def rng_state(world: World) -> list[str]:
    """This rank's random state, as hex: host, then device."""
    states = [torch.get_rng_state()]
    if world.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(world.device))
    return [bytes(s.numpy().tobytes()).hex() for s in states]


def set_rng_state(states: list[str], world: World) -> None:
    tensors = [torch.frombuffer(bytearray.fromhex(s), dtype=torch.uint8) for s in states]
    torch.set_rng_state(tensors[0])
    if world.device.type == "cuda" and len(tensors) > 1:
        torch.cuda.set_rng_state(tensors[1], world.device)


def save(t: Trainer) -> None:
    """Checkpoint the run: every rank gives its random state, rank 0 writes. Raises UserError on all."""
    flush_reports(t, keep=0)
    meta = {
        "step": t.state.step,
        "skipped": t.state.skipped,
        "finished": t.state.finished,
        "resumed": t.state.resumed,
        "averaging": t.state.averaging,
        "calibrated": t.state.calibrated,
        "best": [t.best.nats, t.best.origin, t.best.calibrated] if t.cfg.proxy.keeps else [],
        "seconds": t.clock.elapsed(),
        "knobs": identity(t.cfg),
        "config_hash": config_hash(t.cfg),
        "data": t.loader.shards.fingerprint(),
        "source_sha256": t.source,
        "dtype": str(t.world.dtype).removeprefix("torch."),
        "compiling": t.world.compiling,
        "fallback": t.world.fallback,
        "rng": t.world.gather(rng_state(t.world)),
        "ledger": t.world.journal.ledger,
        "pace": list(t.clock.times),
    }
    with t.world.journal.phase("checkpoint"):
        checkpoint = Checkpoint(meta, t.tensors())  # every rank gives its share
        t.world.share(lambda: save_checkpoint(t.world.run_dir / "checkpoints", checkpoint))
    t.world.log(f"checkpoint:saved step:{t.state.step} train_time:{t.clock.elapsed() * 1000:.0f}ms")


def save_if_due(t: Trainer, heard: Reading) -> None:
    if heard.save:
        with t.clock.paused():
            save(t)
            t.clock.saved = t.clock.now()


def resume(t: Trainer, found: Checkpoint) -> None:
    """Put the trainer where a checkpoint left it; the clock goes on from the seconds already spent."""
    meta = found.meta
    t.restore(found.tensors)
    t.state = TrainState(meta["step"], meta["skipped"], True, meta["finished"])
    t.state.averaging, t.state.calibrated = meta["averaging"], meta["calibrated"]
    if t.cfg.proxy.keeps:
        t.best.nats, t.best.origin, t.best.calibrated = meta["best"]
    reserve, t.clock = t.clock.reserve, Clock(t.cfg, t.world, meta["seconds"])
    t.clock.keep(reserve)
    t.clock.remember(meta["pace"])
    for name, seconds in meta["ledger"].items():
        t.world.journal.ledger[name] = t.world.journal.ledger.get(name, 0.0) + seconds
    t.world.journal.cut_trace(meta["step"])
    if len(meta["rng"]) == t.world.size:
        set_rng_state(meta["rng"][t.world.rank], t.world)
    if meta["source_sha256"] != t.source:
        t.world.log(
            f"resume: the source has changed since the checkpoint ({meta['source_sha256'][:12]} then, "
            f"{t.source[:12]} now)"
        )
    t.world.log(f"resumed:1 step:{t.state.step} train_time:{meta['seconds'] * 1000:.0f}ms")


def find_checkpoint(loader: Loader, cfg: Config, world: World) -> Checkpoint | None:
    """RESUME=1: the newest readable checkpoint, if it is of this configuration and of these shards."""
    found = world.share(lambda: load_checkpoint(world.run_dir / "checkpoints", world.log))
    if found:
        refuse_other_run(found.meta, cfg, loader.shards.fingerprint())
    return found


def resumed_speed(found: Checkpoint | None, cfg: Config, world: World) -> World:
    """The world with the dtype and compile setting of the checkpoint, or chosen anew where there is none."""
    if found:
        dtype = CHECKPOINT_DTYPES[found.meta["dtype"]]
        why = found.meta.get("fallback", "")
        return dataclasses.replace(world, dtype=dtype, compiling=found.meta["compiling"], fallback=why)
    world = choose_speed(cfg, world)
    world.log(f"resume: no checkpoint in {world.run_dir / 'checkpoints'} yet; starting at step 0")
    world.journal.cut_trace(0)
    return world


def train(t: Trainer, validate: Callable[[int, float], None]) -> None:
    """Run to ITERATIONS, to the last step that ends before the cap, or until a rank is asked to stop.

    `validate(step, train_ms)` is called every VAL_LOSS_EVERY steps, with the clock paused.
    """
    t.clock.start()
    while not t.state.finished:
        heard = t.clock.tick(t.state.step)
        t.world.journal.beat()
        t.state.finished = t.state.step >= t.cfg.budget.iterations or not t.clock.ends_in_time()
        if t.state.finished or heard.stop:
            break
        if t.cfg.run.saves:
            save_if_due(t, heard)
        now = Progress(t.state.step, heard.seconds, t.clock.reserve)
        if t.cfg.proxy.align:
            align_if_due(t, now)
        take_step(t, now)
        if t.cfg.proxy.on:
            consider_if_due(t)
        if t.cfg.run.val_every and t.state.step % t.cfg.run.val_every == 0:
            with t.clock.paused():
                flush_reports(t, keep=0)
                validate(t.state.step, t.clock.spent * 1000)
    end_training(t)


def end_training(t: Trainer) -> None:
    """Stop the clock, on all ranks at the same step, and say what is left to say."""
    t.world.synchronize()
    t.clock.drain()
    t.clock.stop()
    flush_reports(t, keep=0)
    if t.state.step < t.cfg.budget.iterations and t.state.finished:
        t.world.log(
            f"stopping_early: wallclock_cap train_time:{t.clock.spent * 1000:.0f}ms "
            f"step:{t.state.step}/{t.cfg.budget.iterations}"
        )


def keep_time(t: Trainer) -> None:
    """End the steps so much before the cap as what comes after them was measured to take."""
    cfg, reserve = t.cfg, 0.0
    if cfg.gptq.on:
        t.later = measured_reserve(t.model, t.loader, cfg, t.world)
    if weighs(cfg) and cfg.budget.seconds > 0:
        t.trip = trip_seconds(t, cfg.proxy.tokens)
        reserve += t.trip * (2 if cfg.optim.ema_on else 1)
    if searches(cfg):
        t.each = trip_seconds(t, cfg.search.tokens)
        reserve += min(cfg.search.seconds, cfg.search.evals * t.each)
    t.clock.keep(reserve + t.later)


def trip_seconds(t: Trainer, count: int) -> float:
    return second_pass(lambda: round_trip(t.model, t.loader, count, t.cfg, t.world), t.world)


def pace_of(t: Trainer, kept: float, most: float) -> Pace:
    """For round trips: within `most` seconds, and before the cap by as many as are kept for later."""
    return Pace(t.clock, t.world, t.clock.elapsed() + min(t.clock.left(kept), most))


def weigh(t: Trainer, kept: float) -> float:
    """Nats per held-out token of the weights in the model; infinite where they are no number, too, or where
    the clock leaves no time."""
    pace = pace_of(t, kept, math.inf)
    nats = round_trip(t.model, t.loader, t.cfg.proxy.tokens, t.cfg, t.world, pace)
    return nats if nats < math.inf else math.inf


@contextlib.contextmanager
def as_shipped(t: Trainer) -> Generator[str]:
    """The weights that would ship now are in the model meanwhile: the average where there is one. Says whose
    they are."""
    if t.cfg.optim.ema_on and t.state.averaging:
        with t.average.applied():
            yield f"ema:{t.state.step}"
    else:
        yield f"live:{t.state.step}"


def consider_if_due(t: Trainer) -> None:
    """Every EXPORT_PROXY_EVERY steps weigh what would ship now, on the training clock; the best is kept.

    Near the cap it is left out: all ranks have read the same clock.
    """
    if t.state.step % t.cfg.proxy.every:
        return
    with t.world.journal.phase("proxy"), t.clock.aside():
        if t.clock.left(t.clock.reserve) <= t.trip:
            return
        begin = t.clock.elapsed()
        with as_shipped(t) as origin:
            nats = weigh(t, t.clock.reserve)
            if t.cfg.proxy.keeps and nats < t.best.nats:
                t.best.take(nats, origin, t.state.calibrated)
        took = t.clock.elapsed() - begin
    t.world.journal.trace(step=t.state.step - 1, proxy=nats.hex())
    t.world.log(
        f"proxy: weights:{origin} nats:{nats:.6f} took:{took * 1000:.0f}ms "
        f"train_time:{t.clock.heard.seconds * 1000:.0f}ms"
    )


def align_if_due(t: Trainer, now: Progress) -> None:
    """Once, from EXPORT_ALIGNED_TRAIN_START_FRACTION on: search the grids of ternary weights for what would
    ship now, and let training go on with them. They are buffers filled in place: no new graph."""
    if t.state.calibrated or fraction(now, t.cfg) < t.cfg.proxy.align_at:
        return
    with as_shipped(t) as origin:
        search(t, origin, t.clock.reserve)


def search(t: Trainer, origin: str, kept: float) -> None:
    """Search the grids of the weights in the model; `kept` seconds of the cap are for later."""
    with t.world.journal.phase("search"), t.clock.aside():
        pace = pace_of(t, kept, t.cfg.search.seconds)
        pace.slowest = t.each  # nothing is begun for which there is no time
        found = search_grids(t.model, t.loader, t.cfg, t.world, pace)
    t.state.calibrated, t.shipped["search"] = origin, found | {"weights": origin}
    first, best = found["nats"]
    t.world.journal.trace(step=t.state.step, search=found["grids"])
    t.world.log(
        f"grid_search: weights:{origin} evals:{found['evals']} cut:{int(found['cut'])} nats:{first:.6f}->"
        f"{best:.6f} matrices:{len(found['grids'])} train_time:{t.clock.heard.seconds * 1000:.0f}ms"
    )


def settle_weights(t: Trainer) -> None:
    """Put into the model what ships: the weights, clipped, then the grids of ternary ones (SKC notes 4.1).

    What reads text is on the training clock.
    """
    if weighs(t.cfg):
        t.clock.start()
        with t.world.journal.phase("choose"), t.clock.aside():
            choose_weights(t)
        t.clock.stop()
    else:
        choose_weights(t)
    if t.cfg.ternary.clip_mode != "none":
        clip_weights(t.model, t.cfg, t.world)
        t.shipped["origin"] += ":clipped"
    if searches(t.cfg) and t.state.calibrated != t.shipped["origin"]:
        t.clock.start()
        search(t, t.shipped["origin"], t.later)
        t.clock.stop()
    if weighs(t.cfg) or searches(t.cfg):
        nats = "".join(f" {name}:{value:.6f}" for name, value in t.shipped["nats"].items())
        t.world.log(
            f"shipped: weights:{t.shipped['weights']} of:{t.shipped['origin']}{nats} "
            f"train_time:{t.clock.spent * 1000:.0f}ms"
        )


def choose_weights(t: Trainer) -> None:
    """Exactly one source ships: the best that was weighed in training, which has the average in it; else the
    average, unless it is guarded and worse; else the weights that training left."""
    kind, nats = "live", {}
    if t.cfg.optim.ema_on and t.state.averaging:
        kind, nats = choose_average(t)
    elif weighs(t.cfg):
        nats["live"] = weigh(t, t.later)
    origin = f"{kind}:{t.state.step}"
    if t.cfg.proxy.keeps:
        nats["best"] = t.best.nats
        if t.best.nats < nats[kind]:
            t.best.ship()
            kind, origin, t.state.calibrated = "best", t.best.origin, t.best.calibrated
    t.shipped |= {"weights": kind, "origin": origin, "nats": nats}


def choose_average(t: Trainer) -> tuple[str, dict[str, float]]:
    """Ship the average, unless it is guarded and its round trip does not beat that of the weights."""
    nats = {}
    if guards_average(t.cfg):
        nats["live"] = weigh(t, t.later)
    if weighs(t.cfg):
        with t.average.applied():
            nats["ema"] = weigh(t, t.later)
    if guards_average(t.cfg) and not nats["ema"] < nats["live"]:
        return "live", nats
    t.average.ship()
    return "ema", nats


def calibrate(t: Trainer) -> dict[str, Tensor]:
    """Hessians of the weights that ship, gathered on the training clock, in the time kept for it."""
    t.clock.start()
    hessians = gather_hessians(t.model, t.loader, t.state.step, t.cfg, t.world, t.clock)
    t.world.synchronize()
    t.clock.stop()
    t.world.log(
        f"calibration: spans:{t.cfg.gptq.batches} tokens:{t.cfg.gptq.batches * t.cfg.data.span} "
        f"matrices:{len(hessians)} reserve:{t.clock.reserve * 1000:.0f}ms "
        f"train_time:{t.clock.spent * 1000:.0f}ms"
    )
    return hessians


def take_step(t: Trainer, now: Progress) -> None:
    """Step, count, and leave the figures on their way to the host; those of the step before are reported."""
    phase = phase_at(now, t.cfg)
    if t.cfg.loop.on and phase.loops and not t.looping:
        t.world.log(f"layer_loop:enabled step:{t.state.step} frac:{fraction(now, t.cfg):.3f}")
    t.looping = phase.loops > 0
    if t.cfg.optim.ema_on and phase.averages:
        begin_average(t, now)
    figures = train_step(t, t.loader.batches(t.state.step), phase)
    event = torch.cuda.Event() if figures.is_cuda else None
    host = figures.to("cpu", non_blocking=True)
    if event is not None:
        event.record()
    t.reports.append(Report(t.state.step, phase, host, event))
    t.state.step += 1
    flush_reports(t, keep=1 if event is not None else 0)


def trained_phase(t: Trainer) -> Phase:
    """As a loaded artifact, for weights that are not one yet: through the quantiser if they ended so."""
    end = phase_at(Progress(t.state.step, t.clock.elapsed(), t.clock.reserve), t.cfg)
    return final_phase(t.cfg)._replace(qat=end.qat)


def begin_average(t: Trainer, now: Progress) -> None:
    """Once: the average starts as the weights of this moment, before the step."""
    if t.state.averaging:
        return
    t.average.begin()
    t.state.averaging = True
    if t.cfg.optim.ema_start > 0:
        t.world.log(f"average:begun step:{t.state.step} frac:{fraction(now, t.cfg):.3f}")


def flush_reports(t: Trainer, keep: int) -> None:
    while len(t.reports) > keep:
        report(t, t.reports.popleft())


def report(t: Trainer, r: Report) -> None:
    """Log, trace and count one finished step. Raises UserError after MAX_BAD_STEPS non-finite ones."""
    if r.event is not None:
        r.event.synchronize()
    loss, norm, ok = r.figures.tolist()
    done, total, spent = r.step + 1, t.cfg.budget.iterations, t.clock.elapsed()
    t.world.journal.trace(step=r.step, loss=loss.hex(), lr=r.phase.lr.hex(), ok=int(ok))
    if not ok:
        t.state.skipped += 1
        t.world.log(f"step:{done}/{total} skipped: loss {loss}, gradient norm {norm}")
        if t.state.skipped >= t.cfg.budget.max_bad_steps:
            raise UserError(
                f"{t.state.skipped} steps were not finite (MAX_BAD_STEPS={t.cfg.budget.max_bad_steps}); "
                f"lower the learning rates or set GRAD_CLIP_NORM"
            )
    expected = t.clock.projected_steps(done)
    if done <= 10 or (t.cfg.run.log_every and done % t.cfg.run.log_every == 0):
        t.world.log(
            f"step:{done}/{total} train_loss:{loss:.4f} train_time:{spent * 1000:.0f}ms "
            f"step_avg:{spent * 1000 / done:.2f}ms"
        )
    if done == 10:
        t.world.log(f"projected_steps:{expected} step_ms:{statistics.median(t.clock.times) * 1000:.1f}")
    if t.cfg.run.progress:
        speed = done * t.cfg.data.batch_tokens / max(spent, 1e-9)
        note = f"loss {loss:.4f} {speed:,.0f} tok/s, about {expected} steps"
        t.world.journal.progress(done, expected, note)


# ======================================================================================
# 21. Export -- every parameter ships as its tag says, in one file that explains itself
# uses: Config Journal World Storage Coding Model Speed
# ======================================================================================

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGLM", 2
# Sections whose knobs decide the forward, with SHAPE_KNOBS.
SHAPE_SECTIONS = ("model", "loop", "attn", "residual", "input", "ahead", "moe", "export")
MOST_HEADER = 1 << 20  # bytes; 100 tensors take about 5,000
START_KNOBS = (  # of those sections, what matters to a model that is trained from the start alone
    "MATRIX_INIT", "MATRIX_INIT_STD", "RESIDUAL_PROJ_INIT_STD", "TIED_EMBED_INIT_STD", "QK_GAIN_INIT",
    "GATED_ATTN_INIT_STD", "SPARSE_ATTN_GATE_INIT_STD", "ENABLE_LOOPING_AT", "MTP_LOSS_WEIGHT",
    "EMBED_PROJ_OPTIMIZER", "Z_LOSS_WEIGHT", "MOE_ROUTER_AUX_LOSS_COEF",
    "MOE_START_FRACTION",
)  # fmt: skip
SHAPE_KNOBS = ("TRAIN_SEQ_LEN", "EVAL_SEQ_LEN", "DOC_PACKING", "LQER_ENABLED")


class Artifact(NamedTuple):
    """A decoded artifact: the knobs that rebuild its model, its training config's hash, its weights."""

    knobs: dict[str, str]
    config_hash: str
    tensors: dict[str, Tensor]


@of_config
def shape_knobs(cfg: Config) -> dict[str, str]:
    """The knobs that decide what the weights mean, where they differ from their defaults.

    Raises UserError when they do not fit the artifact's header, compressed.
    """
    shapes = {env for env, (section, _) in all_knobs().items() if section in SHAPE_SECTIONS}
    shapes = shapes - {*START_KNOBS} | {*SHAPE_KNOBS}
    knobs = {env: text for env, text in changed_knobs(cfg).items() if env in shapes}
    size = len(squeeze(json.dumps(knobs).encode()))
    if size > 400:
        raise UserError(
            f"the artifact has 400 bytes for the knobs of its shape, these take {size}: {' '.join(knobs)}; "
            f"write shorter numbers or leave more of them at their defaults"
        )
    return knobs


def by_kind(name: str) -> tuple[str, list[int]]:
    """Sort key that puts the same matrix of all layers side by side: `blocks.*.attn.c_q.weight`, layer."""
    parts = name.split(".")
    return ".".join(p for p in parts if not p.isdigit()), [int(p) for p in parts if p.isdigit()]


class Shipment(NamedTuple):
    """An artifact, and what it was put together from."""

    blob: bytes
    rows: list[list]  # [name, codec, shape] of every tensor, in order
    streams: dict[str, Streams]  # by tensor
    planes: dict[str, dict[str, Plane]]  # by tensor
    coded: dict[str, Coded]  # by kind of stream


def export(
    model: GPT, cfg: Config, tags: dict[str, Tag] | None = None, hessians: dict[str, Tensor] | None = None
) -> Shipment:
    """Encode every tensor, pool the streams of a kind, code each pool: deterministic bytes.

    Without `tags` each parameter ships by its own; matrices with a Hessian are rounded by GPTQ.
    """
    tags, hessians, params = tags or param_tags(model), hessians or {}, dict(model.named_parameters())
    rows, grids = tensor_rows(params, tags), grids_of(model)
    streams = {n: tags[n].codec.encode(params[n].detach(), hessians.get(n), grids.get(n)) for n, _, _ in rows}
    planes = {n: tags[n].codec.planes(tuple(dims)) for n, _, dims in rows}
    values: dict[str, list[np.ndarray]] = {}
    for name in streams:
        for kind, part in streams[name].items():
            values.setdefault(kind, []).append(part)
    pools = {k: Pool(parts, np.concatenate(values[k])) for k, parts in pool_planes(planes).items()}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        coded = threads.map(lambda pool: code_pool(pool, cfg.size.compressor), pools.values())
        coded = dict(zip(pools, coded, strict=True))
    header = {"knobs": shape_knobs(cfg), "config_hash": config_hash(cfg), "tensors": rows}
    header["streams"] = [[kind, c.coder, len(c.data)] for kind, c in coded.items()]
    header, payload = squeeze(json.dumps(header).encode()), b"".join(c.data for c in coded.values())
    blob = pack_container(ARTIFACT_MAGIC, ARTIFACT_VERSION, header, payload)
    return Shipment(blob, rows, streams, planes, coded)


def pool_planes(planes: dict[str, dict[str, Plane]]) -> dict[str, list[Plane]]:
    """Kind of stream -> its parts, tensor after tensor; kinds in the order of the alphabet."""
    pools: dict[str, list[Plane]] = {}
    for found in planes.values():
        for kind, plane in found.items():
            pools.setdefault(kind, []).append(plane)
    return dict(sorted(pools.items()))


def corrected(model: GPT, tags: dict[str, Tag], hessians: dict[str, Tensor], cfg: Config) -> dict[str, Tag]:
    """The tags, the LQER_TOP_K integer matrices with the largest error under a low-rank correction."""
    errors, params = {}, dict(model.named_parameters())
    for name, tag in tags.items():
        if isinstance(tag.codec, IntRow) and params[name].ndim == 2:
            w = params[name].detach()
            held = tag.codec.decode(tag.codec.encode(w, hessians.get(name)), tuple(w.shape))
            errors[name] = float((w.cpu() - held).norm())
    group = cfg.gptq.lqer_group if cfg.gptq.lqer_asym else 0
    worst = sorted(errors, key=lambda name: (-errors[name], name))[: cfg.gptq.lqer_top]
    codecs = {n: LowRank(tags[n].codec, cfg.gptq.lqer_rank, group, cfg.gptq.lqer_bits) for n in worst}
    return tags | {name: dataclasses.replace(tags[name], codec=codec) for name, codec in codecs.items()}


def lowered(tags: dict[str, Tag], name: str, value: float) -> dict[str, Tag]:
    """One rung down: integer codecs of the kinds that a knob of SIZE_LADDER names, with its value."""
    kinds, field_name = LADDER[name]
    return {
        n: dataclasses.replace(tag, codec=dataclasses.replace(tag.codec, **{field_name: value}))
        if tag.kind in kinds and isinstance(tag.codec, IntRow)
        else tag
        for n, tag in tags.items()
    }


def fit(model: GPT, hessians: dict[str, Tensor], code: int, cfg: Config, world: World) -> Shipment:
    """The artifact, as far down SIZE_LADDER as the limit demands; each rung says what it brings."""
    tags, correcting = param_tags(model), True
    for name, value in [("", 0.0), *(ladder_rungs(cfg.size.ladder) if cfg.size.ladder else [])]:
        if cfg.size.ladder and name:
            tags, correcting = lowered(tags, name, value), correcting and name != "LQER_ENABLED"
        final = corrected(model, tags, hessians, cfg) if cfg.gptq.lqer and correcting else tags
        shipment = export(model, cfg, final, hessians)
        left, rung = SIZE_LIMIT - code - len(shipment.blob), f"{name}={value}" if name else "as configured"
        world.log(f"size_ladder: {rung} weights:{len(shipment.blob)} code:{code} left:{left}")
        world.journal.beat()
        if left >= 0:
            break
    return shipment


def ship(model: GPT, hessians: dict[str, Tensor], code_bytes: int, cfg: Config, world: World) -> bytes:
    """Write model.ptz and its byte table, and return what is on the disk."""
    shipment = fit(model, hessians, code_bytes, cfg, world)
    write_atomic(world.run_dir / "model.ptz", shipment.blob)
    if cfg.run.forecast:
        write_byte_table(shipment, world)
    blob = (world.run_dir / "model.ptz").read_bytes()
    world.journal.trace(artifact_sha256=hashlib.sha256(blob).hexdigest())
    return blob


def write_byte_table(shipment: Shipment, world: World) -> None:
    """bytes.json, and a line for each tensor in the log file."""
    table = byte_table(shipment)
    write_atomic(world.run_dir / "bytes.json", json.dumps(table, indent=1).encode())
    for row in table["tensors"]:
        name, *cells = (f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values())
        cells = " ".join(f"{k}:{v}" for k, v in zip(list(row)[1:], cells, strict=True))
        world.journal.log(f"tensor:{name} {cells}", file_only=True)


def byte_table(shipment: Shipment) -> dict[str, list[dict]]:
    """Where the bytes are, by stream and by tensor.

    A tensor's bytes are its share of each of its streams, by order-0 entropy, or by values where the
    stream has none; the entropy is its own.
    """
    own = {
        name: {kind: entropy_bytes(shipment.planes[name][kind], part) for kind, part in streams.items()}
        for name, streams in shipment.streams.items()
    }
    counts = {k: sum(p.count for p in parts) for k, parts in pool_planes(shipment.planes).items()}
    whole = {kind: sum(found.get(kind, 0.0) for found in own.values()) for kind in shipment.coded}
    rows = []
    for name, codec, dims in shipment.rows:
        size, params = 0.0, math.prod(dims)
        for kind, part in own[name].items():
            even = shipment.planes[name][kind].count / max(counts[kind], 1)
            size += len(shipment.coded[kind].data) * (part / whole[kind] if whole[kind] else even)
        row = {"name": name, "codec": codec, "params": params, "bits": 8 * size / max(params, 1)}
        row |= {"entropy_bytes": round(sum(own[name].values())), "bytes": round(size)}
        rows.append(row | {"share": size / len(shipment.blob)})
    kinds = []
    for kind, c in shipment.coded.items():
        row = {"kind": kind, "coder": c.coder, "values": counts[kind]}
        row |= {"bits": 8 * len(c.data) / max(counts[kind], 1), "entropy_bytes": round(whole[kind])}
        kinds.append(row | {"bytes": len(c.data), "tried": c.tried})
    return {"tensors": rows, "streams": kinds}


def read_artifact_header(blob: bytes, what: str) -> tuple[dict, memoryview]:
    """(header, payload). Raises UserError when the file is not an intact artifact of this version."""
    header, payload = unpack_container(blob, ARTIFACT_MAGIC, ARTIFACT_VERSION, what)
    try:
        header = json.loads(expand(header, "brotli", MOST_HEADER))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{what} has a header that cannot be read ({e}); export it again") from e
    if not FOLDED and not well_formed(header):  # a built program opens what it has written
        raise UserError(f"{what} has a header that this program would not write; export it again")
    return header, payload


def well_formed(header: object) -> bool:
    """Whether a header has the right kinds of things in the right places; any hand may have made it."""
    kinds = {"knobs": dict, "config_hash": str, "tensors": list, "streams": list}
    if not isinstance(header, dict) or {name: type(part) for name, part in header.items()} != kinds:
        return False
    shapes = {env for env, (section, _) in all_knobs().items() if section in SHAPE_SECTIONS} | {*SHAPE_KNOBS}
    return (
        all(env in shapes and isinstance(text, str) for env, text in header["knobs"].items())
        and all(well_named(row) for row in header["tensors"])
        and all(types_of(row) == [str, str, int] for row in header["streams"])
    )


def types_of(row: object) -> list[type]:
    return [type(x) for x in row] if isinstance(row, list) else []


def well_named(row: object) -> bool:
    """Whether a tensor's row is a name, a codec and a shape that fit in a line of an error message."""
    return types_of(row) == [str, str, list] and row[0].isprintable() and len(repr(row)) <= 300


def open_artifact(blob: bytes, cfg: Config, world: World, what: str) -> Artifact:
    """Decode every tensor by the codec that the file names. Raises UserError where it is another model's."""
    header, payload = read_artifact_header(blob, what)
    shape = empty_model(cfg, world)
    params, tags = dict(shape.named_parameters()), param_tags(shape)
    rows = tensor_rows(params, tags)
    there, here = by_name(header["tensors"]), by_name(rows)
    codecs = {name: codec_of(tags[name].codec, there.get(name), here[name], cfg) for name in here}
    if list(there) != list(here) or None in codecs.values():
        odd = [n for n in sorted({*there, *here}) if n not in here or codecs[n] is None]
        name = next(iter(odd), "the order of tensors")
        raise UserError(
            f"{what} belongs to another model: {name} is {there.get(name)} there and {here.get(name)} here"
        )
    planes = {name: codecs[name].planes(tuple(dims)) for name, _, dims in rows}
    streams, tensors = unpool(header["streams"], payload, pool_planes(planes), what), {}
    for name, _, dims in rows:
        parts = {}
        for kind, plane in planes[name].items():
            parts[kind], streams[kind] = streams[kind][: plane.count], streams[kind][plane.count :]
        tensors[name] = codecs[name].decode(parts, tuple(dims))
    return Artifact(header["knobs"], header["config_hash"], tensors)


CODEC_NAME = re.compile(r"int([2-8])(?:\+lqer([1-9]\d{0,2})g(\d{1,5})b([2-8]))?")


def codec_of(own: Codec, there: object, here: list, cfg: Config) -> Codec | None:
    """The codec that an artifact's row names, or None: the configuration's own, or what SIZE_LADDER and
    LQER may make of it, integers of other bits, perhaps corrected."""
    if there == here:
        return own
    if not isinstance(there, list) or len(there) != 2 or there[1] != here[1] or not isinstance(own, IntRow):
        return None
    found = CODEC_NAME.fullmatch(str(there[0]))
    if not found:
        return None
    base = IntRow(int(found[1]))
    if cfg.gptq.lqer and found[2]:
        return LowRank(base, int(found[2]), int(found[3]), int(found[4]))
    return None if found[2] else base


def by_name(rows: object) -> dict[str, list]:
    """Tensor rows by their names, whoever wrote them."""
    rows = rows if isinstance(rows, list) else []
    return {str(row[0]): row[1:] for row in rows if isinstance(row, list) and row}


def tensor_rows(params: dict[str, nn.Parameter], tags: dict[str, Tag]) -> list[list]:
    """[name, codec, shape] of every tensor in the order in which an artifact holds them."""
    return [[n, tags[n].codec.name, list(params[n].shape)] for n in sorted(params, key=by_kind)]


def unpool(
    rows: list[list], payload: memoryview, pools: dict[str, list[Plane]], what: str
) -> dict[str, np.ndarray]:
    """Values of every pool. Raises UserError unless the file holds these pools and nothing else."""
    if [kind for kind, _, _ in rows] != list(pools) or sum(size for _, _, size in rows) != len(payload):
        raise UserError(f"{what} does not hold the streams of its tensors; export it again")
    found, at = {}, 0
    for kind, coder, size in rows:
        try:
            if size < 0:
                raise ValueError("a length below zero")
            found[kind] = decode_pool(bytes(payload[at : at + size]), pools[kind], coder)
        except ValueError as e:
            raise UserError(f"{what} has a stream {kind} that cannot be decoded: {e}; export it again") from e
        at += size
    return found


def load(blob: bytes, cfg: Config, world: World, what: str) -> GPT:
    """A fresh model holding what the artifact holds: the model that is scored. Raises UserError."""
    model = empty_model(cfg, world)
    tensors = open_artifact(blob, cfg, world, what).tensors
    model.load_state_dict({name: t.to(world.device) for name, t in tensors.items()}, assign=True)
    return make_fast(model, world)


def artifact_env(path: Path, env: dict[str, str]) -> dict[str, str]:
    """The environment with the artifact's own shape knobs filled in. Raises UserError where they clash."""
    if not path.is_file():
        raise UserError(f"ARTIFACT={path} does not exist; name a model.ptz that a run has written")
    knobs = read_artifact_header(path.read_bytes(), str(path))[0]["knobs"]
    merged = read_config({**knobs, **env})
    ours = shape_knobs(merged)
    names = [k for k in sorted({*knobs, *ours}) if knobs.get(k) != ours.get(k) and k != "EVAL_SEQ_LEN"]
    clash = [f"{k} (artifact {knobs.get(k, 'default')!r}, now {ours.get(k, 'default')!r})" for k in names]
    if clash:
        raise UserError(
            f"ARTIFACT={path} belongs to another configuration: {', '.join(clash)}; unset or match them"
        )
    return {**knobs, **env}


def predicted_bytes(cfg: Config, world: World, bottom: bool = False) -> int:
    """Artifact size expected before training, from the codecs' own estimates; or at the ladder's bottom."""
    shape = empty_model(cfg, world)
    params, tags = dict(shape.named_parameters()), param_tags(shape)
    for name, value in ladder_rungs(cfg.size.ladder) if cfg.size.ladder and bottom else ():
        tags = lowered(tags, name, value)
    return int(sum(tag.codec.bits(tuple(params[name].shape)) for name, tag in tags.items()) / 8)


LEAST_SHARE = 0.85  # of the forecast: what trained weights took was 0.9 of it or more (bench/artifact.md)


def refuse_hopeless_size(cfg: Config, world: World) -> None:
    """Raise UserError before the first step where even a lucky artifact is over at the ladder's bottom."""
    expected = predicted_bytes(cfg, world, bottom=True)
    if LEAST_SHARE * expected > SIZE_LIMIT:
        raise UserError(
            f"the artifact will take about {expected:,} bytes, at least {LEAST_SHARE * expected:,.0f}, and "
            f"the limit is {SIZE_LIMIT:,}; lower MATRIX_BITS, EMBED_BITS, NUM_LAYERS or MODEL_DIM, or let "
            f"SIZE_LADDER go further down"
        )


def log_weighed_bytes(model: GPT, code_bytes: int, world: World) -> None:
    """The size that the weights would have now: order-0 entropy of every stream, rounded to nearest."""
    if not world.main:
        return
    tags, grids, total = param_tags(model), grids_of(model), 0.0
    for name, p in model.named_parameters():
        planes = tags[name].codec.planes(tuple(p.shape))
        streams = tags[name].codec.encode(p.detach(), grid=grids.get(name))
        total += sum(entropy_bytes(planes[kind], part) for kind, part in streams.items())
    left = SIZE_LIMIT - code_bytes - total
    world.log(f"size_forecast: weights:{total:.0f} code:{code_bytes} left:{left:.0f}")


def coder_word(cfg: Config) -> str:
    """What compresses most of the artifact, for log lines and score tags."""
    return "rans" if cfg.size.compressor == "auto" else cfg.size.compressor


@of_config
def scheme(cfg: Config) -> str:
    """The matrices' codec in score tags: int6_rans, ternary_rans, float16_brotli, int8_ternary_rans."""
    integer = "float16" if cfg.export.matrix_bits == 16 else f"int{cfg.export.matrix_bits}"
    codecs = dict.fromkeys(
        integer if name == "int" else name for name in (cfg.export.attn_codec, cfg.export.mlp_codec)
    )
    return "_".join([*codecs, coder_word(cfg)])


# ======================================================================================
# 22. Evaluate -- every target exactly once; bits per byte
# uses: Config Schedule Journal World Data Layers Model Export
# ======================================================================================


class Score(NamedTuple):
    """nats per token and bits per byte over the targets of the validation split."""

    val_loss: float
    val_bpb: float
    tokens: int
    bytes: int
    seconds: float
    partial: bool  # not the whole split: no score to show around

    def line(self) -> str:
        took = f"eval_time:{self.seconds * 1000:.0f}ms" + " partial" * self.partial
        return f"val_loss:{self.val_loss:.8f} val_bpb:{self.val_bpb:.8f} {took}"


def window_edges(targets: int, length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """(firsts, stops): window i reads the `length` tokens before stops[i] and scores targets from firsts[i].

    The first window scores all it reads, the others their last `stride`; together each target once.
    stride = length is plain scoring. Every window is equally long, so one graph serves them all.
    """
    first = min(length, targets)
    stops = np.append(np.arange(first, targets, stride), targets) if targets > first else np.array([targets])
    return np.concatenate([[0], stops[:-1]]), stops


def rows_per_forward(width: int, cfg: Config, world: World) -> int:
    """Windows in one evaluation forward of one rank: VAL_BATCH_TOKENS shared out as a training step is."""
    return max(1, cfg.scoring.batch_tokens // (world.size * micro_batches(cfg, world.size) * width))


@torch.no_grad()
def warm_evaluation(model: GPT, bos: int, cfg: Config, world: World) -> None:
    """Compile what scoring will run, on random tokens, before the clock starts; the random state is kept."""
    if not world.compiling or cfg.budget.warmup_steps == 0:
        return
    targets = token_count(cfg, "val") - 1
    targets = min(targets, cfg.scoring.max_tokens or targets)
    width = min(cfg.eval_len, targets)
    share = -(-len(window_edges(targets, width, width)[0]) // world.size)
    rows = min(rows_per_forward(width, cfg, world), share)
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab, (rows, width + 1), dtype=np.int64)
    model.eval()
    for quantised in {False, cfg.quantises}:  # a loaded artifact, and weights as they are trained
        window_nll(model, list(tokens), bos, cfg, world, final_phase(cfg)._replace(qat=quantised))
    model.train()


@torch.no_grad()
def score_windows(
    model: GPT, val: Validation, cfg: Config, world: World, edges: tuple, phase: Phase
) -> np.ndarray:
    """Nats (float32) of this rank's targets, in stream order. `edges` are its own windows, contiguous."""
    firsts, stops = edges
    if len(firsts) == 0:
        return np.zeros(0, np.float32)
    width = min(cfg.eval_len, val.targets)
    rows = min(rows_per_forward(width, cfg, world), len(firsts))
    nats, times = np.zeros(stops[-1] - firsts[0], np.float32), np.zeros(stops[-1] - firsts[0], np.uint8)
    for at in range(0, len(firsts), rows):
        some = np.minimum(np.arange(at, at + rows), len(firsts) - 1)  # the last batch repeats its last window
        windows = [val.tokens[stops[i] - width : stops[i] + 1] for i in some]
        nll = window_nll(model, windows, val.tokenizer.bos, cfg, world, phase)
        for row, i in enumerate(some[: len(firsts) - at]):
            span = slice(firsts[i] - firsts[0], stops[i] - firsts[0])
            nats[span] = nll[row, width - (stops[i] - firsts[i]) :]
            times[span] += 1
        world.journal.beat()
    assert (times == 1).all(), "a target was scored twice or never"
    return nats


def window_nll(
    model: GPT, windows: list[np.ndarray], bos: int, cfg: Config, world: World, phase: Phase
) -> np.ndarray:
    """Windows of L+1 tokens -> (rows, L) nats, by the model's one forward."""
    width = len(windows[0]) - 1
    batch = packed(windows, bos, cfg.eval_len) if cfg.data.packing else as_rows(windows, width)
    batch = to_device(batch, world)
    nll, _ = model(Ctx(batch.tokens, batch.docs, cfg.eval_len, phase), batch.targets)
    return nll.float().cpu().numpy().reshape(len(windows), width)


def evaluate(
    model: GPT, val: Validation, stride: int, cfg: Config, world: World, phase: Phase | None = None
) -> tuple[Score, np.ndarray]:
    """Score the whole split: (score, this rank's nats). Ranks take contiguous runs of windows.

    Without a phase the model is scored as a loaded artifact is, all loops on.
    """
    begin = time.perf_counter()
    was_training = model.training
    model.eval()
    firsts, stops = window_edges(val.targets, cfg.eval_len, stride)
    mine = np.array_split(np.arange(len(firsts)), world.size)[world.rank]
    edges = (firsts[mine], stops[mine])
    nats = score_windows(model, val, cfg, world, edges, phase or final_phase(cfg))
    covered = (int(firsts[mine[0]]), int(stops[mine[-1]])) if len(mine) else (0, 0)
    sums = torch.tensor(
        [nats.sum(dtype=np.float64), len(nats), val.target_bytes(*covered)], dtype=torch.float64
    )
    loss, tokens, bytes_ = world.sum_(sums).tolist()
    assert tokens == val.targets, f"{tokens:.0f} targets were scored, the split has {val.targets}"
    model.train(was_training)
    bpb = loss / math.log(2) / max(bytes_, 1)
    score = Score(loss / tokens, bpb, int(tokens), int(bytes_), time.perf_counter() - begin, val.partial)
    return score, nats


def write_nats(nats: np.ndarray, cfg: Config, world: World) -> None:
    """NLL_PATH: the nats of every target in stream order, float32, for audits."""
    parts = world.gather(nats)
    if world.main:
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(parts).astype(np.float32))
        write_atomic(Path(cfg.run.nll_path), buffer.getvalue())


def score_artifact(blob: bytes, val: Validation, cfg: Config, world: World) -> dict[str, Score]:
    """Load the artifact's bytes into a fresh model and score that; the declared score is logged last."""
    model = load(blob, cfg, world, "the artifact")
    strides = {"roundtrip": cfg.eval_len} | ({"sliding": cfg.scoring.stride} if cfg.scoring.sliding else {})
    words = {"roundtrip": ("", "roundtrip"), "sliding": ("_sliding_window", "sliding_window")}
    scores = {}
    for name in sorted(strides, key=lambda n: n == cfg.run.score):
        with world.journal.phase(f"eval_{name}"):
            scores[name], nats = evaluate(model, val, strides[name], cfg, world)
        world.log(f"quantized{words[name][0]} {scores[name].line()}")
        world.log(
            f"final_{scheme(cfg)}_{words[name][1]}_exact val_loss:{scores[name].val_loss:.8f} "
            f"val_bpb:{scores[name].val_bpb:.8f}" + " partial" * scores[name].partial
        )
        if cfg.run.nll_path and name == cfg.run.score:
            write_nats(nats, cfg, world)
    return scores


@torch.no_grad()
def sample_text(model: GPT, tokenizer: Tokenizer, cfg: Config, world: World) -> str:
    """Text of SAMPLE tokens drawn from the model, from BOS on, with SEED: to look at, not to score."""
    generator, phase = torch.Generator().manual_seed(cfg.budget.seed), final_phase(cfg)
    ids = [tokenizer.bos]
    for _ in range(cfg.run.sample):
        recent = torch.tensor([ids[-cfg.eval_len :]], device=world.device)
        hidden = model.hidden(Ctx(recent, None, cfg.eval_len, phase)).y[0, -1:]
        share = model.logits(hidden, phase).softmax(-1)[0]
        ids.append(int(torch.multinomial(share.cpu(), 1, generator=generator)))
    text = tokenizer.pieces(ids)
    return recased(text) if cfg.data.caseops else text


# ======================================================================================
# 23. Report -- what a run says of itself: log header, forecast, results.json, last table
# uses: Config Journal World Data Model Train Export Evaluate
# ======================================================================================


class Facts(NamedTuple):
    """The program itself: what is shipped as code, and what was read."""

    source: str
    sha256: str
    code_bytes: int  # CODE_BYTES, or stat() of the file that runs
    tokenizer_bytes: int


def read_facts(tokenizer: Tokenizer, cfg: Config) -> Facts:
    """A packed program registers its unpacked source with linecache, where this finds it."""
    source = "".join(linecache.getlines(read_facts.__code__.co_filename))
    size = cfg.size.code_bytes or Path(__file__).stat().st_size
    return Facts(source, hashlib.sha256(source.encode()).hexdigest(), size, tokenizer.file_bytes)


def log_header(facts: Facts, cfg: Config, world: World) -> None:
    """The versions, and the lines that log readers of this field look for (rules 3.2)."""
    changed = {} if FOLDED else changed_knobs(cfg)
    knobs = (f"knob:{env}={text}{' (changed)' * (env in changed)}" for env, text in knob_values(cfg).items())
    versions = f"Running Python {sys.version.split()[0]}\nRunning PyTorch {torch.__version__}"
    world.journal.log("\n".join([versions, *knobs]), file_only=True)
    folder = Path(cfg.run.data)
    shards = [] if cfg.run.eval_only else list_shards(folder, "train")
    gpu = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if gpu else platform.processor() or "cpu"
    for line in (
        f"run_dir:{world.run_dir} stage:{SOURCE_STAGE} source_sha256:{facts.sha256[:16]}",
        f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={cfg.run.tokenizer}",
        f"train_loader:dataset:{folder.name} train_shards:{len(shards)}",
        f"val_loader:shards pattern={folder}/fineweb_val_*.bin tokens:{token_count(cfg, 'val') - 1}",
        f"world_size:{world.size} grad_accum_steps:{micro_batches(cfg, world.size)} device:{device} "
        f"dtype:{str(world.dtype).removeprefix('torch.')} compile:{int(world.compiling)}",
        f"train_batch_tokens:{cfg.data.batch_tokens} train_seq_len:{cfg.data.seq_len} "
        f"iterations:{cfg.budget.iterations} warmup_steps:{cfg.budget.warmup_steps} "
        f"max_wallclock_seconds:{cfg.budget.seconds:.3f}",
        f"seed:{cfg.budget.seed} config_hash:{config_hash(cfg)}",
    ):
        world.log(line)


def log_plan(model: GPT, cfg: Config, world: World) -> None:
    """What is about to be trained and what it should cost, before the first step."""
    embed_lr = cfg.optim.tied_embed_lr if cfg.model.tied else cfg.optim.embed_lr
    world.log(f"model_params:{param_count(model)}")
    world.log(
        f"attention_mode:gqa num_heads:{cfg.model.heads} num_kv_heads:{cfg.model.kv_heads} "
        f"backend:{model.attention_name} loss:{model.loss_name}"
    )
    world.log(
        f"tie_embeddings:{cfg.model.tied} embed_lr:{embed_lr} "
        f"head_lr:{0.0 if cfg.model.tied else cfg.optim.head_lr} matrix_lr:{cfg.optim.matrix_lr} "
        f"scalar_lr:{cfg.optim.scalar_lr}"
    )
    if cfg.run.forecast:
        refuse_hopeless_size(cfg, world)
        log_forecast(param_count(model), cfg, world)


def log_forecast(count: int, cfg: Config, world: World) -> None:
    """What the run is going to take, of the budget and of memory."""
    # weights, gradients, and two moments each (Muon keeps one, and as much again in flight), the average
    held = 4 * count * (4 + cfg.optim.ema_on)
    kept = activation_bytes(cfg, world)
    world.log(
        f"forecast: params:{count} artifact_bytes:{predicted_bytes(cfg, world)} of {SIZE_LIMIT} "
        f"peak_tensor_memory:{(held + kept) / 2**20:.0f} MiB (weights and moments {held / 2**20:.0f}, "
        f"kept activations {kept / 2**20:.0f})"
    )


def log_sizes(blob: bytes, facts: Facts, cfg: Config, world: World) -> None:
    total, word = facts.code_bytes + len(blob), coder_word(cfg)
    for kind, coder, size in read_artifact_header(blob, "the artifact")[0]["streams"]:
        world.log(f"stream:{kind} coder:{coder} compressed:{size} bytes")
    world.log(f"Code size: {facts.code_bytes} bytes")
    world.log(f"Serialized model quantized+{word}: {len(blob)} bytes")
    world.log(f"Total submission size quantized+{word}: {total} bytes")
    if total > SIZE_LIMIT:
        world.log(
            f"over_budget: {total - SIZE_LIMIT} bytes above {SIZE_LIMIT}; give SIZE_LADDER more rungs, lower "
            f"MATRIX_BITS or EMBED_BITS, or train a smaller model"
        )


def compile_cache_state(world: World) -> str:
    """Whether compilation found all its results on disk: cold, warm, or none where nothing was compiled."""
    if not world.compiling:
        return "none"
    found = torch._dynamo.utils.counters["inductor"]
    return "warm" if found["fxgraph_cache_hit"] and not found["fxgraph_cache_miss"] else "cold"


def graphs_made() -> int:
    """Graphs that Dynamo has made in this process so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compile_facts(t: Trainer | None, cfg: Config, world: World) -> dict[str, object]:
    """What compilation did, of the rank where most graphs were made after warm-up; those are told in a line.

    Each took seconds of the clock, and all ranks waited for it.
    """
    graphs, warm = graphs_made(), t.graphs if t else 0
    late, graphs, warm = max(world.gather((graphs - warm, graphs, warm)))
    if warm and late:
        world.log(
            f"compile: {late} graphs were made after warm-up, which had made {warm}: something that a graph "
            f"depends on changed during the run; each may have cost seconds of the clock"
        )
    told = {"graphs": graphs, "graphs_after_warmup": warm, "mode": cfg.compute.compile_mode}
    return told | {"cache": compile_cache_state(world), "fallback": world.fallback}


def foreign_files() -> list[str]:
    """Imported Python files that are neither this program, the standard library, nor installed packages."""
    homes, own = sysconfig.get_paths(), Path(__file__).resolve()
    homes = tuple(homes[name] for name in ("stdlib", "purelib", "platlib"))
    files = {getattr(m, "__file__", None) for m in list(sys.modules.values())} - {None}
    files = (f for f in files if not f.startswith(homes))
    return sorted(f for f in files if Path(f).is_file() and Path(f).resolve() != own)


def shipped_facts(t: Trainer | None, cfg: Config) -> dict[str, object]:
    """Whose weights ship, and by which figures; null stands for a round trip that there was no time for."""
    if not t:
        return {}
    finite = json.loads(json.dumps(t.shipped), parse_constant=lambda _: None)
    return {**finite, "held_out_tokens": tokens_held_out(cfg)}


def step_facts(t: Trainer | None) -> dict[str, object]:
    """Of the median step and of the fastest tenth; the mean knows of compiling and of neighbours too."""
    paces = sorted(t.clock.paces) if t else []
    times = {"median": statistics.median(paces), "fastest_tenth": paces[len(paces) // 10]} if paces else None
    return {"step_seconds": times, "threads": torch.get_num_threads()}


def unfolded_facts(t: Trainer | None, cfg: Config, world: World) -> dict[str, object]:
    """What a packed program leaves out."""
    return {"compile": compile_facts(t, cfg, world), "shipped": shipped_facts(t, cfg), **step_facts(t)}


def results_of(t: Trainer | None, scores: dict[str, Score], facts: Facts, cfg: Config, world: World) -> dict:
    """results.json, all but the bytes: every number a record needs, measured here and now."""
    seconds = t.clock.spent if t else 0.0
    steps = t.state.step if t else 0
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {
        "run_id": cfg.run.id or world.run_dir.name,
        "config": knob_values(cfg),
        "config_hash": config_hash(cfg),
        "seed": cfg.budget.seed,
        "world_size": world.size,
        "device": str(world.device),
        "dtype": str(world.dtype),
        "versions": versions,
        "stage": SOURCE_STAGE,
        "source_sha256": facts.sha256,
        "steps": steps,
        "train_tokens": steps * cfg.data.batch_tokens,
        "train_seconds": seconds,
        "tokens_per_second": steps * cfg.data.batch_tokens / seconds if seconds else 0.0,
        "params": param_count(empty_model(cfg, world)),
        "score": cfg.run.score,
        "scores": {name: score._asdict() for name, score in scores.items()},
        "phases": [{"name": k, "seconds": v} for k, v in world.journal.ledger.items()],
        "resumed": bool(t and t.state.resumed),
        "skipped_steps": t.state.skipped if t else 0,
        "compile_cache": compile_cache_state(world),
        **({} if FOLDED else unfolded_facts(t, cfg, world)),
        "process_seconds": time.perf_counter() - world.journal.started,
        "tokenizer_bytes": {"bytes": facts.tokenizer_bytes, "note": "not counted by precedent"},
        "extra_files_imported": foreign_files(),
        "system_binaries": [],
        "peak_memory_bytes": world.peak_bytes()[0],
    }


def finish(results: dict, blob: bytes, val: Validation, facts: Facts, world: World) -> None:
    """Trace, results.json, and the table that a person reads."""
    total = facts.code_bytes + len(blob)
    results["bytes"] = {"code": facts.code_bytes, "model": len(blob), "total": total, "limit": SIZE_LIMIT}
    results["order0_bpb"] = val.order0_bpb()
    for name, score in results["scores"].items():
        world.journal.trace(
            score=name, val_loss=score["val_loss"].hex(), tokens=score["tokens"], bytes=score["bytes"]
        )
    allocated, reserved = (b / 2**20 for b in world.peak_bytes())
    world.log(f"peak memory allocated: {allocated:.0f} MiB reserved: {reserved:.0f} MiB")
    if world.main:
        write_atomic(world.run_dir / "results.json", json.dumps(results, indent=1).encode())
    scores = results["scores"]
    rows = [("steps", f"{results['steps']:,}"), ("tokens per second", f"{results['tokens_per_second']:,.0f}")]
    for name, s in scores.items():
        rows.append((f"bits per byte, {name}", f"{s['val_bpb']:.4f}" + " (partial)" * s["partial"]))
    rows += [
        ("order-0 entropy of its tokens", f"{results['order0_bpb']:.4f}"),
        ("bytes of code", f"{facts.code_bytes:,}"),
        ("bytes of weights", f"{len(blob):,}"),
        (f"bytes left of {SIZE_LIMIT:,}", f"{SIZE_LIMIT - total:,}"),
        ("files", str(world.run_dir)),
    ]
    world.log("\n".join(f"  {name:<32}{value:>16}" for name, value in rows))


# ======================================================================================
# 24. Main -- the story on one page
# uses: Config Schedule Journal World Clock Data Model Speed Train Export Evaluate Report
# ======================================================================================


def compiled_or_eager(t: Trainer, bos: int) -> Trainer:
    """The trainer with every graph of the run made, or, where that fails on some rank, an eager one on all.

    Without warm-up they are made when they are needed. Raises UserError where compilation was asked for. A
    built program does without this: it is built for one record, and what it would score eagerly is another.
    """
    if not t.world.compiling or t.cfg.budget.warmup_steps == 0:
        return t

    def work() -> None:
        try_graphs(t)
        warm_evaluation(t.model, bos, t.cfg, t.world)

    with t.world.journal.phase("warmup"):
        reasons = [why for why in t.world.gather(compile_failure(work)) if why]
    if not reasons:
        return t
    world = eagerly(reasons[0], t.cfg, t.world)
    model = make_model(t.cfg, world)
    settle_kernels(model, t.cfg, world)
    return Trainer(model, t.loader, t.cfg, world, t.source)


def open_trainer(facts: Facts, tokenizer: Tokenizer, cfg: Config, world: World) -> Trainer:
    """A trainer at step 0, or where the newest readable checkpoint left it."""
    shape_knobs(cfg)  # raises now rather than after ten minutes of training
    loader = Loader(cfg, world, tokenizer.bos)
    find_validation(cfg)
    found = find_checkpoint(loader, cfg, world) if cfg.run.resume else None
    open_journal(cfg, world)
    world = resumed_speed(found, cfg, world) if cfg.run.resume else choose_speed(cfg, world)
    model = make_fast(make_model(cfg, world), world)
    settle_kernels(model, cfg, world)
    t = Trainer(model, loader, cfg, world, facts.sha256)
    if not FOLDED:
        t = compiled_or_eager(t, tokenizer.bos)
        world = t.world
    log_header(facts, cfg, world)
    log_plan(t.model, cfg, world)
    for line in t.optimizer.table():
        world.log(line)
    with world.journal.phase("warmup"):
        warm_up(t)
        warm_evaluation(t.model, tokenizer.bos, cfg, world)
        keep_time(t)
    if not FOLDED:
        t.graphs = graphs_made()
    if cfg.run.resume and found:
        resume(t, found)
    return t


def train_and_ship(t: Trainer, val: Callable[[], Validation], facts: Facts) -> bytes | None:
    """Train, save, export: the artifact's bytes, or None when the run was asked to stop."""
    cfg, world = t.cfg, t.world

    def validate(step: int, train_ms: float) -> None:
        at = Progress(step, train_ms / 1000, t.clock.reserve)  # loops and quantiser as trained so far,
        now = phase_at(at, cfg)._replace(routing=1.0, extra=0)  # experts as they are scored in the end
        with world.journal.phase("validate"):
            score, _ = evaluate(t.model, val(), cfg.eval_len, cfg, world, now)
        world.log(
            f"step:{step}/{cfg.budget.iterations} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} "
            f"train_time:{train_ms:.0f}ms step_avg:{train_ms / max(step, 1):.2f}ms"
            f"{' partial' * score.partial}"
        )
        world.journal.trace(step=step - 1, val_loss=score.val_loss.hex())
        if cfg.run.forecast:
            log_weighed_bytes(t.model, facts.code_bytes, world)

    with world.journal.phase("train"):
        asked = train_and_save(t, validate) if cfg.run.saves else train(t, validate)
    if cfg.run.progress:
        world.journal.close_bar()
    if cfg.run.saves and (asked or not t.state.finished):
        t.loader.close()
        world.log(f"interrupted: saved at step {t.state.step}; RESUME=1 RUN_DIR={world.run_dir} continues")
        return None
    settle_weights(t)
    with world.journal.phase("calibrate"):
        hessians = calibrate(t) if cfg.gptq.on else {}
    t.loader.close()
    with world.journal.phase("export"):
        blob = world.share(lambda: ship(t.model, hessians, facts.code_bytes, cfg, world))
    log_sizes(blob, facts, cfg, world)
    return blob


def train_and_save(t: Trainer, validate: Callable[[int, float], None]) -> bool:
    """Train until done or until a signal, and leave a checkpoint; whether any rank was asked to stop."""
    with stop_on_signal(t.clock):
        train(t, validate)
        save(t)
        return any(t.world.gather(t.clock.interrupted))  # also in the last step, also on another rank


def score_only(facts: Facts, tokenizer: Tokenizer, cfg: Config, world: World) -> None:
    """EVAL_ONLY=1: score an artifact that some run has written, or print text drawn from it."""
    world, what = choose_speed(cfg, world), cfg.run.artifact or world.run_dir.parent / "model.ptz"
    find_validation(cfg)  # raises before anything is written
    open_journal(cfg, world)
    blob = Path(what).read_bytes()
    log_header(facts, cfg, world)
    log_sizes(blob, facts, cfg, world)
    if cfg.run.sample:
        world = dataclasses.replace(world, compiling=False)  # every length would be a graph of its own
        world.log(sample_text(load(blob, cfg, world, str(what)), tokenizer, cfg, world))
        return
    val = Validation(cfg, tokenizer)
    scores = score_artifact(blob, val, cfg, world)
    finish(results_of(None, scores, facts, cfg, world), blob, val, facts, world)


def story(cfg: Config, doubts: list[str], world: World) -> int:
    """Train, ship, load what was shipped, score it. Returns the exit status."""
    tokenizer = load_tokenizer(cfg)
    facts, val = read_facts(tokenizer, cfg), functools.cache(lambda: Validation(cfg, tokenizer))
    world.journal.log(facts.source + "=" * 100, file_only=True)
    for doubt in doubts:
        world.log(f"warning: {doubt}")
    if cfg.run.eval_only:
        score_only(facts, tokenizer, cfg, world)
        return 0
    t = open_trainer(facts, tokenizer, cfg, world)
    if cfg.run.precompile:
        t.loader.close()
        if t.world.compiling:
            world.log("precompiled: the graphs of this configuration are in the compile cache")
        else:
            world.log("precompiled: nothing, because nothing is compiled here; COMPILE=1 asks for it")
        return 0
    blob = train_and_ship(t, val, facts)
    if cfg.run.saves and blob is None:
        return 128 + signal.SIGTERM
    with t.world.journal.phase("eval_pre_quant"):
        before, _ = evaluate(t.model, val(), cfg.eval_len, cfg, t.world, trained_phase(t))
    t.world.log(f"pre-quantization post-ema {before.line()}")
    scores = {"pre_quant": before, **score_artifact(blob, val(), cfg, t.world)}
    finish(results_of(t, scores, facts, cfg, t.world), blob, val(), facts, t.world)
    return 0


def with_artifact(env: dict[str, str]) -> dict[str, str]:
    """With EVAL_ONLY=1, the environment and the shape of the model that the artifact holds."""
    if not parse(env.get("EVAL_ONLY", "0"), bool):
        return env
    home = Path(env.get("RUN_DIR") or f"runs/{env.get('RUN_ID', '')}")
    return artifact_env(Path(env.get("ARTIFACT") or home / "model.ptz"), env)


def keep_compile_cache(folder: Path) -> None:
    """Have what is compiled kept there, unless the environment says where already. Raises UserError.

    Only this and torch itself write to the environment: the compiler asks nobody else, and its workers
    inherit it.
    """
    try:
        (folder / "triton").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(
            f"COMPILE_CACHE={folder} cannot be written ({e.strerror}); choose another folder"
        ) from e
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.resolve()))
    os.environ.setdefault("TRITON_CACHE_DIR", str((folder / "triton").resolve()))


def run(env: dict[str, str]) -> int:
    """Read the configuration, join the world, tell the story. Raises UserError."""
    cfg, doubts = (read_live(env), []) if FOLDED else (read_config(with_artifact(env)), near_misses(env))
    if cfg.run.compile_cache:
        keep_compile_cache(Path(cfg.run.compile_cache))
    if cfg.run.strict and doubts:
        raise UserError("; ".join(doubts))
    world = open_world(cfg, env)
    try:
        with watchdog(world, cfg.compute.dist_timeout):
            return story(cfg, doubts, world)
    except UserError as e:
        world.journal.log(f"error: {e}", file_only=True)
        raise
    finally:
        if cfg.run.progress:
            world.journal.close_bar()
        close_world(world)


def command(env: dict[str, str], words: list[str]) -> int:
    """Do what the command line asks for; without words, the run. Returns the exit status."""
    if not FOLDED and words == ["--knobs"]:
        print(knob_table())
        return 0
    if not FOLDED and words == ["--params"]:
        alone = World(0, 1, torch.device("cpu"), torch.float32, False, Journal(None), Path())
        print(f"model_params:{param_count(empty_model(read_config(env), alone))}")
        return 0
    if words:
        known = "none: the program is built" if FOLDED else "--knobs, --params or none (knobs are variables)"
        raise UserError(f"unknown words {' '.join(words)!r}; want {known}")
    return run(env)


def main() -> None:
    try:
        sys.exit(command(thawed(dict(os.environ)), sys.argv[1:]))
    except UserError as e:
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (rank {rank})'}: {e}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
