"""The INT16 layers quantize and pack a weight once, and never keep an old one."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable

import changed_weights
import pytest
import torch
import viops
from changed_weights import Negated, in_place, stepped
from test_integer_conv_module import KINDS, by_op, make
from torch import Tensor, nn
from viops import dispatch, native
from viops.ops.integer_conv import convolution, kernels

pytestmark = pytest.mark.filterwarnings("ignore:.*without a kernel of its own:RuntimeWarning")

needs_native = pytest.mark.skipif(native.extension is None, reason=str(native.load_error))


class Counting:
    """How often the quantize op runs, by the shape of what it is given."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []

    def of(self, layer: nn.Module) -> int:
        return self.shapes.count(layer.weight.shape)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting()

    def noting(function: Callable) -> Callable:
        def noted(x: Tensor, *options: object) -> object:
            counting.shapes.append(x.shape)
            return function(x, *options)

        return noted

    by_name = dispatch._kernels["quantize_dfp"]
    for name, functions in by_name.items():
        monkeypatch.setitem(by_name, name, functions._replace(forward=noting(functions.forward)))
    monkeypatch.setattr(dispatch, "_choices", {})
    return counting


def use(layer: nn.Module, x: Tensor) -> Tensor:
    """The output, after a backward where there is one."""
    y = layer(x)
    if y.requires_grad:
        y.square().sum().backward()
    return y.detach()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_an_unchanged_weight_is_quantized_once(
    counted: Counting, name: str, training: bool
) -> None:
    layer, x = make(name)
    layer.train(training)
    with torch.set_grad_enabled(training):
        first = use(layer, x)
        for _ in range(3):
            assert torch.equal(use(layer, x), first)
        layer.zero_grad()
        layer.train(not training)
        layer.requires_grad_(False)
        assert torch.equal(use(layer, x), first)
    with torch.inference_mode():
        assert torch.equal(layer(x), first)
    assert counted.of(layer) == 1


def test_the_first_use_may_be_without_gradients(counted: Counting) -> None:
    layer, x = make()
    with torch.no_grad():
        y = layer(x)
    assert torch.equal(use(layer, x), y)
    assert layer.weight.grad is not None
    assert counted.of(layer) == 1


@pytest.mark.parametrize("name", KINDS)
def test_the_first_use_may_be_in_inference_mode(name: str) -> None:
    layer, x = make(name)
    with torch.inference_mode():
        y = layer(x)
    assert torch.equal(use(layer, x), y)


def test_training_goes_on_after_an_evaluation_in_inference_mode() -> None:
    layer, x = make()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    use(layer, x)
    optimizer.step()
    with torch.inference_mode():
        layer.eval()(x)
    use(layer.train(), x)


def packings(layer: nn.Module) -> dict:
    """What the kernels keep with the weight's integers."""
    data = layer.quantized_weight().data
    _, filters = convolution._filters.get(data, (None, data))
    return kernels._packed[filters]


@needs_native
@pytest.mark.parametrize("name", KINDS)
def test_a_packing_is_kept_too(name: str) -> None:
    layer, x = make(name)
    x.requires_grad_()
    layer(x)
    assert len(packings(layer)) == 1
    use(layer, x)
    kept = packings(layer)
    before = dict(kept)
    assert len(before) == 2  # forward and to the input
    use(layer, x)
    assert packings(layer) is kept
    assert all(kept[key] is packed for key, packed in before.items())
    assert kept.keys() == before.keys()
    in_place(layer)
    use(layer, x)
    assert packings(layer) is not kept


def with_other_strides(tensor: Tensor) -> None:
    """The same memory, read as if the last axis came first."""
    turned = torch.empty(tensor.shape[::-1]).permute(*reversed(range(tensor.dim())))
    tensor.data = tensor.data.as_strided(tensor.shape, turned.stride())


def by_data_and_forgotten(layer: nn.Module) -> None:
    layer.weight.data.add_(torch.randn_like(layer.weight))
    layer.forget()


