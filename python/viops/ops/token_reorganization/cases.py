"""Inputs of token reorganization: what tests, benches and the doctor run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...cases import Case, Draw, amid_nan, axes_swapped, every_second
from .bad_cases import BAD_CASES
from .inputs import fused_qkv, queries, tokens_and_index, tokens_and_scores

__all__ = ["BAD_CASES", "CASES"]

INF, NAN = float("inf"), float("nan")


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
        "off alignment",  # by one element, where rows are whole vectors
        lambda d: (amid_nan(d.normal(3, 23, 16)), d.probabilities(3, 22), 11),
    ),
    _reorganize_case(
        "one odd row", lambda d: (d.normal(1, 1, 7), d.probabilities(1, 1), 0), num_prefix=0
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
        "off alignment",
        lambda d: (amid_nan(d.normal(3, 13, 16)), d.choices(3, 23, 11), 23),
    ),
    _restore_case("given in rounds", lambda d: tokens_and_index(d, 1, 8200, 1, 8192)),
    _restore_case(
        "amid nan",
        lambda d: (amid_nan(d.normal(3, 13, 21)), d.choices(3, 23, 11), 23),
    ),
)

CASES = SOFTMAX_CASES + SCORES_CASES + ATTENTION_CASES + REORGANIZE_CASES + RESTORE_CASES
