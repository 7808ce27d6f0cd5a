"""Calls of token reorganization's functions that raise, on every backend alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...cases import BadCase, Draw
from .inputs import tokens_and_scores


def _bad(
    op: str,
    argument: str,
    error: type[Exception],
    name: str,
    make: Callable[[Draw], tuple],
    **options: object,
) -> BadCase:
    return BadCase(op, f"{argument} {name}", make, options, error, argument)


def _bad_queries(
    argument: str,
    error: type[Exception],
    name: str,
    make: Callable[[Draw], tuple],
    **options: object,
) -> tuple[BadCase, ...]:
    """The same q and k given to all functions that take them."""

    def with_v(draw: Draw) -> tuple:
        return *make(draw), draw.normal(2, 3, 7, 4)

    bad = (
        _bad("class_attention_scores", argument, error, name, make, **options),
        _bad("class_attention", argument, error, name, with_v, **options),
    )
    if argument == "num_prefix":
        return bad
    return (*bad, _bad("softmax_attention", argument, error, name, with_v, **options))


def _good(draw: Draw) -> tuple[Tensor, Tensor]:
    """q and k [2, 3, 7, 4], as the bad calls have them where they are good."""
    return draw.normal(2, 3, 7, 4), draw.normal(2, 3, 7, 4)


def _bad_values(
    error: type[Exception], name: str, make: Callable[[Draw], tuple]
) -> tuple[BadCase, BadCase]:
    """The same q, k and v given to both functions that take them."""
    return (
        _bad("class_attention", "v", error, name, make),
        _bad("softmax_attention", "v", error, name, make),
    )


BAD_QUERIES = (
    *_bad_queries("q", TypeError, "none", lambda d: (None, _good(d)[1])),
    *_bad_queries("q", TypeError, "list", lambda d: ([[[[1.0]]]], _good(d)[1])),
    *_bad_queries("q", ValueError, "rank", lambda d: (d.normal(3, 7, 4), _good(d)[1])),
    *_bad_queries("q", TypeError, "int", lambda d: (_good(d)[0].int(), _good(d)[1])),
    *_bad_queries("q", TypeError, "complex", lambda d: (_good(d)[0].to(torch.cfloat), _good(d)[1])),
    *_bad_queries("q", TypeError, "sparse", lambda d: (_good(d)[0].to_sparse(), _good(d)[1])),
    *_bad_queries(
        "q", ValueError, "no heads", lambda d: (d.normal(2, 0, 7, 4), d.normal(2, 0, 7, 4))
    ),
    *_bad_queries(
        "q", ValueError, "head of 0", lambda d: (d.normal(2, 3, 7, 0), d.normal(2, 3, 7, 0))
    ),
    *_bad_queries("k", TypeError, "float", lambda d: (_good(d)[0], 1.0)),
    *_bad_queries("k", ValueError, "rank", lambda d: (_good(d)[0], d.normal(2, 3, 7))),
    *_bad_queries("k", ValueError, "size", lambda d: (_good(d)[0], d.normal(2, 3, 8, 4))),
    *_bad_queries(
        "k", TypeError, "dtype", lambda d: (_good(d)[0], _good(d)[1].to(_other(d.dtype)))
    ),
    *_bad_queries("k", ValueError, "device", lambda d: (_good(d)[0], _good(d)[1].to("meta"))),
    *_bad_queries("num_prefix", ValueError, "none", _good, num_prefix=0),
    *_bad_queries("num_prefix", ValueError, "negative", _good, num_prefix=-1),
    *_bad_queries("num_prefix", ValueError, "over", _good, num_prefix=8),
    *_bad_queries("num_prefix", TypeError, "float", _good, num_prefix=1.0),
    *_bad_queries("num_prefix", TypeError, "text", _good, num_prefix="1"),
    *_bad_values(TypeError, "none", lambda d: (*_good(d), None)),
    *_bad_values(ValueError, "rank", lambda d: (*_good(d), d.normal(2, 3, 7))),
    *_bad_values(ValueError, "size", lambda d: (*_good(d), d.normal(2, 3, 8, 4))),
    *_bad_values(ValueError, "device", lambda d: (*_good(d), _good(d)[0].to("meta"))),
    *_bad_values(
        TypeError, "dtype", lambda d: (*_good(d), d.normal(2, 3, 7, 4, dtype=_other(d.dtype)))
    ),
)


def _other(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float32 else torch.float32


_bad_reorganize = partial(_bad, "reorganize_tokens")
_bad_restore = partial(_bad, "restore_tokens")

BAD_REORGANIZE = (
    _bad_reorganize("x", TypeError, "none", lambda d: (None, d.normal(2, 8), 3)),
    _bad_reorganize("x", ValueError, "rank", lambda d: (d.normal(9, 4), d.normal(2, 8), 3)),
    _bad_reorganize("x", TypeError, "int", lambda d: (d.normal(2, 9, 4).long(), d.normal(2, 8), 3)),
    _bad_reorganize(
        "x", TypeError, "sparse", lambda d: (d.normal(2, 9, 4).to_sparse(), d.normal(2, 8), 3)
    ),
    _bad_reorganize("scores", TypeError, "list", lambda d: (d.normal(2, 9, 4), [0.5] * 8, 3)),
    _bad_reorganize("scores", ValueError, "rank", lambda d: (d.normal(2, 9, 4), d.normal(8), 3)),
    _bad_reorganize(
        "scores", ValueError, "batch", lambda d: (d.normal(2, 9, 4), d.normal(1, 8), 3)
    ),
    _bad_reorganize("scores", ValueError, "size", lambda d: (d.normal(2, 9, 4), d.normal(2, 9), 3)),
    _bad_reorganize(
        "scores", TypeError, "bool", lambda d: (d.normal(2, 9, 4), d.normal(2, 8) > 0, 3)
    ),
    _bad_reorganize(
        "scores", ValueError, "device", lambda d: (d.normal(2, 9, 4), d.normal(2, 8).to("meta"), 3)
    ),
    _bad_reorganize("keep", ValueError, "over", lambda d: (*tokens_and_scores(d, 2, 9, 4), 9)),
    _bad_reorganize("keep", ValueError, "negative", lambda d: (*tokens_and_scores(d, 2, 9, 4), -1)),
    _bad_reorganize("keep", TypeError, "rate", lambda d: (*tokens_and_scores(d, 2, 9, 4), 0.7)),
    _bad_reorganize("keep", TypeError, "none", lambda d: (*tokens_and_scores(d, 2, 9, 4), None)),
    _bad_reorganize(
        "num_prefix",
        ValueError,
        "negative",
        lambda d: (*tokens_and_scores(d, 2, 9, 4), 3),
        num_prefix=-1,
    ),
    _bad_reorganize(
        "num_prefix",
        ValueError,
        "over",
        lambda d: (*tokens_and_scores(d, 2, 9, 4), 0),
        num_prefix=10,
    ),
)

BAD_RESTORE = (
    _bad_restore("tokens", TypeError, "none", lambda d: (None, d.choices(2, 9, 4), 9)),
    _bad_restore("tokens", ValueError, "rank", lambda d: (d.normal(6, 4), d.choices(2, 9, 4), 9)),
    _bad_restore(
        "tokens", TypeError, "int", lambda d: (d.normal(2, 6, 4).int(), d.choices(2, 9, 4), 9)
    ),
    _bad_restore("index", TypeError, "none", lambda d: (d.normal(2, 6, 4), None, 9)),
    _bad_restore(
        "index", TypeError, "int32", lambda d: (d.normal(2, 6, 4), d.choices(2, 9, 4).int(), 9)
    ),
    _bad_restore(
        "index", ValueError, "rank", lambda d: (d.normal(2, 6, 4), d.choices(2, 9, 4)[0], 9)
    ),
    _bad_restore(
        "index", ValueError, "batch", lambda d: (d.normal(2, 6, 4), d.choices(3, 9, 4), 9)
    ),
    _bad_restore("index", ValueError, "few", lambda d: (d.normal(2, 6, 4), d.choices(2, 9, 3), 9)),
    _bad_restore("index", ValueError, "many", lambda d: (d.normal(2, 6, 4), d.choices(2, 9, 6), 9)),
    _bad_restore(
        "index",
        ValueError,
        "device",
        lambda d: (d.normal(2, 6, 4), d.choices(2, 9, 4).to("meta"), 9),
    ),
    _bad_restore(
        "num_patches", ValueError, "few", lambda d: (d.normal(2, 6, 4), d.choices(2, 9, 4), 3)
    ),
    _bad_restore(
        "num_patches", TypeError, "float", lambda d: (d.normal(2, 6, 4), d.choices(2, 9, 4), 9.0)
    ),
    _bad_restore(
        "num_prefix",
        ValueError,
        "over",
        lambda d: (d.normal(2, 6, 4), d.choices(2, 9, 4), 9),
        num_prefix=7,
    ),
)

BAD_CASES = BAD_QUERIES + BAD_REORGANIZE + BAD_RESTORE
