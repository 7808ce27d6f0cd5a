"""Inputs of token reorganization: what tests, benches and the doctor run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...cases import BadCase, Case, Draw, amid_nan, axes_swapped, every_second

INF, NAN = float("inf"), float("nan")


def fused_qkv(
    draw: Draw, batch: int, num_heads: int, num_tokens: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, N, D]: the views that a fused qkv linear gives."""
    qkv = draw.normal(batch, num_tokens, 3, num_heads, head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return q, k, v


def queries(
    draw: Draw, batch: int, num_heads: int, num_tokens: int, head_dim: int, count: int = 2
) -> tuple[Tensor, ...]:
    """q, k (and v), each [B, H, N, D] and contiguous."""
    shape = (batch, num_heads, num_tokens, head_dim)
    return tuple(draw.normal(*shape) for _ in range(count))


def tokens_and_scores(
    draw: Draw, batch: int, num_tokens: int, channels: int, num_prefix: int = 1
) -> tuple[Tensor, Tensor]:
    """x [B, N, C] and scores [B, N - num_prefix] as attention gives them."""
    x = draw.normal(batch, num_tokens, channels)
    return x, draw.probabilities(batch, num_tokens - num_prefix)


def tokens_and_index(
    draw: Draw,
    batch: int,
    num_patches: int,
    channels: int,
    keep: int,
    num_prefix: int = 1,
    fuse: bool = True,
) -> tuple[Tensor, Tensor, int]:
    """tokens [B, M, C], index [B, keep] and num_patches."""
    tokens = draw.normal(batch, num_prefix + keep + fuse, channels)
    return tokens, draw.choices(batch, num_patches, keep), num_patches


def _exact_logits(draw: Draw, magnitude: float) -> tuple[Tensor, Tensor]:
    """q, k whose dot products are exact in float32, so that only the softmax can err."""
    size = 2.0 ** round(torch.log2(torch.tensor(magnitude)).item())
    return draw.integers(-4, 4, 2, 3, 29, 16) * size, draw.integers(-4, 4, 2, 3, 29, 16) * size


def _valued(*values: float) -> Callable[[Draw], tuple]:
    """make() of reorganize_tokens on these scores, in two rows, the second one turned round."""

    def make(draw: Draw) -> tuple:
        rows = [list(values), list(values[::-1])]
        return draw.normal(2, 1 + len(values), 5), draw.tensor(rows), len(values) // 2

    return make


def _many_ties(draw: Draw) -> tuple:
    """Longer than any sort of a fixed small size, with a few different scores only."""
    return draw.normal(2, 1500, 3), draw.integers(0, 3, 2, 1499), 700


def _largest(draw: Draw) -> tuple:
    """x near what the dtype can hold; the fused token stays below it."""
    x, scores = tokens_and_scores(draw, 2, 30, 8)
    return x.sign() * min(torch.finfo(x.dtype).max * 0.9, 1e30), scores * 0.5, 11


def _case(op: str, name: str, make: Callable[[Draw], tuple], **options: object) -> Case:
    return Case(op, name, make, options)


_scores_case = partial(_case, "class_attention_scores")
_softmax_case = partial(_case, "softmax_attention")
_attention_case = partial(_case, "class_attention")
_reorganize_case = partial(_case, "reorganize_tokens")
_restore_case = partial(_case, "restore_tokens")

SCORES_CASES = (
    _scores_case("deit", lambda d: fused_qkv(d, 2, 6, 197, 64)[:2]),
    _scores_case("large", lambda d: fused_qkv(d, 8, 6, 197, 64)[:2]),
    _scores_case("prime", lambda d: queries(d, 3, 5, 13, 7)),
    _scores_case("one head of one", lambda d: queries(d, 2, 1, 11, 1)),
    _scores_case("wide head", lambda d: queries(d, 1, 2, 17, 257)),
    _scores_case("long", lambda d: queries(d, 1, 2, 4099, 20)),
    _scores_case("no patches", lambda d: queries(d, 2, 3, 1, 8)),
    _scores_case("all prefix", lambda d: queries(d, 2, 3, 4, 8), num_prefix=4),
    _scores_case("distilled", lambda d: queries(d, 2, 3, 19, 8), num_prefix=2),
    _scores_case("registers", lambda d: queries(d, 2, 3, 19, 8), num_prefix=5),
    _scores_case("scale", lambda d: queries(d, 2, 3, 19, 8), scale=-0.7),
    _scores_case("scale zero", lambda d: queries(d, 2, 3, 19, 8), scale=0),
    _scores_case("no batch", lambda d: queries(d, 0, 3, 19, 8)),
    _scores_case(
        "strided",
        lambda d: tuple(every_second(t) for t in queries(d, 2, 3, 19, 24)),
    ),
    _scores_case(
        "head axis outermost",
        lambda d: tuple(axes_swapped(t, 2, 3) for t in queries(d, 2, 3, 37, 24)),
    ),
    _scores_case(
        "q and k differ in layout",
        lambda d: (
            axes_swapped(d.normal(2, 3, 19, 24), 1, 2),
            every_second(d.normal(2, 3, 19, 24)),
        ),
    ),
    _scores_case(
        "expanded",
        lambda d: (
            d.normal(1, 3, 1, 24).expand(2, 3, 19, 24),
            d.normal(2, 1, 19, 24).expand(2, 3, 19, 24),
        ),
    ),
    _scores_case(
        "amid nan",
        lambda d: tuple(amid_nan(t) for t in queries(d, 2, 3, 19, 21)),
    ),
    _scores_case("large logits", lambda d: _exact_logits(d, 32.0)),
    _scores_case(
        "huge logits",
        lambda d: _exact_logits(d, min(torch.finfo(d.dtype).max / 8, 1e17)),
    ),
)

ATTENTION_CASES = (
    _attention_case("deit", lambda d: fused_qkv(d, 2, 6, 197, 64)),
    _attention_case("prime", lambda d: queries(d, 3, 5, 13, 7, count=3)),
    _attention_case("all prefix", lambda d: queries(d, 2, 3, 4, 8, count=3), num_prefix=4),
    _attention_case(
        "distilled",
        lambda d: queries(d, 2, 3, 19, 8, count=3),
        num_prefix=2,
    ),
    _attention_case("scale", lambda d: queries(d, 2, 3, 19, 8, count=3), scale=0.7),
    _attention_case("no batch", lambda d: queries(d, 0, 3, 19, 8, count=3)),
    _attention_case(
        "strided",
        lambda d: tuple(every_second(t) for t in queries(d, 2, 3, 19, 24, count=3)),
    ),
    _attention_case(
        "narrow values",
        lambda d: (*queries(d, 2, 3, 19, 16), d.normal(2, 3, 19, 8)),
    ),
)

SOFTMAX_CASES = (
    _softmax_case("deit", lambda d: fused_qkv(d, 2, 6, 197, 64)),
    _softmax_case("large", lambda d: fused_qkv(d, 4, 6, 197, 64)),
    _softmax_case("prime", lambda d: queries(d, 3, 5, 13, 7, count=3)),
    _softmax_case("few tokens", lambda d: queries(d, 2, 3, 4, 8, count=3)),
    _softmax_case("one channel", lambda d: queries(d, 2, 3, 29, 1, count=3)),
    _softmax_case("one head", lambda d: queries(d, 1, 1, 131, 33, count=3)),
    _softmax_case("wide head", lambda d: queries(d, 1, 2, 17, 129, count=3)),
    _softmax_case("long", lambda d: queries(d, 1, 1, 1031, 20, count=3)),
    _softmax_case("scale", lambda d: queries(d, 2, 3, 19, 8, count=3), scale=-0.7),
    _softmax_case("scale zero", lambda d: queries(d, 2, 3, 19, 8, count=3), scale=0),
    _softmax_case("no batch", lambda d: queries(d, 0, 3, 19, 8, count=3)),
    _softmax_case(
        "strided",
        lambda d: tuple(every_second(t) for t in queries(d, 2, 3, 19, 24, count=3)),
    ),
    _softmax_case(
        "head axis outermost",
        lambda d: tuple(axes_swapped(t, 2, 3) for t in queries(d, 2, 3, 37, 24, count=3)),
    ),
    _softmax_case(
        "expanded",
        lambda d: tuple(d.normal(1, 3, 19, 8).expand(2, 3, 19, 8) for _ in range(3)),
    ),
    _softmax_case(
        "unaligned",
        lambda d: tuple(amid_nan(t) for t in queries(d, 2, 3, 19, 24, count=3)),
    ),
    _softmax_case("narrow values", lambda d: (*queries(d, 2, 3, 19, 16), d.normal(2, 3, 19, 8))),
)

REORGANIZE_CASES = (
    _reorganize_case("deit", lambda d: (*tokens_and_scores(d, 2, 197, 384), 137)),
    _reorganize_case("large", lambda d: (*tokens_and_scores(d, 16, 197, 384), 137)),
    _reorganize_case("one large image", lambda d: (*tokens_and_scores(d, 1, 577, 384), 400)),
    _reorganize_case("prime", lambda d: (*tokens_and_scores(d, 3, 23, 7), 11)),
    _reorganize_case("one channel", lambda d: (*tokens_and_scores(d, 3, 23, 1), 11)),
    _reorganize_case("keep none", lambda d: (*tokens_and_scores(d, 3, 23, 7), 0)),
    _reorganize_case("keep one", lambda d: (*tokens_and_scores(d, 3, 23, 7), 1)),
    _reorganize_case("drop one", lambda d: (*tokens_and_scores(d, 3, 23, 7), 21)),
    _reorganize_case("keep all", lambda d: (*tokens_and_scores(d, 3, 23, 7), 22)),
    _reorganize_case("drop", lambda d: (*tokens_and_scores(d, 3, 23, 7), 11), fuse=False),
    _reorganize_case(
        "drop all",
        lambda d: (*tokens_and_scores(d, 3, 23, 7), 0),
        fuse=False,
    ),
    _reorganize_case(
        "no prefix",
        lambda d: (*tokens_and_scores(d, 3, 23, 7, num_prefix=0), 11),
        num_prefix=0,
    ),
    _reorganize_case(
        "nothing stays",
        lambda d: (*tokens_and_scores(d, 3, 23, 7, num_prefix=0), 0),
        num_prefix=0,
        fuse=False,
    ),
    _reorganize_case(
        "distilled",
        lambda d: (*tokens_and_scores(d, 3, 23, 7, num_prefix=2), 11),
        num_prefix=2,
    ),
    _reorganize_case(
        "registers",
        lambda d: (*tokens_and_scores(d, 3, 23, 7, num_prefix=5), 11),
        num_prefix=5,
    ),
    _reorganize_case(
        "no patches",
        lambda d: (*tokens_and_scores(d, 3, 5, 7, num_prefix=5), 0),
        num_prefix=5,
    ),
    _reorganize_case("no batch", lambda d: (*tokens_and_scores(d, 0, 23, 7), 11)),
    _reorganize_case("no channels", lambda d: (*tokens_and_scores(d, 2, 23, 0), 11)),
    _reorganize_case(
        "strided",
        lambda d: (every_second(d.normal(3, 23, 20)), every_second(d.probabilities(3, 22)), 11),
    ),
    _reorganize_case(
        "channels first",
        lambda d: (
            axes_swapped(d.normal(3, 41, 20), 1, 2),
            axes_swapped(d.normal(3, 40), 0, 1),
            11,
        ),
    ),
    _reorganize_case(
        "expanded",
        lambda d: (d.normal(1, 23, 20).expand(3, 23, 20), d.normal(1, 22).expand(3, 22), 11),
    ),
    _reorganize_case(
        "one value for all",
        lambda d: (d.normal(3, 1, 1).expand(3, 23, 20), d.normal(3, 1).expand(3, 22), 11),
    ),
    _reorganize_case(
        "amid nan",
        lambda d: (amid_nan(d.normal(3, 23, 21)), amid_nan(d.probabilities(3, 22)), 11),
    ),
    _reorganize_case(
        "scores float32",
        lambda d: (d.normal(3, 23, 7), d.probabilities(3, 22, dtype=torch.float32), 11),
    ),
    _reorganize_case(
        "scores float64",
        lambda d: (d.normal(3, 23, 7), d.probabilities(3, 22, dtype=torch.float64), 11),
    ),
    _reorganize_case(
        "scores bfloat16",
        lambda d: (d.normal(3, 23, 7), d.probabilities(3, 22, dtype=torch.bfloat16), 11),
    ),
    _reorganize_case("negative scores", lambda d: (d.normal(2, 30, 8), d.normal(2, 29), 11)),
    _reorganize_case("long", lambda d: (*tokens_and_scores(d, 2, 4099, 5), 2001)),
    _reorganize_case("very long", lambda d: (*tokens_and_scores(d, 1, 20011, 2), 13000)),
    _reorganize_case("many ties", _many_ties),
    _reorganize_case("largest", _largest),
    _reorganize_case("ties", _valued(0.5, 0.25, 0.5, 0.25, 0.5, 0.5, 0.25)),
    _reorganize_case("all equal", _valued(*[0.125] * 70)),
    _reorganize_case("falling", _valued(*[2.0 - i / 64 for i in range(96)])),
    _reorganize_case("signed zeros", _valued(0.0, -0.0, 0.0, -0.0, -1.0, 1.0, -0.0, 0.0)),
    _reorganize_case("nan", _valued(0.5, NAN, 0.25, INF, NAN, 0.125, 0.25, 0.75)),
    _reorganize_case("nan of both signs", _valued(NAN, 0.5, -NAN, INF, 1.0, NAN, -NAN)),
    _reorganize_case("dropped nan", _valued(NAN, 0.5, NAN, 0.25, NAN, NAN)),
    _reorganize_case("inf", _valued(INF, 0.5, -INF, INF, 0.25, -INF, 0.125, INF, INF)),
)

RESTORE_CASES = (
    _restore_case("deit", lambda d: tokens_and_index(d, 2, 196, 384, 137)),
    _restore_case("large", lambda d: tokens_and_index(d, 16, 196, 384, 137)),
    _restore_case("one large image", lambda d: tokens_and_index(d, 1, 576, 384, 400)),
    _restore_case("prime", lambda d: tokens_and_index(d, 3, 23, 7, 11)),
    _restore_case("one channel", lambda d: tokens_and_index(d, 3, 23, 1, 11)),
    _restore_case("keep none", lambda d: tokens_and_index(d, 3, 23, 7, 0)),
    _restore_case("keep all", lambda d: tokens_and_index(d, 3, 23, 7, 23, fuse=False)),
    _restore_case("keep all and fused", lambda d: tokens_and_index(d, 3, 23, 7, 23)),
    _restore_case("dropped", lambda d: tokens_and_index(d, 3, 23, 7, 11, fuse=False)),
    _restore_case("all dropped", lambda d: tokens_and_index(d, 3, 23, 7, 0, fuse=False)),
    _restore_case(
        "from nothing",
        lambda d: tokens_and_index(d, 3, 23, 7, 0, num_prefix=0, fuse=False),
        num_prefix=0,
    ),
    _restore_case("no patches", lambda d: tokens_and_index(d, 3, 0, 7, 0, fuse=False)),
    _restore_case(
        "no prefix",
        lambda d: tokens_and_index(d, 3, 23, 7, 11, num_prefix=0),
        num_prefix=0,
    ),
    _restore_case(
        "registers",
        lambda d: tokens_and_index(d, 3, 23, 7, 11, num_prefix=5),
        num_prefix=5,
    ),
    _restore_case("no batch", lambda d: tokens_and_index(d, 0, 23, 7, 11)),
    _restore_case("no channels", lambda d: tokens_and_index(d, 2, 23, 0, 11)),
    _restore_case("long", lambda d: tokens_and_index(d, 1, 4099, 5, 2001)),
    _restore_case(
        "strided",
        lambda d: (every_second(d.normal(3, 13, 20)), d.choices(3, 23, 22)[:, ::2], 23),
    ),
    _restore_case(
        "channels first",
        lambda d: (
            axes_swapped(d.normal(3, 13, 20), 1, 2),
            axes_swapped(d.choices(3, 23, 11), 0, 1),
            23,
        ),
    ),
    _restore_case(
        "expanded",
        lambda d: (d.normal(3, 1, 20).expand(3, 13, 20), d.choices(1, 23, 11).expand(3, 11), 23),
    ),
    _restore_case(
        "amid nan",
        lambda d: (amid_nan(d.normal(3, 13, 21)), d.choices(3, 23, 11), 23),
    ),
)

CASES = SOFTMAX_CASES + SCORES_CASES + ATTENTION_CASES + REORGANIZE_CASES + RESTORE_CASES


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
