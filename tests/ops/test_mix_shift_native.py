"""Mix-shift's extension functions on the CPU, called without Python's checks before them.

At each CPU level and on several threads, where tiles, blocks of channels and stripes end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import contract
import pytest
import torch
import torch.nn.functional as F
from contract import DTYPES, case_id
from mix_shift_inputs import Inputs, draw_inputs
from poison import poisoned, surroundings
from tolerances import assert_matches
from torch import Tensor
from viops import native
from viops.cases import amid_nan, axes_swapped, every_second
from viops.ops.mix_shift import reference

LEVELS = native.extension.cpu_levels() if native.extension else ["no extension"]
THREADS = (1, 2, 3)
EPS = 0.1  # so that the norm of two channels is no mere sign
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


def make_inputs(
    shape: Sequence[int],
    kernels: Sequence[int],
    shifts: Sequence[int],
    layout: str = "planes",
    dtype: torch.dtype = torch.float32,
    one_direction: bool = False,
) -> Inputs:
    norm_bias = not one_direction
    laid_out = LAYOUTS[layout]
    return draw_inputs(shape, kernels, shifts, laid_out, dtype, one_direction, True, norm_bias)


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
            grad, x, *weights, *groups, None, EPS, need_x=True, need_weights=True, need_norm=False
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
