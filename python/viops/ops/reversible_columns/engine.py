"""One autograd node for a chain of reversible steps, whose inputs backward rebuilds.

A chain has slots, some of which hold tensors at its beginning.  Each step writes a slot, from what
a module makes of others and, where it has one, the slot's former value:

    slot = module(*others) + alpha * slot

The last to be written is the first that can be undone: slot = (slot - module(*others)) / alpha,
for the others are again what they were: to the bit, since slots carry what rounding takes from them
(`carry`).  So a chain keeps what its slots hold at the end, and those that no step writes; nothing
that it keeps grows with its length.

Source: RevCol (Cai et al., ICLR 2023, arXiv:2212.11696), section 3.1, and RevNet (Gomez et al.,
NeurIPS 2017, arXiv:1707.04585), section 3; that all columns are one node is ours.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import carry
from .op import reversible_step, reversible_step_backward
from .replay import Autocast, RandomStates, Setting, generators_of


@dataclass(frozen=True)
class Step:
    """Writes one slot of a chain."""

    name: str
    module: nn.Module
    slot: int
    #: The slots that the module is called with, the written one not among them; None stays None.
    reads: tuple[int | None, ...]
    #: C elements, what the slot's former value is multiplied with; None is 1.
    alpha: Tensor | None
    #: Whether the slot's former value is added.  If not, alpha's gradient is zero.
    adds: bool

    @functools.cached_property
    def parts(self) -> list[nn.Module]:
        """The module and all within it, walked once for all that asks for them."""
        return list(self.module.modules())

    def parameters(self) -> list[nn.Parameter]:
        """The module's, each once."""
        found = (p for part in self.parts for p in part._parameters.values() if p is not None)
        return _unique(found)

    def learnt(self) -> list[Tensor]:
        """What requires a gradient, which it is for the node to give: alpha among them."""
        own = [] if self.is_sharded() else self.parameters()
        factors = [] if self.alpha is None else [self.alpha]
        return [parameter for parameter in (*own, *factors) if parameter.requires_grad]

    def is_sharded(self) -> bool:
        """Whether FSDP2 has parts of the module in hand: then it takes their gradients as well."""
        fsdp = sys.modules.get("torch.distributed.fsdp")
        return fsdp is not None and any(isinstance(part, fsdp.FSDPModule) for part in self.parts)

    def is_learnt(self) -> bool:
        """Whether any parameter, alpha among them, requires a gradient."""
        return any(parameter.requires_grad for parameter in self.parameters()) or (
            self.alpha is not None and self.alpha.requires_grad
        )


State = dict[int, Tensor]
_Tensor = TypeVar("_Tensor", bound=Tensor)


def run_stored(
    steps: Sequence[Step], start: Mapping[int, Tensor], taken: Sequence[int]
) -> list[State]:
    """What the slots hold after the steps that `taken` names, places in `steps` in rising order.

    Autograd keeps what it needs.
    """
    state, states = dict(start), []
    for place, step in enumerate(steps):
        f = step.module(*_read(step, state))
        _check_output(step, f, state)
        if step.adds:
            f = _add(f, state[step.slot], step.alpha)
        elif step.alpha is not None and step.alpha.requires_grad and torch.is_grad_enabled():
            f = _WithoutEffect.apply(f, step.alpha)
        state[step.slot] = f
        if place in taken:
            states.append(dict(state))
    return states


def run_reversible(
    steps: Sequence[Step],
    start: Mapping[int, Tensor],
    taken: Sequence[int],
    generators: Sequence[torch.Generator] = (),
    drift_bound: float | None = None,
    exact: bool = True,
) -> list[State]:
    """The same; but backward rebuilds what autograd would have kept.

    Args:
        steps: the chain.
        start: what slots hold before it.
        taken: places in `steps`, in rising order.
        generators: those that modules draw from, but the default ones and the modules' own.
        drift_bound: how far, relatively, what is rebuilt may lie from what it was; None is any
            distance, and costs nothing.
        exact: whether slots carry what rounding takes from them.

    Raises:
        RuntimeError: in backward, where something drifts further, where a parameter has changed
            since, or where a module uses a tensor that requires a gradient and is no parameter of
            it.
    """
    parameters = _unique(parameter for step in steps for parameter in step.learnt())
    last = len(steps) - 1
    chain = _Chain(
        tuple(steps),
        tuple(start),
        tuple(taken) if taken and taken[-1] == last else (*taken, last),
        tuple(generators),
        drift_bound,
        exact,
    )
    outputs = iter(_Reversible.apply(chain, *start.values(), *parameters))
    states = []
    for place in chain.taken:
        written = dict(zip(chain.written(place), outputs, strict=False))
        states.append({**start, **written})
    return states[: len(taken)]


