"""Plain PyTorch for batch channel norm: the yardstick of the kernels and the fallback.

Source: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
Standardization", arXiv:1903.10520, section 4, and the authors' code.

`batch_channel_norm` is differentiable by autograd.  What follows it are the registered ops: B
images, C channels, S places (all spatial axes as one), G groups of channels; a plane is one channel
of one image.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch._C import _functorch as functorch

from ...tensors import accumulation_dtype, in_layout_of


def batch_channel_norm(
    x: Tensor,
    num_groups: int,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    estimate: bool = False,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Batch norm, group norm, an affine for each group, as one writes them by hand."""
    dtype = accumulation_dtype(x.dtype)
    wide = flat(x.to(dtype))
    if training and not estimate and x.numel():
        shift = shift_of(wide.detach())
    elif running_mean is None:
        shift = wide.new_zeros(x.shape[1])
    else:
        shift = running_mean.detach().to(dtype, copy=True)
    wide = wide - shift[:, None]  # small where x is far from zero, and its rounding with it
    mean, var = torch.zeros_like(shift), torch.ones_like(shift)
    if not training or estimate:
        assert running_var is not None
        var = running_var.detach().to(dtype, copy=True)
    if training and x.numel():
        own_mean = wide.mean(dim=(0, 2))
        own_var = (wide - own_mean[:, None]).square().mean(dim=(0, 2))
        count = wide.numel() // wide.shape[1]
        if estimate:
            with torch.no_grad():
                mean = mean.lerp(own_mean, as_weight(momentum, mean))
                spread = own_var + own_mean.square()
                var = var.lerp(spread, as_weight(momentum, mean))
        else:
            mean, var = own_mean, own_var
        update_running(running_mean, running_var, mean + shift, var, count, momentum, estimate)
    out = (wide - mean[:, None]) * (var + eps).rsqrt()[:, None]
    if bn_weight is not None:
        out = out * bn_weight.to(dtype)[:, None]
    if bn_bias is not None:
        out = out + bn_bias.to(dtype)[:, None]
    grouped = out.unflatten(1, (num_groups, -1)).flatten(2)  # [B, G, C / G * S]
    grouped = grouped - grouped.mean(dim=2, keepdim=True)
    grouped = grouped * (grouped.square().mean(dim=2, keepdim=True) + eps).rsqrt()
    if weight is not None:
        grouped = grouped * weight.to(dtype).reshape(num_groups, 1)
    if bias is not None:
        grouped = grouped + bias.to(dtype).reshape(num_groups, 1)
    out = grouped.reshape(x.shape)
    if residual is not None:
        out = out + residual.to(dtype)
    return in_layout_of(x, out.relu() if activation == "relu" else out).to(x.dtype)


def flat(x: Tensor) -> Tensor:
    """[B, C, ...] -> [B, C, S]: in channels_last, a view that is contiguous as [B, S, C]."""
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


