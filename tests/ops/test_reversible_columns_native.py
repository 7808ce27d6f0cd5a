"""Reversible columns' extension functions, called without Python's checks before them."""

from __future__ import annotations

import contract
import pytest
import torch
from contract import DTYPES, case_id
from poison import amid, poisoned, surroundings
from tolerances import assert_matches
from torch import Tensor
from viops import native
from viops.cases import Draw
from viops.ops.reversible_columns import reference

LEVELS = [row for row in contract.BACKENDS if row.backend == "cpu"]
EACH_LEVEL = pytest.mark.parametrize("level", LEVELS, ids=case_id)
STEP, REBUILD, BOTH, OF_X, OF_ALPHA = MODES = ("step", "rebuild", "both", "of x", "of alpha")
EACH = pytest.mark.parametrize("mode", MODES)
REST_STEP, REST_REBUILD, REST_ALONE, REST_NO_ALPHA = REST_MODES = (
    "step with rest",
    "rebuild with rest",
    "rebuild with rest alone",
    "rebuild with rest, no alpha",
)
EACH_REST = pytest.mark.parametrize("mode", REST_MODES)
LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
OUTPUTS = ("out", "x_out", "grad_x", "grad_alpha")
HALVES = (torch.bfloat16, torch.float16)


def laid_out(x: Tensor, last: bool) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def arguments_of(
    mode: str,
    shape: tuple[int, ...] = (3, 21, 5, 7),
    last: bool = False,
    dtype: torch.dtype = torch.float32,
    f_dtype: torch.dtype | None = None,
) -> dict[str, Tensor | None]:
    """Good arguments of an extension function in its order, outputs full of NaN; all amid NaN."""
    draw = Draw(dtype)
    grad_out, values = (amid(laid_out(draw.normal(*shape), last)) for _ in range(2))
    f = amid(laid_out(draw.normal(*shape, dtype=f_dtype), last))
    alpha = draw.normal(shape[1])
    alpha = amid(alpha + 0.5 * alpha.sign())
    if mode == STEP:
        return {"f": f, "x": values, "alpha": alpha, "out": poisoned(values)}
    rebuilds = mode == REBUILD
    return {
        "grad_out": grad_out,
        "values": None if mode == OF_X else values,
        "f": f if rebuilds else None,
        "alpha": alpha,
        "x_out": poisoned(values) if rebuilds else None,
        "grad_x": None if mode == OF_ALPHA else poisoned(values),
        "grad_alpha": None if mode == OF_X else poisoned(alpha),
    }


def rest_arguments_of(
    mode: str,
    shape: tuple[int, ...] = (3, 21, 5, 7),
    last: bool = False,
    dtype: torch.dtype = torch.float32,
    f_dtype: torch.dtype | None = None,
) -> dict[str, Tensor | None]:
    """The same for the functions with rests."""
    draw = Draw(dtype)
    f = amid(laid_out(draw.normal(*shape, dtype=f_dtype), last))
    values, grad_out = (amid(laid_out(draw.normal(*shape), last)) for _ in range(2))
    rest = draw.normal(*shape, dtype=torch.float32) * torch.finfo(dtype).eps / 8
    rest = amid(laid_out(rest, last))
    alpha = draw.normal(shape[1])
    alpha = amid(alpha + 0.5 * alpha.sign())
    if mode == REST_STEP:
        outputs = {"out": poisoned(values), "out_rest": poisoned(rest)}
        return {"f": f, "x": values, "x_rest": rest, "alpha": alpha, **outputs}
    has_grads = mode == REST_REBUILD
    return {
        "grad_out": grad_out if has_grads else None,
        "out": values,
        "out_rest": rest,
        "f": f,
        "alpha": None if mode == REST_NO_ALPHA else alpha,
        "x": poisoned(values),
        "x_rest": None if mode == REST_ALONE else poisoned(rest),
        "grad_x": poisoned(values) if has_grads else None,
        "grad_alpha": poisoned(alpha) if has_grads else None,
    }


