# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of a kernel have no types of Python's)
"""Triton kernels of standardize_weight: one launch forward, one backward, of one weight or of many.

A program holds a block of whole filters in registers, so that weights are read once; filters that
are too long for that go through in pieces, and come from the caches again.  What is compiled
follows from dtype and options; for one weight also from the power of two that K fits into and
whether 16 divides K, for many from the power of two that their number fits into.  Nothing is added
atomically: the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tensors import accumulation_dtype
from ...triton_runtime import INTERPRETED, on_device_of
from .triton_filters import backward_block, backward_pieces, forward_block, forward_pieces

#: Weights of a block, by the size of an element, and of the longest filter that is one.  A program
#: of 4 warps holds 16 of them a thread, of 8 warps 32; backward as many gradients beside them.
_BLOCK = {2: 2048, 4: 2048, 8: 1024}
_MAX_COLUMNS = 8192
#: Filters of a block, at most, times the size of an element: a thread works out the factors of
#: several of them.
_MAX_FILTERS = 128
#: Weights of a piece of a longer filter.
_PIECE = 2048
#: The interpreter takes its time by the operation, not by the element.
_INTERPRETED_BLOCK = 1 << 16

#: A launch for many weights has blocks of a few kinds, each compiled into it: of 2048 weights in
#: 128, 512 or 2048 columns, of 8192 in as many, and pieces of filters.  A weight has the first that
#: its filters fit into.
_NUM_KINDS = {2: 4, 4: 4, 8: 3}  # by the size of an element, for what registers hold
_IN_PIECES = tl.constexpr(4)
_MANY_WARPS = {2: 16, 4: 16, 8: 8}
#: All kinds but the first and the last are read in vectors: K and addresses are multiples of this.
_ALIGNMENT = tl.constexpr(16)

#: The rows of the table of many weights.
_WEIGHT = tl.constexpr(0)  # these four are addresses
_RESULT = tl.constexpr(1)
_GAIN = tl.constexpr(2)  # or 0
_GRAD_OUT = tl.constexpr(3)  # backward
_NUM_FILTERS = tl.constexpr(4)
_SIZE = tl.constexpr(5)
_FIRST_FILTER = tl.constexpr(6)  # among all weights' filters
_FIRST_PROGRAM = tl.constexpr(7)
_KIND = tl.constexpr(8)


@triton.jit(do_not_specialize=["num_filters"])
def standardize_weight_forward_kernel(
    weight_ptr,  # [O, K]
    gain_ptr,  # [O], read where HAS_GAIN
    out_ptr,  # [O, K]
    mean_ptr,  # [O]
    factor_ptr,  # [O]
    num_filters,
    size,
    eps: tl.float64,
    HAS_GAIN: tl.constexpr,
    UNBIASED: tl.constexpr,
    EPS_INSIDE: tl.constexpr,
    FILTERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IN_PIECES: tl.constexpr,
):
    """A block of FILTERS, or one filter in pieces."""
    filter = tl.program_id(0).to(tl.int64) * FILTERS
    if IN_PIECES:
        forward_pieces(
            *(weight_ptr, gain_ptr, HAS_GAIN, out_ptr, mean_ptr, factor_ptr),
            *(filter, size, eps, UNBIASED, EPS_INSIDE, COLUMNS),
        )
    else:
        filters = filter + tl.arange(0, FILTERS)
        forward_block(
            *(weight_ptr, gain_ptr, HAS_GAIN, out_ptr, mean_ptr, factor_ptr),
            *(filters, num_filters, size, eps, UNBIASED, EPS_INSIDE, COLUMNS),
        )


@triton.jit(do_not_specialize=["num_filters"])
def standardize_weight_backward_kernel(
    grad_out_ptr,  # [O, K]
    weight_ptr,  # [O, K]
    gain_ptr,  # [O], read where HAS_GAIN
    mean_ptr,  # [O]
    factor_ptr,  # [O]
    grad_weight_ptr,  # [O, K]
    grad_gain_ptr,  # [O] or None
    num_filters,
    size,
    HAS_GAIN: tl.constexpr,
    UNBIASED: tl.constexpr,
    EPS_INSIDE: tl.constexpr,
    FILTERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IN_PIECES: tl.constexpr,
):
    """A block of FILTERS, or one filter in pieces."""
    filter = tl.program_id(0).to(tl.int64) * FILTERS
    if IN_PIECES:
        backward_pieces(
            *(grad_out_ptr, weight_ptr, gain_ptr, HAS_GAIN, mean_ptr, factor_ptr),
            *(grad_weight_ptr, grad_gain_ptr),
            *(filter, size, UNBIASED, EPS_INSIDE, COLUMNS),
        )
    else:
        filters = filter + tl.arange(0, FILTERS)
        backward_block(
            *(grad_out_ptr, weight_ptr, gain_ptr, HAS_GAIN, mean_ptr, factor_ptr),
            *(grad_weight_ptr, grad_gain_ptr),
            *(filters, num_filters, size, UNBIASED, EPS_INSIDE, COLUMNS),
        )


@triton.jit
def _column_of_program(table_ptr, num_weights, BLOCK_WEIGHTS: tl.constexpr):
    """Where the table has what this program works on, and the program's number for that weight."""
    weights = tl.arange(0, BLOCK_WEIGHTS)
    starts_ptr = table_ptr + _FIRST_PROGRAM * num_weights + weights
    starts = tl.load(starts_ptr, weights < num_weights, other=1 << 62)
    program = tl.program_id(0).to(tl.int64)
    earlier = starts <= program
    first = tl.max(tl.where(earlier, starts, 0), axis=0)
    return table_ptr + tl.sum(earlier.to(tl.int32), axis=0) - 1, program - first


