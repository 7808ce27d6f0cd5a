"""Reversible columns against the same columns stored, under all that bites a second run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import viops
from reversible_networks import (
    CHANNELS,
    CLOSE,
    Level,
    alphas,
    assert_same,
    gradients,
    images,
    levels,
    loss_of,
    make,
    rebuilt_to_the_bit,
    stored,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from viops.drop_path import DropPath
from viops.nn import ReversibleBlocks, ReversibleColumn, ReversibleColumns


@pytest.mark.parametrize("num_columns", [1, 2, 5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_those_of_the_stored_form(num_columns, memory_format) -> None:
    network = make(num_columns).to(memory_format=memory_format)
    x = images().contiguous(memory_format=memory_format)
    found = gradients(network, x=x)
    assert found["x"].abs().max() > 1e-3
    assert all(
        grad.abs().max() > 0 for name, grad in found.items() if not name.startswith("0.alpha")
    )
    assert_same(found, gradients(stored(network), x=x))


def test_the_formula() -> None:
    """Both forms against columns written out."""
    network = make(3)
    x = images()
    features: list = [None] * 3
    for column in network.columns:
        previous, features = features, []
        for i, (level, alpha) in enumerate(zip(column.levels, column.alphas, strict=True)):
            below = features[-1] if features else x
            above = previous[i + 1] if i < 2 else None
            out = level(below, above)
            features.append(out if previous[i] is None else out + alpha * previous[i])
    for reversible in (True, False):
        network.reversible = reversible
        for found, wanted in zip(network(x), features, strict=True):
            torch.testing.assert_close(found, wanted, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(network(x)[2], features[2], **CLOSE)
    previous = None
    for column in network.columns:
        previous = column(x, previous)
    torch.testing.assert_close(previous[2], features[2], **CLOSE)


def test_the_first_columns_alpha_has_a_zero_gradient_in_both_forms() -> None:
    network = make()
    for form in (network, stored(network)):
        found = gradients(form)
        assert found["0.alpha1"].shape == (1, CHANNELS[1], 1, 1)
        assert not found["0.alpha1"].any()


def kept_bytes(network: nn.Module, x: Tensor) -> int:
    """The bytes of distinct memory that autograd keeps, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(x)
    return sum(kept.values())


def test_what_is_kept_does_not_grow_with_columns() -> None:
    x = images().requires_grad_()
    stem_and_features = sum(t.nbytes for t in (x, *make(4)(x)))
    for num_columns in (4, 8, 16):
        assert kept_bytes(make(num_columns), x) == stem_and_features
    assert kept_bytes(stored(make(16)), x) > 10 * stem_and_features


@pytest.mark.parametrize("extra", [nn.Dropout(0.4), DropPath(0.5)], ids=repr)
def test_random_numbers_are_drawn_again(extra: nn.Module) -> None:
    network = make(3, lambda _: copy.deepcopy(extra))
    found = gradients(network, x=images(8))
    after = torch.rand(3)
    assert_same(found, gradients(stored(network), x=images(8)))
    # backward has left the generator as it was
    assert torch.equal(torch.rand(3), after)