def any_arguments_of(mode: str) -> dict[str, Tensor | None]:
    return rest_arguments_of(mode) if mode in REST_MODES else arguments_of(mode)


def call(arguments: dict) -> None:
    of_rest = "with_rest_" * ("out_rest" in arguments)
    way = "backward" if "grad_alpha" in arguments else "forward"
    getattr(native.require(), f"reversible_step_{of_rest}{way}")(*arguments.values())


def check_rest_outputs(arguments: dict) -> None:
    """What a call with rests has written: the plain formula's bits, and nothing else."""
    given = {k: None if v is None else v.clone() for k, v in arguments.items()}
    if "grad_alpha" in arguments:
        keys, outputs = ("out", "out_rest", "f", "alpha", "grad_out"), ("x", "x_rest", *OUTPUTS[2:])
        results = reference.step_with_rest_backward(*(given[key] for key in keys), True)
    else:
        keys, outputs = ("f", "x", "x_rest", "alpha"), ("out", "out_rest")
        results = reference.step_with_rest(*(given[key] for key in keys))
    for key, wanted in zip(outputs, results, strict=True):
        found = arguments[key]
        if found is None:
            continue
        assert surroundings(found).isnan().all()
        if key.endswith("rest"):  # of a sum in float64, which may be fused with its product
            assert not found.isnan().any()
            assert ((found - wanted).abs() <= 1e-13).all()
        elif key == "grad_alpha":
            assert_matches(key, found, wanted.double())
        else:
            assert torch.equal(found, wanted), key


def check_outputs(arguments: dict) -> None:
    """What a call has written, and that it has written nothing else."""
    wide = {k: None if v is None else v.double() for k, v in arguments.items()}
    if "out" in arguments:
        expected = {"out": reference.run_forward(wide["f"], wide["x"], wide["alpha"])}
    else:
        keys = "grad_out", "values", "f", "alpha"
        results = reference.run_backward(*(wide[key] for key in keys), True, True)
        expected = dict(zip(OUTPUTS[1:], results, strict=True))
    for key, wanted in expected.items():
        if arguments[key] is not None:
            assert_matches(key, arguments[key], wanted)
            assert surroundings(arguments[key]).isnan().all()


@EACH_LEVEL
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("size", [1, 4, 7, 8, 9, 16, 33, 100])
@LAYOUTS
@EACH
def test_writes_every_element_and_none_beside(
    mode: str, last: bool, size: int, dtype: torch.dtype, level: contract.Backend
) -> None:
    """Rows of whole vectors and a rest, that long and shorter."""
    shape = (2, size, 3, 7) if last else (2, 3, size)
    arguments = arguments_of(mode, shape, last, dtype)
    with level.enter():
        call(arguments)
    check_outputs(arguments)


@EACH_LEVEL
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize(
    ("shape", "last"),
    [
        *(((1, 2, 8192 * 2 + rest), False) for rest in (-1, 0, 1)),
        *(((1, 5, 32 * n + rest), True) for n in (1, 3) for rest in (-1, 0, 1, 5)),
        ((3, 9, 43, 33), True),  # more blocks than pieces of work
    ],
)
@pytest.mark.parametrize("mode", [STEP, REBUILD])
def test_pieces_and_blocks(
    mode: str, shape: tuple[int, ...], last: bool, dtype: torch.dtype, level: contract.Backend
) -> None:
    arguments = arguments_of(mode, shape, last, dtype)
    with level.enter():
        call(arguments)
    check_outputs(arguments)


