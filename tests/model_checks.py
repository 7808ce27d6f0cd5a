"""What holds for every model of viops.models: the checks that tests/test_models_<family>.py share.

Models have the methods of viops.models.image_model.  Where no images are given, a model takes
[B, 3, H, W] and has 5 classes.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import viops
from torch import Tensor, nn
from viops.drop_path import DropPath

#: Of logits against those of the official code.
LOGITS = {"rtol": 0, "atol": 1e-4}
#: Of a model against itself in another memory layout, where sums are made in another order.
LAYOUTS = {"rtol": 1e-4, "atol": 1e-5}


def on_meta(build: Callable[..., nn.Module], **options: object) -> Any:
    """A model without values, for its names and shapes."""
    with torch.device("meta"):
        return build(**options)


def unfilled(build: Callable[..., nn.Module], **options: object) -> Any:
    """A model whose parameters and buffers hold anything, made without drawing them."""
    return on_meta(build, **options).to_empty(device="cpu")


def perturbed(model: nn.Module) -> Any:
    """In eval mode, and no parameter zero, one or the same as another."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def gradients(model: nn.Module, out: Tensor) -> list[Tensor]:
    """Of the sum of the squares of a model's output, to its parameters."""
    model.zero_grad()
    out.square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


# the official models


def check_logits(model: nn.Module, images: Tensor, expected: Tensor) -> None:
    """Every fourth logit against the official code's."""
    with torch.no_grad():
        logits = model(images)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits[:, ::4], expected, **LOGITS)


def train_once(
    model: nn.Module, images: Tensor, weight: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """Every fourth logit, and the norms of the gradients of sum(logits * weight), by rising name.

    The backend "default" is what dispatch chooses.
    """
    with viops.use_backend(backend) if backend != "default" else nullcontext():
        logits = model(images)
        (logits * weight).sum().backward()
    parameters = dict(model.named_parameters())
    norms = torch.stack([parameters[name].grad.norm() for name in sorted(parameters)])
    return logits[:, ::4], norms


def count_parameters(build: Callable[..., nn.Module]) -> int:
    """Without those that are not trained."""
    return sum(parameter.numel() for parameter in on_meta(build).parameters())


def drop_paths(model: nn.Module) -> list[float]:
    """The blocks' probabilities of being dropped, in order."""
    return [each.probability for each in model.modules() if isinstance(each, DropPath)]


def check_drop_paths(model: nn.Module, count: int, last: float) -> None:
    """Those of so many blocks rise evenly from 0 to the last."""
    assert drop_paths(model) == pytest.approx([last * i / (count - 1) for i in range(count)])


# as models that people use


def check_layouts(model: nn.Module, sizes: Iterable[tuple[int, int]], channels: int = 3) -> None:
    """Images of any H and W in any layout, and none."""
    for height, width in sizes:
        images = torch.randn(2, channels, height, width)
        logits = model(images)
        assert logits.shape == (2, 5)
        channels_last = images.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(channels_last), logits, **LAYOUTS)
        strided = torch.randn(2, channels, height, 2 * width)[..., ::2].copy_(images)
        torch.testing.assert_close(model(strided), logits, **LAYOUTS)
        assert model(images[:0]).shape == (0, 5)


def check_channels_last(model: nn.Module, chosen: Callable[[nn.Module], bool], calls: int) -> None:
    """These modules see and give channels_last tensors, in so many calls."""
    seen = []

    def check(module: nn.Module, args: tuple, out: Tensor) -> None:
        for tensor in (args[0], out):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
        seen.append(module)

    for module in model.modules():
        if chosen(module):
            module.register_forward_hook(check)
    model(torch.randn(2, 3, 64, 96))
    assert len(seen) == calls


def check_features_and_head(tiny: Callable[..., Any]) -> tuple[Any, Tensor, Tensor]:
    """Returns a model, features [2, num_features, 2, 3], and what its classifier would be given."""
    model = tiny()
    images = torch.randn(2, 3, 64, 96)
    features = model.forward_features(images)
    assert features.shape == (2, model.num_features, 2, 3)
    torch.testing.assert_close(model.forward_head(features), model(images))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled), model(images))
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled)
    assert tiny(num_classes=0)(images).shape == pooled.shape
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    assert model.get_classifier().out_features == model.num_classes == 7
    return model, features, pooled


