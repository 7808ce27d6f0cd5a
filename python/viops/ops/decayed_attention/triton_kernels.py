"""Launches the Triton kernels of decayed_attention.

Whole, or with a line of more than 64 tokens: triton_blocks.py; axial and short: triton_lines.py.
What is compiled follows from head sizes, dtype, strides' alignment and, on short lines, the powers
of two that h and w fit into; a new batch or grid compiles nothing else.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from ...tensors import accumulation_dtype
from ...triton_runtime import INTERPRETED, on_device_of
from . import triton_blocks as blocks
from . import triton_lines as lines
from .triton_tiles import COLUMNS, ROWS, WHOLE

#: Tokens of a line, at most, that are one tile, and bytes of a token's channels.
_MAX_SHORT = 64
_MAX_SHORT_BYTES = 256
#: Tokens of a block and its bytes, at most, by the size of an element: the products of wide ones do
#: not run on tensor cores, and hold whole rows in registers.
_BLOCK_TOKENS = {2: 64, 4: 32, 8: 32}
_BLOCK_BYTES = {2: 16384, 4: 4096, 8: 8192}
#: Half types' where a block of threads has less shared memory than an A100's or an H100's.
_SMALL_BLOCK_BYTES = 8192
_LARGE_SHARED_BYTES = 160 << 10
#: Tokens of a tile of short lines.
_LINES_TOKENS = 64
#: Bytes of a token's channels for each warp of a block.
_FORWARD_WARP_BYTES = 16
_BACKWARD_WARP_BYTES = 8
#: The interpreter takes its time by the operation, not by the element.
_INTERPRETED_TOKENS = 256
#: Programs a multiprocessor that one launch for both passes needs to be worth it: a program goes
#: through all lines of a head, one after another, and others have to fill its waits.
_PROGRAMS_A_MULTIPROCESSOR = 2


def decayed_attention_forward(
    q: Tensor,  # [B, H, h, w, D]
    k: Tensor,
    v: Tensor,  # [B, H, h, w, Dv]
    log_decay: Tensor,  # [B, H]
    sin: Tensor | None,  # [B, 1, h, w, D]
    cos: Tensor | None,
    axial: bool,
    scale: float,
    out: Tensor,  # [B, H, h, w, Dv], laid out as [B, h, w, H, Dv]
    logsumexp: Tensor,  # [B, P, H, h, w]
    inner: Tensor,  # as out, where axial
) -> None:
    """Writes the last three."""
    if q.shape[0] == 0:
        return
    sin, cos, rotation_stride, options = _options(q, v, log_decay, sin, cos)
    inputs = log_decay, sin, cos
    strides = q.stride(), k.stride()
    decay_strides = _decay_strides(log_decay)
    sizes = q.shape[1:4]
    options.update(_warps(q, v, _FORWARD_WARP_BYTES))
    with on_device_of(q):
        if axial and _is_short(q, v):
            for grid, passes in _launches(q):
                lines.decayed_attention_lines_forward_kernel[grid](
                    q,
                    k,
                    v,
                    *inputs,
                    out,
                    logsumexp,
                    inner,
                    *strides,
                    v.stride(),
                    decay_strides,
                    rotation_stride,
                    *sizes,
                    scale,
                    **options,
                    **passes,
                    **_short(q),
                )
            return
        values = v
        for number, form in enumerate((ROWS, COLUMNS) if axial else (WHOLE,)):
            result = inner if form is ROWS else out
            launch, block = _blocks(q, v, form)
            blocks.decayed_attention_blocks_forward_kernel[launch](
                q,
                k,
                values,
                *inputs,
                result,
                logsumexp[:, number],
                *strides,
                values.stride(),
                decay_strides,
                rotation_stride,
                logsumexp.stride(0),
                *sizes,
                scale,
                **options,
                **block,
            )
            values = result


def decayed_attention_backward(
    grad_out: Tensor,  # [B, H, h, w, Dv]
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
    grad_q: Tensor,  # these three laid out as [B, h, w, H, C]
    grad_k: Tensor,
    grad_v: Tensor,
    grad_log_decay: Tensor | None,  # [B, H]
) -> None:
    """Writes the last four."""
    if q.shape[0] == 0:
        return
    inputs = q, k, v, log_decay
    rotation = _options(q, v, log_decay, sin, cos)
    rotation[-1].update(_warps(q, v, _BACKWARD_WARP_BYTES))
    saved = _laid_out(out), logsumexp.contiguous(), _laid_out(inner)
    grads = grad_q, grad_k, grad_v
    run = _backward_lines if axial and _is_short(q, v) else _backward_blocks
    with on_device_of(q):
        sums = run(grad_out, inputs, rotation, saved, axial, scale, grads, grad_log_decay)
    if grad_log_decay is not None and sums is not None:
        torch.sum(sums, dim=2, out=grad_log_decay)


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, sin: Tensor | None, cos: Tensor | None
) -> None:
    """Refuses what would lead a kernel outside of memory, for callers of the registered op."""
    if q.dim() != 5 or 0 in q.shape[1:]:
        raise ValueError(f"q: expected [B, H, h, w, D], none but B zero, got {list(q.shape)}")
    if v.dim() != 5 or v.shape[4] == 0:
        raise ValueError(f"v: expected [B, H, h, w, Dv], Dv of at least 1, got {list(v.shape)}")
    batch, num_heads, height, width, head_dim = q.shape
    wide = accumulation_dtype(q.dtype)
    _check("k", k, q.shape, q.dtype, q.device)
    _check("v", v, (*q.shape[:4], v.shape[4]), q.dtype, q.device)
    _check("log_decay", log_decay, (batch, num_heads), wide, q.device)
    if (sin is None) != (cos is None):
        raise TypeError(f"{'sin' if sin is None else 'cos'}: expected a tensor, as the other is")
    for name, tensor in (("sin", sin), ("cos", cos)):
        if tensor is not None:
            _check(name, tensor, (batch, 1, height, width, head_dim), wide, q.device)
    if sin is not None and head_dim % 2:
        raise ValueError(f"q: expected an even D for a rotation, got {list(q.shape)}")


def check_results(
    grad_out: Tensor,
    q: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    inner: Tensor,
    axial: bool,
) -> None:
    """The same for what backward gets besides forward's inputs, which have been checked."""
    batch, num_heads, height, width, channels = v.shape
    _check("grad_out", grad_out, v.shape, q.dtype, q.device)
    _check("out", out, v.shape, q.dtype, q.device)
    shape = batch, 1 + axial, num_heads, height, width
    _check("logsumexp", logsumexp, shape, accumulation_dtype(q.dtype), q.device)
    shape = batch, num_heads, height if axial else 0, width, channels
    _check("inner", inner, shape, q.dtype, q.device)


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {tensor.device}")


