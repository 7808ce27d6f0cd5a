"""MS-MLP (Zheng et al., arXiv:2202.06510): models that mix by shifts and depthwise convolutions.

Layout, sizes and names are those of the authors' classification models, so that their checkpoints
load: a patch embedding, four stages of blocks with a 2x downsampling between them, and a head.
Activations lie in channels_last from the images on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import checks
from ..ops.mix_shift.module import MixShiftBlock
from .backbone import Backbone
from .image_model import check_images, init_linear

#: Side of the squares of pixels that the first stage has for places.
_PATCH = 4


@dataclass(frozen=True)
class Config:
    """One of MS-MLP's sizes; depths and mix_sizes have an entry for each stage."""

    embed_dim: int
    depths: tuple[int, ...]
    drop_path_rate: float
    #: How far each group of channels is rolled.
    shift_dist: tuple[int, ...] = (-2, -1, 0, 1, 2)
    #: For each stage the side of each group's filters.
    mix_sizes: tuple[tuple[int, ...], ...] = (
        (1, 1, 3, 5, 7),
        (1, 3, 3, 5, 7),
        (1, 5, 5, 5, 7),
        (1, 7, 7, 7, 7),
    )
    mlp_ratio: float = 4.0
    #: The value that the branches' learnt factors begin with; 0 is no factors.
    layer_scale: float = 1e-6

    @property
    def embed_dims(self) -> tuple[int, ...]:
        return tuple(self.embed_dim * 2**i for i in range(len(self.depths)))


CONFIGS = {
    "ms_mlp_t": Config(embed_dim=96, depths=(3, 3, 9, 3), drop_path_rate=0.1),
    "ms_mlp_s": Config(embed_dim=96, depths=(3, 3, 27, 3), drop_path_rate=0.4),
    "ms_mlp_b": Config(embed_dim=128, depths=(3, 3, 27, 3), drop_path_rate=0.5),
}


class PatchEmbed(nn.Module):
    """A convolution of squares that do not overlap, and a norm of its channels."""

    def __init__(self, in_chans: int, embed_dim: int, side: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, side, stride=side)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_chans, H, W], channels_last -> [B, H / side, W / side, embed_dim]."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Stem(PatchEmbed):
    """The patch embedding of images."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_chans, H, W] -> [B, H / side, W / side, embed_dim]."""
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class Downsample(PatchEmbed):
    """The patch embedding of what a stage gives."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, in_chans] -> [B, h / side, w / side, embed_dim]."""
        return super().forward(x.permute(0, 3, 1, 2))


class Stage(nn.Module):
    """Blocks on one grid; the downsampling after them is the model's to call."""

    def __init__(self, config: Config, index: int, drop_paths: Sequence[float]) -> None:
        super().__init__()
        embed_dim = config.embed_dims[index]
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(
            MixShiftBlock(
                embed_dim,
                config.shift_dist,
                config.mix_sizes[index],
                config.mlp_ratio,
                config.layer_scale,
                drop_path,
            )
            for drop_path in drop_paths
        )
        is_last = index == len(config.depths) - 1
        self.downsample = None if is_last else Downsample(embed_dim, 2 * embed_dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, C] -> [B, h, w, C]."""
        x = x.permute(0, 3, 1, 2)
        for block in self.blocks:
            if self.grad_checkpointing:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x.permute(0, 2, 3, 1)


class MSMLP(Backbone):
    """MS-MLP for classification and as a backbone.

    Images may have any height and width that 32 divides.  The state_dict has the keys of the
    authors' MS_MLP.

    Args:
        config: the size, one of `CONFIGS`.
        num_classes: of the classifier; 0 is none.
        in_chans: channels of the images.
        drop_rate: of the dropout before the classifier.
        drop_path_rate: that of the last block, rising from 0 in the first; None is the config's.
        global_pool: "avg", as timm names the only one there is.
    """

    def __init__(
        self,
        config: Config,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float | None = None,
        global_pool: str = "avg",
    ) -> None:
        if drop_path_rate is not None:
            config = replace(config, drop_path_rate=drop_path_rate)
        super().__init__(config, num_classes, config.embed_dims[-1], drop_rate, global_pool)
        self.in_chans = checks.check_int("in_chans", in_chans, 1, None, "")
        self.patch_embed = Stem(in_chans, config.embed_dim, _PATCH)
        self.layers = nn.ModuleList(
            Stage(config, i, of_stage) for i, of_stage in enumerate(self._drop_paths())
        )
        self.norm: nn.Module = nn.LayerNorm(self.num_features, eps=1e-6)
        self.head = self._make_head()
        self.apply(init_linear)

    def _after_stages(self) -> tuple[str, ...]:
        return ("norm",)

    def _stages(self, x: Tensor, count: int | None = None) -> list[Tensor]:
        check_images(x, self.in_chans, _PATCH * 2 ** (len(self.layers) - 1))
        return super()._stages(x, count)

    def _pool(self, x: Tensor) -> Tensor:
        return self.norm(super()._pool(x))


def ms_mlp_t(**options: Any) -> MSMLP:
    """MS-MLP-T: 28 M parameters, 18 blocks; options are MSMLP's."""
    return MSMLP(CONFIGS["ms_mlp_t"], **options)


def ms_mlp_s(**options: Any) -> MSMLP:
    """MS-MLP-S: 50 M parameters, 36 blocks; options are MSMLP's."""
    return MSMLP(CONFIGS["ms_mlp_s"], **options)


def ms_mlp_b(**options: Any) -> MSMLP:
    """MS-MLP-B: 88 M parameters, 36 wider blocks; options are MSMLP's."""
    return MSMLP(CONFIGS["ms_mlp_b"], **options)
