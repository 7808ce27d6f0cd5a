"""How far a result may lie from the float64 reference, by the dtype of the result."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """Bounds on an error, both relative."""

    #: Bound on norm(error) / norm(truth).
    norm: float
    #: Bound on abs(error) / (abs(truth) + rms(truth where it is not zero)), element by element.
    element: float


TOLERANCES = {
    torch.float64: Tolerance(norm=1e-14, element=5e-14),
    torch.float32: Tolerance(norm=2e-6, element=5e-6),
    torch.float16: Tolerance(norm=1e-3, element=5e-3),
    torch.bfloat16: Tolerance(norm=8e-3, element=4e-2),
}


def coarser(*dtypes: torch.dtype) -> torch.dtype:
    """The floating-point dtype among these whose tolerance is widest."""
    return max(dtypes, key=lambda dtype: TOLERANCES[dtype].norm)


def assert_matches(
    what: str, result: Tensor, truth: Tensor, precision: torch.dtype | None = None
) -> None:
    """Fails where the result is not the truth, up to the tolerance of `precision` (the result's).

    Integers must be equal, and so must infinities and NaN where the truth, rounded to the result's
    dtype, has them.
    """
    assert result.shape == truth.shape, (
        f"{what}: shape {list(result.shape)}, expected {list(truth.shape)}"
    )
    result = result.detach().cpu()
    if not result.is_floating_point():
        assert result.dtype == truth.dtype, f"{what}: {result.dtype}, expected {truth.dtype}"
        assert torch.equal(result, truth), f"{what}: {(result != truth).sum()} integers differ"
        return
    tolerance = TOLERANCES[precision or result.dtype]
    # an element cannot be nearer than the smallest step of its dtype
    step = torch.finfo(result.dtype).smallest_normal * torch.finfo(result.dtype).eps
    rounded = truth.to(result.dtype)
    finite = rounded.isfinite()
    if not finite.all():
        got, wanted = result[~finite], rounded[~finite]
        same = (got == wanted) | (got.isnan() & wanted.isnan())
        assert same.all(), f"{what}: {(~same).sum()} infinities or NaN differ"
        result, truth = result[finite], truth[finite]
    if truth.numel() == 0:
        return
    truth = truth.double()
    error = (result.double() - truth).abs_().sub_(step).clamp_(min=0)  # NaN stays, and fails
    rms = truth.norm() / truth.count_nonzero().clamp(min=1).sqrt()
    norm = error.norm() / truth.norm().clamp(min=1e-300)
    element = (error / (truth.abs() + rms).clamp_(min=1e-300)).max()
    within = bool(norm <= tolerance.norm) and bool(element <= tolerance.element)
    assert within, (
        f"{what}: relative error {norm:.2e} in norm (at most {tolerance.norm:.0e}), "
        f"{element:.2e} in an element (at most {tolerance.element:.0e})"
    )
