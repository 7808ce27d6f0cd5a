"""Batch channel norm's extension functions, called without Python's checks before them.

On the CPU at each of its levels, and the CUDA kernels: on a GPU where there is one, else executed
on the CPU by tests/cuda_on_host.
"""

from __future__ import annotations

from collections.abc import Callable

import contract
import pytest
import torch
import viops
from contract import DTYPES, case_id
from extension_calls import call
from poison import all_moved, amid, surroundings
from tolerances import assert_matches
from torch import Tensor
from viops.cases import Draw
from viops.ops.batch_channel_norm import cases, reference
from viops.tensors import accumulation_dtype

B, C, S, G = 3, 6, 35, 2
CONSTANTS, OF_BATCH, ESTIMATE = reference.CONSTANTS, reference.OF_BATCH, reference.ESTIMATE

KERNELS = [row for row in contract.ALL_BACKENDS if row.backend in ("cpu", "cuda")]
ON_CPU = [row for row in KERNELS if row.backend == "cpu"]
CUDA = [row for row in KERNELS if row.backend == "cuda"][:1]
EACH_BACKEND = pytest.mark.parametrize("backend", [*ON_CPU, *CUDA], ids=case_id)
FORWARD, BACKWARD = "batch_channel_norm_forward", "batch_channel_norm_backward"
EACH = pytest.mark.parametrize("name", [FORWARD, BACKWARD])
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    return x.mT.contiguous().mT if channels_last else x


def forward_inputs(
    x: Tensor, num_groups: int, mode: int, relu: bool, residual: Tensor | None
) -> dict[str, object]:
    """Good inputs of forward, in its order."""
    draw = Draw(accumulation_dtype(x.dtype), seed=3)
    channels = x.shape[1]

    def positive(size: int) -> Tensor:
        return draw.normal(size).abs() + 0.5

    given = mode != OF_BATCH
    return {
        "x": x,
        "residual": residual,
        "mean": draw.normal(channels) if given else None,
        "var": positive(channels) if given else None,
        "speed": torch.full((1,), 0.3, dtype=draw.dtype) if mode == ESTIMATE else None,
        "bn_weight": positive(channels),
        "bn_bias": draw.normal(channels),
        "weight": positive(num_groups),
        "bias": draw.normal(num_groups),
        "eps": 1e-5,
        "relu": relu,
        "mode": mode,
    }


OUTPUTS = "y shift plane_mean plane_square mean_out var_out group_mean group_rstd".split()
GRADIENTS = "grad_x grad_residual grad_bn_weight grad_bn_bias grad_weight grad_bias".split()


def blank_like(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: amid(torch.full_like(t, float("nan"))) for key, t in tensors.items()}


def scratch_of(x: Tensor, pieces: int = 4) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    return amid(torch.full((pieces + 1, 2, *x.shape[:2]), float("nan"), dtype=dtype))


def wide(arguments: dict[str, object]) -> list[object]:
    return [v.double() if isinstance(v, Tensor) else v for v in arguments.values()]


def expected_forward(inputs: dict[str, object]) -> dict[str, Tensor]:
    """In float64."""
    outputs = reference.batch_channel_norm_forward(*wide(inputs))
    return dict(zip(OUTPUTS, outputs, strict=True))


def backward_inputs(inputs: dict[str, object], count: int | None = None) -> dict[str, object]:
    """Good inputs of backward, in its order, for what `forward_inputs` made."""
    x = inputs["x"]
    dtype = accumulation_dtype(x.dtype)
    saved = {k: v.to(dtype) for k, v in expected_forward(inputs).items() if k != "y"}
    # a little along ones and x: sums are not near zero, nor much larger than what is left of them
    grad_y = (Draw(x.dtype, seed=4).normal(*x.shape) + 0.02 * x + 0.02).to(x.dtype)
    grad_y = laid_out(grad_y.contiguous(), x.stride(1) == 1)
    of_batch = inputs["mode"] == OF_BATCH
    return {
        "grad_y": grad_y,
        "x": x,
        "residual": inputs["residual"] if inputs["relu"] else None,
        **{k: saved[k] for k in ("shift", "plane_mean", "plane_square")},
        "mean": saved["mean_out"],
        "var": saved["var_out"],
        **{k: inputs[k] for k in ("bn_weight", "bn_bias", "weight", "bias")},
        "group_mean": saved["group_mean"],
        "group_rstd": saved["group_rstd"],
        "eps": inputs["eps"],
        "relu": inputs["relu"],
        "count": (x.shape[0] * x.shape[2] if of_batch else 0) if count is None else count,
        "totals": None,
    }


