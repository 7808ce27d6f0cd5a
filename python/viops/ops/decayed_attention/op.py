"""Decayed attention: schema, fake, derivative and public function.

Source: Fan et al., "RMT: Retentive Networks Meet Vision Transformers", CVPR 2024, section 3.2.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Size, Tensor
from torch.utils.flop_counter import register_flop_formula

from ... import checks, dispatch, native
from ...autocast import to_autocast_dtype
from ...dispatch import Kernels
from ...tensors import accumulation_dtype
from . import reference


def _native_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    axial: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    out, logsumexp, inner = _empty_outputs(q, v, axial)
    native.require().decayed_attention_forward(
        q, k, v, log_decay, sin, cos, axial, scale, out, logsumexp, inner if axial else None
    )
    return out, logsumexp, inner


def _native_infer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    axial: bool,
    scale: float,
) -> tuple[Tensor]:
    out = _empty_like_heads(v, v.shape[4])
    native.require().decayed_attention_forward(
        q, k, v, log_decay, sin, cos, axial, scale, out, None, None
    )
    return (out,)


def _native_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    inner: Tensor,
    axial: bool,
    scale: float,
    need_log_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _empty_gradients(q, v, log_decay)
    native.require().decayed_attention_backward(
        grad_out,
        q,
        k,
        v,
        log_decay,
        sin,
        cos,
        out,
        logsumexp,
        inner if axial else None,
        axial,
        scale,
        *grads[:3],
        grads[3] if need_log_decay else None,
    )
    if not need_log_decay:
        grads[3].zero_()
    return grads


@functools.cache
def _triton_kernels() -> ModuleType:
    """Loaded at the first call: Triton takes time to import, and need not be there."""
    return importlib.import_module(".triton_kernels", __package__)


def _triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    axial: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _triton_kernels()
    kernels.check_inputs(q, k, v, log_decay, sin, cos)
    outputs = _empty_outputs(q, v, axial)
    kernels.decayed_attention_forward(q, k, v, log_decay, sin, cos, axial, scale, *outputs)
    return outputs


def _triton_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    inner: Tensor,
    axial: bool,
    scale: float,
    need_log_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = _triton_kernels()
    kernels.check_inputs(q, k, v, log_decay, sin, cos)
    kernels.check_results(grad_out, q, v, out, logsumexp, inner, axial)
    grads = _empty_gradients(q, v, log_decay)
    kernels.decayed_attention_backward(
        grad_out,
        q,
        k,
        v,
        log_decay,
        sin,
        cos,
        out,
        logsumexp,
        inner,
        axial,
        scale,
        *grads[:3],
        grads[3] if need_log_decay else None,
    )
    if not need_log_decay:
        grads[3].zero_()
    return grads


def _empty_like_heads(like: Tensor, channels: int) -> Tensor:
    """[B, H, h, w, channels], laid out as [B, h, w, H, channels]."""
    batch, num_heads, height, width, _ = like.shape
    token = num_heads * channels
    strides = (height * width * token, channels, width * token, token, 1)
    return like.new_empty_strided((batch, num_heads, height, width, channels), strides)


def _empty_outputs(q: Tensor, v: Tensor, axial: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_heads, height, width, channels = v.shape
    dtype = accumulation_dtype(q.dtype)
    out = _empty_like_heads(v, channels)
    if axial:
        inner = _empty_like_heads(v, channels)
    else:
        inner = v.new_empty(batch, num_heads, 0, width, channels)
    shape = (batch, 1 + axial, num_heads, height, width)
    return out, q.new_empty(shape, dtype=dtype), inner


def _empty_gradients(
    q: Tensor, v: Tensor, log_decay: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head_dim = q.shape[4]
    grad_q, grad_k = _empty_like_heads(q, head_dim), _empty_like_heads(q, head_dim)
    return grad_q, grad_k, _empty_like_heads(v, v.shape[4]), log_decay.new_empty(log_decay.shape)


dispatch.register(
    "decayed_attention",
    "reference",
    Kernels(
        reference.decayed_attention_forward,
        reference.decayed_attention_backward,
        dispatch.refuses_dtype,
    ),
)
dispatch.register(
    "decayed_attention",
    "cpu",
    Kernels(_native_forward, _native_backward, dispatch.refuses_native, _native_infer),
)
dispatch.register(
    "decayed_attention",
    "triton",
    Kernels(_triton_forward, _triton_backward, dispatch.refuses_triton),
)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    axial: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(q, v, axial)


def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(q, v, log_decay)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, log_decay, sin, cos, ctx.axial, ctx.scale = inputs
    ctx.need_log_decay = ctx.needs_input_grad[3]
    ctx.save_for_backward(q, k, v, log_decay, sin, cos, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple:
    if grad_out is None:
        return (None,) * 8
    *grads, grad_log_decay = _decayed_attention.run_backward(
        grad_out, *ctx.saved_tensors, ctx.axial, ctx.scale, ctx.need_log_decay
    )
    return *grads, grad_log_decay if ctx.need_log_decay else None, None, None, None, None


_decayed_attention = dispatch.Op(
    "decayed_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? sin, Tensor? cos, bool axial,"
    " float scale) -> (Tensor, Tensor, Tensor)",
    _fake,
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? sin, Tensor? cos,"
    " Tensor out, Tensor logsumexp, Tensor inner, bool axial, float scale, bool need_log_decay)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    _setup,
    _backward,
)


def _pairs(shape: Size, axial: bool) -> int:
    """How many pairs of tokens attend, over all passes."""
    batch, num_heads, height, width, _ = shape
    tokens = height * width
    return batch * num_heads * tokens * (height + width if axial else tokens)


@register_flop_formula(torch.ops.viops.decayed_attention)
def _flops(
    q_shape: Size,
    k_shape: Size,
    v_shape: Size,
    decay_shape: Size,
    sin_shape: Size | None,
    cos_shape: Size | None,
    axial: bool,
    *args: object,
    **kwargs: object,
) -> int:
    return 2 * _pairs(q_shape, axial) * (q_shape[4] + v_shape[4])


@register_flop_formula(torch.ops.viops.decayed_attention_backward)
def _backward_flops(
    grad_shape: Size,
    q_shape: Size,
    k_shape: Size,
    v_shape: Size,
    decay_shape: Size,
    sin_shape: Size | None,
    cos_shape: Size | None,
    result_shape: Size,
    logsumexp_shape: Size,
    inner_shape: Size,
    axial: bool,
    *args: object,
    **kwargs: object,
) -> int:
    return 2 * _pairs(q_shape, axial) * (3 * q_shape[4] + 2 * v_shape[4])


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.check_float_tensor(name, tensor, "B H h w D")
    checks.check_float_tensor("log_decay", log_decay, "H")
    q_shape, v_shape = tuple(q.shape), tuple(v.shape)
    if k.shape != q_shape:
        raise ValueError(f"k: shape {list(k.shape)} differs from q's {list(q_shape)}")
    if 0 in q_shape[1:]:
        raise ValueError(f"q: expected H, h, w and D of at least 1, got shape {list(q_shape)}")
    if v_shape[:4] != q_shape[:4]:
        got, expected = list(v_shape[:4]), list(q_shape[:4])
        raise ValueError(f"v: [B, H, h, w] {got} differs from q's {expected}")
    if v_shape[4] == 0:
        raise ValueError(f"v: expected Dv of at least 1, got shape {list(v_shape)}")
    if log_decay.shape[0] != q_shape[1]:
        raise ValueError(
            f"log_decay: expected [H] = [{q_shape[1]}], got shape {list(log_decay.shape)}"
        )
    dtype, device = q.dtype, q.device
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype is not dtype:
            raise TypeError(f"{name}: dtype {tensor.dtype} differs from q's {dtype}")
    for name, tensor in (("k", k), ("v", v), ("log_decay", log_decay)):
        if tensor.device != device:
            checks.check_same("device", name, tensor.device, "q", device)


def _check_rotation(rotation: object, q: Tensor) -> None:
    if not isinstance(rotation, (tuple, list)) or len(rotation) != 2:
        kind = type(rotation).__name__
        raise TypeError(f"rotation: expected a pair of tensors (sin, cos) or None, got {kind}")
    shape = q.shape[2:]
    for tensor in rotation:
        checks.check_float_tensor("rotation", tensor, "h w D")
        if tensor.shape != shape:
            raise ValueError(
                f"rotation: expected sin and cos [h, w, D] = {list(shape)}, got shape "
                f"{list(tensor.shape)}"
            )
        if tensor.requires_grad:
            raise ValueError("rotation: expected constants, got a tensor that requires a gradient")
        if tensor.device != q.device:
            checks.check_same("device", "rotation", tensor.device, "q", q.device)
    if shape[2] % 2:
        raise ValueError(f"rotation: needs an even D, got q of shape {list(q.shape)}")


def decayed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    axial: bool = False,
    rotation: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention whose logits decay with the Manhattan distance on the image grid.

    The logit of query n, at row y and column x of the grid, and key m is
    ``scale * <q_n, k_m> + log_decay * (|y_n - y_m| + |x_n - x_m|)``.

    Args:
        q: [B, H, h, w, D], float32, float64, bfloat16 or float16, any strides; the permuted view
            of a linear layer's [B, h, w, H * D] is the fast path.
        k: [B, H, h, w, D], of q's dtype and device.
        v: [B, H, h, w, Dv], of q's dtype and device.
        log_decay: [H], of any of these dtypes: the logarithm of each head's decay per step, at
            most 0 and finite; that is for the caller to see to.
        axial: whether each token attends to all of the grid, at O((h w)^2) cost, or first to its
            row and then, on what that gave, to its column, with the same q and k, at
            O(h w (h + w)).
        rotation: sin and cos, each [h, w, D]: q and k become ``x * cos + turned(x) * sin``, where
            `turned` makes (-odd, even) of each pair of channels (even, odd).  Constants.
        scale: factor on the dot products; None is D ** -0.5.

    Returns:
        out [B, H, h, w, Dv], laid out so that ``out.permute(0, 2, 3, 1, 4).flatten(-2)`` is free.
        Gradients go to q, k, v and log_decay.

    No matrix of logits or decays is stored.  Sums are held in float32, or float64 for float64.
    Under autocast q, k and v are cast as scaled_dot_product_attention casts them.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: RMT (Fan et al., CVPR 2024), section 3.2, with the decay added to the logits, as in the
    authors' code.
    """
    if torch._C._is_any_autocast_enabled():
        q, k, v = to_autocast_dtype(q), to_autocast_dtype(k), to_autocast_dtype(v)
    _check(q, k, v, log_decay)
    scale = q.shape[-1] ** -0.5 if scale is None else checks.check_scale("scale", scale)
    axial = bool(axial)
    if rotation is not None:
        _check_rotation(rotation, q)
    if dispatch.is_reference_forced():
        return reference.decayed_attention(
            q, k, v, log_decay, axial=axial, rotation=rotation, scale=scale
        )
    dtype = accumulation_dtype(q.dtype)
    # with the batch in front, so that a mapped axis can join it and no kernel sums over it
    batch, num_heads, *grid = q.shape
    log_decay = log_decay if log_decay.dtype is dtype else log_decay.to(dtype)
    log_decay = log_decay.expand(batch, num_heads)
    sin, cos = (None, None) if rotation is None else rotation
    if sin is not None and cos is not None:
        sin = (sin if sin.dtype is dtype else sin.to(dtype)).expand(batch, 1, *grid)
        cos = (cos if cos.dtype is dtype else cos.to(dtype)).expand(batch, 1, *grid)
    return _decayed_attention.first(q, k, v, log_decay, sin, cos, axial, scale)
