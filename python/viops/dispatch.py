"""Which backend runs a call, why the others do not, and how a call reaches it.

A public function goes one of two ways.  In plain eager mode it calls the backend's function itself
(through an autograd.Function where a gradient is asked for), because every layer between costs
microseconds.  Under torch.compile, export, a functorch transform, a dispatch mode or a tensor
subclass it calls the op registered with torch, which then calls the same backend's function.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import catalog, native, triton_runtime
from .checks import FLOAT_DTYPES

#: The torch library that holds the schemas of all ops.
library = torch.library.Library("viops", "FRAGMENT")


class Kernels(NamedTuple):
    """One backend's functions for one op."""

    forward: Callable
    backward: Callable
    #: Called with the tensors' device type and dtype; the reason why this backend cannot, or None.
    refuses: Callable[[str, torch.dtype], str | None]
    #: Forward that gives a tuple of the first result alone, where that costs less.
    infer: Callable | None = None


def no_derivative(*args: object) -> None:
    """The backward of an op that has none; it is never called."""
    raise NotImplementedError("the op has no derivative")


class BackendError(RuntimeError):
    """The backend that was asked for cannot run this call."""


_kernels: dict[str, dict[str, Kernels]] = {}
_choices: dict[tuple, tuple[str, Kernels]] = {}
_warned: set[tuple[str, str]] = set()
_forced: str | None = None


def _check_backend(name: str, source: str) -> str:
    if name not in catalog.BACKENDS:
        raise ValueError(f"{source}: {name!r} is not a backend; there are: {catalog.BACKENDS}")
    return name


def _from_environment() -> str | None:
    name = os.environ.get("VIOPS_BACKEND", "")
    if name not in catalog.BACKENDS and sys.argv[:1] == ["-m"]:
        return None  # `python -m viops` is being located; its command line says it in one line
    return _check_backend(name, "VIOPS_BACKEND") if name else None


_forced_by_environment = _from_environment()
_forced = _forced_by_environment
_forced_stack: list[list[str]] = []
_forced_lock = threading.Lock()


def register(op: str, backend: str, kernels: Kernels) -> None:
    """Adds a backend's functions for an op."""
    _kernels.setdefault(op, {})[_check_backend(backend, "backend")] = kernels


