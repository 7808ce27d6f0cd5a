"""My op: what is particular to it, beside the contract."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
import viops
from contract import BACKENDS, Backend, case_id
from torch.utils.flop_counter import FlopCounterMode
from viops.cases import Draw

pytestmark = pytest.mark.filterwarnings("ignore:.*taken away by the test:RuntimeWarning")


@pytest.fixture(params=BACKENDS, ids=case_id)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn, on for the whole test."""
    with request.param.enter():
        yield request.param


@pytest.fixture
def draw() -> Draw:
    return Draw(torch.float32)


def test_values_and_gradient(backend: Backend) -> None:
    """Against numbers worked out by hand, and not against the reference's own words."""
    x = torch.tensor([[[1.0, -2.0, 0.5], [0.0, 4.0, -0.25]]], requires_grad=True)  # [1, 2, 3]
    y = viops.my_op(x, scale=-2)
    assert y.tolist() == [[[-2.0, 4.0, -1.0], [0.0, -8.0, 0.5]]]
    y.backward(torch.tensor([[[1.0, 10.0, 100.0], [0.0, 0.5, -1.0]]]))
    assert x.grad.tolist() == [[[-2.0, -20.0, -200.0], [0.0, -1.0, 2.0]]]


def test_the_result_is_contiguous(backend: Backend, draw: Draw) -> None:
    for x in (draw.normal(2, 7, 5).transpose(1, 2), draw.normal(1, 7, 1).expand(3, 7, 5)):
        y = viops.my_op(x, scale=0.5)
        assert y.is_contiguous()
        assert torch.equal(y, x / 2)


def test_autocast_changes_nothing(backend: Backend, draw: Draw) -> None:
    x = draw.normal(2, 7, 5)
    expected = viops.my_op(x, scale=0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = viops.my_op(x, scale=0.7)
    assert y.dtype is torch.float32
    assert torch.equal(y, expected)


def test_operation_count(draw: Draw) -> None:
    x = draw.normal(2, 7, 5).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        viops.my_op(x, scale=0.7).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 7 * 5  # forward and backward


def test_module_copies_pickles_and_loads(draw: Draw) -> None:
    x = draw.normal(2, 7, 5)
    module = viops.nn.MyOp(0.5)
    assert list(module.state_dict()) == []
    assert repr(module).endswith("(scale=0.5)")
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), x / 2)
