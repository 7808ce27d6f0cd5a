"""The demo's pictures: what a patched model keeps, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .console import require

_FUSED_SHARE = 0.3  # of the image in a fused patch; the rest is `shade`
_INCH_PER_IMAGE = {"digit": 1.15, "photograph": 3.0}


def dim_fused(images: Tensor, mask: Tensor, shade: float) -> Tensor:
    """images [B, 3, H, W] in 0..1, sunk into a grey `shade` where mask [B, P] keeps no patch."""
    batch, _, height, width = images.shape
    patch = int((height * width / mask.shape[1]) ** 0.5)
    grid = mask.reshape(batch, 1, height // patch, width // patch).float()
    kept = F.interpolate(grid, scale_factor=patch, mode="nearest")  # [B, 1, H, W]
    return shade + (images - shade) * (_FUSED_SHARE + (1 - _FUSED_SHARE) * kept)


def save_digits(path: Path, images: Tensor, masks: Sequence[Tensor], layers: Sequence[int]) -> None:
    """Images side by side, the layers below each other.

    Args:
        path: the PNG to write.
        images: [B, 3, H, W] in 0..1.
        masks: for each layer [B, P], bool, as viops.patch.kept_masks gives them.
        layers: their places in the model.
    """
    rows = [images] + [dim_fused(images, mask, shade=0.45) for mask in masks]
    titles = ["input"] + [_title(layer, mask) for layer, mask in zip(layers, masks, strict=True)]
    figure, axes = _canvas(len(rows), len(images), _INCH_PER_IMAGE["digit"])
    for row, title, line in zip(rows, titles, axes, strict=True):
        for image, axis in zip(row, line, strict=True):
            _show(axis, image)
        line[0].set_ylabel(title, fontsize=9)
    figure.suptitle(
        "Patches that the ViT keeps (bright) and fuses into one token (dim)", fontsize=11
    )
    figure.savefig(path, dpi=150)


def save_photographs(
    path: Path, images: Tensor, masks: Sequence[Tensor], layers: Sequence[int], heading: str
) -> None:
    """Images below each other, the layers side by side; arguments as in save_digits."""
    columns = [images] + [dim_fused(images, mask, shade=0.0) for mask in masks]
    titles = ["input"] + [_title(layer, mask) for layer, mask in zip(layers, masks, strict=True)]
    figure, axes = _canvas(len(images), len(columns), _INCH_PER_IMAGE["photograph"])
    for j, (column, title) in enumerate(zip(columns, titles, strict=True)):
        for image, line in zip(column, axes, strict=True):
            _show(line[j], image)
        axes[0][j].set_title(title.replace("\n", ": "), fontsize=11)
    figure.suptitle(heading, fontsize=12)
    figure.savefig(path, dpi=110)


def _title(layer: int, mask: Tensor) -> str:
    kept = mask.sum(dim=1).float().mean().item()
    return f"block {layer}\n{kept:.0f} of {mask.shape[1]}"


def _canvas(rows: int, columns: int, inch: float):  # type: ignore[no-untyped-def]
    figure_module = require("matplotlib.figure")  # without pyplot no display is looked for
    figure = figure_module.Figure(
        figsize=(columns * inch + 0.5, rows * inch + 0.5), layout="constrained"
    )
    return figure, figure.subplots(rows, columns, squeeze=False)


def _show(axis, image: Tensor) -> None:  # type: ignore[no-untyped-def]
    """One image [3, H, W] in 0..1, without axes."""
    axis.imshow(image.permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(color="0.6", linewidth=0.5)


def digits_as_ink(images: Tensor) -> Tensor:
    """images [B, 1, H, W] in 0..1 as dark ink on white paper, [B, 3, H, W] in 0..1."""
    paper = torch.ones(3, device=images.device).view(1, 3, 1, 1)
    ink = torch.tensor([0.05, 0.1, 0.4], device=images.device).view(1, 3, 1, 1)
    return torch.lerp(paper, ink, images)
