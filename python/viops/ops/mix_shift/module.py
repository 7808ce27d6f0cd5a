"""The blocks of MS-MLP and of ConvNeXt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from ...dispatch import is_plain_eager
from ...drop_path import DropPath
from ...grid_linear import call_linear, grid_linear, is_read
from ...plain_modules import are_watched, is_bare, is_depthwise
from .op import MOST_GROUPS, depthwise_norm, mix_shift

_EPS = 1e-6  # of both papers' norms


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would make of x in a linear layer, or None where it is off."""
    if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


class _Block(nn.Module):
    """x plus what two linear layers make of a normed depthwise mixing of it."""

    norm: nn.LayerNorm
    pwconv1: nn.Linear
    act: nn.Module
    pwconv2: nn.Linear
    gamma: nn.Parameter | None
    drop_path: nn.Module

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = checks.check_int("dim", dim, 1, None, "")

    def _add_pointwise(
        self, mlp_ratio: float, layer_scale_init_value: float, drop_path: float
    ) -> None:
        """All that follows the convolutions, in the order of the official state_dict."""
        mlp_ratio = checks.check_finite("mlp_ratio", mlp_ratio)
        scale = checks.check_finite("layer_scale_init_value", layer_scale_init_value)
        drop_path = checks.check_rate("drop_path", drop_path)
        hidden = int(mlp_ratio * self.dim)
        if hidden < 1:
            raise ValueError(
                "mlp_ratio: expected one that gives at least 1 hidden channel, "
                f"got {mlp_ratio} for dim = {self.dim}"
            )
        self.norm = nn.LayerNorm(self.dim, eps=_EPS)
        self.pwconv1 = nn.Linear(self.dim, hidden)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(hidden, self.dim)
        gamma = None
        if scale > 0:
            gamma = nn.Parameter(torch.full((self.dim,), scale))
        self.register_parameter("gamma", gamma)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W], channels_last."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor [B, C, H, W], got {type(x).__name__}")
        if x.dim() != 4 or x.shape[1] != self.dim:
            raise ValueError(f"x: expected [B, C, H, W], C = {self.dim}, got shape {list(x.shape)}")
        hidden = self._activate(call_linear(self.pwconv1, self._mix(x)))
        drop_path = self.drop_path
        out = drop_path(self._project(hidden).permute(0, 3, 1, 2))
        is_ours = type(drop_path) is DropPath and is_bare(drop_path)
        is_like_x = out.dtype is x.dtype and out.shape == x.shape
        if is_ours and is_like_x and _may_overwrite(out, self.pwconv2):
            return out.add_(x)
        return out + x  # in this order: the first one's layout is the sum's

    def _activate(self, hidden: Tensor) -> Tensor:
        """[B, H, W, hidden channels], what pwconv1 gave -> the same."""
        act = self.act
        if type(act) is nn.GELU and is_bare(act) and _may_overwrite(hidden, self.pwconv1):
            return torch.ops.aten.gelu_(hidden, approximate=act.approximate)
        return act(hidden)

    def _mix(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> mixed and normed, [B, H, W, C]."""
        raise NotImplementedError

    def _project(self, hidden: Tensor) -> Tensor:
        """[B, H, W, hidden channels] -> [B, H, W, C], times gamma."""
        gamma, layer = self.gamma, self.pwconv2
        if gamma is None:
            return call_linear(layer, hidden)
        if not self._folds_gamma(gamma, hidden):
            return gamma * call_linear(layer, hidden)
        bias = None if layer.bias is None else gamma * layer.bias
        return grid_linear(hidden, gamma[:, None] * layer.weight, bias)

    def _folds_gamma(self, gamma: Tensor, hidden: Tensor) -> bool:
        """Whether gamma multiplies the weight: one pass less over the activations."""
        layer = self.pwconv2
        return (
            not torch.compiler.is_compiling()  # which fuses the pass with the sum after it
            and type(layer) is nn.Linear
            and is_bare(layer)
            and not are_watched()
            and layer.weight.dtype is gamma.dtype
            # in float16 the product of two small numbers would be zero, and so would gradients
            and torch.float16 not in (hidden.dtype, _autocast_dtype(hidden))
            # a pass over the weight costs less than one over the activations
            and hidden.numel() >= hidden.shape[-1] ** 2
        )

    def _may_leave_out(self, convs: Iterable[nn.Module]) -> bool:
        """Whether parameters are all that the convolutions and the norm add to the model."""
        norm = self.norm
        return (
            type(norm) is nn.LayerNorm
            and norm.weight is not None
            and norm.normalized_shape == (self.dim,)
            and is_bare(norm)
            and all(is_depthwise(conv) and is_bare(conv) for conv in convs)
            and not are_watched()
        )


class MixShiftBlock(_Block):
    """MS-MLP's block: x + gamma * MLP(norm(mix_shift(x))), by `viops.mix_shift`.

    The parameters are those of the official MixShiftBlock: ``dwconv_lr.N``, ``dwconv_td.N``,
    ``norm``, ``pwconv1`` and ``pwconv2``, weight and bias each, and ``gamma``.

    The convolutions, the norm and the linear layers are not called: their weights, biases and the
    norm's eps are read.  What has hooks, another class than torch's Conv2d, LayerNorm and Linear
    (as a parametrization gives it) or another geometry is called; of the convolutions and the norm
    the whole mixing then runs as the official code has it, module by module.  ``act`` and
    ``drop_path`` are always called.

    Args:
        dim: channels C.
        shift_dist: how far each of the groups of channels that torch.chunk deals is rolled.
        mix_size: the side of each group's filters, odd.
        mlp_ratio: hidden channels of the MLP for each of C.
        layer_scale_init_value: what gamma begins with; 0 or less is no gamma.
        drop_path: in training, the share of images whose branch is dropped.

    Source: MS-MLP (Zheng et al., arXiv:2202.06510), section 3.
    """

    dwconv_lr: Any  # nn.ModuleList of nn.Conv2d
    dwconv_td: Any

    def __init__(
        self,
        dim: int,
        shift_dist: Sequence[int] = (-2, -1, 0, 1, 2),
        mix_size: Sequence[int] = (1, 1, 3, 5, 7),
        mlp_ratio: float = 4.0,
        layer_scale_init_value: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(dim)
        shifts, sizes = _check_sequences(shift_dist, mix_size)
        self.shift_dist = shifts
        channels = [part.shape[0] for part in torch.zeros(dim, device="cpu").chunk(len(sizes))]
        if len(channels) != len(sizes):
            raise ValueError(
                f"mix_size: expected {len(channels)} entries, the groups into which torch.chunk "
                f"cuts {dim} channels when asked for {len(sizes)}, got {len(sizes)}"
            )
        self.dwconv_lr = nn.ModuleList(map(_depthwise, channels, sizes))
        self.dwconv_td = nn.ModuleList(map(_depthwise, channels, sizes))
        self._add_pointwise(mlp_ratio, layer_scale_init_value, drop_path)

    def _mix(self, x: Tensor) -> Tensor:
        if not self._may_leave_out(chain(self.dwconv_lr, self.dwconv_td)) or any(
            lr.kernel_size != td.kernel_size
            for lr, td in zip(self.dwconv_lr, self.dwconv_td, strict=True)
        ):
            return self._mix_by_modules(x)
        mixed = mix_shift(
            x,
            *([conv.weight for conv in self.dwconv_lr], [conv.bias for conv in self.dwconv_lr]),
            *([conv.weight for conv in self.dwconv_td], [conv.bias for conv in self.dwconv_td]),
            self.shift_dist,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            eps=self.norm.eps,
        )
        return mixed.permute(0, 2, 3, 1)

    def _mix_by_modules(self, x: Tensor) -> Tensor:
        groups = x.chunk(len(self.shift_dist), dim=1)
        along_width, along_height = (
            torch.cat(
                [
                    conv(group.roll(shift, axis))
                    for conv, group, shift in zip(convs, groups, self.shift_dist, strict=True)
                ],
                dim=1,
            )
            for convs, axis in ((self.dwconv_lr, 3), (self.dwconv_td, 2))
        )
        return self.norm((along_width + along_height).permute(0, 2, 3, 1))

    def extra_repr(self) -> str:
        return f"shift_dist={self.shift_dist}"


class ConvNeXtBlock(_Block):
    """ConvNeXt's block: x + gamma * MLP(norm(dwconv(x))), by `viops.depthwise_norm`.

    The parameters are those of the official Block: ``dwconv``, ``norm``, ``pwconv1`` and
    ``pwconv2``, weight and bias each, and ``gamma``.  What is read and what is called is as in
    `MixShiftBlock`.

    Args:
        dim: channels C.
        kernel_size: the filters' side, odd.
        mlp_ratio: hidden channels of the MLP for each of C.
        layer_scale_init_value: what gamma begins with; 0 or less is no gamma.
        drop_path: in training, the share of images whose branch is dropped.

    Source: ConvNeXt (Liu et al., arXiv:2201.03545), section 2.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        layer_scale_init_value: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(dim)
        self.dwconv = _depthwise(dim, _check_side("kernel_size", kernel_size))
        self._add_pointwise(mlp_ratio, layer_scale_init_value, drop_path)

    def _mix(self, x: Tensor) -> Tensor:
        conv, norm = self.dwconv, self.norm
        if not self._may_leave_out([conv]):
            return norm(conv(x).permute(0, 2, 3, 1))
        mixed = depthwise_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps)
        return mixed.permute(0, 2, 3, 1)


