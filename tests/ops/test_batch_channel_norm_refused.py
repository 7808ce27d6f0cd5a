"""What batch channel norm's extension functions refuse, called without checks before them."""

from __future__ import annotations

import contract
import numpy
import pytest
import torch
from contract import case_id
from extension_calls import call, check_refusal
from ops.test_batch_channel_norm_native import (
    BACKWARD,
    CONSTANTS,
    CUDA,
    EACH,
    ESTIMATE,
    FORWARD,
    OF_BATCH,
    ON_CPU,
    B,
    C,
    G,
    S,
    arguments_of,
    laid_out,
    run,
)
from poison import all_moved
from torch import Tensor


def refuses(
    name: str, changes: dict, errors: type | tuple = (ValueError, TypeError), mode: int = OF_BATCH
) -> None:
    check_refusal(name, arguments_of(name, mode=mode), changes, errors)


TENSORS = [
    (name, key)
    for name in (FORWARD, BACKWARD)
    for key, value in arguments_of(name, mode=ESTIMATE).items()
    if isinstance(value, Tensor) and key != "scratch"
]
EACH_TENSOR = pytest.mark.parametrize(("name", "key"), TENSORS)


@pytest.mark.parametrize("value", [1.5, "text", [1.0], object(), numpy.float32(1)], ids=str)
@EACH_TENSOR
def test_what_is_no_tensor_is_refused(name: str, key: str, value: object) -> None:
    refuses(name, {key: value}, TypeError, ESTIMATE)


@EACH_TENSOR
def test_none_is_refused(name: str, key: str) -> None:
    if key not in ("residual", "grad_residual"):
        refuses(name, {key: None}, mode=ESTIMATE)


@EACH_TENSOR
def test_wrong_dtype_is_refused(name: str, key: str) -> None:
    good = arguments_of(name, mode=ESTIMATE)[key]
    for dtype in (torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.complex64):
        refuses(name, {key: good.nan_to_num().to(dtype)}, mode=ESTIMATE)


@EACH_TENSOR
def test_wrong_rank_size_device_and_layout_are_refused(name: str, key: str) -> None:
    good = arguments_of(name, mode=ESTIMATE)[key]
    for bad in (good[0], good[None], good.new_zeros(()), good.to("meta"), good.to_sparse()):
        refuses(name, {key: bad}, mode=ESTIMATE)
    for axis in range(good.dim()):
        for size in (0, good.shape[axis] - 1, good.shape[axis] + 1):
            shape = list(good.shape)
            shape[axis] = size
            refuses(name, {key: good.new_zeros(shape)}, mode=ESTIMATE)
    if good.numel() > 1:
        refuses(name, {key: good.new_zeros(*good.shape, 2)[..., 0]}, ValueError, ESTIMATE)
        refuses(name, {key: good.new_zeros((*good.shape[:-1], 1)).expand_as(good)}, ValueError, 2)


@EACH
def test_tensors_of_two_layouts_are_refused(name: str) -> None:
    like_x = [k for k, v in arguments_of(name).items() if isinstance(v, Tensor) and v.dim() == 3]
    for key in like_x:
        good = arguments_of(name)[key]
        refuses(name, {key: laid_out(good, channels_last=True)}, ValueError)
        refuses(name, {key: good.new_zeros(S, C, B).permute(2, 1, 0)}, ValueError)


@EACH
def test_groups_that_do_not_divide_the_channels_are_refused(name: str) -> None:
    for groups in (0, 4, 7):
        of_groups = {
            key: value.new_zeros(*value.shape[:-1], groups)
            for key, value in arguments_of(name).items()
            if isinstance(value, Tensor) and value.shape[-1] == G and value.dim() < 3
        }
        refuses(name, of_groups, ValueError)


@EACH
def test_no_channels_are_refused(name: str) -> None:
    none = {
        key: value.new_zeros([0 if size == C else size for size in value.shape])
        for key, value in arguments_of(name).items()
        if isinstance(value, Tensor)
    }
    refuses(name, none, ValueError)


@pytest.mark.parametrize("mode", [-1, 3, 2**20])
def test_no_such_mode(mode: int) -> None:
    refuses(FORWARD, {"mode": mode}, ValueError)


@pytest.mark.parametrize("mode", [CONSTANTS, OF_BATCH, ESTIMATE])
def test_what_a_mode_does_not_take_is_refused(mode: int) -> None:
    for key, value in arguments_of(FORWARD, mode=ESTIMATE).items():
        if key in ("mean", "var", "speed"):
            given = arguments_of(FORWARD, mode=mode)[key]
            refuses(FORWARD, {key: value if given is None else None}, ValueError, mode)


def test_a_negative_count_is_refused() -> None:
    refuses(BACKWARD, {"count": -1}, ValueError)


@EACH
@pytest.mark.parametrize("backend", CUDA, ids=case_id)
def test_scratch_is_needed_and_checked_on_cuda(backend: contract.Backend, name: str) -> None:
    good = arguments_of(name)["scratch"]
    halved = good.new_zeros(*good.shape, 2)[..., 0]
    for bad in (None, good[:2], good[:, :1], good[..., :-1], good[0], good.double(), halved):
        arguments = all_moved({**arguments_of(name), "scratch": bad}, backend.device)
        with backend.enter(), pytest.raises((ValueError, TypeError), match=r"^scratch: \S"):
            call(name, arguments)


@EACH
def test_numpy_arrays_are_taken_and_no_scratch_is_needed(name: str) -> None:
    arguments = arguments_of(name)
    arrays = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    del arrays["scratch"]
    call(name, arrays)
    wanted = run(name, arguments_of(name), ON_CPU[-1])
    for key, value in wanted.items():
        assert torch.equal(torch.from_numpy(arrays[key]), value)
