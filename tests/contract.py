"""What the contract test is made of: backends, and calls of cases on them.

A backend enters by a row of BACKENDS; an op enters by its rows in viops/ops/<family>/cases.py.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import viops
from cuda_on_host import builds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from viops import catalog, dispatch, native
from viops.cases import Case, bad_cases_of, cases_of

DTYPES = dispatch.FLOAT_DTYPES
FAMILY = {
    case: family.name
    for family in catalog.FAMILIES
    for case in (*cases_of(family.name), *bad_cases_of(family.name))
}
CASES = [case for family in catalog.FAMILIES for case in cases_of(family.name)]
BAD_CASES = [case for family in catalog.FAMILIES for case in bad_cases_of(family.name)]


@dataclass(frozen=True)
class Backend:
    """One way in which calls can run."""

    #: As test ids show it.
    name: str
    #: The backend in viops.catalog that it exercises, on the ops that have it; None is whichever
    #: the call takes.
    backend: str | None
    #: Makes calls run on it until the context ends.
    enter: Callable[[], AbstractContextManager]
    device: str = "cpu"

    def __str__(self) -> str:
        return self.name


@contextmanager
def _without_extension() -> Iterator[None]:
    """What a user without the compiled extension gets: the registered ops on the reference."""
    extension, choices = native.extension, dict(dispatch._choices)
    reason, level = native.load_error, native.cpu_level
    native.extension, native.load_error = None, "taken away by the test"
    native.cpu_level = None
    dispatch._choices.clear()
    try:
        yield
    finally:
        native.extension, native.load_error = extension, reason
        native.cpu_level = level
        dispatch._choices.clear()
        dispatch._choices.update(choices)


@contextmanager
def _at_cpu_level(level: str | None) -> Iterator[None]:
    """What a user at this CPU level gets; without the extension calls fail."""
    if level is None:
        with viops.use_backend("cpu"):
            yield
        return
    previous = native.require().cpu_level()
    native.set_cpu_level(level)
    try:
        yield
    finally:
        native.set_cpu_level(previous)


def _cpu_levels() -> list[str | None]:
    return [None] if native.extension is None else list(native.extension.cpu_levels())


#: Those that every op has, on CPU tensors.
BACKENDS = [
    Backend("reference", "reference", functools.partial(viops.use_backend, "reference")),
    Backend("fallback", "reference", _without_extension),
    *(
        Backend(f"cpu[{level}]", "cpu", functools.partial(_at_cpu_level, level))
        for level in _cpu_levels()
    ),
]


def _thread_orders() -> list[tuple[str, int]]:
    """The orders in which the CUDA kernels' threads run on the CPU, each with a seed."""
    if builds.kind_here() == "plain":
        return [("forward", 0), ("reverse", 0), ("random", 1)]
    return [("random", 2)]  # a sanitizer's build takes longer


@contextmanager
def _on_host(order: str, seed: int) -> Iterator[None]:
    """The CUDA kernels, built for the CPU and on its tensors."""
    device_type, extension = native.cuda_device_type, native.extension
    choices = dict(dispatch._choices)
    dispatch._choices.clear()
    native.cuda_device_type, native.extension = "cpu", builds.extension()
    builds.extension().set_thread_order(order, seed)
    try:
        with viops.use_backend("cuda"):
            yield
    finally:
        native.cuda_device_type, native.extension = device_type, extension
        dispatch._choices.clear()
        dispatch._choices.update(choices)


def _gpu_backends() -> list[Backend]:
    """On a GPU each of its backends, and what a user gets; without one what stands in for it."""
    if torch.cuda.is_available():
        forced = [
            Backend(name, name, functools.partial(viops.use_backend, name), "cuda")
            for name in ("cuda", "triton")
        ]
        return [*forced, Backend("gpu", None, nullcontext, "cuda")]
    on_host = [
        Backend(f"cuda_on_host[{order}]", "cuda", functools.partial(_on_host, order, seed))
        for order, seed in _thread_orders()
    ]
    if importlib.util.find_spec("triton") is None:
        return on_host
    interpreted = functools.partial(viops.use_backend, "triton")
    return [*on_host, Backend("triton_interpreted", "triton", interpreted)]


ALL_BACKENDS = BACKENDS + _gpu_backends()


def has(backend: Backend, op: str) -> bool:
    """Whether a public function, all of its parts included, can run on a backend."""
    parts = dispatch.PARTS.get(op, (op,))
    return backend.backend is None or all(
        backend.backend in catalog.backends_of(part) for part in parts
    )


def pairs(cases: list[Case] = CASES) -> list[tuple[Case, Backend]]:
    """Each case with each backend that its function has."""
    return [(case, backend) for case in cases for backend in ALL_BACKENDS if has(backend, case.op)]


def torch_runs(op: str, args: tuple) -> bool:
    """Whether an op of torch's own takes part in a call that is made now."""
    explanation = viops.explain(op, *args)
    return "torch" in (part.backend for part in (explanation, *explanation.others))


def rows() -> list[tuple[Case, torch.dtype, Backend]]:
    """Each case in each dtype on each backend; backends innermost, as they share the truth."""
    grouped = itertools.groupby(pairs(), key=lambda pair: pair[0])
    return [
        (case, dtype, backend)
        for case, of_case in ((case, list(group)) for case, group in grouped)
        for dtype in DTYPES
        for _, backend in of_case
    ]


