"""depthwise_norm beyond the contract: what it equals, its layout and autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import viops
from contract import Backend, each_backend
from ops.test_mix_shift import LAYOUTS, ON_CPU, gradients, normal, strides

pytestmark = pytest.mark.filterwarnings("ignore:.*taken away by the test:RuntimeWarning")

backend = each_backend(ON_CPU)


@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_conv2d_and_layer_norm(backend: Backend, layout: str, kernel: int) -> None:
    x = LAYOUTS[layout](normal(2, 11, 9, 8)).requires_grad_()
    weight = (normal(11, 1, kernel, kernel, seed=1) / kernel).requires_grad_()
    for bias, norm_bias in [(3, 4), (None, 4), (3, None), (None, None)]:
        bias, norm_weight, norm_bias = (
            None if seed is None else normal(11, seed=seed).requires_grad_()
            for seed in (bias, 2, norm_bias)
        )
        y = viops.depthwise_norm(x, weight, bias, norm_weight, norm_bias, 1e-3)
        u = F.conv2d(x, weight, bias, padding=kernel // 2, groups=11).permute(0, 2, 3, 1)
        expected = F.layer_norm(u, (11,), norm_weight, norm_bias, 1e-3).permute(0, 3, 1, 2)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        leaves = [leaf for leaf in (x, weight, bias, norm_weight, norm_bias) if leaf is not None]
        for grad, want in zip(gradients(y, leaves), gradients(expected, leaves), strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-10)


def test_it_gives_channels_last(backend: Backend) -> None:
    weight, *vectors = normal(6, 1, 3, 3), *(normal(6, seed=i) for i in range(3))
    for change in LAYOUTS.values():
        y = viops.depthwise_norm(change(normal(2, 6, 5, 7)), weight, *vectors)
        assert y.permute(0, 2, 3, 1).is_contiguous()
        assert y.stride() == strides((2, 6, 5, 7), torch.channels_last)


def test_autocast(backend: Backend) -> None:
    x = normal(2, 6, 5, 7, dtype=torch.float32)
    weight, vectors = normal(6, 1, 3, 3, seed=1).float(), [normal(6, seed=i) for i in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        y = viops.depthwise_norm(x, weight, *vectors)
        wide = viops.depthwise_norm(x.double(), weight, *vectors)
    assert y.dtype is torch.bfloat16
    assert wide.dtype is torch.float64  # which autocast leaves alone
    assert torch.equal(y, viops.depthwise_norm(x.bfloat16(), weight, *vectors))
