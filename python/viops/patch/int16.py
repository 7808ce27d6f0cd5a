"""INT16 integer layers put into a network, and taken out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from ..ops.integer_conv.module import Int16Conv2d, Int16Linear
from ..ops.integer_conv.op import check_options
from .integer_blocks import IntegerBlock, mixin_of
from .model_checks import check_module, check_not_patched, check_skip, is_skipped, name_of
from .vision_transformer import own_class, patch_module

Model = TypeVar("Model", bound=nn.Module)


class IntegerConv2d(Int16Conv2d):
    """What a Conv2d becomes; `undo` knows it by its class."""


class IntegerLinear(Int16Linear):
    """What a Linear becomes; `undo` knows it by its class."""


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: IntegerConv2d,
    nn.Linear: IntegerLinear,
}


def int16(
    model: Model,
    *,
    skip: Sequence[str] | None = None,
    bits: int = 13,
    scaling: str = "power_of_two",
    rounding: str = "nearest",
) -> Model:
    """Makes a network's convolutions and linear layers multiply INT16 integers, in training too.

    Each Conv2d becomes a `viops.nn.Int16Conv2d`, each Linear a `viops.nn.Int16Linear`.  Weights
    stay float32, and so do batch norm, activations and sums of residual blocks; hyper-parameters
    need no change.  The model is changed in place; its parameters stay the same objects and its
    state_dict the same.  `viops.patch.undo` takes it back.

    In timm's and torchvision's ResNet blocks, in eval mode and where no gradient is asked for,
    batch norm, ReLU and the sum run within the convolution before them, which hands its result to
    the next one as integers.

    A layer whose weight the model reads by itself stays what it was there, as with
    ``F.linear(x, self.qkv.weight, bias)`` in some of timm's attention and the fast path of
    nn.TransformerEncoderLayer: name it in `skip`.  What is in an nn.MultiheadAttention, which does
    so, is left alone.  Layers return float32: do not convert the model to another dtype.  A
    weight's integers are kept until it changes; what counts as a change says
    `viops.nn.Int16Conv2d`.

    Args:
        model: a network, not wrapped in anything: patch first, then compile or distribute.
        skip: names of modules that stay as they are, with all that is in them.  None: the first
            and the last of the layers, in the order of ``model.named_modules()``, as usual in the
            field: the first has few channels, and the last gives logits.  Names given replace
            these two.
        bits, scaling, rounding: as in `viops.quantize_dfp`.

    Returns:
        The same model.

    Raises:
        TypeError: a layer's class derives from torch's own: give its name in `skip`.
        ValueError: there is nothing to patch, the model is patched already, a layer is not float32,
            or an argument is not as above.

    Source: Das et al., arXiv:1802.00930, section 4.
    """
    check_module(model)
    check_not_patched(is_patched(model))
    bits = check_options(bits, scaling, rounding, None)
    layers = _layers(model, skip)
    if not layers:
        raise ValueError(
            "model: expected one with convolutions or linear layers to patch, got "
            f"{type(model).__name__} without any that are not skipped"
        )
    for layer in layers:
        layer.__class__ = _CLASSES[type(layer)]
        layer._set_options(bits, scaling, rounding)
    for block in list(model.modules()):
        mixin: Any = mixin_of(block)
        if mixin is not None:
            patch_module(block, mixin)
    return model


def _layers(model: nn.Module, skip: Sequence[str] | None) -> list[Any]:
    """Those that are to be replaced."""
    within_attention = {
        id(part)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for part in module.modules()
    }
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and id(module) not in within_attention
    ]
    if skip is None:
        names = [name for name, _ in candidates]
        skipped = {*names[:1], *names[-1:]}
    else:
        skipped = set(check_skip(model, skip))
    layers = []
    for name, module in candidates:
        if is_skipped(name, skipped):
            continue
        if type(module) not in _CLASSES:
            raise TypeError(
                f"{name}: expected torch's own Conv2d or Linear, got {name_of(module)}; with its "
                "name in skip it stays as it is"
            )
        if module.weight.dtype is not torch.float32:
            raise ValueError(
                f"{name}: expected a float32 weight, got {module.weight.dtype}; with its name in "
                "skip it stays as it is"
            )
        layers.append(module)
    return layers


def undo(model: Model) -> Model:
    """Takes out of the model what `int16` put in, in place; returns the same model.

    Raises:
        ValueError: a layer's class has changed since, as a parametrization changes it.
    """
    for name, module in model.named_modules():
        if isinstance(module, (IntegerConv2d, IntegerLinear)) and type(module) not in (
            IntegerConv2d,
            IntegerLinear,
        ):
            raise ValueError(
                f"{name}: expected what int16 put in, got {type(module).__name__}: take "
                "parametrizations out first"
            )
    modules: list[Any] = list(model.modules())
    for module in modules:
        if isinstance(module, IntegerBlock):
            module.__class__ = own_class(module)
        for plain, integer in _CLASSES.items():
            if type(module) is integer:
                del module.bits, module.scaling, module.rounding, module._kept
                module.__class__ = plain
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether int16 has changed something in the model."""
    return any(
        isinstance(module, (IntegerConv2d, IntegerLinear, IntegerBlock))
        for module in model.modules()
    )
