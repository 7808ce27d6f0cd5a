"""What tests of mix-shift's extension functions hand them, on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from poison import moved
from torch import Tensor
from viops.cases import Draw
from viops.tensors import accumulation_dtype


class Inputs(NamedTuple):
    """Of all four functions."""

    x: Tensor  # [B, C, H, W]
    grad: Tensor  # [B, C, H, W], of y or of u
    weight_lr: Tensor  # [K]
    weight_td: Tensor | None
    bias: Tensor | None  # [C]
    kernels: list[int]
    shifts: list[int]
    norm_weight: Tensor | None  # [C]
    norm_bias: Tensor | None

    def wide(self) -> Inputs:
        """In float64."""
        return Inputs(*(v.double() if isinstance(v, Tensor) else v for v in self))

    def on(self, device: str) -> Inputs:
        """The same strides on the device."""
        return Inputs(*(moved(v, device) if isinstance(v, Tensor) else v for v in self))


def draw_inputs(
    shape: Sequence[int],
    kernels: Sequence[int],
    shifts: Sequence[int],
    laid_out: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    one_direction: bool,
    norm_weight: bool,
    norm_bias: bool,
) -> Inputs:
    """Such that results are about 1; `laid_out` changes the strides of x and grad."""
    draw, small = Draw(dtype, seed=1), Draw(accumulation_dtype(dtype), seed=2)
    channels = shape[1]
    sizes = [part.shape[0] for part in torch.zeros(channels).chunk(len(kernels))]

    def weights() -> Tensor:
        each = zip(sizes, kernels, strict=True)
        return torch.cat([small.normal(n * k * k) / k for n, k in each])

    return Inputs(
        laid_out(draw.normal(*shape)),
        laid_out(draw.normal(*shape)),
        weights(),
        None if one_direction else weights(),
        None if one_direction else small.normal(channels),
        list(kernels),
        list(shifts),
        small.normal(channels).abs() + 0.5 if norm_weight else None,
        small.normal(channels) if norm_bias else None,
    )
