"""RevCol (Cai et al., arXiv:2212.11696): columns of ConvNeXt's blocks, each fed by the one before.

Layout, sizes and names are those of the authors' FullNet and RevColHuge, so that their checkpoints
load: a stem, columns of four levels with a 2x downsampling between them, and one classifier on the
last column or, under intermediate supervision, four classifiers and three decoders on every
quarter's last column.  Activations lie in channels_last from the images on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..grid_linear import call_linear
from ..ops.mix_shift.module import ConvNeXtBlock
from ..ops.reversible_columns.module import ReversibleColumn, ReversibleColumns
from .image_model import ImageModel, check_images, init_layer

_EPS = 1e-6  # of all norms
#: Side of the squares of pixels that the first level has for places.
_PATCH = 4
#: Columns with a classifier under intermediate supervision; all but the last have a decoder.
_NUM_TAPS = 4
#: Models of more classes decode images by one convolution.
_MOST_CLASSES_OF_DECODER = 1000


@dataclass(frozen=True)
class Config:
    """One of RevCol's sizes; embed_dims and depths have an entry for each level."""

    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_columns: int
    drop_path_rate: float
    kernel_size: int = 3
    #: Whether the first level takes the previous column's last level too, as that of RevCol-H does.
    from_last: bool = False


CONFIGS = {
    "revcol_t": Config((64, 128, 256, 512), (2, 2, 4, 2), 4, 0.1),
    "revcol_s": Config((64, 128, 256, 512), (2, 2, 4, 2), 8, 0.3),
    "revcol_b": Config((72, 144, 288, 576), (1, 1, 3, 2), 16, 0.4),
    "revcol_l": Config((128, 256, 512, 1024), (1, 2, 6, 2), 8, 0.5),
    "revcol_xl": Config((224, 448, 896, 1792), (1, 2, 6, 2), 8, 0.5),
    "revcol_h": Config((360, 720, 1440, 2880), (1, 2, 6, 2), 8, 0.5, from_last=True),
}


class ChannelNorm(nn.LayerNorm):
    """Layer norm of the channels of each place."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C, h, w], a view of [B, h, w, C]."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _patches(in_channels: int, out_channels: int, side: int) -> nn.Sequential:
    """A convolution of squares that do not overlap, and a norm of its channels."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, side, stride=side), ChannelNorm(out_channels)
    )


