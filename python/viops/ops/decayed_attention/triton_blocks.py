# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of a kernel have no types of Python's)
"""Triton kernels over lines of any length, a block of tokens a program.

A line is the whole grid, or one of its rows or columns.  Forward is an online softmax; backward is
two kernels, one for each gradient's sum over the line: of q by blocks of queries, of k and v by
blocks of keys.  Nothing is added atomically: the same input gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    LOWEST,
    ROWS,
    WHOLE,
    at_head,
    dot,
    exp,
    grad_scale,
    in_units,
    load_decay,
    load_rotated,
    load_tile,
    natural,
    own_strides,
    rotation_of,
    rounded,
    store_rotated_back,
    store_tile,
    to_scalar,
)

#: Sizes of a call: specialising on them would compile anew for another grid.
_SIZES = ["rotation_stride_b", "logsumexp_stride_b", "num_heads", "height", "width"]
#: Where these begin in what they are parts of, and so how aligned they are, follows from sizes too.
_PARTS = ["logsumexp_ptr", "share_ptr", "delta_ptr"]


@triton.jit
def _length(height, width, FORM: tl.constexpr):
    """Tokens of a line."""
    return height * width if FORM == WHOLE else (width if FORM == ROWS else height)


@triton.jit
def _program(num_heads, height, width, BLOCK: tl.constexpr, FORM: tl.constexpr):
    """The first token of this program's block, its line, head and image."""
    blocks = tl.cdiv(_length(height, width, FORM), BLOCK)
    lines = 1 if FORM == WHOLE else (height if FORM == ROWS else width)
    program = tl.program_id(0)
    line = program // blocks
    head = line // lines
    return program % blocks * BLOCK, line % lines, head % num_heads, head // num_heads


@triton.jit
def _tokens(numbers, line, height, width, FORM: tl.constexpr):
    """(y, x, inside) of the tokens of these numbers in a line."""
    if FORM == WHOLE:
        y = numbers // width
        x = numbers - y * width
    elif FORM == ROWS:
        y = line + tl.zeros_like(numbers)
        x = numbers
    else:
        y = numbers
        x = line + tl.zeros_like(numbers)
    return y, x, numbers < _length(height, width, FORM)


@triton.jit
def _distances(tokens, others, DTYPE: tl.constexpr, FORM: tl.constexpr):
    """[T, other T]: the Manhattan distances of tokens of a line."""
    rows = tl.abs(tokens[0].to(DTYPE)[:, None] - others[0].to(DTYPE)[None, :])
    columns = tl.abs(tokens[1].to(DTYPE)[:, None] - others[1].to(DTYPE)[None, :])
    return rows + columns if FORM == WHOLE else (columns if FORM == ROWS else rows)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PARTS)
