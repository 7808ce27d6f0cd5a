"""MS-MLP as its authors' formulation runs it: what the benches of mix_shift compare with.

Each group is rolled twice and convolved twice by itself, the groups of each direction are joined,
both are summed, permuted for the norm and the linear layers, scaled, and permuted back.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from viops import models
from viops.grid_linear import GridLinear
from viops.nn import MixShiftBlock


def mix_shift(
    x: Tensor,
    weights_lr: Sequence[Tensor],
    biases_lr: Sequence[Tensor],
    weights_td: Sequence[Tensor],
    biases_td: Sequence[Tensor],
    shifts: Sequence[int],
) -> Tensor:
    """[B, C, H, W] -> [B, C, H, W]."""
    groups = x.chunk(len(shifts), 1)
    rolled_lr = [group.roll(shift, 3) for group, shift in zip(groups, shifts, strict=True)]
    rolled_td = [group.roll(shift, 2) for group, shift in zip(groups, shifts, strict=True)]
    return _convolved(rolled_lr, weights_lr, biases_lr) + _convolved(
        rolled_td, weights_td, biases_td
    )


def _convolved(
    groups: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    return torch.cat(
        [
            F.conv2d(group, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
            for group, weight, bias in zip(groups, weights, biases, strict=True)
        ],
        1,
    )


def depthwise_norm(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> Tensor:
    """[B, C, H, W] -> [B, C, H, W], channels_last."""
    mixed = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    channels = mixed.permute(0, 2, 3, 1)
    return F.layer_norm(channels, norm_weight.shape, norm_weight, norm_bias, 1e-6).permute(
        0, 3, 1, 2
    )


class _Block(nn.Module):
    def __init__(self, block: MixShiftBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        block = self.block
        mixed = mix_shift(
            x,
            *([conv.weight for conv in block.dwconv_lr], [conv.bias for conv in block.dwconv_lr]),
            *([conv.weight for conv in block.dwconv_td], [conv.bias for conv in block.dwconv_td]),
            block.shift_dist,
        )
        hidden = block.act(block.pwconv1(block.norm(mixed.permute(0, 2, 3, 1))))
        out = (block.gamma * block.pwconv2(hidden)).permute(0, 3, 1, 2)
        return x + block.drop_path(out)


class _PatchEmbed(nn.Module):
    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', h, w], contiguous."""
        embed = self.embed
        x = embed.proj(x)
        tokens = embed.norm(x.flatten(2).transpose(1, 2))  # [B, h w, C']
        return tokens.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2).contiguous()


class _Stage(nn.Module):
    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*map(_Block, stage.blocks))
        self.downsample = _PatchEmbed(stage.downsample) if stage.downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


class EagerMSMLP(nn.Module):
    """A copy of the model that computes the same in the authors' formulation.

    Args:
        model: to be copied.
        grid_linear: whether the linear layers run as viops runs them, by oneDNN.
    """

    def __init__(self, model: models.MSMLP, grid_linear: bool = False) -> None:
        super().__init__()
        model = copy.deepcopy(model)
        for layer in model.modules():
            if grid_linear and isinstance(layer, nn.Linear) and layer is not model.head:
                layer.__class__ = GridLinear
        self.patch_embed = _PatchEmbed(model.patch_embed)
        self.layers = nn.Sequential(*map(_Stage, model.layers))
        self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, classes]."""
        return self.head(self.norm(self.layers(self.patch_embed(x)).mean((2, 3))))
