"""Plain PyTorch for decayed attention: the yardstick of the kernels and the fallback.

Source: Fan et al., "RMT: Retentive Networks Meet Vision Transformers", CVPR 2024, section 3.2.  The
decay is added to the logits, as the authors' code has it; the paper multiplies it to the softmax.

`decayed_attention` is differentiable by autograd; ``*_backward`` is the same derivative written
out, for callers that stand below autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...autocast import without_autocast
from ...tensors import accumulation_dtype


def decayed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    axial: bool = False,
    rotation: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention through whole matrices of logits."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sin, cos = (None, None) if rotation is None else rotation
    log_decay = log_decay.expand(q.shape[:2])
    return decayed_attention_forward(q, k, v, log_decay, sin, cos, axial, scale)[0]


@without_autocast
def decayed_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    axial: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, H, h, w, Dv]; the logarithms of the sums of the exponentials of each pass,
    [B, 1 or 2, H, h, w]; and what the first of two passes gives, [B, H, h, w, Dv], else empty.

    log_decay is [B, H]; sin and cos are [h, w, D], or [B, 1, h, w, D].
    """
    wide_q, wide_k, values = _wide(q, k, v, sin, cos)
    decay = log_decay.to(values.dtype)
    inner = v.new_empty(*v.shape[:2], 0, *v.shape[3:])
    logsumexps: list[Tensor] = []
    for lines in passes(axial):
        if logsumexps:
            inner = from_wide(values, v.dtype)
        logits = _logits(wide_q, wide_k, decay, scale, lines)
        values = lines.back(logits.softmax(dim=-1) @ lines.of(values), v.shape)
        logsumexps.append(lines.back(logits.logsumexp(dim=-1, keepdim=True), (*v.shape[:4], 1)))
    return from_wide(values, v.dtype), torch.stack(logsumexps, dim=1).squeeze(-1), inner


@without_autocast
def decayed_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    inner: Tensor,
    axial: bool,
    scale: float,
    need_log_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v and log_decay [B, H], the last one zero where it is not needed."""
    wide_q, wide_k, values = _wide(q, k, v, sin, cos)
    decay = log_decay.to(values.dtype)
    # anew, and not from the results, which are rounded to the dtype of the inputs
    entering, attentions = [], []
    for lines in passes(axial):
        entering.append(values)
        attentions.append(_logits(wide_q, wide_k, decay, scale, lines).softmax(dim=-1))
        values = lines.back(attentions[-1] @ lines.of(values), v.shape)
    grad = grad_out.to(values.dtype)
    grad_q, grad_k = torch.zeros_like(wide_q), torch.zeros_like(wide_k)
    grad_decay = torch.zeros_like(decay)
    for lines in reversed(passes(axial)):
        attention, line_v = attentions.pop(), lines.of(entering.pop())
        grad_attention = lines.of(grad) @ line_v.transpose(-2, -1)
        delta = (grad_attention * attention).sum(dim=-1, keepdim=True)
        grad_logits = attention * (grad_attention - delta)
        grad_q += lines.back(grad_logits @ lines.of(wide_k), q.shape) * scale
        grad_k += lines.back(grad_logits.transpose(-2, -1) @ lines.of(wide_q), k.shape) * scale
        if need_log_decay:
            grad_decay += (grad_logits * lines.distances(wide_q)).flatten(2).sum(dim=-1)
        grad = lines.back(attention.transpose(-2, -1) @ lines.of(grad), v.shape)
    return (
        from_wide(rotate_back(grad_q, sin, cos), q.dtype),
        from_wide(rotate_back(grad_k, sin, cos), k.dtype),
        from_wide(grad, v.dtype),
        grad_decay.to(log_decay.dtype),
    )


def _wide(
    q: Tensor, k: Tensor, v: Tensor, sin: Tensor | None, cos: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k rotated, and v, in the dtype that sums are held in."""
    dtype = accumulation_dtype(q.dtype)
    return rotate(q.to(dtype), sin, cos), rotate(k.to(dtype), sin, cos), v.to(dtype)


class _Whole:
    """All tokens of an image as one line."""

    @staticmethod
    def of(x: Tensor) -> Tensor:
        """[B, H, h, w, C] -> [B, H, h w, C]."""
        return x.flatten(2, 3)

    @staticmethod
    def back(x: Tensor, shape: tuple) -> Tensor:
        return x.reshape(shape)

    @staticmethod
    def distances(like: Tensor) -> Tensor:
        """[h w, h w]: the Manhattan distances on the grid."""
        height, width = like.shape[2:4]
        rows, columns = _distances(height, like), _distances(width, like)
        both = rows[:, None, :, None] + columns[None, :, None, :]  # [h, w, h, w]
        return both.reshape(height * width, height * width)


class _Rows:
    """Each row of the grid as a line."""

    @staticmethod
    def of(x: Tensor) -> Tensor:
        return x

    @staticmethod
    def back(x: Tensor, shape: tuple) -> Tensor:
        return x

    @staticmethod
    def distances(like: Tensor) -> Tensor:
        """[w, w]."""
        return _distances(like.shape[3], like)


class _Columns:
    """Each column of the grid as a line."""

    @staticmethod
    def of(x: Tensor) -> Tensor:
        """[B, H, h, w, C] -> [B, H, w, h, C]."""
        return x.transpose(2, 3)

    @staticmethod
    def back(x: Tensor, shape: tuple) -> Tensor:
        return x.transpose(2, 3)

    @staticmethod
    def distances(like: Tensor) -> Tensor:
        """[h, h]."""
        return _distances(like.shape[2], like)


def passes(axial: bool) -> tuple:
    """What attends to what, pass by pass."""
    return (_Rows, _Columns) if axial else (_Whole,)


def _distances(size: int, like: Tensor) -> Tensor:
    """[size, size]: abs(i - j)."""
    places = torch.arange(size, device=like.device, dtype=accumulation_dtype(like.dtype))
    return (places[:, None] - places[None, :]).abs()


def _logits(q: Tensor, k: Tensor, log_decay: Tensor, scale: float, lines: type) -> Tensor:
    """[B, H, ..., L, L] of the lines of one pass."""
    products = lines.of(q) @ lines.of(k).transpose(-2, -1) * scale  # type: ignore[attr-defined]
    decay = log_decay.reshape(*log_decay.shape, *[1] * (products.dim() - 2))
    return products + decay * lines.distances(q)  # type: ignore[attr-defined]


def rotate(x: Tensor, sin: Tensor | None, cos: Tensor | None) -> Tensor:
    """x cos + turned x sin, where pairs of channels (even, odd) are turned to (-odd, even)."""
    if sin is None or cos is None:
        return x
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


def rotate_back(grad: Tensor, sin: Tensor | None, cos: Tensor | None) -> Tensor:
    """The gradient to x of `rotate`."""
    if sin is None or cos is None:
        return grad
    product = grad * sin.to(grad.dtype)
    turned = torch.stack((product[..., 1::2], -product[..., ::2]), dim=-1).flatten(-2)
    return grad * cos.to(grad.dtype) + turned


def from_wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, h, w, C] in this dtype, laid out as [B, h, w, H, C]."""
    return x.to(dtype).permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4)
