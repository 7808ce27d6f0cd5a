"""Weight standardization: schema, fake, derivative and public functions.

Source: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
Standardization", arXiv:1903.10520, section 3.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Size, Tensor
from torch.utils.flop_counter import register_flop_formula

from ... import checks, dispatch, native, triton_runtime
from ...dispatch import Kernels
from ...tensors import accumulation_dtype
from . import reference


def _native_forward(
    weight: Tensor, gain: Tensor | None, eps: float, unbiased: bool, eps_inside: bool
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _empty_outputs(weight)
    native.require().standardize_weight_forward(weight, gain, eps, unbiased, eps_inside, *outputs)
    return outputs


def _native_infer(
    weight: Tensor, gain: Tensor | None, eps: float, unbiased: bool, eps_inside: bool
) -> tuple[Tensor]:
    out = torch.empty_like(weight)
    native.require().standardize_weight_forward(
        weight, gain, eps, unbiased, eps_inside, out, None, None
    )
    return (out,)


def _native_backward(
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
    grad_weight, grad_gain = _empty_gradients(weight, mean, need_gain)
    native.require().standardize_weight_backward(
        grad_out.contiguous(),
        weight,
        gain,
        mean,
        factor,
        eps,
        unbiased,
        eps_inside,
        grad_weight,
        grad_gain if need_gain else None,
    )
    return grad_weight, grad_gain


@functools.cache
def _triton_kernels() -> ModuleType:
    """Loaded at the first call: Triton takes time to import, and need not be there."""
    module = importlib.import_module(".triton_kernels", __package__)
    triton_runtime.check_kernel(module.standardize_weight_forward_kernel)
    return module


def _triton_forward(
    weight: Tensor, gain: Tensor | None, eps: float, unbiased: bool, eps_inside: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _triton_kernels()
    kernels.check_inputs(weight, gain)
    outputs = _empty_outputs(weight)
    kernels.standardize_weight_forward(weight, gain, eps, unbiased, eps_inside, *outputs)
    return outputs


def _triton_backward(
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
    kernels = _triton_kernels()
    grad_out = grad_out.contiguous()
    kernels.check_inputs(weight, gain)
    kernels.check_results(grad_out, weight, mean, factor)
    grad_weight, grad_gain = _empty_gradients(weight, mean, need_gain)
    kernels.standardize_weight_backward(
        grad_out,
        weight,
        gain,
        mean,
        factor,
        eps,
        unbiased,
        eps_inside,
        grad_weight,
        grad_gain if need_gain else None,
    )
    return grad_weight, grad_gain


def _empty_outputs(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(weight.dtype)
    mean = weight.new_empty(weight.shape[0], dtype=dtype)
    return torch.empty_like(weight), mean, torch.empty_like(mean)


def _empty_gradients(weight: Tensor, mean: Tensor, need_gain: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), mean.new_empty(mean.shape if need_gain else (0,))


dispatch.register(
    "standardize_weight",
    "reference",
    Kernels(
        reference.standardize_weight_forward,
        reference.standardize_weight_backward,
        dispatch.refuses_dtype,
    ),
)
dispatch.register(
    "standardize_weight",
    "cpu",
    Kernels(_native_forward, _native_backward, dispatch.refuses_native, _native_infer),
)
dispatch.register(
    "standardize_weight",
    "triton",
    Kernels(_triton_forward, _triton_backward, dispatch.refuses_triton),
)


def _fake(weight: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(weight)


def _backward_fake(
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
    return _empty_gradients(weight, mean, need_gain)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    weight, gain, *ctx.options = inputs
    ctx.save_for_backward(weight, gain, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple:
    if grad_out is None:
        return (None,) * 5
    need_weight, need_gain = ctx.needs_input_grad[:2]
    grad_weight, grad_gain = _standardize_weight.run_backward(
        grad_out, *ctx.saved_tensors, *ctx.options, need_gain
    )
    grads = grad_weight if need_weight else None, grad_gain if need_gain else None
    return *grads, None, None, None


_standardize_weight = dispatch.Op(
    "standardize_weight",
    "(Tensor weight, Tensor? gain, float eps, bool unbiased, bool eps_inside)"
    " -> (Tensor, Tensor, Tensor)",
    _fake,
    "(Tensor grad_out, Tensor weight, Tensor? gain, Tensor mean, Tensor factor, float eps,"
    " bool unbiased, bool eps_inside, bool need_gain) -> (Tensor, Tensor)",
    _backward_fake,
    _setup,
    _backward,
)


@register_flop_formula(torch.ops.viops.standardize_weight)
def _flops(weight_shape: Size, *args: object, **kwargs: object) -> int:
    """Mean, squared distances, difference and product: of each weight."""
    return 6 * weight_shape.numel()


@register_flop_formula(torch.ops.viops.standardize_weight_backward)
def _backward_flops(grad_shape: Size, *args: object, **kwargs: object) -> int:
    return 8 * grad_shape.numel()


def _check(
    weight: Tensor, gain: Tensor | None, name: str = "weight", gain_name: str = "gain"
) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor [O, ...], got {type(weight).__name__}")
    if weight.dim() < 2:
        raise ValueError(f"{name}: expected [O, ...], got shape {list(weight.shape)}")
    checks.check_float_tensor(name, weight, " ".join("O" + "." * (weight.dim() - 1)))
    if gain is None:
        return
    if not isinstance(gain, Tensor):
        raise TypeError(
            f"{gain_name}: expected a torch.Tensor [O] or None, got {type(gain).__name__}"
        )
    if gain.dtype not in checks.FLOAT_DTYPES:
        raise TypeError(f"{gain_name}: expected a floating-point tensor, got {gain.dtype}")
    checks.check_layout(gain_name, gain)
    if gain.numel() != weight.shape[0]:
        raise ValueError(
            f"{gain_name}: expected O = {weight.shape[0]} elements, got shape {list(gain.shape)}"
        )
    checks.check_same("device", gain_name, gain.device, name, weight.device)


def _check_options(eps: float, unbiased: bool, eps_inside: bool) -> float:
    checks.check_bool("unbiased", unbiased)
    checks.check_bool("eps_inside", eps_inside)
    return checks.check_eps("eps", eps)


def _rows(weight: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
    """[O, K], a view where each filter is dense, and the order of the axes that was taken.

    The order within a filter is nothing to the op.
    """
    if weight.is_contiguous() or weight.dim() < 4:
        return weight.contiguous().flatten(1), None
    order = (0, *range(2, weight.dim()), 1)
    last = weight.permute(order)
    if last.is_contiguous():  # channels_last
        return last.flatten(1), order
    return weight.contiguous().flatten(1), None


def _rows_in(x: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """[O, K] with the axes in this order."""
    x = x if order is None else x.permute(order)
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _wide_gain(gain: Tensor | None, weight: Tensor) -> Tensor | None:
    """[O], in the dtype of the weight's sums."""
    if gain is None:
        return None
    return gain.to(accumulation_dtype(weight.dtype)).reshape(-1)


