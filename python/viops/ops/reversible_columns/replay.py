"""What a second run of a module needs to give what its first run gave: the same random numbers, the
same autocast, and the buffers as they were, which it leaves as it finds them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_PLAIN_TYPES = frozenset((bool, int, float, str, set, type(None)))
#: Attributes that torch gives each module: none of them holds generators.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def generators_of(modules: Iterable[nn.Module], devices: Iterable[torch.device]) -> list[Generator]:
    """The default generators of the CPU and these devices, and those of modules' attributes.

    Attributes may be lists, tuples and dictionaries of generators, or of such, too.
    """
    found = [torch.default_generator]
    for device in devices:
        if device.type not in ("cpu", "meta"):
            of_device = torch.get_device_module(device).default_generators
            found.append(of_device[device.index or 0])
    for module in modules:
        for name, value in vars(module).items():
            # most are, and Generator's metaclass is slow to ask
            if type(value) not in _PLAIN_TYPES and name not in _OF_EVERY_MODULE:
                found += _generators_in(value)
    return list(dict.fromkeys(found))


def _generators_in(value: object, depth: int = 3) -> Iterator[Generator]:
    if isinstance(value, (list, tuple, dict)):
        for entry in (value.values() if isinstance(value, dict) else value) if depth else ():
            if type(entry) not in _PLAIN_TYPES:
                yield from _generators_in(entry, depth - 1)
    elif isinstance(value, Generator):
        yield value


class _Changes(NamedTuple):
    """A state by what differs from another: after a few draws most of it does not."""

    base: Tensor
    places: Tensor
    values: Tensor

    @property
    def state(self) -> Tensor:
        return self.base.index_put((self.places.long(),), self.values)


class RandomStates:
    """The states that generators had before runs that drew from them."""

    def __init__(self, generators: Sequence[Generator]) -> None:
        self.generators = tuple(generators)
        self._now = self.now()
        self._bases: list[Tensor | None] = [None] * len(self._now)
        self._kept: dict[int, list[Tensor | _Changes | None]] = {}

    def now(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.generators]

    def __bool__(self) -> bool:
        return bool(self._kept)

    def ran(self, run: int) -> None:
        """Run `run` has ended, having begun where the one before it ended."""
        before, self._now = self._now, self.now()
        drawn = [not torch.equal(a, b) for a, b in zip(before, self._now, strict=True)]
        if any(drawn):
            self._kept[run] = [
                self._keep(i, state) if has_drawn else None
                for i, (state, has_drawn) in enumerate(zip(before, drawn, strict=True))
            ]

    def close(self) -> None:
        """No run follows."""
        self._now, self._bases = [], []

    def restore(self, run: int) -> None:
        """The states before run `run`, of the generators that it drew from."""
        for generator, state in zip(self.generators, self._kept.get(run, ()), strict=False):
            if state is not None:
                generator.set_state(state.state if isinstance(state, _Changes) else state)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """The states at the end are those at the beginning."""
        states = self.now() if self else []
        try:
            yield
        finally:
            for generator, state in zip(self.generators, states, strict=False):
                generator.set_state(state)

    def _keep(self, generator: int, state: Tensor) -> Tensor | _Changes:
        base = self._bases[generator]
        if base is not None and base.shape == state.shape:
            places = (state != base).nonzero().flatten()
            if 4 * places.numel() < state.numel() <= torch.iinfo(torch.int16).max:
                return _Changes(base, places.to(torch.int16), state[places])
        self._bases[generator] = state
        return state


class Autocast:
    """The autocast of now, to be entered again; it casts each weight anew.

    Casts that a run without autograd has left in the cache would have no gradient.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        kinds = ("cpu", *(device.type for device in devices))
        self._settings = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in kinds
            if torch.amp.is_autocast_available(kind)
        }

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, (enabled, dtype) in self._settings.items():
                if enabled or torch.is_autocast_enabled(kind):
                    again = torch.autocast(kind, dtype, enabled, cache_enabled=False)
                    stack.enter_context(again)
            yield