CHANGES = {
    **changed_weights.CHANGES,
    "momentum": stepped(lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True)),
    "adam": stepped(lambda p: torch.optim.Adam(p, 0.1)),
    "other strides": lambda layer: with_other_strides(layer.weight),
    "forget": by_data_and_forgotten,
    "fewer bits": lambda layer: setattr(layer, "bits", 3),
    "scaling": lambda layer: setattr(layer, "scaling", "max"),
    "rounding": lambda layer: setattr(layer, "rounding", "truncate"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", KINDS)
def test_a_changed_weight_is_quantized_anew(
    counted: Counting, name: str, change: str, training: bool
) -> None:
    layer, x = make(name)
    layer.train(training)
    with torch.set_grad_enabled(training):
        before = use(layer, x)
        CHANGES[change](layer)
        calls = counted.of(layer)
        after = use(layer, x)
        use(layer, x)
        assert counted.of(layer) == calls + 1
        options = {"bits": layer.bits, "scaling": layer.scaling, "rounding": layer.rounding}
        assert torch.equal(after, by_op(layer, x, **options))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("name", KINDS)
def test_conversions_quantize_anew(counted: Counting, name: str) -> None:
    layer, x = make(name)
    layer.requires_grad_(False)
    y = use(layer, x)
    for dtype, calls in ((torch.float64, 2), (torch.float32, 3), (torch.bfloat16, 4)):
        layer.to(dtype)
        y_of_dtype, again = use(layer, x), use(layer, x)
        assert counted.of(layer) == calls
        assert torch.equal(y_of_dtype, again)
        assert torch.equal(y_of_dtype, y) is (dtype is not torch.bfloat16)


def test_swapped_parameters() -> None:
    """Conversions that swap the tensors themselves, which nothing may refer to weakly."""
    layer, x = make()
    y = layer(x).detach()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double()
        assert torch.equal(layer(x), y)
        layer.load_state_dict({key: 2 * value for key, value in layer.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(layer(x), 2 * y)


def test_training_never_sees_an_old_weight(counted: Counting) -> None:
    layer, x = make()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    for step in range(4):
        optimizer.zero_grad()
        with torch.no_grad():
            layer.eval()(x)
        fresh = by_op(layer.train(), x)
        calls = counted.of(layer)
        assert torch.equal(use(layer, x), fresh)
        assert counted.of(layer) == calls == 2 * (step + 1)  # the layer's, and by_op's
        optimizer.step()


def test_freed_memory_that_comes_back_is_no_old_weight() -> None:
    """A new parameter may lie where one lay that is gone."""
    layer, x = make()
    for _ in range(50):
        layer.weight = None
        layer.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
        assert torch.equal(layer(x), by_op(layer, x))


@pytest.mark.parametrize("name", KINDS)
def test_parts_of_one_memory_are_not_each_other(name: str) -> None:
    layer, x = make(name)
    parts = torch.randn(2, *layer.weight.shape)
    for part in (0, 1, 0):
        layer.weight.data = parts[part]
        assert torch.equal(layer(x), by_op(layer, x))


@pytest.mark.parametrize("why", ["shared", "stochastic", "reference", "parametrized"])
def test_what_is_not_kept(counted: Counting, why: str) -> None:
    layer, x = make(rounding="stochastic" if why == "stochastic" else "nearest")
    if why == "shared":
        layer.share_memory()
    elif why == "parametrized":
        nn.utils.parametrize.register_parametrization(layer, "weight", Negated())
    if why == "reference":
        with viops.use_backend("reference"):
            layer(x)
    else:
        layer(x)
    assert layer._kept is None
    if why in ("shared", "stochastic"):
        layer(x)
        assert counted.of(layer) == 2


def test_copies_keep_integers_of_their_own(counted: Counting) -> None:
    layer, x = make()
    y = layer(x)
    other = copy.deepcopy(layer)
    assert other._kept is None
    assert torch.equal(other(x), y)
    in_place(other)
    assert not torch.equal(other(x), y)
    assert torch.equal(layer(x), y)
    assert counted.of(layer) == 3


INPUT_CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda x: x.copy_(torch.randn_like(x)),
    "through data": lambda x: x.data.copy_(torch.randn_like(x)),
    "through numpy": lambda x: torch.from_numpy(x.numpy()).copy_(torch.randn_like(x)),
    "through a view": lambda x: x[0].mul_(3),
    "in inference mode": torch.inference_mode()(lambda x: x.mul_(3)),
    "other strides": with_other_strides,
}


@pytest.mark.parametrize("change", INPUT_CHANGES)
@pytest.mark.parametrize("name", KINDS)
def test_a_changed_input_is_quantized_anew(name: str, change: str) -> None:
    layer, x = make(name)
    before = layer(x)
    INPUT_CHANGES[change](x)
    after = layer(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, by_op(layer, x))


@pytest.mark.parametrize("name", KINDS)
def test_an_input_seen_in_inference_mode_may_be_trained_on(name: str) -> None:
    (teacher, x), (student, _) = make(name), make(name)
    with torch.inference_mode():
        y = teacher(x)
    assert torch.equal(use(student, x), y)


@pytest.mark.parametrize("name", KINDS)
def test_an_input_is_saved_as_it_was(name: str) -> None:
    layer, x = make(name)
    layer(x)
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), x)


@pytest.mark.parametrize("name", KINDS)
def test_threads_share_a_layer(name: str) -> None:
    layer, x = make(name)
    wrong: list[bool] = []

    def work() -> None:
        for _ in range(20):
            y = layer(x)
            y.sum().backward()
            wrong.append(not torch.equal(y, expected))

    for _ in range(3):
        in_place(layer)
        expected = by_op(layer, x).detach()
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(wrong) == 240
    assert not any(wrong)
