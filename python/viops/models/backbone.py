"""What the models of stages have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .image_model import ImageModel, Sizes


class Backbone(ImageModel):
    """A stem, stages with a 2x downsampling between them, and a classifier.

    A model makes ``patch_embed``, then ``layers`` and last ``head``.  The stem takes images
    [B, in_chans, H, W] and gives [B, h, w, C], which stages and their ``downsample`` take and give.
    """

    patch_embed: nn.Module
    layers: Any
    head: nn.Module

    def __init__(
        self, config: Sizes, num_classes: int, num_features: int, drop_rate: float, global_pool: str
    ) -> None:
        super().__init__(config, num_classes, num_features, drop_rate, global_pool, "layers.{}")

    def get_classifier(self) -> nn.Module:
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps the inputs of blocks alone and runs each again in backward."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def _after_stages(self) -> Iterable[str]:
        """The modules between the last stage and the head."""
        raise NotImplementedError

    def _reset_head(self) -> None:
        self.head = self._make_head().to(next(self.parameters()))

    def _num_stages(self) -> int:
        return len(self.layers)

    def _stages(self, x: Tensor, count: int | None = None) -> list[Tensor]:
        x = self.patch_embed(x)
        outputs: list[Tensor] = []
        for stage in self.layers[:count]:
            outputs.append(stage(x))
            if stage.downsample is not None and len(outputs) != count:
                x = stage.downsample(outputs[-1])
        return outputs

    def _prune(self, count: int, prune_norm: bool) -> None:
        self.layers = self.layers[:count]
        self.layers[-1].downsample = None
        if prune_norm or len(self.layers) < len(self.config.depths):
            for name in self._after_stages():
                setattr(self, name, nn.Identity())