class Setting:
    """What a module finds when it runs: modules, parameters, buffers and training flags in it.

    Made before a run; `ran` comes after it, and `again` is around a second one.  Parameters that
    are sharded are left to who gathers them.
    """

    def __init__(self, parts: Sequence[nn.Module], is_sharded: bool = False) -> None:
        self._parts = parts
        self._training = [part.training for part in self._parts]
        self._modules = [dict(part._modules) for part in self._parts]
        self._is_sharded = is_sharded
        self._parameters = [{} if is_sharded else dict(part._parameters) for part in self._parts]
        self._buffers = [dict(part._buffers) for part in self._parts]
        buffers = [b for of_part in self._buffers for b in of_part.values() if b is not None]
        self._copies = _copied({id(buffer): buffer for buffer in buffers})
        self._versions = {id(buffer): _version(buffer) for buffer in buffers}
        self._used: list[tuple[Tensor, int]] = []

    @functools.cached_property
    def parameters(self) -> list[Tensor]:
        """Those that the run found, each once."""
        found = (p for of_part in self._parameters for p in of_part.values() if p is not None)
        return list({id(parameter): parameter for parameter in found}.values())

    def ran(self, factor: Tensor | None) -> None:
        """Forgets the copies of buffers that are as they were; `factor` must not change either."""
        changed = {
            id(buffer)
            for part, before in zip(self._parts, self._buffers, strict=True)
            for name, buffer in before.items()
            if buffer is not None and self._may_differ(part, name, buffer)
        }
        self._copies = {key: copy for key, copy in self._copies.items() if key in changed}
        buffers = (b for of_part in self._buffers for b in of_part.values() if b is not None)
        unchanged = [buffer for buffer in buffers if id(buffer) not in changed]
        factors = [] if factor is None else [factor]
        self._used = [(t, _version(t)) for t in (*self.parameters, *unchanged, *factors)]

    def _may_differ(self, part: nn.Module, name: str, buffer: Tensor) -> bool:
        is_same = part._buffers.get(name) is buffer
        if not is_same or _version(buffer) != self._versions[id(buffer)]:
            return True
        # norms of torch's write their statistics without a trace
        if buffer.is_cpu:
            return not torch.equal(buffer, self._copies[id(buffer)])
        return part.training and isinstance(part, _NormBase)

    def is_as_it_was(self) -> bool:
        """Whether parameters, and buffers that the run left alone, have not been written since."""
        return all(_version(tensor) == version for tensor, version in self._used)

    @contextmanager
    def again(self, replaced: Mapping[int, nn.Parameter]) -> Iterator[None]:
        """The module finds the same, and instead of some parameters others, by their id.

        At the end it has what it had at the beginning.
        """
        names = ("training", "_modules", "_parameters", "_buffers")
        own = [{name: vars(part)[name] for name in names} for part in self._parts]
        copies = _copied(self._copies)
        try:
            for part, training, modules, parameters, buffers in zip(
                self._parts,
                self._training,
                self._modules,
                self._parameters,
                self._buffers,
                strict=True,
            ):
                found: dict[str, Any] = {"training": training, "_modules": dict(modules)}
                if not self._is_sharded:
                    found["_parameters"] = _exchanged(parameters, replaced)
                found["_buffers"] = _exchanged(buffers, copies)
                vars(part).update(found)  # setting an attribute takes a module ten times as long
            yield
        finally:
            for part, before in zip(self._parts, own, strict=True):
                vars(part).update(before)


def _version(tensor: Tensor) -> int:
    """How often it was written; tensors made in inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _copied(tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Copies, by the same keys; those of tensors that share memory share theirs alike."""
    if len(tensors) < 2:
        return {key: tensor.clone() for key, tensor in tensors.items()}
    plain = [t for t in tensors.values() if type(t) is Tensor and t.layout is torch.strided]
    counts = Counter(t.untyped_storage()._cdata for t in plain)
    storages: dict[int, torch.UntypedStorage] = {}
    copies = {}
    for key, tensor in tensors.items():
        is_plain = type(tensor) is Tensor and tensor.layout is torch.strided
        place = tensor.untyped_storage()._cdata if is_plain else 0
        if counts[place] < 2:
            copies[key] = tensor.clone()
            continue
        if place not in storages:
            storages[place] = tensor.untyped_storage().clone()
        offset, shape, strides = tensor.storage_offset(), tensor.shape, tensor.stride()
        copies[key] = tensor.new_empty(0).set_(storages[place], offset, shape, strides)
    return copies


def _exchanged(named: Mapping[str, Any], others: Mapping[int, Any]) -> dict[str, Any]:
    """A copy with others in place of some, by their id."""
    if not others:
        return dict(named)
    return {name: others.get(id(value), value) for name, value in named.items()}
