# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of a kernel have no types of Python's)
"""Triton kernels of reversible_columns: the step, and the way back with both gradients.

Features are a matrix: of planes, [B * C, S], or of rows of channels, [B * S, C].  A program takes
blocks of one along the axis that grad_alpha is summed over, writes its sum, and torch adds those up
in a fixed order.  What is compiled follows from the dtypes, the layout and the power of two that a
row fits into, never from the batch.  Nothing is added atomically: the same input gives the same
bits.

The same kernels take features with their rests, in float64: see `carry`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tensors import is_channels_last
from ...triton_runtime import INTERPRETED, on_device_of
from .reference import MIN_ALPHA, tilt

#: Elements of a block: 16 a thread, of up to four tensors.
_BLOCK = 2048
_MAX_COLUMNS = 1024
#: Blocks of a program.
_STEPS = 4
#: The interpreter takes its time by the operation, not by the element.
_INTERPRETED_BLOCK = 1 << 16

_MIN_ALPHA = tl.constexpr(MIN_ALPHA)
_TILT_FLOAT32 = tl.constexpr(tilt(torch.float32))
_TILT_HALF = tl.constexpr(tilt(torch.bfloat16))


@triton.jit
def _widened(x, WIDE: tl.constexpr):
    """x in WIDE, half types by way of float32."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x.to(WIDE)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """x in a feature's dtype, half types by way of float32."""
    if dtype != tl.float64:
        x = x.to(tl.float32)
    return x.to(dtype)


@triton.jit
def _tilted(x, dtype: tl.constexpr):
    """x as it is rounded to a feature that has a rest: see `reference.tilt`."""
    if dtype == tl.float32:
        tilted = x * tl.full(x.shape, _TILT_FLOAT32, tl.float64)
    else:
        tilted = x * tl.full(x.shape, _TILT_HALF, tl.float64)
    return tilted


@triton.jit
def _rest(x, rounded):
    """What rounding took from x, in float32; no rest makes an infinity finite again."""
    wide = _widened(rounded, x.dtype)
    return tl.where(wide - wide == 0, x - wide, 0).to(tl.float32)


@triton.jit
def _factors(
    alpha_ptr, rows, columns, num_columns, channels, WIDE: tl.constexpr, LAST: tl.constexpr
):
    """a of a block, [1, COLUMNS] where the channels are LAST, else [ROWS, 1]; 1 without alpha."""
    if alpha_ptr is None:
        alpha = tl.full((1, 1), 1, WIDE)
    elif LAST:
        alpha = _widened(tl.load(alpha_ptr + columns, columns < num_columns, other=1), WIDE)
        alpha = alpha[None, :]
    else:
        alpha = _widened(tl.load(alpha_ptr + rows % channels), WIDE)[:, None]
    least = tl.full(alpha.shape, _MIN_ALPHA, WIDE)
    return tl.where(tl.abs(alpha) < least, tl.where(alpha < 0, -least, least), alpha)


@triton.jit
def _quotient(x, y):
    """x / y, correctly rounded."""
    if x.dtype == tl.float64:
        quotient = x / y
    else:
        quotient = tl.div_rn(x, y)
    return quotient


@triton.jit
def _first_block(
    num_columns, LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr
):
    """A program's number along the rows and along the columns, and its rows and columns."""
    program = tl.program_id(0)
    width: tl.constexpr = COLUMNS if LAST else COLUMNS * STEPS
    height: tl.constexpr = ROWS * STEPS if LAST else ROWS
    across = tl.cdiv(num_columns, width)
    down = program // across
    across = program % across
    rows = down.to(tl.int64) * height + tl.arange(0, ROWS)
    return down, across, rows, across * width + tl.arange(0, COLUMNS)


