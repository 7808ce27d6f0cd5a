"""The INT16 layers: what they compute, as modules, and under torch's transforms."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import viops
from changed_weights import Negated
from tolerances import assert_matches
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from viops import dispatch
from viops.nn import Int16Conv2d, Int16Linear

pytestmark = pytest.mark.filterwarnings("ignore:.*without a kernel of its own:RuntimeWarning")

LAYERS: dict[str, tuple] = {
    "conv": (Int16Conv2d, (4, 6, 3), {"padding": 1}, (2, 4, 7, 5)),
    "no bias": (Int16Conv2d, (4, 6, 3), {"bias": False}, (2, 4, 7, 5)),
    "groups": (
        Int16Conv2d,
        (4, 6, (3, 2)),
        {"stride": 2, "padding": (2, 1), "dilation": (1, 2), "groups": 2},
        (2, 4, 7, 9),
    ),
    "depthwise": (Int16Conv2d, (4, 4, 3), {"groups": 4}, (2, 4, 7, 5)),
    "same": (Int16Conv2d, (4, 6, (3, 2)), {"padding": "same"}, (2, 4, 7, 5)),
    "valid": (Int16Conv2d, (4, 6, 3), {"padding": "valid", "stride": 2}, (2, 4, 7, 5)),
    "reflect": (Int16Conv2d, (4, 6, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 4, 7, 5)),
    "circular": (
        Int16Conv2d,
        (4, 6, 3),
        {"padding": (1, 2), "padding_mode": "circular", "stride": 2},
        (2, 4, 7, 5),
    ),
    "replicate": (
        Int16Conv2d,
        (4, 6, (3, 2)),
        {"padding": "same", "padding_mode": "replicate"},
        (2, 4, 7, 5),
    ),
    "linear": (Int16Linear, (5, 6), {}, (2, 3, 5)),
    "linear, no bias": (Int16Linear, (5, 6), {"bias": False}, (5,)),
}
OPTIONS = {
    "default": {},
    "max": {"bits": 15, "scaling": "max"},
    "truncate": {"bits": 8, "rounding": "truncate"},
}
KINDS = ("conv", "linear")


def make(name: str = "conv", **options: object) -> tuple[nn.Module, Tensor]:
    """A layer and its input."""
    torch.manual_seed(0)
    cls, args, others, shape = LAYERS[name]
    return cls(*args, **others, **options), torch.randn(shape)


def plain(name: str) -> nn.Module:
    """torch's own layer."""
    cls, args, others, _ = LAYERS[name]
    return (nn.Linear if cls is Int16Linear else nn.Conv2d)(*args, **others)


def by_op(layer: nn.Module, x: Tensor, **options: object) -> Tensor:
    """The layer's result by viops's functions, of operands that are quantized before."""
    padding = getattr(layer, "padding", 0)
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    x, weight = (viops.quantize_dfp(t, **options) for t in (x, layer.weight))
    if isinstance(layer, nn.Linear):
        return viops.integer_linear(x, weight, layer.bias, **options)
    window = layer.stride, padding, layer.dilation, layer.groups
    return viops.integer_conv2d(x, weight, layer.bias, *window, **options)


