"""Weight standardization's extension functions, called without Python's checks before them."""

from __future__ import annotations

import contract
import pytest
import torch
from contract import DTYPES, case_id
from extension_calls import EACH_NO_TENSOR, call, check_counts, check_refusal
from poison import amid, surroundings
from tolerances import assert_matches
from torch import Tensor
from viops import native
from viops.cases import Draw
from viops.ops.weight_standardization import reference
from viops.tensors import accumulation_dtype

NUM_FILTERS, SIZE = 5, 21  # vectors and a rest, at each level
LEVELS = [row for row in contract.BACKENDS if row.backend == "cpu"]
FORWARD, BACKWARD = "standardize_weight_forward", "standardize_weight_backward"
EACH = pytest.mark.parametrize("name", [FORWARD, BACKWARD])
OPTIONS = {"eps": 0.1, "unbiased": True, "eps_inside": True}
OPTIONAL = {FORWARD: ("gain",), BACKWARD: ("gain", "grad_gain")}


def outputs_of(name: str, filters: int, size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a function writes into, full of NaN amid the same."""
    wide = accumulation_dtype(dtype)
    large = amid(torch.full((filters, size), float("nan"), dtype=dtype))
    small = [amid(torch.full((filters,), float("nan"), dtype=wide)) for _ in range(2)]
    if name == FORWARD:
        return {"out": large, "mean": small[0], "factor": small[1]}
    return {"grad_weight": large, "grad_gain": small[0]}


def arguments_of(
    name: str,
    dtype: torch.dtype = torch.float32,
    filters: int = NUM_FILTERS,
    size: int = SIZE,
    **changes: object,
) -> dict[str, object]:
    """Good arguments of an extension function, in its order."""
    draw = Draw(dtype)
    wide = accumulation_dtype(dtype)
    options = {**OPTIONS, **changes}
    weight, grad_out = (amid(draw.normal(filters, size)) for _ in range(2))
    gain = amid(draw.normal(filters, dtype=wide))
    written = outputs_of(name, filters, size, dtype)
    if name == FORWARD:
        return {"weight": weight, "gain": gain, **options, **written}
    _, mean, factor = reference.standardize_weight_forward(weight, gain, *options.values())
    saved = {"mean": amid(mean), "factor": amid(factor)}
    return {"grad_out": grad_out, "weight": weight, "gain": gain, **saved, **options, **written}


def expected_of(name: str, a: dict) -> tuple[Tensor, ...]:
    """The reference's result for the same arguments, in float64."""
    wide = {key: v.double() if isinstance(v, Tensor) else v for key, v in a.items()}
    options = [wide[key] for key in OPTIONS]
    forward = reference.standardize_weight_forward(wide["weight"], wide["gain"], *options)
    if name == FORWARD:
        return forward
    inputs = wide["grad_out"], wide["weight"], wide["gain"], *forward[1:]
    return reference.standardize_weight_backward(*inputs, *options, True)


def check_outputs(name: str, dtype: torch.dtype, arguments: dict, taken: dict) -> None:
    """What a call has written into `arguments`, against the reference on what it has `taken`."""
    for key, wanted in zip(outputs_of(name, 0, 0, dtype), expected_of(name, taken), strict=True):
        if arguments[key] is not None:
            assert_matches(key, arguments[key], wanted, dtype if key.startswith("grad") else None)


@pytest.mark.parametrize("level", LEVELS, ids=case_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("eps_inside", [True, False])
@pytest.mark.parametrize("size", [2, 3, 7, 8, 9, 15, 16, 17, 31, 64, 100, 147, 3000])
@EACH
def test_writes_every_element_and_none_beside(
    name: str, size: int, eps_inside: bool, dtype: torch.dtype, level: contract.Backend
) -> None:
    """Filters shorter than a vector, of vectors and a rest, and longer than a chunk of backward."""
    arguments = arguments_of(name, dtype, 70, size, eps_inside=eps_inside)
    with level.enter():
        call(name, arguments)
    check_outputs(name, dtype, arguments, arguments)
    for key in outputs_of(name, 0, 0, dtype):
        assert surroundings(arguments[key]).isnan().all()


@pytest.mark.parametrize("level", LEVELS, ids=case_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("rest", [-1, 0, 1, 17])
@EACH
def test_filters_of_several_chunks(
    name: str, rest: int, dtype: torch.dtype, level: contract.Backend
) -> None:
    bytes_of_chunk = {FORWARD: 20 << 10, BACKWARD: 6 << 10}[name]
    size = 2 * bytes_of_chunk // accumulation_dtype(dtype).itemsize + rest
    arguments = arguments_of(name, dtype, 3, size)
    weight = arguments["weight"]
    weight += torch.linspace(-1, 1, size).to(dtype)  # no chunk's mean is another's
    if name == BACKWARD:
        arguments["grad_out"] += weight  # else the gradients to gains are what sums leave over
        saved = reference.standardize_weight_forward(weight.double(), None, *OPTIONS.values())
        arguments["mean"].copy_(saved[1])
        arguments["factor"].copy_(saved[2])
    with level.enter():
        call(name, arguments)
    check_outputs(name, dtype, arguments, arguments)


@pytest.mark.parametrize("level", LEVELS, ids=case_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_what_goes_past_the_caches(dtype: torch.dtype, level: contract.Backend) -> None:
    """Larger than any usual last cache, aligned, and the same bits as in a small call."""
    filters, size = (192 << 20) // 4608 // dtype.itemsize, 4608
    weight = torch.randn(filters, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    with level.enter():
        for rows in (weight, weight[-8:].clone()):
            out = torch.full_like(rows, float("nan"))
            native.require().standardize_weight_forward(
                rows, None, *OPTIONS.values(), out, None, None
            )
            grad = torch.full_like(rows, float("nan"))
            _, mean, factor = reference.standardize_weight_forward(
                rows[-8:].double(), None, *OPTIONS.values()
            )
            wide = accumulation_dtype(dtype)
            saved = torch.zeros(2, len(rows), dtype=wide)
            saved[0, -8:], saved[1, -8:] = mean, factor
            native.require().standardize_weight_backward(
                out, rows, None, *saved, *OPTIONS.values(), grad, None
            )
            assert not out.isnan().any()
            assert not grad.isnan().any()
            results.append((out[-8:].clone(), grad[-8:].clone()))
    for large, small in zip(*results, strict=True):
        assert torch.equal(large, small)


@EACH
def test_numpy_arrays_are_taken(name: str) -> None:
    """They have no C exchange API, so this is the way of a torch that lacks it."""
    arguments = arguments_of(name)
    call(name, {k: v.numpy() if isinstance(v, Tensor) else v for k, v in arguments.items()})
    check_outputs(name, torch.float32, arguments, arguments)


TENSORS = [
    (name, key)
    for name in (FORWARD, BACKWARD)
    for key, value in arguments_of(name).items()
    if isinstance(value, Tensor)
]


def refuses(name: str, changes: dict, errors: type | tuple = (ValueError, TypeError)) -> None:
    check_refusal(name, arguments_of(name), changes, errors)


@EACH_NO_TENSOR
@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_what_is_no_tensor_is_refused(name: str, key: str, value: object) -> None:
    refuses(name, {key: value}, TypeError)


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_none_is_refused(name: str, key: str) -> None:
    if key in OPTIONAL[name]:
        pytest.skip("None is what an argument that is not there is")
    refuses(name, {key: None})  # mean without factor and factor without mean included


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_wrong_dtype_is_refused(name: str, key: str) -> None:
    good = arguments_of(name)[key]
    for dtype in (torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.complex64):
        refuses(name, {key: good.nan_to_num().to(dtype)})


@EACH
def test_sums_of_half_types_are_in_float32(name: str) -> None:
    for key in ("gain", "mean", "factor"):
        arguments = arguments_of(name, torch.bfloat16)
        arguments[key] = arguments[key].nan_to_num().bfloat16()
        with pytest.raises(TypeError, match=rf"^{key}: expected float32, got bfloat16"):
            call(name, arguments)


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_wrong_rank_is_refused(name: str, key: str) -> None:
    good = arguments_of(name)[key]
    for bad in (good[0], good.unsqueeze(0), good.new_zeros(()), good.new_zeros(2, 2, 2)):
        refuses(name, {key: bad}, ValueError)
    refuses(name, {key: good.reshape(good.shape + (1,) * 12)})


@pytest.mark.parametrize("change", [-1, 1, "empty"])
@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_wrong_size_is_refused(name: str, key: str, change: int | str) -> None:
    good = arguments_of(name)[key]
    for axis in range(good.dim()):
        shape = list(good.shape)
        shape[axis] = 0 if change == "empty" else shape[axis] + change
        refuses(name, {key: good.new_zeros(shape)}, ValueError)


@EACH
def test_wrong_device_and_layout_are_refused(name: str) -> None:
    for key, value in arguments_of(name).items():
        if isinstance(value, Tensor):
            refuses(name, {key: value.to("meta")})
            refuses(name, {key: value.nan_to_num().to_sparse()})


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_what_is_not_contiguous_is_refused(name: str, key: str) -> None:
    good = arguments_of(name)[key]
    refuses(name, {key: good.new_zeros(*good.shape, 2)[..., 0]}, ValueError)
    refuses(name, {key: good[:1].expand_as(good)}, ValueError)


@EACH
def test_too_few_or_too_many_arguments(name: str) -> None:
    check_counts(name, arguments_of(name))


def test_results_that_nobody_asked_for() -> None:
    """The others are the same bits."""
    for name, left_out in ((FORWARD, ("mean", "factor")), (BACKWARD, ("grad_gain",))):
        arguments, asked = arguments_of(name), arguments_of(name)
        call(name, asked)
        call(name, {**arguments, **dict.fromkeys(left_out)})
        for key in outputs_of(name, 0, 0, torch.float32):
            if key in left_out:
                assert arguments[key].isnan().all()
            else:
                assert torch.equal(arguments[key], asked[key])


@EACH
def test_without_gain(name: str) -> None:
    arguments = {**arguments_of(name), "gain": None}
    call(name, arguments)
    check_outputs(name, torch.float32, arguments, arguments)


@pytest.mark.parametrize("size", [9, 700, 9000])
@pytest.mark.parametrize("threads", [2, 3, 7])
@EACH
def test_same_bits_for_any_number_of_threads(name: str, threads: int, size: int) -> None:
    filters = (256 << 10) // size + 3  # enough that threads are used
    results = []
    for count in (1, threads):
        arguments = arguments_of(name, filters=filters, size=size)
        with contract.num_threads(count):
            call(name, arguments)
        results.append([arguments[key] for key in outputs_of(name, 0, 0, torch.float32)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
