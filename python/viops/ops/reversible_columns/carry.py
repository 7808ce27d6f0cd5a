"""The reversible step on features with their rests, so that its way back ends where it began.

A feature in float32 or a half type is what its step computes, rounded.  Undone from the rounded
one, the step's input comes out wrong by that rounding over alpha, levels are run again on wrong
inputs, and the error grows from column to column.  So a chain carries what rounding takes away,
too: the rest, in float32.  A feature with its rest has 48 bits (32 where it is of bfloat16), and
what is rebuilt rounds to the bits that were there, but for single elements at the boundary of two,
as long as those suffice: with alpha = 0.5, some 20 columns.

    v = f + a * (x + x_rest);  out = round(v);  out_rest = v - out
    v = (out + out_rest - f) / a;  x = round(v);  x_rest = v - x

Only what the chain holds now has rests: memory does not grow with columns.

These functions run within the one autograd.Function of a chain: they are no ops of torch's, and
have no derivative.  The backend is the one that `reversible_step` has, but where a dispatch mode,
such as a tracer, has to see what is done: kernels would do it behind its back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import dispatch, native
from ...tensors import laid_out_as
from . import reference
from .op import (
    MAX_RANK,
    check_alpha,
    check_features,
    check_like,
    dense,
    native_f,
    triton_kernels,
)

#: What a step's way back gives: x, its rest, and the gradients to x and alpha.
Rebuilt = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def step(
    f: Tensor, x: Tensor, x_rest: Tensor | None, alpha: Tensor | None
) -> tuple[Tensor, Tensor]:
    """f + a * (x + x_rest), and its rest, computed in float64.

    Args:
        f: [B, C, ...], what the level computes; float32, bfloat16 or float16, any strides.
        x: [B, C, ...], of f's shape: the same level of the column before.
        x_rest: [B, C, ...] in float32: what rounding took from x; None for zeros.
        alpha: as `reversible_step` has it; None for a = 1, features being of any rank then.

    Returns:
        out [B, C, ...] in the dtype to which f, x and alpha promote, and out_rest [B, C, ...] in
        float32, both laid out as `reversible_step` does it.  Where out is not finite its rest is 0.

    Raises:
        TypeError, ValueError: an argument is not as above; float64 has no rests.
    """
    _check_first("f", f, alpha)
    check_like("x", x, "f", f)
    _check_rest("x_rest", x_rest, "f", f)
    dtype = _result_dtype("f", f, x=x, alpha=alpha)
    if f.dim() > MAX_RANK:
        out, out_rest = step(
            f.flatten(2),
            x.flatten(2),
            None if x_rest is None else x_rest.flatten(2),
            None if alpha is None else alpha.flatten(),
        )
        return out.reshape(f.shape), out_rest.reshape(f.shape)
    f, x, x_rest, alpha = (_resolved(t) for t in (f, x, x_rest, alpha))
    run, _ = _functions(f.device.type, dtype)
    return run(native_f(f, dtype), _of_dtype(dtype, x), x_rest, _of_dtype(dtype, alpha))


def step_backward(
    out: Tensor,
    out_rest: Tensor,
    f: Tensor,
    alpha: Tensor | None,
    grad_out: Tensor | None,
    need_rest: bool = True,
) -> Rebuilt:
    """The way back through `step`: its input, and gradients, in one pass.

    Args:
        out, out_rest: [B, C, ...], what `step` gave.
        f, alpha: what was given to it.
        grad_out: [B, C, ...], the gradient to out, in its dtype, or None.
        need_rest: whether x's rest is asked for.

    Returns:
        x [B, C, ...] in out's dtype, (out + out_rest - f) / a; its rest in float32, or None without
        need_rest; and the gradients to x and alpha, as `reversible_step_backward` gives them, sums
        held in float64.  Those are None where grad_out is; that to alpha also where alpha is, and
        grad_x is grad_out then.

    Raises:
        TypeError, ValueError: an argument is not as above, or out's dtype is not the one that
            `step` gives for f and alpha; float64 has no rests.
    """
    _check_first("out", out, alpha)
    _check_rest("out_rest", out_rest, "out", out)
    if out_rest is None:
        raise TypeError("out_rest: expected a torch.Tensor [B, C, ...], got NoneType")
    check_like("f", f, "out", out)
    dtype = _result_dtype("out", out, f=f, alpha=alpha)
    if dtype is not out.dtype:
        raise TypeError(f"out: expected {dtype}, to which f and alpha promote, got {out.dtype}")
    if grad_out is not None:
        check_like("grad_out", grad_out, "out", out)
        if grad_out.dtype is not dtype:
            raise TypeError(f"grad_out: expected {dtype}, as out has, got {grad_out.dtype}")
    if out.dim() > MAX_RANK:
        return _flat_backward(out, out_rest, f, alpha, grad_out, need_rest)
    out, out_rest, f, alpha, grad_out = (_resolved(t) for t in (out, out_rest, f, alpha, grad_out))
    _, run = _functions(out.device.type, dtype)
    if alpha is None:
        x, x_rest, *_ = run(out, out_rest, native_f(f, dtype), None, None, need_rest)
        return x, x_rest, grad_out, None
    x, x_rest, grad_x, grad_alpha = run(
        out, out_rest, native_f(f, dtype), _of_dtype(dtype, alpha), grad_out, need_rest
    )
    return x, x_rest, grad_x, _of_dtype(alpha.dtype, grad_alpha)


def _flat_backward(
    out: Tensor,
    out_rest: Tensor,
    f: Tensor,
    alpha: Tensor | None,
    grad_out: Tensor | None,
    need_rest: bool,
) -> Rebuilt:
    """The way back on more axes than kernels take."""
    x, x_rest, grad_x, grad_alpha = step_backward(
        out.flatten(2),
        out_rest.flatten(2),
        f.flatten(2),
        None if alpha is None else alpha.flatten(),
        None if grad_out is None else grad_out.flatten(2),
        need_rest,
    )
    return (
        x.reshape(out.shape),
        None if x_rest is None else x_rest.reshape(out.shape),
        grad_out if alpha is None or grad_x is None else grad_x.reshape(out.shape),
        None if grad_alpha is None or alpha is None else grad_alpha.reshape(alpha.shape),
    )


def _forward(
    write: Callable, f: Tensor, x: Tensor, x_rest: Tensor | None, alpha: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The step by a backend's function that writes it."""
    f = dense(f)
    out = torch.empty_like(f, dtype=x.dtype)
    out_rest = torch.empty_like(f, dtype=torch.float32)
    write(
        f,
        laid_out_as(f, x),
        None if x_rest is None else laid_out_as(f, x_rest),
        None if alpha is None else alpha.contiguous(),
        out,
        out_rest,
    )
    return out, out_rest