def _backward_blocks(
    grad_out: Tensor,
    inputs: tuple[Tensor, ...],
    rotation: tuple,
    saved: tuple[Tensor, ...],
    axial: bool,
    scale: float,
    grads: tuple[Tensor, ...],
    grad_log_decay: Tensor | None,
) -> Tensor | None:
    """Two launches a pass; returns the gradients to log_decay [B, H, programs of a head]."""
    q, k, v, log_decay = inputs
    sin, cos, rotation_stride, options = rotation
    out, logsumexp, inner = saved
    grad_q, grad_k, grad_v = grads
    batch, num_heads, height, width, _ = q.shape
    share, delta = logsumexp.new_empty(2, batch, num_heads, height, width)
    others: tuple[Tensor | None, ...] = (None, None)
    sums = []
    for number, form in reversed(list(enumerate((ROWS, COLUMNS) if axial else (WHOLE,)))):
        grid, block = _blocks(q, v, form)
        last = number == 0
        values = v if last else inner
        result = inner if form is ROWS else out
        grad_decay = None
        if grad_log_decay is not None:
            grad_decay = logsumexp.new_empty(batch, num_heads, grid[0] // (batch * num_heads))
            sums.append(grad_decay)
        targets = (grad_q, grad_k) if last else (_partial(q), _partial(q))
        grad_values = grad_v if last else torch.empty_like(inner)
        tensors = grad_out, q, k, values, log_decay, sin, cos
        strides = grad_out.stride(), q.stride(), k.stride(), values.stride()
        rest = (
            _decay_strides(log_decay),
            rotation_stride,
            logsumexp.stride(0),
            *q.shape[1:4],
            scale,
        )
        blocks.decayed_attention_blocks_backward_q_kernel[grid](
            *tensors,
            result,
            logsumexp[:, number],
            share,
            delta,
            others[0],
            targets[0],
            grad_decay,
            *strides,
            result.stride(),
            *rest,
            **options,
            **block,
            LAST=last,
        )
        blocks.decayed_attention_blocks_backward_kv_kernel[grid](
            *tensors,
            logsumexp[:, number],
            share,
            delta,
            others[1],
            targets[1],
            grad_values,
            *strides,
            *rest,
            **options,
            **block,
            LAST=last,
        )
        grad_out, others = grad_values, targets
    return torch.cat(sums, dim=2) if sums else None


def _backward_lines(
    grad_out: Tensor,
    inputs: tuple[Tensor, ...],
    rotation: tuple,
    saved: tuple[Tensor, ...],
    axial: bool,
    scale: float,
    grads: tuple[Tensor, ...],
    grad_log_decay: Tensor | None,
) -> Tensor | None:
    """One launch, or one a pass; returns the gradients to log_decay [B, H, programs of a head]."""
    q, k, v, log_decay = inputs
    sin, cos, rotation_stride, options = rotation
    _, logsumexp, inner = saved
    partials = _partial(q), _partial(q), torch.empty_like(inner)
    strides = (t.stride() for t in (grad_out, q, k, v))
    arguments = *strides, _decay_strides(log_decay), rotation_stride, *q.shape[1:4], scale
    sums = []
    for grid, passes in reversed(_launches(q)):
        grad_decay = None
        if grad_log_decay is not None:
            grad_decay = logsumexp.new_empty(*q.shape[:2], grid[1])
            sums.append(grad_decay)
        lines.decayed_attention_lines_backward_kernel[grid](
            grad_out,
            *inputs,
            sin,
            cos,
            logsumexp,
            inner,
            *partials,
            *grads,
            grad_decay,
            *arguments,
            **options,
            **passes,
            **_short(q),
        )
    return torch.cat(sums, dim=2) if sums else None


def _laid_out(x: Tensor) -> Tensor:
    """[B, H, h, w, C] laid out as [B, h, w, H, C]: itself, where forward made it."""
    return x.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4)


