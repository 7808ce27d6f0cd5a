"""How much mix-shift computes: gradients only where they are asked for, and what is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import viops
from contract import Backend, each_backend
from ops.test_mix_shift import ON_CPU, normal, official, parameters
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from viops import native
from viops.ops.mix_shift import op

pytestmark = pytest.mark.filterwarnings("ignore:.*taken away by the test:RuntimeWarning")

backend = each_backend(ON_CPU)


class Calls:
    """The extension, whose functions of mix-shift note that they were called."""

    def __init__(self) -> None:
        self.extension = native.require()
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.extension, name)
        if not name.startswith("mix_shift_"):
            return function

        def noted(*args: object, **kwargs: object) -> object:
            self.names.append(name.removeprefix("mix_shift_"))
            return function(*args, **kwargs)

        return noted


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("", set()),
        ("x", {"input_gradient"}),
        ("weight_lr", {"weight_gradient"}),
        ("weight_td", {"weight_gradient"}),
        ("bias_td", {"weight_gradient"}),
        ("x bias_lr", {"input_gradient", "weight_gradient"}),
        ("norm_weight", set()),
        ("norm_bias", set()),
        ("x norm_bias", {"input_gradient"}),
    ],
)
@pytest.mark.skipif(native.extension is None, reason="there is no extension")
def test_kernels_run_where_a_gradient_is_asked(
    monkeypatch: pytest.MonkeyPatch, asked: str, expected: set[str], normed: bool
) -> None:
    if "norm" in asked and not normed:
        pytest.skip("there is none")
    x, values = normal(2, 6, 5, 7), parameters(6, (3, 5), (1, -1))
    norm = {"norm_weight": normal(6, seed=1), "norm_bias": normal(6, seed=2)} if normed else {}
    named = {
        "x": x,
        "weight_lr": values.weights_lr[1],
        "bias_lr": values.biases_lr[0],
        "weight_td": values.weights_td[0],
        "bias_td": values.biases_td[1],
        **norm,
    }
    leaves = [named[name].requires_grad_() for name in asked.split()]
    calls = Calls()
    monkeypatch.setattr(native, "extension", calls)
    y = viops.mix_shift(x, *values, **norm)
    assert calls.names == ["forward"]
    assert y.requires_grad == bool(leaves)
    calls.names.clear()
    if leaves:
        y.sum().backward()
        once = sorted(expected | ({"norm_backward"} if normed else set()))
        assert sorted(calls.names) == once
        assert all(leaf.grad is not None for leaf in leaves)
        asked_for = set(map(id, leaves))
        for tensor in (x, *values.tensors(), *norm.values()):
            assert (tensor.grad is not None) == (id(tensor) in asked_for)


@pytest.mark.parametrize(
    "asked", ["x", "weight_lr", "weight_td bias", "norm_weight", "norm_bias", "x norm_bias"]
)
def test_gradients_are_made_where_they_are_asked(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """Those of weights and bias together, and those of the norm; the others are empty."""
    parts = {"x": {"x"}, "weights": {"weight_lr", "weight_td", "bias"}}
    parts["norm"] = {"norm_weight", "norm_bias"}
    made: list[tuple[Tensor, ...]] = []
    run_backward = op._mix_shift.run_backward

    def noted(*args: Any) -> tuple[Tensor, ...]:
        made.append(run_backward(*args))
        return made[-1]

    monkeypatch.setattr(op._mix_shift, "run_backward", noted)
    everything = set.union(*parts.values())
    for names in (everything, set(asked.split())):
        named = {
            "x": normal(2, 6, 5, 7),
            "weight_lr": normal(3 * 9 + 3 * 25, seed=1),
            "weight_td": normal(3 * 9 + 3 * 25, seed=2),
            "bias": normal(6, seed=3),
            "norm_weight": normal(6, seed=4),
            "norm_bias": normal(6, seed=5),
        }
        leaves = [named[name].requires_grad_() for name in named if name in names]
        *first, norm_weight, norm_bias = named.values()
        y = op._mix_shift(*first, [3, 5], [1, -1], norm_weight, norm_bias, 0.1)
        y.square().sum().backward()
        assert all(leaf.grad is not None for leaf in leaves)
    needed = set.union(*(part for part in parts.values() if part & names))
    for name, grad, whole in zip(named, made[1], made[0], strict=True):
        assert whole.shape == named[name].shape
        assert torch.equal(grad, whole) if name in needed else grad.numel() == 0, name


def flops(function: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[int, int]:
    """Of forward alone, and of its backward."""
    with FlopCounterMode(display=False) as counter:
        y = function()
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y.sum(), leaves)
    return forward, counter.get_total_flops()


@pytest.mark.skipif(native.extension is None, reason="there is no extension")
def test_flops_are_of_both_directions() -> None:
    x, values = normal(2, 19, 6, 7), parameters(19, (1, 3, 3, 5, 7), (-2, -1, 0, 1, 2))
    norm = {"norm_weight": normal(19), "norm_bias": normal(19)}
    values.require_grad()
    taps = 2 * (4 * (1 + 9 + 9 + 25) + 3 * 49)
    one = 2 * taps * 2 * 6 * 7
    leaves = values.tensors()
    assert flops(lambda: official(x, values), leaves)[0] == one
    assert flops(lambda: viops.mix_shift(x, *values), leaves) == (one, one)
    assert flops(lambda: viops.mix_shift(x, *values, **norm), leaves) == (one, 2 * one)
    x.requires_grad_()
    assert flops(lambda: viops.mix_shift(x, *values), [x, *leaves]) == (one, 2 * one)
    assert flops(lambda: viops.mix_shift(x, *values, **norm), [x, *leaves]) == (one, 3 * one)
    weight = normal(19, 1, 5, 5).requires_grad_()
    depthwise = flops(lambda: viops.depthwise_norm(x, weight, None, *norm.values()), [x, weight])
    assert depthwise == (one_of := 2 * 19 * 25 * 2 * 6 * 7, 3 * one_of)
