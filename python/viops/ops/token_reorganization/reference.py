"""Plain PyTorch for token reorganization: the yardstick of the kernels and the fallback.

Source: Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
Reorganizations" (EViT), ICLR 2022, sections 3.2 and 3.3.

The functions without a suffix are differentiable by autograd.  Those called ``*_backward`` are the
same derivatives written out, for callers that stand below autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...tensors import accumulation_dtype


def class_attention(
    q: Tensor, k: Tensor, v: Tensor, *, num_prefix: int = 1, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention through the whole matrix, and the scores read off its first row."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    attention = (q @ k.transpose(-2, -1) * scale).softmax(dim=-1)  # [B, H, N, N]
    out = (attention @ v).transpose(1, 2).contiguous().transpose(1, 2)  # [B, H, N, D]
    scores = attention[:, :, 0, num_prefix:].to(accumulation_dtype(q.dtype)).mean(dim=1)
    return out, scores.float()  # [B, N - num_prefix]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention through the whole matrix."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return softmax_attention_forward(q, k, v, scale)[0]


def softmax_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The same, and the logarithm of the sum of each row's exponentials, [B, H, N]."""
    dtype = accumulation_dtype(q.dtype)
    logits = q.to(dtype) @ k.to(dtype).transpose(-2, -1) * scale  # [B, H, N, N]
    out = (logits.softmax(dim=-1) @ v.to(dtype)).to(q.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), logits.logsumexp(dim=-1)


def softmax_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k and v: [B, H, N, D], laid out as [B, N, H, D]."""
    dtype = logsumexp.dtype
    wide_q, wide_k, wide_v, grad = (t.to(dtype) for t in (q, k, v, grad_out))
    logits = wide_q @ wide_k.transpose(-2, -1) * scale  # [B, H, N, N]
    attention = (logits - logsumexp.unsqueeze(-1)).exp()
    grad_attention = grad @ wide_v.transpose(-2, -1)
    inner = (grad * out.to(dtype)).sum(dim=-1, keepdim=True)  # [B, H, N, 1]
    grad_logits = attention * (grad_attention - inner) * scale
    grads = (
        grad_logits @ wide_k,
        grad_logits.transpose(-2, -1) @ wide_q,
        attention.transpose(-2, -1) @ grad,
    )
    grad_q, grad_k, grad_v = (
        g.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2) for g in grads
    )
    return grad_q, grad_k, grad_v


def class_attention_scores(
    q: Tensor, k: Tensor, *, num_prefix: int = 1, scale: float | None = None
) -> Tensor:
    """Mean over the heads of the class token's attention to the patches."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return class_attention_scores_forward(q, k, num_prefix, scale)[0]


def class_attention_scores_forward(
    q: Tensor, k: Tensor, num_prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Scores [B, N - num_prefix] and the probabilities [B, H, N] that backward needs."""
    dtype = accumulation_dtype(q.dtype)
    # a product and a sum, since autocast would take a matrix product out of this dtype
    logits = (k.to(dtype) * q[:, :, :1].to(dtype)).sum(dim=-1) * scale  # [B, H, N]
    probabilities = logits.softmax(dim=-1)
    return probabilities[:, :, num_prefix:].mean(dim=1).float(), probabilities


def class_attention_scores_backward(
    grad_scores: Tensor, q: Tensor, k: Tensor, probabilities: Tensor, num_prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients to q (zero but in row 0) and k: [B, H, N, D], laid out as [B, N, H, D]."""
    dtype = probabilities.dtype
    num_heads = q.shape[1]
    grad_p = torch.zeros_like(probabilities)  # [B, H, N]
    grad_p[:, :, num_prefix:] = (grad_scores.to(dtype) / num_heads).unsqueeze(1)
    inner = (grad_p * probabilities).sum(dim=-1, keepdim=True)
    grad_logits = probabilities * (grad_p - inner) * scale  # [B, H, N]
    batch, _, num_tokens, head_dim = q.shape
    grad_q = q.new_zeros(batch, num_tokens, num_heads, head_dim)
    grad_q[:, 0] = (grad_logits.unsqueeze(-1) * k.to(dtype)).sum(dim=2).to(q.dtype)
    grad_k = (grad_logits.unsqueeze(-1) * q[:, :, :1].to(dtype)).to(k.dtype)
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2).contiguous().transpose(1, 2)


def reorganize_tokens(
    x: Tensor, scores: Tensor, keep: int, *, num_prefix: int = 1, fuse: bool = True
) -> tuple[Tensor, Tensor]:
    """Keep the `keep` best-scored patch tokens and fuse the others into one."""
    num_patches = scores.shape[1]
    if keep == num_patches:
        places = torch.arange(num_patches, device=x.device)
        return x, places.expand(x.shape[0], num_patches).contiguous()
    return reorganize_tokens_forward(x, scores, keep, num_prefix, fuse)


