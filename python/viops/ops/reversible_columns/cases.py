"""Inputs of reversible_columns: what tests, benches and the doctor run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...cases import BadCase, Case, Draw, amid_nan, axes_swapped, every_second

Change = Callable[[Tensor], Tensor]


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _both(
    name: str,
    *shape: int,
    alpha: tuple[int, ...] | None = None,
    factor: float = 1,
    of_f: Change = _as_it_is,
    of_other: Change = _as_it_is,
    of_alpha: Change = _as_it_is,
    wide: bool = False,
) -> tuple[Case, Case]:
    """The step and the way back, on tensors of this shape.

    `factor` multiplies values; the others change what is drawn; `wide`: all but f are of float32
    at least.
    """
    alpha = shape[1:2] if alpha is None else alpha

    def other(draw: Draw, *shape: int) -> Tensor:
        dtype = torch.promote_types(draw.dtype, torch.float32) if wide else draw.dtype
        return draw.normal(*shape, dtype=dtype)

    def operands(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        f = of_f(draw.normal(*shape) * factor)
        return f, of_other(other(draw, *shape) * factor), of_alpha(other(draw, *alpha))

    def back(draw: Draw) -> tuple:
        f, out, factors = operands(draw)
        return out, f, factors, of_other(other(draw, *shape))

    return Case("reversible_step", name, operands), Case("reversible_step_backward", name, back)


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _small(alpha: Tensor) -> Tensor:
    """Factors at and below the least magnitude, of both signs, and zeros."""
    values = [0.0, -0.0, 1e-5, -1e-5, 1e-3, -1e-3, 9e-4, -9e-4, 2e-3, -2e-3]
    return alpha.new_tensor(values)[: alpha.numel()]


def _large(x: Tensor) -> Tensor:
    return x * torch.finfo(x.dtype).max ** 0.25


_STAGES = (4, 64, 14, 14)

CASES = tuple(
    case
    for pair in (
        _both("deit", 2, 24, 14, 14),
        _both("large", *_STAGES, factor=3),
        _both("large, channels last", *_STAGES, of_f=_channels_last, of_other=_channels_last),
        _both("prime", 3, 5, 7, 11, alpha=(1, 5, 1, 1)),
        _both("long", 1, 3, 40_003),
        _both("long, channels last", 1, 3, 40_003, of_f=_channels_last, of_other=_channels_last),
        _both("many channels", 2, 1031, 2, of_f=_channels_last, of_other=_channels_last),
        _both("tokens", 7, 19),
        _both("volume", 2, 5, 3, 4, 5, alpha=(1, 5, 1, 1, 1)),
        _both("nine axes", 2, 3, *(1, 2) * 3, 2, alpha=(1, 3, *(1,) * 7)),
        _both("one place", 3, 67, 1, 1),
        _both("one value", 1, 1, 1, 1),
        _both("no batch", 0, 5, 7, 11),
        _both("no places", 3, 5, 0, 11),
        _both("strided", 3, 5, 7, 6, of_f=every_second, of_other=every_second),
        _both("alpha strided", 3, 5, 7, 6, of_alpha=every_second),
        _both(
            "expanded",
            *(3, 5, 7, 6),
            of_f=lambda x: x[:1].expand(x.shape),
            of_other=lambda x: x[:, :1].expand(x.shape),
        ),
        _both("channels last", 3, 13, 7, 6, of_f=_channels_last, of_other=_channels_last),
        _both("f channels last", 3, 13, 7, 6, of_f=_channels_last),
        _both("f not channels last", 3, 13, 7, 6, of_other=_channels_last),
        _both("axes swapped", 3, 5, 7, 6, of_f=lambda x: axes_swapped(x, 2, 3)),
        _both("amid nan", 3, 5, 7, 6, of_f=amid_nan, of_other=amid_nan, of_alpha=amid_nan),
        _both("half beside float32", 3, 13, 7, 6, wide=True),
        _both(
            "half beside float32, channels last",
            *(3, 13, 7, 6),
            wide=True,
            of_f=_channels_last,
            of_other=_channels_last,
        ),
        _both("float32 f", 3, 5, 7, 6, of_f=lambda x: x.float()),
        _both("float64 f", 3, 5, 7, 6, of_f=lambda x: x.double()),
        _both("float32 alpha", 3, 5, 7, 6, of_alpha=lambda x: x.float()),
        _both("bfloat16 f", 3, 5, 7, 6, of_f=lambda x: x.bfloat16()),
        _both("small alpha", 3, 10, 7, 6, of_alpha=_small),
        _both("large values", 3, 5, 7, 6, of_f=_large, of_other=_large),
    )
    for case in pair
)


def _bad(
    op: str, argument: str, error: type[Exception], name: str, make: Callable[[Draw], tuple]
) -> BadCase:
    return BadCase(op, f"{argument} {name}", make, {}, error, argument)


def _bad_step(
    argument: str, error: type[Exception], name: str, make: Callable[[Draw], tuple]
) -> BadCase:
    return _bad("reversible_step", argument, error, name, make)


def _bad_back(
    argument: str, error: type[Exception], name: str, make: Callable[[Draw], tuple]
) -> BadCase:
    return _bad("reversible_step_backward", argument, error, name, make)


def _maps(draw: Draw, count: int) -> list[Tensor]:
    return [draw.normal(2, 5, 3, 3) for _ in range(count)]


def _elsewhere(*shape: int) -> Tensor:
    return torch.zeros(*shape, device="meta")


BAD_CASES = (
    _bad_step("f", TypeError, "none", lambda d: (None, *_maps(d, 1), d.normal(5))),
    _bad_step("f", ValueError, "rank", lambda d: (d.normal(5), d.normal(5), d.normal(5))),
    _bad_step("f", TypeError, "int", lambda d: (_maps(d, 1)[0].long(), *_maps(d, 1), d.normal(5))),
    _bad_step(
        "f", TypeError, "sparse", lambda d: (_maps(d, 1)[0].to_sparse(), *_maps(d, 1), d.normal(5))
    ),
    _bad_step("x", TypeError, "none", lambda d: (*_maps(d, 1), None, d.normal(5))),
    _bad_step(
        "x", ValueError, "shape", lambda d: (*_maps(d, 1), d.normal(2, 5, 3, 1), d.normal(5))
    ),
    _bad_step("x", ValueError, "rank", lambda d: (*_maps(d, 1), d.normal(5), d.normal(5))),
    _bad_step(
        "x", TypeError, "complex", lambda d: (*_maps(d, 1), _maps(d, 1)[0] * 1j, d.normal(5))
    ),
    _bad_step(
        "x", ValueError, "device", lambda d: (*_maps(d, 1), _elsewhere(2, 5, 3, 3), d.normal(5))
    ),
    _bad_step("alpha", TypeError, "number", lambda d: (*_maps(d, 2), 0.5)),
    _bad_step("alpha", ValueError, "size", lambda d: (*_maps(d, 2), d.normal(4))),
    _bad_step("alpha", ValueError, "one", lambda d: (*_maps(d, 2), d.normal(1))),
    _bad_step("alpha", ValueError, "axes", lambda d: (*_maps(d, 2), d.normal(5, 1, 1, 1))),
    _bad_step("alpha", ValueError, "rank", lambda d: (*_maps(d, 2), d.normal(1, 5, 1))),
    _bad_step("alpha", TypeError, "int", lambda d: (*_maps(d, 2), d.normal(5).long())),
    _bad_step("alpha", ValueError, "device", lambda d: (*_maps(d, 2), _elsewhere(5))),
    _bad_back("out", TypeError, "number", lambda d: (1.0, *_maps(d, 1), d.normal(5), *_maps(d, 1))),
    _bad_back("out", ValueError, "rank", lambda d: (d.normal(5),) * 4),
    _bad_back(
        "f",
        ValueError,
        "shape",
        lambda d: (*_maps(d, 1), d.normal(5, 2), d.normal(5), *_maps(d, 1)),
    ),
    _bad_back("alpha", TypeError, "none", lambda d: (*_maps(d, 2), None, *_maps(d, 1))),
    _bad_back("alpha", ValueError, "size", lambda d: (*_maps(d, 2), d.normal(6), *_maps(d, 1))),
    _bad_back("grad_out", TypeError, "none", lambda d: (*_maps(d, 2), d.normal(5), None)),
    _bad_back(
        "grad_out", ValueError, "shape", lambda d: (*_maps(d, 2), d.normal(5), d.normal(2, 5, 9))
    ),
    _bad_back(
        "grad_out", TypeError, "int", lambda d: (*_maps(d, 2), d.normal(5), _maps(d, 1)[0].int())
    ),
    _bad_back(
        "grad_out",
        ValueError,
        "device",
        lambda d: (*_maps(d, 2), d.normal(5), _elsewhere(2, 5, 3, 3)),
    ),
)
