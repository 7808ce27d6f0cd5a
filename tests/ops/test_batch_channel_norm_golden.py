"""Batch channel norm and weight standardization reproduce the authors' code:
batch_channel_norm_golden.py says what the file holds."""

from __future__ import annotations

import batch_channel_norm_golden as official
import pytest
import torch
import torchvision
import viops
from contract import BACKENDS, Backend, each_backend
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:.*taken away by the test:RuntimeWarning")

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

backend = each_backend(BACKENDS)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return official.load()


def check_layer(golden: dict[str, Tensor], name: str, layer: nn.Module, x: Tensor) -> None:
    """Output and all gradients of a layer with drawn parameters."""
    layer.load_state_dict(official.draw_state(layer.state_dict()))
    x.requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, golden[f"{name}_y"], **TOLERANCE)
    (y * official.draw(*y.shape, seed=official.SEED + 2)).sum().backward()
    grads = {"x": x.grad, **{key: p.grad for key, p in layer.named_parameters()}}
    assert len(grads) == sum(key.startswith(f"{name}_grad_") for key in golden)
    for key, grad in grads.items():
        expected = golden[f"{name}_grad_{key}"]
        assert grad.shape == expected.shape, key
        assert (grad - expected).norm() <= 1e-5 * expected.norm(), key


@pytest.mark.parametrize(
    ("name", "num_features", "num_groups", "shape"),
    [("layers_norm", 64, 32, (4, 64, 5, 7)), ("deeplab_norm", 12, 4, (5, 12, 3, 4))],
)
def test_norms(
    golden: dict[str, Tensor],
    backend: Backend,
    name: str,
    num_features: int,
    num_groups: int,
    shape: tuple[int, ...],
) -> None:
    norm = viops.nn.BatchChannelNorm2d(num_features, num_groups)
    x = official.draw(*shape) * 2 + 0.5
    check_layer(golden, name, norm, x)
    for key in ("running_mean", "running_var"):
        got = getattr(norm.bn, key)
        torch.testing.assert_close(got, golden[f"{name}_{key}"], **TOLERANCE)
    torch.testing.assert_close(norm.eval()(x), golden[f"{name}_eval"], **TOLERANCE)


@pytest.mark.parametrize(("name", "inside"), [("layers_conv", True), ("deeplab_conv", False)])
def test_convolutions(golden: dict[str, Tensor], backend: Backend, name: str, inside: bool) -> None:
    conv = viops.nn.WSConv2d(6, 8, 3, padding=1, eps_inside=inside)
    check_layer(golden, name, conv, official.draw(2, 6, 5, 7))


def test_eps_inside_or_outside_is_another_function(golden: dict[str, Tensor]) -> None:
    difference = (golden["layers_conv_y"] - golden["deeplab_conv_y"]).norm()
    assert difference > 1e-4 * golden["layers_conv_y"].norm()


def test_patched_resnet(golden: dict[str, Tensor], backend: Backend) -> None:
    """torchvision's ResNet-18, patched, with the weights of the authors' one."""
    model = viops.patch.micro_batch(torchvision.models.resnet18(num_classes=10))
    model.load_state_dict(official.draw_state(model.state_dict()))
    logits = model(official.draw(3, 3, 64, 64))
    torch.testing.assert_close(logits, golden["resnet_logits"], **TOLERANCE)
    (logits * official.draw(3, 10, seed=official.SEED + 2)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    norms = torch.stack([grads[name].double().norm() for name in sorted(grads)]).float()
    torch.testing.assert_close(norms, golden["resnet_grad_norms"], rtol=1e-5, atol=1e-5)
    running = {name: b for name, b in model.named_buffers() if "running" in name}
    norms = torch.stack([running[name].norm() for name in sorted(running)])
    torch.testing.assert_close(norms, golden["resnet_running_norms"], **TOLERANCE)
