"""Mix-shift's CUDA kernels where tiles, slabs of channels, pieces and shared memory end.

On a GPU where there is one, else executed on the CPU by tests/cuda_on_host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import contract
import pytest
import torch
from cuda_on_host.here import DEVICE, ON_GPU, ON_HOST, extension
from mix_shift_inputs import Inputs, draw_inputs
from poison import poisoned, surroundings
from tolerances import assert_matches
from torch import Tensor
from viops.cases import every_second
from viops.ops.mix_shift import reference

EPS = 1e-5

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "planes": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": every_second,
}
EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
BOTH_LAYOUTS = pytest.mark.parametrize("layout", ["planes", "channels_last"])
EACH_NORM = pytest.mark.parametrize("normed", [False, True], ids=["plain", "norm"])


def make_inputs(
    shape: Sequence[int],
    kernels: Sequence[int],
    shifts: Sequence[int],
    layout: str = "planes",
    dtype: torch.dtype = torch.float32,
    normed: bool = False,
    one_direction: bool = False,
) -> Inputs:
    laid_out = LAYOUTS[layout]
    return draw_inputs(shape, kernels, shifts, laid_out, dtype, one_direction, normed, normed)


def run(inputs: Inputs, pieces: int = 3) -> dict[str, Tensor]:
    """All outputs of the kernels, by name."""
    given = inputs.on(DEVICE)
    x, grad, weight_lr, weight_td, bias, kernels, shifts, norm_weight, norm_bias = given
    normed, weights = norm_weight is not None, (weight_lr, weight_td, bias)
    outputs = {
        "y": poisoned(reference.empty_y(x, normed)),
        "grad_x": poisoned(reference.empty_y(x, normed=False)),
        "grad_lr": poisoned(weight_lr),
    }
    if weight_td is not None:
        outputs["grad_td"] = poisoned(weight_td)
    if bias is not None:
        outputs["grad_bias"] = poisoned(bias)

    def scratch(size: int) -> Tensor:
        return poisoned(weight_lr.new_empty(pieces, size))

    module, groups = extension(), (kernels, shifts)
    module.mix_shift_forward(x, *weights, *groups, norm_weight, norm_bias, EPS, outputs["y"])
    if normed:
        outputs["grad_norm_weight"] = poisoned(norm_weight)
        outputs["grad_norm_bias"] = poisoned(norm_weight)
        grad_u = poisoned(torch.empty_like(x, memory_format=torch.channels_last))
        module.mix_shift_norm_backward(
            *(grad, x, *weights, *groups, norm_weight, EPS, grad_u),
            *(outputs["grad_norm_weight"], outputs["grad_norm_bias"], scratch(2 * x.shape[1])),
        )
        grad = grad_u
    module.mix_shift_input_gradient(grad, weight_lr, weight_td, *groups, outputs["grad_x"])
    module.mix_shift_weight_gradient(
        *(grad, x, *groups, outputs["grad_lr"]),
        *(outputs.get("grad_td"), outputs.get("grad_bias")),
        scratch(2 * weight_lr.shape[0] + x.shape[1]),
    )
    return outputs


def truth(inputs: Inputs) -> dict[str, Tensor]:
    x, grad, *weights, kernels, shifts, norm_weight, norm_bias = inputs.wide()
    groups = kernels, shifts
    with contract.num_threads(1):  # of so small work more would only wait for each other
        y = reference.mix_shift_forward(x, *weights, *groups, norm_weight, norm_bias, EPS)
        grads = reference.mix_shift_backward(
            grad,
            x,
            *weights,
            *groups,
            norm_weight,
            EPS,
            need_x=True,
            need_weights=True,
            need_norm=True,
        )
    names = "grad_x grad_lr grad_td grad_bias grad_norm_weight grad_norm_bias".split()
    return {"y": y, **dict(zip(names, grads, strict=True))}


def check(inputs: Inputs, pieces: int = 3) -> None:
    outputs, expected = run(inputs, pieces), truth(inputs)
    # what is made of grad_u, which is of x's dtype, is no more exact than that
    precision = inputs.x.dtype
    for name, out in outputs.items():
        assert_matches(name, out.cpu(), expected[name], precision)
        assert surroundings(out).isnan().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("one_direction", [False, True], ids=["both", "lr"])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9])
@EACH_NORM
@EACH_LAYOUT
def test_kernel_sizes(
    layout: str, normed: bool, kernel: int, one_direction: bool, dtype: torch.dtype
) -> None:
    check(make_inputs((2, 5, 9, 8), (kernel,), (-2,), layout, dtype, normed, one_direction))


#: Tiles are 32 columns of planes or 16 in channels_last, and rows are computed 7 at a time.
BORDERS = [
    *((h, w) for h in (6, 7, 8, 14, 15) for w in (15, 16, 17)),
    *((3, 31), (3, 32), (3, 33), (8, 65), (56, 32), (57, 33), (113, 2)),
]


@pytest.mark.parametrize("places", BORDERS, ids=str)
@BOTH_LAYOUTS
def test_borders_of_tiles(layout: str, places: tuple[int, int]) -> None:
    check(make_inputs((1, 4, *places), (3, 7), (3, -2), layout))


@pytest.mark.parametrize("places", [(8, 17), (15, 33), (57, 6)], ids=str)
@BOTH_LAYOUTS
def test_borders_of_tiles_with_a_norm(layout: str, places: tuple[int, int]) -> None:
    check(make_inputs((1, 6, *places), (3, 7), (3, -2), layout, normed=True))


@pytest.mark.parametrize("shift", range(-9, 10))
@BOTH_LAYOUTS
def test_every_shift(layout: str, shift: int) -> None:
    check(make_inputs((1, 2, 9, 8), (5,), (shift,), layout))


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(31, 1), (33, 1), (37, 1), (65, 1), (67, 3), (83, 5), (64, 64), (127, 64)],
)
@EACH_NORM
@BOTH_LAYOUTS
def test_channels_beyond_a_slab(layout: str, normed: bool, channels: int, groups: int) -> None:
    kernels = [(1, 3, 5)[g % 3] for g in range(groups)]
    shifts = [g % 5 - 2 for g in range(groups)]
    check(make_inputs((2, channels, 3, 2), kernels, shifts, layout, normed=normed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kernels", [(41, 3), (131, 3), (9, 131), (131, 133)], ids=str)
@EACH_NORM
@BOTH_LAYOUTS
def test_kernels_beyond_shared_memory(
    layout: str, normed: bool, kernels: tuple[int, int], dtype: torch.dtype
) -> None:
    """From a size on, or beside such a one, without tiles."""
    check(make_inputs((1, 4, 11, 9), kernels, (2, -1), layout, dtype, normed))


@pytest.mark.parametrize("kernel", [5, 15])
@EACH_NORM
def test_many_channels_and_tiles_that_shrink_for_them(normed: bool, kernel: int) -> None:
    inputs = make_inputs((1, 40, 15, 17), (kernel,), (4,), "channels_last", torch.float64, normed)
    check(inputs)


@pytest.mark.parametrize("channels", [600, 3000, 8000, 16001])
@BOTH_LAYOUTS
def test_a_norm_over_more_channels_than_shared_memory_has(layout: str, channels: int) -> None:
    """First fewer places at a time, then chunks of the channels of one."""
    shape = 1, channels, 1, 2
    check(make_inputs(shape, (3, 1), (1, 0), layout, torch.float64, normed=True))


@pytest.mark.parametrize("pieces", [1, 2, 5, 1000])
@EACH_NORM
@BOTH_LAYOUTS
def test_any_number_of_pieces(layout: str, normed: bool, pieces: int) -> None:
    inputs = make_inputs((5, 6, 8, 17), (3, 9), (1, -1), layout, normed=normed)
    check(inputs, pieces)


@pytest.mark.parametrize("kernel", [3, 9])
@EACH_NORM
def test_no_images(normed: bool, kernel: int) -> None:
    outputs = run(make_inputs((0, 6, 5, 4), (kernel, 1), (1, -1), normed=normed))
    for name, out in outputs.items():
        assert not out.any(), name
        assert surroundings(out).isnan().all(), name


@EACH_NORM
@BOTH_LAYOUTS
def test_the_same_bits_run_after_run(layout: str, normed: bool) -> None:
    inputs = make_inputs((3, 20, 15, 18), (7, 3, 9), (1, 0, -2), layout, normed=normed)
    orders = [("forward", 0), ("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]
    results = []
    for order in orders:
        if not ON_GPU:
            extension().set_thread_order(*order)
        results.append(run(inputs))
    if not ON_GPU:
        extension().set_thread_order("forward", 0)
    for result in results[1:]:
        for name, out in result.items():
            assert torch.equal(out, results[0][name]), name


@EACH_NORM
@BOTH_LAYOUTS
def test_half_types_are_summed_in_float32(layout: str, normed: bool) -> None:
    """Many large terms of one sign, which the half type's own sums would not bear."""
    inputs = make_inputs((2, 6, 28, 20), (5, 7), (1, -1), layout, torch.float16, normed)
    inputs.x.abs_().add_(4)
    inputs.grad.abs_().mul_(1e-2)
    check(inputs)


@ON_HOST
def test_rows_farther_apart_than_32_bits() -> None:
    """Of which only virtual memory is large."""
    inputs = make_inputs((1, 2, 3, 4), (3,), (1,), dtype=torch.float16)
    storage = torch.empty(2**32 + 2**31, dtype=torch.float16)
    x = storage.as_strided((1, 2, 3, 4), (1, 2**32, 2**29, 1)).copy_(inputs.x)
    outputs, expected = run(inputs._replace(x=x)), run(inputs)
    for name, out in outputs.items():
        assert torch.equal(out, expected[name]), name


def test_images_beyond_what_tiles_count() -> None:
    x = torch.empty(1, 1, 1, 1, device=DEVICE).expand(1, 1, 1 << 29, 1)
    one, scratch = torch.zeros(1, device=DEVICE), torch.zeros(1, 3, device=DEVICE)
    with pytest.raises(ValueError, match=r"^x: expected H and W below 2\^29"):
        extension().mix_shift_weight_gradient(x, x, [1], [0], one, None, None, scratch)
