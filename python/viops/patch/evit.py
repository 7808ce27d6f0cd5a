"""Token reorganization (EViT) put into a timm VisionTransformer, and taken out again."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..ops.token_reorganization import restore_tokens
from .model_checks import check_not_patched, name_of
from .vision_transformer import (
    KeptTokens,
    Patched,
    Reorganization,
    ReorganizingBlock,
    ReorganizingVisionTransformer,
    ScoringAttention,
    check_keep_rates,
    own_class,
    patch_module,
)

Model = TypeVar("Model", bound=nn.Module)


def evit(
    model: Model,
    keep_rate: float | Sequence[float] = 0.7,
    layers: Sequence[int] = (3, 6, 9),
    fuse: bool = True,
) -> Model:
    """Makes a timm VisionTransformer drop the patches that its class token attends to least.

    In each of the chosen blocks, between attention and MLP, of the P patch tokens that entered
    the block the ceil(keep_rate * P) with the highest class-token attention stay, and the others
    become one. In later layers that fused token counts as a patch token. Class, distillation and
    register tokens always stay. Where every token would stay, the block does just what timm's
    does.

    The model is changed in place; its parameters and state_dict keys stay as they are, and
    `viops.patch.undo` takes everything back.  A patched model is called as before, or with

    - ``keep_rate=``: for this call, a number, or a list or tuple with one for each patched layer;
    - ``return_index=True``: returns (output, kept), where kept has for each patched layer a
      `KeptTokens` (index, num_patches).  With tokens [B, M, C] from ``model.forward_features``::

          for index, num_patches in reversed(kept):
              tokens = viops.restore_tokens(tokens, index, num_patches, num_prefix=num_prefix)

    ``forward_features`` takes these two as well, and ``forward_intermediates``, which returns every
    patch in its place, takes keep_rate.  Attention masks are refused.

    Scores come from the softmax before attention dropout. Pooling over patches ("avg", "max",
    "map" and so on) takes the fused token for one of them. Patch dropout comes first, and indices
    count the patches that it left. With dynamic_img_size, P is that of each input. Gradient
    checkpointing is the non-reentrant kind. Attention in the chosen blocks runs without storing
    its matrix, whether or not timm's fused_attn is set.

    Args:
        model: timm.models.vision_transformer.VisionTransformer or the distilled DeiT, not wrapped
            in anything: patch first, then compile or distribute.
        keep_rate: share of the patch tokens that stays, above 0 and at most 1, or a list or tuple
            with one for each layer.
        layers: places in ``model.blocks``, rising.
        fuse: whether the dropped tokens become one, or are lost.

    Returns:
        The same model.

    Raises:
        TypeError: the model, a block or its attention has a forward that is not known here.
        ValueError: the model has no class token or is patched already, or an argument is not as
            above.

    Source: EViT (Liang et al., ICLR 2022), section 3.  The authors' code takes the distillation
    token for a patch, and takes the scores after attention dropout; this function does neither.
    """
    timm_vit = _check_model(model)
    blocks: Any = model.blocks
    num_prefix: Any = model.num_prefix_tokens
    layers = _check_layers(layers, len(blocks))
    keep_rates = check_keep_rates(keep_rate, len(layers))
    for layer in layers:
        _check_block(f"model.blocks[{layer}]", blocks[layer], timm_vit)
    for layer, rate in zip(layers, keep_rates, strict=True):
        block = blocks[layer]
        block.reorganization = Reorganization(rate, num_prefix, bool(fuse))
        patch_module(block, ReorganizingBlock)
        patch_module(block.attn, ScoringAttention)
    patch_module(model, ReorganizingVisionTransformer)
    return model


def undo(model: Model) -> Model:
    """Takes out of the model what `viops.patch.evit` put in, in place; returns the same model.

    Raises:
        ValueError: the model is not patched.
    """
    if not isinstance(model, ReorganizingVisionTransformer):
        raise ValueError(
            f"model: expected one that viops.patch.evit has patched, got {type(model).__name__}"
        )
    for module in list(model.modules()):
        if isinstance(module, ReorganizingBlock):
            del module.reorganization
        if isinstance(module, Patched):
            module.__class__ = own_class(module)
    return model


def kept_masks(kept: Sequence[KeptTokens]) -> list[Tensor]:
    """Which patches of the image are still there of themselves after each patched layer.

    Args:
        kept: what a patched model returns with ``return_index=True``.

    Returns:
        For each patched layer a mask [B, P], bool, over the P patches that entered the first one.
        A patch that was fused is False from then on, whether or not the fused token stays.
    """
    masks = []
    for depth in range(len(kept)):
        mask = torch.ones_like(kept[depth].index, dtype=torch.float32).unsqueeze(-1)  # [B, keep, 1]
        for index, num_patches in reversed(kept[: depth + 1]):
            patches = mask[:, : index.shape[1]]  # without the fused token: the others become zero
            mask = restore_tokens(patches, index, num_patches, num_prefix=0)
        masks.append(mask.squeeze(-1) > 0)
    return masks


def _check_model(model: nn.Module) -> ModuleType:
    """Raises unless the model can be patched; returns timm's module of vision transformers."""
    check_not_patched(
        isinstance(model, ReorganizingVisionTransformer),
        ", and keep_rate can be given by the call",
    )
    timm_vit = sys.modules.get("timm.models.vision_transformer")  # a model of timm's has loaded it
    if timm_vit is None or not isinstance(model, timm_vit.VisionTransformer):
        raise TypeError(
            "model: expected timm's VisionTransformer, before it is wrapped by torch.compile, "
            f"DistributedDataParallel or the like, got {name_of(model)}"
        )
    for method in ("forward", "forward_features", "forward_intermediates"):
        _check_method("model", model, method, timm_vit.VisionTransformer)
    if model.cls_token is None:
        raise ValueError("model: it has no class token, whose attention ranks the patches")
    return timm_vit


def _check_layers(layers: Sequence[int], depth: int) -> list[int]:
    try:
        places = [operator.index(layer) for layer in layers]
    except TypeError:
        raise TypeError(f"layers: expected a sequence of ints, got {layers!r}") from None
    if not places or any(not 0 <= place < depth for place in places):
        raise ValueError(
            f"layers: expected at least one, each of 0 to {depth - 1} "
            f"(the model has {depth} blocks), got {layers!r}"
        )
    if any(after <= before for before, after in pairwise(places)):
        raise ValueError(f"layers: expected a rising sequence, got {layers!r}")
    return places


def _check_block(name: str, block: Any, timm_vit: ModuleType) -> None:
    _check_method(name, block, "forward", timm_vit.Block)
    _check_method(f"{name}.attn", block.attn, "forward", timm_vit.Attention)


def _check_method(name: str, module: nn.Module, method: str, expected: type) -> None:
    """The module's method must be that of the class, for it is going to be replaced."""
    if getattr(type(module), method) is not getattr(expected, method) or method in vars(module):
        raise TypeError(
            f"{name}: expected timm's {expected.__name__}.{method}, which token reorganization "
            f"rewrites, got another {method} in {name_of(module)}"
        )
