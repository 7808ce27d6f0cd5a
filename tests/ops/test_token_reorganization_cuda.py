"""Token reorganization's CUDA kernels, called without Python's checks before them.

On a GPU where there is one, else executed on the CPU by tests/cuda_on_host.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from contract import DTYPES, case_id
from cuda_on_host.here import DEVICE, ON_GPU, ON_HOST, extension
from ops.test_token_reorganization_native import (
    KEEP,
    P,
    arguments_of,
    expected_of,
    outputs_of,
)
from poison import all_moved, moved, surroundings
from torch import Tensor
from viops.cases import Draw
from viops.ops.token_reorganization import reference

FUNCTIONS = (
    "reorganize_tokens_forward",
    "reorganize_tokens_backward",
    "restore_tokens_forward",
    "restore_tokens_backward",
)
EACH = pytest.mark.parametrize("name", FUNCTIONS)
INDEXED = pytest.mark.parametrize("name", FUNCTIONS[1:])


def call(name: str, arguments: dict) -> None:
    getattr(extension(), name)(*arguments.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@EACH
def test_writes_every_element_and_none_beside(name: str, dtype: torch.dtype) -> None:
    arguments = arguments_of(name, dtype)
    expected = expected_of(name, arguments)
    arguments = all_moved(arguments, DEVICE)
    call(name, arguments)
    for key, wanted in zip(outputs_of(name, dtype), expected, strict=True):
        out = arguments[key].cpu()
        torch.testing.assert_close(out, wanted)
        untouched = surroundings(arguments[key]).cpu()
        blank = untouched.isnan() if out.is_floating_point() else untouched == -7
        assert blank.all()


@EACH
def test_tensors_of_two_devices_are_refused(name: str) -> None:
    arguments = arguments_of(name)
    for key, value in arguments.items():
        if not isinstance(value, Tensor):
            continue
        with pytest.raises((ValueError, TypeError), match=r"^\w+: \S"):
            call(name, {**all_moved(arguments, DEVICE), key: value.to("meta")})
        if ON_GPU:
            with pytest.raises(ValueError, match=r"^\w+: expected a tensor on .*got one on"):
                call(name, {**all_moved(arguments, DEVICE), key: value})


@ON_HOST
@pytest.mark.parametrize("place", [-1, P, P + 1, 2**31, 2**62, -(2**63), 2**63 - 1])
@INDEXED
def test_a_place_out_of_range_ends_the_kernel(name: str, place: int) -> None:
    index = arguments_of(name)["index"].clone()
    index[1, 2] = place
    with pytest.raises(RuntimeError, match=r"index: expected places from 0 to P - 1; .*block"):
        call(name, {**arguments_of(name), "index": index})


@ON_HOST
@INDEXED
def test_a_place_given_twice_ends_the_kernel(name: str) -> None:
    index = arguments_of(name)["index"].clone()
    index[1, 2] = index[1, 0]
    with pytest.raises(RuntimeError, match=r"index: expected each place at most once in a row"):
        call(name, {**arguments_of(name), "index": index})


@ON_HOST
def test_a_place_given_twice_ends_the_kernel_without_a_fused_token_too() -> None:
    arguments = arguments_of("restore_tokens_backward")
    index = arguments["index"].clone()
    index[1, 2] = index[1, 0]
    grad_tokens = arguments["grad_tokens"].new_empty(
        *index.shape[:1], 1 + KEEP, arguments["grad_x"].shape[2]
    )
    with pytest.raises(RuntimeError, match=r"index: expected each place at most once in a row"):
        call("restore_tokens_backward", {**arguments, "index": index, "grad_tokens": grad_tokens})


def test_more_images_than_a_grid_has_blocks() -> None:
    x = torch.empty(1 << 31, 1, 0, device=DEVICE)
    index = torch.empty(1 << 31, 0, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"^x: expected a batch of at most"):
        extension().restore_tokens_forward(x, index, 1, x.clone())


@ON_HOST
def test_rows_farther_apart_than_32_bits() -> None:
    """Of which only virtual memory is large."""
    storage = torch.empty(2**31 + 64, dtype=torch.float16)
    x = storage.as_strided((1, 3, 8), (2**31 + 32, 2**30, 1))
    x.copy_(Draw(torch.float16).normal(1, 3, 8))
    scores = torch.tensor([[1.0, 2.0]])
    tokens, index = x.new_empty(1, 3, 8), torch.empty(1, 1, dtype=torch.int64)
    extension().reorganize_tokens_forward(x, scores, tokens, index)
    wanted, order = reference.reorganize_tokens_forward(x.clone(), scores, 1, 1, True)
    assert torch.equal(index, order)
    torch.testing.assert_close(tokens, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_images_that_do_not_begin_at_whole_vectors(dtype: torch.dtype) -> None:
    x = Draw(dtype).normal(3 * (23 * 16 + 1)).as_strided((3, 23, 16), (23 * 16 + 1, 16, 1))
    scores = Draw(torch.float32).probabilities(3, 22)
    tokens = torch.full((3, 13, 16), torch.nan, dtype=dtype, device=DEVICE)
    index = torch.full((3, 11), -7, device=DEVICE)
    on_device_x = moved(x, DEVICE)
    extension().reorganize_tokens_forward(on_device_x, scores.to(DEVICE), tokens, index)
    wanted, order = reference.reorganize_tokens_forward(x, scores, 11, 1, True)
    assert torch.equal(index.cpu(), order)
    torch.testing.assert_close(tokens.cpu(), wanted)


_BAD_INDEX = """
import torch, viops
tokens = torch.zeros(2, 6, 8, device="cuda")
index = torch.tensor([[0, 1, 2, 3], [4, 5, 6, {place}]], device="cuda")
viops.restore_tokens(tokens, index, 9)
torch.cuda.synchronize()
"""


@pytest.mark.skipif(not ON_GPU, reason="torch sees no CUDA device")
@pytest.mark.parametrize("place", [-1, 9, 4, 2**40])
def test_a_wrong_place_ends_the_kernel_on_a_gpu(place: int) -> None:
    """In a process of its own, whose CUDA is of no use after it."""
    done = subprocess.run(
        (sys.executable, "-c", _BAD_INDEX.format(place=place)), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "index: expected" in done.stderr
    assert "assert" in done.stderr


@EACH
def test_gradients_and_outputs_of_no_image(name: str) -> None:
    arguments = {
        key: value[:0] if isinstance(value, Tensor) else value
        for key, value in all_moved(arguments_of(name), DEVICE).items()
    }
    call(name, arguments)


def test_gradients_that_nobody_asked_for() -> None:
    name = "reorganize_tokens_backward"
    grad_x, grad_scores = expected_of(name, arguments_of(name))
    arguments = all_moved(arguments_of(name), DEVICE)
    call(name, {**arguments, "grad_x": None})
    torch.testing.assert_close(arguments["grad_scores"].cpu(), grad_scores)
    arguments = all_moved(arguments_of(name), DEVICE)
    call(name, {**arguments, "x": None, "grad_scores": None})
    torch.testing.assert_close(arguments["grad_x"].cpu(), grad_x)
    assert arguments["grad_scores"].isnan().all()
    call(name, {**arguments, "x": None, "grad_x": None, "grad_scores": None})


#: Numbers of patches about which the way of selecting changes, and those that pad a sort.
SIZES = [1, 31, 32, 33, 511, 512, 513, 1023, 1024, 1025, 4095, 4096, 4097, 8200]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=case_id)
@pytest.mark.parametrize("num_patches", SIZES)
def test_every_way_of_selecting(num_patches: int, dtype: torch.dtype) -> None:
    draw = Draw(dtype)
    x = draw.normal(2, num_patches, 2)
    scores = draw.integers(-3, 3, 2, num_patches)  # many ties
    scores[0, :: max(num_patches // 3, 1)] = torch.nan
    for keep in {0, 1, num_patches // 2, num_patches - 1}:
        tokens = torch.full((2, keep + 1, 2), torch.nan, dtype=dtype, device=DEVICE)
        index = torch.full((2, keep), -7, device=DEVICE)
        extension().reorganize_tokens_forward(x.to(DEVICE), scores.to(DEVICE), tokens, index)
        wanted, order = reference.reorganize_tokens_forward(x, scores, keep, 0, True)
        assert torch.equal(index.cpu(), order)
        torch.testing.assert_close(tokens.cpu(), wanted, equal_nan=True)


@ON_HOST
@pytest.mark.parametrize("num_patches", [KEEP, 196, 700, 4099])
def test_the_same_bits_in_every_order_of_threads(num_patches: int) -> None:
    draw = Draw(torch.float32)
    x, scores = draw.normal(3, 1 + num_patches, 40), draw.normal(3, num_patches)
    keep = num_patches // 2
    grad = draw.normal(3, 1 + keep + 1, 40)
    results = []
    for order, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        extension().set_thread_order(order, seed)
        tokens, index = x.new_empty(3, 2 + keep, 40), torch.empty(3, keep, dtype=torch.int64)
        extension().reorganize_tokens_forward(x, scores, tokens, index)
        grads = torch.empty_like(x), torch.empty_like(scores)
        extension().reorganize_tokens_backward(grad, x, scores, index, *grads)
        results.append((tokens, index, *grads))
    extension().set_thread_order("forward", 0)
    for result in results[1:]:
        for tensor, first in zip(result, results[0], strict=True):
            assert torch.equal(tensor, first)
