"""Plain PyTorch for mix-shift: the yardstick of the kernels and the fallback.

Source: Zheng et al., "Mixing and Shifting: Exploiting Global and Local Dependencies in Vision
MLPs", arXiv:2202.06510, section 3; depthwise_norm: Liu et al., "A ConvNet for the 2020s",
arXiv:2201.03545, section 2.

`mix_shift` and `depthwise_norm` are differentiable by autograd; ``mix_shift_forward`` and
``mix_shift_backward`` are the same, the derivative written out, for callers below autograd: there
all weights of a direction lie in one tensor [K], group after group, as do all biases, summed over
both directions, in one of [C].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...autocast import without_autocast
from ...tensors import accumulation_dtype

WIDTH, HEIGHT = 3, 2  # the axes of [B, C, H, W] that "lr" and "td" roll along


@without_autocast
def mix_shift(
    x: Tensor,
    weights_lr: Sequence[Tensor],
    biases_lr: Sequence[Tensor | None] | None,
    weights_td: Sequence[Tensor],
    biases_td: Sequence[Tensor | None] | None,
    shifts: Sequence[int],
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """As one writes it by hand."""
    dtype = accumulation_dtype(x.dtype)
    groups = x.to(dtype).chunk(len(weights_lr), dim=1)
    biases_lr = [None] * len(groups) if biases_lr is None else biases_lr
    biases_td = [None] * len(groups) if biases_td is None else biases_td
    directions = ((WIDTH, weights_lr, biases_lr), (HEIGHT, weights_td, biases_td))
    mixed = []
    for g, (group, shift) in enumerate(zip(groups, shifts, strict=True)):
        lr, td = (
            _depthwise(group.roll(shift, axis), weights[g].to(dtype), _to(biases[g], dtype))
            for axis, weights, biases in directions
        )
        mixed.append(lr + td)
    return _finished(torch.cat(mixed, dim=1), x, norm_weight, norm_bias, eps)


@without_autocast
def depthwise_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float = 1e-6,
) -> Tensor:
    """As one writes it by hand."""
    dtype = accumulation_dtype(x.dtype)
    mixed = _depthwise(x.to(dtype), weight.to(dtype), _to(bias, dtype))
    return _finished(mixed, x, norm_weight, norm_bias, eps)


def _to(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [B, C, H, W], weight [C, 1, k, k]; zeros around x."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])


def _finished(
    mixed: Tensor, x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> Tensor:
    """y, in x's dtype, of what the convolutions have given in a wider one."""
    if norm_weight is not None:
        weight, bias = norm_weight.to(mixed.dtype), _to(norm_bias, mixed.dtype)
        channels = mixed.permute(0, 2, 3, 1)
        mixed = F.layer_norm(channels, weight.shape, weight, bias, eps).permute(0, 3, 1, 2)
    return _laid_out(mixed.to(x.dtype), norm_weight is not None or is_channels_last(x))


def is_channels_last(x: Tensor) -> bool:
    """Whether x [B, C, H, W] lies so in memory, and is not contiguous as well."""
    return not x.is_contiguous() and x.permute(0, 2, 3, 1).is_contiguous()


def _laid_out(y: Tensor, last: bool) -> Tensor:
    return y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if last else y.contiguous()


def empty_y(x: Tensor, normed: bool) -> Tensor:
    """Like x, channels_last where x is or where it is normed, else contiguous."""
    last = normed or is_channels_last(x)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty_like(x, memory_format=layout)


