# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of a kernel have no types of Python's)
"""Triton kernels of the axial form where a row, and a column, is one tile: h and w up to 64.

Short lines share a tile: products are batched over its lines.  One launch does both passes where
each head of an image has a program, which meets what it stored itself behind a barrier; or each
pass is a launch, whose programs are groups of lines.  Nothing is added atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
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
_SIZES = ["rotation_stride_b", "num_heads", "height", "width"]


@triton.jit
def _tokens(
    first_line, height, width, ACROSS: tl.constexpr, LINES: tl.constexpr, LENGTH: tl.constexpr
):
    """(y, x, inside) of the tokens of LINES rows, or, ACROSS, of columns, line by line."""
    number = tl.arange(0, LINES * LENGTH)
    line = first_line + number // LENGTH
    place = number % LENGTH
    if ACROSS:
        tokens = (place, line, (place < height) & (line < width))
    else:
        tokens = (line, place, (line < height) & (place < width))
    return tokens


@triton.jit
def _by_line(tile, LINES: tl.constexpr):
    """[LINES, LENGTH, C] of [LINES * LENGTH, C]."""
    return tl.reshape(tile, [LINES, tile.shape[0] // LINES, tile.shape[1]])


@triton.jit
def _flat(tile):
    """_by_line, undone."""
    return tl.reshape(tile, [tile.shape[0] * tile.shape[1], tile.shape[2]])


@triton.jit
def _transposed(tile):
    return tl.permute(tile, (0, 2, 1))


@triton.jit
def _products(a, b, DTYPE: tl.constexpr):
    """a @ b of each line; a lone line's without a batch, which Triton gives fewer registers."""
    if a.shape[0] == 1:
        flat = dot(_flat(a), _flat(b), DTYPE)
        product = tl.reshape(flat, [1, flat.shape[0], flat.shape[1]])
    else:
        product = dot(a, b, DTYPE)
    return product


@triton.jit
def _distances(LENGTH: tl.constexpr, DTYPE: tl.constexpr):
    """[1, LENGTH, LENGTH]: those of the tokens of a line."""
    place = tl.arange(0, LENGTH).to(DTYPE)
    return tl.abs(place[:, None] - place[None, :])[None, :, :]


@triton.jit
def _logits(q, k, scale, decay, num_keys):
    """[LINES, LENGTH, LENGTH], minus infinity beyond the keys of a line."""
    length: tl.constexpr = q.shape[1]
    products = _products(q, _transposed(k), decay.dtype)
    logits = products * scale + decay * _distances(length, decay.dtype)
    return tl.where((tl.arange(0, length) < num_keys)[None, None, :], logits, float("-inf"))


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    rotation,
    out_ptr,
    logsumexp_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    decay,
    scale,
    tokens,
    num_keys,
    ROTATED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINES: tl.constexpr,
):
    """Each of these lines attends within itself."""
    HALF: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth == 16
    q = load_rotated(q_ptr, q_strides, rotation, tokens, ROTATED, HEAD_DIM, BLOCK_D)
    k = load_rotated(k_ptr, k_strides, rotation, tokens, ROTATED, HEAD_DIM, BLOCK_D)
    v = load_tile(v_ptr, v_strides, tokens, VALUE_DIM, BLOCK_V)

    logits = _logits(_by_line(q, LINES), _by_line(k, LINES), scale, decay, num_keys)
    peak = tl.max(logits, axis=2)
    exponentials = exp(logits - peak[:, :, None], HALF)
    total = tl.sum(exponentials, axis=2)
    sums = _products(rounded(exponentials, v.dtype), _by_line(v, LINES), decay.dtype)

    out = _flat(sums / total[:, :, None])
    store_tile(out_ptr, out_strides, out, tokens, VALUE_DIM, BLOCK_V)
    logsumexp = tl.reshape(natural(peak, HALF) + tl.log(total), [q.shape[0]])
    tl.store(logsumexp_ptr + tokens[0] * rotation[2] + tokens[1], logsumexp, tokens[2])


