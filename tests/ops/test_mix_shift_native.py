"""Mix-shift's extension functions on the CPU, called without Python's checks before them.

At each CPU level and on several threads, where tiles, blocks of channels and stripes end.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import contract
import pytest
import torch
import torch.nn.functional as F
from contract import DTYPES, case_id
from tolerances import assert_matches
from torch import Tensor
from viops import native
from viops.cases import Draw, amid_nan, axes_swapped, every_second
from viops.ops.mix_shift import reference

LEVELS = native.extension.cpu_levels() if native.extension else ["no extension"]
THREADS = (1, 2, 3)
EPS = 0.1  # so that the norm of two channels is no mere sign
MARGIN = 67
OUTPUTS = "y u grad_u grad_norm_weight grad_norm_bias grad_x grad_lr grad_td grad_bias".split()
#: Those that are not the same for every number of threads.
SUMS = {"grad_norm_weight", "grad_norm_bias", "grad_lr", "grad_td", "grad_bias"}


@pytest.fixture(autouse=True)
def keep_level() -> Iterator[None]:
    level = native.require().cpu_level()
    yield
    native.set_cpu_level(level)


def to_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def to_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def cropped(x: Tensor) -> Tensor:
    """Amid NaN in each row, whose elements stay side by side."""
    return F.pad(x, (3, 2, 1, 0), value=torch.nan)[:, :, 1:, 3 : 3 + x.shape[3]]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "planes": amid_nan,
    "channels_last": lambda x: to_first(amid_nan(to_last(x))),
    "strided": every_second,
    "strided channels_last": lambda x: to_first(every_second(to_last(x))),
    "cropped": cropped,
    "axes swapped": lambda x: axes_swapped(x, 2, 3),
    "aligned planes": lambda x: x.contiguous(),
    "aligned channels_last": lambda x: x.to(memory_format=torch.channels_last),
}
EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
MAIN_LAYOUTS = pytest.mark.parametrize("layout", ["planes", "channels_last", "strided"])
BOTH_LAYOUTS = pytest.mark.parametrize("layout", ["planes", "channels_last"])


class Inputs(NamedTuple):
    """Of all four functions."""

    x: Tensor  # [B, C, H, W]
    grad: Tensor  # [B, C, H, W], of y or of u
    weight_lr: Tensor  # [K]
    weight_td: Tensor | None
    bias: Tensor | None  # [C]
    kernels: list[int]
    shifts: list[int]
    norm_weight: Tensor
    norm_bias: Tensor | None

    def wide(self) -> Inputs:
        """In float64."""
        return Inputs(*(v.double() if isinstance(v, Tensor) else v for v in self))


def make_inputs(
    shape: Sequence[int],
    kernels: Sequence[int],
    shifts: Sequence[int],
    layout: str = "planes",
    dtype: torch.dtype = torch.float32,
    one_direction: bool = False,
) -> Inputs:
    """Such that results are about 1."""
    draw, small = Draw(dtype, seed=1), Draw(reference.accumulation_dtype(dtype), seed=2)
    channels = shape[1]
    sizes = [part.shape[0] for part in torch.zeros(channels).chunk(len(kernels))]

    def weights() -> Tensor:
        each = zip(sizes, kernels, strict=True)
        return torch.cat([small.normal(n * k * k) / k for n, k in each])

    return Inputs(
        LAYOUTS[layout](draw.normal(*shape)),
        LAYOUTS[layout](draw.normal(*shape)),
        weights(),
        None if one_direction else weights(),
        None if one_direction else small.normal(channels),
        list(kernels),
        list(shifts),
        small.normal(channels).abs() + 0.5,
        None if one_direction else small.normal(channels),
    )


def poisoned(like: Tensor) -> Tensor:
    """As an output, amid more NaN: of the same strides where `like` is dense."""
    storage = torch.full((like.numel() + 2 * MARGIN,), torch.nan, dtype=like.dtype)
    return storage.as_strided(like.shape, like.stride(), MARGIN)


def surroundings(tensor: Tensor) -> Tensor:
    """What lies before and after a tensor of `poisoned`."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return torch.cat([storage[:MARGIN], storage[MARGIN + tensor.numel() :]])


def spoil_memory() -> None:
    """NaN where scratch memory may come to lie: none of it may be read before it is written."""
    for size in (1000, 10000, 50000):
        torch.full((size,), torch.nan)


