# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of a kernel have no types of Python's)
"""What standardize_weight's Triton kernels do with filters: a block of them held in registers, or
one of any length in pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mean_of(first, offset):
    """high + low = first + offset without rounding.

    Distances to `high` keep all their bits where `first` is far from zero and where it is far from
    all others; `low`, which is small, corrects sums.
    """
    high = first + offset
    rounded = high - first
    return high, (first - (high - rounded)) + (offset - rounded)


@triton.jit
def _inverse(count, DTYPE: tl.constexpr):
    """Of a count, or of 1 where that is less: one quotient, and not one for each filter."""
    return 1 / tl.maximum(count, 1).to(DTYPE)


@triton.jit
def _factor_of(squares, size, eps, UNBIASED: tl.constexpr, EPS_INSIDE: tl.constexpr):
    var = squares * _inverse(size - UNBIASED, squares.dtype)
    # eps is float64, for the sake of float64 tensors: rounded back where it made others wider
    if EPS_INSIDE:
        root = tl.sqrt((var + eps).to(var.dtype))
    else:
        root = (tl.sqrt(var) + eps).to(var.dtype)
    return 1 / root


@triton.jit
def _bend_of(factor, squares, products, size, UNBIASED: tl.constexpr, EPS_INSIDE: tl.constexpr):
    """What distances to the mean are multiplied with in the gradient, without gain."""
    share = _inverse(size - UNBIASED, squares.dtype)
    if EPS_INSIDE:
        return factor * factor * factor * products * share
    std = tl.sqrt(squares * share)
    return tl.where(std > 0, factor * factor * products * share / tl.where(std > 0, std, 1), 0)


@triton.jit
def forward_block(
    weight_ptr,  # [O, K]
    gain_ptr,  # [O], read where has_gain
    has_gain,
    out_ptr,  # [O, K]
    mean_ptr,  # [O]
    factor_ptr,  # [O]
    filters,  # [R], int64
    num_filters,
    size,
    eps,
    UNBIASED: tl.constexpr,
    EPS_INSIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """These filters, of at most COLUMNS weights."""
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    columns = tl.arange(0, COLUMNS)
    here = filters < num_filters
    mask = here[:, None] & (columns < size)[None, :]
    places = (filters * size)[:, None] + columns[None, :]
    weight = tl.load(weight_ptr + places, mask, other=0.0).to(dtype)
    first = tl.load(weight_ptr + filters * size, here & (size > 0), other=0.0).to(dtype)

    mean = tl.sum(tl.where(mask, weight - first[:, None], 0.0), axis=1) * _inverse(size, dtype)
    high, low = _mean_of(first, mean)
    distance = tl.where(mask, weight - high[:, None], 0.0)
    squares = tl.maximum(tl.sum(distance * distance, axis=1) - low * low * size, 0.0)
    factor = _factor_of(squares, size, eps, UNBIASED, EPS_INSIDE)
    scale = factor * tl.load(gain_ptr + filters, here & (has_gain != 0), other=1.0)

    tl.store(mean_ptr + filters, mean, here)
    tl.store(factor_ptr + filters, factor, here)
    out = (distance - low[:, None]) * scale[:, None]
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def forward_pieces(
    weight_ptr,
    gain_ptr,
    has_gain,
    out_ptr,
    mean_ptr,
    factor_ptr,
    filter,  # int64
    size,
    eps,
    UNBIASED: tl.constexpr,
    EPS_INSIDE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One filter of any length."""
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    columns = tl.arange(0, PIECE)
    weight_ptr += filter * size
    out_ptr += filter * size
    first = tl.load(weight_ptr).to(dtype)

    sums = tl.zeros([PIECE], dtype)
    for start in range(0, size, PIECE):
        mask = start + columns < size
        weight = tl.load(weight_ptr + start + columns, mask, other=0.0).to(dtype)
        sums += tl.where(mask, weight - first, 0.0)
    mean = tl.sum(sums, axis=0) * _inverse(size, dtype)
    high, low = _mean_of(first, mean)

    sums = tl.zeros([PIECE], dtype)
    for start in range(0, size, PIECE):
        mask = start + columns < size
        weight = tl.load(weight_ptr + start + columns, mask, other=0.0).to(dtype)
        distance = tl.where(mask, weight - high, 0.0)
        sums += distance * distance
    squares = tl.maximum(tl.sum(sums, axis=0) - low * low * size, 0.0)
    factor = _factor_of(squares, size, eps, UNBIASED, EPS_INSIDE)
    scale = factor * tl.load(gain_ptr + filter, has_gain != 0, other=1.0)

    tl.store(mean_ptr + filter, mean)
    tl.store(factor_ptr + filter, factor)
    for start in range(0, size, PIECE):
        mask = start + columns < size
        weight = tl.load(weight_ptr + start + columns, mask, other=0.0).to(dtype)
        out = ((weight - high) - low) * scale
        tl.store(out_ptr + start + columns, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def backward_block(
    grad_out_ptr,  # [O, K]
    weight_ptr,  # [O, K]
    gain_ptr,  # [O], read where has_gain
    has_gain,
    mean_ptr,  # [O]
    factor_ptr,  # [O]
    grad_weight_ptr,  # [O, K]
    grad_gain_ptr,  # [O] or None
    filters,  # [R], int64
    num_filters,
    size,
    UNBIASED: tl.constexpr,
    EPS_INSIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """These filters, of at most COLUMNS weights."""
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    columns = tl.arange(0, COLUMNS)
    here = filters < num_filters
    mask = here[:, None] & (columns < size)[None, :]
    places = (filters * size)[:, None] + columns[None, :]
    weight = tl.load(weight_ptr + places, mask, other=0.0).to(dtype)
    grad = tl.load(grad_out_ptr + places, mask, other=0.0).to(dtype)
    starts = filters * size
    first = tl.load(weight_ptr + starts, here & (size > 0), other=0.0).to(dtype)
    first_grad = tl.load(grad_out_ptr + starts, here & (size > 0), other=0.0).to(dtype)
    factor = tl.load(factor_ptr + filters, here, other=1.0)
    gain = tl.load(gain_ptr + filters, here & (has_gain != 0), other=1.0)

    high, low = _mean_of(first, tl.load(mean_ptr + filters, here, other=0.0))
    distance = tl.where(mask, weight - high[:, None], 0.0)
    # relative to the first gradient, so that of a constant one nothing is left
    change = tl.where(mask, grad - first_grad[:, None], 0.0)
    total = tl.sum(change, axis=1)
    # relative to what the means of both are: the saved mean is rounded
    rest = tl.sum(distance, axis=1) * _inverse(size, dtype)
    products = tl.sum(change * distance, axis=1) - total * rest
    squares = tl.maximum(tl.sum(distance * distance, axis=1) - rest * rest * size, 0.0)
    if grad_gain_ptr is not None:
        tl.store(grad_gain_ptr + filters, products * factor, here)

    bend = _bend_of(factor, squares, products, size, UNBIASED, EPS_INSIDE) * gain
    high_grad, low_grad = _mean_of(first_grad, total * _inverse(size, dtype))
    change = (grad - high_grad[:, None]) - low_grad[:, None]
    result = change * (factor * gain)[:, None] - (distance - low[:, None]) * bend[:, None]
    tl.store(grad_weight_ptr + places, result.to(grad_weight_ptr.dtype.element_ty), mask)


@triton.jit
def backward_pieces(
    grad_out_ptr,
    weight_ptr,
    gain_ptr,
    has_gain,
    mean_ptr,
    factor_ptr,
    grad_weight_ptr,
    grad_gain_ptr,
    filter,  # int64
    size,
    UNBIASED: tl.constexpr,
    EPS_INSIDE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One filter of any length."""
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    columns = tl.arange(0, PIECE)
    weight_ptr += filter * size
    grad_out_ptr += filter * size
    grad_weight_ptr += filter * size
    first_grad = tl.load(grad_out_ptr).to(dtype)
    factor = tl.load(factor_ptr + filter)
    gain = tl.load(gain_ptr + filter, has_gain != 0, other=1.0)
    high, low = _mean_of(tl.load(weight_ptr).to(dtype), tl.load(mean_ptr + filter))

    changes = tl.zeros([PIECE], dtype)
    distances = tl.zeros([PIECE], dtype)
    products = tl.zeros([PIECE], dtype)
    squares = tl.zeros([PIECE], dtype)
    for start in range(0, size, PIECE):
        mask = start + columns < size
        weight = tl.load(weight_ptr + start + columns, mask, other=0.0).to(dtype)
        grad = tl.load(grad_out_ptr + start + columns, mask, other=0.0).to(dtype)
        distance = tl.where(mask, weight - high, 0.0)
        change = tl.where(mask, grad - first_grad, 0.0)
        changes += change
        distances += distance
        products += change * distance
        squares += distance * distance
    total = tl.sum(changes, axis=0)
    rest = tl.sum(distances, axis=0) * _inverse(size, dtype)
    product = tl.sum(products, axis=0) - total * rest
    square = tl.maximum(tl.sum(squares, axis=0) - rest * rest * size, 0.0)
    if grad_gain_ptr is not None:
        tl.store(grad_gain_ptr + filter, product * factor)

    bend = _bend_of(factor, square, product, size, UNBIASED, EPS_INSIDE) * gain
    high_grad, low_grad = _mean_of(first_grad, total * _inverse(size, dtype))
    for start in range(0, size, PIECE):
        mask = start + columns < size
        weight = tl.load(weight_ptr + start + columns, mask, other=0.0).to(dtype)
        grad = tl.load(grad_out_ptr + start + columns, mask, other=0.0).to(dtype)
        change = (grad - high_grad) - low_grad
        result = change * (factor * gain) - ((weight - high) - low) * bend
        result = result.to(grad_weight_ptr.dtype.element_ty)
        tl.store(grad_weight_ptr + start + columns, result, mask)