class Noise(nn.Module):
    """Noise from a generator of its own."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.rand(x.shape, generator=self.generator, dtype=x.dtype)
        return x * mask


class HiddenNoise(Noise):
    """Where nobody sees the generator that it draws from."""

    def __init__(self, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.draw = lambda: generator

    @property
    def generator(self) -> torch.Generator:
        return self.draw()


@pytest.mark.parametrize("kind", [Noise, HiddenNoise])
def test_other_generators(kind: type) -> None:
    generator = torch.Generator()
    given = [generator] if kind is HiddenNoise else []
    network = make(3, lambda _: kind(generator), generators=given)
    generator.manual_seed(21)
    found = gradients(network)
    state = generator.get_state()
    network.reversible = False
    generator.manual_seed(21)
    assert_same(found, gradients(network))
    assert torch.equal(generator.get_state(), state)


def test_random_states_take_little_memory() -> None:
    """A few draws a level leave most of the generator's state as it was."""
    from viops.ops.reversible_columns.replay import RandomStates

    generator = torch.Generator().manual_seed(1)
    states = RandomStates([generator])
    before = []
    for run in range(20):
        before.append(generator.get_state())
        torch.rand(4, generator=generator)
        states.ran(run)
    states.close()
    kept = [state for (state,) in states._kept.values()]
    changes = [state for state in kept if isinstance(state, tuple)]
    assert len(kept) - len(changes) == 2  # the first draw of all makes a new state
    assert sum(state.places.nbytes + state.values.nbytes for state in changes) < 1000
    for run in reversed(range(20)):
        states.restore(run)
        assert torch.equal(generator.get_state(), before[run])


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, backward_inside: bool) -> None:
    network = make(2).float()
    x = images().float()

    def run(form: ReversibleColumns) -> dict:
        leaf = x.clone().requires_grad_()
        form.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = loss_of(form(leaf))
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        return {"loss": loss.detach(), "x": leaf.grad} | {
            n: p.grad for n, p in form.named_parameters()
        }

    found, expected = run(network), run(stored(network))
    assert all(grad is not None and grad.dtype is torch.float32 for grad in found.values())
    for name, wanted in expected.items():
        error = (found[name] - wanted).norm() / wanted.norm().clamp(min=1e-6)
        assert error < 0.05, (name, error)
    # and it did cast: the plain run differs
    plain = gradients(network, x=x)["1.level0.down.weight"]
    assert not torch.equal(found["1.level0.down.weight"], plain)


def test_gradient_scaling_in_float16() -> None:
    network = make(2).float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    before = copy.deepcopy(network.state_dict())
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(network(images().float()))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    found = {name: p.grad.clone() for name, p in network.named_parameters()}
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10
    assert not torch.equal(network.state_dict()["1.alpha0"], before["1.alpha0"])
    network.load_state_dict(before)
    plain = gradients(network, x=images().float())
    for name, grad in found.items():
        assert (grad - plain[name]).norm() <= 0.02 * plain[name].norm() + 1e-6, name


def test_gradients_accumulate() -> None:
    network = make(2)
    once = gradients(network)["1.level1.down.weight"].clone()
    loss_of(network(images())).backward()
    twice = dict(network.named_parameters())["1.level1.down.weight"].grad
    torch.testing.assert_close(twice, 2 * once, **CLOSE)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_checkpoint(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    network = make(3, lambda _: nn.Dropout(0.3))

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(network(x))

    found = gradients(network, lambda x: loss_of(checkpoint(run, x, use_reentrant=use_reentrant)))
    assert_same(found, gradients(stored(network)))


def test_checkpoint_inside() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    network = make(3, lambda c: Checkpointed(nn.Conv2d(c, c, 1), nn.Dropout(0.3)))
    assert_same(gradients(network), gradients(stored(network)))


@pytest.mark.parametrize(
    "frozen",
    ["0.", "1.", "2.", "alpha", "level", "down.weight", ""],
)
@pytest.mark.parametrize("need_x", [False, True])
def test_frozen_parameters(frozen: str, need_x: bool) -> None:
    network = make(3)
    for name, parameter in network.named_parameters():
        if frozen in name and (len(frozen) != 2 or name.startswith(frozen)):
            parameter.requires_grad_(False)

    def run(form: ReversibleColumns) -> dict:
        x = images().requires_grad_(need_x)
        loss = loss_of(form(x))
        if loss.requires_grad:
            loss.backward()
        return {"x": x.grad} | {name: p.grad for name, p in form.named_parameters()}

    assert_same(run(network), run(stored(network)))


def test_frozen_columns_are_not_run_again() -> None:
    network = make(3)
    for column in network.columns[:2]:
        column.requires_grad_(False)
    calls = []
    for i, column in enumerate(network.columns):
        column.level0.register_forward_hook(lambda *_, i=i: calls.append(i))
    loss_of(network(images())).backward()
    assert calls == [0, 1, 2, 2]


def test_batch_norm_updates_its_statistics_once() -> None:
    network = make(3, nn.BatchNorm2d)
    other = stored(network)
    assert_same(gradients(network), gradients(other))
    buffers = dict(other.named_buffers())
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert network.get_buffer("1.level0.extra.num_batches_tracked") == 1


class Average(nn.Module):
    """Subtracts an average of former inputs, which it then moves: outputs depend on a buffer."""

    average: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = x - self.average
        if self.training:
            self.average = self.average.lerp(x.detach().mean((0, 2, 3))[:, None, None], 0.3)
        return y


@pytest.mark.parametrize(
    "extra",
    [Average, lambda c: nn.utils.parametrizations.spectral_norm(nn.Conv2d(c, c, 1))],
    ids=["replaced", "spectral_norm"],
)
def test_buffers_that_outputs_depend_on(extra: Callable) -> None:
    network = make(3, extra)
    other = stored(network)
    for _ in range(2):
        assert_same(gradients(network), gradients(other))
    buffers = dict(other.named_buffers())
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], **CLOSE)


