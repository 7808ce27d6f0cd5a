"""My op in plain PyTorch: yardstick of the kernels and fallback.

The function without a suffix is differentiable by autograd.  The one called ``*_backward`` is the
same derivative written out, for callers that stand below autograd.
"""

from __future__ import annotations

from torch import Tensor


def my_op(x: Tensor, *, scale: float = 1.0) -> Tensor:
    """Each element of x [B, N, C] times scale."""
    return my_op_forward(x, scale)


def my_op_forward(x: Tensor, scale: float) -> Tensor:
    """The same with positional arguments, as the registered op takes them."""
    return x.contiguous() * scale


def my_op_backward(grad_y: Tensor, scale: float) -> Tensor:
    """Gradient to x [B, N, C]."""
    return grad_y.contiguous() * scale
