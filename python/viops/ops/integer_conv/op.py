"""INT16 convolutions in dynamic fixed point: schemas, fakes, derivative and public functions.

Source: Das et al., "Mixed Precision Training of Convolutional Neural Networks using Integer
Operations", ICLR 2018, arXiv:1802.00930, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

from ... import checks, dispatch
from ...dispatch import Kernels
from ...tensor_state import state_of
from . import kernels, reference
from .dfp import DfpTensor, check_bits
from .reference import ROUNDINGS, SCALINGS


def _refuses_dtype(device_type: str, dtype: torch.dtype) -> str | None:
    if dtype is torch.int16:
        return None
    return dispatch.refuses_dtype(device_type, dtype)


def _refuses_native(device_type: str, dtype: torch.dtype) -> str | None:
    return dispatch.refuses_native(device_type, torch.float32 if dtype is torch.int16 else dtype)


def _refuses_cuda(device_type: str, dtype: torch.dtype) -> str | None:
    return dispatch.refuses_cuda(device_type, torch.float32 if dtype is torch.int16 else dtype)


for _name, _backend, _functions in (
    (
        "quantize_dfp",
        "reference",
        Kernels(reference.quantize_dfp_forward, dispatch.no_derivative, _refuses_dtype),
    ),
    (
        "quantize_dfp",
        "cpu",
        Kernels(kernels.native_quantize, dispatch.no_derivative, _refuses_native),
    ),
    (
        "quantize_dfp",
        "cuda",
        Kernels(kernels.cuda_quantize, dispatch.no_derivative, _refuses_cuda),
    ),
    (
        "integer_conv2d",
        "reference",
        Kernels(
            reference.integer_conv2d_forward, reference.integer_conv2d_backward, _refuses_dtype
        ),
    ),
    (
        "integer_conv2d",
        "cpu",
        Kernels(kernels.native_conv2d, kernels.native_conv2d_backward, _refuses_native),
    ),
    (
        "integer_conv2d",
        "cuda",
        Kernels(kernels.cuda_conv2d, kernels.cuda_conv2d_backward, _refuses_cuda),
    ),
):
    dispatch.register(_name, _backend, _functions)


def _quantize_fake(x: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    return torch.empty_like(x, dtype=torch.int16), scale


_quantize_dfp = dispatch.Op(
    "quantize_dfp",
    "(Tensor x, int bits, bool power_of_two, int rounding, Tensor? noise) -> (Tensor, Tensor)",
    _quantize_fake,
    vmap="loop",  # an entry that is mapped has a scale of its own
)


def _fake(
    x: Tensor,
    x_scale: Tensor,
    x_carrier: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    w_carrier: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *options: object,
) -> Tensor:
    return kernels.empty_y(x, w, stride, padding, dilation, groups)


def _backward_fake(grad_y: Tensor, x: Tensor, x_scale: Tensor, w: Tensor, *others: Any) -> tuple:
    return kernels.empty_gradients(x, w, *others[-2:])


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, x_scale, x_carrier, w, w_scale, w_carrier, bias, *ctx.options, seed = inputs
    # integers carry no derivative: the carriers tell what gradients depend on
    carriers = (None, None) if torch.compiler.is_compiling() else (x_carrier, w_carrier)
    ctx.save_for_backward(x, x_scale, w, w_scale, seed, *carriers)
    ctx.dtypes = [None if t is None else t.dtype for t in (x_carrier, w_carrier, bias)]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None) -> tuple:
    grads: list[Tensor | None] = [None] * 17
    if grad_y is None:
        return tuple(grads)
    *saved, seed, x_carrier, w_carrier = ctx.saved_tensors
    need_x, need_w, need_bias = (ctx.needs_input_grad[i] for i in (2, 5, 6))
    if need_x or need_w:
        markers = tuple(t for t in (x_carrier, w_carrier) if t is not None)
        grad_x, grad_w = run_conv2d.run_backward(
            grad_y, *saved, *ctx.options, seed, need_x, need_w, markers=markers
        )
        grads[2] = grad_x.to(ctx.dtypes[0]) if need_x else None
        grads[5] = grad_w.to(ctx.dtypes[1]) if need_w else None
    if need_bias:
        grads[6] = grad_y.sum(dim=(0, 2, 3)).to(ctx.dtypes[2])
    return tuple(grads)


class _Carry(torch.autograd.Function):
    """A carrier without the memory of the tensor that gradients go to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_zeros(1).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def carry(x: DfpTensor) -> Tensor | None:
    """x's carrier as the op may save it: of an activation nothing is kept."""
    carrier = x.carrier
    if carrier is None or not carrier.requires_grad or carrier.is_leaf:
        return carrier
    return _Carry.apply(carrier) if dispatch.is_plain_eager(carrier) else carrier


