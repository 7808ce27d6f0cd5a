"""RMT as its authors' formulation runs it: what the benches of decayed attention compare with.

Masks of decays, which a stage makes anew at each call, are added to whole matrices of logits;
linear layers, convolutions and sums are torch's, one after another.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from viops import models
from viops.grid_linear import GridLinear
from viops.ops.decayed_attention import module as ours

Rotation = tuple[Tensor, Tensor]  # sin and cos, each [h, w, D]


def turned(x: Tensor) -> Tensor:
    """(even, odd) channels -> (-odd, even)."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def line_mask(log_decay: Tensor, length: int) -> Tensor:
    """[H, length, length]: the decays between the tokens of a row or column."""
    places = torch.arange(length, device=log_decay.device)
    return (places[:, None] - places[None, :]).abs() * log_decay[:, None, None]


def grid_mask(log_decay: Tensor, height: int, width: int) -> Tensor:
    """[H, N, N]: the decays between the tokens of the grid."""
    y, x = (torch.arange(size, device=log_decay.device) for size in (height, width))
    y, x = ((t[:, None] - t[None, :]).abs() for t in (y, x))
    distances = y[:, None, :, None] + x[None, :, None, :]  # [h, w, h, w]
    size = height * width
    return distances.reshape(size, size) * log_decay[:, None, None]


def rotated(q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """[B, H, h, w, D] each; k also times the scale of the logits."""
    sin, cos = rotation
    k = k * q.shape[-1] ** -0.5
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def attend_axially(
    q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, masks: tuple[Tensor, Tensor]
) -> Tensor:
    """[B, H, h, w, D] each, and the masks of columns and of rows -> [B, H, h, w, D]."""
    q, k = rotated(q, k, rotation)
    column_mask, row_mask = masks
    rows = [t.transpose(1, 2) for t in (q, k, v)]  # [B, h, H, w, D]
    logits = rows[0] @ rows[1].transpose(-1, -2) + row_mask  # [B, h, H, w, w]
    inner = logits.softmax(dim=-1) @ rows[2]  # [B, h, H, w, D]
    columns = [t.permute(0, 3, 1, 2, 4) for t in (q, k)]  # [B, w, H, h, D]
    logits = columns[0] @ columns[1].transpose(-1, -2) + column_mask  # [B, w, H, h, h]
    out = logits.softmax(dim=-1) @ inner.permute(0, 3, 2, 1, 4)  # [B, w, H, h, D]
    return out.permute(0, 2, 3, 1, 4)


def attend_whole(q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, mask: Tensor) -> Tensor:
    """[B, H, h, w, D] each -> [B, H, h, w, D]."""
    q, k, values = (t.flatten(2, 3) for t in (*rotated(q, k, rotation), v))  # [B, H, N, D]
    attention = (q @ k.transpose(-1, -2) + mask).softmax(dim=-1)
    return (attention @ values).reshape(v.shape)


class _Position(nn.Module):
    """The rotation and the masks of a stage, made at each call."""

    def __init__(self, position: ours.RelativePosition2d, axial: bool) -> None:
        super().__init__()
        self.position = position
        self.axial = axial

    def forward(self, height: int, width: int) -> tuple[Rotation, object]:
        rotation = self.position._make_tables(height, width)
        decay = self.position.decay
        if self.axial:
            return rotation, (line_mask(decay, height), line_mask(decay, width))
        return rotation, grid_mask(decay, height, width)


class _Attention(nn.Module):
    def __init__(self, attention: ours.ManhattanSelfAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, position: tuple[Rotation, object]) -> Tensor:
        """x [B, h, w, C] -> [B, h, w, C]."""
        attention = self.attention
        rotation, masks = position
        v = attention.v_proj(x)
        q, k, values = (
            t.unflatten(-1, (attention.num_heads, -1)).permute(0, 3, 1, 2, 4)  # [B, H, h, w, D]
            for t in (attention.q_proj(x), attention.k_proj(x), v)
        )
        attend = attend_axially if attention.axial else attend_whole
        out = attend(q, k, values, rotation, masks).permute(0, 2, 3, 1, 4).flatten(-2)
        return attention.out_proj(out + attention.lepe(v))


class _ResidualConv(nn.Module):
    """[B, h, w, C] -> [B, h, w, C]."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + x


def eager_rmt(model: models.rmt.RMT) -> nn.Module:
    """A copy of the model that computes the same in the authors' formulation."""
    model = copy.deepcopy(model)
    for stage in model.layers:
        stage.Relpos = _Position(stage.Relpos, stage.blocks[0].retention.axial)
        for block in stage.blocks:
            block.retention = _Attention(block.retention)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, GridLinear):
                linear = nn.Linear(child.in_features, child.out_features, device="meta")
                linear.weight, linear.bias = child.weight, child.bias
                setattr(parent, name, linear)
            elif isinstance(child, ours.DepthwiseConv2d) and child.residual:
                setattr(parent, name, _ResidualConv(child.conv))
    return model
