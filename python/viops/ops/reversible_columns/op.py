"""Reversible columns: schemas, fakes, derivative and public functions.

Source: Cai et al., "Reversible Column Networks", ICLR 2023, arXiv:2212.11696, section 3.1.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Size, Tensor
from torch.utils.flop_counter import register_flop_formula

from ... import checks, dispatch, native, triton_runtime
from ...dispatch import Kernels
from ...tensors import is_channels_last, laid_out_as
from . import reference

Gradients = tuple[Tensor, Tensor, Tensor]

#: What f may have where all others have float32.
_HALF_DTYPES = (torch.bfloat16, torch.float16)
#: Of a tensor that the kernels take.
MAX_RANK = 8


def dense(x: Tensor) -> Tensor:
    """x [B, C, ...], contiguous with the channels where they stand or last."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def _empty_gradients(
    like: Tensor, f: Tensor | None, alpha: Tensor, need_x: bool, need_alpha: bool
) -> Gradients:
    if f is not None:
        return torch.empty_like(like), torch.empty_like(like), torch.empty_like(alpha)
    return (
        like.new_empty(0),
        torch.empty_like(like) if need_x else like.new_empty(0),
        torch.empty_like(alpha) if need_alpha else alpha.new_empty(0),
    )


def _forward(write: Callable, f: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    """The step by a backend's function that writes it."""
    f = dense(f)
    out = torch.empty_like(f, dtype=x.dtype)
    write(f, laid_out_as(f, x), alpha.contiguous(), out)
    return out


def _backward(
    write: Callable,
    grad_out: Tensor,
    values: Tensor | None,
    f: Tensor | None,
    alpha: Tensor,
    need_x: bool,
    need_alpha: bool,
) -> Gradients:
    """The way back by a backend's function that writes it."""
    like, alpha = dense(grad_out if values is None else values), alpha.contiguous()
    grads = _empty_gradients(like, f, alpha, need_x, need_alpha)
    write(
        laid_out_as(like, grad_out),
        None if values is None else like,
        None if f is None else laid_out_as(like, f),
        alpha,
        None if f is None else grads[0],
        grads[1] if need_x or f is not None else None,
        grads[2] if need_alpha or f is not None else None,
    )
    return grads


def _native_forward(f: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    return _forward(native.require().reversible_step_forward, f, x, alpha)


def _native_backward(
    grad_out: Tensor, values: Tensor | None, f: Tensor | None, alpha: Tensor, *needs: bool
) -> Gradients:
    write = native.require().reversible_step_backward
    return _backward(write, grad_out, values, f, alpha, *needs)


@functools.cache
def triton_kernels() -> ModuleType:
    """Loaded at the first call: Triton takes time to import, and need not be there."""
    module = importlib.import_module(".triton_kernels", __package__)
    triton_runtime.check_kernel(module.reversible_step_forward_kernel)
    return module


def _triton_forward(f: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    kernels = triton_kernels()
    kernels.check_inputs(x, f, alpha)
    return _forward(kernels.reversible_step_forward, f, x, alpha)


def _triton_backward(
    grad_out: Tensor, values: Tensor | None, f: Tensor | None, alpha: Tensor, *needs: bool
) -> Gradients:
    kernels = triton_kernels()
    kernels.check_inputs(grad_out, f, alpha, values)
    write = kernels.reversible_step_backward
    return _backward(write, grad_out, values, f, alpha, *needs)


#: By backend: the step, and the way back, which is also the step's derivative.
_FUNCTIONS: dict[str, tuple[Callable, Callable, Callable]] = {
    "reference": (reference.run_forward, reference.run_backward, dispatch.refuses_dtype),
    "cpu": (_native_forward, _native_backward, dispatch.refuses_native),
    "triton": (_triton_forward, _triton_backward, dispatch.refuses_triton),
}
for _name, (_step, _back, _refuses) in _FUNCTIONS.items():
    dispatch.register("reversible_step", _name, Kernels(_step, _back, _refuses))
    dispatch.register(
        "reversible_step_backward", _name, Kernels(_back, dispatch.no_derivative, _refuses)
    )


def _fake(f: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    return torch.empty_like(dense(f), dtype=x.dtype)


def _backward_fake(
    grad_out: Tensor,
    values: Tensor | None,
    f: Tensor | None,
    alpha: Tensor,
    need_x: bool,
    need_alpha: bool,
) -> Gradients:
    like = dense(grad_out if values is None else values)
    return _empty_gradients(like, f, alpha.contiguous(), need_x, need_alpha)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    f, x, alpha = inputs
    ctx.f_dtype = f.dtype
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, alpha)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None) -> tuple:
    if grad_out is None:
        return None, None, None
    need_f, need_x, need_alpha = ctx.needs_input_grad
    grad_f = grad_out.to(ctx.f_dtype) if need_f else None
    if not (need_x or need_alpha):
        return grad_f, None, None
    x, alpha = ctx.saved_tensors
    _, grad_x, grad_alpha = _reversible_step.run_backward(
        grad_out, x, None, alpha, need_x, need_alpha
    )
    return grad_f, grad_x if need_x else None, grad_alpha if need_alpha else None


# `values`: the step's result, or, where f is None, its x.  With f all is given back, else the
# gradients that are asked for
_reversible_step_backward = dispatch.Op(
    "reversible_step_backward",
    "(Tensor grad_out, Tensor? values, Tensor? f, Tensor alpha, bool need_x, bool need_alpha)"
    " -> (Tensor, Tensor, Tensor)",
    _backward_fake,
    vmap="loop",  # alpha has no batch
)
_reversible_step = dispatch.Op(
    "reversible_step",
    "(Tensor f, Tensor x, Tensor alpha) -> Tensor",
    _fake,
    setup=_setup,
    backward=_gradients,
    vmap="loop",
)


@register_flop_formula(torch.ops.viops.reversible_step)
def _flops(f_shape: Size, *args: object, **kwargs: object) -> int:
    """A product and a sum: of each value."""
    return 2 * f_shape.numel()


@register_flop_formula(torch.ops.viops.reversible_step_backward)
def _backward_flops(
    grad_shape: Size,
    values_shape: Size | None,
    f_shape: Size | None,
    alpha_shape: Size,
    need_x: bool,
    need_alpha: bool,
    **kwargs: object,
) -> int:
    """A difference and a quotient, a product, a product and a sum: of each value."""
    if f_shape is not None:
        return 5 * grad_shape.numel()
    return (need_x + 2 * need_alpha) * grad_shape.numel()


def check_features(name: str, value: Tensor, least_rank: int = 2) -> None:
    """A floating-point tensor [B, C, ...]."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor [B, C, ...], got {type(value).__name__}")
    if value.dim() < least_rank:
        raise ValueError(f"{name}: expected [B, C, ...], got shape {list(value.shape)}")
    _check_floating(name, value)


def _check_floating(name: str, value: Tensor) -> None:
    if value.dtype not in checks.FLOAT_DTYPES:
        raise TypeError(
            f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype}"
        )
    checks.check_layout(name, value)


def check_like(name: str, value: Tensor, other: str, like: Tensor) -> None:
    """Another tensor against the one that stands first."""
    check_features(name, value, least_rank=0)
    if value.shape != like.shape:
        shapes = list(value.shape), list(like.shape)
        raise ValueError(f"{name}: shape {shapes[0]} differs from {other}'s {shapes[1]}")
    checks.check_same("device", name, value.device, other, like.device)


def check_alpha(alpha: Tensor, other: str, like: Tensor) -> None:
    """[C], or [1, C, 1, ...] of as many axes as the features."""
    if not isinstance(alpha, Tensor):
        raise TypeError(f"alpha: expected a torch.Tensor [C], got {type(alpha).__name__}")
    _check_floating("alpha", alpha)
    channels, rank = like.shape[1], alpha.dim()
    if alpha.numel() != channels or not (
        rank == 1 or (rank == like.dim() and alpha.shape[1] == channels)
    ):
        full = [1, channels, *(1 for _ in like.shape[2:])]
        raise ValueError(
            f"alpha: expected shape {[channels]} or {full}, got shape {list(alpha.shape)}"
        )
    checks.check_same("device", "alpha", alpha.device, other, like.device)


def is_native(dtype: torch.dtype, f: torch.dtype, *others: torch.dtype) -> bool:
    """Whether the kernels take these dtypes: all one, or f half and the others float32."""
    for other in others:
        if other is not dtype:
            return False
    return f is dtype or (dtype is torch.float32 and f in _HALF_DTYPES)


def native_f(f: Tensor, dtype: torch.dtype) -> Tensor:
    """f as the kernels take it where all others have this dtype."""
    return f if is_native(dtype, f.dtype) else f.to(dtype)


def reversible_step(f: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    """One level's step from column to column: f + a * x.

    Args:
        f: [B, C, ...], what the level computes; float32, float64, bfloat16 or float16, any
            strides; contiguous and channels_last are the fast paths.
        x: [B, C, ...], of f's shape: the same level of the column before.
        alpha: [C], or [1, C, 1, ...] of as many axes as f.

    Returns:
        out [B, C, ...] = f + a * x, a being alpha with its magnitude clamped to at least 1e-3,
        its sign kept; both zeros become +1e-3, NaN stays NaN.  Its dtype is the one to which torch
        promotes ``f + alpha.view(1, C, 1, ...) * x``; half types are computed in float32.  It is
        in channels_last where f is, else contiguous.  Gradients go to f, x and alpha, the last as
        if alpha itself were the factor: the official code clamps the parameter.  Autocast
        changes nothing.

    Tensors of one dtype, and a half f beside float32, run as they are; all else is brought to the
    result's dtype first.  Where x lies otherwise in memory than f it is copied.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: RevCol (Cai et al., arXiv:2212.11696), section 3.1; the clamp is the official code's,
    which leaves zero at zero.
    """
    check_features("f", f)
    check_like("x", x, "f", f)
    check_alpha(alpha, "f", f)
    if dispatch.is_reference_forced():
        return reference.reversible_step(f, x, alpha)
    if f.dim() > MAX_RANK:
        out = reversible_step(f.flatten(2), x.flatten(2), alpha.flatten())
        return out.reshape(f.shape)
    if not is_native(x.dtype, f.dtype, alpha.dtype):
        dtype = reference.result_dtype(f, x, alpha)
        f, x, alpha = native_f(f, dtype), x.to(dtype), alpha.to(dtype)
    return _reversible_step(f, x, alpha)


def reversible_step_backward(
    out: Tensor, f: Tensor, alpha: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The way back through `reversible_step`: its input x, rebuilt, and gradients, in one pass.

    Args:
        out: [B, C, ...], what the step gave; float32, float64, bfloat16 or float16, any strides;
            contiguous and channels_last are the fast paths.
        f: [B, C, ...], what was given to the step.
        alpha: [C], or [1, C, 1, ...] of as many axes as out.
        grad_out: [B, C, ...], the gradient to out; it is the one to f, too.

    Returns:
        x [B, C, ...] = (out - f) / a, with a as in `reversible_step`; grad_x [B, C, ...] =
        a * grad_out, both in out's dtype, in channels_last where out is, else contiguous; and
        grad_alpha, the sum over batch and space of grad_out * x, of alpha's shape and dtype.  Sums
        are held in float32, or float64 for float64, and are the same for any number of threads.
        None of them has a derivative.  Autocast changes nothing.

    Tensors of one dtype, and a half f beside float32, run as they are; all else is brought to the
    dtype that all of them promote to.  Where f or grad_out lie otherwise in memory than out they
    are copied.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: RevCol (Cai et al., arXiv:2212.11696), section 3.1.
    """
    check_features("out", out)
    check_like("f", f, "out", out)
    check_alpha(alpha, "out", out)
    check_like("grad_out", grad_out, "out", out)
    if dispatch.is_reference_forced():
        return reference.reversible_step_backward(out, f, alpha, grad_out)
    if torch.is_grad_enabled():  # no_grad would become a graph of its own under export
        out, f, alpha, grad_out = map(_detached, (out, f, alpha, grad_out))
    return _run_back(out, f, alpha, grad_out)


def _detached(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x


def _run_back(out: Tensor, f: Tensor, alpha: Tensor, grad_out: Tensor) -> Gradients:
    if out.dim() > MAX_RANK:
        flat = out.flatten(2), f.flatten(2), alpha.flatten(), grad_out.flatten(2)
        x, grad_x, grad_alpha = _run_back(*flat)
        return x.reshape(out.shape), grad_x.reshape(out.shape), grad_alpha.reshape(alpha.shape)
    if is_native(out.dtype, f.dtype, alpha.dtype, grad_out.dtype):
        return _reversible_step_backward(grad_out, out, f, alpha, True, True)
    dtype = reference.result_dtype(out, f, alpha, grad_out)
    wide = [t.to(dtype) for t in (grad_out, out, alpha)]
    x, grad_x, grad_alpha = _reversible_step_backward(
        *wide[:2], native_f(f, dtype), wide[2], True, True
    )
    return x.to(out.dtype), grad_x.to(out.dtype), grad_alpha.to(alpha.dtype)