def reorganize_tokens_forward(
    x: Tensor, scores: Tensor, keep: int, num_prefix: int, fuse: bool
) -> tuple[Tensor, Tensor]:
    """The same for keep < num_patches: tokens [B, num_prefix + keep + fuse, C], index [B, keep]."""
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices  # NaN sorts as highest
    index = order[:, :keep].contiguous()
    patches = x[:, num_prefix:]  # [B, P, C]
    parts = [x[:, :num_prefix], patches.gather(1, _rows(index, x))]
    if fuse:
        dtype = accumulation_dtype(x.dtype, scores.dtype)
        dropped = order[:, keep:].sort(dim=1).values  # [B, P - keep], by place
        weight = scores.gather(1, dropped).unsqueeze(-1).to(dtype)
        fused = (weight * patches.gather(1, _rows(dropped, x)).to(dtype)).sum(dim=1, keepdim=True)
        parts.append(fused.to(x.dtype))
    return torch.cat(parts, dim=1), index


def reorganize_tokens_backward(
    grad_tokens: Tensor,
    x: Tensor | None,
    scores: Tensor,
    index: Tensor,
    num_prefix: int,
    need_x: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to x [B, N, C], if need_x, and to scores [B, P], if x is given; else [0]."""
    keep = index.shape[1]
    dtype = accumulation_dtype(grad_tokens.dtype, scores.dtype)
    dropped = torch.ones_like(scores, dtype=torch.bool).scatter(1, index, False)  # [B, P]
    grad_fused = grad_tokens[:, num_prefix + keep :].to(dtype)  # [B, 0 or 1, C]
    if grad_fused.shape[1] == 0:
        grad_fused = grad_fused.new_zeros(grad_tokens.shape[0], 1, grad_tokens.shape[2])
    grad_x = grad_tokens.new_empty(0)
    grad_scores = scores.new_empty(0)
    if need_x:
        counts = dropped if grad_tokens.shape[1] > num_prefix + keep else torch.zeros_like(dropped)
        weight = torch.where(counts, scores.to(dtype), 0).unsqueeze(-1)  # [B, P, 1]
        kept = grad_tokens[:, num_prefix : num_prefix + keep]
        patches = (weight * grad_fused).to(grad_tokens.dtype)
        patches = patches.scatter(1, _rows(index, grad_tokens), kept)
        grad_x = torch.cat([grad_tokens[:, :num_prefix], patches], dim=1)
    if x is not None:
        inner = (x[:, num_prefix:].to(dtype) * grad_fused).sum(dim=-1)  # [B, P]
        grad_scores = torch.where(dropped, inner, 0).to(scores.dtype)
    return grad_x, grad_scores


def restore_tokens(
    tokens: Tensor, index: Tensor, num_patches: int, *, num_prefix: int = 1
) -> Tensor:
    """Kept tokens back at their places, the fused token (zero without one) at all others."""
    return restore_tokens_forward(tokens, index, num_patches, num_prefix)


def restore_tokens_forward(
    tokens: Tensor, index: Tensor, num_patches: int, num_prefix: int
) -> Tensor:
    """The same with positional arguments, as the registered op takes them."""
    keep = index.shape[1]
    batch, _, channels = tokens.shape
    fused = tokens[:, num_prefix + keep :]  # [B, 0 or 1, C]
    if fused.shape[1] == 0:
        fused = tokens.new_zeros(batch, 1, channels)
    kept = tokens[:, num_prefix : num_prefix + keep]
    patches = fused.expand(batch, num_patches, channels).scatter(1, _rows(index, tokens), kept)
    return torch.cat([tokens[:, :num_prefix], patches], dim=1)


def restore_tokens_backward(
    grad_x: Tensor, index: Tensor, num_tokens: int, num_prefix: int
) -> Tensor:
    """Gradient to tokens [B, num_tokens, C]."""
    dtype = accumulation_dtype(grad_x.dtype)
    keep = index.shape[1]
    grad_patches = grad_x[:, num_prefix:]  # [B, P, C]
    parts = [grad_x[:, :num_prefix], grad_patches.gather(1, _rows(index, grad_x))]
    if num_tokens > num_prefix + keep:
        others = grad_x.new_ones(*grad_patches.shape[:2], 1, dtype=torch.bool)  # [B, P, 1]
        others = others.scatter(1, index.unsqueeze(-1), False)
        fused = torch.where(others, grad_patches.to(dtype), 0).sum(dim=1, keepdim=True)
        parts.append(fused.to(grad_x.dtype))
    return torch.cat(parts, dim=1)


def _rows(index: Tensor, like: Tensor) -> Tensor:
    """index [B, K] expanded to [B, K, C], as gather and scatter take it."""
    return index.unsqueeze(-1).expand(-1, -1, like.shape[-1])