def gradients(y: Tensor, layer: nn.Module, x: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
    """To the input and the parameters."""
    return torch.autograd.grad(y, [x, *layer.parameters()], grad_y.to(y.dtype))


def assert_equal(results: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> None:
    for result, other in zip(results, others, strict=True):
        torch.testing.assert_close(result, other, rtol=0, atol=0)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, on for the whole test."""
    reason = dispatch.refusal("integer_conv2d", request.param, "cpu", torch.float32)
    if reason is not None:
        pytest.skip(reason)
    with viops.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_the_op(backend: str, name: str, options: str) -> None:
    layer, x = make(name, **OPTIONS[options])
    x.requires_grad_()
    y, expected = layer(x), by_op(layer, x, **OPTIONS[options])
    assert y.dtype is torch.float32
    grad_y = torch.randn_like(y)
    assert_equal((y,), (expected,))
    assert_equal(gradients(y, layer, x, grad_y), gradients(expected, layer, x, grad_y))


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_torchs_layer(backend: str, name: str) -> None:
    """On the operands' values, in float64; the output's gradient is one that bits can hold."""
    layer, x = make(name)
    wide = plain(name).double()
    wide.load_state_dict(layer.state_dict())
    x.requires_grad_()
    with torch.no_grad():
        wide.weight.copy_(viops.quantize_dfp(layer.weight).dequantize())
    wide_x = viops.quantize_dfp(x.detach()).dequantize().double().requires_grad_()
    y, expected = layer(x), wide(wide_x)
    assert_matches("y", y, expected.detach())
    grad_y = torch.randint(-40, 41, y.shape) / 64
    found, wanted = gradients(y, layer, x, grad_y), gradients(expected, wide, wide_x, grad_y)
    for grad, want in zip(found, wanted, strict=True):
        assert_matches("gradient", grad, want)


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("linear")])
def test_one_image(backend: str, name: str) -> None:
    layer, x = make(name)
    y = layer(x[0])
    assert y.dim() == 3
    assert_equal((y,), (layer(x[:1])[0],))


@pytest.mark.parametrize("name", ["conv", "same", "groups", "linear"])
def test_an_input_of_integers(backend: str, name: str) -> None:
    layer, x = make(name)
    x.requires_grad_()
    y, expected = layer(viops.quantize_dfp(x)), layer(x)
    grad_y = torch.randn_like(y)
    assert_equal((y,), (expected,))
    assert_equal(gradients(y, layer, x, grad_y), gradients(expected, layer, x, grad_y))


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_is_that_of_torchs_layer(name: str) -> None:
    layer, x = make(name)
    torchs = plain(name)
    assert list(layer.state_dict()) == list(torchs.state_dict())
    layer(x)
    layer.load_state_dict(torchs.state_dict())
    assert_equal((layer(x),), (by_op(layer, x),))
    torchs.load_state_dict(layer.state_dict())
    assert torch.equal(torchs.weight, layer.weight)
    assert list(layer.state_dict()) == list(torchs.state_dict())


@pytest.mark.parametrize("name", KINDS)
def test_copies_are_independent(name: str) -> None:
    layer, x = make(name, bits=9, scaling="max", rounding="truncate")
    y = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = (
        copy.deepcopy(layer),
        copy.copy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    )
    for other in copies:
        assert type(other) is type(layer)
        assert (other.bits, other.scaling, other.rounding) == (9, "max", "truncate")
        assert torch.equal(other(x), y)
    with torch.no_grad():
        copies[0].weight.mul_(1.5)
    assert not torch.allclose(copies[0](x), y)
    assert torch.equal(layer(x), y)


def test_deepcopy_of_a_model_keeps_tied_weights_tied() -> None:
    first, x = make("linear")
    second = Int16Linear(5, 6)
    second.weight = first.weight
    copied = copy.deepcopy(nn.ModuleList([first, second]))
    assert copied[0].weight is copied[1].weight
    assert copied[0].weight is not first.weight
    assert torch.equal(copied[0](x), first(x))


@pytest.mark.parametrize("name", KINDS)
def test_a_parametrized_weight(name: str) -> None:
    layer, x = make(name)
    nn.init.zeros_(layer.bias)
    y = layer(x)
    nn.utils.parametrize.register_parametrization(layer, "weight", Negated())
    assert torch.equal(layer(x), -y)
    layer(x).square().sum().backward()
    assert layer.parametrizations.weight.original.grad.norm() > 0


def test_deepcopy_of_a_parametrized_layer() -> None:
    layer, x = make()
    layer(x)
    nn.utils.parametrize.register_parametrization(layer, "weight", Negated())
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_repr() -> None:
    assert repr(make("conv")[0]) == (
        "Int16Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bits=13, "
        "scaling=power_of_two, rounding=nearest)"
    )
    assert repr(make("linear", bits=7, scaling="max")[0]) == (
        "Int16Linear(in_features=5, out_features=6, bias=True, bits=7, scaling=max, "
        "rounding=nearest)"
    )


@pytest.mark.parametrize("cls", [Int16Conv2d, Int16Linear])
@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("bits", 0, ValueError),
        ("bits", 16, ValueError),
        ("bits", 8.0, TypeError),
        ("scaling", "min", ValueError),
        ("rounding", "up", ValueError),
    ],
)
def test_bad_options_are_named(
    cls: type[nn.Module], argument: str, value: object, error: type[Exception]
) -> None:
    sizes = (4, 6, 3) if cls is Int16Conv2d else (4, 6)
    with pytest.raises(error, match=rf"^{argument}: \S"):
        cls(*sizes, **{argument: value})


def test_bad_inputs_are_named() -> None:
    layer, x = make("conv")
    with pytest.raises(ValueError, match=r"^x: expected \[B C H W\]"):
        layer(x[0, 0])
    with pytest.raises(ValueError, match=r"^x: expected \[B C H W\]"):
        layer(viops.quantize_dfp(x[0]))
    with pytest.raises(TypeError, match=r"^x: \S"):
        layer(x.int())
    with pytest.raises(TypeError, match=r"^input: .*'reflect'.*DfpTensor"):
        make("reflect")[0](viops.quantize_dfp(x))
    with pytest.raises(TypeError, match=r"^x: \S"):
        make("linear")[0]([1.0])


def test_an_input_that_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match=r"^(input|x): \S"):
        make("conv")[0]([1.0])


def test_a_weight_that_is_not_finite_is_named() -> None:
    layer, x = make()
    nn.init.constant_(layer.weight, torch.nan)
    with pytest.raises(ValueError, match=r"^w(eight)?: expected finite values"):
        layer(x)


# gradients only where they belong


@pytest.mark.parametrize("name", KINDS)
def test_frozen_parameters_get_no_gradient(name: str) -> None:
    layer, x = make(name)
    layer(x).sum().backward()
    layer.zero_grad()
    layer.weight.requires_grad_(False)
    x.requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    assert x.grad is not None
    layer.requires_grad_(False)
    assert not layer(x.detach()).requires_grad
    layer.weight.requires_grad_(True)
    layer(x.detach()).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert not layer(x).requires_grad


@pytest.mark.parametrize("name", KINDS)
def test_several_uses_in_one_graph(name: str) -> None:
    layer, x = make(name)
    inputs = [x, x + 1, 2 - x]
    parameters = list(layer.parameters())
    several = torch.autograd.grad(sum(layer(x).square().sum() for x in inputs), parameters)
    each = [torch.autograd.grad(layer(x).square().sum(), parameters) for x in inputs]
    for grad, parts in zip(several, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(grad, sum(parts))


def test_a_backward_after_the_weight_has_changed_raises_as_torchs_does() -> None:
    layer, x = make()
    y = layer(x.requires_grad_())
    with torch.no_grad():
        layer.weight.mul_(-2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)


# under torch's transforms


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", KINDS)
def test_checkpoint(name: str, rounding: str, use_reentrant: bool) -> None:
    layer, x = make(name, rounding=rounding)
    x.requires_grad_()

    def run(forward) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        layer.forget()
        x.grad = None
        layer.zero_grad()
        forward().square().sum().backward()
        return x.grad, *(parameter.grad for parameter in layer.parameters())

    expected = run(lambda: layer(x))
    assert_equal(run(lambda: checkpoint(layer, x, use_reentrant=use_reentrant)), expected)


def test_a_checkpoint_may_recompute_by_another_way() -> None:
    layer, x = make()
    x.requires_grad_()
    expected = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    with FlopCounterMode(display=False):
        y = checkpoint(layer, x, use_reentrant=False)
    y.square().sum().backward()
    assert_equal((layer.weight.grad,), expected)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["conv", "same", "circular", "linear"])
def test_compiled_layers_equal_eager_ones(name: str, options: str) -> None:
    layer, x = make(name, **OPTIONS[options])
    x.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        y, expected = compiled(x), layer(x)
        grad_y = torch.randn_like(y)
        assert_equal((y,), (expected,))
        assert_equal(gradients(y, layer, x, grad_y), gradients(expected, layer, x, grad_y))
        with torch.no_grad():
            layer.weight.mul_(0.7)  # compiled code holds no old weight


def test_compiled_stochastic_rounding() -> None:
    layer, x = make(rounding="stochastic")
    torch._dynamo.reset()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, layer(x), rtol=1e-3, atol=1e-3)
    assert layer.weight.grad.norm() > 0


@pytest.mark.parametrize("name", KINDS)
def test_transforms(name: str) -> None:
    layer, x = make(name)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    layer(x).square().sum().backward()
    grads = torch.func.grad(loss)(parameters)
    for key, parameter in layer.named_parameters():
        torch.testing.assert_close(grads[key], parameter.grad)
    doubled = {key: torch.stack([p, 2 * p]) for key, p in parameters.items()}
    losses = torch.func.vmap(loss)(doubled)
    torch.testing.assert_close(losses[1], loss({key: 2 * p for key, p in parameters.items()}))


@pytest.mark.parametrize("name", ["conv", "reflect", "linear"])
def test_autocast_leaves_results_as_they_are(backend: str, name: str) -> None:
    layer, x = make(name)
    x.requires_grad_()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        of_half = layer(x.bfloat16())
    assert y.dtype is of_half.dtype is torch.float32
    grad_y = torch.randn_like(y)
    assert_equal((y,), (expected,))
    assert_equal(gradients(y, layer, x, grad_y), gradients(expected, layer, x, grad_y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_parameters_of_other_dtypes(name: str, dtype: torch.dtype) -> None:
    layer, x = make(name)
    layer, x = layer.to(dtype), x.to(dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype is torch.float32
    assert x.grad.dtype is layer.weight.grad.dtype is layer.bias.grad.dtype is dtype


@pytest.mark.parametrize("name", KINDS)
def test_stochastic_rounding_is_seeded(backend: str, name: str) -> None:
    layer, x = make(name, bits=5, rounding="stochastic")
    x.requires_grad_()

    def run(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        y = layer(x)
        return y, *gradients(y, layer, x, torch.linspace(-1, 1, y.numel()).view(y.shape))

    first = run(1)
    assert_equal(run(1), first)
    for found, other in zip(run(2)[:3], first, strict=False):  # not the bias: its sum is of floats
        assert not torch.equal(found, other)


def test_meta_and_fake_tensors() -> None:
    layer = Int16Conv2d(4, 6, 3, device="meta")
    assert layer(torch.empty(2, 4, 5, 5, device="meta")).shape == (2, 6, 3, 3)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(torch.randn(2, 4, 5, 5)).isfinite().all()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(torch.randn(2, 4, 5, 5))).shape == (2, 6, 3, 3)
    assert layer(torch.randn(2, 4, 5, 5)).isfinite().all()
