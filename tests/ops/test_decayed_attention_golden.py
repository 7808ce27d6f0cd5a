"""Decayed attention reproduces the official RMT code: rmt_golden.py says what the file holds."""

from __future__ import annotations

import pytest
import rmt_golden
import torch
import viops
from contract import BACKENDS, Backend, each_backend
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*taken away by the test:RuntimeWarning")

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
FORMS = pytest.mark.parametrize("form", ["whole", "chunk"])

backend = each_backend(BACKENDS)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return rmt_golden.load()


@FORMS
def test_positions(golden: dict[str, Tensor], form: str) -> None:
    rotation, _ = viops.nn.RelativePosition2d(32, 4, initial_value=2, heads_range=4)(5, 7)
    for name, table in zip(("sin", "cos"), rotation, strict=True):
        torch.testing.assert_close(table, golden[f"{form}_{name}"], **TOLERANCE)


@FORMS
def test_outputs_and_gradients(golden: dict[str, Tensor], backend: Backend, form: str) -> None:
    attention = viops.nn.ManhattanSelfAttention(32, 4, axial=form == "chunk")
    attention.load_state_dict(rmt_golden.draw_state(attention.state_dict()))
    position = viops.nn.RelativePosition2d(32, 4, initial_value=2, heads_range=4)
    x = rmt_golden.draw_images(2, 5, 7, 32).requires_grad_()
    weight = rmt_golden.draw_images(2, 5, 7, 32, seed=rmt_golden.SEED + 2)
    out = attention(x, position(5, 7))
    torch.testing.assert_close(out, golden[f"{form}_out"], **TOLERANCE)
    (out * weight).sum().backward()
    grads = {"x": x.grad, **{name: p.grad for name, p in attention.named_parameters()}}
    assert len(grads) == 11
    for name, grad in grads.items():
        expected = golden[f"{form}_grad_{name}"]
        assert (grad - expected).norm() <= 1e-5 * expected.norm() + 1e-5, name