def case_id(value: object) -> str | None:
    """Test ids of cases, backends and dtypes."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, (Case, Backend)) else None


def each_backend(rows: Sequence[Backend]) -> Any:
    """A fixture: each of these in turn, on for the whole test; ``backend = each_backend(...)``."""

    @pytest.fixture(params=rows, ids=case_id)
    def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
        with request.param.enter():
            yield request.param

    return backend


def main_cases(name: str = "deit") -> list[Case]:
    """For each public function the case of this name."""
    return [case for case in CASES if case.name == name]


class Result(NamedTuple):
    """What a call gives."""

    outputs: tuple[Tensor, ...]
    #: By position of the argument, None where it was not asked for.
    grads: dict[int, Tensor | None]


def as_tuple(outputs: object) -> tuple[Tensor, ...]:
    """The outputs of a call, or the tensors that one is made of; a single one is wrapped."""
    if isinstance(outputs, (tuple, list, viops.DfpTensor)):
        return tuple(outputs)
    return (outputs,)


def has_derivative(op: str) -> bool:
    """Whether a public function has one; parts of it may have none."""
    return any(
        hasattr(torch.ops.viops, f"{part}_backward") for part in dispatch.PARTS.get(op, (op,))
    )


def differentiable(args: tuple) -> list[int]:
    """Positions of the arguments that take a gradient: the floating-point tensors."""
    return [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point()]


def as_leaves(args: tuple, asked: list[int]) -> tuple:
    """The arguments, those at the positions `asked` as leaves that require a gradient."""
    return tuple(
        arg.detach().requires_grad_(i in asked)
        if isinstance(arg, Tensor) and arg.is_floating_point()
        else arg
        for i, arg in enumerate(args)
    )


def random_like(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """A gradient for each output that has one, by seed."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
        for out in outputs
        if out.is_floating_point()
    ]


def run(
    function: Callable,
    args: tuple,
    kwargs: dict,
    asked: list[int] | None = None,
    grad_outputs: Callable[[tuple[Tensor, ...]], list[Tensor]] = random_like,
) -> Result:
    """Forward, and backward to the arguments at the positions `asked` (all differentiable ones)."""
    asked = differentiable(args) if asked is None else asked
    args = as_leaves(args, asked)
    outputs = as_tuple(function(*args, **kwargs))
    carrying = [
        (out, grad)
        for out, grad in zip(
            [o for o in outputs if o.is_floating_point()], grad_outputs(outputs), strict=True
        )
        if out.requires_grad
    ]
    grads = dict.fromkeys(asked)
    if carrying and asked:
        outs, grad_outs = zip(*carrying, strict=True)
        leaves = [args[i] for i in asked]
        found = torch.autograd.grad(outs, leaves, grad_outs, allow_unused=True)
        grads = dict(zip(asked, found, strict=True))
    return Result(tuple(out.detach() for out in outputs), grads)


def public(case: Case) -> Callable:
    """The public function of a case."""
    return case.function_of(viops)


def reference(case: Case) -> Callable:
    """The reference of a case's public function: the same signature, plain PyTorch."""
    module = importlib.import_module(f"viops.ops.{FAMILY[case]}.reference")
    return case.function_of(module)


@functools.lru_cache(maxsize=2)
def truth(case: Case, dtype: torch.dtype, grad_outputs: Callable = random_like) -> Result:
    """The float64 reference on the upcast of the same inputs and the same output gradients."""
    args, kwargs = case.inputs(dtype)
    wide = tuple(
        arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args
    )
    with viops.use_backend("reference"), torch.no_grad():
        dtypes = [out.dtype for out in as_tuple(public(case)(*args, **kwargs))]

    def wide_grads(outputs: tuple[Tensor, ...]) -> list[Tensor]:
        narrow = tuple(out.detach().to(dtype) for out, dtype in zip(outputs, dtypes, strict=True))
        wanted = [out.dtype for out in outputs if out.is_floating_point()]
        return [grad.to(dtype) for grad, dtype in zip(grad_outputs(narrow), wanted, strict=True)]

    return run(reference(case), wide, kwargs, grad_outputs=wide_grads)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills what torch allocates with NaN or the largest integer: a place left unwritten shows."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            assert torch.empty(3, device=device).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(previous)


class Recorder(TorchDispatchMode):
    """Records the calls of ops in torch.ops.viops, with copies of nothing: the very arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "viops":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def registered_calls(case: Case, dtype: torch.dtype) -> list[tuple[torch._ops.OpOverload, tuple]]:
    """The registered ops that a case's forward and backward call, with their arguments."""
    args, kwargs = case.inputs(dtype)
    with Recorder() as recorder:
        run(public(case), args, kwargs)
    # a derivative is not differentiated again
    return [
        (op, as_leaves(args, []) if "_backward." in str(op) else args)
        for op, args in recorder.calls
    ]


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """torch's thread count until the context ends."""
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def batched(args: tuple, times: int) -> tuple:
    """The arguments with the batch repeated: the leading axis of those as long as the first."""
    batch = args[0].shape[0]
    return tuple(
        torch.cat([arg] * times) if isinstance(arg, Tensor) and arg.shape[0] == batch else arg
        for arg in args
    )
