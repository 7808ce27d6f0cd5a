# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of a kernel have no types of Python's)
"""Triton kernels of class_attention_scores: one launch forward, one backward.

k is read once, in tiles of whole rows.  A tile's size follows from head size and dtype alone, so
that a new batch or token count compiles nothing.  Nothing is added atomically: the same input gives
the same bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tensors import accumulation_dtype
from ...triton_runtime import on_device_of

#: Elements of a tile of k, and bytes: the 197 rows of 64 channels of a DeiT head are one tile.
_TILE_ELEMENTS = 16384
_TILE_BYTES = 65536
#: Rows of a tile at most, for heads of few channels.
_MAX_TILE_ROWS = 1024
#: Forward a tile passes through shared memory; backward it stays in registers, 128 bytes a thread.
#: Two blocks of half-precision tensors then fit on a multiprocessor.
_FORWARD_WARPS = 8
_BACKWARD_WARPS = {2: 8, 4: 16, 8: 16}  # by the size of an element
#: Tokens at a time where there is one number a token: at least as many as a block has threads, so
#: that no two threads have the same token.
_BLOCK_P = tl.constexpr(1024)

#: Sizes of a call: specialising on them would compile anew for another batch or token count.
_SIZES = ["num_heads", "num_tokens", "num_prefix"]
_STRIDES = ["q_stride_b", "q_stride_h", "q_stride_d", "k_stride_b", "k_stride_h", "k_stride_n"]


@triton.jit
def _load_row(ptr, stride_d, num_channels, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr):
    """[BLOCK_D]: one row, zero beyond its channels."""
    channels = tl.arange(0, BLOCK_D)
    return tl.load(ptr + channels * stride_d, channels < num_channels, other=0.0).to(DTYPE)


@triton.jit
def _load_tile(
    ptr, rows, num_rows, stride_n, stride_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[BLOCK_N, BLOCK_D]: these rows, zero beyond num_rows and beyond their channels."""
    channels = tl.arange(0, BLOCK_D).to(tl.int64)  # their stride may be the largest
    mask = (rows < num_rows)[:, None] & (channels < HEAD_DIM)[None, :]
    return tl.load(ptr + rows[:, None] * stride_n + channels[None, :] * stride_d, mask, other=0.0)


