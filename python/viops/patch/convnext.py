"""Depthwise convolution and norm of timm's ConvNeXt blocks made one op, and taken out again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..grid_linear import call_linear
from ..ops.mix_shift import depthwise_norm
from ..plain_modules import are_watched, is_bare, is_depthwise
from .model_checks import (
    check_module,
    check_no_hooks,
    check_not_patched,
    check_skip,
    is_skipped,
    name_of,
)
from .vision_transformer import Patched, own_class, patch_module

Model = TypeVar("Model", bound=nn.Module)

#: The norms over channels that the op computes, by whether the MLP's layers are convolutions.
_NORMS = {
    False: ("timm.layers.norm.LayerNorm", "torch.nn.modules.normalization.LayerNorm"),
    True: ("timm.layers.norm.LayerNorm2d",),
}


#: timm's MLPs of linear layers, and what comes between those.
_MLPS = {
    "timm.layers.mlp.Mlp": ("act", "drop1", "gate", "norm"),
    "timm.layers.mlp.GlobalResponseNormMlp": ("act", "drop1", "grn"),
}


def _call_mlp(mlp: Any, x: Tensor) -> Tensor:
    """The MLP's result for x [B, h, w, C]."""
    between = _MLPS.get(name_of(mlp))
    if between is None or not is_bare(mlp) or are_watched():
        return mlp(x)
    x = call_linear(mlp.fc1, x)
    for part in between:
        if hasattr(mlp, part):  # not in every timm
            x = getattr(mlp, part)(x)
    return mlp.drop2(call_linear(mlp.fc2, x))


class FusedConvNeXtBlock(Patched):
    """timm's ConvNeXtBlock whose convolution and norm are one op.

    What comes after the norm sees channels_last, and the block gives it; the MLP's linear layers,
    where they are torch's own, are read and not called.  Where the convolution or
    the norm has been replaced meanwhile, or got hooks, the block's own forward runs.
    """

    prefix = "Fused"

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C, h, w]."""
        conv, norm = self.conv_dw, self.norm
        if _other_part(self) is not None or not (is_bare(conv) and is_bare(norm)) or are_watched():
            return super().forward(x)
        y = depthwise_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps)
        if self.use_conv_mlp:
            y = self.mlp(y)
        else:
            y = _call_mlp(self.mlp, y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.gamma is not None:
            y = y * self.gamma[:, None, None]
        return self.drop_path(y) + self.shortcut(x)


def convnext(model: Model, skip: Sequence[str] = ()) -> Model:
    """Makes the depthwise convolution and the norm of ConvNeXt's blocks one op.

    In each of timm's ConvNeXtBlocks, those of V1 and V2 alike, `viops.depthwise_norm` runs instead
    of both; what follows runs as before, on channels_last tensors, but for the MLP's linear layers,
    where they are torch's own: in float32 on x86 CPUs these go to oneDNN instead of MKL, which is
    the larger part of what is gained there.  Blocks whose convolution or norm is of another kind
    than below stay as they are, and so do the stem, the downsampling and the head.

    The model is changed in place; its parameters and state_dict keys stay as they are, and
    `viops.patch.undo` takes everything back.

    Args:
        model: timm.models.convnext.ConvNeXt or a network with its ConvNeXtBlocks, not wrapped in
            anything: patch first, then compile or distribute.
        skip: names of modules that stay as they are, with all that is in them.

    Returns:
        The same model.

    Raises:
        TypeError: model is no torch.nn.Module, or skip no sequence of names.
        ValueError: the model is patched already; a convolution or norm that would no longer be
            called has hooks; an entry of skip is no module's name; or there is no ConvNeXtBlock
            with a depthwise convolution of stride and dilation 1 and of odd side, zeros around it,
            and a LayerNorm (LayerNorm2d where the MLP has convolutions) with a weight.

    Source: ConvNeXt (Liu et al., arXiv:2201.03545), section 2.
    """
    check_module(model)
    check_not_patched(is_patched(model))
    skipped = check_skip(model, skip)
    blocks: list[nn.Module] = []
    reason = ""
    for name, block in model.named_modules():
        if not _is_timms(block) or is_skipped(name, skipped):
            continue
        other = _other_part(block)
        if other is None:
            for part in ("conv_dw", "norm"):
                check_no_hooks(f"{name}.{part}" if name else part, getattr(block, part))
            blocks.append(block)
        elif not reason:
            reason = f"whose {name or 'block'} has {other}"
    if not blocks:
        raise ValueError(
            "model: expected one with timm's ConvNeXtBlocks, not skipped, each with a depthwise "
            "Conv2d of stride and dilation 1, of odd side and padded by zeros, and a LayerNorm or, "
            f"with conv_mlp, a LayerNorm2d with a weight, got {name_of(model)} "
            + (reason or "without any")
        )
    for block in blocks:
        patch_module(block, FusedConvNeXtBlock)
    return model


def undo(model: Model) -> Model:
    """Takes out of the model what `convnext` put in, in place; returns the same model.

    Raises:
        ValueError: a block's class has changed since, as a parametrization changes it.
    """
    for name, module in model.named_modules():
        if isinstance(module, FusedConvNeXtBlock) and is_parametrized(module):
            raise ValueError(
                f"{name}: expected what convnext put in, got {type(module).__name__}: take "
                "parametrizations out first"
            )
    modules: list[Any] = list(model.modules())
    for module in modules:
        if isinstance(module, FusedConvNeXtBlock):
            module.__class__ = own_class(module)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether convnext has changed something in the model."""
    return any(isinstance(module, FusedConvNeXtBlock) for module in model.modules())


def _is_timms(block: nn.Module) -> bool:
    """Whether its forward is the one that is rewritten; a model of timm's has loaded it."""
    cls = getattr(sys.modules.get("timm.models.convnext"), "ConvNeXtBlock", None)
    return (
        cls is not None
        and isinstance(block, cls)
        and type(block).forward is cls.forward
        and "forward" not in vars(block)
    )


def _other_part(block: Any) -> str | None:
    """What keeps the convolution and the norm from being one op, or None."""
    conv, norm = block.conv_dw, block.norm
    if not is_depthwise(conv):
        return f"conv_dw = {conv}"
    if (
        name_of(norm) not in _NORMS[block.use_conv_mlp]
        or norm.normalized_shape != (conv.out_channels,)
        or norm.weight is None
    ):
        return f"norm = {name_of(norm)}: {norm}"
    return None
