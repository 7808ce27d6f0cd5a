"""Decayed attention of the tokens of a grid that also attend to tokens outside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import dispatch
from ...tensors import accumulation_dtype
from . import reference
from .op import _decayed_attention


def attention_with_prefix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    log_decay: Tensor,
    scale: float,
) -> Tensor:
    """One softmax over the grid, decayed by the Manhattan distance, and a prefix at distance 0.

    Each part has its softmax, and the logarithms of the two sums of exponentials say how they are
    mixed.  So the grid's part is the op's kernel, and no N x N matrix is stored.

    Args:
        q, k: [B, H, h, w, D], of one dtype.
        v: [B, H, h, w, Dv].
        prefix_k: [B, H, P, D].
        prefix_v: [B, H, P, Dv].
        log_decay: [H], constant.
        scale: factor on the dot products.

    Returns:
        out [B, H, h, w, Dv].
    """
    if log_decay.requires_grad:
        raise ValueError("log_decay: expected a constant, got a tensor that requires a gradient")
    dtype = accumulation_dtype(q.dtype)
    log_decay = log_decay.to(dtype).expand(q.shape[:2])
    if dispatch.is_reference_forced():
        return _matrix_attention(q, k, v, prefix_k, prefix_v, log_decay, scale)
    return _PrefixAttention.apply(q, k, v, prefix_k, prefix_v, log_decay, scale)[0]


class _PrefixAttention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        log_decay: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """out [B, H, h, w, Dv]; the logarithms of the sums of the exponentials over all keys,
        [B, H, h, w, 1]; and the op's three outputs for the grid alone."""
        of_grid = _decayed_attention(q, k, v, log_decay, None, None, False, scale)
        with _without_autocast(q):
            logits = _prefix_logits(q, prefix_k, scale)
            grid_sum = of_grid[1].squeeze(1).unsqueeze(-1)  # [B, H, h, w, 1]
            logsumexp = torch.logaddexp(grid_sum, logits.logsumexp(dim=-1, keepdim=True))
            weights = (logits - logsumexp).exp()  # [B, H, h, w, P]
            from_prefix = torch.einsum("bhyxp,bhpd->bhyxd", weights, prefix_v.to(logits.dtype))
            mixed = (grid_sum - logsumexp).exp() * of_grid[0] + from_prefix
        return reference.from_wide(mixed, v.dtype), logsumexp, *of_grid

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: None) -> tuple:
        q, k, v, prefix_k, prefix_v, log_decay, out, logsumexp, *of_grid = ctx.saved_tensors
        dtype = logsumexp.dtype
        with _without_autocast(q):
            grad, wide_q = grad_out.to(dtype), q.to(dtype)
            weights = (_prefix_logits(q, prefix_k, ctx.scale) - logsumexp).exp()  # [B, H, h, w, P]
            products = torch.einsum("bhyxd,bhpd->bhyxp", grad, prefix_v.to(dtype))
            delta = (grad * out).sum(dim=-1, keepdim=True)
            grad_logits = weights * (products - delta) * ctx.scale
            grad_q = torch.einsum("bhyxp,bhpd->bhyxd", grad_logits, prefix_k.to(dtype))
            grad_prefix_k = torch.einsum("bhyxp,bhyxd->bhpd", grad_logits, wide_q)
            grad_prefix_v = torch.einsum("bhyxp,bhyxd->bhpd", weights, grad)
            share = (of_grid[1].squeeze(1).unsqueeze(-1) - logsumexp).exp()
            # [B, H, h, w, 1]: the gradient to the logarithm of the grid's sum of exponentials
            grad_sum = share * ((grad * of_grid[0]).sum(dim=-1, keepdim=True) - delta)
            grad_grid = _from_grid(q, k, v, log_decay, of_grid, share * grad, grad_sum, ctx.scale)
        return (
            (grad_q + grad_grid[0]).to(q.dtype),
            grad_grid[1],
            grad_grid[2],
            grad_prefix_k.to(prefix_k.dtype),
            grad_prefix_v.to(prefix_v.dtype),
            None,
            None,
        )


def _from_grid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    of_grid: list[Tensor],
    grad_out: Tensor,
    grad_sum: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k and v from those to the grid's own output and logarithm of the sum.

    That logarithm's gradient to q_n is the mean of the keys under the weights of n, which is
    attention with keys for values; and to k it is what that attention gives values as gradient.
    """
    options = (log_decay, None, None)
    grad_q, grad_k, grad_v, _ = _decayed_attention.run_backward(
        grad_out.to(q.dtype), q, k, v, *options, *of_grid, False, scale, False
    )
    of_keys = _decayed_attention(q, k, k, *options, False, scale)
    grad_products = (grad_sum * scale * q).to(q.dtype)
    *_, from_sum, _ = _decayed_attention.run_backward(
        grad_products, q, k, k, *options, *of_keys, False, scale, False
    )
    return grad_q + grad_sum * scale * of_keys[0], grad_k + from_sum, grad_v


def _prefix_logits(q: Tensor, prefix_k: Tensor, scale: float) -> Tensor:
    """[B, H, h, w, P], in the dtype of sums."""
    dtype = accumulation_dtype(q.dtype)
    return torch.einsum("bhyxd,bhpd->bhyxp", q.to(dtype), prefix_k.to(dtype)) * scale


def _without_autocast(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)


def _matrix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    log_decay: Tensor,
    scale: float,
) -> Tensor:
    """The same through whole matrices of logits, in plain PyTorch."""
    (lines,) = reference.passes(axial=False)
    dtype = log_decay.dtype
    queries, keys, values = (lines.of(t.to(dtype)) for t in (q, k, v))
    keys = torch.cat([prefix_k.to(dtype), keys], dim=2)  # [B, H, P + N, D]
    values = torch.cat([prefix_v.to(dtype), values], dim=2)
    decay = log_decay[..., None, None] * lines.distances(q)  # [B, H, N, N]
    decay = torch.nn.functional.pad(decay, (prefix_k.shape[2], 0))
    weights = (queries @ keys.mT * scale + decay).softmax(dim=-1)
    return reference.from_wide(lines.back(weights @ values, v.shape), v.dtype)