@EACH_LEVEL
@pytest.mark.parametrize(
    "dtypes",
    [
        *((dtype, dtype) for dtype in (torch.float32, *HALVES)),
        *((torch.float32, half) for half in HALVES),
    ],
    ids=case_id,
)
@pytest.mark.parametrize(
    ("shape", "last"),
    [
        *(((2, 3, size), False) for size in (1, 2, 3, 4, 7, 8, 9, 33, 100)),
        *(((2, size, 3, 7), True) for size in (1, 2, 3, 4, 7, 8, 9, 33, 100)),
        ((1, 2, 8192 + 1), False),
        ((1, 5, 32 * 3 + 5), True),
        ((1, 20, 64 * 2048), False),  # past the caches
        ((1, 64, 5 * 8192), True),
    ],
    ids=str,
)
@EACH_REST
def test_with_rests_every_element_is_written_and_none_beside(
    mode: str,
    shape: tuple[int, ...],
    last: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
    level: contract.Backend,
) -> None:
    arguments = rest_arguments_of(mode, shape, last, *dtypes)
    if arguments["f"].numel() > 1 << 20:  # aligned, which those amid others are not
        arguments = {k: None if v is None else v.clone() for k, v in arguments.items()}
        with level.enter():
            call(arguments)
        arguments = {k: None if v is None else amid(v) for k, v in arguments.items()}
    else:
        with level.enter():
            call(arguments)
    check_rest_outputs(arguments)


@EACH_LEVEL
@pytest.mark.parametrize("half", HALVES, ids=case_id)
@pytest.mark.parametrize("size", [1, 9, 64, 67])
@LAYOUTS
@pytest.mark.parametrize("mode", [STEP, REBUILD])
def test_a_half_f(
    mode: str, last: bool, size: int, half: torch.dtype, level: contract.Backend
) -> None:
    shape = (2, size, 3, 7) if last else (2, 3, size)
    arguments = arguments_of(mode, shape, last, torch.float32, half)
    with level.enter():
        call(arguments)
    check_outputs(arguments)


@EACH_LEVEL
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@LAYOUTS
def test_what_goes_past_the_caches(last: bool, dtype: torch.dtype, level: contract.Backend) -> None:
    """Aligned and larger than the last cache's share, with the values of a small call."""
    channels = 64 if last else 20
    shape = (1, channels, 64 * (-(-(3 << 20) // (64 * channels))))
    draw = Draw(dtype)
    f, x, grad = (laid_out(draw.normal(*shape), last) for _ in range(3))
    assert f.nbytes * 5 >= 8 << 20  # a quarter of the 32 MB that a cache counts as at most
    alpha = draw.normal(channels).abs() + 0.5
    written = [torch.full_like(f, float("nan")) for _ in range(3)]
    grad_alpha = torch.full_like(alpha, float("nan"))
    with level.enter():
        native.require().reversible_step_forward(f, x, alpha, written[0])
        native.require().reversible_step_backward(
            grad, written[0], f, alpha, *written[1:], grad_alpha
        )
    expected = reference.run_forward(f.double(), x.double(), alpha.double())
    assert_matches("out", written[0], expected)
    back = reference.run_backward(
        grad.double(), written[0].double(), f.double(), alpha.double(), True, True
    )
    for name, found, wanted in zip(OUTPUTS[1:], (*written[1:], grad_alpha), back, strict=True):
        assert_matches(name, found, wanted)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0), (0, 3)])
@EACH
def test_empty_features(mode: str, shape: tuple[int, ...]) -> None:
    arguments = arguments_of(mode, shape)
    call(arguments)
    if arguments.get("grad_alpha") is not None:
        assert (arguments["grad_alpha"] == 0).all()


TENSORS = [
    (mode, key)
    for mode in (*MODES, *REST_MODES)
    for key, value in any_arguments_of(mode).items()
    if value is not None
]
NAMED = "f|x|x_rest|alpha|out|out_rest|grad_out|values|grad_x|grad_alpha"


def refuses(mode: str, changes: dict, errors: type | tuple = (ValueError, TypeError)) -> None:
    # a good tensor may be blamed for not fitting the bad one; the message names one of them
    with pytest.raises(errors, match=rf"^({NAMED}): \S"):
        call({**any_arguments_of(mode), **changes})


