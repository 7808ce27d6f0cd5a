"""The contract: every op, on every backend, on every case, against the reference in float64."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable
from contextlib import nullcontext

import contract
import pytest
import torch
import viops
from contract import BAD_CASES, DTYPES, Backend, case_id, main_cases, pairs, rows
from tolerances import assert_matches, coarser
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from viops import catalog, dispatch
from viops.cases import BadCase, Case

pytestmark = pytest.mark.filterwarnings("ignore:.*taken away by the test:RuntimeWarning")

ALL = pytest.mark.parametrize(("case", "dtype", "backend"), rows(), ids=case_id)
MAIN = pytest.mark.parametrize(("case", "backend"), pairs(main_cases()), ids=case_id)
PRIME = pytest.mark.parametrize(("case", "backend"), pairs(main_cases("prime")), ids=case_id)
WITH_DERIVATIVE = pytest.mark.parametrize(
    ("case", "backend"),
    [pair for pair in pairs(main_cases("prime")) if contract.has_derivative(pair[0].op)],
    ids=case_id,
)


def check(
    case: Case, backend: Backend, dtype: torch.dtype, result: contract.Result, **options
) -> None:
    """The result of a call against the truth."""
    expected = contract.truth(case, dtype, **options)
    # plain PyTorch rounds in between to the dtype of the inputs; kernels accumulate in float32
    precision = dtype if backend.backend == "reference" else None
    if case.precision is not None:
        precision = coarser(case.precision, precision or case.precision)

    def allowed(tensor: Tensor) -> torch.dtype | None:
        return (
            coarser(precision, tensor.dtype) if precision and tensor.is_floating_point() else None
        )

    assert len(result.outputs) == len(expected.outputs)
    for i, (out, wanted) in enumerate(zip(result.outputs, expected.outputs, strict=True)):
        assert_matches(f"output {i}", out, wanted, allowed(out))
    for i, wanted in expected.grads.items():
        grad = result.grads[i]
        if wanted is None:
            assert grad is None or not grad.any(), f"gradient {i} should be none or zero"
            continue
        assert grad is not None, f"gradient {i} is missing"
        assert_matches(f"gradient {i}", grad, wanted, allowed(grad))


@ALL
def test_matches_float64(case: Case, dtype: torch.dtype, backend: Backend) -> None:
    args, kwargs = case.inputs(dtype, backend.device)
    with backend.enter(), contract.poisoned_memory():
        result = contract.run(contract.public(case), args, kwargs)
    check(case, backend, dtype, result)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@MAIN
def test_result_dtypes_and_layouts_are_the_references(
    case: Case, backend: Backend, dtype: torch.dtype
) -> None:
    args, kwargs = case.inputs(dtype, backend.device)
    with backend.enter():
        outputs = contract.as_tuple(contract.public(case)(*args, **kwargs))
    expected = contract.as_tuple(contract.reference(case)(*args, **kwargs))
    assert [out.dtype for out in outputs] == [out.dtype for out in expected]
    assert [out.stride() for out in outputs] == [out.stride() for out in expected]


def transposed(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of which no axis but those of size 1 is where a contiguous tensor has it."""
    return [grad.mT.contiguous().mT for grad in contract.random_like(outputs)]


