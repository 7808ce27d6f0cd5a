"""My op: schema, fake, derivative and public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor
from torch.utils.flop_counter import register_flop_formula

from ... import checks, dispatch, native
from ...dispatch import Kernels
from . import reference


def _native_forward(x: Tensor, scale: float) -> Tensor:
    y = x.new_empty(x.shape)
    native.require().my_op_forward(x, scale, y)
    return y


def _native_backward(grad_y: Tensor, scale: float) -> Tensor:
    grad_x = grad_y.new_empty(grad_y.shape)
    native.require().my_op_backward(grad_y, scale, grad_x)
    return grad_x


dispatch.register(
    "my_op",
    "reference",
    Kernels(
        reference.my_op_forward,
        reference.my_op_backward,
        dispatch.refuses_dtype,
    ),
)
dispatch.register(
    "my_op",
    "cpu",
    Kernels(_native_forward, _native_backward, dispatch.refuses_native),
)


def _fake(x: Tensor, scale: float) -> Tensor:
    _check(x, scale)
    return x.new_empty(x.shape)


def _backward_fake(grad_y: Tensor, scale: float) -> Tensor:
    return grad_y.new_empty(grad_y.shape)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ctx.scale = inputs


def _backward(ctx: Any, grad_y: Tensor) -> tuple:
    return _my_op.run_backward(grad_y, ctx.scale), None


_my_op = dispatch.Op(
    "my_op",
    "(Tensor x, float scale) -> Tensor",
    _fake,
    "(Tensor grad_y, float scale) -> Tensor",
    _backward_fake,
    _setup,
    _backward,
)


@register_flop_formula(
    [
        torch.ops.viops.my_op,
        torch.ops.viops.my_op_backward,
    ]
)
def _flops(shape: Size, *args: object, **kwargs: object) -> int:
    batch, num_tokens, channels = shape
    return batch * num_tokens * channels


def _check(x: Tensor, scale: float) -> None:
    checks.check_float_tensor("x", x, "B N C")
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale: expected a float, got {type(scale).__name__}")


def my_op(x: Tensor, *, scale: float = 1.0) -> Tensor:
    """Each element times a number.

    Args:
        x: [B, N, C], float32, float64, bfloat16 or float16, any strides.
        scale: the factor.

    Returns:
        y [B, N, C] = x * scale, contiguous, in x's dtype.  Gradients go to x.  Autocast changes
        nothing.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    _check(x, scale)
    if dispatch.is_reference_forced():
        return reference.my_op(x, scale=scale)
    return _my_op(x, scale)
