"""The demo's first model: a small ViT for scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .console import require, require_timm

IMAGE_SIZE = 32
PATCH_SIZE = 4
NUM_TRAIN = 1437  # of 1797 images; the others are for testing
BATCH_SIZE = 32


class Digits(NamedTuple):
    """Images [n, 1, 32, 32] in -1..1 (ink 1) and their classes [n], split once by a fixed seed."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(device: str) -> Digits:
    """scikit-learn's handwritten digits, 8x8, enlarged to 32x32."""
    data = require("sklearn.datasets").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # [1797, 1, 8, 8]
    images = F.interpolate(images, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].to(device), labels[order].to(device)
    return Digits(images[:NUM_TRAIN], labels[:NUM_TRAIN], images[NUM_TRAIN:], labels[NUM_TRAIN:])


def build_vit(device: str) -> nn.Module:
    """timm's VisionTransformer with 6 blocks over 8x8 patches and a class token."""
    require_timm()
    vision_transformer = require("timm.models.vision_transformer")
    torch.manual_seed(0)
    model = vision_transformer.VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        in_chans=1,
        num_classes=10,
        embed_dim=96,
        depth=6,
        num_heads=3,
        mlp_ratio=2,
        weight_init="jax",  # Xavier in the MLPs: without it so small a ViT hardly starts to learn
    )
    return model.to(device)


def train(
    model: nn.Module, digits: Digits, epochs: int, learning_rate: float, text: str, quick: bool
) -> None:
    """AdamW under a one-cycle learning rate, with a progress bar; `quick`: three steps."""
    tqdm = require("tqdm").tqdm
    steps = 3 if quick else epochs * -(-NUM_TRAIN // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.2
    )
    generator = torch.Generator().manual_seed(0)
    model.train()
    with tqdm(total=steps, desc=text, unit="step", leave=True) as bar:
        while bar.n < steps:
            for batch in torch.randperm(NUM_TRAIN, generator=generator).split(BATCH_SIZE):
                images, labels = digits.train_images[batch], digits.train_labels[batch]
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                if bar.n == steps:
                    break
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], digits: Digits) -> float:
    """Share of the test images that the model classifies right."""
    return (model(digits.test_images).argmax(dim=1) == digits.test_labels).float().mean().item()
