"""Decayed attention (RMT) put into a timm VisionTransformer, and patches taken out again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.decayed_attention import decayed_attention
from ..ops.decayed_attention.module import WideBuffers, log_decays
from ..ops.decayed_attention.prefix import attention_with_prefix
from .evit import undo as undo_evit
from .model_checks import check_not_patched, name_of
from .vision_transformer import Patched, ReorganizingVisionTransformer, own_class, patch_module

Model = TypeVar("Model", bound=nn.Module)


class DecayingAttention(Patched, WideBuffers):
    """timm's Attention whose logits decay with the distance between patches on their grid."""

    prefix = "Decaying"
    log_decay: Tensor  # [H], a buffer that state_dict leaves out
    #: The decays as numbers, for a model that leaves the meta device.
    decays: tuple[float, ...]
    #: The model, whose patch_embed knows the grid; in a tuple, as it is no part of attention.
    grid_of: tuple[nn.Module]
    num_prefix: int

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, C] -> [B, N, C]."""
        if attn_mask is not None or is_causal:
            name = "is_causal" if attn_mask is None else "attn_mask"
            raise ValueError(f"{name}: decayed attention takes no attention mask; expected none")
        if self.training and self.attn_drop.p > 0:
            raise ValueError(
                f"attn_drop: decayed attention has no dropout; expected 0, got {self.attn_drop.p}"
            )
        height, width = self._check_grid(x)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, D]
        # a norm may give float32 under autocast; scaled_dot_product_attention would cast it too
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        out = self._attend(q, k, v, height, width)
        norm, gate = getattr(self, "norm", None), getattr(self, "gate", None)  # not in every timm
        if norm is not None:
            out = norm(out)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """q, k, v [B, H, N, D] -> [B, N, H D]."""
        q_grid, k_grid, v_grid = (
            t[:, :, self.num_prefix :].unflatten(2, (height, width)) for t in (q, k, v)
        )  # each [B, H, h, w, D]
        if self.num_prefix == 0:
            out = decayed_attention(q_grid, k_grid, v_grid, self.log_decay, scale=self.scale)
            return out.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)
        prefix_q, prefix_k, prefix_v = (t[:, :, : self.num_prefix] for t in (q, k, v))
        of_patches = attention_with_prefix(
            q_grid, k_grid, v_grid, prefix_k, prefix_v, self.log_decay, self.scale
        )
        of_prefix = F.scaled_dot_product_attention(prefix_q, k, v, scale=self.scale)
        out = torch.cat([of_prefix, of_patches.flatten(2, 3)], dim=2)  # [B, H, N, D]
        return out.transpose(1, 2).flatten(2)

    def _check_grid(self, x: Tensor) -> tuple[int, int]:
        model: Any = self.grid_of[0]
        height, width = model.patch_embed.grid_size
        if x.shape[1] != self.num_prefix + height * width:
            raise ValueError(
                f"x: expected {self.num_prefix} + {height} * {width} tokens, the whole grid of "
                f"patches after the prefix, got {x.shape[1]}"
            )
        return height, width

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DecayingAttention:
        was_meta = self.log_decay.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.log_decay.is_meta:  # no state_dict has it
            self.log_decay.copy_(torch.tensor(self.decays))
        return self

    def extra_repr(self) -> str:
        return f"log_decay={[round(value, 4) for value in self.decays]}"


def manhattan(
    model: Model,
    log_decay: Tensor | Sequence[float] | None = None,
    *,
    initial_value: float = 2.0,
    heads_range: float = 4.0,
    layers: Sequence[int] | None = None,
) -> Model:
    """Makes the attention of a timm VisionTransformer decay over its grid of patches.

    To the logit of two patches, log_decay times their Manhattan distance on the grid is added, for
    each head its own.  Class, distillation and register tokens are at distance 0 from all tokens.
    With decays of zero the model computes what it did before.

    The model is changed in place and called as before; its parameters and state_dict keys stay as
    they are, and `viops.patch.undo` takes everything back.  Attention masks are refused, and tokens
    that are not the whole grid, as patch dropout makes them.

    Args:
        model: timm.models.vision_transformer.VisionTransformer or the distilled DeiT, not wrapped
            in anything: patch first, then compile or distribute.
        log_decay: [H], the logarithm of each head's decay per step, at most 0 and
            finite; None is RMT's,
            ``log(1 - 2 ** -(initial_value + heads_range * i / H))`` for head i.
        initial_value, heads_range: of RMT's decays.
        layers: places in ``model.blocks``; None is all.

    Returns:
        The same model.

    Raises:
        TypeError: the model or its attention has a forward that is not known here.
        ValueError: the model is patched already, has attention dropout or takes images of any size
            (dynamic_img_size), or an argument is not as above.

    Source: RMT (Fan et al., CVPR 2024), section 3.2, whose models have a grid alone.
    """
    timm_vit = _check_model(model)
    blocks: Any = model.blocks
    places = range(len(blocks)) if layers is None else _check_layers(layers, len(blocks))
    for i in places:
        _check_attention(f"model.blocks[{i}].attn", getattr(blocks[i], "attn", None), timm_vit)
    decays = [
        _check_decay(log_decay, blocks[i].attn.num_heads)
        if log_decay is not None
        else log_decays(blocks[i].attn.num_heads, initial_value, heads_range)
        for i in places
    ]
    for i, decay in zip(places, decays, strict=True):
        attention = blocks[i].attn
        patch_module(attention, DecayingAttention)
        attention.register_buffer(
            "log_decay", decay.to(attention.qkv.weight.device, copy=True), persistent=False
        )
        attention.decays = tuple(decay.tolist())
        attention.grid_of = (model,)
        attention.num_prefix = model.num_prefix_tokens
    return model


def undo(model: Model) -> Model:
    """Takes out of the model what `manhattan` and `evit` put in, in place; returns the same."""
    for module in list(model.modules()):
        if isinstance(module, DecayingAttention):
            del module.log_decay, module.decays, module.grid_of, module.num_prefix
            patched: Any = module
            patched.__class__ = own_class(module)
    if isinstance(model, ReorganizingVisionTransformer):
        undo_evit(model)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether manhattan or evit has changed something in the model."""
    return isinstance(model, ReorganizingVisionTransformer) or any(
        isinstance(module, DecayingAttention) for module in model.modules()
    )


