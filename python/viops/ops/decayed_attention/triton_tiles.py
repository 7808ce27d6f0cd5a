# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of a kernel have no types of Python's)
"""Tiles of tokens: what the Triton kernels of decayed_attention are made of.

The tokens of a tile are (y, x, inside): their rows and columns on the grid, and
whether they are there.  Tensors are reached by the strides of their axes
(image, head, y, x, channel); channels are padded to a power of two, tokens to the tile, with zeros.

Logits of half-precision tensors are held in units of log(2), so that exp2 takes them as they are.
Others are natural: rounding a large logit to another unit costs more than float32's tolerance.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_runtime import INTERPRETED as _INTERPRETED

LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2 = tl.constexpr(0.6931471805599453)
#: Below any logit of float32, and finite: minus infinity less itself would not be a number.
LOWEST = tl.constexpr(-3.0e38)
INTERPRETED = tl.constexpr(_INTERPRETED)

#: What attends to what: all of the grid, or each row or each column within itself.
WHOLE = tl.constexpr(0)
ROWS = tl.constexpr(1)
COLUMNS = tl.constexpr(2)


@triton.jit
def rounded(tile, DTYPE: tl.constexpr):
    """In this dtype, rounded to the nearest: the interpreter by itself cuts bfloat16 off."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = tile.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        tile = bits.to(tl.float32, bitcast=True)
    return tile.to(DTYPE)


@triton.jit
def own_strides(num_heads, height, width, CHANNELS: tl.constexpr):
    """Those of [B, H, h, w, C] laid out as [B, h, w, H, C], as all that these kernels make is."""
    token = num_heads.to(tl.int64) * CHANNELS
    return (height * width * token, CHANNELS, width * token, token, 1)


@triton.jit
def at_head(ptr, strides, image, head):
    """The first element of one head of one image."""
    return ptr + image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def _offsets(strides, tokens, BLOCK_C: tl.constexpr):
    """[T, BLOCK_C]: where the channels of these tokens lie."""
    places = tokens[0].to(tl.int64) * strides[2] + tokens[1].to(tl.int64) * strides[3]
    return places[:, None] + (tl.arange(0, BLOCK_C).to(tl.int64) * strides[4])[None, :]


@triton.jit
def _mask(inside, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    return inside[:, None] & (tl.arange(0, BLOCK_C) < CHANNELS)[None, :]


@triton.jit
def load_tile(ptr, strides, tokens, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """[T, BLOCK_C]: these tokens, zero where not inside and beyond their channels."""
    mask = _mask(tokens[2], CHANNELS, BLOCK_C)
    return tl.load(ptr + _offsets(strides, tokens, BLOCK_C), mask, other=0.0)


@triton.jit
def store_tile(ptr, strides, tile, tokens, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Stores those of [T, BLOCK_C] that are inside, rounded to the tensor's dtype."""
    mask = _mask(tokens[2], CHANNELS, BLOCK_C)
    tl.store(ptr + _offsets(strides, tokens, BLOCK_C), rounded(tile, ptr.dtype.element_ty), mask)


@triton.jit
def _pairs(tile):
    """The even and the odd channels."""
    return tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 2, 2]))


@triton.jit
def _of_pairs(even, odd):
    return tl.reshape(tl.join(even, odd), [even.shape[0], 2 * even.shape[1]])


@triton.jit
def rotation_of(sin_ptr, cos_ptr, stride_b, image, width):
    """What is loaded from for one image: sin and cos, each [h, w, D], and w."""
    offset = image.to(tl.int64) * stride_b
    return sin_ptr + offset, cos_ptr + offset, width


@triton.jit
def _load_angles(rotation, tokens, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[T, BLOCK_D] each: sin and cos of these tokens."""
    strides = (0, 0, rotation[2] * HEAD_DIM, HEAD_DIM, 1)
    sin = load_tile(rotation[0], strides, tokens, HEAD_DIM, BLOCK_D)
    return sin, load_tile(rotation[1], strides, tokens, HEAD_DIM, BLOCK_D)


@triton.jit
def load_rotated(
    ptr,
    strides,
    rotation,
    tokens,
    ROTATED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[T, BLOCK_D]: load_tile, rotated in float32 or wider, in the tensor's dtype."""
    tile = load_tile(ptr, strides, tokens, HEAD_DIM, BLOCK_D)
    if ROTATED:
        sin, cos = _load_angles(rotation, tokens, HEAD_DIM, BLOCK_D)
        wide = tile.to(sin.dtype)
        even, odd = _pairs(wide)
        tile = rounded(wide * cos + _of_pairs(-odd, even) * sin, tile.dtype)
    return tile


@triton.jit
def store_rotated_back(
    ptr,
    strides,
    grad,
    rotation,
    tokens,
    ROTATED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores the gradient to what load_rotated loaded, given that to what it returned."""
    if ROTATED:
        sin, cos = _load_angles(rotation, tokens, HEAD_DIM, BLOCK_D)
        even, odd = _pairs(grad * sin)
        grad = grad * cos + _of_pairs(odd, -even)
    store_tile(ptr, strides, grad, tokens, HEAD_DIM, BLOCK_D)


@triton.jit
def dot(a, b, ACCUMULATOR: tl.constexpr):
    """a @ b: half precision on tensor cores, float32 without TF32."""
    if INTERPRETED and a.dtype == tl.bfloat16:  # which the interpreter would multiply as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACCUMULATOR)


@triton.jit
def to_scalar(number, DTYPE: tl.constexpr):
    """A number of Python's, which the interpreter would make a float32, in this dtype."""
    return tl.full([], number, DTYPE)


@triton.jit
def grad_scale(scale, num_keys):
    """The factor of gradients to q and k: exactly zero for a lone key, of probability 1 always."""
    return tl.where(num_keys > 1, scale, tl.zeros_like(scale))


@triton.jit
def in_units(logits, HALF: tl.constexpr):
    """Natural logarithms, or factors of logits, in the units of the logits."""
    return logits * LOG2_E if HALF else logits


@triton.jit
def natural(logits, HALF: tl.constexpr):
    """in_units, undone."""
    return logits * LOG_2 if HALF else logits


@triton.jit
def exp(logits, HALF: tl.constexpr):
    """The exponential of logits in their units."""
    return tl.exp2(logits) if HALF else tl.exp(logits)


@triton.jit
def load_decay(ptr, strides, image, head, HALF: tl.constexpr):
    """log_decay [B, H] of one head, in the units of the logits."""
    number = tl.load(ptr + image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1])
    return in_units(number, HALF)