def outputs_of(inputs: Inputs, last: bool | None = None) -> dict[str, Tensor | None]:
    """What `run` writes into; u and grad_x channels_last or not, None being as x is."""
    x, weight_td, bias = inputs.x, inputs.weight_td, inputs.bias
    normed = poisoned(torch.empty_like(x, memory_format=torch.channels_last))
    last = reference.is_channels_last(x) if last is None else last
    layout = torch.channels_last if last else torch.contiguous_format
    return {
        "y": normed,
        "u": poisoned(torch.empty_like(x, memory_format=layout)),
        "grad_u": poisoned(torch.empty_like(x, memory_format=torch.channels_last)),
        "grad_norm_weight": poisoned(inputs.norm_weight),
        "grad_norm_bias": poisoned(inputs.norm_weight),
        "grad_x": poisoned(torch.empty_like(x, memory_format=layout)),
        "grad_lr": poisoned(inputs.weight_lr),
        "grad_td": None if weight_td is None else poisoned(weight_td),
        "grad_bias": None if bias is None else poisoned(bias),
    }


def run(inputs: Inputs, last: bool | None = None) -> dict[str, Tensor]:
    """All outputs of the functions, by name: y with the norm, u without."""
    x, grad, *weights, kernels, shifts, norm_weight, norm_bias = inputs
    weight_lr, weight_td, _ = weights
    groups = kernels, shifts
    out = outputs_of(inputs, last)
    module = native.require()
    module.mix_shift_forward(x, *weights, *groups, norm_weight, norm_bias, EPS, out["y"])
    module.mix_shift_forward(x, *weights, *groups, None, None, EPS, out["u"])
    module.mix_shift_norm_backward(
        *(grad, x, *weights, *groups, norm_weight, EPS),
        *(out["grad_u"], out["grad_norm_weight"], out["grad_norm_bias"]),
    )
    module.mix_shift_input_gradient(grad, weight_lr, weight_td, *groups, out["grad_x"])
    module.mix_shift_weight_gradient(
        grad, x, *groups, out["grad_lr"], out["grad_td"], out["grad_bias"]
    )
    return {name: value for name, value in out.items() if value is not None}


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """In float64."""
    x, grad, *weights, kernels, shifts, norm_weight, norm_bias = inputs.wide()
    groups = kernels, shifts
    with contract.num_threads(1):  # of so small work more would only wait for each other
        u = reference.mix_shift_forward(x, *weights, *groups, None, None, EPS)
        leaves = [u.requires_grad_(), norm_weight.requires_grad_()]
        leaves.append((torch.zeros_like(norm_weight) if norm_bias is None else norm_bias).detach())
        leaves[2].requires_grad_()
        y = to_first(F.layer_norm(to_last(u), norm_weight.shape, *leaves[1:], EPS))
        of_norm = torch.autograd.grad(y, leaves, grad)
        of_mixing = reference.mix_shift_backward(
            grad, x, *weights, *groups, None, EPS, need_x=True, need_weights=True
        )
    values = (y.detach(), u.detach(), *of_norm, *of_mixing[:4])
    return dict(zip(OUTPUTS, values, strict=True))


def check(
    inputs: Inputs,
    threads: Sequence[int] = (1,),
    skip: Sequence[str] = (),
    last: bool | None = None,
) -> None:
    """At every level and on each number of threads against the truth."""
    expected = truth(inputs)
    problems = []
    for level in LEVELS:
        native.set_cpu_level(level)
        for count in threads:
            spoil_memory()
            with contract.num_threads(count):
                outputs = run(inputs, last)
            for name, out in outputs.items():
                if name in skip:
                    continue
                what = f"{level}, {count} threads, {name}"
                try:
                    assert_matches(what, out, expected[name])
                except AssertionError as error:  # all of them, not the first
                    problems.append(str(error))
                if not surroundings(out).isnan().all():
                    problems.append(f"{what}: written outside of it")
    assert not problems, "\n".join(problems)


SIZES = (4, 7, 8, 14, 15, 16, 17, 28)
#: A norm of one channel has no gradient to what enters it but rounding errors.
NO_NORM = ("y", "grad_u", "grad_norm_weight", "grad_norm_bias")


@pytest.mark.parametrize("height", SIZES)
@pytest.mark.parametrize("width", SIZES)
@MAIN_LAYOUTS
def test_borders_of_tiles(layout: str, width: int, height: int) -> None:
    check(make_inputs((1, 6, height, width), (3, 7), (3, -2), layout))