class _Added(NamedTuple):
    """A slot's former value, as backward is to rebuild it."""

    dtype: torch.dtype
    has_rest: bool


@dataclass
class _Chain:
    steps: tuple[Step, ...]
    #: The slots that hold tensors at the beginning.
    start: tuple[int, ...]
    #: After which steps the slots' tensors are outputs; the last step is one of them.
    taken: tuple[int, ...]
    generators: tuple[torch.Generator, ...]
    drift_bound: float | None
    exact: bool
    #: For each step, what it adds, what its module found, and whether it has parameters to learn.
    added: list[_Added | None] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    learns: list[bool] = field(default_factory=list)

    def written(self, place: int | None = None) -> list[int]:
        """The slots that steps up to `place` write; or all steps."""
        steps = self.steps if place is None else self.steps[: place + 1]
        return list(dict.fromkeys(step.slot for step in steps))

    def constant(self) -> list[int]:
        """The slots that no step writes."""
        written = self.written()
        return [slot for slot in self.start if slot not in written]

    def checked_inputs(self) -> list[int]:
        """The slots whose first tensors are kept to be compared with those that are rebuilt."""
        if self.drift_bound is None:
            return []
        return [slot for slot in self.start if slot in self.written()]


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: _Chain, *tensors: Tensor) -> tuple[Tensor, ...]:
        state: State = dict(zip(chain.start, tensors, strict=False))
        devices = list(dict.fromkeys(tensor.device for tensor in tensors))
        modules = (part for step in chain.steps for part in step.parts)
        ctx.random = RandomStates(
            list(dict.fromkeys([*generators_of(modules, devices), *chain.generators]))
        )
        ctx.autocast = Autocast(devices)
        inputs = [state[slot] for slot in (*chain.constant(), *chain.checked_inputs())]
        outputs: list[Tensor] = []
        rests: State = {}
        needed = any(ctx.needs_input_grad[1 : 1 + len(chain.start)])
        with ctx.autocast():
            for place, step in enumerate(chain.steps):
                _check_module(step)
                needed = needed or step.is_learnt()
                setting = Setting(step.parts, step.is_sharded())
                inputs_read = _read(step, state)
                versions = [None if t is None else t._version for t in inputs_read]
                # backward stops before steps that need no gradient: here is where it shows that one
                # has a tensor which does
                with torch.set_grad_enabled(not needed):
                    f = step.module(*inputs_read)
                if versions != [None if t is None else t._version for t in inputs_read]:
                    raise RuntimeError(
                        f"{step.name}: it modifies its inputs in place, which others read too"
                    )
                setting.ran(step.alpha)
                ctx.random.ran(place)
                chain.settings.append(setting)
                chain.learns.append(step.is_learnt())
                _check_output(step, f, state)
                if f.requires_grad and not needed:
                    _check_leaves(step, f, ())
                f = f.detach()
                added = None
                if step.adds:
                    x, rest = state[step.slot], rests.pop(step.slot, None)
                    added = _Added(x.dtype, rest is not None)
                    f, rest = _add_with_rest(f, x, rest, step.alpha, chain.exact)
                    if rest is not None:
                        rests[step.slot] = rest
                elif _shares_memory(f, [*tensors, *step.module.buffers(), *setting.parameters]):
                    f = f.clone()  # it is an output, and those are others'
                chain.added.append(added)
                state[step.slot] = f
                if place in chain.taken:
                    outputs += (state[slot] for slot in chain.written(place))
        ctx.random.close()
        ctx.chain, ctx.parameters = chain, tensors[len(chain.start) :]
        ctx.with_rests = tuple(rests)
        written = (state[slot] for slot in chain.written())
        ctx.save_for_backward(*inputs, *written, *rests.values())
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = _Reversible._gradients(ctx, *grad_outputs)
        return _without_derivative(grads) if torch.is_grad_enabled() else grads

    @staticmethod
    def _gradients(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        chain: _Chain = ctx.chain
        kept = iter(ctx.saved_tensors)
        _check_settings(chain)
        constant = dict(zip(chain.constant(), kept, strict=False))
        first = dict(zip(chain.checked_inputs(), kept, strict=False))
        state: State = {**constant, **dict(zip(chain.written(), kept, strict=False))}
        rests: State = dict(zip(ctx.with_rests, kept, strict=True))
        count = 1 + len(chain.start)
        needed = dict(zip(chain.start, ctx.needs_input_grad[1:count], strict=True))
        needs = _needs(chain, needed)
        grads = _Gradients()
        of_parameters = _Gradients()
        of_outputs = _by_place(chain, grad_outputs)
        with ctx.autocast(), ctx.random.set_aside():
            for place in reversed(range(len(chain.steps))):
                for slot, grad in of_outputs.get(place, {}).items():
                    grads.add(slot, grad)
                if needs[place] is None and chain.drift_bound is None:
                    break  # no step from here on, nor what the chain begins with, needs a gradient
                ctx.random.restore(place)
                reads = needs[place] or frozenset()
                _undo(chain, place, state, rests, reads, grads, of_parameters)
        for slot, tensor in first.items():
            _check_drift(chain, f"what slot {slot} began with", state[slot], tensor)
        return (
            None,
            *(grads.pop(slot) if needed[slot] else None for slot in chain.start),
            *(of_parameters.pop(id(parameter)) for parameter in ctx.parameters),
        )


def _undo(
    chain: _Chain,
    place: int,
    state: State,
    rests: State,
    needs: frozenset[int],
    grads: _Gradients,
    of_parameters: _Gradients,
) -> None:
    """Step `place`, backwards: from its output and that one's gradient to those of its inputs."""
    step = chain.steps[place]
    out, grad_out = state.pop(step.slot), grads.pop(step.slot)
    read = {slot: state[slot].detach() for slot in step.reads if slot is not None}
    setting = chain.settings[place]
    with_graph = grad_out is not None and (bool(needs) or chain.learns[place])
    leaves = {slot: read[slot].requires_grad_() for slot in (needs if with_graph else ())}
    parameters = {id(p): p for p in setting.parameters if with_graph and p.requires_grad}
    # so that the graph that a parameter comes of sees what the node gives and no more
    stand_ins = {key: nn.Parameter(p.detach()) for key, p in parameters.items() if not p.is_leaf}
    with torch.set_grad_enabled(grad_out is not None), setting.again(stand_ins):
        # leaves refuse the hooks that trackers of modules put on inputs
        inputs = leaves if step.is_sharded() else {key: t.view_as(t) for key, t in leaves.items()}
        f = step.module(*_read(step, {**read, **inputs}))
    if with_graph and f.requires_grad:
        assert grad_out is not None
        grad_f = grad_out.to(f.dtype)
        if step.is_sharded():
            _accumulate(f, grad_f, inputs, grads)
        else:
            _check_leaves(step, f, [*leaves.values(), *stand_ins.values(), *parameters.values()])
            _differentiate(f, grad_f, inputs, grads, parameters, stand_ins, of_parameters)
    elif f.requires_grad:
        _check_leaves(step, f, setting.parameters)
    f = f.detach()
    alpha, added = step.alpha, chain.added[place]
    if added is not None:
        rest = rests.pop(step.slot, None)
        factors = _flat(alpha)
        if rest is None:
            x, grad_x, grad_alpha = _rebuild(out, f, factors, grad_out)
        else:
            x, rest, grad_x, grad_alpha = carry.step_backward(
                out, rest, f, factors, grad_out, added.has_rest
            )
        state[step.slot] = x.to(added.dtype)
        if rest is not None:  # which is x's, before it had a wider dtype
            rests[step.slot] = rest if x.dtype is added.dtype else rest + (x - state[step.slot])
        if grad_x is not None:
            grads.add(step.slot, grad_x.to(added.dtype), is_ours=alpha is not None)
        if alpha is not None and grad_alpha is not None:
            of_parameters.add(id(alpha), grad_alpha.view_as(alpha))
    else:
        if alpha is not None and grad_out is not None:
            of_parameters.add(id(alpha), torch.zeros_like(alpha))
        _check_drift(chain, step.name, out, f)


def _differentiate(
    f: Tensor,
    grad_f: Tensor,
    inputs: Mapping[int, Tensor],
    grads: _Gradients,
    parameters: Mapping[int, Tensor],
    stand_ins: Mapping[int, Tensor],
    of_parameters: _Gradients,
) -> None:
    """Adds the gradients of a module's output to those of its inputs, by slot, and parameters.

    Those of parameters with stand-ins are found there, and, where a module holds them elsewhere
    too, at themselves.
    """
    sources = [*inputs.values(), *stand_ins.values(), *parameters.values()]
    with _without_hooks(parameters.values()):
        found = iter(torch.autograd.grad(f, sources, grad_f, allow_unused=True))
    for slot, grad in zip(inputs, found, strict=False):
        grads.add(slot, grad)
    for key, grad in zip([*stand_ins, *parameters], found, strict=True):
        of_parameters.add(key, grad)


@contextmanager
def _without_hooks(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Hooks of parameters see what the node gives, and not each module's part of it."""
    hooks = [p._backward_hooks for p in parameters if p._backward_hooks]
    kept = [dict(of_one) for of_one in hooks]
    for of_one in hooks:
        of_one.clear()
    try:
        yield
    finally:
        for of_one, before in zip(hooks, kept, strict=True):
            of_one.update(before)


def _accumulate(f: Tensor, grad_f: Tensor, inputs: Mapping[int, Tensor], grads: _Gradients) -> None:
    """The same where FSDP waits for the parameters' gradients, as they accumulate."""
    torch.autograd.backward(f, grad_f)
    for slot, tensor in inputs.items():
        grads.add(slot, tensor.grad)


class _Gradients:
    """Sums of gradients, in place where the memory is the sum's own.

    What autograd gives is not: it may be the very gradient that it was given, and for several.
    """

    def __init__(self) -> None:
        self._sums: dict[int, tuple[Tensor, bool]] = {}

    def add(self, key: int, grad: Tensor | None, is_ours: bool = False) -> None:
        if grad is None:
            return
        if key not in self._sums:
            self._sums[key] = grad, is_ours
            return
        total, can_change = self._sums[key]
        if is_ours and not can_change:
            total, grad, can_change = grad, total, True
        self._sums[key] = total.add_(grad) if can_change else total + grad, True

    def pop(self, key: int) -> Tensor | None:
        return self._sums.pop(key, (None, True))[0]


def _read(step: Step, state: Mapping[int, Tensor]) -> list[Tensor | None]:
    return [None if slot is None else state[slot] for slot in step.reads]


def _flat(alpha: Tensor | None) -> Tensor | None:
    """[C], for features of any rank."""
    return None if alpha is None else alpha.reshape(-1)


def _add(f: Tensor, x: Tensor, alpha: Tensor | None) -> Tensor:
    return f + x if alpha is None else reversible_step(f, x, alpha.reshape(-1))


def _add_with_rest(
    f: Tensor, x: Tensor, rest: Tensor | None, alpha: Tensor | None, exact: bool
) -> tuple[Tensor, Tensor | None]:
    """The sum, and what rounding takes from it; None for float64, which has bits to spare."""
    dtype = torch.promote_types(f.dtype, x.dtype)
    if alpha is not None:
        dtype = torch.promote_types(dtype, alpha.dtype)
    if not exact or dtype is torch.float64:
        return _add(f, x, alpha), None
    return carry.step(f, x.to(dtype), rest, _flat(alpha))


def _rebuild(
    out: Tensor, f: Tensor, alpha: Tensor | None, grad_out: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a sum without a rest was made of."""
    if alpha is None:
        return out - f, grad_out, None
    if grad_out is None:
        return reversible_step_backward(out, f, alpha, torch.zeros_like(out))[0], None, None
    return reversible_step_backward(out, f, alpha, grad_out)


def _needs(chain: _Chain, needed: Mapping[int, bool]) -> list[frozenset[int] | None]:
    """For each step, which of the slots that it reads need a gradient.

    It is None where neither the step nor any before it has a use for one.
    """
    by_slot, needs = dict(needed), []
    any_yet = any(needed.values())
    for step, is_learnt in zip(chain.steps, chain.learns, strict=True):
        reads = frozenset(slot for slot in step.reads if slot is not None and by_slot[slot])
        any_yet = any_yet or is_learnt
        by_slot[step.slot] = bool(reads) or is_learnt or (step.adds and by_slot[step.slot])
        needs.append(reads if any_yet else None)
    return needs


def _shares_memory(x: Tensor, others: Iterable[Tensor]) -> bool:
    storage = x.untyped_storage()._cdata
    return any(other.untyped_storage()._cdata == storage for other in others)


def _check_settings(chain: _Chain) -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError("expected backward outside of torch.inference_mode, which has no graphs")
    for step, setting in zip(chain.steps, chain.settings, strict=True):
        if not setting.is_as_it_was():
            raise RuntimeError(
                f"{step.name}: a parameter or buffer has been modified by an inplace operation, "
                "such as an optimizer's step, or another forward pass that updates a norm's "
                "statistics, since the forward pass: it cannot run again as it did"
            )


def _by_place(chain: _Chain, grads: Iterable[Tensor | None]) -> dict[int, dict[int, Tensor]]:
    """The gradients of outputs, by the step after which they are taken, and the slot."""
    rest = iter(grads)
    return {
        place: {
            slot: grad
            for slot, grad in zip(chain.written(place), rest, strict=False)
            if grad is not None
        }
        for place in chain.taken
    }


def _unique(tensors: Iterable[_Tensor]) -> list[_Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _without_derivative(grads: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients of which a derivative raises, instead of being zero or missing."""
    found = [grad for grad in grads if grad is not None]
    refuse = torch._C._functions.DelayedError(
        "reversible columns have no second derivative: "
        "trying to differentiate twice; use reversible=False",
        len(found),
    )
    refused = iter(refuse(*(grad.detach().requires_grad_() for grad in found)))
    return tuple(None if grad is None else next(refused) for grad in grads)


def _check_module(step: Step) -> None:
    if any(isinstance(part, torch.jit.ScriptModule) for part in step.parts):
        raise TypeError(
            f"{step.name}: expected modules whose buffers and training flags can be set for a "
            "second run, got a torch.jit.ScriptModule; use reversible=False"
        )


def _check_output(step: Step, f: object, state: Mapping[int, Tensor]) -> None:
    if not isinstance(f, Tensor) or not f.is_floating_point():
        got = f.dtype if isinstance(f, Tensor) else type(f).__name__
        raise TypeError(f"{step.name}: expected it to return a floating-point tensor, got {got}")
    if step.adds and f.shape != state[step.slot].shape:
        raise ValueError(
            f"{step.name}: expected it to return a tensor of shape "
            f"{list(state[step.slot].shape)}, as the one before, got {list(f.shape)}"
        )
    if step.alpha is not None and (f.dim() < 2 or f.shape[1] != step.alpha.numel()):
        raise ValueError(
            f"{step.name}: expected it to return [B, C, ...], C = {step.alpha.numel()} by the "
            f"column's channels, got shape {list(f.shape)}"
        )


def _check_drift(chain: _Chain, name: str, rebuilt: Tensor, truth: Tensor) -> None:
    if chain.drift_bound is None:
        return
    truth = truth.double()
    drift = ((rebuilt.double() - truth).norm() / truth.norm().clamp(min=1e-300)).item()
    if not drift <= chain.drift_bound:
        raise RuntimeError(
            f"{name}: rebuilt in backward, it lies {drift:.2e} from what it was, in norm and "
            f"relatively; at most {chain.drift_bound:.2e} is allowed.  Larger magnitudes of alpha, "
            "fewer columns or a wider dtype lessen it"
        )


def _check_leaves(step: Step, f: Tensor, known: Sequence[Tensor]) -> None:
    """All that the module's output depends on, and that requires a gradient, gets it."""
    names = {id(tensor) for tensor in known}
    for leaf in _leaves(f):
        if id(leaf) not in names:
            raise RuntimeError(
                f"{step.name}: it uses a tensor of shape {list(leaf.shape)} that requires a "
                "gradient and is no parameter of it: backward would not give it one.  Make it a "
                "parameter, detach it, or use reversible=False"
            )


def _leaves(f: Tensor) -> Iterator[Tensor]:
    """The tensors that f's graph begins with."""
    if f.grad_fn is None:
        yield f
    seen: set[Any] = {None}
    waiting: list[Any] = [f.grad_fn] if f.grad_fn is not None else []
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node in seen:
                continue
            seen.add(node)
            if isinstance(node, torch._C._functions.AccumulateGrad):  # type: ignore[attr-defined]
                yield node.variable
            else:
                waiting.append(node)


class _WithoutEffect(torch.autograd.Function):
    """x; the gradient to `unused` is zero, as that of 0 * unused would be: it is never missing."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, unused: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (unused,) = ctx.saved_tensors
        return grad, torch.zeros_like(unused)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Tensor | None) -> Tensor:
        return tangent.view_as(tangent)