@triton.jit(do_not_specialize=_SIZES)
def decayed_attention_lines_forward_kernel(
    q_ptr,  # [B, H, h, w, D]
    k_ptr,  # [B, H, h, w, D]
    v_ptr,  # [B, H, h, w, Dv]
    log_decay_ptr,  # [B, H]
    sin_ptr,  # [B, 1, h, w, D]
    cos_ptr,
    out_ptr,  # [B, H, h, w, Dv], laid out as own_strides has it
    logsumexp_ptr,  # [B, 2, H, h, w]
    inner_ptr,  # [B, H, h, w, Dv], laid out likewise
    q_strides,
    k_strides,
    v_strides,
    decay_strides,
    rotation_stride_b,
    num_heads,
    height,
    width,
    scale: tl.float64,
    ROTATED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN_LENGTH: tl.constexpr,
    ALONG: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """A head of an image: ALONG its rows, into inner, and ACROSS them, from inner.

    A tile is ROWS rows of up to ROW_LENGTH tokens, or COLUMNS columns.  Programs along the second
    axis of the launch take turns at the tiles of a pass.
    """
    dtype: tl.constexpr = log_decay_ptr.dtype.element_ty
    HALF: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth == 16
    head = tl.program_id(0) % num_heads
    image = tl.program_id(0) // num_heads
    part, parts = tl.program_id(1), tl.num_programs(1)
    strides = own_strides(num_heads, height, width, VALUE_DIM)
    q_ptr = at_head(q_ptr, q_strides, image, head)
    k_ptr = at_head(k_ptr, k_strides, image, head)
    v_ptr = at_head(v_ptr, v_strides, image, head)
    out_ptr = at_head(out_ptr, strides, image, head)
    inner_ptr = at_head(inner_ptr, strides, image, head)
    logsumexp_ptr += (image.to(tl.int64) * 2 * num_heads + head) * height * width
    rotation = rotation_of(sin_ptr, cos_ptr, rotation_stride_b, image, width)
    scale = in_units(to_scalar(scale, dtype), HALF)
    decay = load_decay(log_decay_ptr, decay_strides, image, head, HALF)

    if ALONG:
        for first in range(part * ROWS, height, parts * ROWS):
            _attend(
                q_ptr,
                k_ptr,
                v_ptr,
                rotation,
                inner_ptr,
                logsumexp_ptr,
                q_strides,
                k_strides,
                v_strides,
                strides,
                decay,
                scale,
                _tokens(first, height, width, False, ROWS, ROW_LENGTH),
                width,
                ROTATED,
                HEAD_DIM,
                VALUE_DIM,
                BLOCK_D,
                BLOCK_V,
                ROWS,
            )
    if ALONG and ACROSS:
        tl.debug_barrier()  # what other threads stored is loaded below
    if ACROSS:
        for first in range(part * COLUMNS, width, parts * COLUMNS):
            _attend(
                q_ptr,
                k_ptr,
                inner_ptr,
                rotation,
                out_ptr,
                logsumexp_ptr + num_heads.to(tl.int64) * height * width,
                q_strides,
                k_strides,
                strides,
                strides,
                decay,
                scale,
                _tokens(first, height, width, True, COLUMNS, COLUMN_LENGTH),
                height,
                ROTATED,
                HEAD_DIM,
                VALUE_DIM,
                BLOCK_D,
                BLOCK_V,
                COLUMNS,
            )


@triton.jit
def _backward(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    rotation,
    logsumexp_ptr,
    others,  # another pass's gradients to q and k, not yet rotated back, or None
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    grad_out_strides,
    q_strides,
    k_strides,
    v_strides,
    value_strides,
    grad_strides,
    decay,
    scale,
    tokens,
    num_keys,
    ROTATED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINES: tl.constexpr,
):
    """The derivative of _attend.

    The gradients are rotated back where there are others to add: this pass is the last one then.
    Returns those to log_decay, [LINES, LENGTH]: of each query.
    """
    HALF: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth == 16
    dtype: tl.constexpr = decay.dtype
    LAST: tl.constexpr = others is not None
    flat_q = load_rotated(q_ptr, q_strides, rotation, tokens, ROTATED, HEAD_DIM, BLOCK_D)
    q = _by_line(flat_q, LINES)
    k = load_rotated(k_ptr, k_strides, rotation, tokens, ROTATED, HEAD_DIM, BLOCK_D)
    k = _by_line(k, LINES)
    v = _by_line(load_tile(v_ptr, v_strides, tokens, VALUE_DIM, BLOCK_V), LINES)
    grad_out = load_tile(grad_out_ptr, grad_out_strides, tokens, VALUE_DIM, BLOCK_V)
    places = logsumexp_ptr + tokens[0] * rotation[2] + tokens[1]
    logsumexp = in_units(tl.load(places, tokens[2], other=float("inf")), HALF)
    logsumexp = tl.reshape(logsumexp, [LINES, q.shape[1]])
    grad_out = _by_line(grad_out, LINES)

    logits = _logits(q, k, in_units(scale, HALF), decay, num_keys)
    p = exp(logits - logsumexp[:, :, None], HALF)
    # of large logits logsumexp is coarse: the sum is 1 but for its rounding
    inside = tl.reshape(tokens[2], [LINES, q.shape[1]])
    p = p / tl.where(inside, tl.sum(p, axis=2), 1.0)[:, :, None]
    grad_v = _flat(_products(_transposed(rounded(p, v.dtype)), grad_out, dtype))
    store_tile(grad_v_ptr, value_strides, grad_v, tokens, VALUE_DIM, BLOCK_V)
    grad_p = _products(grad_out, _transposed(v), dtype)
    delta = tl.sum(p * grad_p, axis=2)  # which is <grad_out, out>, without loading out
    grad_logits = p * (grad_p - delta[:, :, None])
    grad_products = rounded(grad_logits, q.dtype)
    factor = grad_scale(scale, num_keys)
    grad_q = _flat(_products(grad_products, k, dtype)) * factor
    grad_k = _flat(_products(_transposed(grad_products), q, dtype)) * factor
    if LAST:
        grad_q += load_tile(others[0], grad_strides, tokens, HEAD_DIM, BLOCK_D)
        grad_k += load_tile(others[1], grad_strides, tokens, HEAD_DIM, BLOCK_D)
    BACK: tl.constexpr = ROTATED and LAST
    store_rotated_back(grad_q_ptr, grad_strides, grad_q, rotation, tokens, BACK, HEAD_DIM, BLOCK_D)
    store_rotated_back(grad_k_ptr, grad_strides, grad_k, rotation, tokens, BACK, HEAD_DIM, BLOCK_D)
    return tl.sum(grad_logits * _distances(q.shape[1], dtype), axis=2)


@triton.jit(do_not_specialize=_SIZES)
def decayed_attention_lines_backward_kernel(
    grad_out_ptr,  # [B, H, h, w, Dv]
    q_ptr,  # [B, H, h, w, D]
    k_ptr,  # [B, H, h, w, D]
    v_ptr,  # [B, H, h, w, Dv]
    log_decay_ptr,  # [B, H]
    sin_ptr,  # [B, 1, h, w, D]
    cos_ptr,
    logsumexp_ptr,  # [B, 2, H, h, w], contiguous
    inner_ptr,  # this and all below are laid out as own_strides has it: [B, H, h, w, Dv]
    across_q_ptr,  # [B, H, h, w, D]: what the pass across gives, not yet rotated back
    across_k_ptr,
    grad_inner_ptr,  # [B, H, h, w, Dv]
    grad_q_ptr,  # [B, H, h, w, D]
    grad_k_ptr,
    grad_v_ptr,  # [B, H, h, w, Dv]
    grad_decay_ptr,  # [programs], or None
    grad_out_strides,
    q_strides,
    k_strides,
    v_strides,
    decay_strides,
    rotation_stride_b,
    num_heads,
    height,
    width,
    scale: tl.float64,
    ROTATED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN_LENGTH: tl.constexpr,
    ALONG: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """The derivative of the forward kernel: ACROSS the rows of a head first, then ALONG them."""
    dtype: tl.constexpr = log_decay_ptr.dtype.element_ty
    HALF: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth == 16
    head = tl.program_id(0) % num_heads
    image = tl.program_id(0) // num_heads
    part, parts = tl.program_id(1), tl.num_programs(1)
    strides = own_strides(num_heads, height, width, HEAD_DIM)
    value_strides = own_strides(num_heads, height, width, VALUE_DIM)
    grad_out_ptr = at_head(grad_out_ptr, grad_out_strides, image, head)
    q_ptr = at_head(q_ptr, q_strides, image, head)
    k_ptr = at_head(k_ptr, k_strides, image, head)
    v_ptr = at_head(v_ptr, v_strides, image, head)
    inner_ptr = at_head(inner_ptr, value_strides, image, head)
    across_q_ptr = at_head(across_q_ptr, strides, image, head)
    across_k_ptr = at_head(across_k_ptr, strides, image, head)
    grad_inner_ptr = at_head(grad_inner_ptr, value_strides, image, head)
    logsumexp_ptr += (image.to(tl.int64) * 2 * num_heads + head) * height * width
    rotation = rotation_of(sin_ptr, cos_ptr, rotation_stride_b, image, width)
    scale = to_scalar(scale, dtype)
    decay = load_decay(log_decay_ptr, decay_strides, image, head, HALF)
    grad_decay_along = tl.zeros([ROWS, ROW_LENGTH], dtype)
    grad_decay_across = tl.zeros([COLUMNS, COLUMN_LENGTH], dtype)

    if ACROSS:
        for first in range(part * COLUMNS, width, parts * COLUMNS):
            grad_decay_across += _backward(
                grad_out_ptr,
                q_ptr,
                k_ptr,
                inner_ptr,
                rotation,
                logsumexp_ptr + num_heads.to(tl.int64) * height * width,
                None,
                across_q_ptr,
                across_k_ptr,
                grad_inner_ptr,
                grad_out_strides,
                q_strides,
                k_strides,
                value_strides,
                value_strides,
                strides,
                decay,
                scale,
                _tokens(first, height, width, True, COLUMNS, COLUMN_LENGTH),
                height,
                ROTATED,
                HEAD_DIM,
                VALUE_DIM,
                BLOCK_D,
                BLOCK_V,
                COLUMNS,
            )
    if ALONG and ACROSS:
        tl.debug_barrier()  # what other threads stored is loaded below
    if ALONG:
        for first in range(part * ROWS, height, parts * ROWS):
            grad_decay_along += _backward(
                grad_inner_ptr,
                q_ptr,
                k_ptr,
                v_ptr,
                rotation,
                logsumexp_ptr,
                (across_q_ptr, across_k_ptr),
                at_head(grad_q_ptr, strides, image, head),
                at_head(grad_k_ptr, strides, image, head),
                at_head(grad_v_ptr, value_strides, image, head),
                value_strides,
                q_strides,
                k_strides,
                v_strides,
                value_strides,
                strides,
                decay,
                scale,
                _tokens(first, height, width, False, ROWS, ROW_LENGTH),
                width,
                ROTATED,
                HEAD_DIM,
                VALUE_DIM,
                BLOCK_D,
                BLOCK_V,
                ROWS,
            )
    if grad_decay_ptr is not None:
        total = tl.sum(tl.sum(grad_decay_along, axis=1), axis=0)
        total += tl.sum(tl.sum(grad_decay_across, axis=1), axis=0)
        tl.store(grad_decay_ptr + tl.program_id(0) * parts + part, total)