def _may_overwrite(x: Tensor, layer: nn.Module) -> bool:
    """Whether what comes of a linear layer is nobody else's, and no gradient needs it.

    A pass that overwrites it moves two thirds of the bytes, and gives the same bits.
    """
    return not x.requires_grad and is_read(layer) and is_plain_eager(x)


def _depthwise(channels: int, side: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, side, padding=side // 2, groups=channels)


def _check_side(name: str, value: int) -> int:
    side = checks.check_int(name, value, 1, None, "")
    if side % 2 == 0:
        raise ValueError(f"{name}: expected an odd number, got {side}")
    return side


def _check_sequences(
    shift_dist: Sequence[int], mix_size: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    for name, value in (("shift_dist", shift_dist), ("mix_size", mix_size)):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise TypeError(f"{name}: expected a sequence of ints, got {type(value).__name__}")
        if not 1 <= len(value) <= MOST_GROUPS:
            raise ValueError(f"{name}: expected 1 to {MOST_GROUPS} entries, got {len(value)}")
    if len(shift_dist) != len(mix_size):
        raise ValueError(
            f"shift_dist: expected {len(mix_size)} entries, as mix_size, got {len(shift_dist)}"
        )
    limit = 2**62
    shifts = [
        checks.check_int(f"shift_dist[{g}]", shift, -limit, limit, "of 64 bits")
        for g, shift in enumerate(shift_dist)
    ]
    return tuple(shifts), tuple(
        _check_side(f"mix_size[{g}]", side) for g, side in enumerate(mix_size)
    )


__all__ = ["ConvNeXtBlock", "MixShiftBlock"]