@triton.jit(do_not_specialize=["num_rows"])
def reversible_step_forward_kernel(
    f_ptr,  # [R, N], as the others of this shape
    x_ptr,  # [R, N]
    x_rest_ptr,  # [R, N] or None
    alpha_ptr,  # [C]; None where there are rests: a = 1
    out_ptr,  # [R, N]
    out_rest_ptr,  # [R, N]; None without rests
    num_rows,
    num_columns,
    channels,
    WIDE: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    _, _, rows, columns = _first_block(num_columns, LAST, ROWS, COLUMNS, STEPS)
    a = _factors(alpha_ptr, rows, columns, num_columns, channels, WIDE, LAST)
    for _ in range(STEPS):
        places = rows[:, None] * num_columns + columns[None, :]
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        f = _widened(tl.load(f_ptr + places, inside), WIDE)
        x = _widened(tl.load(x_ptr + places, inside), WIDE)
        if x_rest_ptr is not None:
            x += _widened(tl.load(x_rest_ptr + places, inside), WIDE)
        values = f + a * x
        if out_rest_ptr is not None:
            tilted = _tilted(values, out_ptr.dtype.element_ty)
        else:
            tilted = values
        out = _rounded(tilted, out_ptr.dtype.element_ty)
        tl.store(out_ptr + places, out, inside)
        if out_rest_ptr is not None:
            tl.store(out_rest_ptr + places, _rest(values, out), inside)
        if LAST:
            rows += ROWS
        else:
            columns += COLUMNS


@triton.jit(do_not_specialize=["num_rows"])
def reversible_step_backward_kernel(
    grad_out_ptr,  # [R, N], as the others of this shape; or None without gradients
    values_ptr,  # [R, N]: the step's result, x where f is None, or None without sums
    values_rest_ptr,  # [R, N]; None without rests
    f_ptr,  # [R, N] or None
    alpha_ptr,  # [C]; None where there are rests: a = 1
    x_ptr,  # [R, N], written where f is there
    x_rest_ptr,  # [R, N] or None
    grad_x_ptr,  # [R, N] or None
    sums_ptr,  # [P, C] or None: of each program's part
    num_rows,
    num_columns,
    channels,
    WIDE: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    down, across, rows, columns = _first_block(num_columns, LAST, ROWS, COLUMNS, STEPS)
    a = _factors(alpha_ptr, rows, columns, num_columns, channels, WIDE, LAST)
    if values_rest_ptr is not None:
        reciprocal = 1 / a  # of float64, whose rounding no rest can hold; quotients take long there
    sums = tl.zeros((ROWS, COLUMNS), WIDE)
    for _ in range(STEPS):
        places = rows[:, None] * num_columns + columns[None, :]
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        if grad_out_ptr is not None:
            grad_out = _widened(tl.load(grad_out_ptr + places, inside, other=0), WIDE)
        if grad_x_ptr is not None:
            grad_x = _rounded(a * grad_out, grad_x_ptr.dtype.element_ty)
            tl.store(grad_x_ptr + places, grad_x, inside)
        if values_ptr is not None:
            values = _widened(tl.load(values_ptr + places, inside, other=0), WIDE)
            if f_ptr is not None:
                f = _widened(tl.load(f_ptr + places, inside, other=0), WIDE)
                if values_rest_ptr is not None:
                    values += _widened(tl.load(values_rest_ptr + places, inside, other=0), WIDE)
                    values = (values - f) * reciprocal
                    tilted = _tilted(values, x_ptr.dtype.element_ty)
                else:
                    values = _quotient(values - f, a + tl.zeros_like(values))
                    tilted = values
                x = _rounded(tilted, x_ptr.dtype.element_ty)
                tl.store(x_ptr + places, x, inside)
                if x_rest_ptr is not None:
                    tl.store(x_rest_ptr + places, _rest(values, x), inside)
                if values_rest_ptr is not None:
                    values = _widened(x, WIDE)
            if grad_out_ptr is not None:
                sums += grad_out * values
        if LAST:
            rows += ROWS
        else:
            columns += COLUMNS
    if sums_ptr is not None:
        if LAST:
            sums_ptr += down.to(tl.int64) * channels
            tl.store(sums_ptr + columns, tl.sum(sums, axis=0), columns < num_columns)
        else:
            sums_ptr += across.to(tl.int64) * num_rows
            tl.store(sums_ptr + rows, tl.sum(sums, axis=1), rows < num_rows)


class _Launch:
    """How a call on features is cut into programs: [B, C, ...], or of any rank without channels."""

    def __init__(self, like: Tensor, has_channels: bool = True, has_rests: bool = False) -> None:
        batch = like.shape[0] if like.dim() > 1 else 1
        channels = like.shape[1] if has_channels else 1
        places = like.numel() // max(batch * channels, 1)
        # one place: both layouts are the same, and rows of channels are longer
        last = has_channels and (is_channels_last(like) or places == 1)
        is_wide = has_rests or like.dtype is torch.float64
        num_rows, num_columns = (batch * places, channels) if last else (batch * channels, places)
        columns = min(triton.next_power_of_2(max(num_columns, 16)), _MAX_COLUMNS)
        block = _INTERPRETED_BLOCK if INTERPRETED else _BLOCK
        rows = max(block // columns, 1)
        steps = _STEPS if last else min(_STEPS, triton.cdiv(max(num_columns, 1), columns))
        down = triton.cdiv(num_rows, rows * (steps if last else 1))
        across = triton.cdiv(num_columns, columns * (1 if last else steps))
        self.grid = (down * across,)
        self.sizes = num_rows, num_columns, channels
        #: [P, C] of what programs sum up, and the dtype that they do it in.
        self.sums_shape = (down if last else across * batch, channels)
        self.sums_dtype = torch.float64 if is_wide else torch.float32
        self.options = {
            "WIDE": tl.float64 if is_wide else tl.float32,
            "LAST": last,
            "ROWS": rows,
            "COLUMNS": columns,
            "STEPS": steps,
        }


def reversible_step_forward(f: Tensor, x: Tensor, alpha: Tensor, out: Tensor) -> None:
    """Writes `out`; all features [B, C, ...] lie alike in memory."""
    _run_forward(_Launch(x), f, x, None, alpha, out, None)


def reversible_step_with_rest_forward(
    f: Tensor,
    x: Tensor,
    x_rest: Tensor | None,
    alpha: Tensor | None,
    out: Tensor,
    out_rest: Tensor,
) -> None:
    """Writes the last two; all features lie alike, dense, of any rank without alpha."""
    launch = _Launch(x, has_channels=alpha is not None, has_rests=True)
    _run_forward(launch, f, x, x_rest, alpha, out, out_rest)


def _run_forward(launch: _Launch, f: Tensor, *others: Tensor | None) -> None:
    """Runs the kernel on these operands, in its order."""
    if launch.grid[0] == 0:
        return
    with on_device_of(f):
        reversible_step_forward_kernel[launch.grid](f, *others, *launch.sizes, **launch.options)


def reversible_step_backward(
    grad_out: Tensor,
    values: Tensor | None,
    f: Tensor | None,
    alpha: Tensor,
    x: Tensor | None,
    grad_x: Tensor | None,
    grad_alpha: Tensor | None,
) -> None:
    """Writes the last three, where they are not None; all features lie alike in memory.

    `values`: the step's result, or, where f is None, its x, which grad_alpha needs.
    """
    operands = grad_out, values, None, f, alpha, x, None, grad_x
    _run_backward(_Launch(grad_out), operands, grad_alpha)


def reversible_step_with_rest_backward(
    grad_out: Tensor | None,
    out: Tensor,
    out_rest: Tensor,
    f: Tensor,
    alpha: Tensor | None,
    x: Tensor,
    x_rest: Tensor | None,
    grad_x: Tensor | None,
    grad_alpha: Tensor | None,
) -> None:
    """Writes the last four, where they are not None; all features lie as in the step.

    Both gradients are written, given grad_out and alpha, or none.
    """
    operands = grad_out, out, out_rest, f, alpha, x, x_rest, grad_x
    launch = _Launch(out, has_channels=alpha is not None, has_rests=True)
    _run_backward(launch, operands, grad_alpha)


def _run_backward(
    launch: _Launch, operands: tuple[Tensor | None, ...], grad_alpha: Tensor | None
) -> None:
    """Runs the kernel on these operands, in its order, and adds up what it sums."""
    like = next(operand for operand in operands if operand is not None)
    sums = None
    if grad_alpha is not None:
        sums = like.new_empty(launch.sums_shape, dtype=launch.sums_dtype)
    if launch.grid[0]:
        with on_device_of(like):
            reversible_step_backward_kernel[launch.grid](
                *operands, sums, *launch.sizes, **launch.options
            )
    if grad_alpha is not None and sums is not None:
        grad_alpha.copy_(sums.sum(dim=0).view(grad_alpha.shape))


def check_inputs(
    like: Tensor, f: Tensor | None, alpha: Tensor, values: Tensor | None = None
) -> None:
    """Refuses what would lead a kernel outside of memory, for callers of the registered op."""
    if like.dim() < 2:
        raise ValueError(f"grad_out: expected [B, C, ...], got shape {list(like.shape)}")
    for name, value in (("f", f), ("values", values)):
        if value is not None and value.shape != like.shape:
            raise ValueError(f"{name}: expected shape {list(like.shape)}, got {list(value.shape)}")
    if alpha.numel() != like.shape[1]:
        raise ValueError(
            f"alpha: expected C = {like.shape[1]} elements, got shape {list(alpha.shape)}"
        )
    for name, value in (("f", f), ("values", values), ("alpha", alpha)):
        if value is not None and value.device != like.device:
            raise ValueError(f"{name}: expected a tensor on {like.device}, got {value.device}")