class Upsample(nn.Module):
    """A linear layer, a norm and as many equal places as the finer grid has for each."""

    def __init__(self, in_channels: int, out_channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.channel_reschedule = nn.Sequential(
            nn.Linear(in_channels, out_channels), nn.LayerNorm(out_channels, eps=_EPS)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, h, w] -> [B, out_channels, factor * h, factor * w]."""
        linear, norm = self.channel_reschedule
        x = norm(call_linear(linear, x.permute(0, 2, 3, 1)))
        return F.interpolate(x.permute(0, 3, 1, 2), scale_factor=self.factor, mode="nearest")


class Fusion(nn.Module):
    """The sum of what a level takes: the level below it, and the previous column's above it."""

    def __init__(self, config: Config, level: int, is_first_column: bool) -> None:
        super().__init__()
        dims, last = config.embed_dims, len(config.embed_dims) - 1
        self.down = _patches(dims[level - 1], dims[level], 2) if level else nn.Identity()
        self.up = self.up2 = None
        if not is_first_column and level < last:
            self.up = Upsample(dims[level + 1], dims[level], 2)
        if not is_first_column and level == 0 and config.from_last:
            self.up2 = Upsample(dims[last], dims[0], 2**last)

    def forward(self, below: Tensor, above: Tensor | None, last: Tensor | None) -> Tensor:
        """below [B, C', 2 h, 2 w], or of the first level [B, C, h, w] -> [B, C, h, w]."""
        x = self.down(below)
        for upsample, source in ((self.up, above), (self.up2, last)):
            if upsample is not None:
                x = x + upsample(source)
        return x


class Level(nn.Module):
    """A column's blocks on one grid."""

    def __init__(
        self, config: Config, level: int, is_first_column: bool, drop_paths: Sequence[float]
    ) -> None:
        super().__init__()
        self.fusion = Fusion(config, level, is_first_column)
        self.blocks = nn.Sequential(
            *(
                ConvNeXtBlock(config.embed_dims[level], config.kernel_size, drop_path=drop_path)
                for drop_path in drop_paths
            )
        )

    def forward(self, below: Tensor, above: Tensor | None, last: Tensor | None = None) -> Tensor:
        """Features of the level below, and of the previous column's above it and its last one.

        below [B, C', 2 h, 2 w], or of the first level the stem's [B, C, h, w]; above
        [B, C'', h / 2, w / 2] -> [B, C, h, w].
        """
        return self.blocks(self.fusion(below, above, last))


def _make_column(
    config: Config, is_first: bool, drop_paths: Sequence[Sequence[float]]
) -> ReversibleColumn:
    levels = [Level(config, i, is_first, of_level) for i, of_level in enumerate(drop_paths)]
    options: dict[str, Any] = {}
    if config.from_last:
        options["also_above"] = {0: [len(levels) - 1]}
    return ReversibleColumn(levels, config.embed_dims, **options)


class Classifier(nn.Module):
    """The mean over all places, a norm and a linear layer."""

    def __init__(self, channels: int, layer: nn.Module) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.LayerNorm(channels, eps=_EPS), layer)

    def pool(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C]."""
        return self.classifier[0](x.mean(dim=(2, 3)))


class Decoder(nn.Module):
    """Images from features of strides 32: up to the first level's grid, a block on each."""

    def __init__(self, embed_dims: Sequence[int], in_chans: int) -> None:
        super().__init__()
        dims = embed_dims[::-1]
        self.normal_layers = nn.ModuleList(
            nn.Sequential(ConvNeXtBlock(dim, kernel_size=3, mlp_ratio=1)) for dim in dims[1:]
        )
        self.proj_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(coarser, dim, 1), ChannelNorm(dim), nn.GELU())
            for coarser, dim in pairwise(dims)
        )
        self.projback = nn.Sequential(
            nn.Conv2d(dims[-1], _PATCH**2 * in_chans, 1), nn.PixelShuffle(_PATCH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, in_chans, 32 h, 32 w]."""
        for project, blocks in zip(self.proj_layers, self.normal_layers, strict=True):
            x = F.interpolate(project(x), scale_factor=2, mode="bilinear", align_corners=True)
            x = blocks(x)
        return self.projback(x)


class ConvDecoder(nn.Module):
    """Images from features by a norm and one convolution."""

    def __init__(self, channels: int, stride: int, in_chans: int) -> None:
        super().__init__()
        self.projback = nn.Sequential(
            ChannelNorm(channels),
            nn.Conv2d(channels, stride**2 * in_chans, 1),
            nn.PixelShuffle(stride),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, in_chans, stride * h, stride * w]."""
        return self.projback(x)


class RevCol(ImageModel):
    """RevCol for classification and as a backbone.

    Images may have any height and width that 32 divides.  The state_dict has the keys of the
    authors' FullNet, or RevColHuge, with the same `inter_supv`: they train with it, and fine-tune
    without.  Features are those of the last column's levels.

    `forward` gives the last column's logits, whatever `inter_supv` is; `forward_supervised` gives
    all that a loss under intermediate supervision needs.

    Args:
        config: the size, one of `CONFIGS`.
        num_classes: of each classifier; 0 is none.
        in_chans: channels of the images.
        drop_rate: of the dropout before each classifier.
        drop_path_rate: that of each column's last block, rising from 0 in its first; None is the
            config's.
        kernel_size: the side of the blocks' filters; None is the config's.
        inter_supv: whether there are classifiers and decoders of inner columns, which needs a
            number of columns that 4 divides.
        reversible: whether backward rebuilds the columns' features instead of keeping them, the
            authors' save_memory; an attribute of the same name.
        exact, drift_check: as of `viops.nn.ReversibleColumns`; attributes of the same names.
        head_init_scale: what the classifiers' first weights are multiplied by; None is 1.
        global_pool: "avg", as timm names the only one there is.
    """

    cls_blocks: Any  # nn.ModuleList of Classifier
    decoder_blocks: Any
    cls: Classifier

    def __init__(
        self,
        config: Config,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float | None = None,
        kernel_size: int | None = None,
        inter_supv: bool = False,
        reversible: bool = True,
        exact: bool = True,
        drift_check: bool = False,
        head_init_scale: float | None = None,
        global_pool: str = "avg",
    ) -> None:
        if drop_path_rate is not None:
            config = replace(config, drop_path_rate=drop_path_rate)
        if kernel_size is not None:
            config = replace(config, kernel_size=kernel_size)
        flags = {"inter_supv": inter_supv, "reversible": reversible}
        for name, flag in {**flags, "exact": exact, "drift_check": drift_check}.items():
            checks.check_bool(name, flag)
        if head_init_scale is not None:
            head_init_scale = checks.check_finite("head_init_scale", head_init_scale)
        if inter_supv and config.num_columns % _NUM_TAPS:
            raise ValueError(
                f"inter_supv: expected False where {_NUM_TAPS} does not divide the number of "
                f"columns, got {inter_supv} and {config.num_columns} columns"
            )
        dims = config.embed_dims
        stage_name = f"subnet{config.num_columns - 1}.level{{}}"
        super().__init__(config, num_classes, dims[-1], drop_rate, global_pool, stage_name)
        self.in_chans = checks.check_int("in_chans", in_chans, 1, None, "")
        self.inter_supv = inter_supv
        self.reversible = reversible
        self.exact = exact
        self.drift_check = drift_check
        self.stem = _patches(in_chans, dims[0], _PATCH)
        drop_paths = self._drop_paths()
        for i in range(config.num_columns):
            self.add_module(f"subnet{i}", _make_column(config, i == 0, drop_paths))
        if inter_supv:
            self.cls_blocks = nn.ModuleList(self._make_classifier() for _ in range(_NUM_TAPS))
            self.decoder_blocks = nn.ModuleList(self._make_decoder() for _ in range(_NUM_TAPS - 1))
        else:
            self.cls = self._make_classifier()
        self.apply(_init)
        if head_init_scale is not None:
            self._scale_heads(head_init_scale)

    @property
    def _stride(self) -> int:
        return _PATCH * 2 ** (len(self.config.embed_dims) - 1)

    def _make_classifier(self) -> Classifier:
        return Classifier(self.num_features, self._make_head())

    def _make_decoder(self) -> nn.Module:
        if self.num_classes <= _MOST_CLASSES_OF_DECODER:
            return Decoder(self.config.embed_dims, self.in_chans)
        return ConvDecoder(self.num_features, self._stride, self.in_chans)

    def _classifiers(self) -> list[Classifier]:
        """By rising column; the last one is the last column's."""
        return [*self.cls_blocks] if self.inter_supv else [self.cls]

    @torch.no_grad()
    def _scale_heads(self, scale: float) -> None:
        for classifier in self._classifiers():
            for parameter in classifier.classifier[1].parameters():
                parameter.mul_(scale)

    def forward_supervised(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Images [B, in_chans, H, W] -> what the authors' models return under supervision.

        That is the logits [B, num_classes] of the last column of each quarter, by rising column,
        and the images [B, in_chans, H, W] that decoders make of the same features, those of the
        last quarter excepted.  ValueError where the model was made with inter_supv=False.
        """
        if not self.inter_supv:
            raise ValueError(
                "inter_supv: expected a model made with True for forward_supervised, got False"
            )
        taps = range(0, self.config.num_columns, self.config.num_columns // _NUM_TAPS)
        columns = [tap + taps.step - 1 for tap in taps]
        tops = [levels[-1] for levels in self._run_columns(x, return_columns=columns)]
        logits = [
            classifier.classifier[1](self.head_drop(classifier.pool(top)))
            for classifier, top in zip(self.cls_blocks, tops, strict=True)
        ]
        decoded = [decode(top) for decode, top in zip(self.decoder_blocks, tops[:-1], strict=True)]
        return logits, decoded

    def get_classifier(self) -> nn.Module:
        """The linear layer of the last column's classifier."""
        return self._classifiers()[-1].classifier[1]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps the stem's output and the last features alone: `reversible`."""
        self.reversible = enable

    def _run_columns(self, x: Tensor, **options: Any) -> Any:
        """Images -> what ReversibleColumns gives, in channels_last."""
        check_images(x, self.in_chans, self._stride)
        columns: list[Any] = [
            self.get_submodule(f"subnet{i}") for i in range(self.config.num_columns)
        ]
        # made here, since the columns are registered under the authors' names
        network = ReversibleColumns(columns, self.reversible, self.drift_check, exact=self.exact)
        return network(self.stem(x.contiguous(memory_format=torch.channels_last)), **options)

    def _num_stages(self) -> int:
        return len(self.config.embed_dims)

    def _stages(self, x: Tensor, count: int | None = None) -> list[Tensor]:
        """All levels of the last column: inner columns' levels need those above them."""
        return [level.permute(0, 2, 3, 1) for level in self._run_columns(x)]

    def _prune(self, count: int, prune_norm: bool) -> None:
        """Nothing: see `_stages`."""

    def _pool(self, x: Tensor) -> Tensor:
        return self._classifiers()[-1].pool(x)

    def _reset_head(self) -> None:
        for classifier in self._classifiers():
            classifier.classifier[1] = self._make_head().to(next(self.parameters()))


def _init(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        init_layer(module)


def revcol_t(**options: Any) -> RevCol:
    """RevCol-T: 30 M parameters, 4 columns; options are RevCol's."""
    return RevCol(CONFIGS["revcol_t"], **options)


def revcol_s(**options: Any) -> RevCol:
    """RevCol-S: 60 M parameters, 8 columns; options are RevCol's."""
    return RevCol(CONFIGS["revcol_s"], **options)


def revcol_b(**options: Any) -> RevCol:
    """RevCol-B: 138 M parameters, 16 columns; options are RevCol's."""
    return RevCol(CONFIGS["revcol_b"], **options)


def revcol_l(**options: Any) -> RevCol:
    """RevCol-L: 273 M parameters, 8 wider columns; options are RevCol's."""
    return RevCol(CONFIGS["revcol_l"], **options)


def revcol_xl(**options: Any) -> RevCol:
    """RevCol-XL: 834 M parameters, 8 wider columns; options are RevCol's."""
    return RevCol(CONFIGS["revcol_xl"], **options)


def revcol_h(**options: Any) -> RevCol:
    """RevCol-H: 2.2 G parameters, 8 columns whose first levels see the last ones as well."""
    return RevCol(CONFIGS["revcol_h"], **options)
