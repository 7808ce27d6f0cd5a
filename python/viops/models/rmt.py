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

from ..ops.decayed_attention.module import (
    DepthwiseConv2d,
    GridLinear,
    GridPosition,
    ManhattanSelfAttention,
    RelativePosition2d,
)

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


class DropPath(nn.Module):
    """In training, drops a branch for each image with this probability, and scales what stays."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] -> [B, ...]."""
        if not self.training or self.probability == 0:
            return x
        keep = 1 - self.probability
        kept = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep)
        return x * (kept / keep if keep > 0 else kept)

    def extra_repr(self) -> str:
        return f"probability={self.probability:.3g}"


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


class RMT(nn.Module):
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
        super().__init__()
        _check_pool(global_pool)
        if drop_path_rate is not None:
            config = replace(config, drop_path_rate=drop_path_rate)
        self.config = config
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = _HEAD_CHANNELS  # timm's names
        #: What timm asks of a backbone: for each stage its channels, stride and name.
        self.feature_info = [
            {"num_chs": channels, "reduction": 4 * 2**i, "module": f"layers.{i}"}
            for i, channels in enumerate(config.embed_dims)
        ]
        self.patch_embed = Stem(in_chans, config.embed_dims[0])
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu")
        self.layers: Any = nn.ModuleList(
            Stage(config, i, of_stage.tolist(), learnable_decay)
            for i, of_stage in enumerate(rates.split(config.depths))
        )
        self.proj: nn.Module = GridLinear(config.embed_dims[-1], _HEAD_CHANNELS)
        self.norm: nn.Module = nn.BatchNorm2d(_HEAD_CHANNELS)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head()
        self.apply(_init_linear)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> [B, 1024, ceil(H / 32), ceil(W / 32)], before pooling."""
        return self._project(self._stages(x)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What forward_features gives -> logits [B, num_classes], or pooled [B, 1024]."""
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.head(self.head_drop(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The stages' outputs, each [B, C, h, w] ("NCHW") or [B, h, w, C] ("NHWC").

        Args:
            x: images [B, in_chans, H, W].
            indices: which stages, counted from 0 or, below 0, from the end; a number is the last so
                many, None is all.
            norm: must be False: RMT has no norm after a stage.
            stop_early: whether no stage after the last one taken runs.
            output_fmt: the layout.
            intermediates_only: whether the list alone is returned, without what forward_features
                gives before it; `stop_early` needs it where the last stage is not taken.
        """
        if norm:
            raise ValueError("norm: expected False, for RMT has no norm after a stage, got True")
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NHWC', got {output_fmt!r}")
        take = self._take(indices)
        outputs = self._stages(x, 1 + max(take) if stop_early else len(self.layers))
        taken = [
            stage.permute(0, 3, 1, 2) if output_fmt == "NCHW" else stage
            for stage in (outputs[i] for i in take)
        ]
        if intermediates_only:
            return taken
        return self._project(outputs[-1]), taken

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Takes out the stages after the last of `indices`; returns the places of those named."""
        take = self._take(indices)
        self.layers = self.layers[: 1 + max(take)]
        self.layers[-1].downsample = None
        if prune_norm or len(self.layers) < len(self.config.depths):
            self.proj, self.norm = nn.Identity(), nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return take

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for so many classes; 0 is none."""
        _check_pool("avg" if global_pool is None else global_pool)
        self.num_classes = num_classes
        self.head = self._make_head().to(next(self.parameters()))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps the inputs of blocks alone and runs each again in backward."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimizer is to leave without weight decay: those of the decays."""
        return {name for name, _ in self.named_parameters() if name.endswith("log_exponent")}

    def _stages(self, x: Tensor, count: int | None = None) -> list[Tensor]:
        """The outputs of the first `count` stages, each [B, h, w, C]."""
        x = self.patch_embed(x)
        outputs: list[Tensor] = []
        for stage in self.layers[:count]:
            outputs.append(stage(x))
            if stage.downsample is not None and len(outputs) != count:
                x = stage.downsample(outputs[-1])
        return outputs

    def _project(self, x: Tensor) -> Tensor:
        """[B, h, w, C] of the last stage -> [B, 1024, h, w]."""
        return F.silu(self.norm(self.proj(x).permute(0, 3, 1, 2)))

    def _take(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.layers)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            indices = range(count - indices, count)
        places = sorted(i + count if i < 0 else i for i in indices)
        if not places or any(not 0 <= place < count for place in places):
            raise ValueError(f"indices: expected some of the {count} stages, got {indices!r}")
        return places

    def _make_head(self) -> nn.Module:
        return nn.Linear(_HEAD_CHANNELS, self.num_classes) if self.num_classes else nn.Identity()


def _check_pool(global_pool: str) -> None:
    if global_pool != "avg":
        raise ValueError(f"global_pool: expected 'avg', got {global_pool!r}")


def _init_linear(module: nn.Module) -> None:
    """As the authors' models are initialised; other layers keep torch's values."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


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