@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 20, 33])
@MAIN_LAYOUTS
def test_channels_of_a_group(layout: str, channels: int, kernel: int) -> None:
    inputs = make_inputs((1, channels, 8, 9), (kernel,), (-2,), layout)
    check(inputs, skip=NO_NORM if channels == 1 else ())


@pytest.mark.parametrize("width", [14, 17, 28, 56])
@pytest.mark.parametrize("channels", [1, 3, 9, 16, 17])
@BOTH_LAYOUTS
def test_channels_of_several_groups(layout: str, channels: int, width: int) -> None:
    """Each of another size of kernels, and the last of fewer channels."""
    shape = 2, 4 * channels - channels // 2, 7, width
    check(make_inputs(shape, (1, 5, 3, 7), (2, 0, -1, 7), layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("one_direction", [False, True], ids=["both", "lr"])
@pytest.mark.parametrize("places", [(14, 14), (7, 56), (9, 5)], ids=str)
@EACH_LAYOUT
def test_dtypes_and_layouts(
    layout: str, places: tuple[int, int], one_direction: bool, dtype: torch.dtype
) -> None:
    kernels, shifts = (1, 3, 5, 7, 3), (1, 0, -1, 2, -2)
    check(make_inputs((2, 19, *places), kernels, shifts, layout, dtype, one_direction))


@pytest.mark.parametrize("last", [False, True], ids=["to planes", "to channels_last"])
@pytest.mark.parametrize("width", [14, 56])
@EACH_LAYOUT
def test_any_layout_into_each(layout: str, width: int, last: bool) -> None:
    check(make_inputs((2, 19, 9, width), (3, 7), (1, -2), layout), last=last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=case_id)
@pytest.mark.parametrize("channels", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("last", [False, True], ids=["to planes", "to channels_last"])
@MAIN_LAYOUTS
def test_whole_vectors_of_channels(
    layout: str, last: bool, channels: int, dtype: torch.dtype
) -> None:
    for kernel, height, width, shift in [(3, 4, 25, 2), (7, 7, 19, -2), (5, 14, 14, 0)]:
        check(
            make_inputs((1, channels, height, width), (kernel,), (shift,), layout, dtype), last=last
        )


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_gradient_of_another_layout(layout: str) -> None:
    for other in LAYOUTS:
        inputs = make_inputs((2, 11, 7, 17), (3, 5), (1, -2), layout)
        check(inputs._replace(grad=LAYOUTS[other](inputs.grad.contiguous())))


@pytest.mark.parametrize("shift", [*range(-9, 10), 1 << 40, -(1 << 40)])
@BOTH_LAYOUTS
def test_every_shift(layout: str, shift: int) -> None:
    check(make_inputs((1, 4, 9, 8), (5,), (shift,), layout))


#: Of several stripes, or several threads, or both.
LARGE = [
    ((1, 3, 130, 70), (5,)),
    ((1, 3, 130, 70), (1, 3, 7)),
    ((2, 9, 61, 56), (3, 7)),
    ((1, 40, 60, 33), (3, 5, 7)),
    ((3, 40, 21, 14), (1, 3, 5, 7, 7)),
    ((5, 83, 14, 14), (3, 7)),
    ((1, 200, 7, 31), (9, 1, 3)),
    ((1, 2, 3, 9000), (3, 5)),
    ((1, 2, 9000, 3), (3, 5)),
]


@pytest.mark.parametrize(("shape", "kernels"), LARGE, ids=str)
@MAIN_LAYOUTS
def test_images_that_are_cut(layout: str, shape: tuple[int, ...], kernels: tuple[int, ...]) -> None:
    check(make_inputs(shape, kernels, (-2, 0, 3, 11, -1)[: len(kernels)], layout), THREADS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize(("shape", "kernels"), [LARGE[1], LARGE[3], LARGE[5]], ids=str)
@BOTH_LAYOUTS
def test_images_of_other_dtypes_that_are_cut(
    layout: str, shape: tuple[int, ...], kernels: tuple[int, ...], dtype: torch.dtype
) -> None:
    check(make_inputs(shape, kernels, (-2, 0, 3)[: len(kernels)], layout, dtype), (1, 3))


@pytest.mark.parametrize("height", [1, 2, 4, 5, 12, 13])
@BOTH_LAYOUTS
def test_fewer_rows_than_threads_and_a_few_more(layout: str, height: int) -> None:
    check(make_inputs((1, 37, height, 120), (3, 7), (3, -2), layout), (2, 3))


@pytest.mark.parametrize("kernels", [(33, 3), (3, 65)], ids=str)
@BOTH_LAYOUTS
def test_kernels_larger_than_the_image(layout: str, kernels: tuple[int, ...]) -> None:
    check(make_inputs((2, 5, 9, 17), kernels, (2, -1), layout))


@pytest.mark.parametrize(("channels", "groups"), [(64, 64), (127, 64), (16, 4), (65, 5)])
@BOTH_LAYOUTS
def test_many_groups(layout: str, channels: int, groups: int) -> None:
    kernels = [(1, 3, 5)[g % 3] for g in range(groups)]
    check(make_inputs((2, channels, 4, 5), kernels, [g % 5 - 2 for g in range(groups)], layout))


@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (3, 6, 1, 9), (3, 6, 9, 1), (1, 1, 1, 1)], ids=str)
@BOTH_LAYOUTS
def test_axes_of_one(layout: str, shape: tuple[int, ...]) -> None:
    groups = ((3, 5), (1, -1)) if shape[1] > 1 else ((3,), (1,))
    check(make_inputs(shape, *groups, layout), skip=NO_NORM if shape[1] == 1 else ())


@BOTH_LAYOUTS
def test_no_images(layout: str) -> None:
    for level in LEVELS:
        native.set_cpu_level(level)
        for name, out in run(make_inputs((0, 6, 5, 4), (3, 1), (1, -1), layout)).items():
            assert not out.any(), name
            assert surroundings(out).isnan().all(), name


@pytest.mark.parametrize(("shape", "kernels"), [LARGE[i] for i in (1, 2, 3, 5, 8)], ids=str)
@BOTH_LAYOUTS
def test_the_same_bits_for_any_number_of_threads(
    layout: str, shape: tuple[int, ...], kernels: tuple[int, ...]
) -> None:
    """But for what is summed over places."""
    inputs = make_inputs(shape, kernels, (-2, 0, 3, 11, -1)[: len(kernels)], layout)
    different = []
    for level in LEVELS:
        native.set_cpu_level(level)
        results = []
        for threads in THREADS:
            with contract.num_threads(threads):
                results.append(run(inputs))
        for name in results[0].keys() - SUMS:
            for threads, result in zip(THREADS[1:], results[1:], strict=True):
                if not torch.equal(result[name], results[0][name]):
                    different.append(f"{level}, {threads} threads, {name}")
    assert not different, sorted(different)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(("shape", "kernels"), [LARGE[1], LARGE[3]], ids=str)
@BOTH_LAYOUTS
def test_the_same_bits_run_after_run(
    layout: str, shape: tuple[int, ...], kernels: tuple[int, ...], threads: int
) -> None:
    inputs = make_inputs(shape, kernels, (-2, 0, 3)[: len(kernels)], layout)
    for level in LEVELS:
        native.set_cpu_level(level)
        with contract.num_threads(threads):
            first, second = run(inputs), run(inputs)
        for name, out in first.items():
            assert torch.equal(out, second[name]), f"{level}, {threads} threads, {name}"


def test_inputs_are_left_as_they_were() -> None:
    for level, layout in itertools.product(LEVELS, ("planes", "channels_last")):
        native.set_cpu_level(level)
        inputs, same = (make_inputs((2, 9, 7, 14), (3, 5), (1, -1), layout) for _ in range(2))
        run(inputs)
        for name, value, wanted in zip(Inputs._fields, inputs, same, strict=True):
            assert torch.equal(value, wanted) if isinstance(value, Tensor) else value == wanted, (
                f"{level}, {layout}, {name}"
            )


@BOTH_LAYOUTS
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_windows(value: float, layout: str) -> None:
    """Wherever it is in the image."""
    for h, w in [(0, 0), (3, 5), (8, 16), (8, 0)]:
        inputs = make_inputs((2, 6, 9, 17), (3, 7), (3, -2), layout)
        inputs.x[1, 2, h, w] = value
        inputs.x[0, 5, h, w] = value
        expected = truth(inputs)["u"]
        for level in LEVELS:
            native.set_cpu_level(level)
            out = run(inputs)["u"]
            assert torch.equal(out.isfinite(), expected.isfinite()), (level, h, w)
            assert_matches(f"{level}, {h, w}", out, expected)


# what guards memory


def good(name: str) -> dict[str, Any]:
    """Good arguments of an extension function, in its order."""
    inputs = make_inputs((2, 6, 5, 7), (3, 5), (1, -1), "aligned planes")
    given = {**inputs._asdict(), **outputs_of(inputs)}
    groups = {key: given[key] for key in ("kernels", "shifts")}
    weights = {key: given[key] for key in ("weight_lr", "weight_td")}
    if name == "forward":
        norm = {key: given[key] for key in ("norm_weight", "norm_bias")}
        named = {"x": given["x"], **weights, "bias": given["bias"], **groups, **norm}
        return {**named, "eps": EPS, "y": given["y"]}
    if name == "norm_backward":
        named = {"grad_y": given["grad"], "x": given["x"], **weights, "bias": given["bias"]}
        named |= {**groups, "norm_weight": given["norm_weight"], "eps": EPS}
        return named | {k: given[k] for k in ("grad_u", "grad_norm_weight", "grad_norm_bias")}
    if name == "input_gradient":
        return {"grad_u": given["grad"], **weights, **groups, "grad_x": given["grad_x"]}
    named = {"grad_u": given["grad"], "x": given["x"], **groups}
    return named | {k: given[k] for k in ("grad_lr", "grad_td", "grad_bias")}


def call(name: str, arguments: dict[str, Any]) -> None:
    getattr(native.require(), f"mix_shift_{name}")(*arguments.values())


FUNCTIONS = ("forward", "norm_backward", "input_gradient", "weight_gradient")
#: Of [B, C, H, W], [K] and [C]; what may be None; and those of the first that are written.
IMAGES = {"x", "y", "grad_y", "grad_u", "grad_x"}
FILTERS = {"weight_lr", "weight_td", "grad_lr", "grad_td"}
VECTORS = {"bias", "norm_weight", "norm_bias", "grad_norm_weight", "grad_norm_bias", "grad_bias"}
OPTIONAL = {"weight_td", "bias", "grad_td", "grad_bias", "norm_bias"}
WRITTEN = {
    ("forward", "y"): "channels_last",
    ("norm_backward", "grad_u"): "channels_last",
    ("input_gradient", "grad_x"): "contiguous or channels_last",
}
#: The images that the other ones are compared with.
FIRST = {"forward": "x", "norm_backward": "x", "input_gradient": "grad_u", "weight_gradient": "x"}


def of(*names: set[str]) -> list[tuple[str, str]]:
    """Functions with those of their arguments that are among these."""
    with_all: set[str] = functools.reduce(set.union, names)
    return [(name, key) for name in FUNCTIONS for key in good(name) if key in with_all]


def refused(name: str, error: type[Exception], message: str, **changes: object) -> None:
    arguments = good(name)
    assert set(changes) <= set(arguments) | {"scratch"}
    with pytest.raises(error, match=rf"^{message}"):
        call(name, {**arguments, **changes})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_good_arguments_pass(name: str) -> None:
    call(name, good(name))
    for key in OPTIONAL & set(good(name)):
        call(name, {**good(name), key: None})
    if name in ("norm_backward", "weight_gradient"):
        call(name, {**good(name), "scratch": None})
    if name == "forward":  # any layout, where there is no norm
        for layout in (torch.contiguous_format, torch.channels_last):
            y = torch.empty(2, 6, 5, 7).contiguous(memory_format=layout)
            call(name, {**good(name), "norm_weight": None, "norm_bias": None, "y": y})


@pytest.mark.parametrize(("name", "key"), of(IMAGES, FILTERS, VECTORS))
def test_what_is_no_tensor(name: str, key: str) -> None:
    refused(name, TypeError, f"{key}: expected a tensor, got float", **{key: 1.0})
    if key not in OPTIONAL and (name, key) != ("forward", "norm_weight"):
        refused(name, TypeError, f"{key}: ", **{key: None})


@pytest.mark.parametrize(("name", "key"), of(IMAGES, FILTERS, VECTORS))
def test_dtypes(name: str, key: str) -> None:
    tensor = good(name)[key]
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        other = key
        if key == FIRST[name]:  # the others are wrong then, if it may have that dtype
            if dtype is torch.int64:
                refused(
                    name,
                    TypeError,
                    f"{key}: expected float32, float64, bfloat16 or float16, got int64",
                    **{key: tensor.to(dtype)},
                )
                continue
            other = next(k for n, k in of(IMAGES) if n == name and k != key)
        refused(name, TypeError, f"{other}: (expected|dtype)", **{key: tensor.to(dtype)})


@pytest.mark.parametrize(("name", "key"), of(IMAGES))
def test_shapes_of_images(name: str, key: str) -> None:
    tensor = good(name)[key]
    if key == FIRST[name]:
        refused(name, ValueError, rf"{key}: expected \[B, C, H, W\], got", **{key: tensor[0]})
        for axis in (1, 2, 3):
            empty = tensor.narrow(axis, 0, 0)
            refused(name, ValueError, f"{key}: expected C, H and W of at least 1", **{key: empty})
        return
    for other in (tensor[0], tensor[:1], tensor[:, :5], tensor[:, :, 1:], tensor[..., 1:]):
        message = rf"{key}: expected \[B, C, H, W\] = \[2, 6, 5, 7\], got"
        refused(name, ValueError, message, **{key: other})


@pytest.mark.parametrize(("name", "key"), of(FILTERS, VECTORS))
def test_shapes_and_strides_of_vectors(name: str, key: str) -> None:
    tensor = good(name)[key]
    size = rf"\[{'K' if key in FILTERS else 'C'}\] = \[{len(tensor)}\]"
    longer = torch.cat([tensor, tensor[:1]])
    for other in (longer, tensor[1:], tensor[:0], tensor[None], tensor[0]):
        refused(name, ValueError, f"{key}: expected {size}, got", **{key: other})
    message = f"{key}: expected a contiguous tensor"
    refused(name, ValueError, message, **{key: tensor.repeat_interleave(2)[::2]})
    refused(name, ValueError, message, **{key: tensor[:1].expand(len(tensor))})


@pytest.mark.parametrize(("name", "key"), list(WRITTEN), ids=str)
def test_layouts_of_outputs(name: str, key: str) -> None:
    tensor = torch.zeros(2, 6, 5, 7)
    spread = every_second(tensor)
    others = [spread, axes_swapped(tensor, 2, 3), axes_swapped(tensor, 0, 1), cropped(tensor)]
    others.append(to_first(every_second(to_last(tensor))))
    others.append(tensor[:1].expand_as(tensor))
    if WRITTEN[name, key] == "channels_last":
        others.append(tensor)
    for other in others:
        message = f"{key}: expected a tensor that is {WRITTEN[name, key]}"
        refused(name, ValueError, message, **{key: other})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_counts_and_sizes_of_groups(name: str) -> None:
    for kernels in ([3, 4], [2, 5], [0, 5], [-3, 5], [3, 32769], [3, 1 << 40]):
        message = "kernels: expected odd numbers from 1 to 32767, got"
        refused(name, ValueError, message, kernels=kernels)
    refused(name, ValueError, "shifts: expected 2, as kernels, got 1", shifts=[1])
    refused(name, ValueError, "shifts: expected 2, as kernels, got 3", shifts=[1, 2, 3])
    refused(name, ValueError, "shifts: expected 2, as kernels, got 0", shifts=[])
    several = "kernels: expected one for each of 1 to 64 groups, got"
    refused(name, ValueError, several, kernels=[], shifts=[])
    refused(name, ValueError, several, kernels=[1] * 65, shifts=[0] * 65)
    for count in (4, 5, 7, 64):  # 6 channels in groups of 2, of 2, of 1, of 1
        message = f"kernels: 6 channels are no {count} groups of the same size"
        refused(name, ValueError, message, kernels=[1] * count, shifts=[0] * count)
    for changes in ({"kernels": [3.0, 5.0]}, {"shifts": ["1", "2"]}, {"kernels": 3}):
        with pytest.raises(TypeError):
            call(name, {**good(name), **changes})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_weights_of_other_kernels(name: str) -> None:
    """All that are of [K] are of the size that kernels and channels give."""
    first = next(key for key in good(name) if key in FILTERS)
    refused(name, ValueError, rf"{first}: expected \[K\] = \[174\], got", kernels=[3, 7])


def test_a_norm_bias_without_a_weight() -> None:
    message = "norm_bias: expected None where norm_weight is None"
    refused("forward", ValueError, message, norm_weight=None)


@pytest.mark.parametrize(("name", "key"), of(IMAGES, FILTERS, VECTORS))
def test_devices(name: str, key: str) -> None:
    """A tensor without memory is none that a kernel may be handed."""
    tensor = good(name)[key]
    with pytest.raises((TypeError, ValueError), match=rf"^{key}: "):
        call(name, {**good(name), key: tensor.to("meta")})