def refuses_native(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the C++ kernels on the CPU cannot run such a call, or None."""
    if native.extension is None:
        return native.load_error
    if device_type != "cpu":
        return f"needs tensors on the CPU, got {device_type}"
    return refuses_dtype(device_type, dtype)


def refuses_cuda(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the CUDA kernels cannot run such a call, or None."""
    if device_type != native.cuda_device_type:
        return f"needs tensors on a GPU, got {device_type}"
    return native.cuda_error() or refuses_dtype(device_type, dtype)


def refuses_triton(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run such a call, or None."""
    if triton_runtime.INTERPRETED:
        if device_type != "cpu":
            return f"TRITON_INTERPRET=1 needs tensors on the CPU, got {device_type}"
    elif device_type != "cuda":
        return f"needs tensors on a GPU, got {device_type}"
    else:
        reason = triton_runtime.device_error()
        if reason is not None:
            return reason
    return triton_runtime.load_error() or refuses_dtype(device_type, dtype)


def refuses_dtype(device_type: str, dtype: torch.dtype) -> str | None:
    """Why an op over floating-point tensors cannot take this dtype, or None."""
    if dtype not in FLOAT_DTYPES:
        return f"needs one of {', '.join(map(str, FLOAT_DTYPES))}, got {dtype}"
    return None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes every op run on this backend, or raise BackendError where it cannot.

    `name` is one of viops.catalog.BACKENDS.  The choice holds for the process, all threads
    included, until the block ends: autograd runs backward on threads of its own.  The environment
    variable VIOPS_BACKEND sets it from the start.  Code that torch.compile has compiled keeps
    calling the registered op, which honours it too.
    """
    global _forced
    entry = [_check_backend(name, "name")]
    with _forced_lock:
        _forced_stack.append(entry)
        _forced = name
    try:
        yield
    finally:
        with _forced_lock:  # blocks of several threads may end in any order
            _forced_stack[:] = [other for other in _forced_stack if other is not entry]
            _forced = _forced_stack[-1][0] if _forced_stack else _forced_by_environment


def strict() -> bool:
    """Whether a fallback to the reference is an error: VIOPS_STRICT=1."""
    return os.environ.get("VIOPS_STRICT", "0") not in ("", "0")


def refusal(
    op: str, backend: str, device_type: str, dtype: torch.dtype, forced: str | None = None
) -> str | None:
    """Why this backend cannot run such a call of the op, or None where it can."""
    kernels = _kernels[op].get(backend)
    if kernels is None:
        return catalog.lacks_of(op).get(backend, "not registered")
    reason = kernels.refuses(device_type, dtype)
    if reason is None and backend == "triton" != forced and triton_runtime.INTERPRETED:
        return "Triton's interpreter runs only where it is asked for: viops.use_backend('triton')"
    return reason


def choose(op: str, device_type: str, dtype: torch.dtype) -> tuple[str, Kernels]:
    """The name and functions of the backend that runs such a call of the op."""
    forced = _forced  # read once: another thread may change it meanwhile
    key = (op, device_type, dtype, forced)
    choice = _choices.get(key)
    if choice is None:
        choice = _choose(op, device_type, dtype, forced)
        if choice[0] != "reference" or forced == "reference":
            _choices[key] = choice
    return choice


def _choose(
    op: str, device_type: str, dtype: torch.dtype, forced: str | None
) -> tuple[str, Kernels]:
    if forced is not None:
        reason = refusal(op, forced, device_type, dtype, forced)
        if reason is not None:
            raise BackendError(f"{op}: backend {forced!r} was asked for, but {reason}")
        return forced, _kernels[op][forced]
    reasons: list[str] = []
    for backend in catalog.BACKENDS:
        reason = refusal(op, backend, device_type, dtype)
        if reason is None:
            if backend == "reference":
                report_fallback(op, "the reference", reasons)
            return backend, _kernels[op][backend]
        reasons.append(f"{backend}: {reason}")
    raise BackendError(f"{op}: no backend can run this call; {'; '.join(reasons)}")


def report_fallback(op: str, stand_in: str, reasons: list[str]) -> None:
    """Warns, once, that no kernel of ours runs this op; an error where VIOPS_STRICT is set."""
    text = f"{op} runs on {stand_in}, without a kernel of its own: {'; '.join(reasons)}"
    if strict():
        raise BackendError(f"{text} (VIOPS_STRICT is set)")
    if (op, text) not in _warned:
        _warned.add((op, text))
        warnings.warn(text, RuntimeWarning, stacklevel=_stacklevel_of_user())


def _stacklevel_of_user() -> int:
    """For warnings.warn in the calling function: the first frame neither ours nor torch's."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("viops", "torch")):
        frame = frame.f_back
        level += 1
    return level


class Explanation(NamedTuple):
    """What viops.explain returns; str() gives it as text."""

    op: str
    backend: str | None
    #: For each backend that does not run the call: why.
    reasons: dict[str, str]
    #: The same for the other ops that the function calls.
    others: tuple[Explanation, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'no backend'} runs this call"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join((*lines, *map(str, self.others)))


#: Ops whose choice depends on more than device and dtype: called with a backend and the call's
#: tensors, each gives the reason why that backend does not run the call, or None.
call_refusals: dict[str, Callable[..., str | None]] = {}

#: Public functions that are made of several ops.
PARTS = {
    "depthwise_norm": ("mix_shift",),
    "class_attention": ("class_attention_scores", "softmax_attention"),
    "integer_conv2d": ("integer_conv2d", "quantize_dfp"),
    "integer_linear": ("integer_conv2d", "quantize_dfp"),
}


def explain(op: str, *args: object) -> Explanation:
    """Says which backend runs a call of the op with these arguments, and why the others do not.

    `op` is the name of a public function, `args` its arguments; the tensors among them decide.
    Nothing is run.

    >>> print(viops.explain("reorganize_tokens", x, scores, 137))
    """
    first, *others = (_explain_part(part, *args) for part in PARTS.get(op, (op,)))
    return first._replace(others=tuple(others))


def _explain_part(op: str, *args: object) -> Explanation:
    catalog.family_of(op)
    tensors = [arg for arg in pytree.tree_leaves(args) if isinstance(arg, Tensor)]
    if not tensors:
        raise TypeError("args: there is no tensor among them; accepted are the op's own arguments")
    chosen = None
    reasons: dict[str, str] = {}
    for backend in catalog.BACKENDS:
        if op in call_refusals:
            reason = call_refusals[op](backend, *tensors)
        else:
            reason = refusal(op, backend, tensors[0].device.type, tensors[0].dtype, _forced)
        if reason is None and _forced not in (None, backend):
            reason = f"backend {_forced!r} is forced"
        if reason is None and chosen is not None:
            reason = f"{chosen} is preferred"
        if reason is None:
            chosen = backend
        else:
            reasons[backend] = reason
    return Explanation(op, chosen, reasons)


_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_jit_tracing = torch._C._get_tracing_state
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
_forward_ad = torch.autograd.forward_ad


def is_plain_eager(*tensors: Tensor) -> bool:
    """Whether a call on these tensors may go straight to a kernel, round torch's dispatcher."""
    if (
        _is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _functorch_level() is not None
        or _jit_tracing() is not None
        or _forward_ad._current_level >= 0
    ):
        return False
    for tensor in tensors:
        if (
            type(tensor) not in _PLAIN_TYPES
            or tensor.is_neg()
            or tensor.is_meta
            or tensor._is_zerotensor()
            or _is_legacy_batched(tensor)
        ):
            return False
    return True


def forced_backend() -> str | None:
    """The backend that use_backend or VIOPS_BACKEND asks for."""
    return _forced


def is_reference_forced() -> bool:
    """Whether use_backend("reference") holds: public functions are then all plain PyTorch."""
    return _forced == "reference"


def _refuse_tangents(op: str, args: tuple) -> None:
    """Raises where a tensor carries a forward-mode tangent, which the kernels would drop."""
    for arg in args:
        if not isinstance(arg, Tensor):
            continue
        try:
            has_tangent = _forward_ad.unpack_dual(arg).tangent is not None
        except RuntimeError:  # a fake tensor that torch.compile traces inside jvp
            has_tangent = True
        if has_tangent:
            raise NotImplementedError(
                f"{op}: the kernels have no forward-mode derivative; "
                'viops.use_backend("reference") has'
            )


class _RefuseSecondDerivative(torch.autograd.Function):
    """Runs a backward op so that differentiating its result raises, where it else would be zero.

    `markers` are tensors that the result depends on and the op does not take.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, num_markers: int, *args: object) -> object:
        return getattr(torch.ops.viops, op)(*args[num_markers:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: object) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"{ctx.op}: the kernels have no second derivative; "
            'viops.use_backend("reference") around forward and backward has'
        )


class Op:
    """One op as torch and the public function see it: schema, kernel, fake and derivative."""

    def __init__(
        self,
        name: str,
        schema: str,
        fake: Callable,
        backward_schema: str | None = None,
        backward_fake: Callable | None = None,
        setup: Callable | None = None,
        backward: Callable | None = None,
        vmap: str = "fold",
    ) -> None:
        """Registers the op and its backward.

        Args:
            name: the op's name; its backward is ``<name>_backward``.
            schema, backward_schema: arguments and results, from the opening parenthesis on.
            fake, backward_fake: the same without data.
            setup, backward: what torch.autograd.Function calls setup_context and backward;
                `backward` calls `run_backward`.  None, all four of them: it has no derivative.
                None, the schema and the fake alone: the backward is an op with functions of its
                own, which stands registered.
            vmap: "fold" where all tensors lead with the batch, so that a mapped axis can join it;
                "loop" calls the op for each entry of a mapped axis.
        """
        self.name = name

        def checked_fake(*args: Any) -> Any:
            if _forward_ad._current_level >= 0:
                _refuse_tangents(name, args)
            return fake(*args)

        self.has_derivative = backward is not None
        parts: list[tuple] = [(name, schema, self._forward, checked_fake)]
        if self.has_derivative and backward_schema is not None:
            parts.append((f"{name}_backward", backward_schema, self._backward, backward_fake))
        for op, full_schema, kernel, op_fake in parts:
            library.define(op + full_schema)
            library.impl(op, kernel, "CompositeExplicitAutograd")
            torch.library.register_fake(f"viops::{op}", op_fake, lib=library)
            _VMAP_RULES[vmap](op)
        self._registered = getattr(torch.ops.viops, name).default
        if backward is None or setup is None:
            return
        torch.library.register_autograd(
            f"viops::{name}", backward, setup_context=setup, lib=library
        )
        self._setup = setup
        # A Function with a setup_context of its own works under functorch, but inspects the
        # signature of forward at each call; the eager one leaves that out.
        self._eager_function = _function(name, forward=self._run_eager, backward=backward)
        self._transformed_function = _function(
            name,
            generate_vmap_rule=True,
            forward=self._run,
            setup_context=setup,
            backward=backward,
        )
        self._registered_backward = getattr(torch.ops.viops, f"{name}_backward").default

    def __call__(self, *args: Any) -> Any:
        """Runs the op on these positional arguments, by the shortest way that is right here."""
        return self._call(args, self._forward)

    def first(self, *args: Any) -> Tensor:
        """The first result alone: where no backward follows the others need not be made."""
        return self._call(args, self._infer)[0]

    def _call(self, args: tuple, forward: Callable) -> Any:
        """`forward` is what runs where nothing is to be differentiated."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if is_plain_eager(*tensors):
            if self.has_derivative and torch.is_grad_enabled():
                for tensor in tensors:
                    if tensor.requires_grad:
                        return self._eager_function.apply(*args)
            return forward(*args)
        if (
            self.has_derivative
            and not _is_compiling()
            and (_functorch_level() is not None or _forward_ad._current_level >= 0)
        ):
            return self._transformed_function.apply(*args)
        return self._registered(*args)

    def run_backward(self, *args: Any, markers: tuple[Tensor, ...] = ()) -> Any:
        """Runs the backward op on these positional arguments, within `backward`.

        `markers`: what else the gradients depend on, so that their derivative raises there too.
        """
        if torch.is_grad_enabled():
            op = f"{self.name}_backward"
            return _RefuseSecondDerivative.apply(op, len(markers), *markers, *args)
        if is_plain_eager(*(arg for arg in args if isinstance(arg, Tensor))):
            return self._backward(*args)
        return self._registered_backward(*args)

    def _run_eager(self, ctx: Any, *args: Any) -> Any:
        output = self._forward(*args)
        self._setup(ctx, args, output)
        return output

    def _run(self, *args: Any) -> Any:
        if is_plain_eager(*(arg for arg in args if isinstance(arg, Tensor))):
            return self._forward(*args)
        return self._registered(*args)

    def _forward(self, *args: Any) -> Any:
        if _forward_ad._current_level >= 0:
            _refuse_tangents(self.name, args)
        first = args[0]
        _, kernels = choose(self.name, first.device.type, first.dtype)
        return kernels.forward(*args)

    def _infer(self, *args: Any) -> Any:
        first = args[0]
        _, kernels = choose(self.name, first.device.type, first.dtype)
        return (kernels.infer or kernels.forward)(*args)

    def _backward(self, *args: Any) -> Any:
        first = args[0]
        _, kernels = choose(self.name, first.device.type, first.dtype)
        return kernels.backward(*args)


def _function(name: str, **members: object) -> type[torch.autograd.Function]:
    """A torch.autograd.Function with these members; those that can be called are static."""
    static = {key: staticmethod(m) if callable(m) else m for key, m in members.items()}
    return type(name, (torch.autograd.Function,), static)


def _register_vmap_by_folding(op: str) -> None:
    """A vmap rule for an op whose tensors all lead with the batch: the mapped axis joins it."""
    call = getattr(torch.ops.viops, op)

    def rule(info: Any, in_dims: tuple, *args: object) -> tuple:
        size = info.batch_size

        def fold(arg: object, dim: int | None) -> object:
            if not isinstance(arg, Tensor):
                return arg
            moved = arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            return moved.flatten(0, 1)

        def unfold(out: Tensor) -> Tensor:
            return out.unflatten(0, (size, out.shape[0] // size))

        outputs = call(*(fold(arg, dim) for arg, dim in zip(args, in_dims, strict=True)))
        if isinstance(outputs, Tensor):
            return unfold(outputs), 0
        return tuple(unfold(out) for out in outputs), (0,) * len(outputs)

    torch.library.register_vmap(f"viops::{op}", rule, lib=library)


def _register_vmap_by_looping(op: str) -> None:
    """A vmap rule for any op: a call for each entry of the mapped axis."""
    call = getattr(torch.ops.viops, op)

    def rule(info: Any, in_dims: tuple, *args: object) -> tuple:
        def entry(i: int, arg: object, dim: int | None) -> object:
            return arg if dim is None or not isinstance(arg, Tensor) else arg.select(dim, i)

        def none(arg: object, dim: int | None) -> object:
            if dim is None or not isinstance(arg, Tensor):
                return arg
            return arg.new_zeros(arg.shape[:dim] + arg.shape[dim + 1 :])

        calls = [
            call(*(entry(i, arg, dim) for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if not calls:  # one tells the shapes
            outputs = call(*map(none, args, in_dims))
            if isinstance(outputs, Tensor):
                return outputs.new_empty(0, *outputs.shape), 0
            return tuple(out.new_empty(0, *out.shape) for out in outputs), (0,) * len(outputs)
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])

    torch.library.register_vmap(f"viops::{op}", rule, lib=library)


_VMAP_RULES = {"fold": _register_vmap_by_folding, "loop": _register_vmap_by_looping}
