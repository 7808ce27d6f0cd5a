"""The layers that decayed attention's modules and models are made of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from viops.cases import Draw
from viops.grid_linear import GridLinear
from viops.ops.decayed_attention import module
from viops.ops.decayed_attention.module import DepthwiseConv2d, RelativePosition2d


@pytest.fixture
def draw() -> Draw:
    return Draw(torch.float32)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "of a convolution": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda x: x[:, :1].expand_as(x),
    "no batch": lambda x: x[:0],
    "no rows": lambda x: x[:, :0],
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grid_linear_is_linear(draw: Draw, layout: str, threads: int) -> None:
    x = LAYOUTS[layout](draw.normal(3, 5, 7, 16))
    layer = GridLinear(16, 24)
    plain = nn.Linear(16, 24)
    plain.load_state_dict(layer.state_dict())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = layer(x)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out, plain(x))
    assert out.is_contiguous()


def test_grid_linear_leaves_subclasses_of_tensors_to_torch(draw: Draw) -> None:
    class Weight(Tensor):
        called = False

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            Weight.called |= function is nn.functional.linear
            return super().__torch_function__(function, types, args, kwargs or {})

    layer = GridLinear(16, 24)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Weight))
    layer(draw.normal(3, 5, 7, 16))
    assert Weight.called


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_residual_is_added(draw: Draw, layout: str) -> None:
    x = LAYOUTS[layout](draw.normal(3, 5, 7, 16))
    if layout == "no rows":
        pytest.skip("torch's convolution refuses a grid without rows")
    layer = DepthwiseConv2d(16, 3, residual=True)
    expected = layer.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + x
    torch.testing.assert_close(layer(x), expected)


def overridden(conv: nn.Conv2d) -> nn.Conv2d:
    """As accelerate's hooks replace forward on the instance."""
    forward = conv.forward
    conv.forward = lambda x: 3 * forward(x)
    return conv


CONVOLUTIONS: dict[str, Callable[[], nn.Conv2d]] = {
    "circular": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="circular"),
    "groups": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4),
    "not square": lambda: nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=8),
    "dilated": lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8),
    "forward": lambda: overridden(nn.Conv2d(8, 8, 3, padding=1, groups=8)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_residual_is_added_to_whatever_convolution_there_is(draw: Draw, kind: str) -> None:
    x = draw.normal(2, 5, 7, 8)
    layer = DepthwiseConv2d(8, 3, residual=True)
    layer.conv = CONVOLUTIONS[kind]()
    expected = layer.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + x
    torch.testing.assert_close(layer(x), expected)


def test_hooks_see_the_convolution(draw: Draw) -> None:
    layer, seen = DepthwiseConv2d(8, 3, residual=True), []
    with nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(type(module))
    ):
        layer(draw.normal(2, 5, 7, 8))
    assert seen == [nn.Conv2d, DepthwiseConv2d]


def test_tables_follow_their_angles() -> None:
    position = RelativePosition2d(32, 4, 2, 4)
    sin, _ = position(5, 5).rotation
    swapped = {"angle": 2 * position.angle, "decay": position.decay}
    other, _ = torch.func.functional_call(position, swapped, (5, 5)).rotation
    assert not torch.equal(sin, other)
    assert torch.equal(position(5, 5).rotation[0], sin)
    with torch.no_grad():
        position.angle.mul_(2)
    assert torch.equal(position(5, 5).rotation[0], other)


@pytest.mark.parametrize("values", [(0.0, 4.0), (-1.0, 4.0), (2.0, -4.0), (float("nan"), 1.0)])
def test_decays_of_one_and_more_are_refused(values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"^initial_value"):
        module.log_decays(4, *values)
