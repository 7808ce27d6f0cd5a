"""Modules of decayed attention, for models that are written anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dispatch import is_plain_eager
from ...grid_linear import GridLinear, channels_first, is_plain_float
from ...plain_modules import are_watched, is_bare, is_depthwise
from .op import decayed_attention

#: How many grids a RelativePosition2d keeps tables for.
_MAX_GRIDS = 8


class GridPosition(NamedTuple):
    """What RelativePosition2d gives for a grid, and ManhattanSelfAttention takes."""

    rotation: tuple[Tensor, Tensor]  # sin and cos, each [h, w, D]
    log_decay: Tensor  # [H]


def log_decays(num_heads: int, initial_value: float, heads_range: float) -> Tensor:
    """log_decay [H], float32: of head i, log(1 - 2 ** -(initial_value + heads_range * i / H))."""
    slowest = min(initial_value, initial_value + heads_range * (num_heads - 1) / num_heads)
    if not slowest > 0:  # NaN too
        raise ValueError(
            "initial_value, heads_range: expected decays of less than 1, so exponents above 0 for "
            f"all heads, got {initial_value} and {heads_range}"
        )
    heads = torch.arange(num_heads, dtype=torch.float)
    return torch.log(1 - 2 ** (-initial_value - heads_range * heads / num_heads))


class WideBuffers(nn.Module):
    """A module whose buffers stay in float32 where a model is cast to a half type.

    Decays and angles are multiplied by distances and places: what is a rounding error in the factor
    is none in the product.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WideBuffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            wide = before[name]
            if buffer is not None and wide is not None and buffer.itemsize < 4 <= wide.itemsize:
                self._buffers[name] = wide.to(buffer.device, torch.float32)
        return self


