"""Batch channel norm: schema, fake, derivative and public function.

Source: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
Standardization", arXiv:1903.10520, section 4.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Size, Tensor
from torch.utils.flop_counter import register_flop_formula

from ... import checks, dispatch, native
from ...dispatch import Kernels
from ...tensors import accumulation_dtype, laid_out_as
from . import reference
from .reference import CONSTANTS, ESTIMATE, OF_BATCH

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _native_forward(
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
    scratch: Tensor | None = None,
) -> Outputs:
    outputs = _empty_outputs(x, weight)
    native.require().batch_channel_norm_forward(
        x,
        residual,
        mean,
        var,
        speed,
        bn_weight,
        bn_bias,
        weight,
        bias,
        eps,
        relu,
        mode,
        *outputs,
        scratch,
    )
    return outputs


def _native_backward(
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
    scratch: Tensor | None = None,
) -> Gradients:
    grads = _empty_gradients(x, mean, weight, need_residual)
    native.require().batch_channel_norm_backward(
        laid_out_as(x, grad_y),
        x,
        residual,
        shift,
        plane_mean,
        plane_square,
        mean,
        var,
        bn_weight,
        bn_bias,
        weight,
        bias,
        group_mean,
        group_rstd,
        eps,
        relu,
        count,
        totals,
        grads[0],
        grads[1] if need_residual else None,
        *grads[2:],
        scratch,
    )
    return grads


def _cuda_forward(*args: Any) -> Outputs:
    forward: Any = _native_forward
    return forward(*args, _scratch(args[0]))


def _cuda_backward(*args: Any) -> Gradients:
    backward: Any = _native_backward
    return backward(*args, _scratch(args[1]))


def _scratch(x: Tensor) -> Tensor:
    """[P, 2, B, C] for the CUDA kernels: P - 1 pieces of planes, as many as fill a large GPU.

    It is at most a sixteenth of x, but for tiny planes.
    """
    batch, channels, places = x.shape
    planes_of_block = 8 if x.is_contiguous() else 256
    blocks = max(1, batch * channels // planes_of_block)
    pieces = max(2, min(places // 32, 2048 // blocks))
    dtype = accumulation_dtype(x.dtype)
    return x.new_empty(1 + pieces, 2, batch, channels, dtype=dtype)


def _empty_outputs(x: Tensor, weight: Tensor) -> Outputs:
    of_planes, of_groups = x.shape[:2], (x.shape[0], *weight.shape)
    return (
        torch.empty_like(x),
        weight.new_empty(x.shape[1]),
        weight.new_empty(of_planes),
        weight.new_empty(of_planes),
        weight.new_empty(x.shape[1]),
        weight.new_empty(x.shape[1]),
        weight.new_empty(of_groups),
        weight.new_empty(of_groups),
    )


def _empty_gradients(x: Tensor, mean: Tensor, weight: Tensor, need_residual: bool) -> Gradients:
    return (
        torch.empty_like(x),
        torch.empty_like(x) if need_residual else x.new_empty(0),
        torch.empty_like(mean),
        torch.empty_like(mean),
        torch.empty_like(weight),
        torch.empty_like(weight),
    )


dispatch.register(
    "batch_channel_norm",
    "reference",
    Kernels(
        reference.batch_channel_norm_forward,
        reference.batch_channel_norm_backward,
        dispatch.refuses_dtype,
    ),
)
dispatch.register(
    "batch_channel_norm",
    "cpu",
    Kernels(_native_forward, _native_backward, dispatch.refuses_native),
)
dispatch.register(
    "batch_channel_norm",
    "cuda",
    Kernels(_cuda_forward, _cuda_backward, dispatch.refuses_cuda),
)


def _fake(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    speed: Tensor | None,
    bn_weight: Tensor,
    bn_bias: Tensor,
    weight: Tensor,
    *others: object,
) -> Outputs:
    return _empty_outputs(x, weight)


def _backward_fake(
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
) -> Gradients:
    return _empty_gradients(x, mean, weight, need_residual)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, *_, ctx.eps, ctx.relu, mode = inputs
    *of_planes_and_channels, group_mean, group_rstd = output[1:]
    ctx.count = x.shape[0] * x.shape[2] if mode == OF_BATCH else 0
    kept = residual if ctx.relu else None  # without relu it is not read again
    parameters = inputs[5:9]
    ctx.save_for_backward(x, kept, *of_planes_and_channels, *parameters, group_mean, group_rstd)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple:
    nothing = (None,) * 12
    if grad_y is None:
        return nothing
    need_residual = ctx.needs_input_grad[1] and ctx.relu
    grads = run_backward(grad_y, ctx, None, need_residual)
    grad_residual = grads[1] if ctx.relu else grad_y
    gradients = (grads[0], grad_residual, None, None, None, *grads[2:], None, None, None)
    return tuple(
        grad if needed else None
        for grad, needed in zip(gradients, ctx.needs_input_grad, strict=True)
    )


def run_backward(grad_y: Tensor, ctx: Any, totals: Tensor | None, need_residual: bool) -> Gradients:
    """The gradients of what `_setup` has kept; SyncBatchChannelNorm calls it with totals."""
    return _batch_channel_norm.run_backward(
        grad_y, *ctx.saved_tensors, ctx.eps, ctx.relu, ctx.count, totals, need_residual
    )


_batch_channel_norm = dispatch.Op(
    "batch_channel_norm",
    "(Tensor x, Tensor? residual, Tensor? mean, Tensor? var, Tensor? speed, Tensor bn_weight,"
    " Tensor bn_bias, Tensor weight, Tensor bias, float eps, bool relu, int mode)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    "(Tensor grad_y, Tensor x, Tensor? residual, Tensor shift, Tensor plane_mean,"
    " Tensor plane_square, Tensor mean, Tensor var, Tensor bn_weight, Tensor bn_bias,"
    " Tensor weight, Tensor bias, Tensor group_mean, Tensor group_rstd, float eps,"
    " bool relu, SymInt count, Tensor? totals, bool need_residual)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    _setup,
    _backward,
    vmap="loop",  # a batch that is mapped has statistics of its own
)


@register_flop_formula(torch.ops.viops.batch_channel_norm)
def _flops(x_shape: Size, *args: object, **kwargs: object) -> int:
    """Mean, squared distances, slope and offset: of each value."""
    return 7 * x_shape.numel()


@register_flop_formula(torch.ops.viops.batch_channel_norm_backward)
def _backward_flops(grad_shape: Size, *args: object, **kwargs: object) -> int:
    return 8 * grad_shape.numel()


def _check(
    x: Tensor,
    num_groups: int,
    parameters: dict[str, Tensor | None],
    training: bool,
    estimate: bool,
    activation: str | None,
    residual: Tensor | None,
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor [B, C, ...], got {type(x).__name__}")
    if x.dim() < 2:
        raise ValueError(f"x: expected [B, C, ...], got shape {list(x.shape)}")
    checks.check_float_tensor("x", x, " ".join("BC" + "." * (x.dim() - 2)))
    channels = x.shape[1]
    checks.check_int("num_groups", num_groups, 1, None, "")
    if channels % num_groups or not channels:
        raise ValueError(
            f"num_groups: expected a divisor of the {channels} channels of x, got {num_groups}"
        )
    for name, value in parameters.items():
        size, axes = (num_groups, "G") if name in ("weight", "bias") else (channels, "C")
        if value is None:
            continue
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(
                f"{name}: expected a torch.Tensor of {axes} elements or None, got {kind}"
            )
        if value.dtype not in checks.FLOAT_DTYPES:
            raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
        checks.check_layout(name, value)
        if value.numel() != size:
            raise ValueError(
                f"{name}: expected {axes} = {size} elements, got shape {list(value.shape)}"
            )
        checks.check_same("device", name, value.device, "x", x.device)
    checks.check_bool("training", training)
    checks.check_bool("estimate", estimate)
    has_mean, has_var = (parameters[f"running_{name}"] is not None for name in ("mean", "var"))
    if has_mean != has_var:
        raise TypeError(
            f"running_{'var' if has_mean else 'mean'}: expected a tensor, as the other is, got None"
        )
    if not has_mean and (estimate or not training):
        raise TypeError("running_mean: expected a tensor where it normalises, got None")
    if activation not in (None, "relu"):
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
    if residual is not None:
        if not isinstance(residual, Tensor):
            kind = type(residual).__name__
            raise TypeError(f"residual: expected a torch.Tensor or None, got {kind}")
        if residual.shape != x.shape:
            raise ValueError(
                f"residual: shape {list(residual.shape)} differs from x's {list(x.shape)}"
            )
        checks.check_layout("residual", residual)
        if residual.dtype is not x.dtype:
            raise TypeError(f"residual: dtype {residual.dtype} differs from x's {x.dtype}")
        checks.check_same("device", "residual", residual.device, "x", x.device)
    if training and not estimate and x.numel() == channels:
        raise ValueError(
            f"x: expected more than one value a channel in training, got shape {list(x.shape)}"
        )


def check_momentum(value: object) -> None:
    """A finite number or a floating-point tensor of one element."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                "momentum: expected a number or a floating-point tensor of one element, "
                f"got {value.dtype} of shape {list(value.shape)}"
            )
    elif isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat)):
        raise TypeError(
            f"momentum: expected a number or a tensor of one element, got {type(value).__name__}"
        )
    elif not -math.inf < float(value) < math.inf:
        raise ValueError(f"momentum: expected a finite number, got {value}")