@triton.jit
def _logits(q, k, rows, num_tokens, scale):
    """[BLOCK_N]: scale * <q, k>, minus infinity beyond num_tokens."""
    products = tl.sum(k.to(q.dtype) * q[None, :], axis=1)
    # scale is float64, for the sake of float64 tensors: rounded back where it made others wider
    return tl.where(rows < num_tokens, (products * scale).to(q.dtype), float("-inf"))


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES])
def class_attention_scores_forward_kernel(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, H, N, D]
    scores_ptr,  # [B, N - num_prefix]
    probabilities_ptr,  # [B, H, N]
    q_stride_b: tl.int64,
    q_stride_h: tl.int64,
    q_stride_d: tl.int64,
    k_stride_b: tl.int64,  # these three in units of UNIT elements
    k_stride_h: tl.int64,
    k_stride_n: tl.int64,
    k_stride_d,
    num_heads,
    num_tokens,
    num_prefix,
    scale: tl.float64,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One image; each head's rows of k are one tile."""
    image = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = probabilities_ptr.dtype.element_ty
    q_ptr += image * q_stride_b
    k_ptr += image * k_stride_b * UNIT
    probabilities_ptr += image * num_heads * num_tokens
    rows = tl.arange(0, BLOCK_N)

    total = tl.zeros([BLOCK_N], dtype)
    next_q = _load_row(q_ptr, q_stride_d, HEAD_DIM, BLOCK_D, dtype)
    for head in tl.range(num_heads, num_stages=2):  # the next head's k is under way meanwhile
        q = next_q  # which stages do not help: it is too small for an asynchronous copy
        q_ptr += q_stride_h
        channels = tl.where(head + 1 < num_heads, HEAD_DIM, 0)  # none after the last head
        next_q = _load_row(q_ptr, q_stride_d, channels, BLOCK_D, dtype)
        k = _load_tile(k_ptr, rows, num_tokens, k_stride_n * UNIT, k_stride_d, HEAD_DIM, BLOCK_D)
        k_ptr += k_stride_h * UNIT
        logits = _logits(q, k, rows, num_tokens, scale)
        exponentials = tl.exp(logits - tl.max(logits, axis=0))
        probabilities = exponentials / tl.sum(exponentials, axis=0)
        tl.store(probabilities_ptr + rows, probabilities, rows < num_tokens)
        probabilities_ptr += num_tokens
        total += probabilities

    scores_ptr += image * (num_tokens - num_prefix)
    patch = (rows >= num_prefix) & (rows < num_tokens)
    tl.store(scores_ptr + rows - num_prefix, (total / num_heads).to(tl.float32), patch)


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES])
def class_attention_scores_long_forward_kernel(
    q_ptr,
    k_ptr,
    scores_ptr,
    probabilities_ptr,
    q_stride_b: tl.int64,
    q_stride_h: tl.int64,
    q_stride_d: tl.int64,
    k_stride_b: tl.int64,
    k_stride_h: tl.int64,
    k_stride_n: tl.int64,
    k_stride_d,
    num_heads,
    num_tokens,
    num_prefix,
    scale: tl.float64,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same for any number of tokens: logits wait in `probabilities` for the others."""
    image = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = probabilities_ptr.dtype.element_ty
    q_ptr += image * q_stride_b
    k_ptr += image * k_stride_b * UNIT
    k_stride_n *= UNIT
    probabilities_ptr += image * num_heads * num_tokens
    tile = tl.arange(0, BLOCK_N)
    block = tl.arange(0, _BLOCK_P)

    head_ptr = probabilities_ptr
    for _ in range(num_heads):
        q = _load_row(q_ptr, q_stride_d, HEAD_DIM, BLOCK_D, dtype)
        peaks = tl.full([BLOCK_N], float("-inf"), dtype)
        for start in tl.range(0, num_tokens, BLOCK_N, num_stages=2):
            rows = start + tile
            k = _load_tile(k_ptr, rows, num_tokens, k_stride_n, k_stride_d, HEAD_DIM, BLOCK_D)
            logits = _logits(q, k, rows, num_tokens, scale)
            tl.store(head_ptr + rows, logits, rows < num_tokens)
            peaks = tl.maximum(peaks, logits)
        peak = tl.max(peaks, axis=0)
        tl.debug_barrier()  # what other threads stored is loaded below

        sums = tl.zeros([_BLOCK_P], dtype)
        for start in range(0, num_tokens, _BLOCK_P):
            rows = start + block
            logits = tl.load(head_ptr + rows, rows < num_tokens, other=float("-inf"))
            sums += tl.exp(logits - peak)
        normalizer = tl.sum(sums, axis=0)
        for start in range(0, num_tokens, _BLOCK_P):
            rows = start + block
            logits = tl.load(head_ptr + rows, rows < num_tokens, other=float("-inf"))
            tl.store(head_ptr + rows, tl.exp(logits - peak) / normalizer, rows < num_tokens)
        q_ptr += q_stride_h
        k_ptr += k_stride_h * UNIT
        head_ptr += num_tokens
    tl.debug_barrier()

    scores_ptr += image * (num_tokens - num_prefix)
    for start in range(0, num_tokens, _BLOCK_P):
        rows = start + block
        total = tl.zeros([_BLOCK_P], dtype)
        head_ptr = probabilities_ptr
        for _ in range(num_heads):
            total += tl.load(head_ptr + rows, rows < num_tokens, other=0.0)
            head_ptr += num_tokens
        patch = (rows >= num_prefix) & (rows < num_tokens)
        tl.store(scores_ptr + rows - num_prefix, (total / num_heads).to(tl.float32), patch)


@triton.jit
def _load_grad_p(ptr, stride, rows, num_heads, num_tokens, num_prefix, DTYPE: tl.constexpr):
    """[rows]: the gradient to each probability, zero in the prefix and beyond num_tokens."""
    patch = (rows >= num_prefix) & (rows < num_tokens)
    return tl.load(ptr + (rows - num_prefix) * stride, patch, other=0.0).to(DTYPE) / num_heads


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES, "grad_stride_b", "grad_stride_p"])
def class_attention_scores_backward_kernel(
    grad_scores_ptr,  # [B, N - num_prefix]
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, H, N, D]
    probabilities_ptr,  # [B, H, N]
    grad_q_ptr,  # [B, N, H, D]
    grad_k_ptr,  # [B, N, H, D]
    grad_stride_b: tl.int64,
    grad_stride_p: tl.int64,
    q_stride_b: tl.int64,
    q_stride_h: tl.int64,
    q_stride_d: tl.int64,
    k_stride_b: tl.int64,  # these three in units of UNIT elements
    k_stride_h: tl.int64,
    k_stride_n: tl.int64,
    k_stride_d,
    num_heads,
    num_tokens,
    num_prefix,
    scale: tl.float64,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One head of one image."""
    image = (tl.program_id(0) // num_heads).to(tl.int64)
    head = tl.program_id(0) % num_heads
    dtype: tl.constexpr = probabilities_ptr.dtype.element_ty
    grad_scores_ptr += image * grad_stride_b
    q_ptr += image * q_stride_b + head * q_stride_h
    k_ptr += (image * k_stride_b + head * k_stride_h) * UNIT
    probabilities_ptr += (image * num_heads + head) * num_tokens
    first_row = image * num_tokens * num_heads + head  # of the gradients, in units of HEAD_DIM
    grad_q_ptr += first_row * HEAD_DIM
    grad_k_ptr += first_row * HEAD_DIM
    tile = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    q = _load_row(q_ptr, q_stride_d, HEAD_DIM, BLOCK_D, dtype)

    products = tl.zeros([_BLOCK_P], dtype)
    for start in range(0, num_tokens, _BLOCK_P):
        rows = start + tl.arange(0, _BLOCK_P)
        p = tl.load(probabilities_ptr + rows, rows < num_tokens, other=0.0)
        grad_p = _load_grad_p(
            grad_scores_ptr, grad_stride_p, rows, num_heads, num_tokens, num_prefix, dtype
        )
        products += p * grad_p
    inner = tl.sum(products, axis=0)

    grad_row = tl.zeros([BLOCK_D], dtype)
    for start in range(0, num_tokens, BLOCK_N):
        rows = start + tile
        k = _load_tile(k_ptr, rows, num_tokens, k_stride_n * UNIT, k_stride_d, HEAD_DIM, BLOCK_D)
        p = tl.load(probabilities_ptr + rows, rows < num_tokens, other=0.0)
        grad_p = _load_grad_p(
            grad_scores_ptr, grad_stride_p, rows, num_heads, num_tokens, num_prefix, dtype
        )
        grad_logits = (p * (grad_p - inner) * scale).to(dtype)
        grad_row += tl.sum(grad_logits[:, None] * k.to(dtype), axis=0)
        mask = (rows < num_tokens)[:, None] & (channels < HEAD_DIM)[None, :]
        place = rows.to(tl.int64)[:, None] * num_heads * HEAD_DIM + channels[None, :]
        grad_k = grad_logits[:, None] * q[None, :]
        tl.store(grad_k_ptr + place, grad_k.to(grad_k_ptr.dtype.element_ty), mask)
        tl.store(grad_q_ptr + place, tl.zeros_like(k), mask & (rows > 0)[:, None])
    tl.store(grad_q_ptr + channels, grad_row.to(grad_q_ptr.dtype.element_ty), channels < HEAD_DIM)


def _tile_of(k: Tensor) -> dict[str, int]:
    """How a launch cuts k [B, H, N, D] into tiles: by D and dtype alone."""
    head_dim = k.shape[3]
    block_d = 1 << (head_dim - 1).bit_length()
    block_n = max(1, min(_TILE_ELEMENTS, _TILE_BYTES // k.element_size()) // block_d)
    return {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_N": min(block_n, _MAX_TILE_ROWS)}


def _strides_of(q: Tensor, k: Tensor) -> tuple[tuple[int, ...], int]:
    """The strides of both, and the UNIT of k's first three: it shows which loads are aligned."""
    unit = math.gcd(16, *(k.stride(i) for i in range(3) if k.shape[i] > 1))
    q_b, q_h, _, q_d = q.stride()
    k_b, k_h, k_n, k_d = k.stride()  # the stride of an axis of size 1 is never used
    return (q_b, q_h, q_d, k_b // unit, k_h // unit, k_n // unit, k_d), unit


def class_attention_scores_forward(
    q: Tensor, k: Tensor, num_prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Scores [B, N - num_prefix] and the probabilities [B, H, N] that backward needs."""
    batch, num_heads, num_tokens, _ = k.shape
    scores = q.new_empty(batch, num_tokens - num_prefix, dtype=torch.float32)
    dtype = accumulation_dtype(q.dtype)
    probabilities = q.new_empty(batch, num_heads, num_tokens, dtype=dtype)
    if batch == 0:
        return scores, probabilities
    tile = _tile_of(k)
    strides, unit = _strides_of(q, k)
    sizes = num_heads, num_tokens, num_prefix
    kernel = class_attention_scores_forward_kernel
    if num_tokens > tile["BLOCK_N"]:
        kernel = class_attention_scores_long_forward_kernel
    tensors = q, k, scores, probabilities
    with on_device_of(q):
        kernel[(batch,)](
            *tensors, *strides, *sizes, scale, UNIT=unit, **tile, num_warps=_FORWARD_WARPS
        )
    return scores, probabilities


def class_attention_scores_backward(
    grad_scores: Tensor, q: Tensor, k: Tensor, probabilities: Tensor, num_prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients to q (zero but in row 0) and k: [B, H, N, D], laid out as [B, N, H, D]."""
    batch, num_heads, num_tokens, head_dim = k.shape
    grad_q = q.new_empty(batch, num_tokens, num_heads, head_dim)
    grad_k = torch.empty_like(grad_q)
    if batch == 0:
        return grad_q.transpose(1, 2), grad_k.transpose(1, 2)
    tile = _tile_of(k)
    strides, unit = _strides_of(q, k)
    sizes = num_heads, num_tokens, num_prefix
    tensors = grad_scores, q, k, probabilities.contiguous(), grad_q, grad_k
    strides = (*grad_scores.stride(), *strides)
    num_warps = _BACKWARD_WARPS[k.element_size()]
    with on_device_of(q):
        class_attention_scores_backward_kernel[(batch * num_heads,)](
            *tensors, *strides, *sizes, scale, UNIT=unit, **tile, num_warps=num_warps
        )
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2)
