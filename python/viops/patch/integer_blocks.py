"""timm's and torchvision's residual blocks, from integers to integers where they only infer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..dispatch import is_plain_eager
from ..ops.integer_conv.convolution import integer_conv2d
from ..ops.integer_conv.dfp import DfpTensor
from ..ops.integer_conv.module import Int16Conv2d
from ..ops.integer_conv.op import keep, kept_or_quantized
from ..plain_modules import are_watched, is_bare
from .fused_blocks import KNOWN
from .vision_transformer import Patched


class IntegerBlock(Patched):
    """A residual block whose norms, ReLUs and sum run within convolutions, in eval mode.

    Where a gradient is asked for, a layer is in training mode or has hooks, or something traces,
    the block's own forward runs.
    """

    prefix = "Integer"
    #: The convolution, the norm after it and the activation that follow each other.
    stages: ClassVar[tuple[tuple[str, str, str], ...]] = ()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C', h', w']."""
        if not self._infers(x):
            return super().forward(x)
        *stages, (last_conv, last_norm, _) = self.stages
        conv = getattr(self, last_conv)
        integers = kept_or_quantized(x, **conv._options)
        shortcut = self._shortcut(x, integers)
        for name, norm, _ in stages:
            integers = _run(getattr(self, name), getattr(self, norm), integers)
        result = _run(conv, getattr(self, last_norm), integers, residual=shortcut)
        y = result.carrier
        assert y is not None
        keep(y, result, conv.scaling, conv.rounding)
        return y

    def _infers(self, x: Tensor) -> bool:
        parts = [part for stage in self.stages for part in stage]
        return (
            isinstance(x, Tensor)
            and is_plain_eager(x)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
            and x.dtype is torch.float32
            and x.device.type == "cpu"
            and not self.training
            and all(_is_left_out(getattr(self, part)) for part in parts)
            and not are_watched()
            and all(
                isinstance(getattr(self, conv), Int16Conv2d)
                and _is_norm(getattr(self, norm))
                and type(getattr(self, activation)) is nn.ReLU
                for conv, norm, activation in self.stages
            )
        )

    def _shortcut(self, x: Tensor, integers: DfpTensor) -> Tensor:
        if self.downsample is None:
            return x
        layers: list[Any] = []
        if type(self.downsample) is nn.Sequential:
            layers = list(self.downsample)
        if (
            len(layers) == 2
            and isinstance(layers[0], Int16Conv2d)
            and layers[0]._options == getattr(self, self.stages[0][0])._options
            and _is_norm(layers[1])
            and all(map(_is_left_out, (self.downsample, *layers)))
        ):
            return _run(layers[0], layers[1], integers, relu=False, emit=False)
        return self.downsample(x)


def _run(
    conv: Any,
    norm: Any,
    x: DfpTensor,
    residual: Tensor | None = None,
    relu: bool = True,
    emit: bool = True,
) -> Any:
    """The convolution with what the norm multiplies and adds, in eval mode."""
    gain = (norm.running_var + norm.eps).rsqrt()
    gain = gain if norm.weight is None else gain * norm.weight
    bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = bias * gain if norm.bias is None else torch.addcmul(norm.bias, bias, gain)
    return integer_conv2d(
        x,
        conv.quantized_weight(),
        bias,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        gain=gain,
        residual=residual,
        activation="relu" if relu else None,
        emit=emit,
        **conv._options,
    )


def _is_left_out(module: nn.Module) -> bool:
    """In eval mode, and its call may be left out."""
    return not module.training and is_bare(module)


def _is_norm(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d and module.running_mean is not None


class IntegerTimmBasicBlock(IntegerBlock):
    """timm's BasicBlock without attention and anti-aliasing."""

    stages = (("conv1", "bn1", "act1"), ("conv2", "bn2", "act2"))


class IntegerTimmBottleneck(IntegerBlock):
    """timm's Bottleneck without attention and anti-aliasing."""

    stages = (("conv1", "bn1", "act1"), ("conv2", "bn2", "act2"), ("conv3", "bn3", "act3"))


class IntegerTorchvisionBasicBlock(IntegerBlock):
    """torchvision's BasicBlock, whose one ReLU is called twice."""

    stages = (("conv1", "bn1", "relu"), ("conv2", "bn2", "relu"))


class IntegerTorchvisionBottleneck(IntegerBlock):
    """torchvision's Bottleneck, whose one ReLU is called three times."""

    stages = (("conv1", "bn1", "relu"), ("conv2", "bn2", "relu"), ("conv3", "bn3", "relu"))


_MIXINS: dict[tuple[str, str], type[IntegerBlock]] = {
    ("timm.models.resnet", "BasicBlock"): IntegerTimmBasicBlock,
    ("timm.models.resnet", "Bottleneck"): IntegerTimmBottleneck,
    ("torchvision.models.resnet", "BasicBlock"): IntegerTorchvisionBasicBlock,
    ("torchvision.models.resnet", "Bottleneck"): IntegerTorchvisionBottleneck,
}


def mixin_of(block: Any) -> type[IntegerBlock] | None:
    """What can run the block from integers to integers, or None."""
    for known in KNOWN:
        mixin = _MIXINS.get((known.module, known.name))
        if mixin is None or not known.runs(block):
            continue
        parts = [getattr(block, part, None) for stage in mixin.stages for part in stage]
        convs = [getattr(block, conv) for conv, _, _ in mixin.stages]
        activations = [getattr(block, activation) for _, _, activation in mixin.stages]
        if (
            all(isinstance(part, nn.Module) for part in parts)
            and all(isinstance(c, Int16Conv2d) and c.padding_mode == "zeros" for c in convs)
            and all(type(activation) is nn.ReLU for activation in activations)
            and getattr(block, "se", None) is None
            and type(getattr(block, "aa", nn.Identity())) is nn.Identity
        ):
            return mixin
    return None