@triton.jit
def _pointer(column_ptr, row, num_weights, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(column_ptr + row * num_weights).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, _ALIGNMENT) if ALIGNED else pointer


@triton.jit(do_not_specialize=["num_weights"])
def standardize_weights_forward_kernel(
    table_ptr,  # [9, T]
    like_ptr,  # a tensor of the weights' dtype
    mean_ptr,  # [O of all weights]
    factor_ptr,  # [O of all weights]
    num_weights,
    eps: tl.float64,
    UNBIASED: tl.constexpr,
    EPS_INSIDE: tl.constexpr,
    BLOCK_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_KINDS: tl.constexpr,
):
    """Many weights: each program has a block of filters of one of them, or one in pieces."""
    column_ptr, program = _column_of_program(table_ptr, num_weights, BLOCK_WEIGHTS)
    dtype: tl.constexpr = like_ptr.dtype.element_ty
    kind = tl.load(column_ptr + _KIND * num_weights)
    num_filters = tl.load(column_ptr + _NUM_FILTERS * num_weights)
    size = tl.load(column_ptr + _SIZE * num_weights).to(tl.int32)
    gain_ptr = _pointer(column_ptr, _GAIN, num_weights, mean_ptr.dtype.element_ty, False)
    has_gain = tl.load(column_ptr + _GAIN * num_weights) != 0
    first = tl.load(column_ptr + _FIRST_FILTER * num_weights)
    mean_ptr += first
    factor_ptr += first
    for i in tl.static_range(NUM_KINDS):
        if kind == i:
            aligned: tl.constexpr = i > 0
            columns: tl.constexpr = 128 << (2 * i)
            rows: tl.constexpr = max(BLOCK // columns, 1)
            weight_ptr = _pointer(column_ptr, _WEIGHT, num_weights, dtype, aligned)
            out_ptr = _pointer(column_ptr, _RESULT, num_weights, dtype, aligned)
            filters = program * rows + tl.arange(0, rows)
            k = size // _ALIGNMENT * _ALIGNMENT if aligned else size
            forward_block(
                *(weight_ptr, gain_ptr, has_gain, out_ptr, mean_ptr, factor_ptr),
                *(filters, num_filters, k, eps, UNBIASED, EPS_INSIDE, columns),
            )
    if kind == _IN_PIECES:
        weight_ptr = _pointer(column_ptr, _WEIGHT, num_weights, dtype, False)
        out_ptr = _pointer(column_ptr, _RESULT, num_weights, dtype, False)
        forward_pieces(
            *(weight_ptr, gain_ptr, has_gain, out_ptr, mean_ptr, factor_ptr),
            *(program, size, eps, UNBIASED, EPS_INSIDE, BLOCK),
        )


@triton.jit(do_not_specialize=["num_weights"])
def standardize_weights_backward_kernel(
    table_ptr,  # [9, T]
    like_ptr,  # a tensor of the weights' dtype
    mean_ptr,  # [O of all weights]
    factor_ptr,  # [O of all weights]
    grad_gain_ptr,  # [O of all weights] or None
    num_weights,
    UNBIASED: tl.constexpr,
    EPS_INSIDE: tl.constexpr,
    BLOCK_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_KINDS: tl.constexpr,
):
    """The same backward."""
    column_ptr, program = _column_of_program(table_ptr, num_weights, BLOCK_WEIGHTS)
    dtype: tl.constexpr = like_ptr.dtype.element_ty
    kind = tl.load(column_ptr + _KIND * num_weights)
    num_filters = tl.load(column_ptr + _NUM_FILTERS * num_weights)
    size = tl.load(column_ptr + _SIZE * num_weights).to(tl.int32)
    gain_ptr = _pointer(column_ptr, _GAIN, num_weights, mean_ptr.dtype.element_ty, False)
    has_gain = tl.load(column_ptr + _GAIN * num_weights) != 0
    first = tl.load(column_ptr + _FIRST_FILTER * num_weights)
    mean_ptr += first
    factor_ptr += first
    if grad_gain_ptr is not None:
        grad_gain_ptr += first
    for i in tl.static_range(NUM_KINDS):
        if kind == i:
            aligned: tl.constexpr = i > 0
            columns: tl.constexpr = 128 << (2 * i)
            rows: tl.constexpr = max(BLOCK // columns, 1)
            grad_out_ptr = _pointer(column_ptr, _GRAD_OUT, num_weights, dtype, aligned)
            weight_ptr = _pointer(column_ptr, _WEIGHT, num_weights, dtype, aligned)
            grad_weight_ptr = _pointer(column_ptr, _RESULT, num_weights, dtype, aligned)
            filters = program * rows + tl.arange(0, rows)
            k = size // _ALIGNMENT * _ALIGNMENT if aligned else size
            backward_block(
                *(grad_out_ptr, weight_ptr, gain_ptr, has_gain, mean_ptr, factor_ptr),
                *(grad_weight_ptr, grad_gain_ptr),
                *(filters, num_filters, k, UNBIASED, EPS_INSIDE, columns),
            )
    if kind == _IN_PIECES:
        grad_out_ptr = _pointer(column_ptr, _GRAD_OUT, num_weights, dtype, False)
        weight_ptr = _pointer(column_ptr, _WEIGHT, num_weights, dtype, False)
        grad_weight_ptr = _pointer(column_ptr, _RESULT, num_weights, dtype, False)
        backward_pieces(
            *(grad_out_ptr, weight_ptr, gain_ptr, has_gain, mean_ptr, factor_ptr),
            *(grad_weight_ptr, grad_gain_ptr),
            *(program, size, UNBIASED, EPS_INSIDE, BLOCK),
        )


def standardize_weight_forward(
    weight: Tensor,  # [O, K]
    gain: Tensor | None,  # [O]
    eps: float,
    unbiased: bool,
    eps_inside: bool,
    out: Tensor,  # [O, K]
    mean: Tensor,  # [O]
    factor: Tensor,  # [O]
) -> None:
    """Writes the last three."""
    if weight.shape[0] == 0:
        return
    grid, options = _blocks(weight, gain, unbiased, eps_inside)
    with on_device_of(weight):
        standardize_weight_forward_kernel[grid](
            weight, mean if gain is None else gain, out, mean, factor, *weight.shape, eps, **options
        )


def standardize_weight_backward(
    grad_out: Tensor,  # [O, K]
    weight: Tensor,  # [O, K]
    gain: Tensor | None,  # [O]
    mean: Tensor,  # [O]
    factor: Tensor,  # [O]
    eps: float,
    unbiased: bool,
    eps_inside: bool,
    grad_weight: Tensor,  # [O, K]
    grad_gain: Tensor | None,  # [O]
) -> None:
    """Writes the last two."""
    if weight.shape[0] == 0:
        return
    grid, options = _blocks(weight, gain, unbiased, eps_inside)
    inputs = grad_out, weight, mean if gain is None else gain, mean, factor
    with on_device_of(weight):
        standardize_weight_backward_kernel[grid](
            *inputs, grad_weight, grad_gain, *weight.shape, **options
        )


def standardize_weights_forward(
    weights: Sequence[Tensor],  # each [O, K], of one dtype and device
    gains: Sequence[Tensor | None],  # each [O]
    eps: float,
    unbiased: bool,
    eps_inside: bool,
    outs: Sequence[Tensor],  # each [O, K]
    mean: Tensor,  # [O of all weights]
    factor: Tensor,  # [O of all weights]
) -> None:
    """Writes the last three, in one launch."""
    if _is_capturing(mean):
        sizes = [weight.shape[0] for weight in weights]
        parts = mean.split(sizes), factor.split(sizes)
        for weight, gain, *results in zip(weights, gains, outs, *parts, strict=True):
            standardize_weight_forward(weight, gain, eps, unbiased, eps_inside, *results)
        return
    table, num_programs, options = _table(weights, outs, gains, weights, unbiased, eps_inside)
    if num_programs == 0:
        return
    with on_device_of(mean):
        standardize_weights_forward_kernel[(num_programs,)](
            table, weights[0], mean, factor, len(weights), eps, **options
        )


def standardize_weights_backward(
    grad_outs: Sequence[Tensor],  # each [O, K]
    weights: Sequence[Tensor],  # each [O, K], of one dtype and device
    gains: Sequence[Tensor | None],  # each [O]
    mean: Tensor,  # [O of all weights]
    factor: Tensor,  # [O of all weights]
    eps: float,
    unbiased: bool,
    eps_inside: bool,
    grad_weights: Sequence[Tensor],  # each [O, K]
    grad_gain: Tensor | None,  # [O of all weights]
) -> None:
    """Writes the last two, in one launch."""
    if _is_capturing(mean):
        sizes = [weight.shape[0] for weight in weights]
        ends = [None] * len(weights) if grad_gain is None else grad_gain.split(sizes)
        parts = grad_outs, weights, gains, mean.split(sizes), factor.split(sizes)
        for grad_out, weight, gain, own_mean, own_factor, *own_grads in zip(
            *parts, grad_weights, ends, strict=True
        ):
            own_inputs = grad_out, weight, gain, own_mean, own_factor
            standardize_weight_backward(*own_inputs, eps, unbiased, eps_inside, *own_grads)
        return
    table, num_programs, options = _table(
        weights, grad_weights, gains, grad_outs, unbiased, eps_inside
    )
    if num_programs == 0:
        return
    with on_device_of(mean):
        standardize_weights_backward_kernel[(num_programs,)](
            table, weights[0], mean, factor, grad_gain, len(weights), **options
        )


def check_inputs(weight: Tensor, gain: Tensor | None) -> None:
    """Refuses what would lead a kernel outside of memory, for callers of the registered op."""
    if weight.dim() != 2 or weight.shape[1] >= 1 << 31:
        raise ValueError(
            f"weight: expected [O, K], K less than 2 ** 31, got shape {list(weight.shape)}"
        )
    _check("weight", weight, weight.shape, weight.dtype, weight.device)
    if gain is not None:
        wide = accumulation_dtype(weight.dtype)
        _check("gain", gain, weight.shape[:1], wide, weight.device)


def check_results(grad_out: Tensor, weight: Tensor, mean: Tensor, factor: Tensor) -> None:
    """The same for what backward gets besides forward's inputs, which have been checked."""
    wide = accumulation_dtype(weight.dtype)
    _check("grad_out", grad_out, weight.shape, weight.dtype, weight.device)
    _check("mean", mean, weight.shape[:1], wide, weight.device)
    _check("factor", factor, weight.shape[:1], wide, weight.device)


def _check(
    name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def _blocks(
    weight: Tensor, gain: Tensor | None, unbiased: bool, eps_inside: bool
) -> tuple[tuple[int], dict[str, Any]]:
    """How a launch cuts [O, K] into blocks: by the power of two that K fits into."""
    num_filters, size = weight.shape
    columns = triton.next_power_of_2(max(size, 16))
    in_pieces = columns > _MAX_COLUMNS
    columns = _PIECE if in_pieces else columns
    element = weight.element_size()
    filters = min(_BLOCK[element] // columns, _MAX_FILTERS // element)
    if INTERPRETED:
        filters = _INTERPRETED_BLOCK // columns
    filters = 1 if in_pieces else max(filters, 1)
    return (triton.cdiv(num_filters, filters),), {
        "HAS_GAIN": gain is not None,
        "UNBIASED": bool(unbiased),
        "EPS_INSIDE": bool(eps_inside),
        "FILTERS": filters,
        "COLUMNS": columns,
        "IN_PIECES": in_pieces,
        "num_warps": 4 if filters * columns <= 2048 else 8,
    }


def _table(
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
    gains: Sequence[Tensor | None],
    grad_outs: Sequence[Tensor],
    unbiased: bool,
    eps_inside: bool,
) -> tuple[Tensor, int, dict[str, Any]]:
    """The table of many weights, how many programs they take, and what their kernel is compiled
    for."""
    num_filters = num_programs = 0
    element = weights[0].element_size()
    block, num_kinds = _BLOCK[element], _NUM_KINDS[element]
    columns = []
    for weight, result, gain, grad_out in zip(weights, results, gains, grad_outs, strict=True):
        addresses = weight.data_ptr(), result.data_ptr(), grad_out.data_ptr()
        own_filters, size = weight.shape
        aligned = not any(value % _ALIGNMENT.value for value in (*addresses, size))
        kind = _kind_of(size, aligned, num_kinds)
        columns.append(
            (
                *addresses[:2],
                0 if gain is None else gain.data_ptr(),
                addresses[2],
                own_filters,
                size,
                num_filters,
                num_programs,
                kind,
            )
        )
        num_filters += own_filters
        filters = 1 if kind == _IN_PIECES.value else max(block // (128 << (2 * kind)), 1)
        num_programs += triton.cdiv(own_filters, filters)
    device = weights[0].device
    # pinned, so that the copy waits for nothing that the stream has to do before
    table = torch.tensor(list(zip(*columns, strict=True)), pin_memory=device.type == "cuda")
    return (
        table.to(device, non_blocking=True),
        num_programs,
        {
            "UNBIASED": bool(unbiased),
            "EPS_INSIDE": bool(eps_inside),
            "BLOCK_WEIGHTS": max(triton.next_power_of_2(len(weights)), 16),
            "BLOCK": block,
            "NUM_KINDS": num_kinds,
            "num_warps": _MANY_WARPS[element],
        },
    )


def _kind_of(size: int, aligned: bool, num_kinds: int) -> int:
    """The first kind of block that filters of so many weights fit into."""
    if size <= 128:
        return 0
    for kind in range(1, num_kinds):
        if aligned and size <= 128 << (2 * kind):
            return kind
    return _IN_PIECES.value


def _is_capturing(tensor: Tensor) -> bool:
    """Whether calls go into a CUDA graph: a table copied from the host would have to outlive it."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
