"""What several ops do with tensors: the dtype of sums, layouts in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that sums are held in: float64 where an operand has it, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def is_channels_last(x: Tensor) -> bool:
    """Whether x [B, C, ...] is contiguous with the channels last, and not as it stands."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def in_layout_of(x: Tensor, out: Tensor) -> Tensor:
    """`out`, of x's shape, contiguous with the channels last where x is so, else contiguous."""
    if is_channels_last(x):
        return out.movedim(1, -1).contiguous().movedim(-1, 1)
    return out.contiguous()


def laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    """`other`, of x's shape, with x's strides, but for those that do not matter."""
    if other.stride() == x.stride() or (other.is_contiguous() and x.is_contiguous()):
        return other
    return other.new_empty_strided(x.shape, x.stride()).copy_(other)