run_conv2d = dispatch.Op(
    "integer_conv2d",
    "(Tensor x, Tensor x_scale, Tensor? x_carrier, Tensor w, Tensor w_scale, Tensor? w_carrier,"
    " Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, int x_bits,"
    " int w_bits, int bits, bool power_of_two, int rounding, Tensor? seed) -> Tensor",
    _fake,
    "(Tensor grad_y, Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, int[] stride,"
    " int[] padding, int[] dilation, int groups, int x_bits, int w_bits, int bits,"
    " bool power_of_two, int rounding, Tensor? seed, bool need_x, bool need_w)"
    " -> (Tensor, Tensor)",
    _backward_fake,
    _setup,
    _backward,
    vmap="loop",
)


@register_flop_formula(torch.ops.viops.quantize_dfp)
def _quantize_flops(x_shape: Size, *args: object, **kwargs: object) -> int:
    """The largest magnitude, a product and a rounding: of each value."""
    return 3 * x_shape.numel()


@register_flop_formula(torch.ops.viops.integer_conv2d)
def _flops(
    x_shape: Size, x_scale: Size, x_carrier: Size, w_shape: Size, *args: Any, out_shape: Any
) -> int:
    return conv_flop_count(list(x_shape), list(w_shape), list(out_shape))


@register_flop_formula(torch.ops.viops.integer_conv2d_backward)
def _backward_flops(
    grad_shape: Size, x_shape: Size, x_scale: Size, w_shape: Size, *args: Any, **kwargs: object
) -> int:
    need_x, need_w = args[-2:]
    return (need_x + need_w) * conv_flop_count(list(x_shape), list(w_shape), list(grad_shape))


def check_options(bits: int, scaling: str, rounding: str, generator: object) -> int:
    """How values are brought into dynamic fixed point; the bits."""
    bits = check_bits(bits)
    if scaling not in SCALINGS:
        raise ValueError(f"scaling: expected one of {SCALINGS}, got {scaling!r}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: expected one of {ROUNDINGS}, got {rounding!r}")
    if generator is not None and not isinstance(generator, torch.Generator):
        kind = type(generator).__name__
        raise TypeError(f"generator: expected a torch.Generator or None, got {kind}")
    return bits


def quantize_dfp(
    x: Tensor,
    bits: int = 13,
    *,
    scaling: str = "power_of_two",
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
) -> DfpTensor:
    """Brings a tensor into dynamic fixed point: int16 integers and one scale.

    Args:
        x: float32, float64, bfloat16 or float16, any shape and strides; it is read as float32.
        bits: of a magnitude, 1 to 15: integers lie within ±(2**bits - 1).
        scaling: "power_of_two", the paper's shared exponent: the scale is
            2**(floor(log2(max|x|)) + 1 - bits); "max": it is max|x| / (2**bits - 1), up to one
            bit finer.  It is at least 2**-126, and 1 where all of x is zero.
        rounding: of x / scale: "nearest" (halves to even), "stochastic" (up with the probability
            of the fraction) or "truncate".
        generator: of stochastic rounding; torch's default where None.

    Returns:
        A DfpTensor whose data has x's shape and, where x is dense, strides.  Gradients of what is
        computed from it go to x unchanged (the straight-through estimate).

    Raises:
        TypeError, ValueError: an argument is not as above, or x is not finite.

    Source: Das et al., arXiv:1802.00930, section 3.1.
    """
    return quantize_operand(
        "x", x, check_options(bits, scaling, rounding, generator), scaling, rounding, generator
    )


#: Integers of results that viops has made, by the result.
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def keep(y: Tensor, quantized: DfpTensor, scaling: str, rounding: str) -> None:
    """Keeps the integers of a result as long as it lives, for `kept_or_quantized`."""
    if not y.is_inference():
        _kept[y] = _key(y, quantized.bits, scaling, rounding), quantized.detach()


def _key(x: Tensor, *options: object) -> tuple:
    return state_of(x), *options


def kept_or_quantized(x: Tensor, bits: int, scaling: str, rounding: str) -> DfpTensor:
    """quantize_dfp of x, or the integers that were kept with it."""
    if isinstance(x, Tensor) and dispatch.is_plain_eager(x) and not x.is_inference():
        kept = _kept.get(x)
        if kept is not None and kept[0] == _key(x, bits, scaling, rounding):
            return kept[1].with_carrier(reference.carrier_of(x))
    return quantize_dfp(x, bits, scaling=scaling, rounding=rounding)


def quantize_operand(
    name: str,
    x: Tensor,
    bits: int,
    scaling: str,
    rounding: str,
    generator: torch.Generator | None,
) -> DfpTensor:
    """quantize_dfp of the argument `name` of another function."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in checks.FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    checks.check_layout(name, x)
    noise = reference.draw_noise(x, rounding, generator)
    options = bits, scaling == "power_of_two", ROUNDINGS.index(rounding), noise
    try:
        data, scale = _quantize_dfp(x.detach(), *options)
    except ValueError as error:
        if name == "x":
            raise
        raise ValueError(str(error).replace("x:", f"{name}:", 1)) from None
    return DfpTensor.trusted(data, scale, bits, reference.carrier_of(x))
