"""`python -m viops doctor`: every op on every backend against the reference in float64."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import viops

from .. import catalog, dispatch, native, triton_runtime
from ..cases import Case, Inputs, cases_of
from ..checks import FLOAT_DTYPES
from .backends import absence, device_of, environment, forced_backend
from .console import print_heading, print_table
from .info import cuda_part

#: What "small input" means: elements in the arguments of one call.
_MAX_ELEMENTS = 20_000
#: The same in Triton's interpreter, which takes seconds for what is larger.
_MAX_INTERPRETED = 1_000
#: Values beyond it, or not finite, are the test suite's: half types cannot hold the results.
_MAX_MAGNITUDE = 100.0
#: Largest norm of the error over norm of the result.
_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}
#: Smallest norm that an error is set in relation to: a gradient that is zero by cancellation, as
#: that of a softmax over one token, is off by the rounding of its terms, not by its own.
_SMALLEST_NORM = 1e-3
_REINSTALL = (
    "pip install --force-reinstall --no-deps --no-cache-dir viops (in a checkout: "
    "pip install --force-reinstall --no-deps .)"
)


class Problem(NamedTuple):
    """Something wrong, and what the user can do about it."""

    what: str
    mend: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """doctor takes no arguments."""


def run(args: argparse.Namespace) -> int:
    """Prints what it finds; 0 where nothing is wrong, 1 otherwise."""
    problems = list(_examine_installation())
    print_heading("Environment")
    print_table(("variable", "value"), environment())
    problems += _examine_forced()
    problems += _examine_gpu()
    print_heading("Every op on every backend, forward and backward, against float64")
    rows = []
    for family in catalog.FAMILIES:
        cases = cases_of(family.name)
        for op in dict.fromkeys(case.op for case in cases):
            for backend in catalog.BACKENDS:
                verdict, found = _examine(op, backend, cases)
                rows.append((op, backend, verdict))
                problems += found
    print_table(("op", "backend", "result"), rows)
    if not problems:
        print("\nNothing is wrong.")
        return 0
    print_heading(f"Wrong: {len(problems)}")
    for number, problem in enumerate(problems, 1):
        print(f"  {number}. {problem.what}\n     To mend it: {problem.mend}")
    return 1


def _examine_installation() -> Iterator[Problem]:
    """Prints the state of the extension and yields what is wrong with it."""
    extension = native.extension
    if extension is None:
        print(f"extension: {native.load_error}")
        level = os.environ.get("VIOPS_CPU_LEVEL")
        if level and "VIOPS_CPU_LEVEL" in str(native.load_error):
            mend = f"unset VIOPS_CPU_LEVEL, which is {level!r}, or set it to a level named here"
        else:
            mend = f"{_REINSTALL}; it needs a C++ compiler where there is no wheel for this Python"
        forced = forced_backend()
        if forced == "cpu" or (forced is None and dispatch.strict()):
            effect = "so every op raises BackendError"
        else:
            effect = "so every op runs on plain PyTorch"
        yield Problem(f"{native.load_error}, {effect}", mend)
        return
    level, levels = extension.cpu_level(), extension.cpu_levels()
    threads, build = extension.threads(), extension.build_info()
    print(f"extension: {extension.__file__}")
    print(f"CPU level: {level} of {', '.join(levels)}")
    print(f"OpenMP runtime: {threads['runtime']}, {threads['max_threads']} threads")
    print(f"CUDA part: {cuda_part(build)}")
    if threads["runtime"] == "none" and torch.get_num_threads() > 1:
        yield Problem(
            "the CPU kernels found no OpenMP runtime of torch's and run on one thread",
            "install a torch that is built with OpenMP, as those from pip are: "
            "python -c 'import torch; print(torch.__config__.parallel_info())' says",
        )
    elif threads["runtime"] != "none" and threads["max_threads"] != torch.get_num_threads():
        yield Problem(
            f"the CPU kernels run on {threads['max_threads']} threads, torch on "
            f"{torch.get_num_threads()}: they use different OpenMP runtimes",
            "import torch before packages that bring an OpenMP runtime of their own, and unset "
            "LD_PRELOAD where it names one",
        )
    if torch.cuda.is_available() and not build["cuda_architectures"]:
        if any("cuda" in family.backends for family in catalog.FAMILIES):
            yield Problem(
                "there is a CUDA device, but the extension was built without CUDA: "
                f"{build['cuda_reason']}",
                f"put nvcc on PATH, then {_REINSTALL} --config-settings=cmake.define.VIOPS_CUDA=ON",
            )


def _examine_gpu() -> Iterator[Problem]:
    """Ops that run on plain PyTorch on a GPU of this machine, though there are kernels for it."""
    if not torch.cuda.is_available() or forced_backend() is not None:
        return
    for family in catalog.FAMILIES:
        for op in family.ops:
            if op in dispatch.call_refusals:  # torch's own op is its kernel there
                continue
            backends = [name for name in ("cuda", "triton") if name in catalog.backends_of(op)]
            reasons = {n: dispatch.refusal(op, n, "cuda", torch.float32) for n in backends}
            if backends and None not in reasons.values():
                text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
                mend = "mend the reason given here; python -m viops info shows what is installed"
                yield Problem(f"{op} runs on plain PyTorch on the GPU: {text}", mend)


def _examine_forced() -> Iterator[Problem]:
    """Whether the backend that VIOPS_BACKEND forces can run the ops."""
    forced = forced_backend()
    if forced is None or (forced == "cpu" and native.extension is None):  # that is said already
        return
    refused: dict[str, list[str]] = {}
    for family in catalog.FAMILIES:
        for op in family.ops:
            reason = absence(op, forced)
            if reason is not None:
                refused.setdefault(reason, []).append(op)
    for reason, ops in refused.items():
        yield Problem(
            f"VIOPS_BACKEND={forced} makes every call of {', '.join(ops)} raise BackendError: "
            f"{reason}",
            "unset VIOPS_BACKEND, or set it to a backend that is there for these ops",
        )


def _examine(op: str, backend: str, cases: tuple[Case, ...]) -> tuple[str, list[Problem]]:
    """Runs the op's small cases on one backend; the verdict, and what is wrong."""
    reason = absence(op, backend)
    if reason is not None:
        return f"not there: {reason}", []
    device = device_of(backend)
    assert device is not None  # absence would have said so
    interpreted = backend == "triton" and triton_runtime.INTERPRETED
    most = _MAX_INTERPRETED if interpreted else _MAX_ELEMENTS
    count, worst = 0, 0.0
    for dtype in FLOAT_DTYPES:
        if absence(op, backend, dtype) is not None:
            continue
        for case in cases:
            inputs = case.inputs(dtype, device)
            if case.op != op or not _is_ordinary(inputs, most):
                continue
            call = f"{op}, case {case.name!r}, {dtype}, on {backend}"
            try:
                with warnings.catch_warnings():
                    if interpreted:  # NumPy's, where a GPU divides by zero in silence
                        warnings.simplefilter("ignore", RuntimeWarning)
                    deviations = _deviations(case, inputs, backend)
            except viops.BackendError:  # the backend leaves calls of such shapes to others
                continue
            except Exception as raised:  # whatever a broken build raises is the finding
                return "FAILED", [Problem(f"{call}: {type(raised).__name__}: {raised}", _REINSTALL)]
            for name, error, allowed in deviations:
                worst = max(worst, error / allowed)
                if not error <= allowed:
                    text = f"{name} has relative error {error:.1e}, {allowed:.0e} is allowed"
                    return "FAILED", [Problem(f"{call}: {text}", _mend_wrong(backend))]
            count += 1
    if count == 0:
        return "FAILED", [Problem(f"{op} on {backend}: no case could be run", _REINSTALL)]
    return f"ok: {count} calls, largest error {worst:.0%} of the allowed", []