@pytest.mark.parametrize("value", [1.5, "text", object()], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize(("mode", "key"), TENSORS)
def test_what_is_no_tensor_is_refused(mode: str, key: str, value: object) -> None:
    refuses(mode, {key: value}, TypeError)


@pytest.mark.parametrize(
    ("mode", "key"),
    [
        (m, k)
        for m, k in TENSORS
        if m in (STEP, REBUILD) or (m in MODES and k in ("grad_out", "alpha"))
    ],
)
def test_none_is_refused(mode: str, key: str) -> None:
    if mode == REBUILD and key == "f":
        pytest.skip("without f it is the derivative")
    refuses(mode, {key: None}, TypeError)


@pytest.mark.parametrize(
    ("mode", "key"),
    [(m, k) for m, k in TENSORS if m in REST_MODES and k not in ("x_rest", "alpha")],
)
def test_with_rests_none_is_refused(mode: str, key: str) -> None:
    refuses(mode, {key: None}, TypeError)


def test_gradients_need_alpha() -> None:
    refuses(REST_REBUILD, {"alpha": None}, TypeError)


@EACH_REST
def test_float64_has_no_rests(mode: str) -> None:
    good = rest_arguments_of(mode)
    wide = {k: None if v is None else v.double() for k, v in good.items() if "rest" not in k}
    refuses(mode, wide, TypeError)


def test_sums_need_values() -> None:
    refuses(OF_ALPHA, {"values": None}, TypeError)


@pytest.mark.parametrize(("mode", "key"), TENSORS)
def test_wrong_dtype_is_refused(mode: str, key: str) -> None:
    good = any_arguments_of(mode)[key].nan_to_num()
    for dtype in (torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.complex64):
        if key == "f" and dtype is torch.bfloat16:
            continue
        refuses(mode, {key: good.to(dtype)})


def test_a_half_f_beside_other_dtypes_is_refused() -> None:
    for dtype in (torch.float64, torch.float16):
        for mode in (STEP, REBUILD):
            arguments = arguments_of(mode, dtype=dtype, f_dtype=torch.bfloat16)
            with pytest.raises(TypeError, match=r"^f: dtype bfloat16 differs"):
                call(arguments)


@pytest.mark.parametrize("change", [-1, 1, "empty"])
@pytest.mark.parametrize(("mode", "key"), TENSORS)
def test_wrong_size_is_refused(mode: str, key: str, change: int | str) -> None:
    good = any_arguments_of(mode)[key]
    for axis in range(good.dim()):
        shape = list(good.shape)
        shape[axis] = 0 if change == "empty" else shape[axis] + change
        refuses(mode, {key: good.new_zeros(shape)}, ValueError)


@pytest.mark.parametrize(("mode", "key"), TENSORS)
def test_wrong_rank_is_refused(mode: str, key: str) -> None:
    good = any_arguments_of(mode)[key].nan_to_num()
    refuses(mode, {key: good[0]}, ValueError)
    refuses(mode, {key: good.reshape(good.shape + (1,) * 12)})
    if key != "alpha" and key != "grad_alpha":
        refuses(mode, {key: good.unsqueeze(-1)}, ValueError)


@pytest.mark.parametrize(("mode", "key"), TENSORS)
def test_wrong_device_and_layout_are_refused(mode: str, key: str) -> None:
    good = any_arguments_of(mode)[key].nan_to_num()
    refuses(mode, {key: good.to("meta")})
    refuses(mode, {key: good.to_sparse()})
    refuses(mode, {key: good.new_zeros(*good.shape, 2)[..., 0]}, ValueError)
    refuses(mode, {key: good[:1].expand_as(good)}, ValueError)
    if good.dim() > 2:
        refuses(mode, {key: good.mT.contiguous().mT}, ValueError)
        refuses(mode, {key: laid_out(good, True)}, ValueError)


@EACH
def test_too_few_or_too_many_arguments(mode: str) -> None:
    values = list(any_arguments_of(mode).values())
    for bad in (values[:-1], [*values, 1], []):
        name = "reversible_step_forward" if mode == STEP else "reversible_step_backward"
        with pytest.raises(TypeError):
            getattr(native.require(), name)(*bad)
