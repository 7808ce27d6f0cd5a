"""Token reorganization's extension functions, called without Python's checks before them."""

from __future__ import annotations

import contract
import pytest
import torch
import viops
from contract import DTYPES, case_id
from extension_calls import EACH_NO_TENSOR, call, check_counts, check_refusal
from poison import amid, surroundings
from torch import Tensor
from viops.cases import Draw, amid_nan
from viops.ops.token_reorganization import reference
from viops.tensors import accumulation_dtype

B, H, N, D, C, P, KEEP = 2, 3, 9, 5, 7, 8, 4

LEVELS = [row for row in contract.BACKENDS if row.backend == "cpu"]


def outputs_of(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a function writes into, full of NaN or of an index that is none, amid the same."""

    def blank(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        fill = float("nan") if dtype.is_floating_point else -7
        return amid(torch.full(shape, fill, dtype=dtype), fill)

    wide = accumulation_dtype(dtype)
    return {
        "class_attention_scores_forward": {
            "scores": blank(B, P, dtype=torch.float32),
            "probabilities": blank(B, H, N, dtype=wide),
        },
        "class_attention_scores_backward": {
            "grad_q": blank(B, N, H, D).transpose(1, 2),
            "grad_k": blank(B, N, H, D).transpose(1, 2),
        },
        "reorganize_tokens_forward": {
            "tokens": blank(B, 1 + KEEP + 1, C),
            "index": blank(B, KEEP, dtype=torch.int64),
        },
        "reorganize_tokens_backward": {"grad_x": blank(B, N, C), "grad_scores": blank(B, P)},
        "restore_tokens_forward": {"x": blank(B, N, C)},
        "restore_tokens_backward": {"grad_tokens": blank(B, 1 + KEEP + 1, C)},
    }[name]


def arguments_of(name: str, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """Good arguments of an extension function, in its order."""
    draw = Draw(dtype)
    q, k = draw.normal(B, H, N, D), draw.normal(B, H, N, D)
    x, scores = draw.normal(B, N, C), draw.probabilities(B, P)
    index = draw.choices(B, P, KEEP)
    probabilities = reference.class_attention_scores_forward(q, k, 1, 0.5)[1]
    tokens = draw.normal(B, 1 + KEEP + 1, C)
    out = outputs_of(name, dtype)
    return {
        "class_attention_scores_forward": {"q": q, "k": k, "scale": 0.5, **out},
        "class_attention_scores_backward": {
            "grad_scores": draw.normal(B, P, dtype=torch.float32),
            "q": q,
            "k": k,
            "probabilities": probabilities,
            "scale": 0.5,
            **out,
        },
        "reorganize_tokens_forward": {"x": x, "scores": scores, **out},
        "reorganize_tokens_backward": {
            "grad_tokens": tokens,
            "x": x,
            "scores": scores,
            "index": index,
            **out,
        },
        "restore_tokens_forward": {"tokens": tokens, "index": index, "num_prefix": 1, **out},
        "restore_tokens_backward": {"grad_x": x, "index": index, "num_prefix": 1, **out},
    }[name]


def expected_of(name: str, a: dict) -> tuple[Tensor, ...]:
    """The reference's result for the same arguments."""
    return contract.as_tuple(
        {
            "class_attention_scores_forward": lambda: reference.class_attention_scores_forward(
                a["q"], a["k"], 1, a["scale"]
            ),
            "class_attention_scores_backward": lambda: reference.class_attention_scores_backward(
                a["grad_scores"], a["q"], a["k"], a["probabilities"], 1, a["scale"]
            ),
            "reorganize_tokens_forward": lambda: reference.reorganize_tokens_forward(
                a["x"], a["scores"], KEEP, 1, True
            ),
            "reorganize_tokens_backward": lambda: reference.reorganize_tokens_backward(
                a["grad_tokens"], a["x"], a["scores"], a["index"], 1, True
            ),
            "restore_tokens_forward": lambda: reference.restore_tokens_forward(
                a["tokens"], a["index"], P, 1
            ),
            "restore_tokens_backward": lambda: reference.restore_tokens_backward(
                a["grad_x"], a["index"], 1 + KEEP + 1, 1
            ),
        }[name]()
    )


FUNCTIONS = (
    "class_attention_scores_forward",
    "class_attention_scores_backward",
    "reorganize_tokens_forward",
    "reorganize_tokens_backward",
    "restore_tokens_forward",
    "restore_tokens_backward",
)
EACH = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.mark.parametrize("level", LEVELS, ids=case_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@EACH
def test_writes_every_element_and_none_beside(
    name: str, dtype: torch.dtype, level: contract.Backend
) -> None:
    arguments = arguments_of(name, dtype)
    with level.enter():
        call(name, arguments)
    outputs = [arguments[key] for key in outputs_of(name, dtype)]
    for out, wanted in zip(outputs, expected_of(name, arguments), strict=True):
        torch.testing.assert_close(out, wanted)
        untouched = surroundings(out)
        blank = untouched.isnan() if out.is_floating_point() else untouched == -7
        assert blank.all()


@EACH
def test_numpy_arrays_are_taken(name: str) -> None:
    """They have no C exchange API, so this is the way of a torch that lacks it."""
    arguments = arguments_of(name)
    arrays = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    call(name, arrays)
    outputs = [arguments[key] for key in outputs_of(name, torch.float32)]
    for out, wanted in zip(outputs, expected_of(name, arguments), strict=True):
        torch.testing.assert_close(out, wanted)


TENSORS = [
    (name, key)
    for name in FUNCTIONS
    for key, value in arguments_of(name).items()
    if isinstance(value, Tensor)
]


def refuses(
    name: str, key: str, value: object, errors: type | tuple = (ValueError, TypeError)
) -> None:
    check_refusal(name, arguments_of(name), {key: value}, errors, "num_prefix")


@EACH_NO_TENSOR
@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_what_is_no_tensor_is_refused(name: str, key: str, value: object) -> None:
    refuses(name, key, value, TypeError)


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_none_is_refused(name: str, key: str) -> None:
    if (name, key) == ("reorganize_tokens_backward", "grad_x"):
        pytest.skip("None is what a gradient that nobody asked for is")
    refuses(name, key, None)


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_wrong_dtype_is_refused(name: str, key: str) -> None:
    good = arguments_of(name)[key]
    others = [torch.float64, torch.int32, torch.bool, torch.complex64, torch.uint8]
    if name.startswith("reorganize") and key == "scores":
        others.remove(torch.float64)  # scores have a dtype of their own
    for dtype in others:
        refuses(name, key, good.nan_to_num().to(dtype))


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_wrong_rank_is_refused(name: str, key: str) -> None:
    good = arguments_of(name)[key]
    for bad in (good[0], good.unsqueeze(0), good.flatten(), good.new_zeros(())):
        refuses(name, key, bad)
    refuses(name, key, good.reshape(good.shape + (1,) * 12))


#: Sizes that are good too: they stand for another number of prefix tokens, or of patches.
ALSO_GOOD = {
    ("class_attention_scores_forward", "scores", 1, "shorter"),
    ("class_attention_scores_forward", "scores", 1, "empty"),
    ("class_attention_scores_backward", "grad_scores", 1, "shorter"),
    ("class_attention_scores_backward", "grad_scores", 1, "empty"),
    ("restore_tokens_forward", "x", 1, "longer"),
    ("restore_tokens_backward", "grad_x", 1, "longer"),
}


@pytest.mark.parametrize("change", ["shorter", "longer", "empty"])
@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_wrong_size_is_refused(name: str, key: str, change: str) -> None:
    good = arguments_of(name)[key]
    for axis in range(good.dim()):
        if (name, key, axis, change) in ALSO_GOOD:
            continue
        shape = list(good.shape)
        size = shape[axis]
        shape[axis] = {"shorter": max(size - 2, 0), "longer": size + 2, "empty": 0}[change]
        refuses(name, key, good.new_zeros(shape))


@EACH
def test_wrong_device_and_layout_are_refused(name: str) -> None:
    for key, value in arguments_of(name).items():
        if isinstance(value, Tensor):
            refuses(name, key, value.to("meta"))
            refuses(name, key, value.nan_to_num().to_sparse())


@EACH
def test_outputs_must_be_contiguous_where_kernels_write_rows(name: str) -> None:
    if name == "class_attention_scores_backward":
        pytest.skip("its outputs may have any strides")
    arguments = arguments_of(name)
    for key in outputs_of(name, torch.float32):
        good = arguments[key]
        spread = good.new_zeros(*good.shape, 2)[..., 0]
        refuses(name, key, spread, ValueError)
        refuses(name, key, good[:1, :1].expand_as(good), ValueError)


INDEXED = [name for name in FUNCTIONS if "index" in arguments_of(name) and "forward" not in name]
INDEXED.append("restore_tokens_forward")


@pytest.mark.parametrize("place", [-1, P, P + 1, 2**31, 2**62, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("name", INDEXED)
def test_a_place_out_of_range_is_refused(name: str, place: int) -> None:
    index = arguments_of(name)["index"].clone()
    index[1, 2] = place
    with pytest.raises(ValueError, match=rf"^index: .*{place}"):
        call(name, {**arguments_of(name), "index": index})


@pytest.mark.parametrize("name", INDEXED)
def test_a_place_given_twice_is_refused(name: str) -> None:
    index = arguments_of(name)["index"].clone()
    index[1, 2] = index[1, 0]
    with pytest.raises(ValueError, match=r"^index: .*once"):
        call(name, {**arguments_of(name), "index": index})


@pytest.mark.parametrize("num_prefix", [-1, 2, 100, 2**40, -(2**62)])
@pytest.mark.parametrize("name", ["restore_tokens_forward", "restore_tokens_backward"])
def test_a_wrong_prefix_is_refused(name: str, num_prefix: int) -> None:
    refuses(name, "num_prefix", num_prefix, ValueError)


def test_public_function_refuses_bad_places(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of("restore_tokens_forward")
    tokens, index = arguments["tokens"], arguments["index"].clone()
    for bad in (-1, P, int(index[0, 1])):
        index[0, 0] = bad
        with viops.use_backend("cpu"), pytest.raises(ValueError, match=r"^index: "):
            viops.restore_tokens(tokens, index, P)


@EACH
def test_too_few_or_too_many_arguments(name: str) -> None:
    check_counts(name, arguments_of(name))


def test_gradients_that_nobody_asked_for() -> None:
    name = "reorganize_tokens_backward"
    arguments = arguments_of(name)
    grad_x, grad_scores = expected_of(name, arguments)
    call(name, {**arguments, "grad_x": None})
    torch.testing.assert_close(arguments["grad_scores"], grad_scores)
    arguments = arguments_of(name)
    call(name, {**arguments, "x": None, "grad_scores": None})
    torch.testing.assert_close(arguments["grad_x"], grad_x)
    assert arguments["grad_scores"].isnan().all()
    call(name, {**arguments, "x": None, "grad_x": None, "grad_scores": None})


@EACH
def test_strided_inputs(name: str) -> None:
    arguments = arguments_of(name)
    expected = expected_of(name, arguments)
    outputs = outputs_of(name, torch.float32)
    strided = {
        key: amid_nan(value.mT).mT
        if isinstance(value, Tensor)
        and key not in {*outputs, "probabilities"}
        and value.is_floating_point()
        else value
        for key, value in arguments.items()
    }
    call(name, strided)
    for key, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(strided[key], wanted)