def _of_rows(rows: Tensor, shape: Size, order: tuple[int, ...] | None) -> Tensor:
    """[O, ...] of this shape from rows [O, K] that have the axes in this order: a view."""
    if order is None:
        return rows.view(shape)
    inverse = (0, len(shape) - 1, *range(1, len(shape) - 1))
    return rows.view([shape[axis] for axis in order]).permute(inverse)


def standardize_weight(
    weight: Tensor,
    *,
    eps: float = 1e-5,
    unbiased: bool = True,
    eps_inside: bool = True,
    gain: Tensor | None = None,
) -> Tensor:
    """Weights whose filters have mean zero and variance one.

    Args:
        weight: [O, ...], such as [O, C, kh, kw] of a convolution; float32, float64, bfloat16 or
            float16, any strides.
        eps: keeps a filter of variance zero finite, its gradient too.
        unbiased: whether the variance is that of a sample (K - 1 degrees for K weights a filter) or
            the mean of squares.
        eps_inside: whether filters are divided by sqrt(var + eps), or by sqrt(var) + eps, as the
            first official code has it.
        gain: O elements, multiplied with the filters; of any of these dtypes.

    Returns:
        out [O, ...] = gain * (weight - mean) / sqrt(var + eps), mean and variance of each filter,
        in weight's dtype; in channels_last where weight is, else contiguous.  Gradients go to
        weight and gain.  Sums are held in float32, or float64 for float64; autocast changes
        nothing.

    With ``unbiased=False`` it is timm's StdConv2d, whose gain and factors are the gain here.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Weight Standardization (Qiao et al., arXiv:1903.10520), section 3.
    """
    _check(weight, gain)
    eps = _check_options(eps, unbiased, eps_inside)
    if dispatch.is_reference_forced():
        return reference.standardize_weight(
            weight, eps=eps, unbiased=unbiased, eps_inside=eps_inside, gain=gain
        )
    rows, order = _rows(weight)
    gain = _wide_gain(gain, weight)
    out = _standardize_weight.first(rows, gain, eps, unbiased, eps_inside)
    return _of_rows(out, weight.shape, order)