def test_losses_of_inner_columns() -> None:
    network = make(4)

    def loss(form: ReversibleColumns) -> Callable[[Tensor], Tensor]:
        def of(x: Tensor) -> Tensor:
            columns = form(x, return_columns=[2, 0, 3])
            return loss_of([columns[0][2], columns[1][1], columns[1][0], columns[2][2]])

        return of

    other = stored(network)
    assert_same(gradients(network, loss(network)), gradients(other, loss(other)))


def test_a_loss_of_an_inner_column_alone() -> None:
    network = make(3)

    def loss(form: ReversibleColumns) -> Callable[[Tensor], Tensor]:
        return lambda x: form(x, return_columns=[1])[0][1].square().sum()

    other = stored(network)
    found = gradients(network, loss(network))
    assert found["2.level0.down.weight"] is None
    assert_same(found, gradients(other, loss(other)))


def test_a_loss_of_a_low_level_alone() -> None:
    network = make(3)
    other = stored(network)
    found = gradients(network, lambda x: network(x)[0].square().sum())
    assert_same(found, gradients(other, lambda x: other(x)[0].square().sum()))


def test_levels_that_are_shared() -> None:
    network = make(3)
    network.columns[2].level1 = network.columns[1].level1
    assert_same(gradients(network), gradients(stored(network)))


@torch._dynamo.config.patch(recompile_limit=64)  # all levels have the same code
def test_compiled_levels() -> None:
    network = make(2)
    expected = gradients(stored(network))
    for level in levels(network):
        level.compile(backend="aot_eager", fullgraph=True)
    assert_same(gradients(network), expected)


def test_a_compiled_network_gives_the_same() -> None:
    network = make(2)
    compiled = torch.compile(network, backend="aot_eager")
    expected = gradients(stored(network))
    assert_same(gradients(network, lambda x: loss_of(compiled(x))), expected)


def test_backward_twice_raises_as_ever() -> None:
    loss = loss_of(make()(images()))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_backward_twice_with_retain_graph() -> None:
    network = make(3, lambda c: nn.Sequential(nn.Dropout(0.3), Average(c)))
    once = {name: grad for name, grad in gradients(network).items() if name not in ("x", "loss")}
    once = {name: grad.clone() for name, grad in once.items()}
    network = make(3, lambda c: nn.Sequential(nn.Dropout(0.3), Average(c)))
    torch.manual_seed(11)
    loss = loss_of(network(images()))
    loss.backward(retain_graph=True)
    loss.backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], **CLOSE)