def _backward(
    write: Callable,
    out: Tensor,
    out_rest: Tensor,
    f: Tensor,
    alpha: Tensor | None,
    grad_out: Tensor | None,
    need_rest: bool,
) -> Rebuilt:
    """The way back by a backend's function that writes it."""
    out = dense(out)
    x = torch.empty_like(out)
    x_rest = torch.empty_like(out, dtype=torch.float32) if need_rest else None
    grad_x = grad_alpha = None
    if alpha is not None:
        alpha = alpha.contiguous()
        if grad_out is not None:
            grad_out = laid_out_as(out, grad_out)
            grad_x, grad_alpha = torch.empty_like(out), torch.empty_like(alpha)
    rest, f = laid_out_as(out, out_rest), laid_out_as(out, f)
    write(grad_out, out, rest, f, alpha, x, x_rest, grad_x, grad_alpha)
    return x, x_rest, grad_x, grad_alpha


def _native_forward(*args: Any) -> tuple[Tensor, Tensor]:
    return _forward(native.require().reversible_step_with_rest_forward, *args)


def _native_backward(*args: Any) -> Rebuilt:
    return _backward(native.require().reversible_step_with_rest_backward, *args)


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    return _forward(triton_kernels().reversible_step_with_rest_forward, *args)


def _triton_backward(*args: Any) -> Rebuilt:
    return _backward(triton_kernels().reversible_step_with_rest_backward, *args)


#: By backend: the step, and the way back.
_FUNCTIONS: dict[str, tuple[Callable, Callable]] = {
    "reference": (reference.step_with_rest, reference.step_with_rest_backward),
    "cpu": (_native_forward, _native_backward),
    "triton": (_triton_forward, _triton_backward),
}


def _functions(device_type: str, dtype: torch.dtype) -> tuple[Callable, Callable]:
    if torch._C._len_torch_dispatch_stack():
        return _FUNCTIONS["reference"]
    return _FUNCTIONS[dispatch.choose("reversible_step", device_type, dtype)[0]]


def _resolved(value: Any) -> Any:
    """Its values in its memory: of a view that negates them, kernels would read others."""
    return value.resolve_neg() if value is not None and value.is_neg() else value


def _check_first(name: str, value: Tensor, alpha: Tensor | None) -> None:
    """The features that all other tensors have to be like, and alpha."""
    check_features(name, value, least_rank=0 if alpha is None else 2)
    if alpha is not None:
        check_alpha(alpha, name, value)


def _check_rest(name: str, rest: Tensor | None, other: str, like: Tensor) -> None:
    if rest is None:
        return
    check_like(name, rest, other, like)
    if rest.dtype is not torch.float32:
        raise TypeError(f"{name}: expected float32, got {rest.dtype}")


def _of_dtype(dtype: torch.dtype, value: Tensor | None) -> Tensor | None:
    """value.to(dtype), which costs most of a microsecond where it does nothing."""
    return value if value is None or value.dtype is dtype else value.to(dtype)


def _result_dtype(first: str, like: Tensor, **others: Tensor | None) -> torch.dtype:
    """What these promote to."""
    dtype = like.dtype
    _refuse_float64(first, dtype)
    for name, other in others.items():
        if other is not None and other.dtype is not dtype:
            _refuse_float64(name, other.dtype)
            dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def _refuse_float64(name: str, dtype: torch.dtype) -> None:
    if dtype is torch.float64:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {dtype}")
