"""Linear layers over the channels of a grid, by whichever of torch's libraries is faster."""

from __future__ import annotations

import platform
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dispatch import is_plain_eager
from .plain_modules import are_watched, is_bare

_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
#: Of smaller batches torch's convolutions are not oneDNN's on one thread.
_MIN_BATCH_OF_ONE_THREAD = 16


def grid_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [B, h, w, C], weight [O, C], bias [O] or None -> [B, h, w, O], contiguous where x is.

    On x86 CPUs, in float32 and in plain eager mode, it runs as a convolution of size 1, which
    is oneDNN's.  The product that torch takes for nn.Linear is MKL's, which was half as fast on an
    AMD processor with AVX-512; on Intel's it has not been measured.
    """
    if not _runs_on_onednn(x, weight):
        return F.linear(x, weight, bias)
    return F.conv2d(channels_first(x), weight[:, :, None, None], bias).permute(0, 2, 3, 1)


def _runs_on_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        _IS_X86
        and x.dim() == 4
        and x.numel() > 0
        and x.dtype is torch.float32
        and is_plain_float(x, weight)
        and is_plain_eager(x, weight)
        and torch._C._get_mkldnn_enabled()
        # else torch's own convolution, on MKL's product
        and (torch.get_num_threads() > 1 or x.shape[0] >= _MIN_BATCH_OF_ONE_THREAD)
    )


def is_plain_float(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's CPU convolutions of these are as exact as its products and sums."""
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype is weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
    )


def channels_first(x: Tensor) -> Tensor:
    """[B, h, w, C] -> [B, C, h, w], in channels_last: a view where x is contiguous."""
    return x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


class GridLinear(nn.Linear):
    """nn.Linear over the channels of a grid [B, h, w, C], by `grid_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, in_features] -> [B, h, w, out_features]."""
        return grid_linear(x, self.weight, self.bias)


def is_read(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `call_linear` reads the layer's weight and bias, and does not call it."""
    return type(layer) is nn.Linear and is_bare(layer) and not are_watched()


def call_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's result for x [B, h, w, C]; torch's own Linear is read, not called."""
    if is_read(layer):
        return grid_linear(x, layer.weight, layer.bias)
    return layer(x)
