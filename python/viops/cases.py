"""Cases: inputs of the ops, which tests, benches and the doctor share.

A family's cases stand in ``viops/ops/<family>/cases.py`` as ``CASES`` and ``BAD_CASES``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Draw:
    """Gives a case its tensors; the same seed gives the same values on every device.

    Args:
        dtype: of the floating-point tensors where a case names no other.
        device: where the tensors are; values are drawn on the CPU.
        seed: of the generator.
    """

    def __init__(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
        self.dtype = dtype
        self.device = device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal values."""
        return self._place(torch.randn(shape, generator=self._generator), dtype)

    def integers(
        self, low: int, high: int, *shape: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Integers from low to high, both included, as floating-point values."""
        return self._place(torch.randint(low, high + 1, shape, generator=self._generator), dtype)

    def probabilities(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Positive values whose sum over the last axis is 1."""
        values = torch.randn(shape, generator=self._generator).softmax(dim=-1)
        return self._place(values, dtype)

    def choices(self, batch: int, num_places: int, count: int) -> Tensor:
        """index [batch, count], int64: in each row different places of 0..num_places-1."""
        order = torch.rand(batch, num_places, generator=self._generator).argsort(dim=1)
        return order[:, :count].contiguous().to(self.device)

    def tensor(self, values: list, dtype: torch.dtype | None = None) -> Tensor:
        """These very values."""
        return self._place(torch.tensor(values, dtype=torch.float64), dtype)

    def _place(self, values: Tensor, dtype: torch.dtype | None) -> Tensor:
        return values.to(self.device, self.dtype if dtype is None else dtype)


class Inputs(NamedTuple):
    """What a case's function is called with: ``function(*args, **kwargs)``."""

    args: tuple
    kwargs: dict


def _is_argument(value: object) -> bool:
    """Whether it is given as it is: all but lists, and the tuple of all arguments."""
    return type(value) not in (list, tuple)


@dataclass(frozen=True, eq=False)
class Case:
    """One call of a public function."""

    #: The name of the public function in viops.
    op: str
    name: str
    #: Gives the positional arguments.
    make: Callable[[Draw], tuple]
    #: The keyword arguments; one that can be called gives its value, as `make` gives the others.
    options: Mapping[str, object] = field(default_factory=dict)
    #: The dtype that results are rounded to on their way, where that is not the inputs' own.
    precision: torch.dtype | None = field(default=None, kw_only=True)

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
        """The arguments, with floating-point tensors of this dtype; those of lists one by one."""
        draw = Draw(dtype, device, seed)
        args = tuple(pytree.tree_leaves(self.make(draw), _is_argument))
        assert len(args) == self._structure.num_leaves
        options = {key: v(draw) if callable(v) else v for key, v in self.options.items()}
        return Inputs(args, options)

    def function_of(self, functions: object) -> Callable:
        """The case's function among these; it takes lists' arguments one by one, as `inputs`."""
        function = getattr(functions, self.op)
        structure = self._structure
        if structure.num_nodes == 1 + structure.num_leaves:  # no list among them
            return function

        def of_leaves(*leaves: object, **options: object) -> object:
            return function(*pytree.tree_unflatten(leaves, structure), **options)

        return of_leaves

    @functools.cached_property
    def _structure(self) -> pytree.TreeSpec:
        """Of the arguments; `inputs` has made it, so that `function_of` draws nothing."""
        return pytree.tree_structure(self.make(Draw(torch.float32)), _is_argument)

    def __str__(self) -> str:
        return f"{self.op}-{self.name.replace(' ', '_')}"


@dataclass(frozen=True, eq=False)
class BadCase(Case):
    """One call that raises, on every backend alike."""

    error: type[Exception] = ValueError
    #: The argument that the message begins with.
    argument: str = ""


def cases_of(family: str) -> tuple[Case, ...]:
    """The cases of an op family, by its name in viops.catalog."""
    return importlib.import_module(f"viops.ops.{family}.cases").CASES


def bad_cases_of(family: str) -> tuple[BadCase, ...]:
    """The calls of an op family's functions that raise."""
    return importlib.import_module(f"viops.ops.{family}.cases").BAD_CASES


def every_second(tensor: Tensor) -> Tensor:
    """A view of a copy twice as large along each axis: the same values, all strides doubled."""
    spread = tensor.new_full([2 * size for size in tensor.shape], float("nan"))
    view = spread[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def amid_nan(tensor: Tensor) -> Tensor:
    """A copy amid NaN, off every alignment above the element's own: a read outside it shows."""
    margin = 67  # odd, so that no vector width divides the offset, and wider than any vector
    storage = tensor.new_full([tensor.numel() + 2 * margin], float("nan"))
    return storage[margin : margin + tensor.numel()].view(tensor.shape).copy_(tensor)


def axes_swapped(tensor: Tensor, first: int, second: int) -> Tensor:
    """The same values, laid out in memory with two axes swapped."""
    return tensor.transpose(first, second).contiguous().transpose(first, second)
