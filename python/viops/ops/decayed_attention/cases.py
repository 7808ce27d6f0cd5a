"""Inputs of decayed_attention: what tests, benches and the doctor run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...cases import BadCase, Case, Draw, amid_nan, axes_swapped, every_second


def log_decays(draw: Draw, num_heads: int) -> Tensor:
    """[H], as the RMT models have them: logarithms of 3/4 to almost 1."""
    exponents = [-2.0 - 4.0 * head / num_heads for head in range(num_heads)]
    return draw.tensor(exponents).exp2().neg().log1p()


def projected(
    draw: Draw, batch: int, num_heads: int, height: int, width: int, head_dim: int, count: int
) -> tuple[Tensor, ...]:
    """Tensors [B, H, h, w, D]: the permuted views of a linear layer's outputs."""
    shape = (batch, height, width, num_heads, head_dim)
    return tuple(draw.normal(*shape).permute(0, 3, 1, 2, 4) for _ in range(count))


def inputs(
    draw: Draw,
    batch: int,
    num_heads: int,
    height: int,
    width: int,
    head_dim: int,
    value_dim: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and log_decay."""
    q, k = projected(draw, batch, num_heads, height, width, head_dim, 2)
    (v,) = projected(draw, batch, num_heads, height, width, value_dim or head_dim, 1)
    return q, k, v, log_decays(draw, num_heads)


def angles(height: int, width: int, head_dim: int) -> Callable[[Draw], tuple[Tensor, Tensor]]:
    """rotation: sin and cos [h, w, D] in float32, as the RMT models have them."""

    def make(draw: Draw) -> tuple[Tensor, Tensor]:
        pairs = 10000 ** -torch.linspace(0, 1, head_dim // 2).repeat_interleave(2)
        turns = torch.arange(height * width)[:, None] * pairs  # [h w, D]
        turns = turns.unflatten(0, (height, width)).to(draw.device)
        return turns.sin(), turns.cos()

    return make


def _laid_out(
    change: Callable[[Tensor], Tensor], *sizes: int
) -> Callable[[Draw], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """make() of inputs of these sizes, q, k and v changed in their layout."""

    def make(draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v, log_decay = inputs(draw, *sizes)
        return change(q), change(k), change(v), log_decay

    return make


def _expanded(draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (2, 3, 5, 7, 8)
    q, k, v = (draw.normal(1, 3, 5, 1, 8).expand(shape) for _ in range(3))
    return q, k, v, draw.normal(1).abs().neg().expand(3)


def _exact_logits(draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dot products that are exact in float32, large, and often equal: the softmax alone can err."""
    q, k = (draw.integers(-1, 1, 2, 3, 5, 6, 16) * 64 for _ in range(2))
    return q, k, draw.normal(2, 3, 5, 6, 16), draw.tensor([-0.5, -0.25, -8.0])


def _case(name: str, make: Callable[[Draw], tuple], **options: object) -> Case:
    return Case("decayed_attention", name, make, options)


def _both(name: str, make: Callable[[Draw], tuple], **options: object) -> tuple[Case, Case]:
    """The whole form under the name, and the axial one."""
    return _case(name, make, **options), _case(f"{name} axial", make, axial=True, **options)


# log_decay's gradient sums terms of both signs over the whole image, which must not cancel to where
# no arithmetic of the dtype can tell it from rounding: two heads and more, and no decay whose
# softmax is all but one-hot, exactly one-hot being well behaved again
CASES = (
    *_both("deit", lambda d: inputs(d, 2, 4, 14, 14, 32), rotation=angles(14, 14, 32)),
    *_both("large", lambda d: inputs(d, 4, 4, 14, 14, 32), rotation=angles(14, 14, 32)),
    *_both("prime", lambda d: inputs(d, 3, 2, 5, 7, 6), rotation=angles(5, 7, 6)),
    *_both("without rotation", lambda d: inputs(d, 3, 2, 5, 7, 7)),
    *_both("long", lambda d: inputs(d, 1, 2, 37, 29, 10)),
    _case("long lines axial", lambda d: inputs(d, 1, 2, 3, 71, 8), axial=True),
    _case("long columns axial", lambda d: inputs(d, 1, 2, 71, 3, 8), axial=True),
    _case("stage axial", lambda d: inputs(d, 1, 2, 56, 56, 16), axial=True),
    *_both("one row", lambda d: inputs(d, 2, 3, 1, 19, 8)),
    *_both("one column", lambda d: inputs(d, 2, 3, 19, 1, 8)),
    *_both("one token", lambda d: inputs(d, 2, 3, 1, 1, 8)),
    *_both("one channel", lambda d: inputs(d, 2, 3, 4, 7, 1)),
    *_both("wide head", lambda d: inputs(d, 1, 2, 4, 5, 129)),
    *_both("wide values", lambda d: inputs(d, 2, 3, 4, 5, 8, 20)),
    *_both("twice as wide values", lambda d: inputs(d, 1, 2, 3, 5, 64, 128)),
    *_both("narrow values", lambda d: inputs(d, 2, 3, 4, 5, 16, 3)),
    *_both("no decay", lambda d: (*inputs(d, 2, 2, 4, 5, 8)[:3], d.tensor([0.0, -0.0]))),
    *_both("strong decay", lambda d: (*inputs(d, 2, 2, 4, 5, 8)[:3], d.tensor([-2.0, -4000.0]))),
    *_both("rising", lambda d: (*inputs(d, 2, 2, 4, 9, 8)[:3], d.tensor([0.3, 0.6]))),
    *_both("scale", lambda d: inputs(d, 2, 3, 4, 5, 8), scale=-0.7),
    *_both("scale zero", lambda d: inputs(d, 2, 3, 4, 5, 8), scale=0),
    *_both("no batch", lambda d: inputs(d, 0, 3, 4, 5, 8)),
    *_both("strided", _laid_out(every_second, 2, 3, 4, 5, 8), rotation=angles(4, 5, 8)),
    *_both("contiguous", _laid_out(torch.Tensor.contiguous, 2, 3, 4, 5, 8)),
    *_both("channels first", _laid_out(lambda t: axes_swapped(t, 2, 4), 2, 3, 4, 5, 24)),
    *_both("amid nan", _laid_out(amid_nan, 2, 3, 4, 5, 24), rotation=angles(4, 5, 24)),
    *_both("expanded", _expanded),
    *_both("large logits", _exact_logits),
)


def _bad(
    argument: str,
    error: type[Exception],
    name: str,
    make: Callable[[Draw], tuple],
    **options: object,
) -> BadCase:
    name = f"{argument} {name}"
    return BadCase("decayed_attention", name, make, options, error, argument)


def _good(draw: Draw, **changes: object) -> tuple:
    """Good arguments but for those named."""
    q, k, v, log_decay = inputs(draw, 2, 3, 4, 5, 8)
    return tuple({"q": q, "k": k, "v": v, "log_decay": log_decay, **changes}.values())


BAD_CASES = (
    _bad("q", TypeError, "none", lambda d: _good(d, q=None)),
    _bad("q", ValueError, "rank", lambda d: _good(d, q=d.normal(2, 3, 20, 8))),
    _bad("q", TypeError, "int", lambda d: _good(d, q=d.normal(2, 3, 4, 5, 8).int())),
    _bad("q", TypeError, "sparse", lambda d: _good(d, q=d.normal(2, 3, 4, 5, 8).to_sparse())),
    _bad(
        "q",
        ValueError,
        "no rows",
        lambda d: tuple(t[:, :, :0] for t in _good(d)[:3]) + _good(d)[3:],
    ),
    _bad("k", ValueError, "grid", lambda d: _good(d, k=d.normal(2, 3, 5, 4, 8))),
    _bad(
        "k", TypeError, "dtype", lambda d: _good(d, k=d.normal(2, 3, 4, 5, 8, dtype=torch.float64))
    ),
    _bad("k", ValueError, "device", lambda d: _good(d, k=d.normal(2, 3, 4, 5, 8).to("meta"))),
    _bad("v", ValueError, "grid", lambda d: _good(d, v=d.normal(2, 3, 5, 4, 8))),
    _bad("v", ValueError, "no channels", lambda d: _good(d, v=d.normal(2, 3, 4, 5, 0))),
    _bad(
        "v", TypeError, "dtype", lambda d: _good(d, v=d.normal(2, 3, 4, 5, 8, dtype=torch.float64))
    ),
    _bad("log_decay", TypeError, "float", lambda d: _good(d, log_decay=-0.5)),
    _bad("log_decay", ValueError, "size", lambda d: _good(d, log_decay=d.normal(4))),
    _bad("log_decay", ValueError, "rank", lambda d: _good(d, log_decay=d.normal(3, 1))),
    _bad("log_decay", TypeError, "int", lambda d: _good(d, log_decay=d.normal(3).int())),
    _bad("rotation", TypeError, "tensor", _good, rotation=lambda d: d.normal(4, 5, 8)),
    _bad("rotation", TypeError, "numbers", _good, rotation=(0.0, 1.0)),
    _bad("rotation", ValueError, "grid", _good, rotation=angles(5, 4, 8)),
    _bad(
        "rotation",
        ValueError,
        "odd channels",
        lambda d: inputs(d, 2, 3, 4, 5, 7),
        rotation=lambda d: (d.normal(4, 5, 7), d.normal(4, 5, 7)),
    ),
    _bad(
        "rotation",
        ValueError,
        "gradient",
        _good,
        rotation=lambda d: tuple(t.requires_grad_() for t in angles(4, 5, 8)(d)),
    ),
    _bad("scale", TypeError, "text", _good, scale="2"),
    _bad("scale", TypeError, "tensor", _good, scale=torch.ones(())),
)