def of_sums_along_the_last_axis(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients as out.sum(-1) hands them over."""
    return [grad[..., :1].expand(grad.shape) for grad in contract.random_like(outputs)]


def of_a_sum(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients as out.sum() hands them over: one value, expanded."""
    return [out.new_ones(()).expand(out.shape) for out in outputs if out.is_floating_point()]


def of_a_sum_dense(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [grad.contiguous() for grad in of_a_sum(outputs)]


def of_a_mean_over_the_batch(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients expanded along the leading axis only."""
    grads = contract.random_like(outputs)
    return [grad[:1].expand(grad.shape) for grad in grads]


def amid_others(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients that are slices of something larger, at an odd offset, with a step."""
    grads = contract.random_like(outputs)
    return [torch.stack([grad * 0, grad], dim=-1)[..., 1] for grad in grads]


@pytest.mark.parametrize(
    "grad_outputs",
    [transposed, of_sums_along_the_last_axis, of_a_mean_over_the_batch, amid_others],
)
@WITH_DERIVATIVE
def test_output_gradients_of_any_strides(case: Case, backend: Backend, grad_outputs) -> None:
    args, kwargs = case.inputs(torch.float32, backend.device)
    with backend.enter(), contract.poisoned_memory():
        result = contract.run(contract.public(case), args, kwargs, grad_outputs=grad_outputs)
    check(case, backend, torch.float32, result, grad_outputs=grad_outputs)


@WITH_DERIVATIVE
def test_gradients_of_a_sum(case: Case, backend: Backend) -> None:
    """No truth to compare with: what normalises has no gradient to its sum but rounding errors."""
    if backend.backend == "reference":
        pytest.skip("PyTorch's own operations, which may sum in another order")
    args, kwargs = case.inputs(torch.float32, backend.device)
    with backend.enter():
        results = [
            contract.run(contract.public(case), args, kwargs, grad_outputs=grad_outputs)
            for grad_outputs in (of_a_sum, of_a_sum_dense)
        ]
    for i, grad in results[1].grads.items():
        torch.testing.assert_close(results[0].grads[i], grad, rtol=0, atol=0)


@WITH_DERIVATIVE
def test_gradients_are_there_only_where_asked(case: Case, backend: Backend) -> None:
    args, kwargs = case.inputs(torch.float32, backend.device)
    positions = contract.differentiable(args)
    # of many arguments, as the tensors of lists are, not all subsets: there are thousands
    counts = range(len(positions)) if len(positions) < 8 else (0, 1, len(positions) - 1)
    with backend.enter(), contract.poisoned_memory():
        everything = contract.run(contract.public(case), args, kwargs)
        for count in counts:
            for asked in itertools.combinations(positions, count):
                some = contract.run(contract.public(case), args, kwargs, asked=list(asked))
                for i in asked:
                    torch.testing.assert_close(some.grads[i], everything.grads[i], rtol=0, atol=0)


@MAIN
def test_without_grad(case: Case, backend: Backend) -> None:
    args, kwargs = case.inputs(torch.float32, backend.device)
    leaves = contract.as_leaves(args, contract.differentiable(args))
    expected = contract.truth(case, torch.float32).outputs
    for mode in (torch.no_grad(), torch.inference_mode()):
        with backend.enter(), mode:
            outputs = contract.as_tuple(contract.public(case)(*leaves, **kwargs))
            assert not any(out.requires_grad for out in outputs)
            for out, wanted in zip(outputs, expected, strict=True):
                assert_matches("output", out, wanted)


@MAIN
def test_inputs_are_left_as_they_were(case: Case, backend: Backend) -> None:
    args, kwargs = case.inputs(torch.float32, backend.device)
    copies = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    with backend.enter():
        contract.run(contract.public(case), args, kwargs)
    for arg, copy in zip(args, copies, strict=True):
        if isinstance(arg, Tensor):
            assert torch.equal(arg, copy)


WITH_KERNELS = [
    (case, backend)
    for case, backend in pairs(main_cases("large") + main_cases("long"))
    if backend.backend != "reference"
]


def assert_same_bits(result: contract.Result, other: contract.Result) -> None:
    for a, b in zip(
        (*result.outputs, *result.grads.values()),
        (*other.outputs, *other.grads.values()),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("case", "backend"), WITH_KERNELS, ids=case_id)
def test_same_bits_run_after_run(case: Case, backend: Backend, threads: int) -> None:
    args, kwargs = case.inputs(torch.float32, backend.device)
    with backend.enter():
        # torch's own attention repeats its bits on a GPU only in this mode
        needs_mode = backend.device == "cuda" and contract.torch_runs(case.op, args)
    mode = contract.poisoned_memory() if needs_mode else nullcontext()
    with backend.enter(), contract.num_threads(threads), mode:
        first = contract.run(contract.public(case), args, kwargs)
        check(case, backend, torch.float32, first)
        for _ in range(3):
            assert_same_bits(contract.run(contract.public(case), args, kwargs), first)


@pytest.mark.parametrize("threads", [1, 3, 7])
@PRIME
def test_any_number_of_threads(case: Case, backend: Backend, threads: int) -> None:
    args, kwargs = case.inputs(torch.float32, backend.device)
    with backend.enter(), contract.num_threads(threads), contract.poisoned_memory():
        result = contract.run(contract.public(case), args, kwargs)
    check(case, backend, torch.float32, result)


@pytest.mark.parametrize(("case", "backend"), pairs(BAD_CASES), ids=case_id)
def test_bad_input_names_the_argument(case: BadCase, backend: Backend) -> None:
    args, kwargs = case.inputs(torch.float32, backend.device)
    with backend.enter(), pytest.raises(case.error, match=rf"^{case.argument}: \S"):
        contract.public(case)(*args, **kwargs)


@WITH_DERIVATIVE
def test_second_derivative_is_right_or_raises(case: Case, backend: Backend) -> None:
    args, kwargs = case.inputs(torch.float64, backend.device)
    args = contract.as_leaves(args, contract.differentiable(args))
    leaves = [args[i] for i in contract.differentiable(args)]

    def second_derivatives(function) -> list[Tensor]:
        outputs = [o for o in contract.as_tuple(function(*args, **kwargs)) if o.requires_grad]
        grads = torch.autograd.grad(
            sum(o.square().sum() for o in outputs), leaves, create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    with backend.enter():
        try:
            found = second_derivatives(contract.public(case))
        except RuntimeError as error:
            told = re.search("second derivative|is not implemented", str(error))
            if backend.name == "reference" or not told:
                raise
            return
    for grad, wanted in zip(found, second_derivatives(contract.reference(case)), strict=True):
        torch.testing.assert_close(grad, wanted)


@WITH_DERIVATIVE
def test_first_derivative_with_create_graph(case: Case, backend: Backend) -> None:
    args, kwargs = case.inputs(torch.float32, backend.device)
    positions = contract.differentiable(args)
    expected = contract.truth(case, torch.float32)
    args = contract.as_leaves(args, positions)
    with backend.enter():
        outputs = contract.as_tuple(contract.public(case)(*args, **kwargs))
        grads = torch.autograd.grad(
            [out for out in outputs if out.is_floating_point()],
            [args[i] for i in positions],
            contract.random_like(outputs),
            create_graph=True,
        )
    for i, grad in zip(positions, grads, strict=True):
        assert_matches(f"gradient {i}", grad, expected.grads[i])


@WITH_DERIVATIVE
def test_forward_mode_is_right_or_raises(case: Case, backend: Backend) -> None:
    args, kwargs = case.inputs(torch.float64, backend.device)
    positions = contract.differentiable(args)
    primals = tuple(args[i] for i in positions)
    tangents = tuple(contract.random_like(primals))

    def tangents_of(function) -> list[Tensor]:
        def of_primals(*values: Tensor) -> tuple[Tensor, ...]:
            full = list(args)
            for i, value in zip(positions, values, strict=True):
                full[i] = value
            outputs = contract.as_tuple(function(*full, **kwargs))
            return tuple(out for out in outputs if out.is_floating_point())

        return list(torch.func.jvp(of_primals, primals, tangents)[1])

    with backend.enter():
        try:
            found = tangents_of(contract.public(case))
        except RuntimeError as error:
            told = re.search("forward-mode|forward AD|jvp", str(error))
            if backend.name == "reference" or not told:
                raise
            return
    for tangent, wanted in zip(found, tangents_of(contract.reference(case)), strict=True):
        torch.testing.assert_close(tangent, wanted)


@PRIME
def test_vmap(case: Case, backend: Backend) -> None:
    calls = [case.inputs(torch.float32, backend.device, seed) for seed in range(3)]
    tensors = [i for i, arg in enumerate(calls[0].args) if isinstance(arg, Tensor)]
    kwargs = calls[0].kwargs

    def function(*args: object) -> tuple[Tensor, ...]:
        return contract.as_tuple(contract.public(case)(*args, **kwargs))

    with backend.enter():
        expected = [function(*call.args) for call in calls]
        for dim in (0, 1, -1):
            stacked = tuple(
                torch.stack([call.args[i] for call in calls], dim=dim) if i in tensors else arg
                for i, arg in enumerate(calls[0].args)
            )
            in_dims = tuple(dim if i in tensors else None for i in range(len(stacked)))
            found = torch.vmap(function, in_dims)(*stacked)
            for i, out in enumerate(found):
                wanted = torch.stack([outputs[i] for outputs in expected])
                torch.testing.assert_close(out, wanted)
        # one mapped argument at a time, the others shared
        for i in tensors:
            args = list(calls[0].args)
            args[i] = torch.stack([call.args[i] for call in calls])
            in_dims = tuple(0 if j == i else None for j in range(len(args)))
            found = torch.vmap(function, in_dims)(*args)
            for j, call in enumerate(calls):
                single = list(calls[0].args)
                single[i] = call.args[i]
                for out, wanted in zip(found, function(*single), strict=True):
                    torch.testing.assert_close(out[j], wanted)


@WITH_DERIVATIVE
def test_func_grad(case: Case, backend: Backend) -> None:
    args, kwargs = case.inputs(torch.float64, backend.device)
    positions = tuple(contract.differentiable(args))

    def loss(*args: object) -> Tensor:
        outputs = contract.as_tuple(contract.public(case)(*args, **kwargs))
        return sum(out.square().sum() for out in outputs if out.is_floating_point())

    with backend.enter():
        leaves = contract.as_leaves(args, list(positions))
        expected = torch.autograd.grad(loss(*leaves), [leaves[i] for i in positions])
        for grad, wanted in zip(torch.func.grad(loss, positions)(*args), expected, strict=True):
            torch.testing.assert_close(grad, wanted)
        # a gradient for each sample: grad under vmap
        stacked = tuple(torch.stack([a, a]) if isinstance(a, Tensor) else a for a in args)
        in_dims = tuple(0 if isinstance(a, Tensor) else None for a in args)
        grads = torch.vmap(torch.func.grad(loss, positions), in_dims)(*stacked)
        for grad, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad[0], wanted)
            torch.testing.assert_close(grad[1], wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
@WITH_DERIVATIVE
def test_checkpoint(case: Case, backend: Backend, use_reentrant: bool) -> None:
    args, kwargs = case.inputs(torch.float32, backend.device)
    positions = contract.differentiable(args)

    def function(*args: object) -> object:
        return contract.public(case)(*args, **kwargs)

    def checkpointed(*args: object) -> object:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=use_reentrant)

    def grads(function) -> list[Tensor]:
        leaves = contract.as_leaves(args, positions)
        outputs = contract.as_tuple(function(*leaves))
        sum(out.square().sum() for out in outputs if out.is_floating_point()).backward()
        return [leaves[i].grad for i in positions]

    with backend.enter():
        for grad, wanted in zip(grads(checkpointed), grads(function), strict=True):
            assert torch.equal(grad, wanted)


@PRIME
def test_flops_are_counted(case: Case, backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("plain PyTorch, whose operations torch counts itself")
    args, kwargs = case.inputs(torch.float32, backend.device)
    with (
        backend.enter(),
        contract.Recorder() as recorder,
        FlopCounterMode(display=False) as counter,
    ):
        contract.run(contract.public(case), args, kwargs)
        if viops.explain(case.op, *args).backend == "torch":
            pytest.skip("torch's own op runs, whose operations torch counts itself")
    counted = {op for counts in counter.get_flop_counts().values() for op in counts}
    assert recorder.calls
    for op, _ in recorder.calls:
        assert op.overloadpacket in flop_registry
        assert op.overloadpacket in counted


@pytest.mark.parametrize(
    ("case", "backend"),
    [(case, backend) for case, backend in pairs() if backend.name != "reference"],
    ids=case_id,
)
def test_each_way_to_a_kernel_gives_the_same_bits(case: Case, backend: Backend) -> None:
    args, kwargs = case.inputs(torch.float32, backend.device)
    with backend.enter(), contract.poisoned_memory():
        plain = contract.run(contract.public(case), args, kwargs)
        with contract.Recorder():
            registered = contract.run(contract.public(case), args, kwargs)
        with torch.no_grad():
            inferred = contract.as_tuple(contract.public(case)(*args, **kwargs))
    assert_same_bits(registered, plain)
    assert_same_bits(contract.Result(inferred, {}), plain._replace(grads={}))


@pytest.mark.parametrize("case", main_cases(), ids=case_id)
def test_the_reference_has_the_same_signature(case: Case) -> None:
    public, reference = contract.public(case), contract.reference(case)
    assert inspect.signature(public).parameters == inspect.signature(reference).parameters


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@MAIN
def test_calls_run_where_explain_says(
    case: Case, backend: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What explain names is what runs: each backend's functions note that they were called."""
    ran: list[tuple[str, str]] = []

    def noting(op: str, name: str, function: Callable) -> Callable:
        def noted(*args: object) -> object:
            ran.append((op, name))
            return function(*args)

        return noted

    for op, by_name in dispatch._kernels.items():
        for name, kernels in by_name.items():
            noted = kernels._replace(forward=noting(op, name, kernels.forward))
            if kernels.infer:
                noted = noted._replace(infer=noting(op, name, kernels.infer))
            monkeypatch.setitem(by_name, name, noted)
    monkeypatch.setattr(dispatch, "_choices", {})
    args, kwargs = case.inputs(dtype, backend.device)
    with backend.enter():
        explanation = viops.explain(case.op, *args)
        contract.public(case)(*args, **kwargs)
    expected = {
        (part.op, part.backend)
        for part in (explanation, *explanation.others)
        if part.backend in ("cpu", "cuda", "triton")
    }
    assert {call for call in ran if call[1] != "reference"} == expected
    if backend.backend == "cpu":
        assert expected or dtype is not torch.float32 or case.op == "softmax_attention"
    elif backend.backend in ("cuda", "triton"):
        assert expected == {
            (part, backend.backend) for part in dispatch.PARTS.get(case.op, (case.op,))
        }


def test_every_op_has_the_cases_that_the_contract_is_run_on() -> None:
    for family in catalog.FAMILIES:
        names = {(case.op, case.name) for case in contract.cases_of(family.name)}
        for op in family.ops:
            for name in ("deit", "large", "prime", "long", "strided", "expanded", "no batch"):
                assert (op, name) in names
            assert any(case.op == op for case in contract.bad_cases_of(family.name))


def test_the_comparison_can_fail() -> None:
    truth = torch.randn(50, dtype=torch.float64)
    result = truth.float()
    assert_matches("same", result, truth)
    wrong = result.clone()
    wrong[7] += 1e-3
    spoilt = result.clone()
    spoilt[7] = torch.nan
    scaled = result * (1 + 1e-5)
    for bad in (wrong, spoilt, scaled, result[:-1]):
        with pytest.raises(AssertionError):
            assert_matches("different", bad, truth)
    with pytest.raises(AssertionError):
        assert_matches("integers", torch.tensor([1, 2]), torch.tensor([1, 3]))
