"""Decayed attention's extension functions, called without Python's checks before them."""

from __future__ import annotations

import contract
import pytest
import torch
from contract import DTYPES, case_id
from extension_calls import EACH_NO_TENSOR, call, check_counts, check_refusal
from poison import amid, surroundings
from tolerances import assert_matches, coarser
from torch import Tensor
from viops import native
from viops.cases import Draw, amid_nan
from viops.ops.decayed_attention import cases, reference
from viops.tensors import accumulation_dtype

B, H, HEIGHT, WIDTH, D, DV = 2, 3, 4, 5, 6, 7

LEVELS = [row for row in contract.BACKENDS if row.backend == "cpu"]
FORWARD, BACKWARD = "decayed_attention_forward", "decayed_attention_backward"
EACH = pytest.mark.parametrize("name", [FORWARD, BACKWARD])
BOTH = pytest.mark.parametrize("axial", [False, True])


def outputs_of(name: str, dtype: torch.dtype, axial: bool) -> dict[str, Tensor | None]:
    """What a function writes into, full of NaN amid the same."""
    wide = accumulation_dtype(dtype)

    def blank(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return amid(torch.full(shape, float("nan"), dtype=dtype))

    def of_heads(channels: int) -> Tensor:
        return blank(B, HEIGHT, WIDTH, H, channels).permute(0, 3, 1, 2, 4)

    if name == FORWARD:
        return {
            "out": of_heads(DV),
            "logsumexp": blank(B, 1 + axial, H, HEIGHT, WIDTH, dtype=wide),
            "inner": of_heads(DV) if axial else None,
        }
    return {
        "grad_q": of_heads(D),
        "grad_k": of_heads(D),
        "grad_v": of_heads(DV),
        "grad_log_decay": blank(B, H, dtype=wide),
    }


def arguments_of(
    name: str, dtype: torch.dtype = torch.float32, axial: bool = True
) -> dict[str, object]:
    """Good arguments of an extension function, in its order."""
    draw = Draw(dtype)
    wide = accumulation_dtype(dtype)
    q, k, v, log_decay = cases.inputs(draw, B, H, HEIGHT, WIDTH, D, DV)
    log_decay = log_decay.to(wide).expand(B, H)
    sin, cos = (t.to(wide).expand(B, 1, *t.shape) for t in cases.angles(HEIGHT, WIDTH, D)(draw))
    inputs = {"q": q, "k": k, "v": v, "log_decay": log_decay, "sin": sin, "cos": cos}
    split = {"axial": axial, "scale": 0.4}
    written = outputs_of(name, dtype, axial)
    if name == FORWARD:
        return {**inputs, **split, **written}
    out, logsumexp, inner = reference.decayed_attention_forward(*inputs.values(), axial, 0.4)
    results = {"out": out, "logsumexp": logsumexp, "inner": inner if axial else None}
    (grad_out,) = cases.projected(draw, B, H, HEIGHT, WIDTH, DV, 1)
    return {"grad_out": grad_out, **inputs, **results, **split, **written}


def expected_of(name: str, a: dict) -> tuple[Tensor, ...]:
    """The reference's result for the same arguments, without an empty inner."""
    inputs = [a[key] for key in ("q", "k", "v", "log_decay", "sin", "cos")]
    split = (a["axial"], a["scale"])
    if name == FORWARD:
        outputs = reference.decayed_attention_forward(*inputs, *split)
        return outputs if a["axial"] else outputs[:2]
    results = (a["out"], a["logsumexp"], a["inner"])
    return reference.decayed_attention_backward(a["grad_out"], *inputs, *results, *split, True)


def check_outputs(name: str, dtype: torch.dtype, arguments: dict, taken: dict) -> None:
    """What a call has written into `arguments`, against the reference on what it has `taken`."""
    keys = [key for key in outputs_of(name, dtype, taken["axial"]) if arguments[key] is not None]
    for key, wanted in zip(keys, expected_of(name, taken), strict=True):
        assert arguments[key].dtype == wanted.dtype
        assert_matches(key, arguments[key], wanted, coarser(dtype, wanted.dtype))


@pytest.mark.parametrize("level", LEVELS, ids=case_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@BOTH
@EACH
def test_writes_every_element_and_none_beside(
    name: str, axial: bool, dtype: torch.dtype, level: contract.Backend
) -> None:
    arguments = arguments_of(name, dtype, axial)
    with level.enter():
        call(name, arguments)
    check_outputs(name, dtype, arguments, arguments)
    for key in outputs_of(name, dtype, axial):
        assert arguments[key] is None or surroundings(arguments[key]).isnan().all()


@BOTH
@EACH
def test_numpy_arrays_are_taken(name: str, axial: bool) -> None:
    """They have no C exchange API, so this is the way of a torch that lacks it."""
    arguments = arguments_of(name, axial=axial)
    call(name, {k: v.numpy() if isinstance(v, Tensor) else v for k, v in arguments.items()})
    check_outputs(name, torch.float32, arguments, arguments)


TENSORS = [
    (name, key)
    for name in (FORWARD, BACKWARD)
    for key, value in arguments_of(name).items()
    if isinstance(value, Tensor)
]


def refuses(
    name: str,
    changes: dict,
    errors: type | tuple = (ValueError, TypeError),
    axial: bool = True,
) -> None:
    check_refusal(name, arguments_of(name, axial=axial), changes, errors)


@EACH_NO_TENSOR
@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_what_is_no_tensor_is_refused(name: str, key: str, value: object) -> None:
    refuses(name, {key: value}, TypeError)


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_none_is_refused(name: str, key: str) -> None:
    if key == "grad_log_decay":
        pytest.skip("None is what a gradient that nobody asked for is")
    refuses(name, {key: None})  # sin without cos, cos without sin, axial without inner included


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_wrong_dtype_is_refused(name: str, key: str) -> None:
    good = arguments_of(name)[key]
    for dtype in (torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.complex64):
        refuses(name, {key: good.nan_to_num().to(dtype)})


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_wrong_rank_is_refused(name: str, key: str) -> None:
    good = arguments_of(name)[key]
    for bad in (good[0], good.unsqueeze(0), good.flatten(), good.new_zeros(())):
        refuses(name, {key: bad})
    refuses(name, {key: good.reshape(good.shape + (1,) * 12)})


@pytest.mark.parametrize("change", [-1, 1, "empty"])
@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_wrong_size_is_refused(name: str, key: str, change: int | str) -> None:
    good = arguments_of(name)[key]
    for axis in range(good.dim()):
        shape = list(good.shape)
        shape[axis] = 0 if change == "empty" else shape[axis] + change
        refuses(name, {key: good.new_zeros(shape)})


@EACH
@pytest.mark.parametrize("axis", [1, 2, 3, 4])
def test_nothing_to_attend_to_is_refused(name: str, axis: int) -> None:
    """All tensors agree, so that nothing else can be blamed."""
    arguments = arguments_of(name)
    empty = {
        key: value.narrow(axis, 0, 0)
        for key, value in arguments.items()
        if isinstance(value, Tensor) and value.dim() == 5 and key not in ("logsumexp", "sin", "cos")
    }
    refuses(name, empty, ValueError)


@EACH
def test_an_odd_number_of_channels_is_not_rotated(name: str) -> None:
    odd = {
        key: value[..., : D - 1]
        for key, value in arguments_of(name).items()
        if key in ("q", "k", "sin", "cos", "grad_q", "grad_k")
    }
    refuses(name, odd, ValueError)


@EACH
def test_inner_where_nothing_is_split_is_refused(name: str) -> None:
    inner = arguments_of(name)["inner"]
    refuses(name, {"inner": inner}, ValueError, axial=False)


@EACH
def test_wrong_device_and_layout_are_refused(name: str) -> None:
    for key, value in arguments_of(name).items():
        if isinstance(value, Tensor):
            refuses(name, {key: value.to("meta")})
            refuses(name, {key: value.nan_to_num().to_sparse()})


@pytest.mark.parametrize(
    ("name", "key"),
    [(FORWARD, "logsumexp"), (BACKWARD, "logsumexp"), (BACKWARD, "grad_log_decay")],
)
def test_what_is_taken_as_contiguous_must_be(name: str, key: str) -> None:
    good = arguments_of(name)[key]
    refuses(name, {key: good.new_zeros(*good.shape, 2)[..., 0]}, ValueError)
    refuses(name, {key: good[:1].expand_as(good)}, ValueError)


@EACH
def test_too_few_or_too_many_arguments(name: str) -> None:
    check_counts(name, arguments_of(name))


@BOTH
def test_a_gradient_that_nobody_asked_for(axial: bool) -> None:
    arguments, asked = (arguments_of(BACKWARD, axial=axial) for _ in range(2))
    call(BACKWARD, asked)
    call(BACKWARD, {**arguments, "grad_log_decay": None})
    assert arguments["grad_log_decay"].isnan().all()
    for key in ("grad_q", "grad_k", "grad_v"):
        assert torch.equal(arguments[key], asked[key])


@BOTH
@EACH
def test_without_rotation(name: str, axial: bool) -> None:
    arguments = {**arguments_of(name, axial=axial), "sin": None, "cos": None}
    if name == BACKWARD:
        results = reference.decayed_attention_forward(
            *(arguments[key] for key in ("q", "k", "v", "log_decay", "sin", "cos")), axial, 0.4
        )
        arguments |= {"out": results[0], "logsumexp": results[1]}
        arguments["inner"] = results[2] if axial else None
    call(name, arguments)
    check_outputs(name, torch.float32, arguments, arguments)


@BOTH
@EACH
def test_any_strides(name: str, axial: bool) -> None:
    """Of inputs and outputs: no axis is where a contiguous tensor has it."""
    arguments = arguments_of(name, axial=axial)
    contiguous = ("logsumexp", "grad_log_decay")
    strided = {
        key: amid_nan(value.mT).mT if isinstance(value, Tensor) and key not in contiguous else value
        for key, value in arguments.items()
    }
    call(name, strided)
    check_outputs(name, torch.float32, strided, arguments)


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@BOTH
def test_same_bits_for_any_number_of_threads(axial: bool, threads: int, heads: int) -> None:
    """Also where heads are fewer than threads, so that they are cut."""
    draw = Draw(torch.float32)
    q, k, v, log_decay = cases.inputs(draw, 1, heads, 24, 40, 40)
    sin, cos = (t.expand(1, 1, *t.shape) for t in cases.angles(24, 40, 40)(draw))

    def forward() -> tuple[Tensor, ...]:
        out, inner = torch.full_like(v, float("nan")), torch.full_like(v, float("nan"))
        logsumexp = torch.full((1, 1 + axial, heads, 24, 40), float("nan"))
        native.require().decayed_attention_forward(
            q, k, v, log_decay[None], sin, cos, axial, 0.3, out, logsumexp, inner if axial else None
        )
        return (out, logsumexp, inner) if axial else (out, logsumexp)

    with contract.num_threads(1):
        expected = forward()
    with contract.num_threads(threads):
        for result, wanted in zip(forward(), expected, strict=True):
            assert torch.equal(result, wanted)
