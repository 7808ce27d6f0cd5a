"""Inputs of weight_standardization: what tests, benches and the doctor run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...cases import BadCase, Case, Draw, amid_nan, axes_swapped, every_second


def _case(name: str, make: Callable[[Draw], tuple], **options: object) -> Case:
    return Case("standardize_weight", name, make, options)


def _gain(*shape: int) -> Callable[[Draw], Tensor]:
    return lambda d: d.normal(*shape, dtype=torch.promote_types(d.dtype, torch.float32))


def _far(draw: Draw) -> tuple:
    """Means of 1000 deviations: sums of squares would cancel.  Few bits of half types are left."""
    wide = torch.finfo(draw.dtype).eps < 1e-6
    return (draw.normal(6, 5, 3, 3) + (1000 if wide else 4),)


def _flat(draw: Draw) -> tuple:
    """A filter of one value beside others, and one of zeros: variance zero, exactly."""
    weight = draw.normal(4, 8, 2, 2)
    weight[1], weight[3] = 0.5, 0
    return (weight,)


CASES = (
    _case("deit", lambda d: (d.normal(64, 64, 3, 3),)),
    _case("large", lambda d: (d.normal(256, 512, 1, 1),)),
    _case("prime", lambda d: (d.normal(7, 5, 3, 3),)),
    _case("long", lambda d: (d.normal(3, 4099, 3, 3),)),
    _case("linear", lambda d: (d.normal(17, 31),)),
    _case("one axis", lambda d: (d.normal(17, 3, 5),)),
    _case("three axes", lambda d: (d.normal(5, 3, 2, 3, 2),)),
    _case("biased", lambda d: (d.normal(7, 5, 3, 3),), unbiased=False),
    _case("eps outside", lambda d: (d.normal(7, 5, 3, 3),), eps_inside=False),
    _case("eps", lambda d: (d.normal(7, 5, 3, 3),), eps=0.1),
    _case("no eps", lambda d: (d.normal(7, 5, 3, 3),), eps=0),
    _case("gain", lambda d: (d.normal(7, 5, 3, 3),), gain=_gain(7)),
    _case(
        "gain of four axes",
        lambda d: (d.normal(7, 5, 3, 3),),
        gain=_gain(7, 1, 1, 1),
        unbiased=False,
        eps_inside=False,
    ),
    _case("one weight", lambda d: (d.normal(7, 1),)),
    _case("two weights", lambda d: (d.normal(7, 2),), eps=0.5),  # else all but signs
    _case("one filter", lambda d: (d.normal(1, 5, 3, 3),)),
    _case("no batch", lambda d: (d.normal(0, 5, 3, 3),)),
    _case("no weights", lambda d: (d.normal(7, 0, 3, 3),)),
    _case("flat", _flat),
    _case("flat, eps outside", _flat, eps_inside=False),
    _case("far from zero", _far),
    _case("small", lambda d: (d.normal(7, 5, 3, 3) * 0.01,)),
    _case("large values", lambda d: (d.normal(7, 5, 3, 3) * torch.finfo(d.dtype).max ** 0.25,)),
    _case("strided", lambda d: (every_second(d.normal(7, 5, 3, 3)),)),
    _case(
        "memory format",
        lambda d: (d.normal(7, 5, 3, 3).to(memory_format=torch.channels_last),),
        gain=_gain(7),
    ),
    _case("axes swapped", lambda d: (axes_swapped(d.normal(7, 5, 3, 3), 0, 1),)),
    _case("expanded", lambda d: (d.normal(1, 5, 3, 3).expand(7, 5, 3, 3),)),
    _case("amid nan", lambda d: (amid_nan(d.normal(7, 5, 3, 3)),)),
)


def _bad(
    argument: str,
    error: type[Exception],
    name: str,
    make: Callable[[Draw], tuple],
    **options: object,
) -> BadCase:
    name = f"{argument} {name}"
    return BadCase("standardize_weight", name, make, options, error, argument)


BAD_CASES = (
    _bad("weight", TypeError, "none", lambda d: (None,)),
    _bad("weight", ValueError, "rank", lambda d: (d.normal(9),)),
    _bad("weight", TypeError, "int", lambda d: (d.normal(2, 9).long(),)),
    _bad("weight", TypeError, "sparse", lambda d: (d.normal(2, 9).to_sparse(),)),
    _bad("eps", TypeError, "text", lambda d: (d.normal(2, 9),), eps="0"),
    _bad("gain", TypeError, "number", lambda d: (d.normal(2, 9),), gain=2.0),
    _bad("gain", ValueError, "size", lambda d: (d.normal(2, 9),), gain=lambda d: d.normal(9)),
    _bad(
        "gain",
        ValueError,
        "device",
        lambda d: (d.normal(2, 9),),
        gain=torch.zeros(2, device="meta"),
    ),
)