def shift_of(wide: Tensor) -> Tensor:
    """[C]: of each channel of [B, C, S] the median of five values, spread over batch and places.

    A lone value far away does not take the digits of all others, as a first value might.
    """
    batch, _, places = wide.shape
    at = [i * (batch * places - 1) // 4 for i in range(5)]
    return torch.stack([wide[n // places, :, n % places] for n in at]).median(dim=0).values


def as_weight(momentum: float | Tensor, like: Tensor) -> float | Tensor:
    """What torch.lerp takes."""
    return momentum.to(like).reshape(()) if isinstance(momentum, Tensor) else momentum


def update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | Tensor,
    estimate: bool,
) -> None:
    """Moves the running statistics, where there are any, by those of `count` values a channel.

    By `momentum` towards the mean and the variance of a sample, as nn.BatchNorm does; where they
    are the estimate that has normalised, to it.
    """
    if running_mean is None or running_var is None:
        return
    if not torch.compiler.is_compiling() and functorch.peek_interpreter_stack() is not None:
        mean, var = (_for_running(value, running_mean) for value in (mean, var))
        outside = not functorch.is_functorch_wrapped_tensor(running_mean)
    else:
        outside = False
    with torch.no_grad(), torch._C._DisableFuncTorch() if outside else nullcontext():
        if estimate:
            running_mean.copy_(mean.reshape(running_mean.shape))
            running_var.copy_(var.reshape(running_var.shape))
            return
        weight = as_weight(momentum, running_mean)
        sample = var * (count / max(count - 1, 1))
        for running, value in ((running_mean, mean), (running_var, sample)):
            if value.dtype is not running.dtype or value.shape != running.shape:
                value = value.to(running.dtype).reshape(running.shape)
            running.lerp_(value, weight)


def _for_running(value: Tensor, running: Tensor) -> Tensor:
    """What `running` can take over within torch.func's transforms."""
    if functorch.is_functorch_wrapped_tensor(running):
        return value
    while functorch.is_gradtrackingtensor(value):
        value = functorch.get_unwrapped(value)
    if functorch.is_batchedtensor(value):
        raise ValueError("running_mean: expected statistics that vmap maps as it does x, or None")
    return value


#: What normalises the channels: the mean and var that are given; those of x; those that are given,
#: moved towards those of x.
CONSTANTS, OF_BATCH, ESTIMATE = 0, 1, 2


def batch_channel_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    speed: Tensor | None,
    bn_weight: Tensor,
    bn_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
    mode: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [B, C, S]; the shift of each channel [C], that all means are relative to: a median of
    values in mode OF_BATCH, else mean; of each plane the mean and the sum of squared distances to
    it, [B, C] each; the mean and the variance (biased) that normalise the channels, [C] each; of
    each group of each image the mean, relative to that of its first plane, and the reciprocal
    standard deviation of what batch norm gives, [B, G] each.

    x and residual [B, C, S]; mean and var [C], None in mode OF_BATCH; speed [1] in mode ESTIMATE;
    bn_weight, bn_bias [C]; weight, bias [G].
    """
    wide = x.to(accumulation_dtype(x.dtype))
    num_groups, places = weight.shape[0], max(x.shape[2], 1)
    if mean is not None:
        shift = mean.clone()
    else:
        shift = shift_of(wide) if x.numel() else wide.new_zeros(x.shape[1])
    wide = wide - shift[:, None]
    plane_mean = wide.sum(dim=2) / places
    plane_square = (wide - plane_mean[:, :, None]).square().sum(dim=2)
    mean, var = _channel_statistics(plane_mean, plane_square, x.shape[2], var, speed)
    factor = bn_weight * (var + eps).rsqrt()  # [C]
    # of planes after batch norm
    means = _means(plane_mean, mean, factor, bn_bias, num_groups)
    squares = torch.where(factor == 0, 0, plane_square * factor.square())  # not inf * 0
    squares = squares.unflatten(1, (num_groups, -1))
    group_mean = means.mean(dim=2)
    between = (means - group_mean[:, :, None]).square().mean(dim=2)
    group_rstd = (squares.mean(dim=2) / places + between + eps).rsqrt()
    slope, offset = _affine(plane_mean, mean, factor, bn_bias, weight, bias, group_mean, group_rstd)
    y = (wide - plane_mean[:, :, None]) * slope + offset
    if residual is not None:
        y = y + residual.to(y.dtype)
    y = y.relu() if relu else y
    y = torch.empty_like(x).copy_(y)
    return y, shift, plane_mean, plane_square, mean, var, group_mean, group_rstd


def _channel_statistics(
    plane_mean: Tensor,
    plane_square: Tensor,
    places: int,
    var: Tensor | None,
    speed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """[C] each: what normalises the channels, the mean relative to the shift."""
    batch, count = plane_mean.shape[0], plane_mean.shape[0] * places
    zeros = torch.zeros_like(plane_mean.sum(dim=0))
    if count == 0:
        return zeros, zeros.clone() if var is None else var.clone()
    own_mean = plane_mean.sum(dim=0) / batch
    between = (plane_mean - own_mean).square().sum(dim=0) * places
    own_var = (plane_square.sum(dim=0) + between) / count
    if var is None:
        return own_mean, own_var
    if speed is None:
        return zeros, var.clone()
    return own_mean * speed, var.lerp(own_var + own_mean.square(), speed)


def batch_channel_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    shift: Tensor,
    plane_mean: Tensor,
    plane_square: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    group_mean: Tensor,
    group_rstd: Tensor,
    eps: float,
    relu: bool,
    count: int,
    totals: Tensor | None,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, residual (empty where not needed), bn_weight, bn_bias, weight, bias.

    count: how many values a channel mean and var are of, which the gradient then goes through; 0:
    they are constants.  totals [2, C]: where those values lie in several processes, the sums over
    all of them of what this gives for bn_bias and bn_weight; else None.
    """
    channels, places = x.shape[1:]
    num_groups = weight.shape[0]
    size = max(channels // num_groups * places, 1)
    rstd = (var + eps).rsqrt()  # [C]
    factor = bn_weight * rstd
    wide = x.to(factor.dtype) - shift[:, None] - plane_mean[:, :, None]
    slope, offset = _affine(plane_mean, mean, factor, bn_bias, weight, bias, group_mean, group_rstd)
    grad = grad_y.to(factor.dtype)
    if relu:
        y = wide * slope + offset
        grad = grad * ((y if residual is None else y + residual.to(y.dtype)) > 0)
    planes = torch.stack((grad.sum(dim=2), (grad * wide).sum(dim=2)))  # of grad, of grad (x - mean)
    by_group = planes.unflatten(2, (num_groups, -1))  # [2, B, G, K]
    factors = factor.unflatten(0, (num_groups, -1))  # [G, K]
    shift = _means(plane_mean, mean, factor, bn_bias, num_groups)
    shift = (shift - group_mean[:, :, None]) * group_rstd[:, :, None]  # [B, G, K]: means after both
    spread = factors * group_rstd[:, :, None]  # [B, G, K]: what x - mean is multiplied with
    products = (spread * by_group[1] + shift * by_group[0]).sum(dim=2)  # [B, G]: <grad, normalised>
    sums = by_group[0].sum(dim=2)
    grad_weight = products.sum(dim=0, dtype=torch.float64).to(weight.dtype)
    grad_bias = by_group[0].sum(dim=(0, 2), dtype=torch.float64).to(weight.dtype)
    # of what batch norm gives: along * grad - centre - (x - mean) * slant
    along = (weight * group_rstd)[:, :, None]
    share = (weight * group_rstd * products / size)[:, :, None]
    centre = (weight * group_rstd * sums / size)[:, :, None] + share * shift
    slant = share * spread
    squares = plane_square.unflatten(1, (num_groups, -1))
    of_sum = (along * by_group[0] - centre * places).flatten(1)  # [B, C]: summed over a plane
    of_product = (along * by_group[1] - slant * squares).flatten(1)  # with x - its plane's mean
    distance = plane_mean - mean
    grad_bn_bias = of_sum.sum(dim=0)
    grad_factor = (of_product + distance * of_sum).sum(dim=0)  # <grad, x - the channel's mean>
    along, centre, slant = (
        (t.expand_as(by_group[0]).flatten(1) * factor) for t in (along, centre, slant)
    )
    grad_bn_weight = grad_factor * rstd
    if count:
        of_bias, of_weight = (grad_bn_bias, grad_bn_weight) if totals is None else totals
        bend = factor * rstd * of_weight / count
        centre = centre + factor * of_bias / count + distance * bend
        slant = slant + bend
    grad_x = along[:, :, None] * grad - centre[:, :, None] - wide * slant[:, :, None]
    grad_residual = torch.empty_like(x).copy_(grad) if need_residual else x.new_empty(0)
    return (
        torch.empty_like(x).copy_(grad_x),
        grad_residual,
        grad_bn_weight,
        grad_bn_bias,
        grad_weight,
        grad_bias,
    )


def _means(
    plane_mean: Tensor, mean: Tensor, factor: Tensor, bn_bias: Tensor, num_groups: int
) -> Tensor:
    """[B, G, K]: of planes after batch norm, relative to that of the group's first one."""
    means = ((plane_mean - mean) * factor + bn_bias).unflatten(1, (num_groups, -1))
    return means - means[:, :, :1]


def _affine(
    plane_mean: Tensor,
    mean: Tensor,
    factor: Tensor,
    bn_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    group_mean: Tensor,
    group_rstd: Tensor,
) -> tuple[Tensor, Tensor]:
    """[B, C, 1] each: y is (x - its plane's mean) * slope + offset."""
    num_groups = weight.shape[0]
    slope = (weight * group_rstd)[:, :, None] * factor.unflatten(0, (num_groups, -1))
    means = _means(plane_mean, mean, factor, bn_bias, num_groups)
    offset = (means - group_mean[:, :, None]) * (weight * group_rstd)[:, :, None] + bias[:, None]
    return slope.flatten(1)[:, :, None], offset.flatten(1)[:, :, None]