class RelativePosition2d(WideBuffers):
    """Where tokens stand on a grid: angles that rotate q and k, and each head's decay per step.

    Token number n, counted row by row, is rotated by n * angle; head i decays by
    1 - 2 ** -(initial_value + heads_range * i / num_heads) a step.  The buffers are those of the
    official RetNetRelPos2d: ``angle`` [D] and ``decay`` [H], the logarithms.  They stay in float32
    in half-precision models.

    Args:
        embed_dim: channels of all heads.
        num_heads: heads; each needs an even number of channels.
        initial_value: how slow the first head decays.
        heads_range: how much slower the last heads decay.
    """

    angle: Tensor
    decay: Tensor

    def __init__(
        self, embed_dim: int, num_heads: int, initial_value: float, heads_range: float
    ) -> None:
        super().__init__()
        head_dim = _head_dim(embed_dim, num_heads)
        if head_dim % 2:
            raise ValueError(
                "embed_dim: expected an even number of channels a head, "
                f"got {embed_dim} for {num_heads} heads"
            )
        self.num_heads = num_heads
        self.initial_value = initial_value
        self.heads_range = heads_range
        angle = 1.0 / (10000 ** torch.linspace(0, 1, head_dim // 2))
        self.register_buffer("angle", angle.repeat_interleave(2))  # [D]
        self.register_buffer("decay", log_decays(num_heads, initial_value, heads_range))  # [H]
        #: By grid: the angles that tables were made of, their version, and the tables.
        self._tables: dict[tuple, tuple[Tensor, int, tuple[Tensor, Tensor]]] = {}

    def forward(self, height: int, width: int) -> GridPosition:
        """Sin and cos [height, width, D], and log_decay [H]."""
        return GridPosition(self._rotation(height, width), self.decay)

    def _rotation(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        if not is_plain_eager(self.angle):  # tables of a trace or a transform belong to it
            return self._make_tables(height, width)
        angle, key = self.angle, (height, width)
        version = 0 if angle.is_inference() else angle._version
        made_of, made_at, tables = self._tables.get(key, (None, 0, None))
        if tables is None or made_of is not angle or made_at != version:
            # not made in inference mode, so that training may use them too
            with torch.inference_mode(False), torch.no_grad():
                tables = self._make_tables(height, width)
            if angle.is_cuda and torch.cuda.is_current_stream_capturing():
                return tables  # in memory that the graph will overwrite
            self._tables.pop(key, None)
            for oldest in list(self._tables)[: 1 - _MAX_GRIDS]:
                self._tables.pop(oldest, None)
            self._tables[key] = angle, version, tables
        return tables

    def _make_tables(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        rows, columns = (torch.arange(size).to(self.angle) for size in (height, width))
        places = rows[:, None] * width + columns  # [h, w]
        turns = places[..., None] * self.angle  # [h, w, D]
        return turns.sin(), turns.cos()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RelativePosition2d:
        self._tables.clear()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: object) -> None:
        self._tables.clear()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_tables": {}}

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, initial_value={self.initial_value}, "
            f"heads_range={self.heads_range}"
        )


class DepthwiseConv2d(nn.Module):
    """A depthwise convolution of [B, h, w, C] that keeps the grid; its weights are ``conv``'s.

    Args:
        channels: C.
        kernel_size: odd.
        residual: whether the input is added to the output.
    """

    def __init__(self, channels: int, kernel_size: int, residual: bool = False) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=padding, groups=channels)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, C] -> [B, h, w, C]: in channels_last, a view each way."""
        grid = channels_first(x)
        if self.residual and self._is_as_made() and is_plain_float(x, self.conv.weight):
            out = self._convolve_with_residual(grid)
        else:
            out = self.conv(grid)
            out = out + grid if self.residual else out
        return out.permute(0, 2, 3, 1)

    def _convolve_with_residual(self, x: Tensor) -> Tensor:
        """The middle tap, grown by one, adds the input, without another pass over the tensor.

        In half types it would round the weight away.
        """
        conv = self.conv
        middle = F.pad(conv.weight.new_ones(1, 1, 1, 1), [conv.kernel_size[0] // 2] * 4)
        return F.conv2d(
            x, conv.weight + middle, conv.bias, padding=conv.padding, groups=conv.groups
        )

    def _is_as_made(self) -> bool:
        """Whether `conv` is what it was made as, with nobody who watches or overrides its call."""
        return is_depthwise(self.conv) and is_bare(self.conv) and not are_watched()


class ManhattanSelfAttention(nn.Module):
    """Multi-head self-attention over a grid [B, h, w, C], decayed by the Manhattan distance.

    A depthwise 5x5 convolution of the values is added to what attention gives.  The parameters are
    those of the official VisionRetentionAll and, with `axial`, VisionRetentionChunk:
    ``q_proj``, ``k_proj``, ``v_proj``, ``lepe.conv`` and ``out_proj``, weight and bias each.

    Args:
        embed_dim: channels C.
        num_heads: heads; must divide embed_dim.
        value_factor: the values have this many times as many channels.
        axial: whether attention goes along rows, then columns, or over the whole grid.
        learnable_decay: adds the parameter ``log_exponent`` [H], zero at first: each head's decay
            is that of the position to the power exp(log_exponent), so it stays between 0 and 1.

    Source: RMT (Fan et al., CVPR 2024), section 3.2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        value_factor: int = 1,
        axial: bool = False,
        learnable_decay: bool = False,
    ) -> None:
        super().__init__()
        _head_dim(embed_dim, num_heads)
        self.num_heads = num_heads
        self.axial = axial
        value_dim = embed_dim * value_factor
        self.q_proj = GridLinear(embed_dim, embed_dim)
        self.k_proj = GridLinear(embed_dim, embed_dim)
        self.v_proj = GridLinear(embed_dim, value_dim)
        self.lepe = DepthwiseConv2d(value_dim, 5)
        self.out_proj = GridLinear(value_dim, embed_dim)
        self.log_exponent = nn.Parameter(torch.zeros(num_heads)) if learnable_decay else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the official modules are initialised."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_normal_(projection.weight, gain=2**-2.5)
        nn.init.xavier_normal_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)
        if self.log_exponent is not None:
            nn.init.zeros_(self.log_exponent)

    def forward(self, x: Tensor, position: GridPosition) -> Tensor:
        """x [B, h, w, C], and RelativePosition2d's position of this grid -> [B, h, w, C]."""
        if x.dim() != 4:
            raise ValueError(f"x: expected [B, h, w, C], got shape {list(x.shape)}")
        rotation, log_decay = position
        if self.log_exponent is not None:
            log_decay = log_decay * self.log_exponent.exp()
        v = self.v_proj(x)  # [B, h, w, H Dv]
        q, k, heads = (self._heads(t) for t in (self.q_proj(x), self.k_proj(x), v))
        out = decayed_attention(q, k, heads, log_decay, axial=self.axial, rotation=rotation)
        return self.out_proj(out.permute(0, 2, 3, 1, 4).flatten(-2) + self.lepe(v))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, h, w, H D] -> [B, H, h, w, D], a view."""
        return x.unflatten(-1, (self.num_heads, -1)).permute(0, 3, 1, 2, 4)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, axial={self.axial}"


def _head_dim(embed_dim: int, num_heads: int) -> int:
    if num_heads < 1 or embed_dim % num_heads:
        raise ValueError(
            f"num_heads: expected a divisor of embed_dim = {embed_dim}, got {num_heads}"
        )
    return embed_dim // num_heads


__all__ = ["ManhattanSelfAttention", "RelativePosition2d"]
