"""The keep rate over the course of training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..checks import check_int
from .vision_transformer import check_keep_rate


@dataclass(frozen=True)
class KeepRateSchedule:
    """Keep rate at each training iteration: 1 at first, then a cosine down to `keep_rate`.

    During the first `warmup_epochs` epochs the rate is 1.  Over the next `decay_epochs` it falls
    from `max_keep_rate` to `keep_rate` along half a cosine, one step an iteration, and stays there.

    >>> schedule = KeepRateSchedule(0.7, 10, 100, iterations_per_epoch=len(loader))
    >>> logits = model(images, keep_rate=schedule(iteration))

    Args:
        keep_rate: the rate at the end, above 0 and at most 1.
        warmup_epochs: epochs at rate 1.
        decay_epochs: epochs of the cosine.
        iterations_per_epoch: training iterations in an epoch.
        max_keep_rate: the rate at which the cosine begins, at least `keep_rate`.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: EViT (Liang et al., ICLR 2022), section 4.1, and its official training code.
    """

    keep_rate: float
    warmup_epochs: int
    decay_epochs: int
    iterations_per_epoch: int
    max_keep_rate: float = 1.0

    def __post_init__(self) -> None:
        check_keep_rate("keep_rate", self.keep_rate)
        check_keep_rate("max_keep_rate", self.max_keep_rate)
        if self.max_keep_rate < self.keep_rate:
            raise ValueError(
                f"max_keep_rate: expected at least keep_rate = {self.keep_rate}, "
                f"got {self.max_keep_rate}"
            )
        check_int("warmup_epochs", self.warmup_epochs, 0, None, "")
        check_int("decay_epochs", self.decay_epochs, 0, None, "")
        check_int("iterations_per_epoch", self.iterations_per_epoch, 1, None, "")

    def __call__(self, iteration: int) -> float:
        """The keep rate at this iteration, counted from 0 over all epochs."""
        check_int("iteration", iteration, 0, None, "")
        step = iteration - self.warmup_epochs * self.iterations_per_epoch
        num_steps = self.decay_epochs * self.iterations_per_epoch
        if step < 0:
            return 1.0
        if step >= num_steps:
            return self.keep_rate
        share = (math.cos(math.pi * step / num_steps) + 1) / 2
        return self.keep_rate + (self.max_keep_rate - self.keep_rate) * share
