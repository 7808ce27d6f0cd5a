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
    """Images [n, 1, 32, 32] in 0..1 (ink 1) and their classes [n], split once by a fixed seed."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(device: str) -> Digits:
    """scikit-learn's handwritten digits, 8x8, enlarged to 32x32."""
    data = require("sklearn.datasets").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
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
        embed_dim=64,
        depth=6,
        num_heads=2,
        mlp_ratio=2,
        weight_init="jax",  # Xavier in the MLPs: without it so small a ViT hardly starts to learn
    )
    _initialise(model)
    return model.to(device)


@torch.no_grad()
def _initialise(model) -> None:  # type: ignore[no-untyped-def]
    """Lets tokens attend to tokens alike, and the class token to ink, before anything is learnt.

    Queries and keys start as the same projection, a plain form of mimetic initialisation (Trockman
    and Kolter, ICML 2023); the class token starts as a patch full of ink.  A ViT that saw millions
    of images looks at the object by itself; in half a minute on 1437 of them, this one would not.
    """
    for block in model.blocks:
        query, key, _ = block.attn.qkv.weight.chunk(3)  # each [C, C]
        nn.init.orthogonal_(query)
        key.copy_(query)
    ink = torch.ones(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    model.cls_token.copy_(model.patch_embed(ink)[:, :1])  # [1, 1, C]


def _move(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [B, 1, 32, 32] moved by up to a pixel along each axis."""
    batch = len(images)
    padded = F.pad(images, (1, 1, 1, 1))
    windows = padded.unfold(2, IMAGE_SIZE, 1).unfold(3, IMAGE_SIZE, 1)  # [B, 1, 3, 3, 32, 32]
    row, column = torch.randint(3, (2, batch), generator=generator).to(images.device)
    return windows[torch.arange(batch, device=images.device), :, row, column]


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
                images = _move(digits.train_images[batch], generator)
                loss = F.cross_entropy(model(images), digits.train_labels[batch])
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