def _check_model(model: nn.Module) -> Any:
    """Raises unless the model can be patched; returns timm's module of vision transformers."""
    timm_vit = sys.modules.get("timm.models.vision_transformer")  # a model of timm's has loaded it
    if timm_vit is None or not isinstance(model, timm_vit.VisionTransformer):
        raise TypeError(
            "model: expected timm's VisionTransformer, before it is wrapped by torch.compile, "
            f"DistributedDataParallel or the like, got {name_of(model)}"
        )
    check_not_patched(any(isinstance(module, Patched) for module in model.modules()))
    if getattr(model, "dynamic_img_size", False):
        raise ValueError(
            "model: with dynamic_img_size its blocks are not told the grid; expected a model for "
            "images of one size"
        )
    return timm_vit


def _check_layers(layers: Sequence[int], depth: int) -> Sequence[int]:
    if (
        not isinstance(layers, Sequence)
        or not layers
        or any(type(layer) is not int or not 0 <= layer < depth for layer in layers)
        or len(set(layers)) < len(layers)
    ):
        raise ValueError(
            f"layers: expected different ints, each of 0 to {depth - 1} (the model has {depth} "
            f"blocks), got {layers!r}"
        )
    return layers


def _check_attention(name: str, attention: Any, timm_vit: Any) -> None:
    own = timm_vit.Attention.forward
    if getattr(type(attention), "forward", None) is not own or "forward" in vars(attention):
        raise TypeError(
            f"{name}: expected timm's Attention.forward, which decayed attention rewrites, got "
            f"another forward in {name_of(attention)}"
        )
    if attention.attn_drop.p > 0:
        raise ValueError(
            f"{name}: decayed attention has no dropout; expected attn_drop = 0, "
            f"got {attention.attn_drop.p}"
        )


def _check_decay(log_decay: Tensor | Sequence[float], num_heads: int) -> Tensor:
    decay = torch.as_tensor(log_decay, dtype=torch.float32).detach()
    if decay.shape != (num_heads,):
        raise ValueError(f"log_decay: expected [H] = [{num_heads}], got shape {list(decay.shape)}")
    if not (decay <= 0).all() or not decay.isfinite().all():
        raise ValueError(f"log_decay: expected at most 0 and finite, got {decay.tolist()}")
    return decay
