"""Reorganizing and restoring tokens: schemas, fakes, derivatives and public functions.

Source: Liang et al., EViT, ICLR 2022, section 3.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor
from torch.utils.flop_counter import register_flop_formula

from ... import checks, dispatch, native
from ...dispatch import Kernels
from . import reference
from .attention import class_attention, class_attention_scores, softmax_attention

__all__ = [
    "class_attention",
    "class_attention_scores",
    "reorganize_tokens",
    "restore_tokens",
    "softmax_attention",
]


def _native_reorganize_forward(
    x: Tensor, scores: Tensor, keep: int, num_prefix: int, fuse: bool
) -> tuple[Tensor, Tensor]:
    batch, _, channels = x.shape
    tokens = x.new_empty(batch, num_prefix + keep + fuse, channels)
    index = x.new_empty(batch, keep, dtype=torch.int64)
    native.require().reorganize_tokens_forward(x, scores, tokens, index)
    return tokens, index


def _native_reorganize_backward(
    grad_tokens: Tensor,
    x: Tensor | None,
    scores: Tensor,
    index: Tensor,
    num_prefix: int,
    need_x: bool,
) -> tuple[Tensor, Tensor]:
    grad_x, grad_scores = _empty_gradients(grad_tokens, x, scores, num_prefix, need_x)
    native.require().reorganize_tokens_backward(
        grad_tokens,
        x,
        scores,
        index,
        grad_x if need_x else None,
        None if x is None else grad_scores,
    )
    return grad_x, grad_scores


def _empty_gradients(
    grad_tokens: Tensor, x: Tensor | None, scores: Tensor, num_prefix: int, need_x: bool
) -> tuple[Tensor, Tensor]:
    """Room for both gradients; one that nobody asked for has no elements."""
    batch, num_patches = scores.shape
    shape = (batch, num_prefix + num_patches, grad_tokens.shape[2]) if need_x else (0,)
    grad_x = grad_tokens.new_empty(shape)
    return grad_x, scores.new_empty((0,) if x is None else (batch, num_patches))


dispatch.register(
    "reorganize_tokens",
    "reference",
    Kernels(
        reference.reorganize_tokens_forward,
        reference.reorganize_tokens_backward,
        dispatch.refuses_dtype,
    ),
)
dispatch.register(
    "reorganize_tokens",
    "cpu",
    Kernels(_native_reorganize_forward, _native_reorganize_backward, dispatch.refuses_native),
)
dispatch.register(
    "reorganize_tokens",
    "cuda",
    Kernels(_native_reorganize_forward, _native_reorganize_backward, dispatch.refuses_cuda),
)


def _reorganize_fake(
    x: Tensor, scores: Tensor, keep: int, num_prefix: int, fuse: bool
) -> tuple[Tensor, Tensor]:
    _check_reorganize(x, scores, keep, num_prefix)
    batch, _, channels = x.shape
    tokens = x.new_empty(batch, num_prefix + keep + fuse, channels)
    return tokens, x.new_empty(batch, keep, dtype=torch.int64)


def _reorganize_backward_fake(
    grad_tokens: Tensor,
    x: Tensor | None,
    scores: Tensor,
    index: Tensor,
    num_prefix: int,
    need_x: bool,
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(grad_tokens, x, scores, num_prefix, need_x)


def _reorganize_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, scores, _, ctx.num_prefix, fuse = inputs
    ctx.need_x = ctx.needs_input_grad[0]
    ctx.need_scores = ctx.needs_input_grad[1] and fuse  # only the fused token depends on them
    ctx.save_for_backward(x if ctx.need_scores else None, scores, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _reorganize_backward(ctx: Any, grad_tokens: Tensor | None, _: None) -> tuple:
    x, scores, index = ctx.saved_tensors
    if grad_tokens is None or not (ctx.need_x or ctx.need_scores):
        return None, None, None, None, None
    grad_x, grad_scores = _reorganize_tokens.run_backward(
        grad_tokens, x, scores, index, ctx.num_prefix, ctx.need_x
    )
    return (
        grad_x if ctx.need_x else None,
        grad_scores if ctx.need_scores else None,
        None,
        None,
        None,
    )


_reorganize_tokens = dispatch.Op(
    "reorganize_tokens",
    "(Tensor x, Tensor scores, SymInt keep, SymInt num_prefix, bool fuse) -> (Tensor, Tensor)",
    _reorganize_fake,
    "(Tensor grad_tokens, Tensor? x, Tensor scores, Tensor index, SymInt num_prefix, bool need_x)"
    " -> (Tensor, Tensor)",
    _reorganize_backward_fake,
    _reorganize_setup,
    _reorganize_backward,
)


@register_flop_formula(torch.ops.viops.reorganize_tokens)
def _reorganize_flops(
    x_shape: Size, scores_shape: Size, keep: int, num_prefix: int, fuse: bool, **kwargs: object
) -> int:
    batch, num_patches = scores_shape
    return 2 * batch * (num_patches - keep) * x_shape[2] * fuse


@register_flop_formula(torch.ops.viops.reorganize_tokens_backward)
def _reorganize_backward_flops(
    grad_shape: Size,
    x_shape: Size | None,
    scores_shape: Size,
    index_shape: Size,
    num_prefix: int,
    need_x: bool,
    **kwargs: object,
) -> int:
    batch, num_patches = scores_shape
    keep = index_shape[1]
    fused = grad_shape[1] - num_prefix - keep
    products = (x_shape is not None) * 2 + need_x
    return batch * (num_patches - keep) * grad_shape[2] * fused * products


def _check_reorganize(x: Tensor, scores: Tensor, keep: int, num_prefix: int) -> tuple[int, int]:
    checks.check_float_tensor("x", x, "B N C")
    checks.check_float_tensor("scores", scores, "B P")
    num_prefix = checks.check_int("num_prefix", num_prefix, 0, x.shape[1], "the number of tokens")
    batch, num_patches = scores.shape
    if batch != x.shape[0] or num_patches != x.shape[1] - num_prefix:
        raise ValueError(
            f"scores: expected [B, N - num_prefix] = [{x.shape[0]}, {x.shape[1] - num_prefix}] for "
            f"x {list(x.shape)} and num_prefix {num_prefix}, got shape {list(scores.shape)}"
        )
    checks.check_same("device", "scores", scores.device, "x", x.device)
    return checks.check_int("keep", keep, 0, num_patches, "the number of patches"), num_prefix


def reorganize_tokens(
    x: Tensor, scores: Tensor, keep: int, *, num_prefix: int = 1, fuse: bool = True
) -> tuple[Tensor, Tensor]:
    """Keep each image's best-scored patch tokens and fuse the others into one token.

    Args:
        x: [B, N, C], float32, float64, bfloat16 or float16, any strides; prefix tokens first.
        scores: [B, P] with P = N - num_prefix, any of these dtypes, on x's device: what
            `class_attention` gives.  NaN ranks highest, as in torch.topk.
        keep: how many patch tokens stay, 0 to P.  P returns x itself, and no fused token.
        num_prefix: how many tokens lead the patches; they stay as they are.
        fuse: whether the dropped tokens are summed into one, weighted by their scores (not
            normalised), or lost.

    Returns:
        tokens [B, num_prefix + keep + fuse, C] in x's dtype: prefix, kept tokens by falling score,
        fused token; index [B, keep], int64: the kept patches' places in 0..P-1, equal scores by
        rising place.  Gradients go to x, and to scores through the fused token.

    Sums are held in float32, or in float64 where x or scores are float64.  Autocast changes
    nothing.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: EViT (Liang et al., ICLR 2022), section 3.3, equation 3.
    """
    keep, num_prefix = _check_reorganize(x, scores, keep, num_prefix)
    fuse = bool(fuse)
    if keep == scores.shape[1] or dispatch.is_reference_forced():
        return reference.reorganize_tokens(x, scores, keep, num_prefix=num_prefix, fuse=fuse)
    return _reorganize_tokens(x, scores, keep, num_prefix, fuse)


def _native_restore_forward(
    tokens: Tensor, index: Tensor, num_patches: int, num_prefix: int
) -> Tensor:
    x = tokens.new_empty(tokens.shape[0], num_prefix + num_patches, tokens.shape[2])
    native.require().restore_tokens_forward(tokens, index, num_prefix, x)
    return x


def _native_restore_backward(
    grad_x: Tensor, index: Tensor, num_tokens: int, num_prefix: int
) -> Tensor:
    grad_tokens = grad_x.new_empty(grad_x.shape[0], num_tokens, grad_x.shape[2])
    native.require().restore_tokens_backward(grad_x, index, num_prefix, grad_tokens)
    return grad_tokens


dispatch.register(
    "restore_tokens",
    "reference",
    Kernels(
        reference.restore_tokens_forward,
        reference.restore_tokens_backward,
        dispatch.refuses_dtype,
    ),
)
dispatch.register(
    "restore_tokens",
    "cpu",
    Kernels(_native_restore_forward, _native_restore_backward, dispatch.refuses_native),
)
dispatch.register(
    "restore_tokens",
    "cuda",
    Kernels(_native_restore_forward, _native_restore_backward, dispatch.refuses_cuda),
)


def _restore_fake(tokens: Tensor, index: Tensor, num_patches: int, num_prefix: int) -> Tensor:
    _check_restore(tokens, index, num_patches, num_prefix)
    return tokens.new_empty(tokens.shape[0], num_prefix + num_patches, tokens.shape[2])


def _restore_backward_fake(
    grad_x: Tensor, index: Tensor, num_tokens: int, num_prefix: int
) -> Tensor:
    return grad_x.new_empty(grad_x.shape[0], num_tokens, grad_x.shape[2])


def _restore_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tokens, index, _, ctx.num_prefix = inputs
    ctx.num_tokens = tokens.shape[1]
    ctx.save_for_backward(index)


def _restore_backward(ctx: Any, grad_x: Tensor) -> tuple:
    (index,) = ctx.saved_tensors
    grad_tokens = _restore_tokens.run_backward(grad_x, index, ctx.num_tokens, ctx.num_prefix)
    return grad_tokens, None, None, None


_restore_tokens = dispatch.Op(
    "restore_tokens",
    "(Tensor tokens, Tensor index, SymInt num_patches, SymInt num_prefix) -> Tensor",
    _restore_fake,
    "(Tensor grad_x, Tensor index, SymInt num_tokens, SymInt num_prefix) -> Tensor",
    _restore_backward_fake,
    _restore_setup,
    _restore_backward,
)


@register_flop_formula([torch.ops.viops.restore_tokens, torch.ops.viops.restore_tokens_backward])
def _restore_flops(*args: object, **kwargs: object) -> int:
    return 0  # rows are moved, and in backward added; nothing is multiplied


def _check_restore(
    tokens: Tensor, index: Tensor, num_patches: int, num_prefix: int
) -> tuple[int, int]:
    checks.check_float_tensor("tokens", tokens, "B M C")
    checks.check_index_tensor("index", index, "B keep")
    num_tokens = tokens.shape[1]
    num_prefix = checks.check_int("num_prefix", num_prefix, 0, num_tokens, "the number of tokens")
    batch, keep = index.shape
    if batch != tokens.shape[0] or not 0 <= num_tokens - num_prefix - keep <= 1:
        raise ValueError(
            "index: expected [B, keep] with M = num_prefix + keep, or one more for the fused "
            f"token, got shape {list(index.shape)} for tokens {list(tokens.shape)}, "
            f"num_prefix {num_prefix}"
        )
    checks.check_same("device", "index", index.device, "tokens", tokens.device)
    num_patches = checks.check_int("num_patches", num_patches, 0, None, "")
    if num_patches < keep:
        raise ValueError(f"num_patches: expected at least keep = {keep}, got {num_patches}")
    return num_patches, num_prefix


def restore_tokens(
    tokens: Tensor, index: Tensor, num_patches: int, *, num_prefix: int = 1
) -> Tensor:
    """Kept tokens back at their places, the fused token at all others.

    For dense prediction and pictures.  After several reorganizations, restore the last one first;
    the fused token of an earlier one stands among the patches of the next.

    Args:
        tokens: [B, M, C], float32, float64, bfloat16 or float16, any strides, with
            M = num_prefix + keep, or one more where there is a fused token.
        index: [B, keep], int64, what `reorganize_tokens` gave: places in 0..num_patches-1, each at
            most once in a row.
        num_patches: how many patches there were, at least keep.
        num_prefix: how many tokens lead the patches; they stay as they are.

    Returns:
        x [B, num_prefix + num_patches, C]; without a fused token the places of dropped ones are
        zero.  Gradients go to tokens.  Autocast changes nothing.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    num_patches, num_prefix = _check_restore(tokens, index, num_patches, num_prefix)
    if dispatch.is_reference_forced():
        return reference.restore_tokens(tokens, index, num_patches, num_prefix=num_prefix)
    return _restore_tokens(tokens, index, num_patches, num_prefix)