@without_autocast
def mix_shift_forward(
    x: Tensor,
    weight_lr: Tensor,
    weight_td: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[int],
    shifts: Sequence[int],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """y [B, C, H, W].  weight_td None: "lr" is the only direction."""
    mixed = _mixed(x, weight_lr, weight_td, bias, kernels, shifts)
    return _finished(mixed, x, norm_weight, norm_bias, eps)


def _mixed(
    x: Tensor,
    weight_lr: Tensor,
    weight_td: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[int],
    shifts: Sequence[int],
) -> Tensor:
    groups = x.to(weight_lr.dtype).chunk(len(kernels), dim=1)
    mixed: list[Tensor] = []
    for axis, flat in ((WIDTH, weight_lr), (HEIGHT, weight_td)):
        if flat is None:
            continue
        of_groups = as_filters(flat, [group.shape[1] for group in groups], kernels)
        for g, (group, weight) in enumerate(zip(groups, of_groups, strict=True)):
            one = _depthwise(group.roll(shifts[g], axis), weight, None)
            if axis == WIDTH:
                mixed.append(one)
            else:
                mixed[g] = mixed[g] + one
    out = torch.cat(mixed, dim=1)
    return out if bias is None else out + bias[:, None, None]


def as_filters(flat: Tensor, sizes: Sequence[int], kernels: Sequence[int]) -> list[Tensor]:
    """[K] -> for each group [size, 1, k, k]."""
    pieces = flat.split([size * k * k for size, k in zip(sizes, kernels, strict=True)])
    return [piece.view(-1, 1, k, k) for piece, k in zip(pieces, kernels, strict=True)]


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@without_autocast
def mix_shift_backward(
    grad_y: Tensor,
    x: Tensor,
    weight_lr: Tensor,
    weight_td: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[int],
    shifts: Sequence[int],
    norm_weight: Tensor | None,
    eps: float,
    need_x: bool,
    need_weights: bool,
    need_norm: bool,
) -> Gradients:
    """Gradients to x, weight_lr, weight_td, bias, norm_weight and norm_bias.

    Those that are not needed, or of what is None, are empty.
    """
    grads = empty_gradients(
        x, weight_lr, weight_td, bias, norm_weight, need_x, need_weights, need_norm
    )
    grad_x, *grad_weights, grad_bias, grad_norm_weight, grad_norm_bias = grads
    grad = grad_y.to(weight_lr.dtype)
    if norm_weight is not None:
        mixed = _mixed(x, weight_lr, weight_td, bias, kernels, shifts).permute(0, 2, 3, 1)
        size = norm_weight.shape
        _, mean, rstd = torch.native_layer_norm(mixed, size, norm_weight, None, eps)
        of_norm = torch.ops.aten.native_layer_norm_backward(
            *(grad.permute(0, 2, 3, 1), mixed, size, mean, rstd, norm_weight, norm_weight),
            (True, need_norm, need_norm),
        )
        grad = of_norm[0].permute(0, 3, 1, 2)
        if need_norm:
            grad_norm_weight.copy_(of_norm[1])
            grad_norm_bias.copy_(of_norm[2])
    if need_weights and bias is not None:
        grad_bias.copy_(grad.sum(dim=(0, 2, 3)))
    groups = x.to(weight_lr.dtype).chunk(len(kernels), dim=1)
    sizes = [group.shape[1] for group in groups]
    to_groups = list(torch.zeros_like(grad).chunk(len(kernels), dim=1))
    for axis, flat, grad_flat in zip(
        (WIDTH, HEIGHT), (weight_lr, weight_td), grad_weights, strict=True
    ):
        if flat is None:
            continue
        of_weights = []
        of_groups = zip(
            groups, grad.split(sizes, dim=1), as_filters(flat, sizes, kernels), strict=True
        )
        for g, (group, of_group, weight) in enumerate(of_groups):
            to_group, to_weight, _ = torch.ops.aten.convolution_backward(
                *(of_group, group.roll(shifts[g], axis), weight, None),
                *([1, 1], [weight.shape[-1] // 2] * 2, [1, 1], False, [0, 0], weight.shape[0]),
                (need_x, need_weights, False),
            )
            if need_x:
                to_groups[g] += to_group.roll(-shifts[g], axis)
            if need_weights:
                of_weights.append(to_weight.flatten())
        if need_weights:
            grad_flat.copy_(torch.cat(of_weights))
    if need_x:
        grad_x.copy_(torch.cat(to_groups, dim=1))
    return grads


def empty_gradients(
    x: Tensor,
    weight_lr: Tensor,
    weight_td: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    need_x: bool,
    need_weights: bool,
    need_norm: bool,
) -> Gradients:
    def like(other: Tensor | None, needed: bool) -> Tensor:
        if other is None or not needed:
            return weight_lr.new_empty(0)
        return torch.empty_like(other)

    return (
        empty_y(x, normed=False) if need_x else x.new_empty(0),
        like(weight_lr, need_weights),
        like(weight_td, need_weights),
        like(bias, need_weights),
        like(norm_weight, need_norm),
        like(norm_weight, need_norm),
    )
