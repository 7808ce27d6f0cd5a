"""Inputs of my_op: what tests, benches and the doctor run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...cases import BadCase, Case, Draw, amid_nan, axes_swapped, every_second


def _case(name: str, make: Callable[[Draw], tuple], **options: object) -> Case:
    return Case("my_op", name, make, options)


def _largest(draw: Draw) -> tuple:
    """x as large as the dtype holds."""
    return (draw.normal(2, 9, 7).sign() * torch.finfo(draw.dtype).max,)


CASES = (
    _case("deit", lambda d: (d.normal(2, 197, 384),), scale=0.7),
    _case("large", lambda d: (d.normal(32, 197, 384),), scale=0.7),
    _case("prime", lambda d: (d.normal(3, 23, 7),), scale=0.7),
    _case("long", lambda d: (d.normal(2, 4099, 5),), scale=0.7),
    _case("default", lambda d: (d.normal(3, 23, 7),)),
    _case("zero", lambda d: (d.normal(3, 23, 7),), scale=0.0),
    _case("negative", lambda d: (d.normal(3, 23, 7),), scale=-3),
    _case("one channel", lambda d: (d.normal(3, 23, 1),), scale=0.7),
    _case("no batch", lambda d: (d.normal(0, 23, 7),), scale=0.7),
    _case("no tokens", lambda d: (d.normal(3, 0, 7),), scale=0.7),
    _case("no channels", lambda d: (d.normal(3, 23, 0),), scale=0.7),
    _case("strided", lambda d: (every_second(d.normal(3, 23, 20)),), scale=0.7),
    _case("channels first", lambda d: (axes_swapped(d.normal(3, 41, 20), 1, 2),), scale=0.7),
    _case("expanded", lambda d: (d.normal(1, 23, 20).expand(3, 23, 20),), scale=0.7),
    _case("one value for all", lambda d: (d.normal(3, 1, 1).expand(3, 23, 20),), scale=0.7),
    _case("amid nan", lambda d: (amid_nan(d.normal(3, 23, 37)),), scale=0.7),
    _case("largest", _largest, scale=0.7),
    _case("overflow", _largest, scale=2),
)


def _bad(
    argument: str,
    error: type[Exception],
    name: str,
    make: Callable[[Draw], tuple],
    **options: object,
) -> BadCase:
    name = f"{argument} {name}"
    return BadCase("my_op", name, make, options, error, argument)


BAD_CASES = (
    _bad("x", TypeError, "none", lambda d: (None,)),
    _bad("x", TypeError, "list", lambda d: ([[[1.0]]],)),
    _bad("x", ValueError, "rank", lambda d: (d.normal(9, 4),)),
    _bad("x", TypeError, "int", lambda d: (d.normal(2, 9, 4).long(),)),
    _bad("x", TypeError, "sparse", lambda d: (d.normal(2, 9, 4).to_sparse(),)),
    _bad("scale", TypeError, "none", lambda d: (d.normal(2, 9, 4),), scale=None),
    _bad("scale", TypeError, "text", lambda d: (d.normal(2, 9, 4),), scale="2"),
    _bad("scale", TypeError, "tensor", lambda d: (d.normal(2, 9, 4),), scale=torch.ones(())),
)