def expected_backward(inputs: dict[str, object]) -> dict[str, Tensor]:
    """In float64."""
    grads = reference.batch_channel_norm_backward(*wide(inputs), True)
    return dict(zip(GRADIENTS, grads, strict=True))


def blank_outputs(name: str, inputs: dict[str, object]) -> dict[str, Tensor]:
    """What a function writes into, full of NaN amid the same."""
    x = inputs["x"]
    dtype = accumulation_dtype(x.dtype)
    expected = expected_forward(inputs) if name == FORWARD else expected_backward(inputs)
    like_x = ("y", "grad_x", "grad_residual")
    return blank_like(
        {k: torch.empty_like(x) if k in like_x else v.to(dtype) for k, v in expected.items()}
    )


def arguments_of(
    name: str,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    mode: int = OF_BATCH,
    relu: bool = True,
    shape: tuple[int, int, int] = (B, C, S),
    num_groups: int = G,
) -> dict[str, object]:
    """Good arguments of an extension function, in its order, scratch included."""
    x = laid_out(Draw(dtype).normal(*shape), channels_last)
    residual = laid_out(Draw(dtype, seed=2).normal(*shape), channels_last)
    inputs = forward_inputs(x, num_groups, mode, relu, residual)
    if name == BACKWARD:
        inputs = backward_inputs(inputs)
    return {**inputs, **blank_outputs(name, inputs), "scratch": scratch_of(x)}


def run(name: str, arguments: dict, backend: contract.Backend) -> dict[str, Tensor | None]:
    """What a call writes."""
    arguments = all_moved(arguments, backend.device)
    with backend.enter():
        call(name, arguments)
    keys = OUTPUTS if name == FORWARD else GRADIENTS
    return {key: arguments[key] for key in keys}


def check(name: str, arguments: dict, backend: contract.Backend) -> None:
    """A call against the reference in float64 on the same."""
    inputs = dict(list(arguments.items())[: 12 if name == FORWARD else 18])
    expected = expected_forward(inputs) if name == FORWARD else expected_backward(inputs)
    outputs = run(name, arguments, backend)
    for key, wanted in expected.items():
        out = outputs[key]
        if out is not None:
            assert_matches(key, out, wanted)
            assert surroundings(out).isnan().all(), f"{key}: written outside of it"


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("mode", [CONSTANTS, OF_BATCH, ESTIMATE])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@LAYOUTS
@EACH
@EACH_BACKEND
def test_writes_every_element_and_none_beside(
    backend: contract.Backend,
    name: str,
    channels_last: bool,
    relu: bool,
    mode: int,
    dtype: torch.dtype,
) -> None:
    check(name, arguments_of(name, dtype, channels_last, mode, relu), backend)


