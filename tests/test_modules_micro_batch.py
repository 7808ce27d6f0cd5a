"""The modules of weight standardization: what they compute, folded and unfolded too."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import viops
from contract import BACKENDS, Backend, each_backend
from torch import Tensor, nn
from torch.nn.utils import prune

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*taken away by the test:RuntimeWarning",
    "ignore:.*without a kernel of its own:RuntimeWarning",
)

backend = each_backend(BACKENDS)


def filters_of(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """[O, K] of a weight: what each output channel is computed with."""
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return lambda weight: weight.flatten(1)
    groups = layer.groups
    return lambda weight: torch.stack(
        [
            part[:, i].flatten()
            for part in weight.chunk(groups)  # the input channels of a group
            for i in range(weight.shape[1])
        ]
    )


def by_hand(layer: nn.Module, weight: Tensor, gain: Tensor | None) -> Tensor:
    """The standardised weight, filter by filter, for autograd to differentiate."""
    standardized = torch.zeros_like(weight)
    to_filters = filters_of(layer)
    place = to_filters(torch.arange(weight.numel()).view(weight.shape))  # [O, K]
    rows = weight.flatten()[place]
    var = rows.var(dim=1, correction=int(layer.unbiased), keepdim=True)
    divisor = (var + layer.eps).sqrt() if layer.eps_inside else var.sqrt() + layer.eps
    rows = (rows - rows.mean(dim=1, keepdim=True)) / divisor
    if gain is not None:
        rows = rows * gain[:, None]
    return standardized.flatten().index_put((place,), rows).view(weight.shape)


LAYERS = {
    "conv1d": (viops.nn.WSConv1d, (4, 6, 3), {"padding": 1, "groups": 2}, (2, 4, 9)),
    "conv2d": (viops.nn.WSConv2d, (4, 6, (3, 2)), {"stride": 2, "dilation": 2}, (2, 4, 9, 8)),
    "reflect": (
        viops.nn.WSConv2d,
        (4, 6, 3),
        {"padding": 1, "padding_mode": "reflect", "bias": False},
        (2, 4, 5, 6),
    ),
    "same": (viops.nn.WSConv2d, (4, 6, 3), {"padding": "same"}, (2, 4, 5, 6)),
    "conv3d": (viops.nn.WSConv3d, (4, 6, 2), {}, (2, 4, 3, 4, 3)),
    "transpose1d": (viops.nn.WSConvTranspose1d, (4, 6, 3), {"stride": 2}, (2, 4, 5)),
    "transpose2d": (
        viops.nn.WSConvTranspose2d,
        (4, 6, 3),
        {"stride": 2, "groups": 2, "output_padding": 1},
        (2, 4, 5, 4),
    ),
    "transpose3d": (viops.nn.WSConvTranspose3d, (4, 6, 2), {"groups": 2}, (2, 4, 3, 2, 3)),
    "linear": (viops.nn.WSLinear, (7, 6), {}, (2, 3, 7)),
}
OPTIONS = {
    "default": {},
    "gain": {"gain": True},
    "timm": {"unbiased": False, "eps": 1e-3, "gain": True},
    "outside": {"eps_inside": False, "eps": 1e-2},
}


def make(name: str = "conv2d", **options: object) -> tuple[nn.Module, Tensor]:
    """A layer and its input, both in float64."""
    torch.manual_seed(0)
    cls, args, others, shape = LAYERS[name]
    layer = cls(*args, **others, **options).double()
    if layer.gain is not None:
        nn.init.normal_(layer.gain)
    return layer, torch.randn(shape, dtype=torch.float64)


def functional(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """torch's own layer with this weight."""
    plain = layer.fold()
    return torch.func.functional_call(plain, {"weight": weight, "bias": layer.bias}, (x,))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients(backend: Backend, name: str, options: str) -> None:
    layer, x = make(name, **OPTIONS[options])
    x.requires_grad_()
    y = layer(x)
    leaves = [x, *(p for p in layer.parameters())]
    expected = functional(layer, x, by_hand(layer, layer.weight, layer.gain))
    weight = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(y, leaves, weight)
    wanted = torch.autograd.grad(expected, leaves, weight)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-11)


def test_output_size_of_transposed_convolutions() -> None:
    layer = viops.nn.WSConvTranspose2d(4, 6, 3, stride=2)
    x = torch.randn(2, 4, 5, 5)
    assert layer(x, output_size=[12, 12]).shape == (2, 6, 12, 12)
    torch.testing.assert_close(layer(x, [12, 12]), layer.fold()(x, [12, 12]))


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_is_that_of_the_plain_layer(name: str) -> None:
    layer, _ = make(name)
    plain = layer.plain(*LAYERS[name][1], **LAYERS[name][2])
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert set(make(name, gain=True)[0].state_dict()) == {*plain.state_dict(), "gain"}