def _mend_wrong(backend: str) -> str:
    report = "report it with the output of python -m viops info"
    if backend == "reference":
        return f"reinstall torch, whose own operators these are, or {report}"
    level = "VIOPS_CPU_LEVEL=v2 chooses simpler kernels, " if backend == "cpu" else ""
    return f"{level}VIOPS_BACKEND=reference avoids them; {_REINSTALL}; if it persists, {report}"


def _is_ordinary(inputs: Inputs, most: int) -> bool:
    """Whether the arguments have at most so many elements, none huge, infinite or NaN."""
    tensors = [arg for arg in inputs.args if isinstance(arg, Tensor)]
    if sum(tensor.numel() for tensor in tensors) > most:
        return False
    floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return all(bool(tensor.abs().amax() <= _MAX_MAGNITUDE) for tensor in floats)


class _Deviation(NamedTuple):
    """How far one output or gradient is from the reference in float64."""

    name: str
    error: float
    allowed: float


def _deviations(case: Case, inputs: Inputs, backend: str) -> list[_Deviation]:
    """Of each output and gradient; an integer result deviates by 0 or infinity."""
    function = case.function_of(viops)
    generator = torch.Generator().manual_seed(1)

    def draw_like(out: Tensor) -> Tensor:
        return torch.randn(out.shape, generator=generator).to(out.device, out.dtype)

    with viops.use_backend(backend):
        leaves, outputs = _call(function, inputs)
        grads = {i: draw_like(out) for i, out in enumerate(outputs) if out.requires_grad}
        roots = [outputs[i] for i in grads]
        gradients = _gradients(roots, leaves, list(grads.values()))
    with viops.use_backend("reference"):
        kwargs = {name: _to_float64(value) for name, value in inputs.kwargs.items()}
        exact_inputs = Inputs(tuple(map(_to_float64, inputs.args)), kwargs)
        exact_leaves, exact_outputs = _call(function, exact_inputs)
        roots = [exact_outputs[i] for i in grads]
        exact_grads = [
            grad.to(root.dtype) for grad, root in zip(grads.values(), roots, strict=True)
        ]
        exact_gradients = _gradients(roots, exact_leaves, exact_grads)
    names = [f"output {i}" for i in range(len(outputs))]
    names += [f"gradient {i}" for i in range(len(gradients))]
    results, expected = (*outputs, *gradients), (*exact_outputs, *exact_gradients)

    dtypes = [leaf.dtype for leaf in leaves] + ([case.precision] if case.precision else [])
    coarsest = max((_TOLERANCE[dtype] for dtype in dtypes), default=0.0)
    deviations = []
    for name, result, right in zip(names, results, expected, strict=True):
        own = 0.0 if result is None else _TOLERANCE.get(result.dtype, 0.0)
        deviations.append(_Deviation(name, _relative_error(result, right), max(coarsest, own)))
    return deviations


