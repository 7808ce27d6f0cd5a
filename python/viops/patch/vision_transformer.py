"""What a patched timm VisionTransformer, its blocks and their attention run instead of their own.

Each is a mixin that goes before the module's own class.  The class made of both replaces the
module's class, and nothing else about the module changes: parameters, buffers, hooks and state_dict
keys stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops.token_reorganization import (
    class_attention,
    class_attention_scores,
    reorganize_tokens,
    restore_tokens,
)


class KeptTokens(NamedTuple):
    """What one patched layer kept; `viops.restore_tokens` takes both."""

    #: [B, keep], int64: places among the tokens that entered the layer, without the prefix, by
    #: falling score.  The fused token of the layer before is the last of them.
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    #: How many such input tokens there were.
    num_patches: int


class Reorganization(NamedTuple):
    """What a patched block does when a call does not say otherwise."""

    keep_rate: float
    num_prefix: int
    fuse: bool


class Patched(nn.Module):
    """A module whose class was replaced by one made of a mixin and its own class."""

    #: How the mixin shows in the name of the class, before the name of the module's own.
    prefix = ""

    if TYPE_CHECKING:  # attributes are those of timm's class

        def __getattr__(self, name: str) -> Any: ...

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class is made at run time, so pickle and deepcopy cannot find it by name.
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return _new_patched, type(self).__bases__, *reduced[2:]


@cache
def patched_class(mixin: Any, own: Any) -> Any:
    """The class of a module of class `own` once it is patched with `mixin`."""
    return type(mixin.prefix + own.__name__, (mixin, own), {"__module__": __name__})


def _new_patched(mixin: type, own: type) -> Patched:
    cls = patched_class(mixin, own)
    return cls.__new__(cls)


def patch_module(module: Any, mixin: Any) -> None:
    """Replaces the module's class by one made of the mixin and its own."""
    own: Any = type(module)
    module.__class__ = patched_class(mixin, own)


def own_class(module: Patched) -> type:
    """The class that the module had before it was patched."""
    return type(module).__bases__[1]


def check_keep_rate(name: str, keep_rate: Any) -> float:
    """A keep rate as a float."""
    if isinstance(keep_rate, bool) or not isinstance(keep_rate, Real):
        raise TypeError(f"{name}: expected a number, got {type(keep_rate).__name__}")
    rate = float(keep_rate)
    if not 0 < rate <= 1:
        raise ValueError(f"{name}: expected above 0 and at most 1, got {keep_rate}")
    return rate


def check_keep_rates(keep_rate: float | Sequence[float], num_layers: int) -> list[float]:
    """One keep rate per patched layer, from a number or a sequence."""
    if isinstance(keep_rate, (list, tuple)):
        if len(keep_rate) != num_layers:
            raise ValueError(
                f"keep_rate: expected a number or one for each of the {num_layers} patched layers, "
                f"got {len(keep_rate)}"
            )
        return [check_keep_rate(f"keep_rate[{i}]", rate) for i, rate in enumerate(keep_rate)]
    return [check_keep_rate("keep_rate", keep_rate)] * num_layers


def _refuse_mask(attn_mask: object, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        name = "is_causal" if attn_mask is None else "attn_mask"
        raise ValueError(
            f"{name}: token reorganization takes no attention mask, because a mask for all tokens "
            "does not fit the ones that are kept; expected none"
        )


class ScoringAttention(Patched):
    """timm's Attention, which on demand also returns the class token's attention to each patch."""

    prefix = "Scoring"

    def forward(self, x: Tensor, *args: Any, num_prefix: int = 0, **kwargs: Any) -> Any:
        """x [B, N, C] -> out [B, N, C], and with num_prefix scores [B, N - num_prefix]."""
        if not num_prefix:
            return super().forward(x, *args, **kwargs)
        batch, num_tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, num_tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, D]
        # a norm may give float32 under autocast; scaled_dot_product_attention would cast it too
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        dropout = self.attn_drop.p if self.training else 0.0
        if dropout:
            scores = class_attention_scores(q, k, num_prefix=num_prefix, scale=self.scale)
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        else:
            out, scores = class_attention(q, k, v, num_prefix=num_prefix, scale=self.scale)
        out = out.transpose(1, 2).flatten(2)  # [B, N, H * D]
        norm, gate = getattr(self, "norm", None), getattr(self, "gate", None)  # not in every timm
        if norm is not None:
            out = norm(out)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out)), scores


