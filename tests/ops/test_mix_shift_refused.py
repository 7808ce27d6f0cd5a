"""What mix-shift's extension functions refuse: the checks that guard memory."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from ops.test_mix_shift_native import EPS, cropped, make_inputs, outputs_of, to_first, to_last
from viops import native
from viops.cases import axes_swapped, every_second


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
