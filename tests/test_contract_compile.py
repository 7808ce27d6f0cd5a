"""The contract of the registered ops: opcheck, torch.compile and torch.export, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import contract
import pytest
import torch
from contract import DTYPES, case_id, main_cases
from torch import Tensor
from viops import catalog, dispatch
from viops.cases import Case

PRIME_CASES = pytest.mark.parametrize("case", main_cases("prime"), ids=case_id)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@PRIME_CASES
def test_opcheck(case: Case, dtype: torch.dtype) -> None:
    calls = contract.registered_calls(case, dtype)
    if not calls and case.op in catalog.family_of(case.op).ops:
        reason = dispatch.refusal(case.op, "cpu", "cpu", dtype)
        assert reason is not None
        pytest.skip(f"torch's own op serves this dtype: {reason}")
    assert calls
    for op, args in calls:
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("case", contract.CASES, ids=case_id)
def test_fake_agrees_with_every_case(case: Case) -> None:
    for op, args in contract.registered_calls(case, torch.float32):
        # opcheck cannot clone some tensors that have strides and no elements
        args = [
            arg.as_strided(arg.shape, [0] * arg.dim())
            if isinstance(arg, Tensor) and not arg.numel()
            else arg
            for arg in args
        ]
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_equal_results(result: contract.Result, expected: contract.Result) -> None:
    for a, b in zip(
        (*result.outputs, *result.grads.values()),
        (*expected.outputs, *expected.grads.values()),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@PRIME_CASES
def test_compile_without_graph_break_or_recompile(case: Case, grad: bool, fresh_dynamo) -> None:
    args, kwargs = case.inputs(torch.float32)
    function = contract.public(case)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    asked = contract.differentiable(args) if grad else []

    def compare(times: int) -> None:
        inputs = contract.batched(args, times)
        result = contract.run(compiled, inputs, kwargs, asked)
        assert_equal_results(result, contract.run(function, inputs, kwargs, asked))

    compare(1)  # compiled for this very batch
    compare(2)  # compiled for any batch
    with torch._dynamo.config.patch(error_on_recompile=True):
        for times in (3, 4, 5):
            compare(times)


@PRIME_CASES
def test_inductor(case: Case, fresh_dynamo) -> None:
    args, kwargs = case.inputs(torch.float32)
    function = contract.public(case)
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    result = contract.run(compiled, args, kwargs)
    assert_equal_results(result, contract.run(function, args, kwargs))


@PRIME_CASES
def test_export(case: Case) -> None:
    args, kwargs = case.inputs(torch.float32)

    class Model(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            rest = iter(tensors)
            full = [next(rest) if isinstance(arg, Tensor) else arg for arg in args]
            return contract.as_tuple(contract.public(case)(*full, **kwargs))

    def tensors_of(args: tuple) -> tuple[Tensor, ...]:
        return tuple(arg for arg in args if isinstance(arg, Tensor))

    batch = torch.export.Dim("batch", min=2)
    doubled = contract.batched(args, 2)
    shapes = (
        tuple(
            {0: batch} if twice.shape != once.shape else {}
            for once, twice in zip(tensors_of(args), tensors_of(doubled), strict=True)
        ),
    )
    program = torch.export.export(Model(), tensors_of(args), dynamic_shapes=shapes)
    targets = {str(node.target) for node in program.graph.nodes}
    assert any(target.startswith("viops.") for target in targets)
    other = tensors_of(contract.batched(args, 3))
    for out, wanted in zip(program.module()(*other), Model()(*other), strict=True):
        torch.testing.assert_close(out, wanted)