def standardize_weights(
    weights: Sequence[Tensor],
    *,
    eps: float = 1e-5,
    unbiased: bool = True,
    eps_inside: bool = True,
    gains: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """`standardize_weight` of many tensors: on a GPU, in one launch for all that share a dtype.

    Args:
        weights: tensors [O, ...], each as `standardize_weight` takes it.
        eps, unbiased, eps_inside: as there, for all of them.
        gains: for each of the weights its gain or None; None is no gain for any.

    Returns:
        A list of what `standardize_weight` gives for each.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Weight Standardization (Qiao et al., arXiv:1903.10520), section 3.
    """
    for name, value in (("weights", weights), ("gains", gains)):
        if isinstance(value, Tensor) or not (value is None or isinstance(value, Iterable)):
            kind = type(value).__name__
            raise TypeError(f"{name}: expected a sequence of tensors, got {kind}")
    if weights is None:
        raise TypeError("weights: expected a sequence of tensors, got None")
    weights = list(weights)
    gains = [None] * len(weights) if gains is None else list(gains)
    if len(gains) != len(weights):
        raise ValueError(f"gains: expected {len(weights)}, one for each weight, got {len(gains)}")
    options = _check_options(eps, unbiased, eps_inside), unbiased, eps_inside
    outs: list[Tensor | None] = [None] * len(weights)
    for places in _joined(weights, gains):
        own_gains = [_wide_gain(gains[i], weights[i]) for i in places]
        joined = _standardize_together([weights[i] for i in places], own_gains, options)
        for i, out in zip(places, joined, strict=True):
            outs[i] = out
    return [
        standardize_weight(weight, eps=eps, unbiased=unbiased, eps_inside=eps_inside, gain=gain)
        if out is None
        else out
        for weight, gain, out in zip(weights, gains, outs, strict=True)
    ]


def _joined(weights: list[Tensor], gains: list[Tensor | None]) -> list[list[int]]:
    """The places of weights that go into one launch: those of a dtype and device, run by Triton."""
    for i, (weight, gain) in enumerate(zip(weights, gains, strict=True)):
        _check(weight, gain, f"weights[{i}]", f"gains[{i}]")
    tensors = [*weights, *(gain for gain in gains if gain is not None)]
    if dispatch.is_reference_forced() or not dispatch.is_plain_eager(*tensors):
        return []
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, weight in enumerate(weights):
        groups.setdefault((weight.device, weight.dtype), []).append(i)
    return [
        places
        for (device, dtype), places in groups.items()
        if len(places) > 1
        and dispatch.choose("standardize_weight", device.type, dtype)[0] == "triton"
    ]


def _standardize_together(
    weights: list[Tensor], gains: list[Tensor | None], options: tuple[float, bool, bool]
) -> tuple[Tensor, ...]:
    tensors = *weights, *gains
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _StandardizeTogether.apply(options, *tensors)
    return _forward_together(weights, gains, options)[0]


def _forward_together(
    weights: Sequence[Tensor], gains: Sequence[Tensor | None], options: tuple[float, bool, bool]
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """What `standardize_weight` gives for each; mean and factor [O of all weights]."""
    rows, orders = zip(*map(_rows, weights), strict=True)
    outs = [torch.empty_like(own) for own in rows]
    dtype = accumulation_dtype(rows[0].dtype)
    mean = rows[0].new_empty(sum(own.shape[0] for own in rows), dtype=dtype)
    factor = torch.empty_like(mean)
    kernels = _triton_kernels()
    kernels.standardize_weights_forward(rows, gains, *options, outs, mean, factor)
    shapes = (weight.shape for weight in weights)
    return tuple(map(_of_rows, outs, shapes, orders)), mean, factor


class _StandardizeTogether(torch.autograd.Function):
    """One launch forward, one backward."""

    @staticmethod
    def forward(ctx: Any, options: tuple[float, bool, bool], *tensors: Any) -> tuple[Tensor, ...]:
        """Weights [O, ...], and as many gains [O] or None."""
        half = len(tensors) // 2
        outs, mean, factor = _forward_together(tensors[:half], tensors[half:], options)
        ctx.save_for_backward(*tensors, mean, factor)
        ctx.options = options
        frozen = (
            not any(ctx.needs_input_grad[i] for i in (1 + k, 1 + half + k)) for k in range(half)
        )
        ctx.mark_non_differentiable(*(out for out, f in zip(outs, frozen, strict=True) if f))
        return outs

    @staticmethod
    def backward(ctx: Any, *grad_outs: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, mean, factor = ctx.saved_tensors
        half = len(tensors) // 2
        needed = ctx.needs_input_grad[1:]
        run = _backward_one_by_one if torch.is_grad_enabled() else _backward_together
        found = run(
            grad_outs, tensors[:half], tensors[half:], mean, factor, ctx.options, any(needed[half:])
        )
        grads = (grad if need else None for grad, need in zip(found, needed, strict=True))
        return None, *grads


def _backward_together(
    grad_outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None],
    mean: Tensor,
    factor: Tensor,
    options: tuple[float, bool, bool],
    need_gain: bool,
) -> list[Tensor | None]:
    """Gradients to all weights, then to all gains."""
    rows, orders = zip(*map(_rows, weights), strict=True)
    grads = [_rows_in(grad, order) for grad, order in zip(grad_outs, orders, strict=True)]
    grad_weights = [torch.empty_like(own) for own in rows]
    grad_gain = torch.empty_like(mean) if need_gain else None
    kernels = _triton_kernels()
    kernels.standardize_weights_backward(
        grads, rows, gains, mean, factor, *options, grad_weights, grad_gain
    )
    sizes = [weight.shape[0] for weight in weights]
    return [
        *map(_of_rows, grad_weights, (weight.shape for weight in weights), orders),
        *(len(weights) * [None] if grad_gain is None else grad_gain.split(sizes)),
    ]


def _backward_one_by_one(
    grad_outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None],
    mean: Tensor,
    factor: Tensor,
    options: tuple[float, bool, bool],
    need_gain: bool,
) -> list[Tensor | None]:
    """The same through the op, whose gradients refuse to be differentiated."""
    sizes = [weight.shape[0] for weight in weights]
    grad_weights, grad_gains = [], []
    for grad, weight, gain, *saved in zip(
        grad_outs, weights, gains, mean.split(sizes), factor.split(sizes), strict=True
    ):
        rows, order = _rows(weight)
        grad_weight, grad_gain = _standardize_weight.run_backward(
            _rows_in(grad, order), rows, gain, *saved, *options, need_gain
        )
        grad_weights.append(_of_rows(grad_weight, weight.shape, order))
        grad_gains.append(grad_gain)
    return [*grad_weights, *grad_gains]