def as_planes(x: Tensor) -> Tensor:
    """[B, C, ...] -> [B, C, S], contiguous so or as [B, S, C]: a view where that can be."""
    flat = reference.flat(x)
    return flat if flat.is_contiguous() or flat.mT.is_contiguous() else flat.contiguous()


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
    """Batch norm with its affine, group norm of that, and an affine for each group.

    Args:
        x: [B, C, ...], float32, float64, bfloat16 or float16, any strides; contiguous and
            channels_last are the fast paths.
        num_groups: G, a divisor of C.
        bn_weight, bn_bias: C elements each, of any of these dtypes, or None for ones and zeros.
        running_mean, running_var: C elements each, moved in training: a share `momentum` of the
            way to the mean and the variance (of a sample, as nn.BatchNorm takes it) of the batch.
            None, both of them, where training is true and estimate false: none are kept.
        weight, bias: G elements each, such as the official [1, G, 1], or None for ones and zeros.
        training: whether statistics are of the batch, or the running ones, as constants.
        momentum: a number, or a tensor of one element.
        eps: added to the variances of both norms.
        estimate: the micro-batch form: in training, the running statistics are moved first, the
            variance towards the mean squared distance to the mean before, and then normalise as
            constants: no gradient goes through them.
        activation: "relu" applies it to the result, None nothing.
        residual: [B, C, ...], of x's dtype, added before the activation.

    Returns:
        y [B, C, ...], in x's dtype, channels_last where x is, else contiguous.  Gradients go to
        x, residual and the four parameters.  Sums are held in float32, or float64 for float64;
        autocast changes nothing.

    Raises:
        TypeError, ValueError: an argument is not as above, or in training there is but one value a
            channel.

    Source: Batch-Channel Normalization (Qiao et al., arXiv:1903.10520), section 4; the affine for
    each group, where nn.GroupNorm has one for each channel, is that of the authors' code.
    """
    parameters = {
        "bn_weight": bn_weight,
        "bn_bias": bn_bias,
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    _check(x, num_groups, parameters, training, estimate, activation, residual)
    eps = checks.check_eps("eps", eps)
    check_momentum(momentum)
    if dispatch.is_reference_forced():
        return reference.batch_channel_norm(
            x,
            num_groups,
            **parameters,
            training=training,
            momentum=momentum,
            eps=eps,
            estimate=estimate,
            activation=activation,
            residual=residual,
        )
    dtype = accumulation_dtype(x.dtype)
    planes = as_planes(x)

    def vector(value: Tensor | None, size: int, default: float) -> Tensor:
        if value is None:
            return x.new_full((size,), default, dtype=dtype)
        if value.dtype is not dtype:
            value = value.to(dtype)
        if value.dim() != 1:
            value = value.reshape(size)
        return value if value.is_contiguous() else value.contiguous()

    channels = x.shape[1]
    mode = OF_BATCH if training and not estimate else ESTIMATE if training else CONSTANTS
    mean = var = speed = None
    if mode != OF_BATCH and running_mean is not None and running_var is not None:
        mean, var = (vector(t.detach(), channels, 0) for t in (running_mean, running_var))
    if mode == ESTIMATE:
        speed = (
            x.new_full((1,), momentum, dtype=dtype)
            if not isinstance(momentum, Tensor)
            else (momentum.to(x.device, dtype).reshape(1))
        )
    y, shift, _, _, mean, var, _, _ = _batch_channel_norm(
        planes,
        None if residual is None else laid_out_as(planes, reference.flat(residual)),
        mean,
        var,
        speed,
        vector(bn_weight, channels, 1),
        vector(bn_bias, channels, 0),
        vector(weight, num_groups, 1),
        vector(bias, num_groups, 0),
        eps,
        activation == "relu",
        mode,
    )
    if training and running_mean is not None and x.numel():
        count = x.numel() // channels
        reference.update_running(
            running_mean, running_var, shift + mean, var, count, momentum, estimate
        )
    return y.squeeze(2) if x.dim() == 2 else y.unflatten(2, x.shape[2:])