# fold and unfold


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_fold(name: str, options: str) -> None:
    layer, x = make(name, **OPTIONS[options])
    folded = layer.fold()
    assert type(folded) is layer.plain
    assert set(vars(folded)) == set(vars(layer.plain(*LAYERS[name][1], **LAYERS[name][2])))
    assert torch.equal(folded(x), layer(x))
    assert folded.bias is None or folded.bias is not layer.bias
    with torch.no_grad():
        layer.weight.add_(1)
    assert not torch.equal(folded.weight, layer.weight)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_unfold_with_gain_brings_back_what_fold_gave(name: str, options: str) -> None:
    layer, x = make(name, **OPTIONS[options])
    others = {key: value for key, value in OPTIONS[options].items() if key != "gain"}
    unfolded = type(layer).unfold(layer.fold(), gain=True, **others)
    assert type(unfolded) is type(layer)
    torch.testing.assert_close(unfolded(x), layer(x), rtol=1e-12, atol=1e-12)


def test_unfold_of_any_layer() -> None:
    """With gain only the means are lost; without, each filter's scale is too."""
    conv = nn.Conv2d(4, 6, 3).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    centred = copy.deepcopy(conv)
    with torch.no_grad():
        centred.weight -= centred.weight.mean(dim=(1, 2, 3), keepdim=True)
        centred.bias.zero_()
        conv.bias.zero_()
    with_gain = viops.nn.WSConv2d.unfold(conv, gain=True, unbiased=False)
    torch.testing.assert_close(with_gain(x), centred(x), rtol=1e-12, atol=1e-12)
    without = viops.nn.WSConv2d.unfold(conv)
    assert torch.equal(without.weight, conv.weight)
    ratio = without(x) / centred(x)
    torch.testing.assert_close(ratio, ratio[:1, :, :1, :1].expand_as(ratio))
    assert not torch.allclose(ratio, torch.ones_like(ratio), rtol=0.1)


def test_unfold_refuses_other_layers() -> None:
    with pytest.raises(TypeError, match=r"^layer: expected torch's Conv2d, got Conv1d"):
        viops.nn.WSConv2d.unfold(nn.Conv1d(3, 4, 1))
    with pytest.raises(TypeError, match=r"^layer: expected torch's Linear, got WSLinear"):
        viops.nn.WSLinear.unfold(viops.nn.WSLinear(3, 4))


def test_representation_says_the_options() -> None:
    assert repr(viops.nn.WSLinear(3, 4)) == (
        "WSLinear(in_features=3, out_features=4, bias=True, eps=1e-05)"
    )
    text = repr(viops.nn.WSConv2d(3, 4, 1, eps=0.1, unbiased=False, eps_inside=False, gain=True))
    assert text.endswith("eps=0.1, unbiased=False, eps_inside=False, gain=True)")


def test_fold_of_computed_weights() -> None:
    layer = viops.nn.WSConv2d(3, 4, 3)
    x = torch.randn(2, 3, 5, 5)
    nn.utils.parametrizations.weight_norm(layer)
    folded = layer.fold()
    assert type(folded) is nn.Conv2d
    assert set(folded.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(folded(x), layer(x))
    pruned = viops.nn.WSConv2d(3, 4, 3)
    prune.l1_unstructured(pruned, "weight", 0.5)
    with pytest.raises(ValueError, match=r"^weight: \S"):
        pruned.fold()

    class Doubled(viops.nn.WSConv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match=r"^fold: \S"):
        Doubled(3, 4, 3).fold()


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("eps", lambda w: viops.standardize_weight(w, eps=-1.0)),
        ("eps", lambda w: viops.standardize_weight(w, eps=None)),
        ("unbiased", lambda w: viops.standardize_weight(w, unbiased="no")),
        ("gain", lambda w: viops.standardize_weight(w, gain=torch.ones(4).to_sparse())),
        ("weights", lambda w: viops.standardize_weights(w)),
        ("weights", lambda w: viops.standardize_weights(None)),
        ("gains", lambda w: viops.standardize_weights([w], gains=3)),
        ("eps", lambda w: viops.nn.WSConv2d(3, 4, 3, eps=float("nan"))),
        ("skip", lambda w: viops.patch.micro_batch(nn.Sequential(), skip=None)),
    ],
)
def test_what_is_refused(argument: str, call: Callable) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}: \S"):
        call(torch.randn(4, 3, 3, 3))
