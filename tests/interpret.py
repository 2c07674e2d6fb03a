"""What the Triton kernels compute, in Triton's interpreter on a CPU: python tests/interpret.py > figures.json

A process of its own, because TRITON_INTERPRET has to be set before triton is first imported. Prints
{case: figures} as JSON; tests/test_triton.py says what they have to be. Distances are relative to the norm
of float64's result.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import train_gpt
from train_gpt import (
    descriptors,
    one_pass_kernel,
    one_pass_loss,
    squared_kernels,
    squared_mlp,
    two_pass_loss,
    two_pass_operator,
)

CAP = 30.0


def distance(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want).norm() / want.norm())


def logits_and_targets(rows: int, cols: int, scale: float = 20.0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(rows * cols)
    return scale * torch.randn(rows, cols, generator=random), torch.randint(cols, (rows,), generator=random)


def truth(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nats and slopes in float64, from the formula alone; a negative target counts for nothing."""
    x = logits.double().requires_grad_()
    z = CAP * torch.tanh(x / CAP)
    nll = torch.log(torch.exp(z).sum(1)) - z[torch.arange(len(z)), targets.clamp_min(0)]
    nll = nll * (targets >= 0)
    return nll.detach(), torch.autograd.grad(nll.sum(), x)[0]


def one_pass(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    (rows, cols), place, nll = logits.shape, logits.clone(), torch.empty(len(logits))
    one_pass_kernel()[rows,](place, targets, nll, cols, CAP, 1 << (cols - 1).bit_length(), False)
    return nll, place


def two_pass(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    nll, _ = two_pass_operator()(leaf, targets, CAP)
    return nll.detach(), torch.autograd.grad(nll.sum(), leaf)[0]


def softcap_cases() -> dict:
    found = {}
    for form in (one_pass, two_pass):
        for rows, cols in (
            (5, 37),
            (1, 1024),
            (4, 1000),
            (3, 8192),
            (2, 12000 if form is one_pass else 20000),
        ):
            logits, targets = logits_and_targets(rows, cols)
            pairs = zip(form(logits, targets), truth(logits, targets), strict=True)
            found[f"{form.__name__} {rows}x{cols}"] = [distance(a, b) for a, b in pairs]
        logits, targets = logits_and_targets(4, 500)
        half = logits.bfloat16()
        pairs = zip(form(half, targets), truth(half, targets), strict=True)
        found[f"{form.__name__} bfloat16"] = [distance(a, b) for a, b in pairs]
        targets[1] = -100
        nll, slopes = form(logits, targets)
        want = truth(logits, targets)
        found[f"{form.__name__} ignored"] = [distance(nll, want[0]), distance(slopes, want[1])]
        found[f"{form.__name__} ignored row"] = [float(nll[1]), float(slopes[1].abs().max())]
        found[f"{form.__name__} extremes"] = extremes(form)
        logits[2, 7] = torch.nan
        nll, slopes = form(logits, targets.clamp_min(0))
        found[f"{form.__name__} nan rows"] = [
            torch.isnan(t.reshape(4, -1)).any(1).tolist() for t in (nll, slopes)
        ]
    return found


def extremes(form: Callable) -> list[float]:
    """Largest error of nats over 64, and whether all is finite: logits all huge, all tiny, and both."""
    logits = torch.stack([torch.full((300,), 1e30), torch.full((300,), -1e30), torch.zeros(300)])
    logits[2, :150], logits[2, 150:] = 1e30, -1e30
    targets = torch.tensor([0, 5, 299])
    nll, slopes = form(logits, targets)
    want = truth(logits, targets)[0]
    return [
        float((nll - want).abs().max() / 64),
        float(torch.isfinite(slopes).all() and torch.isfinite(nll).all()),
    ]


def whole_loss() -> dict:
    """Hidden states and head: nats, and both gradients for incoming gradients that are not alike."""
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 16, generator=random), 3 * torch.randn(100, 16, generator=random)
    targets, g = torch.randint(100, (6,), generator=random), torch.randn(6, generator=random)

    def gradients(loss: Callable, dtype: torch.dtype) -> list[Tensor]:
        h, w = (t.to(dtype).requires_grad_() for t in (hidden, weight))
        nll = loss(h, w, targets, CAP)
        return [nll.detach(), *torch.autograd.grad(nll, (h, w), g.to(dtype))]

    want = gradients(loss_truth, torch.float64)
    forms = {"one_pass": one_pass_loss(False), "two_pass": two_pass_loss()}
    found = {name: gradients(loss, torch.float32) for name, loss in forms.items()}
    return {
        f"whole loss {name}": [distance(a, b) for a, b in zip(side, want, strict=True)]
        for name, side in found.items()
    }


def loss_truth(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    z = cap * torch.tanh(hidden @ weight.T / cap)
    return torch.logsumexp(z, 1) - z[torch.arange(len(z)), targets]


def mlp_truth(x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    h = x @ up.T
    return torch.where(h > 0, h, slope * h).square() @ down.T


def mlp_cases() -> dict:
    found = {}
    for rows, width, hidden, slope in (
        (70, 40, 90, 0.5),
        (64, 32, 64, 0.0),
        (33, 17, 130, 0.25),
        (1, 8, 5, 0.5),
    ):
        random = torch.Generator().manual_seed(rows)
        drawn = [
            torch.randn(*shape, generator=random)
            for shape in ((rows, width), (hidden, width), (width, hidden))
        ]
        sides = []
        for function, dtype in ((squared_mlp(), torch.float32), (mlp_truth, torch.float64)):
            leaves = [t.to(dtype).requires_grad_() for t in drawn]
            y = function(*leaves, slope)
            sides.append([y.detach(), *torch.autograd.grad(y.square().mean(), leaves)])
        found[f"mlp {rows}x{width}x{hidden} slope {slope}"] = [
            distance(a, b) for a, b in zip(*sides, strict=True)
        ]
    return found


def descriptor_cases() -> dict:
    """by_tma on small tiles, the last ones partly outside the matrices, both ways, against the plain form."""
    random, found = torch.Generator().manual_seed(3), {}
    a, b = torch.randn(72, 40, generator=random), torch.randn(56, 40, generator=random)
    m, n, k = 32, 32, 16
    for back in (False, True):
        pre = torch.randn(72, 56, generator=random)
        want = squared_plain(a, b, pre, back)
        out = torch.empty_like(pre)
        views = descriptors((a, b, pre, out), ([m, k], [n, k], [m, n // 2], [m, n // 2]))
        squared_kernels()[0][3,](*views, 72, 56, 40, 0.5, back, 3, m, n, k)
        found[f"by_tma {'back' if back else 'forward'}"] = [
            distance(t, w) for t, w in zip((pre, out), want, strict=True)
        ]
    return found


def squared_plain(a: Tensor, b: Tensor, pre: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    a, b, pre = a.double(), b.double(), pre.double()
    if back:
        return pre, (a @ b.T) * 2.0 * torch.where(pre > 0, pre, 0.25 * pre)
    pre = a @ b.T
    return pre, torch.where(pre > 0, pre, 0.5 * pre).square()


def main() -> None:
    train_gpt.runs_triton = lambda t: True
    found = softcap_cases() | whole_loss() | mlp_cases() | descriptor_cases()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