def _partial(q: Tensor) -> Tensor:
    """Where a pass leaves its sums for the next one, laid out likewise: [B, H, h, w, D]."""
    batch, num_heads, height, width, channels = q.shape
    dtype = accumulation_dtype(q.dtype)
    place = q.new_empty(batch, height, width, num_heads, channels, dtype=dtype)
    return place.permute(0, 3, 1, 2, 4)


def _options(
    q: Tensor, v: Tensor, log_decay: Tensor, sin: Tensor | None, cos: Tensor | None
) -> tuple[Tensor, Tensor, int, dict[str, Any]]:
    """sin, cos, the stride of their batch, and what every kernel is compiled for."""
    head_dim, value_dim = q.shape[4], v.shape[4]
    options = {
        "ROTATED": sin is not None,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),  # the least that tl.dot takes
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
    }
    if sin is None or cos is None:
        return log_decay, log_decay, 0, options  # never read
    if q.shape[0] == 1 or sin.stride(0) == cos.stride(0) == 0:  # of one image, for all
        return sin[0].contiguous(), cos[0].contiguous(), 0, options
    sin, cos = sin.contiguous(), cos.contiguous()
    return sin, cos, sin.stride(0), options


def _decay_strides(log_decay: Tensor) -> tuple[int, int]:
    """Those of [B, H], the first one zero for one image too: another one compiles anew."""
    batch_stride, head_stride = log_decay.stride()
    return (0 if log_decay.shape[0] == 1 else batch_stride), head_stride