def decayed_attention_blocks_forward_kernel(
    q_ptr,  # [B, H, h, w, D]
    k_ptr,  # [B, H, h, w, D]
    v_ptr,  # [B, H, h, w, Dv]
    log_decay_ptr,  # [B, H]
    sin_ptr,  # [B, 1, h, w, D]
    cos_ptr,
    out_ptr,  # [B, H, h, w, Dv], laid out as own_strides has it
    logsumexp_ptr,  # [B, H, h, w], that of a pass
    q_strides,
    k_strides,
    v_strides,
    decay_strides,
    rotation_stride_b,
    logsumexp_stride_b,
    num_heads,
    height,
    width,
    scale: tl.float64,
    ROTATED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr,
    FORM: tl.constexpr,
):
    """A block of queries of a line over the blocks of its keys."""
    dtype: tl.constexpr = log_decay_ptr.dtype.element_ty
    HALF: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth == 16
    start, line, head, image = _program(num_heads, height, width, BLOCK, FORM)
    q_ptr = at_head(q_ptr, q_strides, image, head)
    k_ptr = at_head(k_ptr, k_strides, image, head)
    v_ptr = at_head(v_ptr, v_strides, image, head)
    rotation = rotation_of(sin_ptr, cos_ptr, rotation_stride_b, image, width)
    scale = in_units(to_scalar(scale, dtype), HALF)
    decay = load_decay(log_decay_ptr, decay_strides, image, head, HALF)
    block = tl.arange(0, BLOCK)
    tokens = _tokens(start + block, line, height, width, FORM)
    q = load_rotated(q_ptr, q_strides, rotation, tokens, ROTATED, HEAD_DIM, BLOCK_D)

    peak = tl.full([BLOCK], LOWEST, dtype)
    total = tl.zeros([BLOCK], dtype)
    sums = tl.zeros([BLOCK, BLOCK_V], dtype)
    for first_key in range(0, _length(height, width, FORM), BLOCK):
        keys = _tokens(first_key + block, line, height, width, FORM)
        k = load_rotated(k_ptr, k_strides, rotation, keys, ROTATED, HEAD_DIM, BLOCK_D)
        v = load_tile(v_ptr, v_strides, keys, VALUE_DIM, BLOCK_V)
        distances = _distances(tokens, keys, dtype, FORM)
        logits = dot(q, tl.trans(k), dtype) * scale + decay * distances
        logits = tl.where(keys[2][None, :], logits, float("-inf"))
        next_peak = tl.maximum(peak, tl.max(logits, axis=1))
        shrink = exp(peak - next_peak, HALF)
        exponentials = exp(logits - next_peak[:, None], HALF)
        total = total * shrink + tl.sum(exponentials, axis=1)
        sums = sums * shrink[:, None] + dot(rounded(exponentials, v.dtype), v, dtype)
        peak = next_peak

    strides = own_strides(num_heads, height, width, VALUE_DIM)
    out_ptr = at_head(out_ptr, strides, image, head)
    store_tile(out_ptr, strides, sums / total[:, None], tokens, VALUE_DIM, BLOCK_V)
    logsumexp_ptr += image.to(tl.int64) * logsumexp_stride_b + head.to(tl.int64) * height * width
    tl.store(
        logsumexp_ptr + tokens[0] * width + tokens[1],
        natural(peak, HALF) + tl.log(total),
        tokens[2],
    )


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PARTS)
def decayed_attention_blocks_backward_q_kernel(
    grad_out_ptr,  # [B, H, h, w, Dv]
    q_ptr,  # [B, H, h, w, D]
    k_ptr,  # [B, H, h, w, D]
    v_ptr,  # [B, H, h, w, Dv]
    log_decay_ptr,  # [B, H]
    sin_ptr,  # [B, 1, h, w, D]
    cos_ptr,
    out_ptr,  # [B, H, h, w, Dv]
    logsumexp_ptr,  # [B, H, h, w], that of a pass
    share_ptr,  # [B, H, h, w]: 1 over the sum of the probabilities, for the other kernel
    delta_ptr,  # [B, H, h, w]: <grad_out, out>, likewise
    other_ptr,  # [B, H, h, w, D]: another pass's gradient, not yet rotated back, or None
    grad_q_ptr,  # [B, H, h, w, D]
    grad_decay_ptr,  # [programs], or None
    grad_out_strides,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    decay_strides,
    rotation_stride_b,
    logsumexp_stride_b,
    num_heads,
    height,
    width,
    scale: tl.float64,
    ROTATED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr,
    FORM: tl.constexpr,
    LAST: tl.constexpr,
):
    """A block of queries of a line over the blocks of its keys: grad_q, grad_decay and delta.

    Probabilities sum to 1 up to the rounding of logsumexp, and gradients of logits to 0 up to that
    of out: both sums are taken here, and what they lack is put right.  LAST: whether no other pass
    adds to grad_q, which then is rotated back.
    """
    dtype: tl.constexpr = log_decay_ptr.dtype.element_ty
    HALF: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth == 16
    start, line, head, image = _program(num_heads, height, width, BLOCK, FORM)
    grad_out_ptr = at_head(grad_out_ptr, grad_out_strides, image, head)
    q_ptr = at_head(q_ptr, q_strides, image, head)
    k_ptr = at_head(k_ptr, k_strides, image, head)
    v_ptr = at_head(v_ptr, v_strides, image, head)
    out_ptr = at_head(out_ptr, out_strides, image, head)
    rotation = rotation_of(sin_ptr, cos_ptr, rotation_stride_b, image, width)
    scale = to_scalar(scale, dtype)
    factor = in_units(scale, HALF)
    decay = load_decay(log_decay_ptr, decay_strides, image, head, HALF)
    block = tl.arange(0, BLOCK)
    tokens = _tokens(start + block, line, height, width, FORM)
    q = load_rotated(q_ptr, q_strides, rotation, tokens, ROTATED, HEAD_DIM, BLOCK_D)
    grad_out = load_tile(grad_out_ptr, grad_out_strides, tokens, VALUE_DIM, BLOCK_V)
    out = load_tile(out_ptr, out_strides, tokens, VALUE_DIM, BLOCK_V)
    delta = tl.sum(grad_out.to(dtype) * out.to(dtype), axis=1)
    token = head.to(tl.int64) * height * width + tokens[0] * width + tokens[1]
    logsumexp_ptr += image.to(tl.int64) * logsumexp_stride_b
    logsumexp = tl.load(logsumexp_ptr + token, tokens[2], other=float("inf"))
    logsumexp = in_units(logsumexp, HALF)

    grad_q = tl.zeros([BLOCK, BLOCK_D], dtype)
    mean_k = tl.zeros([BLOCK, BLOCK_D], dtype)
    total, error, grad_decay, mean_distance = (tl.zeros([BLOCK], dtype),) * 4
    for first_key in range(0, _length(height, width, FORM), BLOCK):
        keys = _tokens(first_key + block, line, height, width, FORM)
        k = load_rotated(k_ptr, k_strides, rotation, keys, ROTATED, HEAD_DIM, BLOCK_D)
        v = load_tile(v_ptr, v_strides, keys, VALUE_DIM, BLOCK_V)
        distances = _distances(tokens, keys, dtype, FORM)
        logits = dot(q, tl.trans(k), dtype) * factor + decay * distances
        logits = tl.where(keys[2][None, :], logits, float("-inf"))
        p = exp(logits - logsumexp[:, None], HALF)
        grad_logits = p * (dot(grad_out, tl.trans(v), dtype) - delta[:, None])
        grad_q += dot(rounded(grad_logits, k.dtype), k, dtype)
        total += tl.sum(p, axis=1)
        error += tl.sum(grad_logits, axis=1)
        mean_k += dot(rounded(p, k.dtype), k, dtype)
        if grad_decay_ptr is not None:
            grad_decay += tl.sum(grad_logits * distances, axis=1)
            mean_distance += tl.sum(p * distances, axis=1)

    share = 1 / tl.where(tokens[2], total, 1.0)
    error *= share
    grad_q = (grad_q - error[:, None] * mean_k) * share[:, None]
    if grad_decay_ptr is not None:
        grad_decay = tl.where(tokens[2], (grad_decay - error * mean_distance) * share, 0.0)
        tl.store(grad_decay_ptr + tl.program_id(0), tl.sum(grad_decay, axis=0))
    token += image.to(tl.int64) * num_heads * height * width
    tl.store(share_ptr + token, share, tokens[2])
    tl.store(delta_ptr + token, delta + error, tokens[2])
    grad_q *= grad_scale(scale, _length(height, width, FORM))
    strides = own_strides(num_heads, height, width, HEAD_DIM)
    if other_ptr is not None:
        other_ptr = at_head(other_ptr, strides, image, head)
        grad_q += load_tile(other_ptr, strides, tokens, HEAD_DIM, BLOCK_D)
    grad_q_ptr = at_head(grad_q_ptr, strides, image, head)
    store_rotated_back(
        grad_q_ptr,
        strides,
        grad_q,
        rotation,
        tokens,
        ROTATED and LAST,
        HEAD_DIM,
        BLOCK_D,
    )


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PARTS)
def decayed_attention_blocks_backward_kv_kernel(
    grad_out_ptr,  # [B, H, h, w, Dv]
    q_ptr,  # [B, H, h, w, D]
    k_ptr,  # [B, H, h, w, D]
    v_ptr,  # [B, H, h, w, Dv]
    log_decay_ptr,  # [B, H]
    sin_ptr,  # [B, 1, h, w, D]
    cos_ptr,
    logsumexp_ptr,  # [B, H, h, w], that of a pass
    share_ptr,  # [B, H, h, w]: 1 over the sum of the probabilities
    delta_ptr,  # [B, H, h, w]: <grad_out, out>
    other_ptr,  # [B, H, h, w, D]: another pass's gradient to k, not yet rotated back, or None
    grad_k_ptr,  # [B, H, h, w, D]
    grad_v_ptr,  # [B, H, h, w, Dv]
    grad_out_strides,
    q_strides,
    k_strides,
    v_strides,
    decay_strides,
    rotation_stride_b,
    logsumexp_stride_b,
    num_heads,
    height,
    width,
    scale: tl.float64,
    ROTATED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr,
    FORM: tl.constexpr,
    LAST: tl.constexpr,
):
    """A block of keys of a line over the blocks of its queries: grad_k and grad_v.

    Logits are transposed, keys by queries: a product's left factor comes from registers.
    """
    dtype: tl.constexpr = log_decay_ptr.dtype.element_ty
    HALF: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth == 16
    start, line, head, image = _program(num_heads, height, width, BLOCK, FORM)
    grad_out_ptr = at_head(grad_out_ptr, grad_out_strides, image, head)
    q_ptr = at_head(q_ptr, q_strides, image, head)
    k_ptr = at_head(k_ptr, k_strides, image, head)
    v_ptr = at_head(v_ptr, v_strides, image, head)
    rotation = rotation_of(sin_ptr, cos_ptr, rotation_stride_b, image, width)
    scale = to_scalar(scale, dtype)
    factor = in_units(scale, HALF)
    decay = load_decay(log_decay_ptr, decay_strides, image, head, HALF)
    logsumexp_ptr += image.to(tl.int64) * logsumexp_stride_b + head.to(tl.int64) * height * width
    first = (image.to(tl.int64) * num_heads + head) * height * width
    share_ptr += first
    delta_ptr += first
    block = tl.arange(0, BLOCK)
    tokens = _tokens(start + block, line, height, width, FORM)
    k = load_rotated(k_ptr, k_strides, rotation, tokens, ROTATED, HEAD_DIM, BLOCK_D)
    v = load_tile(v_ptr, v_strides, tokens, VALUE_DIM, BLOCK_V)

    grad_k = tl.zeros([BLOCK, BLOCK_D], dtype)
    grad_v = tl.zeros([BLOCK, BLOCK_V], dtype)
    for first_query in range(0, _length(height, width, FORM), BLOCK):
        queries = _tokens(first_query + block, line, height, width, FORM)
        q = load_rotated(q_ptr, q_strides, rotation, queries, ROTATED, HEAD_DIM, BLOCK_D)
        grad_out = load_tile(grad_out_ptr, grad_out_strides, queries, VALUE_DIM, BLOCK_V)
        token = queries[0] * width + queries[1]
        logsumexp = tl.load(logsumexp_ptr + token, queries[2], other=float("inf"))
        share = tl.load(share_ptr + token, queries[2], other=0.0)  # none where there is no query
        delta = tl.load(delta_ptr + token, queries[2], other=0.0)
        distances = _distances(tokens, queries, dtype, FORM)
        logits = dot(k, tl.trans(q), dtype) * factor + decay * distances
        logits = tl.where(tokens[2][:, None], logits, float("-inf"))
        p = exp(logits - in_units(logsumexp, HALF)[None, :], HALF) * share[None, :]
        grad_v += dot(rounded(p, v.dtype), grad_out, dtype)
        grad_logits = p * (dot(v, tl.trans(grad_out), dtype) - delta[None, :])
        grad_k += dot(rounded(grad_logits, q.dtype), q, dtype)

    strides = own_strides(num_heads, height, width, VALUE_DIM)
    grad_v_ptr = at_head(grad_v_ptr, strides, image, head)
    store_tile(grad_v_ptr, strides, grad_v, tokens, VALUE_DIM, BLOCK_V)
    grad_k *= grad_scale(scale, _length(height, width, FORM))
    strides = own_strides(num_heads, height, width, HEAD_DIM)
    if other_ptr is not None:
        other_ptr = at_head(other_ptr, strides, image, head)
        grad_k += load_tile(other_ptr, strides, tokens, HEAD_DIM, BLOCK_D)
    grad_k_ptr = at_head(grad_k_ptr, strides, image, head)
    store_rotated_back(
        grad_k_ptr,
        strides,
        grad_k,
        rotation,
        tokens,
        ROTATED and LAST,
        HEAD_DIM,
        BLOCK_D,
    )