@pytest.mark.parametrize("loss", [loss_of, lambda features: sum(f.sum() for f in features)])
def test_a_second_derivative_raises(loss: Callable) -> None:
    """Also where the loss itself has none."""
    x = images().requires_grad_()
    (grad,) = torch.autograd.grad(loss(make()(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_forward_mode_is_that_of_the_stored_form() -> None:
    """Which the step refuses, as it has none, but not the formula."""
    network, x = make(2), images()
    name = "0.level0.down.weight"
    weight = network.get_parameter(name).detach()

    def tangents(form: nn.Module, tangent: Tensor) -> list[Tensor]:
        with forward_ad.dual_level():
            given = {name: forward_ad.make_dual(weight, tangent)}
            features = torch.func.functional_call(form, given, (x,))
            return [forward_ad.unpack_dual(feature).tangent for feature in features]

    direction = torch.randn_like(weight)
    with pytest.raises(NotImplementedError, match="jvp"):
        tangents(network, direction)
    with viops.use_backend("reference"):
        found = tangents(network, direction)
        ahead, behind = (
            torch.func.functional_call(stored(network), {name: weight + step * direction}, (x,))
            for step in (1e-6, -1e-6)
        )
    for tangent, after, before in zip(found, ahead, behind, strict=True):
        torch.testing.assert_close(tangent, (after - before) / 2e-6, rtol=1e-6, atol=1e-7)


def test_an_output_that_is_changed_in_place_raises() -> None:
    features = make()(images())
    loss = loss_of(features)
    features[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["0.level2.down.bias", "1.alpha1", "2.level0.up.weight"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_parameter_that_is_changed_raises(name: str, frozen: bool) -> None:
    network = make()
    parameter = network.get_parameter(name).requires_grad_(not frozen)
    loss = loss_of(network(images()))
    with torch.no_grad():
        parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-5, -1e-5, -0.7])
def test_small_alphas_count_as_a_thousandth_and_stay_as_they_are(value: float) -> None:
    network = make(2)
    with torch.no_grad():
        for parameter in (network.columns[1].alpha0, network.columns[1].alpha2):
            parameter.fill_(value)
    counted = value if abs(value) >= 1e-3 else (-1e-3 if value < 0 else 1e-3)
    other = stored(network)
    with torch.no_grad():
        other.columns[1].alpha0.fill_(counted)
        other.columns[1].alpha2.fill_(counted)
    version = network.columns[1].alpha0._version
    assert_same(gradients(network), gradients(other), rtol=1e-6, atol=1e-9)
    assert network.columns[1].alpha0._version == version
    assert (network.columns[1].alpha0 == value).all()


@pytest.mark.parametrize("num_columns", [4, 12])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_rebuilt_is_what_was(dtype, memory_format, num_columns) -> None:
    """To the bit: each level is called in backward with the inputs that it had."""
    network = make(num_columns).to(dtype, memory_format=memory_format)
    for alpha in alphas(network):
        nn.init.constant_(alpha, 0.5)
    x = images().to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    with rebuilt_to_the_bit(levels(network)):
        loss_of(network(x)).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_do_not_drift(dtype: torch.dtype) -> None:
    """They are as near to float64's as those of the stored form.

    In float32 they would be off by 1e-2, were features rebuilt from what is rounded.
    """
    network = make(16)
    for alpha in alphas(network):
        nn.init.constant_(alpha, 0.625)
    network = network.to(dtype).double()  # of weights that the dtype has
    truth = gradients(stored(network), x=images().to(dtype).double())
    network = network.to(dtype)
    errors = []
    for form in (network, stored(network)):
        found = gradients(form, x=images().to(dtype))
        difference = sum(
            (found[name] - grad).double().square().sum() for name, grad in truth.items()
        )
        errors.append((difference / sum(grad.square().sum() for grad in truth.values())).sqrt())
    assert errors[0] < 1.5 * errors[1]


def test_features_carry_nothing_where_that_is_not_wanted() -> None:
    x = images().float().requires_grad_()
    exact, plain = make(4).float(), make(4, exact=False).float()
    assert kept_bytes(exact, x) > 1.5 * kept_bytes(plain, x)
    for found, wanted in zip(plain(x), stored(plain)(x), strict=True):
        assert torch.equal(found, wanted)
    found, expected = gradients(plain, x=x), gradients(stored(plain), x=x)
    assert_same(found, expected, rtol=1e-3, atol=1e-4)
    assert repr(plain).startswith("ReversibleColumns(\n  reversible=True, exact=False\n")


def test_drift_check() -> None:
    network = make(4, drift_check=True, drift_bound=1e-12)
    gradients(network)  # within the bound
    network.drift_bound = 1e-30
    with pytest.raises(RuntimeError, match=r"0\.level2: rebuilt in backward, it lies \d"):
        gradients(network)
    with torch.no_grad():
        for column in network.columns:
            column.alpha1.fill_(1e-7)
    network.drift_bound = 1e-12
    with pytest.raises(RuntimeError, match="rebuilt in backward"):
        gradients(network)


def test_drift_is_noticed_where_nothing_needs_a_gradient() -> None:
    network = make(4, drift_check=True, drift_bound=1e-30)
    for column in network.columns[:3]:
        column.requires_grad_(False)
    with pytest.raises(RuntimeError, match="rebuilt in backward"):
        loss_of(network(images())).backward()


@pytest.mark.parametrize("holds", ["attribute", "buffer"])
@pytest.mark.parametrize("place", [0, 1])
def test_such_tensors_raise_where_nothing_else_needs_a_gradient(holds: str, place: int) -> None:
    """The place is before or after the first level that learns."""

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            scale = torch.full((1, 4, 1, 1), 2.0, dtype=torch.float64, requires_grad=True)
            if holds == "buffer":
                self.register_buffer("scale", scale)
            else:
                self.held = [scale]

        def forward(self, below: Tensor, above: Tensor | None) -> Tensor:
            return below * (self.scale if holds == "buffer" else self.held[0])

    class Learns(nn.Conv2d):
        def forward(self, below: Tensor, above: Tensor | None) -> Tensor:
            return super().forward(below)

    levels = [Learns(4, 4, 1) for _ in range(4)]
    levels[place] = Holds()
    columns = [ReversibleColumn(levels[:2], [4, 4]), ReversibleColumn(levels[2:], [4, 4])]
    network = ReversibleColumns(columns).double()
    columns[0].alpha0.requires_grad_(False)
    with pytest.raises(RuntimeError, match="requires a gradient and is no parameter"):
        loss_of(network(images())).backward()
    network.reversible = False
    loss_of(network(images())).backward()


def test_tensors_that_are_no_parameters_raise() -> None:
    class Captures(nn.Module):
        def __init__(self, outer: Tensor) -> None:
            super().__init__()
            self.outer = (outer,)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.outer[0]

    leaf = torch.ones((), dtype=torch.float64, requires_grad=True)
    for outer in (leaf, leaf * 2):
        network = make(2, lambda _, outer=outer: Captures(outer))
        with pytest.raises(RuntimeError, match="requires a gradient and is no parameter"):
            loss_of(network(images())).backward()
    network.reversible = False
    loss_of(network(images())).backward()
    assert leaf.grad is not None


def test_levels_that_see_further_ones() -> None:
    class SeesAll(Level):
        def forward(
            self, below: Tensor, above: Tensor | None, last: Tensor | None = None
        ) -> Tensor:
            out = super().forward(below, above)
            return out if last is None else out * last.mean((1, 2, 3), keepdim=True).cos()

    torch.manual_seed(3)
    columns = [
        ReversibleColumn(
            [SeesAll(j, i == 0, nn.Identity()) for j in range(3)], CHANNELS, 0.8, {0: [2]}
        )
        for i in range(3)
    ]
    network = ReversibleColumns(columns).double()
    assert_same(gradients(network), gradients(stored(network)))
    seen = network(images())[0]
    for column in columns:
        column.also_above = {}
    assert not torch.allclose(network(images())[0], seen)


def test_identity_levels() -> None:
    """A level may give what it was given."""

    class Below(nn.Module):
        def forward(self, below: Tensor, above: Tensor | None) -> Tensor:
            return below

    columns = [ReversibleColumn([Below(), Below()], [4, 4]) for _ in range(3)]
    network = ReversibleColumns(columns).double()
    assert_same(gradients(network), gradients(stored(network)))


def test_copies_and_keys() -> None:
    network = make(2)
    keys = list(network.state_dict())
    assert keys[:5] == [
        "0.alpha0",
        "0.alpha1",
        "0.alpha2",
        "0.level0.down.weight",
        "0.level0.down.bias",
    ]
    expected = gradients(network)
    assert_same(gradients(copy.deepcopy(network)), expected, rtol=0, atol=0)
    assert_same(gradients(pickle.loads(pickle.dumps(stored(network)))), expected)
    assert repr(network).startswith("ReversibleColumns(\n  reversible=True\n")


def test_inference_and_export() -> None:
    network = make(2).eval()
    expected = network(images())
    with torch.inference_mode():
        for found, wanted in zip(network(images()), expected, strict=True):
            torch.testing.assert_close(found, wanted.detach(), **CLOSE)
    exported = torch.export.export(network, (images(),)).module()
    for found, wanted in zip(exported(images()), expected, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)
    grads = torch.func.grad(lambda x: loss_of(network(x)))(images())
    torch.testing.assert_close(grads, gradients(network)["x"], **CLOSE)


def test_empty_batches() -> None:
    network = make(2)
    found = gradients(network, x=images(0))
    assert found["x"].shape == (0, CHANNELS[0], 9, 7)
    assert not any(grad.any() for grad in found.values())


def branch(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.Tanh(), nn.Dropout(0.2))


def two_streams(reversible: bool = True, **options: object) -> ReversibleBlocks:
    torch.manual_seed(9)
    pairs = [(branch(2), branch(2)) for _ in range(4)]
    return viops.patch.reversible(pairs, reversible=reversible, **options).double()


def test_two_streams() -> None:
    network = two_streams()

    def loss(form: ReversibleBlocks) -> Callable[[Tensor], Tensor]:
        return lambda x: loss_of(list(form(*x.chunk(2, dim=1))))

    other = two_streams(reversible=False)
    found, expected = gradients(network, loss(network)), gradients(other, loss(other))
    assert_same(found, expected)
    x = images().requires_grad_()
    x1, x2 = x.chunk(2, dim=1)
    network.eval()
    y1, y2 = x1, x2
    for first, second in network.blocks:
        y1 = y1 + first(y2)
        y2 = y2 + second(y1)
    for found_y, wanted in zip(network(x1, x2), (y1, y2), strict=True):
        torch.testing.assert_close(found_y, wanted, **CLOSE)


def test_two_streams_of_one_branch() -> None:
    """The same module as both branches of a pair runs twice."""
    torch.manual_seed(9)
    shared = nn.Conv2d(2, 2, 3, padding=1)
    network = viops.patch.reversible([(shared, shared)]).double()

    def loss(x: Tensor) -> Tensor:
        return loss_of(list(network(*x.chunk(2, dim=1))))

    def written_out(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        y1 = x1 + shared(x2)
        return loss_of([y1, x2 + shared(y1)])

    assert_same(gradients(network, loss), gradients(network, written_out))


def test_two_streams_drift() -> None:
    x1, x2 = (half.requires_grad_() for half in images().chunk(2, dim=1))
    loss_of(list(two_streams(drift_check=True)(x1, x2))).backward()
    with pytest.raises(RuntimeError, match=r"what slot . began with: rebuilt"):
        loss_of(list(two_streams(drift_check=True, drift_bound=1e-30)(x1, x2))).backward()


class Below(nn.Module):
    def forward(self, below: Tensor, above: Tensor | None) -> Tensor:
        return below


class Wide(nn.Module):
    def forward(self, below: Tensor, above: Tensor | None) -> Tensor:
        return below.repeat(1, 2, 1, 1)


class NoTensor(nn.Module):
    def forward(self, below: Tensor, above: Tensor | None) -> list:
        return [below]


def test_bad_arguments() -> None:
    column = ReversibleColumn([Below()], [4])
    with pytest.raises(ValueError, match="levels: expected at least one module"):
        ReversibleColumn([], [])
    with pytest.raises(TypeError, match="levels: expected modules, got int"):
        ReversibleColumn([3], [4])
    with pytest.raises(ValueError, match="channels: expected one number for each of 1 levels"):
        ReversibleColumn([Below()], [4, 4])
    with pytest.raises(ValueError, match=r"channels\[0\]: expected at least 1, got 0"):
        ReversibleColumn([Below()], [0])
    with pytest.raises(TypeError, match="init_scale: expected a number, got str"):
        ReversibleColumn([Below()], [4], "0.5")
    with pytest.raises(ValueError, match="init_scale: expected a finite number, got nan"):
        ReversibleColumn([Below()], [4], float("nan"))
    with pytest.raises(ValueError, match=r"init_scale: expected at most 3\.4e\+38 .*, got 1e\+39"):
        ReversibleColumn([Below()], [4], 1e39)
    with pytest.raises(TypeError, match="levels: expected modules, got Below"):
        ReversibleColumn(Below(), [4])
    with pytest.raises(TypeError, match="channels: expected a number for each level, got int"):
        ReversibleColumn([Below()], 4)
    with pytest.raises(TypeError, match=r"also_above: expected a mapping .*, got list"):
        ReversibleColumn([Below(), Below()], [4, 4], also_above=[1])
    with pytest.raises(TypeError, match=r"also_above\[0\]: expected levels, got int"):
        ReversibleColumn([Below(), Below()], [4, 4], also_above={0: 1})
    with pytest.raises(ValueError, match=r"also_above\[1\]: expected none above the last"):
        ReversibleColumn([Below(), Below()], [4, 4], also_above={1: [2]})
    with pytest.raises(TypeError, match=r"below: expected a torch\.Tensor, got list"):
        column([images()])
    with pytest.raises(TypeError, match="previous: expected features, got Tensor"):
        column(images(), images())
    with pytest.raises(TypeError, match=r"columns: expected viops\.nn\.ReversibleColumns, got int"):
        ReversibleColumns(3)
    with pytest.raises(TypeError, match=r"generators: expected torch\.Generators, got Generator"):
        ReversibleColumns([column], generators=torch.Generator())
    with pytest.raises(ValueError, match=r"also_above\[0\]: expected at least 1 .* got 0"):
        ReversibleColumn([Below(), Below()], [4, 4], also_above={0: [0]})
    with pytest.raises(ValueError, match="previous: expected 1 features or None, got 2"):
        column(images(), [images(), images()])
    with pytest.raises(TypeError, match=r"columns: expected viops.nn.ReversibleColumns, got Below"):
        ReversibleColumns([Below()])
    with pytest.raises(ValueError, match=r"columns: expected at least one, .* got \[\] levels"):
        ReversibleColumns([])
    two = ReversibleColumn([Below(), Below()], [4, 4])
    with pytest.raises(ValueError, match=r"columns: .* got \[1, 2\] levels"):
        ReversibleColumns([column, two])
    with pytest.raises(TypeError, match="reversible: expected a bool, got int"):
        ReversibleColumns([column], 1)
    with pytest.raises(TypeError, match="drift_check: expected a bool, got str"):
        ReversibleColumns([column], drift_check="yes")
    with pytest.raises(TypeError, match="exact: expected a bool, got int"):
        ReversibleColumns([column], exact=0)
    with pytest.raises(ValueError, match="drift_bound: expected more than 0, got nan"):
        ReversibleColumns([column], drift_bound=float("nan"))
    with pytest.raises(TypeError, match=r"generators: expected torch\.Generators, got int"):
        ReversibleColumns([column], generators=[3])
    network = ReversibleColumns([column, copy.deepcopy(column)])
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor, got list"):
        network([images()])
    with pytest.raises(ValueError, match=r"return_columns: .* got 2"):
        network(images(), return_columns=[2])
    with pytest.raises(TypeError, match=r"return_columns: expected an int, got str"):
        network(images(), return_columns=["0"])
    with pytest.raises(TypeError, match=r"return_columns: expected places of columns, got int"):
        network(images(), return_columns=1)
    narrow = ReversibleColumns([ReversibleColumn([Below()], [3]) for _ in range(2)])
    for reversible in (True, False):
        narrow.reversible = reversible
        with pytest.raises(ValueError, match=r"0\.level0: .*, C = 3 .* \[2, 4, 9, 7\]"):
            narrow(images().requires_grad_())
    for wrong, error, match in (
        (Wide(), ValueError, r"1\.level0: expected it to return a tensor of shape \[2, 4, 9, 7\]"),
        (
            NoTensor(),
            TypeError,
            r"1\.level0: expected it to return a floating-point tensor, got list",
        ),
    ):
        network.columns[1].level0 = wrong
        for reversible in (True, False):
            network.reversible = reversible
            with pytest.raises(error, match=match):
                network(images().requires_grad_())


def test_bad_blocks() -> None:
    with pytest.raises(ValueError, match="blocks: expected at least one pair"):
        ReversibleBlocks([])
    with pytest.raises(ValueError, match="blocks: expected pairs of modules, got one of 1"):
        ReversibleBlocks([(branch(2),)])
    with pytest.raises(TypeError, match="blocks: expected pairs of modules, got one with int"):
        ReversibleBlocks([(branch(2), 3)])
    with pytest.raises(TypeError, match="blocks: expected pairs of modules, got Below"):
        ReversibleBlocks([Below()])
    with pytest.raises(TypeError, match="blocks: expected pairs of modules, got int"):
        ReversibleBlocks(3)
    with pytest.raises(TypeError, match="blocks: expected pairs of modules, got int"):
        ReversibleBlocks([3])
    with pytest.raises(TypeError, match=r"x2: expected a torch\.Tensor, got NoneType"):
        two_streams()(images(), None)
