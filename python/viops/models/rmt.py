"""RMT (Fan et al., CVPR 2024): vision transformers whose attention decays over the image grid.

Layout, sizes and names are those of the authors' classification models, so that their checkpoints
load: a stem, four stages of blocks with a 2x downsampling between them, and a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import checks
from ..drop_path import DropPath
from ..grid_linear import GridLinear
from ..ops.decayed_attention.module import (
    DepthwiseConv2d,
    GridPosition,
    ManhattanSelfAttention,
    RelativePosition2d,
)
from .backbone import Backbone
from .image_model import init_linear

#: Channels between the last stage and the classifier.
_HEAD_CHANNELS = 1024


@dataclass(frozen=True)
class Config:
    """One of RMT's sizes; each tuple has an entry for each stage."""

    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    heads_ranges: tuple[float, ...]
    mlp_ratios: tuple[int, ...]
    #: Whether attention goes along rows, then columns.
    axial: tuple[bool, ...]
    drop_path_rate: float
    initial_values: tuple[float, ...] = (2, 2, 2, 2)
    #: The value that the branches' learnt factors begin with; None is no factors.
    layer_scales: tuple[float | None, ...] = (None, None, None, None)


CONFIGS = {
    "rmt_t": Config(
        embed_dims=(64, 128, 256, 512),
        depths=(2, 2, 8, 2),
        num_heads=(4, 4, 8, 16),
        heads_ranges=(4, 4, 6, 6),
        mlp_ratios=(3, 3, 3, 3),
        axial=(True, True, False, False),
        drop_path_rate=0.1,
    ),
    "rmt_s": Config(
        embed_dims=(64, 128, 256, 512),
        depths=(3, 4, 18, 4),
        num_heads=(4, 4, 8, 16),
        heads_ranges=(4, 4, 6, 6),
        mlp_ratios=(4, 4, 3, 3),
        axial=(True, True, True, False),
        drop_path_rate=0.15,
    ),
    "rmt_b": Config(
        embed_dims=(80, 160, 320, 512),
        depths=(4, 8, 25, 8),
        num_heads=(5, 5, 10, 16),
        heads_ranges=(5, 5, 6, 6),
        mlp_ratios=(4, 4, 3, 3),
        axial=(True, True, True, False),
        drop_path_rate=0.4,
        layer_scales=(None, None, 1e-6, 1e-6),
    ),
    "rmt_l": Config(
        embed_dims=(112, 224, 448, 640),
        depths=(4, 8, 25, 8),
        num_heads=(7, 7, 14, 20),
        heads_ranges=(6, 6, 6, 6),
        mlp_ratios=(4, 4, 3, 3),
        axial=(True, True, True, False),
        drop_path_rate=0.5,
        layer_scales=(None, None, 1e-6, 1e-6),
    ),
}


class FeedForward(nn.Module):
    """Two linear layers with a depthwise 3x3 convolution, added to its input, between them."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = GridLinear(embed_dim, hidden_dim)
        self.fc2 = GridLinear(hidden_dim, embed_dim)
        self.dwconv = DepthwiseConv2d(hidden_dim, 3, residual=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, C] -> [B, h, w, C]."""
        x = F.gelu(self.fc1(x))
        return self.fc2(self.dwconv(x))


