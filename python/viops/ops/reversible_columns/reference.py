"""Plain PyTorch for reversible columns: the yardstick of the kernels and the fallback.

Source: Cai et al., "Reversible Column Networks", ICLR 2023, arXiv:2212.11696, section 3.1.

`reversible_step` is differentiable by autograd.  ``run_*`` are the registered ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...tensors import accumulation_dtype, in_layout_of

#: The least magnitude that a shortcut's factor has: the way back divides by it.
MIN_ALPHA = 1e-3


def reversible_step(f: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    """f + a * x, as one writes it by hand."""
    dtype = result_dtype(f, x, alpha)
    wide = accumulation_dtype(dtype)
    out = f.to(wide) + factors(alpha.to(wide), f) * x.to(wide)
    return in_layout_of(f, out).to(dtype)


@torch.no_grad()
def reversible_step_backward(
    out: Tensor, f: Tensor, alpha: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """x = (out - f) / a, and the gradients to x and alpha."""
    wide = accumulation_dtype(result_dtype(out, f, alpha, grad_out))
    x, *grads = _gradients(*(t.to(wide) for t in (grad_out, out, f, alpha)))
    x, grad_x = (in_layout_of(out, values).to(out.dtype) for values in (x, grads[0]))
    return x, grad_x, grads[1].to(alpha.dtype)


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """What the plain formula gives for these operands, none of them of zero axes."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def factors(alpha: Tensor, like: Tensor) -> Tensor:
    """a [1, C, 1, ...]: alpha of C elements with the magnitude clamped, both zeros to +MIN_ALPHA.

    Its gradient goes to alpha as it is: the official code clamps the parameter itself.
    """
    alpha = alpha.reshape(1, like.shape[1], *(1 for _ in like.shape[2:]))
    given = alpha.detach()
    least = torch.full_like(given, MIN_ALPHA)
    clamped = torch.where(given < 0, -least, least)
    # the difference is zero: of small values, which are finite
    return torch.where(given.abs() < MIN_ALPHA, clamped + (alpha - given), alpha)


@torch.no_grad()
def step_with_rest(
    f: Tensor, x: Tensor, x_rest: Tensor | None, alpha: Tensor | None
) -> tuple[Tensor, Tensor]:
    """f + a * (x + x_rest), and what rounding it to the result's dtype takes away: its rest."""
    v = x.double() if x_rest is None else x.double() + x_rest.double()
    if alpha is not None:
        v = factors(alpha.double(), f) * v
    operands = (f, x) if alpha is None else (f, x, alpha)
    return _split(in_layout_of(f, f.double() + v), result_dtype(*operands))


@torch.no_grad()
def step_with_rest_backward(
    out: Tensor,
    out_rest: Tensor,
    f: Tensor,
    alpha: Tensor | None,
    grad_out: Tensor | None,
    need_rest: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """x = (out + out_rest - f) / a, rounded, and its rest; and the gradients to x and alpha.

    What is not asked for is None; grad_x is grad_out where alpha is None.
    """
    v = out.double() + out_rest.double() - f.double()
    a = None if alpha is None else factors(alpha.double(), out)
    x, x_rest = _split(in_layout_of(out, v if a is None else v / a), out.dtype)
    rest = x_rest if need_rest else None
    if grad_out is None or a is None or alpha is None:
        return x, rest, grad_out, None
    axes = tuple(axis for axis in range(x.dim()) if axis != 1)
    grad_alpha = (grad_out.double() * x.double()).sum(dim=axes).reshape(alpha.shape)
    grad_x = in_layout_of(out, a * grad_out.double())
    return x, rest, grad_x.to(grad_out.dtype), grad_alpha.to(alpha.dtype)


def tilt(dtype: torch.dtype) -> float:
    """What values with rests are multiplied by before they are rounded to this dtype.

    Values of few bits, such as sums of half types, are often halfway between two of the dtype.  So
    is nothing that has few bits then, and the value that is rebuilt, which differs in its last
    bits, rounds to the same side.
    """
    return 1 + 2.0 ** (-29 if dtype is torch.float32 else -18)


def _split(v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """v rounded to this dtype, and the rest in float32, which infinities do not have."""
    rounded = (v * tilt(dtype)).to(dtype)
    rest = (v - rounded.double()).float()
    return rounded, torch.where(rounded.isfinite(), rest, 0.0)


def _gradients(
    grad_out: Tensor, values: Tensor, f: Tensor | None, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """x, which `values` are where f is None; the gradients to x and alpha; all of one dtype."""
    a = factors(alpha, grad_out)
    x = values if f is None else (values - f) / a
    axes = tuple(axis for axis in range(x.dim()) if axis != 1)
    return x, a * grad_out, (grad_out * x).sum(dim=axes).reshape(alpha.shape)


def run_forward(f: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    """out, of x's dtype, which f has too, or a half one beside float32."""
    return reversible_step(f, x, alpha)


def run_backward(
    grad_out: Tensor,
    values: Tensor | None,
    f: Tensor | None,
    alpha: Tensor,
    need_x: bool,
    need_alpha: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, the gradient to it and that to alpha.

    values: the step's result; or, where f is None, its x, or None where the gradient to x alone is
    asked for.  Then x and the gradient that is not asked for are empty.
    """
    like = grad_out if values is None else values
    wide = accumulation_dtype(like.dtype)
    x, grad_x, grad_alpha = _gradients(
        grad_out.to(wide), like.to(wide), None if f is None else f.to(wide), alpha.to(wide)
    )
    has_f = f is not None
    return (
        in_layout_of(like, x).to(like.dtype) if has_f else like.new_empty(0),
        in_layout_of(like, grad_x).to(like.dtype) if need_x or has_f else like.new_empty(0),
        grad_alpha.to(alpha.dtype) if need_alpha or has_f else alpha.new_empty(0),
    )
