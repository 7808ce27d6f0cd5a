"""Tensors in dynamic fixed point: what quantize_dfp makes, and DfpTensor itself."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import viops
from torch import Tensor


@pytest.mark.parametrize("bits", [1, 5, 13, 15])
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1.0, 1.5, 2.0, 1e30])
def test_quantization(bits: int, size: float) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).clamp(-2.9, 2.9) * size
    x[17] = 3 * size
    limit = 2**bits - 1
    t = viops.quantize_dfp(x, bits)
    exponent = x.abs().max().double().log2().floor() + 1 - bits
    assert float(t.scale) == max(2.0 ** float(exponent), 2.0**-126)
    assert int(t.data.abs().max()) <= limit
    error = (t.dequantize().double() - x.double()).abs() / t.scale.double()
    clamped = (x.double() / t.scale.double()).abs() > limit
    assert error[~clamped].max() <= 0.5
    assert error.max() <= 1
    t = viops.quantize_dfp(x, bits, scaling="max")
    torch.testing.assert_close(t.scale, (x.abs().max() / limit).clamp(min=2.0**-126))
    inverse = 1 / t.scale
    assert torch.equal(t.data.float(), (x * inverse).round().clamp(-limit, limit))
    t = viops.quantize_dfp(x, bits, rounding="truncate")
    assert torch.equal(t.data.float(), (x * (1 / t.scale)).trunc().clamp(-limit, limit))


def test_of_zeros_the_scale_is_one() -> None:
    for x in (torch.zeros(3, 4), torch.zeros(0, 4)):
        data, scale = viops.quantize_dfp(x)
        assert float(scale) == 1
        assert not data.any()


def test_stochastic_rounding_is_seeded_and_without_bias() -> None:
    x = torch.full((200_000,), 0.3)
    x[0] = 1.0  # the scale is 1 / 4

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        options = {"rounding": "stochastic", "generator": generator}
        return viops.quantize_dfp(x, 3, **options).data

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert set(draw(0).tolist()) == {1, 2, 4}
    assert abs(draw(0)[1:].double().mean() - 1.2) < 0.005
    whole = torch.tensor([1.0, 0.5, 0.25, -0.75, 0.0])  # nothing to round
    t = viops.quantize_dfp(whole, 3, rounding="stochastic")
    assert torch.equal(t.dequantize(), whole)


class TestDfpTensor:
    def test_parts_and_values(self) -> None:
        t = viops.DfpTensor(torch.tensor([1, -3], dtype=torch.int16), torch.tensor([0.5]), 2)
        data, scale = t
        assert data is t.data
        assert scale.shape == ()
        assert t.dequantize().tolist() == [0.5, -1.5]
        assert (t.shape, t.dim(), t.device) == (torch.Size([2]), 1, data.device)
        assert "bits=2" in repr(t)
        for copied in (copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
            assert torch.equal(copied.data, data)
            assert copied.bits == 2

    @pytest.mark.parametrize(
        ("argument", "error", "args"),
        [
            ("data", TypeError, ([1], torch.tensor(1.0))),
            ("data", TypeError, (torch.ones(3), torch.tensor(1.0))),
            (
                "data",
                ValueError,
                (torch.full((3,), 8192, dtype=torch.int16), torch.tensor(1.0), 13),
            ),
            ("data", ValueError, (torch.full((3,), -32768, dtype=torch.int16), torch.tensor(1.0))),
            ("scale", TypeError, (torch.ones(3, dtype=torch.int16), 1.0)),
            ("scale", TypeError, (torch.ones(3, dtype=torch.int16), torch.tensor(1))),
            ("scale", ValueError, (torch.ones(3, dtype=torch.int16), torch.ones(2))),
            ("scale", ValueError, (torch.ones(3, dtype=torch.int16), torch.tensor(-1.0))),
            ("scale", ValueError, (torch.ones(3, dtype=torch.int16), torch.tensor(torch.inf))),
            ("bits", ValueError, (torch.ones(3, dtype=torch.int16), torch.tensor(1.0), 16)),
            (
                "carrier",
                TypeError,
                (torch.ones(3, dtype=torch.int16), torch.tensor(1.0), 13, torch.ones(3).int()),
            ),
            (
                "carrier",
                ValueError,
                (torch.ones(3, dtype=torch.int16), torch.tensor(1.0), 13, torch.ones(2)),
            ),
        ],
    )
    def test_bad_arguments(self, argument: str, error: type, args: tuple) -> None:
        with pytest.raises(error, match=rf"^{argument}: \S"):
            viops.DfpTensor(*args)

    def test_a_carrier_takes_the_gradient(self) -> None:
        x = torch.randn(1, 4, 5, 5)
        t = viops.quantize_dfp(x)
        carrier = torch.zeros(1).expand(x.shape).requires_grad_()  # no memory of its own
        carried = viops.DfpTensor(*t, t.bits, carrier)
        w = torch.randn(3, 4, 3, 3)
        y = viops.integer_conv2d(carried, w)
        (found,) = torch.autograd.grad(y, carrier, torch.ones_like(y))
        leaf = x.clone().requires_grad_()
        y = viops.integer_conv2d(leaf, w)
        (wanted,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        assert torch.equal(found, wanted)
