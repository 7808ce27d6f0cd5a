"""What timm asks of a model: features, their stages, a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import checks


class Sizes(Protocol):
    """Of a model's configuration; each tuple has an entry for each stage."""

    @property
    def embed_dims(self) -> tuple[int, ...]: ...

    @property
    def depths(self) -> tuple[int, ...]: ...

    @property
    def drop_path_rate(self) -> float: ...


class ImageModel(nn.Module):
    """A model whose features come in stages, each on a grid half as fine as the one before.

    Args:
        config: the sizes.
        num_classes: of the classifier; 0 is none.
        num_features: channels that the classifier takes.
        drop_rate: of the dropout before the classifier.
        global_pool: "avg", as timm names the only one there is.
        stage_name: the submodule that gives a stage's features, with {} for the stage's number.
    """

    config: Any

    def __init__(
        self,
        config: Sizes,
        num_classes: int,
        num_features: int,
        drop_rate: float,
        global_pool: str,
        stage_name: str,
    ) -> None:
        super().__init__()
        _check_pool(global_pool)
        checks.check_int("num_classes", num_classes, 0, None, "")
        checks.check_rate("drop_rate", drop_rate)
        checks.check_rate("drop_path_rate", config.drop_path_rate)
        self.config = config
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = num_features  # timm's names
        #: What timm asks of a backbone: for each stage its channels, stride and name.
        self.feature_info = [
            {"num_chs": channels, "reduction": 4 * 2**i, "module": stage_name.format(i)}
            for i, channels in enumerate(config.embed_dims)
        ]
        self.head_drop = nn.Dropout(drop_rate)

    def _drop_paths(self) -> list[list[float]]:
        """The rate of each block of each stage."""
        depths = self.config.depths
        rates = torch.linspace(0, self.config.drop_path_rate, sum(depths), device="cpu")
        return [of_stage.tolist() for of_stage in rates.split(depths)]

    def _make_head(self) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> [B, num_features, h, w], before pooling."""
        return self._features(self._stages(x)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What forward_features gives -> logits [B, num_classes], or pooled [B, num_features]."""
        x = self._pool(x)
        return x if pre_logits else self.get_classifier()(self.head_drop(x))

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
            norm: must be False: there is no norm after a stage.
            stop_early: whether no stage after the last one taken runs that need not.
            output_fmt: the layout.
            intermediates_only: whether the list alone is returned, without what forward_features
                gives before it; `stop_early` needs it where the last stage is not taken.
        """
        if norm:
            raise ValueError("norm: expected False, for there is no norm after a stage, got True")
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NHWC', got {output_fmt!r}")
        take = self._take(indices)
        outputs = self._stages(x, 1 + max(take) if stop_early else self._num_stages())
        taken = [
            stage.permute(0, 3, 1, 2) if output_fmt == "NCHW" else stage
            for stage in (outputs[i] for i in take)
        ]
        if intermediates_only:
            return taken
        return self._features(outputs[-1]), taken

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Takes out what the stages of `indices` do not need; returns the places of those named."""
        take = self._take(indices)
        self._prune(1 + max(take), prune_norm)
        if prune_head:
            self.reset_classifier(0)
        return take

    def get_classifier(self) -> nn.Module:
        raise NotImplementedError

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for so many classes; 0 is none."""
        _check_pool("avg" if global_pool is None else global_pool)
        self.num_classes = num_classes
        self._reset_head()

    def _reset_head(self) -> None:
        """A new head for `num_classes`, where the parameters are and in their dtype."""
        raise NotImplementedError

    def _num_stages(self) -> int:
        """Those that there still are."""
        raise NotImplementedError

    def _stages(self, x: Tensor, count: int | None = None) -> list[Tensor]:
        """The outputs of the first `count` stages, each [B, h, w, C]."""
        raise NotImplementedError

    def _prune(self, count: int, prune_norm: bool) -> None:
        """Keeps the first `count` stages."""
        raise NotImplementedError

    def _features(self, x: Tensor) -> Tensor:
        """[B, h, w, C] of the last stage -> [B, num_features, h, w]."""
        return x.permute(0, 3, 1, 2)

    def _pool(self, x: Tensor) -> Tensor:
        """[B, num_features, h, w] -> [B, num_features]."""
        return x.mean(dim=(2, 3))

    def _take(self, indices: int | Sequence[int] | None) -> list[int]:
        count = self._num_stages()
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            indices = range(count - indices, count)
        places = sorted(i + count if i < 0 else i for i in indices)
        if not places or any(not 0 <= place < count for place in places):
            raise ValueError(f"indices: expected some of the {count} stages, got {indices!r}")
        return places


def _check_pool(global_pool: str) -> None:
    if global_pool != "avg":
        raise ValueError(f"global_pool: expected 'avg', got {global_pool!r}")


def check_images(x: Tensor, in_chans: int, stride: int) -> None:
    """x must be [B, in_chans, H, W], and `stride` must divide H and W."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"x: expected [B, C, H, W], C = {in_chans}, got shape {list(x.shape)}")
    if any(size < stride or size % stride for size in x.shape[2:]):
        raise ValueError(
            f"x: expected a height and a width that {stride} divides, "
            f"got {x.shape[2]} and {x.shape[3]}"
        )


def init_linear(module: nn.Module) -> None:
    """As the authors' models are initialised; other layers keep torch's values."""
    if isinstance(module, nn.Linear):
        init_layer(module)


def init_layer(module: nn.Linear | nn.Conv2d) -> None:
    """Weights of a standard deviation of 0.02, cut off at 2, and no bias."""
    nn.init.trunc_normal_(module.weight, std=0.02)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