#: Planes of several pieces, whose last is short; channels of several blocks; one of all.
SHAPES = [(2, 3, 12289), (1, 2, 4099), (2, 520, 70), (3, 6, 701), (2, 1100, 1), (5, 6, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@LAYOUTS
@EACH
@EACH_BACKEND
def test_sizes_that_are_cut(
    backend: contract.Backend, name: str, channels_last: bool, shape: tuple[int, int, int]
) -> None:
    num_groups = 1 if shape[1] < 6 else 2
    arguments = arguments_of(
        name, channels_last=channels_last, shape=shape, num_groups=num_groups, relu=False
    )
    check(name, arguments, backend)


@pytest.mark.parametrize("name", [FORWARD, BACKWARD])
@pytest.mark.parametrize("pieces", [2, 3, 9, 40])
@LAYOUTS
@pytest.mark.parametrize("backend", CUDA, ids=case_id)
def test_any_room_for_pieces(
    backend: contract.Backend, channels_last: bool, pieces: int, name: str
) -> None:
    arguments = arguments_of(name, channels_last=channels_last, shape=(1, 2, 40000), num_groups=1)
    check(name, {**arguments, "scratch": scratch_of(arguments["x"], pieces)}, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@LAYOUTS
@EACH
@EACH_BACKEND
def test_whole_vectors(
    backend: contract.Backend, name: str, channels_last: bool, dtype: torch.dtype
) -> None:
    """Tensors that begin at them, and are whole ones: elsewhere in this file none are."""
    arguments = arguments_of(name, dtype, channels_last, shape=(2, 16, 48))
    aligned = {
        k: v.clone() if isinstance(v, Tensor) and v.dim() == 3 else v for k, v in arguments.items()
    }
    inputs = dict(list(aligned.items())[: 12 if name == FORWARD else 18])
    expected = expected_forward(inputs) if name == FORWARD else expected_backward(inputs)
    for key, out in run(name, aligned, backend).items():
        assert_matches(key, out, expected[key])


@LAYOUTS
@EACH_BACKEND
def test_relu_passes_the_gradient_where_forward_was_positive(
    backend: contract.Backend, channels_last: bool
) -> None:
    forward = arguments_of(FORWARD, channels_last=channels_last, shape=(2, 32, 999))
    outputs = run(FORWARD, forward, backend)
    backward = arguments_of(BACKWARD, channels_last=channels_last, shape=(2, 32, 999))
    saved = {k: outputs[k].cpu() for k in OUTPUTS}
    renamed = {**saved, "mean": saved["mean_out"], "var": saved["var_out"]}
    backward |= {k: v for k, v in renamed.items() if k in backward}
    grads = run(BACKWARD, backward, backend)
    wanted = torch.where(saved["y"] > 0, backward["grad_y"], 0.0)
    assert torch.equal(grads["grad_residual"].cpu(), wanted)
    # the same where nobody asks for it
    alone = {**backward, "grad_residual": None, "grad_x": torch.empty_like(backward["grad_x"])}
    assert_matches("grad_x", run(BACKWARD, alone, backend)["grad_x"], grads["grad_x"].double())


@EACH_BACKEND
def test_totals_of_several_processes(backend: contract.Backend) -> None:
    arguments = arguments_of(BACKWARD)
    own = run(BACKWARD, arguments, backend)
    totals = torch.stack([own["grad_bn_bias"], own["grad_bn_weight"]]).cpu()
    again = {**arguments_of(BACKWARD), "totals": totals}
    for key, grad in run(BACKWARD, again, backend).items():
        assert torch.equal(grad, own[key]), key
    others = {**arguments_of(BACKWARD), "totals": totals * 2.5 + 1, "count": 400}
    check(BACKWARD, others, backend)


@EACH
@EACH_BACKEND
@pytest.mark.parametrize("shape", [(0, 6, 5), (3, 6, 0)], ids=str)
@pytest.mark.parametrize("mode", [CONSTANTS, OF_BATCH, ESTIMATE])
def test_no_values(
    mode: int, shape: tuple[int, int, int], backend: contract.Backend, name: str
) -> None:
    check(name, arguments_of(name, mode=mode, shape=shape), backend)


@LAYOUTS
@pytest.mark.parametrize("mode", [OF_BATCH, CONSTANTS])
@EACH_BACKEND
def test_far_from_zero(backend: contract.Backend, mode: int, channels_last: bool) -> None:
    """Means of 1000 deviations, in float32; the given ones are near them, as running means are."""
    x = Draw(torch.float32).normal(2, 8, 5000) + 1000
    inputs = forward_inputs(laid_out(x, channels_last), 2, mode, False, None)
    if mode == CONSTANTS:
        inputs["mean"] = inputs["mean"] * 0.1 + 1000
    outputs = blank_outputs(FORWARD, inputs)
    check(FORWARD, {**inputs, **outputs, "scratch": scratch_of(x)}, backend)


@EACH_BACKEND
def test_a_shift_far_from_the_values(backend: contract.Backend) -> None:
    """Which given means may be: squares are summed about the mean of each piece itself."""
    x = Draw(torch.float32).normal(2, 4, 9000) + 1000
    inputs = forward_inputs(x, 2, ESTIMATE, False, None)
    arguments = {**inputs, **blank_outputs(FORWARD, inputs), "scratch": scratch_of(x)}
    outputs, expected = run(FORWARD, arguments, backend), expected_forward(inputs)
    for key in ("plane_mean", "plane_square", "mean_out", "var_out"):
        assert_matches(key, outputs[key], expected[key])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mode", [CONSTANTS, OF_BATCH])
@EACH_BACKEND
def test_nan_stays_where_it_is(backend: contract.Backend, mode: int, channels_last: bool) -> None:
    arguments = arguments_of(FORWARD, channels_last=channels_last, mode=mode)
    arguments["x"][1, 4, 7] = float("nan")
    y = run(FORWARD, arguments, backend)["y"].cpu()
    if mode == OF_BATCH:  # the channel, and so all that shares a group with it
        assert y[:, 3:].isnan().all()
        assert not y[:, :3].isnan().any()
    else:
        assert y[1, 3:].isnan().all()
        assert y.isnan().sum() == 3 * S


@pytest.mark.parametrize("shape", [(7, 12, 301), (3, 8, 9001), (2, 1100, 3)], ids=str)
@LAYOUTS
@EACH_BACKEND
def test_an_image_in_eval_is_alone(
    backend: contract.Backend, channels_last: bool, shape: tuple[int, int, int]
) -> None:
    arguments = arguments_of(
        FORWARD, channels_last=channels_last, mode=CONSTANTS, shape=shape, num_groups=4
    )
    together = run(FORWARD, arguments, backend)["y"]
    per_image = ("x", "residual", "y", "plane_mean", "plane_square", "group_mean", "group_rstd")
    for b in range(shape[0]):
        own = {k: v[b : b + 1] if k in per_image else v for k, v in arguments.items()}
        own["scratch"] = scratch_of(own["x"])
        alone = run(FORWARD, own, backend)["y"]
        if backend.backend == "cpu":  # planes are cut by their size alone
            assert torch.equal(alone[0], together[b])
        else:
            torch.testing.assert_close(alone[0], together[b], rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("shape", [(1, 6, 9001), (5, 64, 999), (2, 1100, 170)], ids=str)
@LAYOUTS
@EACH
def test_same_bits_for_any_number_of_threads(
    name: str, channels_last: bool, shape: tuple[int, int, int]
) -> None:
    with contract.num_threads(1):
        arguments = arguments_of(name, channels_last=channels_last, shape=shape)
        expected = run(name, arguments, ON_CPU[-1])
    for threads in (2, 3, 7):
        with contract.num_threads(threads):
            arguments = arguments_of(name, channels_last=channels_last, shape=shape)
            for key, out in run(name, arguments, ON_CPU[-1]).items():
                assert torch.equal(out, expected[key]), key


@pytest.mark.parametrize("activation", [None, "relu"])
@EACH_BACKEND
def test_gradient_of_the_residual(backend: contract.Backend, activation: str | None) -> None:
    """The contract's calls take gradients of positional arguments alone."""

    def gradients(function: Callable, dtype: torch.dtype, device: str) -> list[Tensor]:
        x, *others = (
            t.to(device, dtype) if isinstance(t, Tensor) else t
            for t in cases.inputs(Draw(torch.float32), 2, 3, 6, 5, 7)
        )
        residual = Draw(torch.float32, seed=1).normal(3, 6, 7, 5).mT.to(device, dtype)
        grad = Draw(torch.float32, seed=2).normal(3, 6, 5, 7).to(device, dtype)
        x.requires_grad_(), residual.requires_grad_()
        y = function(x, *others, training=True, residual=residual, activation=activation)
        return list(torch.autograd.grad(y, (x, residual), grad))

    expected = gradients(reference.batch_channel_norm, torch.float64, "cpu")
    with backend.enter(), contract.poisoned_memory():
        found = gradients(viops.batch_channel_norm, torch.float32, backend.device)
    for what, grad, wanted in zip(("x", "residual"), found, expected, strict=True):
        assert_matches(what, grad, wanted)


@pytest.mark.parametrize("momentum", [0.1, 1.0, torch.tensor([0.25])], ids=["0.1", "1", "tensor"])
@pytest.mark.parametrize("estimate", [False, True])
@EACH_BACKEND
def test_running_statistics_move(
    backend: contract.Backend, estimate: bool, momentum: float | Tensor
) -> None:
    def moved(function: Callable, dtype: torch.dtype, device: str) -> list[Tensor]:
        arguments = [
            t.to(device, dtype, copy=True) if isinstance(t, Tensor) else t
            for t in cases.inputs(Draw(torch.float32), 2, 3, 6, 5, 7, running=True)
        ]
        for step in range(3):
            arguments[0] = arguments[0] * 1.5 + step
            y = function(*arguments, training=True, estimate=estimate, momentum=momentum)
        return [y, *arguments[4:6]]

    expected = moved(reference.batch_channel_norm, torch.float64, "cpu")
    with backend.enter():
        found = moved(viops.batch_channel_norm, torch.float32, backend.device)
    for what, value, wanted in zip(("y", "mean", "var"), found, expected, strict=True):
        assert_matches(what, value, wanted)
