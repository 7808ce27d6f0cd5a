"""INT16 convolutions: exact sums, whatever the chains, and what the contract does not cover."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import viops
from torch import Tensor
from viops import native
from viops.ops.integer_conv import kernels, reference

LEVELS = [] if native.extension is None else list(native.extension.cpu_levels())


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    previous = native.require().cpu_level()
    native.set_cpu_level(request.param)
    yield request.param
    native.set_cpu_level(previous)


def integers(bits: int, *shape: int, seed: int = 0) -> viops.DfpTensor:
    generator = torch.Generator().manual_seed(seed)
    limit = 2**bits - 1
    data = torch.randint(-limit, limit + 1, shape, generator=generator, dtype=torch.int16)
    return viops.DfpTensor(data, torch.tensor(2.0**-bits), bits)


def filled(bits: int, value: float, *shape: int) -> viops.DfpTensor:
    """`value` times the largest magnitude everywhere."""
    data = torch.full(shape, int(value * (2**bits - 1)), dtype=torch.int16)
    return viops.DfpTensor(data, torch.tensor(1.0), bits)


def exact(x: Tensor, w: Tensor, **window: int) -> Tensor:
    """int64 sums, in int64 throughout."""
    kernel = w.shape[2:]
    columns = F.unfold(x.double(), kernel, **window).long()  # [B, C I J, L]
    return torch.einsum("ok,bkl->bol", w.flatten(1).long(), columns)


@pytest.mark.parametrize("bits", range(1, 16))
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_are_exact(level: str, bits: int, sign: int) -> None:
    """All operands as large as they can be, of equal and opposite sign, in all three products."""
    x, w = filled(bits, sign, 1, 150, 3, 4), filled(bits, 1, 33, 150, 3, 3)
    carried = [viops.DfpTensor(*t, bits, torch.zeros(t.shape).requires_grad_()) for t in (x, w)]
    y = viops.integer_conv2d(*carried, None, 1, 1, bits=bits)
    expected = exact(x.data, w.data, padding=1).view(1, 33, 3, 4)
    assert torch.equal(y, expected.float())
    grad = torch.full_like(y, 3.0)  # all of them as large as can be, once more
    found = torch.autograd.grad(y, [t.carrier for t in carried], grad)
    scale = viops.quantize_dfp(grad, bits)
    wanted = reference.integer_conv2d_backward(
        grad, *x, *w, (1, 1), (1, 1), (1, 1), 1, bits, bits, bits, True, 0, None, True, True
    )
    assert scale.data.min() == scale.data.max()
    for value, other in zip(found, wanted, strict=True):
        assert torch.equal(value, other)


def alternating(bits: int, *shape: int) -> viops.DfpTensor:
    """The largest magnitudes, half of each sign: partial sums are large, and cancel."""
    limit = 2**bits - 1
    data = torch.full(shape, limit, dtype=torch.int16)
    data[:, shape[1] // 2 :] *= -1
    return viops.DfpTensor(data, torch.tensor(1.0), bits)


@pytest.mark.parametrize("bits", [13, 14, 15])
def test_sums_that_cancel_are_exact(level: str, bits: int) -> None:
    x, w = filled(bits, 1, 2, 1001, 1, 3), alternating(bits, 17, 1001, 1, 1)
    y = viops.integer_conv2d(x, w)
    assert torch.equal(y, exact(x.data, w.data).view(2, 17, 1, 3).float())


def test_sums_beyond_two_to_the_40_are_rounded_once(level: str) -> None:
    x, w = integers(15, 1, 3001, 2, 2), filled(15, 1, 5, 3001, 1, 1)
    x.data.abs_()
    y = viops.integer_conv2d(x, w)
    sums = exact(x.data, w.data)
    assert int(sums.min()) > 2**40
    assert torch.equal(y, (sums.view(1, 5, 2, 2).float() * x.scale))


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 64, 200])
@pytest.mark.parametrize("filters", [1, 15, 16, 17, 33, 64, 65, 130])
def test_any_number_of_channels(level: str, channels: int, filters: int) -> None:
    x, w = integers(13, 2, channels, 3, 5), integers(13, filters, channels, 3, 3, seed=1)
    y = viops.integer_conv2d(x, w, None, 1, 1)
    sums = exact(x.data, w.data, padding=1).view(2, filters, 3, 5)
    assert torch.equal(y, sums.float() * 2.0**-26)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("channels", "filters"), [(1011, 21), (510, 1029)])
def test_large_pointwise_images(level: str, channels: int, filters: int, groups: int) -> None:
    """Those that are fetched a few pixels at a time, forward and to the input."""
    x, w = (
        integers(13, 2, channels, 37, 31),
        integers(13, filters, channels // groups, 1, 1, seed=1),
    )
    window = (1, 1), (0, 0), (1, 1), groups
    y = viops.integer_conv2d(x, w, None, *window)
    expected = reference.integer_conv2d_forward(*x, None, *w, None, None, *window)
    assert torch.equal(y, expected)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    options = *window, 13, 13, 13, True, 0, None, True, False
    found, _ = kernels.native_conv2d_backward(grad, *x, *w, *options)
    wanted, _ = reference.integer_conv2d_backward(grad, *x, *w, *options)
    assert torch.equal(found, wanted)


def test_one_filter_alone_needs_short_chains(level: str) -> None:
    """Chains are as long as the filter allows: one of large weights among small ones."""
    w = integers(7, 70, 300, 1, 1)
    w.data[65] = 2**13 - 1
    w = viops.DfpTensor(w.data, w.scale, 13)
    x = filled(13, 1, 1, 300, 2, 2)
    y = viops.integer_conv2d(x, w)
    assert torch.equal(y, exact(x.data, w.data).view(1, 70, 2, 2).float() * w.scale)


def geometries() -> list[tuple]:
    """x, w, stride, padding, dilation, groups."""
    return [
        ((2, 6, 7, 9), (5, 6, 3, 3), (1, 1), (1, 1), (1, 1), 1),
        ((2, 6, 8, 9), (5, 6, 3, 3), (2, 2), (1, 1), (1, 1), 1),
        ((1, 4, 9, 11), (6, 2, 3, 2), (3, 2), (0, 2), (1, 3), 2),
        ((1, 4, 9, 11), (6, 4, 2, 3), (2, 3), (1, 0), (2, 2), 1),
        ((1, 3, 9, 9), (4, 3, 1, 1), (3, 3), (0, 0), (1, 1), 1),
        ((1, 3, 9, 9), (4, 3, 3, 3), (4, 4), (3, 3), (1, 1), 1),
        ((2, 8, 6, 5), (8, 1, 3, 3), (2, 1), (1, 1), (1, 2), 8),
        ((3, 70, 5, 6), (67, 70, 3, 3), (1, 1), (1, 1), (1, 1), 1),
        ((2, 5, 1, 1), (7, 5, 1, 1), (1, 1), (0, 0), (1, 1), 1),
        ((1, 2, 2, 40), (3, 2, 1, 7), (1, 5), (0, 3), (1, 1), 1),
    ]


@pytest.mark.parametrize("bits", [13, 15])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("geometry", geometries(), ids=str)
def test_bits_are_the_references(level: str, geometry: tuple, num_threads: int, bits: int) -> None:
    """All three products, at each level and thread count, bit for bit."""
    x_shape, w_shape, *window = geometry
    x, w = integers(bits, *x_shape), integers(bits, *w_shape, seed=1)
    bias = torch.randn(w_shape[0], generator=torch.Generator().manual_seed(2))
    expected = reference.integer_conv2d_forward(
        *x, None, *w, None, bias, *window, bits, bits, bits, True, 0, None
    )
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    options = *window, bits, bits, bits, True, 0, None, True, True
    previous = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        y = kernels.native_conv2d(
            *x, None, *w, None, bias, *window, bits, bits, bits, True, 0, None
        )
        grads = kernels.native_conv2d_backward(grad, *x, *w, *options)
    finally:
        torch.set_num_threads(previous)
    assert torch.equal(y, expected)
    wanted = reference.integer_conv2d_backward(grad, *x, *w, *options)
    for found, other in zip(grads, wanted, strict=True):
        assert torch.equal(found, other)


def test_gradients_over_many_pixels_are_exact(level: str) -> None:
    """More pixels than are summed before totals are 64 bits wide."""
    x, grad = integers(13, 2, 9, 40, 41), torch.ones(2, 5, 40, 41)
    w = integers(13, 5, 9, 3, 3, seed=1)
    options = (1, 1), (1, 1), (1, 1), 1, 13, 13, 13, True, 0, None, False, True
    _, found = kernels.native_conv2d_backward(grad, *x, *w, *options)
    _, wanted = reference.integer_conv2d_backward(grad, *x, *w, *options)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("bits", [13, 15])
def test_gradients_over_wide_images_are_exact(bits: int) -> None:
    """More pixels in a row than two words hold the sums of, at 15 bits."""
    width = 140_001
    x, w = filled(bits, 1, 1, 2, 2, width), filled(bits, 1, 3, 2, 1, 3)
    grad = torch.ones(1, 3, 2, width)
    options = (1, 1), (0, 1), (1, 1), 1, bits, bits, bits, True, 0, None, False, True
    _, found = kernels.native_conv2d_backward(grad, *x, *w, *options)
    _, wanted = reference.integer_conv2d_backward(grad, *x, *w, *options)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("stride", [3, 5, 1000, 2**20])
def test_strides_beyond_the_image(level: str, stride: int) -> None:
    x, w = integers(13, 2, 3, 4, 5), integers(13, 6, 3, 2, 3, seed=1)
    options = (stride, stride), (1, 1), (2, 1), 1, 13, 13, 13, True, 0, None, True, True
    sizes = [(s + 2 - e) // stride + 1 for s, e in ((4, 3), (5, 3))]
    grad = torch.randn(2, 6, *sizes, generator=torch.Generator().manual_seed(0))
    found = kernels.native_conv2d_backward(grad, *x, *w, *options)
    wanted = reference.integer_conv2d_backward(grad, *x, *w, *options)
    for value, other in zip(found, wanted, strict=True):
        assert torch.equal(value, other)


def test_padding_takes_no_memory_for_gradients() -> None:
    """As rows: 500 of them around 16 would take as many times the memory of the image."""
    x, w = integers(13, 1, 8, 16, 16), integers(13, 8, 8, 3, 3, seed=1)
    options = (1, 1), (256, 256), (256, 256), 1, 13, 13, 13, True, 0, None, False, True
    grad = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    _, found = kernels.native_conv2d_backward(grad, *x, *w, *options)
    _, wanted = reference.integer_conv2d_backward(grad, *x, *w, *options)
    assert torch.equal(found, wanted)


def test_signs_of_zero_are_the_same() -> None:
    x = torch.tensor([0.0, 1.0, 0.0, 2.0]).view(1, 1, 1, 4)
    w, gain = torch.tensor([-1.0, -2.0]).view(2, 1, 1, 1), torch.tensor([-1.0, 1.0])
    results = []
    for name in ("cpu", "reference"):
        with viops.use_backend(name), torch.no_grad():
            assert not viops.integer_conv2d(x, w)[0, :, 0, 0].signbit().any()
            results.append(viops.integer_conv2d(x, w, gain=gain, activation="relu").signbit())
    assert torch.equal(*results)


def test_a_second_derivative_raises_for_a_constant_gradient_too() -> None:
    x, w = (torch.randn(s).requires_grad_() for s in ((1, 3, 5, 5), (4, 3, 3, 3)))
    y = viops.integer_conv2d(x, w)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"second derivative"):
        torch.autograd.grad(grad.square().sum() + w.square().sum(), w)

    y = viops.integer_conv2d(x * 2, w)  # an activation, of which nothing is kept
    (grad,) = torch.autograd.grad(y.sum(), w, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"second derivative"):
        torch.autograd.grad(grad.square().sum(), x)

    def first(value: Tensor) -> Tensor:
        return torch.func.grad(lambda x: viops.integer_conv2d(x, value).sum())(x).square().sum()

    with pytest.raises((NotImplementedError, RuntimeError), match=r"derivative"):
        torch.func.grad(first)(w)


def test_activations_are_not_kept() -> None:
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    activation = x * 2
    y = viops.integer_conv2d(activation, torch.randn(4, 3, 3, 3))
    alive = weakref.ref(activation)
    del activation
    gc.collect()
    assert alive() is None
    y.sum().backward()
    assert x.grad is not None


def test_sums_of_gradients_are_refused_before_the_backward() -> None:
    x, w = torch.randn(2, 4), torch.randn(70_000, 4)
    assert viops.integer_linear(x, w, bits=15).shape == (2, 70_000)
    for name in ("cpu", "reference"):
        with viops.use_backend(name):
            with pytest.raises(ValueError, match=r"^w: sums .* for the gradient to x"):
                viops.integer_linear(x.clone().requires_grad_(), w, bits=15)


def test_threads_share_filters() -> None:
    """Packing lets other threads run: each finds whole filters or packs its own."""
    x = integers(13, 1, 256, 4, 4)
    for seed in range(10):
        w = integers(13, 256, 256, 3, 3, seed=seed)
        start, results, errors = threading.Barrier(4), [], []

        def use(w=w, start=start, results=results, errors=errors) -> None:  # type: ignore[no-untyped-def]
            try:
                start.wait()
                results.append(viops.integer_conv2d(x, w))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert all(torch.equal(result, results[0]) for result in results)


def test_a_failed_packing_leaves_nothing() -> None:
    x = integers(3, 1, 1, 1, 2**20 + 8)
    w = integers(3, 1, 1, 1, 2**20 + 1, seed=1)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^w: expected filters of at most 2\^20 places"):
            viops.integer_conv2d(x, w)


def test_relative_error_against_exact_sums() -> None:
    """That of one rounding to float32, at any width."""
    for bits in (7, 13, 14, 15):
        x, w = integers(bits, 1, 512, 5, 5), integers(bits, 64, 512, 3, 3, seed=1)
        sums = exact(x.data, w.data, padding=1).view(1, 64, 5, 5).double()
        y = viops.integer_conv2d(x, w, None, 1, 1).double() * 4.0**bits
        assert (y - sums).norm() / sums.norm() < 5e-8


@pytest.mark.parametrize("first", [2.0**-126, 1e-30, 1.0, 3e38])
@pytest.mark.parametrize("second", [2.0**-126, 1e-10, 0.3, 3e38])
def test_scales_of_any_size(level: str, first: float, second: float) -> None:
    x, w = integers(13, 1, 4, 3, 3), integers(13, 5, 4, 1, 1, seed=1)
    x.scale, w.scale = torch.tensor(first), torch.tensor(second)
    y = viops.integer_conv2d(x, w)
    sums = exact(x.data, w.data).view(1, 5, 3, 3)
    assert torch.equal(y, reference.scaled(sums.double(), x.scale, w.scale))
    truth = sums.double() * (x.scale.double() * w.scale.double())
    within = truth.abs().clamp(2.0**-126, 3e38) == truth.abs()
    torch.testing.assert_close(y[within].double(), truth[within], rtol=2e-7, atol=0)


def test_sums_that_could_pass_the_words_are_refused() -> None:
    x = viops.DfpTensor(torch.ones(1, 65600, 1, 1, dtype=torch.int16), torch.tensor(1.0), 15)
    w = viops.DfpTensor(torch.ones(1, 65600, 1, 1, dtype=torch.int16), torch.tensor(1.0), 15)
    with pytest.raises(ValueError, match=r"^w: sums of 65600 products of 15 and 15 bits"):
        viops.integer_conv2d(x, w)
    with viops.use_backend("reference"), pytest.raises(ValueError, match=r"^w: sums of"):
        viops.integer_conv2d(x, w)
    x, w = (viops.DfpTensor(*t, 13) for t in (x, w))
    assert viops.integer_conv2d(x, w).item() == 65600


def test_stochastic_gradients_are_seeded() -> None:
    x, w = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)

    def grads(seed: int) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        generator = torch.Generator().manual_seed(seed)
        y = viops.integer_conv2d(*leaves, bits=5, rounding="stochastic", generator=generator)
        return torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).view_as(y))

    for same, other, first in zip(grads(0), grads(1), grads(0), strict=True):
        assert torch.equal(same, first)
        assert not torch.equal(other, first)


@pytest.mark.parametrize("emit", [False, True])
@pytest.mark.parametrize("names", [(), ("gain",), ("residual",), ("gain", "residual", "relu")])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("channels", [5, 24])
def test_what_follows_gives_the_same_bits_fused_or_not(
    level: str, channels: int, kernel: int, names: tuple[str, ...], emit: bool
) -> None:
    x = torch.randn(3, channels, 5, 7).contiguous(memory_format=torch.channels_last)
    w, bias = torch.randn(37, channels, kernel, kernel), torch.randn(37)
    given = {"gain": torch.randn(37), "residual": torch.randn(3, 37, 5, 7)}
    options = {name: value for name, value in given.items() if name in names}
    if "relu" in names:
        options["activation"] = "relu"

    def parts(result: Tensor | viops.DfpTensor) -> list[Tensor]:
        return [*result, result.carrier] if emit else [result]

    window = 1, kernel // 2
    with torch.no_grad():  # from floats, from integers
        results = [
            viops.integer_conv2d(value, w, bias, *window, **options, emit=emit)
            for value in (x, viops.quantize_dfp(x))
        ]
    leaf = x.clone().requires_grad_()
    results.append(viops.integer_conv2d(leaf, w, bias, *window, **options, emit=emit))
    with viops.use_backend("reference"):
        results.append(viops.integer_conv2d(x, w, bias, *window, **options, emit=emit))
    y = viops.integer_conv2d(x, w, None, *window)
    y = y * options["gain"][:, None, None] if "gain" in options else y
    y = y + bias[:, None, None]
    y = y + options["residual"] if "residual" in options else y
    y = y.relu() if "relu" in names else y
    expected = [*viops.quantize_dfp(y), y] if emit else [y]
    for result in results:
        for found, wanted in zip(parts(result), expected, strict=True):
            assert torch.equal(found, wanted)


def test_gradients_of_what_follows() -> None:
    def leaves() -> list[Tensor]:
        draw = torch.Generator().manual_seed(0)
        shapes = (2, 5, 6, 6), (7, 5, 3, 3), (7,), (7,), (2, 7, 6, 6)
        return [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]

    x, w, bias, gain, residual = own = leaves()
    t = viops.integer_conv2d(
        x, w, bias, 1, 1, gain=gain, residual=residual, activation="relu", emit=True
    )
    grad = torch.randn(2, 7, 6, 6, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(t.carrier, own, grad)
    x, w, bias, gain, residual = own = leaves()
    y = viops.integer_conv2d(x, w, None, 1, 1) * gain[:, None, None] + bias[:, None, None]
    y = (y + residual).relu()
    for value, wanted in zip(found, torch.autograd.grad(y, own, grad), strict=True):
        assert torch.equal(value, wanted)


def test_an_infinite_result_cannot_be_emitted() -> None:
    x, w = torch.randn(1, 4, 3, 3), torch.randn(5, 4, 1, 1)
    bias = torch.tensor([1.0, torch.inf, 1.0, 1.0, 1.0])
    for value in (torch.inf, torch.nan):
        bias[1] = value
        with pytest.raises(ValueError, match=r"^y: expected finite values"):
            viops.integer_conv2d(x, w, bias, emit=True)
    assert viops.integer_conv2d(x, w, bias, activation="relu")[:, 1].isnan().all()


BAD_FINISH = [
    ("gain", ValueError, {"gain": torch.ones(3)}),
    ("gain", TypeError, {"gain": 2.0}),
    ("residual", ValueError, {"residual": torch.ones(1, 4, 3, 3)}),
    ("residual", ValueError, {"residual": torch.ones(1, 5, 3, 3, dtype=torch.float64)}),
    ("activation", ValueError, {"activation": "gelu"}),
    ("emit", TypeError, {"emit": 1}),
]


@pytest.mark.parametrize(("argument", "error", "options"), BAD_FINISH)
def test_bad_arguments_of_what_follows(argument: str, error: type, options: dict) -> None:
    x, w = torch.randn(1, 4, 3, 3), torch.randn(5, 4, 1, 1)
    with pytest.raises(error, match=rf"^{argument}: \S"):
        viops.integer_conv2d(x, w, **options)


def test_layers_of_a_depthwise_network_are_exact(level: str) -> None:
    for kernel, bits in itertools.product((3, 7), (13, 15)):
        x, w = filled(bits, 1, 1, 19, 8, 8), filled(bits, -1, 19, 1, kernel, kernel)
        y = viops.integer_conv2d(x, w, None, 1, kernel // 2, 1, 19)
        expected = F.conv2d(x.data.double(), w.data.double(), None, 1, kernel // 2, 1, 19)
        assert torch.equal(y, expected.float())


def test_packed_filters_are_kept_with_their_integers() -> None:
    x, w = integers(13, 1, 4, 5, 5), integers(13, 8, 4, 3, 3, seed=1)
    viops.integer_conv2d(x, w)
    (packed,) = kernels._packed[w.data].values()
    viops.integer_conv2d(x, w)
    assert list(kernels._packed[w.data].values()) == [packed]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(w)))
    assert torch.equal(viops.integer_conv2d(x, copied), viops.integer_conv2d(x, w))
    previous = viops.integer_conv2d(x, w)
    w.data.neg_()  # the version counter tells
    assert torch.equal(viops.integer_conv2d(x, w), -previous)
    alive = weakref.ref(w.data)
    del w
    gc.collect()
    assert alive() is None


def test_packed_filters_follow_the_level() -> None:
    x, w = integers(13, 1, 4, 5, 5), integers(13, 8, 4, 3, 3, seed=1)
    results = []
    previous = native.require().cpu_level()
    for name in LEVELS:
        native.set_cpu_level(name)
        results.append(viops.integer_conv2d(x, w))
    native.set_cpu_level(previous)
    assert all(torch.equal(result, results[0]) for result in results)
