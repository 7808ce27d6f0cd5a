"""What viops.patch.micro_batch leaves as it is, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torchvision
import viops
from test_patch_micro_batch import make
from torch import nn
from viops.patch.micro_batch import FusedActivation, FusedBlock

pytestmark = pytest.mark.filterwarnings("ignore:.*without a kernel of its own:RuntimeWarning")


@pytest.mark.parametrize("hook", ["full_backward_hook", "full_backward_pre_hook", "forward_hook"])
def test_activations_with_hooks_of_any_kind_stay(hook: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    getattr(model[2], f"register_{hook}")(lambda *args: None)
    viops.patch.micro_batch(model, 2)
    assert type(model[2]) is nn.ReLU
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    getattr(model[1], f"register_{hook}")(lambda *args: None)
    with pytest.raises(ValueError, match=r"^1: it has hooks"):
        viops.patch.micro_batch(model, 2)


def test_skipped_activations_stay() -> None:
    model = torchvision.models.resnet18()
    viops.patch.micro_batch(model, 8, skip=["relu", "layer1.0.relu", "layer2.0"])
    assert type(model.relu) is type(model.layer1[0].relu) is nn.ReLU
    assert type(model.layer2[0].relu) is nn.ReLU
    assert not isinstance(model.layer2[0], FusedBlock)
    assert isinstance(model.layer1[1].relu, FusedActivation)


def test_filters_of_one_weight_stay() -> None:
    """Standardised they are zero."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4))
    viops.patch.micro_batch(model, 2)
    assert type(model[0]) is nn.Conv2d


def test_parametrized_convolutions_are_refused() -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

    model = build()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(TypeError, match=r"^0: \S"):
        viops.patch.micro_batch(model, 2)
    model = viops.patch.micro_batch(build(), 2)
    nn.utils.parametrizations.weight_norm(model[0])
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"^0: \S"):
        viops.patch.undo(model)
    assert list(model.modules()) == before
    assert model[0].weight.shape == (8, 3, 3, 3)


def with_subclass() -> nn.Module:
    class Conv2d(nn.Conv2d):
        pass

    return nn.Sequential(Conv2d(3, 8, 1), nn.BatchNorm2d(8))


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    model[1].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("make_model", "options", "error", "message"),
    [
        (lambda: "resnet", {}, TypeError, r"model: expected a torch.nn.Module, got str"),
        (lambda: nn.Linear(3, 3), {}, ValueError, "model: expected one with batch norms"),
        (lambda: nn.BatchNorm2d(3), {}, ValueError, "model: expected one that has norms in it"),
        (
            lambda: viops.patch.micro_batch(make("sequence")),
            {},
            ValueError,
            "model: it is patched already",
        ),
        (
            lambda: make("sequence"),
            {"num_groups": 0},
            ValueError,
            "num_groups: expected at least 1",
        ),
        (lambda: make("sequence"), {"skip": "features"}, TypeError, "skip: expected a sequence of"),
        (
            lambda: make("sequence"),
            {"skip": ["no"]},
            ValueError,
            "skip: 'no' is no module of the model",
        ),
        (with_subclass, {}, TypeError, "0: expected torch's Conv2d before a norm, got .*with_sub"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.SyncBatchNorm(8)),
            {},
            TypeError,
            "1: expected torch's BatchNorm2d .*; patch before viops.nn.convert_sync",
        ),
        (
            lambda: nn.Sequential(nn.BatchNorm2d(8, affine=False)),
            {},
            ValueError,
            "0: expected a norm with affine=True",
        ),
        (
            lambda: nn.Sequential(nn.BatchNorm2d(8, track_running_stats=False)),
            {},
            ValueError,
            "0: expected a norm with track_running_stats=True",
        ),
        (hooked, {}, ValueError, "1: it has hooks"),
    ],
)
def test_what_is_refused(
    make_model: Callable, options: dict, error: type[Exception], message: str
) -> None:
    model = make_model()
    text = repr(model)
    with pytest.raises(error, match=f"^{message}"):
        viops.patch.micro_batch(model, **options)
    assert repr(model) == text  # nothing was changed


def test_a_vision_transformer_has_nothing_to_patch() -> None:
    with pytest.raises(ValueError, match=r"^model: expected one with batch norms"):
        viops.patch.micro_batch(timm.create_model("vit_tiny_patch16_224"))
