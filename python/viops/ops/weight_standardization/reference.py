"""Plain PyTorch for weight standardization: the yardstick of the kernels and the fallback.

Source: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
Standardization", arXiv:1903.10520, section 3, and the authors' code.

`standardize_weight` is differentiable by autograd; ``*_backward`` is the same derivative written
out, for callers that stand below autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...tensors import accumulation_dtype


def standardize_weight(
    weight: Tensor,
    *,
    eps: float = 1e-5,
    unbiased: bool = True,
    eps_inside: bool = True,
    gain: Tensor | None = None,
) -> Tensor:
    """As one writes it by hand."""
    wide = weight.to(accumulation_dtype(weight.dtype)).flatten(1)  # [O, K]
    wide = wide - wide[:, :1].detach()  # small where weights are far from zero
    wide = wide - wide.mean(dim=1, keepdim=True)
    var = wide.square().sum(dim=1, keepdim=True) / degrees(wide.shape[1], unbiased)
    if eps_inside:
        out = wide * (var + eps).rsqrt()
    else:  # no gradient through the root of zero
        out = wide / (torch.where(var > 0, var, 1).sqrt() * (var > 0) + eps)
    if gain is not None:
        out = out * gain.to(out.dtype).reshape(-1, 1)
    return torch.empty_like(weight).copy_(out.reshape(weight.shape))


def standardize_weights(
    weights: Sequence[Tensor],
    *,
    eps: float = 1e-5,
    unbiased: bool = True,
    eps_inside: bool = True,
    gains: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """standardize_weight of each."""
    options = {"eps": eps, "unbiased": unbiased, "eps_inside": eps_inside}
    gains = [None] * len(weights) if gains is None else gains
    return [
        standardize_weight(weight, gain=gain, **options)  # type: ignore[arg-type]
        for weight, gain in zip(weights, gains, strict=True)
    ]


def degrees(size: int, unbiased: bool) -> int:
    """What a sum of so many squares is divided by: a lone one has no variance, and gives zero."""
    return max(size - unbiased, 1)


def standardize_weight_forward(
    weight: Tensor, gain: Tensor | None, eps: float, unbiased: bool, eps_inside: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out [O, K]; the mean [O], relative to each filter's first weight; and the factor [O] that
    weight - mean is multiplied with, without gain.

    weight [O, K], gain [O].
    """
    wide = weight.to(accumulation_dtype(weight.dtype))
    wide = wide - wide[:, :1]
    mean = wide.sum(dim=1) / max(weight.shape[1], 1)
    wide = wide - mean[:, None]
    var = wide.square().sum(dim=1) / degrees(weight.shape[1], unbiased)
    factor = (var + eps).rsqrt() if eps_inside else 1 / (var.sqrt() + eps)
    out = wide * (factor if gain is None else factor * gain)[:, None]
    return torch.empty_like(weight).copy_(out), mean, factor


def standardize_weight_backward(
    grad_out: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    mean: Tensor,
    factor: Tensor,
    eps: float,
    unbiased: bool,
    eps_inside: bool,
    need_gain: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to weight [O, K] and gain [O], empty where that is not needed."""
    wide = weight.to(factor.dtype)
    wide = wide - wide[:, :1] - mean[:, None]
    grad = grad_out.to(factor.dtype)
    products = (grad * wide).sum(dim=1)
    grad_gain = products * factor if need_gain else factor.new_empty(0)
    if eps_inside:
        bend = factor**3
    else:  # of 1 / (std + eps): its derivative by the variance is - factor**2 / (2 std)
        std = 1 / factor - eps
        bend = torch.where(std > 0, factor.square() / torch.where(std > 0, std, 1), 0)
    bend = bend * products / degrees(weight.shape[1], unbiased)
    grads = (grad - grad.sum(dim=1, keepdim=True) / max(weight.shape[1], 1)) * factor[:, None]
    grads = grads - wide * bend[:, None]
    if gain is not None:
        grads = grads * gain[:, None]
    return torch.empty_like(weight).copy_(grads), grad_gain