class Block(nn.Module):
    """A depthwise convolution for position, attention and feed-forward, each added to its input."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        hidden_dim: int,
        axial: bool,
        drop_path: float,
        layer_scale: float | None,
        learnable_decay: bool,
    ) -> None:
        super().__init__()
        self.retention_layer_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.retention = ManhattanSelfAttention(
            embed_dim, num_heads, axial=axial, learnable_decay=learnable_decay
        )
        self.drop_path = DropPath(drop_path)
        self.final_layer_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.ffn = FeedForward(embed_dim, hidden_dim)
        self.pos = DepthwiseConv2d(embed_dim, 3, residual=True)
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1, self.gamma_2 = (
                nn.Parameter(torch.full((1, 1, 1, embed_dim), layer_scale)) for _ in range(2)
            )

    def forward(self, x: Tensor, position: GridPosition) -> Tensor:
        """x [B, h, w, C] -> [B, h, w, C]."""
        x = self.pos(x)
        out = self.retention(self.retention_layer_norm(x), position)
        x = x + self.drop_path(_scaled(out, self.gamma_1))
        out = self.ffn(self.final_layer_norm(x))
        return x + self.drop_path(_scaled(out, self.gamma_2))


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else factor * x


class Downsample(nn.Module):
    """A strided convolution and a batch norm."""

    def __init__(self, embed_dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(embed_dim, out_dim, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, C] -> [B, ceil(h / 2), ceil(w / 2), out_dim]."""
        return self.norm(self.reduction(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class Stage(nn.Module):
    """Blocks on one grid; the downsampling after them is the model's to call."""

    def __init__(
        self, config: Config, index: int, drop_paths: Sequence[float], learnable_decay: bool
    ) -> None:
        super().__init__()
        embed_dim, num_heads = config.embed_dims[index], config.num_heads[index]
        self.grad_checkpointing = False
        self.Relpos = RelativePosition2d(
            embed_dim, num_heads, config.initial_values[index], config.heads_ranges[index]
        )
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                embed_dim * config.mlp_ratios[index],
                config.axial[index],
                drop_path,
                config.layer_scales[index],
                learnable_decay,
            )
            for drop_path in drop_paths
        )
        is_last = index == len(config.depths) - 1
        self.downsample = None if is_last else Downsample(embed_dim, config.embed_dims[index + 1])

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, C] -> [B, h, w, C]."""
        position = self.Relpos(*x.shape[1:3])
        for block in self.blocks:
            if self.grad_checkpointing:
                x = checkpoint(block, x, position, use_reentrant=False)
            else:
                x = block(x, position)
        return x


class Stem(nn.Module):
    """Four convolutions that make tokens of 4x4 pixels."""

    def __init__(self, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        half = embed_dim // 2
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, half, 3, stride=2, padding=1),
            nn.BatchNorm2d(half),
            nn.GELU(),
            nn.Conv2d(half, half, 3, padding=1),
            nn.BatchNorm2d(half),
            nn.GELU(),
            nn.Conv2d(half, embed_dim, 3, stride=2, padding=1),
            nn.BatchNorm2d(embed_dim),
            nn.GELU(),
            nn.Conv2d(embed_dim, embed_dim, 3, padding=1),
            nn.BatchNorm2d(embed_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_chans, H, W] -> [B, ceil(H / 4), ceil(W / 4), C], contiguous."""
        x = x.contiguous(memory_format=torch.channels_last)
        return self.proj(x).permute(0, 2, 3, 1).contiguous()


class RMT(Backbone):
    """RMT for classification and as a backbone.

    Images may have any size.  The state_dict has the keys of the authors' VisRetNet.

    Args:
        config: the size, one of `CONFIGS`.
        num_classes: of the classifier; 0 is none.
        in_chans: channels of the images.
        drop_rate: of the dropout before the classifier.
        drop_path_rate: that of the last block, rising from 0 in the first; None is the config's.
        learnable_decay: as in viops.nn.ManhattanSelfAttention.
        global_pool: "avg", as timm names the only one there is.
    """

    def __init__(
        self,
        config: Config,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float | None = None,
        learnable_decay: bool = False,
        global_pool: str = "avg",
    ) -> None:
        if drop_path_rate is not None:
            config = replace(config, drop_path_rate=drop_path_rate)
        super().__init__(config, num_classes, _HEAD_CHANNELS, drop_rate, global_pool)
        checks.check_int("in_chans", in_chans, 1, None, "")
        self.patch_embed = Stem(in_chans, config.embed_dims[0])
        self.layers = nn.ModuleList(
            Stage(config, i, of_stage, learnable_decay)
            for i, of_stage in enumerate(self._drop_paths())
        )
        self.proj: nn.Module = GridLinear(config.embed_dims[-1], _HEAD_CHANNELS)
        self.norm: nn.Module = nn.BatchNorm2d(_HEAD_CHANNELS)
        self.head = self._make_head()
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimizer is to leave without weight decay: those of the decays."""
        return {name for name, _ in self.named_parameters() if name.endswith("log_exponent")}

    def _after_stages(self) -> tuple[str, ...]:
        return "proj", "norm"

    def _features(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.proj(x).permute(0, 3, 1, 2)))


def rmt_t(**options: Any) -> RMT:
    """RMT-T: 14 M parameters, axial attention in the first two stages; options are RMT's."""
    return RMT(CONFIGS["rmt_t"], **options)


def rmt_s(**options: Any) -> RMT:
    """RMT-S: 27 M parameters, axial attention in the first three stages; options are RMT's."""
    return RMT(CONFIGS["rmt_s"], **options)


def rmt_b(**options: Any) -> RMT:
    """RMT-B: 54 M parameters, axial attention in the first three stages; options are RMT's."""
    return RMT(CONFIGS["rmt_b"], **options)


def rmt_l(**options: Any) -> RMT:
    """RMT-L: 95 M parameters, axial attention in the first three stages; options are RMT's."""
    return RMT(CONFIGS["rmt_l"], **options)