def _gradients(
    roots: list[Tensor], leaves: list[Tensor], grads: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """To each leaf; none where no output has a derivative."""
    if not roots or not leaves:
        return ()
    return torch.autograd.grad(roots, leaves, grads, allow_unused=True)


def _call(function: Callable, inputs: Inputs) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The floating-point arguments as leaves of the graph, and the outputs."""
    args = [
        arg.detach().requires_grad_()
        if isinstance(arg, Tensor) and arg.is_floating_point()
        else arg
        for arg in inputs.args
    ]
    outputs = function(*args, **inputs.kwargs)
    leaves = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    if isinstance(outputs, viops.DfpTensor):
        return leaves, tuple(outputs)
    return leaves, outputs if isinstance(outputs, tuple) else (outputs,)


def _to_float64(arg: object) -> object:
    return arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg


def _relative_error(result: Tensor | None, right: Tensor | None) -> float:
    """Norm of the error over norm of the result; infinity where they cannot be compared."""
    if result is None or right is None:
        return 0.0 if result is right else float("inf")
    if result.shape != right.shape:
        return float("inf")
    if not right.is_floating_point():
        return 0.0 if torch.equal(result, right) else float("inf")
    result, right = result.detach(), right.detach()
    rounded = right.to(result.dtype)
    finite = rounded.isfinite()
    if not torch.equal(result[~finite].nan_to_num(), rounded[~finite].nan_to_num()):
        return float("inf")  # what overflows in the truth does so in the result
    difference = (result[finite].double() - right[finite]).norm().item()
    return difference / max(right[finite].norm().item(), _SMALLEST_NORM)