def _is_short(q: Tensor, v: Tensor) -> bool:
    """Whether lines are one tile each, and registers and shared memory hold that."""
    return max(q.shape[2:4]) <= _MAX_SHORT and _row_bytes(q, v) <= _MAX_SHORT_BYTES


def _row_bytes(q: Tensor, v: Tensor) -> int:
    """Bytes of a token's channels, padded, of q or of v."""
    return triton.next_power_of_2(max(q.shape[4], v.shape[4])) * q.element_size()


def _blocks(q: Tensor, v: Tensor, form: Any) -> tuple[tuple[int], dict[str, Any]]:
    """How a launch cuts lines into blocks: by D, Dv, dtype and the GPU's shared memory alone."""
    batch, num_heads, height, width, _ = q.shape
    length, count = {
        WHOLE: (height * width, 1),
        ROWS: (width, height),
        COLUMNS: (height, width),
    }[form]
    size = q.element_size()
    is_small = _shared_bytes(q.device) < _LARGE_SHARED_BYTES
    most = _SMALL_BLOCK_BYTES if size == 2 and is_small else _BLOCK_BYTES[size]
    block = max(16, min(_BLOCK_TOKENS[size], most // _row_bytes(q, v)))
    if INTERPRETED:
        block = max(16, min(_INTERPRETED_TOKENS, triton.next_power_of_2(length)))
    grid = (batch * num_heads * count * triton.cdiv(length, block),)
    num_stages = 1 if size == 8 and is_small else 2
    return grid, {"BLOCK": block, "FORM": form, "num_stages": num_stages}


def _short(q: Tensor) -> dict[str, int]:
    """How a launch cuts a grid into tiles of whole lines."""
    height, width = q.shape[2:4]
    tile = {"num_stages": 1}  # tiles under way for the next turn would spill registers
    tokens = _INTERPRETED_TOKENS * 4 if INTERPRETED else _LINES_TOKENS
    for name, length in (("ROW", width), ("COLUMN", height)):
        tile[f"{name}_LENGTH"] = max(16, triton.next_power_of_2(length))
        tile[f"{name}S"] = tokens // tile[f"{name}_LENGTH"]
    return tile


def _warps(q: Tensor, v: Tensor, bytes_a_warp: int) -> dict[str, int]:
    """As many as keep tiles of this many channels in registers."""
    return {"num_warps": min(max(_row_bytes(q, v) // bytes_a_warp, 4), 8)}


def _launches(q: Tensor) -> list[tuple[tuple[int, int], dict[str, bool]]]:
    """The grids of forward's launches, each with the passes that it does."""
    heads = q.shape[0] * q.shape[1]
    if heads >= _PROGRAMS_A_MULTIPROCESSOR * _num_multiprocessors(q.device):
        return [((heads, 1), {"ALONG": True, "ACROSS": True})]
    short = _short(q)
    parts = [triton.cdiv(q.shape[2], short["ROWS"]), triton.cdiv(q.shape[3], short["COLUMNS"])]
    return [
        ((heads, parts[0]), {"ALONG": True, "ACROSS": False}),
        ((heads, parts[1]), {"ALONG": False, "ACROSS": True}),
    ]


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    """Zero where kernels are interpreted or compiled alone: one launch then."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """What a block of threads may have; as on an H100 where kernels are interpreted or compiled."""
    if device.type != "cuda":
        return _LARGE_SHARED_BYTES
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return properties["max_shared_mem"]