def check_intermediates(
    model: Any, images: Tensor, channels: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """Four maps of strides 4 to 32, as `feature_info` says; images are [2, 3, 64, 96].

    Returns what forward_intermediates does.
    """
    features, maps = model.forward_intermediates(images)
    assert torch.equal(features, model.forward_features(images))
    places = [(16, 24), (8, 12), (4, 6), (2, 3)]
    shapes = [(2, dim, *size) for dim, size in zip(channels, places, strict=True)]
    assert [tuple(each.shape) for each in maps] == shapes
    for info, each in zip(model.feature_info, maps, strict=True):
        assert (info["num_chs"], info["reduction"]) == (each.shape[1], 64 // each.shape[2])
    return features, maps


def check_pruning(model: Any, images: Tensor, maps: Sequence[Tensor]) -> None:
    """The first two of `check_intermediates`'s maps come of a model that has no more."""
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    taken = model.forward_intermediates(images, [0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(taken, maps, strict=False))


def check_copies(model: nn.Module) -> None:
    """Deep copies, and what comes out of a pickle."""
    images = torch.randn(2, 3, 64, 96)
    expected = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), expected)
        assert list(other.state_dict()) == list(model.state_dict())


def check_checkpointing(model: Any, block: nn.Module) -> None:
    """The same gradients, of which this block is run twice."""
    images = torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)
    expected = gradients(model, model(images))
    calls: list[int] = []
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    model.set_grad_checkpointing()
    torch.manual_seed(1)
    for got, grad in zip(gradients(model, model(images)), expected, strict=True):
        torch.testing.assert_close(got, grad)
    assert len(calls) == 2


def check_half_precision(model: nn.Module) -> None:
    """Bfloat16 by autocast and of the whole model."""
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images)
    for out in (mixed, copy.deepcopy(model).bfloat16()(images.bfloat16())):
        assert out.dtype is torch.bfloat16
        assert (out - expected).norm() < 0.05 * expected.norm()
    assert all(grad.isfinite().all() for grad in gradients(model, mixed.float()))


def check_compile(model: nn.Module, images: Tensor, parts: type[nn.Module] | None = None) -> None:
    """Without graph breaks, and with drop path, which draws what it draws in eager mode.

    Of the whole model, or of its parts of this kind.
    """
    torch.manual_seed(2)
    expected = model(images)
    grads = gradients(model, expected)
    assert not torch.allclose(model(images), expected)  # something was dropped
    torch._dynamo.reset()
    for module in [model] if parts is None else model.modules():
        if parts is None or isinstance(module, parts):
            module.compile(fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    out = model(images)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for got, grad in zip(gradients(model, out), grads, strict=True):
        assert (got - grad).norm() <= 1e-3 * grad.norm() + 1e-4


def check_int16_layers_are_called(model: nn.Module) -> None:
    """Convolutions that are no longer torch's own are not read, but called."""
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    viops.patch.int16(model, scaling="max")
    with torch.no_grad():
        error = (model(images) - expected).norm() / expected.norm()
    assert 0 < error < 5e-3
    assert torch.equal(viops.patch.undo(model)(images), expected)


# timm


def check_timm_creates(
    name: str, configs: Iterable[str], kind: type[nn.Module], crop_pct: float
) -> None:
    """timm lists all these names of configs, and makes a model of this one."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    assert {f"viops_{each}" for each in configs} <= set(timm.list_models("viops_*"))
    options = {"num_classes": 7, "in_chans": 1, "drop_rate": 0.1, "drop_path_rate": 0.3}
    model = timm.create_model(f"viops_{name}", **options).eval()
    assert isinstance(model, kind)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 7)
    assert model.head_drop.p == 0.1
    assert drop_paths(model)[-1] == pytest.approx(0.3)
    cfg = model.pretrained_cfg
    assert cfg["input_size"] == (3, 224, 224)
    assert cfg["crop_pct"] == crop_pct
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()


def check_timm_backbone(name: str, channels: tuple[int, int]) -> None:
    """timm makes a backbone that gives the first map and the third, of so many channels."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    backbone = timm.create_model(f"viops_{name}", features_only=True, out_indices=(0, 2)).eval()
    assert backbone.feature_info.channels() == list(channels)
    assert backbone.feature_info.reduction() == [4, 16]
    maps = backbone(torch.randn(1, 3, 64, 32))
    assert [tuple(each.shape) for each in maps] == [(1, channels[0], 16, 8), (1, channels[1], 4, 2)]