class ReorganizingBlock(Patched):
    """timm's Block with token reorganization between attention and MLP."""

    prefix = "Reorganizing"
    reorganization: Reorganization

    def forward(
        self,
        x: Tensor,
        attn_mask: None = None,
        is_causal: bool = False,
        *,
        keep_rate: float | None = None,
        return_index: bool = False,
    ) -> Any:
        """x [B, N, C] -> x [B, num_prefix + keep + fuse, C], and index [B, keep] on demand."""
        _refuse_mask(attn_mask, is_causal)
        default_rate, num_prefix, fuse = self.reorganization
        num_patches = x.shape[1] - num_prefix
        keep = math.ceil((default_rate if keep_rate is None else keep_rate) * num_patches)
        if keep == num_patches:
            if not return_index:
                return super().forward(x)
            index = torch.arange(num_patches, device=x.device).repeat(x.shape[0], 1)
            return super().forward(x), index
        out, scores = self.attn(self.norm1(x), num_prefix=num_prefix)
        x = x + self.drop_path1(self.ls1(out))
        x, index = reorganize_tokens(x, scores, keep, num_prefix=num_prefix, fuse=fuse)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return (x, index) if return_index else x

    def extra_repr(self) -> str:
        keep_rate, num_prefix, fuse = self.reorganization
        return f"keep_rate={keep_rate}, num_prefix={num_prefix}, fuse={fuse}"


class ReorganizingVisionTransformer(Patched):
    """timm's VisionTransformer, with keep rates and kept indices by the call."""

    prefix = "Reorganizing"

    def forward(
        self,
        x: Tensor,
        attn_mask: None = None,
        is_causal: bool = False,
        *,
        keep_rate: float | Sequence[float] | None = None,
        return_index: bool = False,
    ) -> Any:
        """x [B, 3, H, W] -> what the model's head gives, and a list of KeptTokens on demand."""
        features = self.forward_features(
            x, attn_mask, is_causal, keep_rate=keep_rate, return_index=return_index
        )
        if not return_index:
            return self.forward_head(features)
        features, kept = features
        return self.forward_head(features), kept

    def forward_features(
        self,
        x: Tensor,
        attn_mask: None = None,
        is_causal: bool = False,
        *,
        keep_rate: float | Sequence[float] | None = None,
        return_index: bool = False,
    ) -> Any:
        """x [B, 3, H, W] -> the tokens after the last block, normalised: [B, M, C]."""
        _refuse_mask(attn_mask, is_causal)
        kept: list[KeptTokens] | None = [] if return_index else None
        x = self._embed(x)
        for block, rate in zip(self.blocks, self._rates(keep_rate), strict=True):
            x = self._run_block(block, x, rate, kept)
        x = self.norm(x)
        return (x, kept) if return_index else x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: None = None,
        is_causal: bool = False,
        *,
        keep_rate: float | Sequence[float] | None = None,
    ) -> Any:
        """timm's forward_intermediates, with every patch in its place.

        Kept tokens stand where they came from, and the fused token, or zeros without one, at all
        other places: viops.restore_tokens.  The final features are those of forward_features.
        """
        from timm.models._features import feature_take_indices

        _refuse_mask(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        num_prefix = self.num_prefix_tokens
        batch, _, height, width = x.shape
        x = self._embed(x)
        kept: list[KeptTokens] = []
        taken = []  # each [B, N, C]
        for i, (block, rate) in enumerate(zip(self.blocks, self._rates(keep_rate), strict=True)):
            if stop_early and i > last:
                break
            x = self._run_block(block, x, rate, kept)
            if i in take:
                tokens = self.norm(x) if norm else x
                for index, num_patches in reversed(kept):
                    tokens = restore_tokens(tokens, index, num_patches, num_prefix=num_prefix)
                taken.append(tokens)
        prefix_tokens = [tokens[:, :num_prefix] for tokens in taken]
        intermediates = [tokens[:, num_prefix:] for tokens in taken]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size((height, width))
            intermediates = [
                tokens.reshape(batch, *grid, -1).permute(0, 3, 1, 2).contiguous()
                for tokens in intermediates
            ]
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": intermediates}
            if return_prefix_tokens:
                result["image_intermediates_prefix"] = prefix_tokens
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        if return_prefix_tokens:
            intermediates = list(zip(intermediates, prefix_tokens, strict=True))
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def _embed(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the tokens that enter the first block, [B, N, C]."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))

    def _rates(self, keep_rate: float | Sequence[float] | None) -> list[float | None]:
        """For each block its keep rate, or None where it is not patched."""
        patched = [isinstance(block, ReorganizingBlock) for block in self.blocks]
        if keep_rate is None:
            return [
                block.reorganization.keep_rate if is_patched else None
                for block, is_patched in zip(self.blocks, patched, strict=True)
            ]
        rates = iter(check_keep_rates(keep_rate, sum(patched)))
        return [next(rates) if is_patched else None for is_patched in patched]

    def _run_block(
        self, block: nn.Module, x: Tensor, rate: float | None, kept: list[KeptTokens] | None
    ) -> Tensor:
        """Runs one block on x [B, N, C]; what it kept is added to `kept` where there is a list."""
        options: dict[str, Any] = {}
        if rate is not None:
            options = {"keep_rate": rate, "return_index": kept is not None}
        if self.grad_checkpointing:
            out = checkpoint(block, x, use_reentrant=False, **options)
        else:
            out = block(x, **options)
        if rate is None or kept is None:
            return out
        out, index = out
        kept.append(KeptTokens(index, x.shape[1] - self.num_prefix_tokens))
        return out
