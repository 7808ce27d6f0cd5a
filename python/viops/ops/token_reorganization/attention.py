"""Attention that tells where the class token looks: schemas, fakes, derivatives, public functions.

Source: Liang et al., EViT, ICLR 2022, section 3.2.
"""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor
from torch.utils.flop_counter import register_flop_formula

from ... import checks, dispatch, native, triton_runtime
from ...autocast import to_autocast_dtype
from ...dispatch import Kernels
from ...tensors import accumulation_dtype
from . import reference


def _native_scores_forward(
    q: Tensor, k: Tensor, num_prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    batch, num_heads, num_tokens, _ = k.shape
    dtype = accumulation_dtype(q.dtype)
    scores = q.new_empty(batch, num_tokens - num_prefix, dtype=torch.float32)
    probabilities = q.new_empty(batch, num_heads, num_tokens, dtype=dtype)
    native.require().class_attention_scores_forward(q, k, scale, scores, probabilities)
    return scores, probabilities


def _native_scores_backward(
    grad_scores: Tensor, q: Tensor, k: Tensor, probabilities: Tensor, num_prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    batch, num_heads, num_tokens, head_dim = k.shape
    # laid out as [B, N, H, D]: the order in which a fused qkv linear takes its gradient
    grad_q = q.new_empty(batch, num_tokens, num_heads, head_dim).transpose(1, 2)
    grad_k = k.new_empty(batch, num_tokens, num_heads, head_dim).transpose(1, 2)
    native.require().class_attention_scores_backward(
        grad_scores, q, k, probabilities, scale, grad_q, grad_k
    )
    return grad_q, grad_k


@functools.cache
def _triton_kernels() -> ModuleType:
    """Loaded at the first call: Triton takes time to import, and need not be there."""
    module = importlib.import_module(".triton_kernels", __package__)
    triton_runtime.check_kernel(module.class_attention_scores_forward_kernel)
    return module


def _triton_scores_forward(
    q: Tensor, k: Tensor, num_prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    _guard_scores(q, k, num_prefix)
    return _triton_kernels().class_attention_scores_forward(q, k, num_prefix, scale)


def _triton_scores_backward(
    grad_scores: Tensor, q: Tensor, k: Tensor, probabilities: Tensor, num_prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    _guard_scores(q, k, num_prefix)
    batch, num_heads, num_tokens, _ = q.shape
    for name, tensor, shape in (
        ("grad_scores", grad_scores, (batch, num_tokens - num_prefix)),
        ("probabilities", probabilities, (batch, num_heads, num_tokens)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
        checks.check_same("device", name, tensor.device, "q", q.device)
    return _triton_kernels().class_attention_scores_backward(
        grad_scores, q, k, probabilities, num_prefix, scale
    )


def _guard_scores(q: Tensor, k: Tensor, num_prefix: int) -> None:
    """Refuses what would lead a kernel outside of memory, for callers of the registered op."""
    if (
        q.dim() != 4
        or 0 in q.shape[1:]
        or k.shape != q.shape
        or k.dtype != q.dtype
        or k.device != q.device
        or not 1 <= num_prefix <= q.shape[2]
    ):
        _check_scores(q, k, num_prefix)


dispatch.register(
    "class_attention_scores",
    "reference",
    Kernels(
        reference.class_attention_scores_forward,
        reference.class_attention_scores_backward,
        dispatch.refuses_dtype,
    ),
)
dispatch.register(
    "class_attention_scores",
    "cpu",
    Kernels(_native_scores_forward, _native_scores_backward, dispatch.refuses_native),
)
dispatch.register(
    "class_attention_scores",
    "triton",
    Kernels(_triton_scores_forward, _triton_scores_backward, dispatch.refuses_triton),
)


def _scores_fake(q: Tensor, k: Tensor, num_prefix: int, scale: float) -> tuple[Tensor, Tensor]:
    _check_scores(q, k, num_prefix)
    batch, num_heads, num_tokens, _ = k.shape
    dtype = accumulation_dtype(q.dtype)
    scores = q.new_empty(batch, num_tokens - num_prefix, dtype=torch.float32)
    return scores, q.new_empty(batch, num_heads, num_tokens, dtype=dtype)


def _scores_backward_fake(
    grad_scores: Tensor, q: Tensor, k: Tensor, probabilities: Tensor, num_prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    batch, num_heads, num_tokens, head_dim = k.shape
    shape = (batch, num_tokens, num_heads, head_dim)
    return q.new_empty(shape).transpose(1, 2), k.new_empty(shape).transpose(1, 2)


def _scores_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, ctx.num_prefix, ctx.scale = inputs
    ctx.save_for_backward(q, k, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _scores_backward(ctx: Any, grad_scores: Tensor | None, _: Tensor | None) -> tuple:
    if grad_scores is None:
        return None, None, None, None
    q, k, probabilities = ctx.saved_tensors
    grad_q, grad_k = _class_attention_scores.run_backward(
        grad_scores, q, k, probabilities, ctx.num_prefix, ctx.scale
    )
    return grad_q, grad_k, None, None


_class_attention_scores = dispatch.Op(
    "class_attention_scores",
    "(Tensor q, Tensor k, SymInt num_prefix, float scale) -> (Tensor, Tensor)",
    _scores_fake,
    "(Tensor grad_scores, Tensor q, Tensor k, Tensor probabilities, SymInt num_prefix,"
    " float scale) -> (Tensor, Tensor)",
    _scores_backward_fake,
    _scores_setup,
    _scores_backward,
)


@register_flop_formula(torch.ops.viops.class_attention_scores)
def _scores_flops(q_shape: Size, k_shape: Size, *args: object, **kwargs: object) -> int:
    batch, num_heads, num_tokens, head_dim = k_shape
    return 2 * batch * num_heads * num_tokens * head_dim


@register_flop_formula(torch.ops.viops.class_attention_scores_backward)
def _scores_backward_flops(
    grad_shape: Size, q_shape: Size, k_shape: Size, *args: object, **kwargs: object
) -> int:
    batch, num_heads, num_tokens, head_dim = k_shape
    return 4 * batch * num_heads * num_tokens * head_dim


def _check_scores(q: Tensor, k: Tensor, num_prefix: int) -> int:
    checks.check_float_tensor("q", q, "B H N D")
    checks.check_float_tensor("k", k, "B H N D")
    if q.shape != k.shape:
        raise ValueError(f"k: shape {list(k.shape)} differs from q's {list(q.shape)}")
    if q.dtype != k.dtype:
        raise TypeError(f"k: dtype {k.dtype} differs from q's {q.dtype}")
    checks.check_same("device", "k", k.device, "q", q.device)
    _, num_heads, num_tokens, head_dim = q.shape
    if num_heads < 1 or head_dim < 1:
        raise ValueError(f"q: expected H and D of at least 1, got shape {list(q.shape)}")
    return checks.check_int("num_prefix", num_prefix, 1, num_tokens, "the number of tokens")


def class_attention_scores(
    q: Tensor, k: Tensor, *, num_prefix: int = 1, scale: float | None = None
) -> Tensor:
    """Attention that the class token pays to each patch, averaged over heads.

    The scores of `class_attention` alone, for callers whose attention comes from elsewhere (a mask,
    another library).  Reads q's first row and k once.

    Args:
        q: [B, H, N, D], float32, float64, bfloat16 or float16, any strides.  Token 0 is the class
            token.
        k: [B, H, N, D], of q's dtype and device.
        num_prefix: how many tokens lead the patches (class, distillation, register tokens), 1 to N.
        scale: factor on the dot products; None is D ** -0.5.

    Returns:
        scores [B, N - num_prefix], float32: mean over heads of row 0 of softmax(q k^T * scale), the
        prefix columns dropped and the rest not renormalised.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: EViT (Liang et al., ICLR 2022), section 3.2, equation 2.
    """
    num_prefix = _check_scores(q, k, num_prefix)
    scale = q.shape[-1] ** -0.5 if scale is None else checks.check_scale("scale", scale)
    if dispatch.is_reference_forced():
        return reference.class_attention_scores(q, k, num_prefix=num_prefix, scale=scale)
    return _class_attention_scores(q, k, num_prefix, scale)[0]


def _native_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    out, logsumexp = _attention_fake(q, k, v, scale)
    native.require().softmax_attention_forward(q, k, v, scale, out, logsumexp)
    return out, logsumexp


def _native_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _attention_backward_fake(grad_out, q, k, v, out, logsumexp, scale)
    native.require().softmax_attention_backward(grad_out, q, k, v, out, logsumexp, scale, *grads)
    return grads


def _refuses_attention(device_type: str, dtype: torch.dtype) -> str | None:
    if dtype is not torch.float32:
        return f"needs float32, got {dtype}; torch's scaled_dot_product_attention has the others"
    return dispatch.refuses_native(device_type, dtype)


dispatch.register(
    "softmax_attention",
    "reference",
    Kernels(
        reference.softmax_attention_forward,
        reference.softmax_attention_backward,
        dispatch.refuses_dtype,
    ),
)
dispatch.register(
    "softmax_attention",
    "cpu",
    Kernels(_native_attention_forward, _native_attention_backward, _refuses_attention),
)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, num_heads, num_tokens, head_dim = q.shape
    out = q.new_empty(batch, num_tokens, num_heads, head_dim).transpose(1, 2)
    dtype = accumulation_dtype(q.dtype)
    return out, q.new_empty(batch, num_heads, num_tokens, dtype=dtype)


def _attention_backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (torch.empty_like(out) for _ in range(3))
    return grad_q, grad_k, grad_v


def _attention_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _attention_backward(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple:
    if grad_out is None:
        return None, None, None, None
    return *_softmax_attention.run_backward(grad_out, *ctx.saved_tensors, ctx.scale), None


_softmax_attention = dispatch.Op(
    "softmax_attention",
    "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    _attention_fake,
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    _attention_backward_fake,
    _attention_setup,
    _attention_backward,
)


@register_flop_formula(torch.ops.viops.softmax_attention)
def _attention_flops(q_shape: Size, *args: object, **kwargs: object) -> int:
    batch, num_heads, num_tokens, head_dim = q_shape
    return 4 * batch * num_heads * num_tokens * num_tokens * head_dim


@register_flop_formula(torch.ops.viops.softmax_attention_backward)
def _attention_backward_flops(q_shape: Size, *args: object, **kwargs: object) -> int:
    batch, num_heads, num_tokens, head_dim = q_shape
    return 10 * batch * num_heads * num_tokens * num_tokens * head_dim


#: Tokens up to which the kernel at level v3 beats scaled_dot_product_attention.
_MAX_TOKENS_AT_V3 = 1024


def _cpu_refusal(q: Tensor, v: Tensor) -> str | None:
    """Why the kernel cannot run this call, or None."""
    if native.extension is None or q.dtype is not torch.float32 or not q.is_cpu:
        return _refuses_attention(q.device.type, q.dtype)
    if v.shape != q.shape:
        return f"needs v of q's shape, got {list(v.shape)} for {list(q.shape)}"
    return None


def _slower_reason(q: Tensor) -> str | None:
    """Why torch's op is the better choice for a call that the kernel could run, or None."""
    if native.cpu_level == "v4":
        return None
    if native.cpu_level == "v3" and q.shape[2] <= _MAX_TOKENS_AT_V3:
        return None
    return f"torch's op is faster at CPU level {native.cpu_level} on {q.shape[2]} tokens"


def _attention_refusal(backend: str, q: Tensor, *others: Tensor) -> str | None:
    """Why this backend does not run the call, or None: what viops.explain shows."""
    v = others[1] if len(others) > 1 else q
    if backend == "torch":
        return None
    if backend != "cpu":
        return dispatch.refusal("softmax_attention", backend, q.device.type, q.dtype)
    reason = _cpu_refusal(q, v)
    if reason is None and dispatch.forced_backend() is None:
        reason = _slower_reason(q)
    return reason


dispatch.call_refusals["softmax_attention"] = _attention_refusal


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax_attention of checked arguments, not on the reference."""
    forced = dispatch.forced_backend()
    reason = _cpu_refusal(q, v)
    if forced is None:
        if reason is None and _slower_reason(q) is None:
            return _softmax_attention(q, k, v, scale)[0]
        if native.extension is None and q.is_cpu and not torch.compiler.is_compiling():
            stand_in = "torch's scaled_dot_product_attention"
            dispatch.report_fallback("softmax_attention", stand_in, [f"cpu: {reason}"])
    elif forced != "torch":
        reason = _attention_refusal(forced, q, k, v)
        if reason is not None:
            raise dispatch.BackendError(
                f"softmax_attention: backend {forced!r} was asked for, but {reason}"
            )
        return _softmax_attention(q, k, v, scale)[0]
    out = _torch_attention(q, k, v, scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """torch's own op, kept from what its fused kernels on a GPU get wrong."""
    if q.is_cuda:
        if scale <= 0:  # they look for the largest logit before the factor, amid infinite padding
            q, scale = q * math.copysign(bool(scale), scale), abs(scale) or 1.0
        q, k, v = _aligned(q), _aligned(k), _aligned(v)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy where its rows do not begin at multiples of 16 bytes.

    The fused kernels load 16 bytes at a time, and not all that torch chooses look at the address.
    """
    if torch.compiler.is_compiling():  # inductor copies what is not aligned
        return x
    steps = [x.storage_offset(), *(x.stride(i) for i in range(3) if x.shape[i] > 1)]
    if x.stride(3) == 1 and all(step * x.element_size() % 16 == 0 for step in steps):
        return x
    return x.contiguous() if x.stride(3) != 1 else x.clone(memory_format=torch.contiguous_format)


def _check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    checks.check_float_tensor("q", q, "B H N D")
    checks.check_float_tensor("k", k, "B H N D")
    checks.check_float_tensor("v", v, "B H N D")
    if q.shape != k.shape:
        raise ValueError(f"k: shape {list(k.shape)} differs from q's {list(q.shape)}")
    if 0 in q.shape[1:]:
        raise ValueError(f"q: expected H, N and D of at least 1, got shape {list(q.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v: [B, H, N] {list(v.shape[:3])} differs from q's {list(q.shape[:3])}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: dtype {tensor.dtype} differs from q's {q.dtype}")
        checks.check_same("device", name, tensor.device, "q", q.device)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Softmax attention, by the faster of a kernel of ours and torch's.

    The kernel runs on float32 tensors on the CPU whose v is as wide as k, at CPU level v4, and at
    v3 up to 1,024 tokens, and its own backward with it; else torch's scaled_dot_product_attention
    runs.  Neither stores the attention matrix.

    Args:
        q: [B, H, N, D], float32, float64, bfloat16 or float16, any strides; the view that a fused
            qkv linear gives is the fast path.
        k: [B, H, N, D], of q's dtype and device.
        v: [B, H, N, Dv], of q's dtype and device.
        scale: factor on the dot products; None is D ** -0.5.

    Returns:
        out [B, H, N, Dv] = softmax(q k^T * scale) v, laid out so that
        ``out.transpose(1, 2).reshape(B, N, H * Dv)`` is free.

    Under autocast q, k and v are cast as scaled_dot_product_attention casts them.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2.1.
    """
    q, k, v = to_autocast_dtype(q), to_autocast_dtype(k), to_autocast_dtype(v)
    _check_attention(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else checks.check_scale("scale", scale)
    if dispatch.is_reference_forced():
        return reference.softmax_attention(q, k, v, scale=scale)
    return _attend(q, k, v, scale)


def class_attention(
    q: Tensor, k: Tensor, v: Tensor, *, num_prefix: int = 1, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention that also yields the class token's attention to each patch.

    The attention matrix is never stored: `out` is what `softmax_attention` gives, `scores` comes
    from a kernel that reads q's first row and k once.

    Args:
        q: [B, H, N, D], float32, float64, bfloat16 or float16, any strides; the view that a fused
            qkv linear gives is the fast path.  Token 0 is the class token.
        k: [B, H, N, D], of q's dtype and device.
        v: [B, H, N, Dv], of q's dtype and device.
        num_prefix: how many tokens lead the patches (class, distillation, register tokens), 1 to N.
        scale: factor on the dot products; None is D ** -0.5.

    Returns:
        out [B, H, N, Dv] = softmax(q k^T * scale) v, laid out so that
        ``out.transpose(1, 2).reshape(B, N, H * Dv)`` is free; scores [B, N - num_prefix], float32,
        as `class_attention_scores` gives them.  Both carry gradient.

    Under autocast q, k and v are cast as scaled_dot_product_attention casts them.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: EViT (Liang et al., ICLR 2022), section 3.2, equations 1 and 2.
    """
    q, k, v = to_autocast_dtype(q), to_autocast_dtype(k), to_autocast_dtype(v)
    _check_attention(q, k, v)
    num_prefix = checks.check_int("num_prefix", num_prefix, 1, q.shape[2], "the number of tokens")
    scale = q.shape[-1] ** -0.5 if scale is None else checks.check_scale("scale", scale)
    if dispatch.is_reference_forced():
        return reference.class_attention(q, k, v, num_prefix=num_prefix, scale=scale)
    scores = _class_attention_scores(q, k, num_prefix, scale)[0]
    return _attend(q, k, v, scale), scores
