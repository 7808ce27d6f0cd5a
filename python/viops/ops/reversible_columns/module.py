"""Columns of levels, and pairs of branches, whose inputs backward rebuilds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy

from ... import checks
from ...plain_modules import has_hooks
from .engine import State, Step, run_reversible, run_stored

__all__ = ["ReversibleBlocks", "ReversibleColumn", "ReversibleColumns"]

#: How far, relatively, what is rebuilt may lie from what it was, where `drift_check` is asked for.
DRIFT_BOUND = 1e-2


class ReversibleColumn(nn.Module):
    """A column of L levels, each of which sees the level below it and the former column's above it:

    out[i] = level_i(out[i - 1], previous[i + 1]) + alpha_i * previous[i]

    with `below` for out[-1] and None for previous[L].  A first column has no previous one: its
    levels get None, and nothing is added.

    Args:
        levels: L modules, called level(below, above): below [B, C_below, ...] and above None or
            [B, channels[i + 1], ...] -> [B, channels[i], ...].  Each gives the same for the same
            inputs but for random numbers, which may come from torch's default generators or from
            `torch.Generator`s that are attributes of modules.
        channels: of what each level gives.
        init_scale: what the elements of each alpha begin with.
        also_above: for some levels i, further levels j > i whose features of the former column, or
            None, they are called with after `above`: RevCol-H's first level sees the last one.

    Parameters: alpha0, alpha1, ... [1, channels[i], 1, 1], whose magnitudes count as at least 1e-3
    (`viops.reversible_step`).  Submodules: level0, level1, ...

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: RevCol (Cai et al., ICLR 2023, arXiv:2212.11696), section 3.1; the names are those of
    the authors' code.
    """

    num_levels: int
    also_above: dict[int, tuple[int, ...]]

    def __init__(
        self,
        levels: Iterable[nn.Module],
        channels: Sequence[int],
        init_scale: float = 0.5,
        also_above: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        levels = checks.check_list("levels", levels, "modules")
        channels = checks.check_list("channels", channels, "a number for each level")
        if not levels:
            raise ValueError("levels: expected at least one module, got none")
        for level in levels:
            if not isinstance(level, nn.Module):
                raise TypeError(f"levels: expected modules, got {type(level).__name__}")
        if len(channels) != len(levels):
            raise ValueError(
                f"channels: expected one number for each of {len(levels)} levels, got {channels}"
            )
        init_scale = checks.check_finite("init_scale", init_scale)
        most = torch.finfo(torch.float32).max
        if abs(init_scale) > most:
            raise ValueError(f"init_scale: expected at most {most:.3g} (float32), got {init_scale}")
        self.num_levels = len(levels)
        also_above = {} if also_above is None else also_above
        if not isinstance(also_above, Mapping):
            raise TypeError(
                "also_above: expected a mapping from levels to lists of levels, "
                f"got {type(also_above).__name__}"
            )
        self.also_above = {
            i: tuple(checks.check_list(f"also_above[{i}]", others, "levels"))
            for i, others in also_above.items()
        }
        for i, others in self.also_above.items():
            checks.check_int("also_above", i, 0, len(levels) - 1, "the last level")
            if others and i == len(levels) - 1:
                raise ValueError(f"also_above[{i}]: expected none above the last, got {others}")
            for other in others:
                checks.check_int(
                    f"also_above[{i}]", other, i + 1, len(levels) - 1, "the last level"
                )
        for i, count in enumerate(channels):
            count = checks.check_int(f"channels[{i}]", count, 1, None, "")
            alpha = torch.full((1, count, 1, 1), float(init_scale))
            self.register_parameter(f"alpha{i}", nn.Parameter(alpha))
        for i, level in enumerate(levels):
            self.add_module(f"level{i}", level)

    @property
    def levels(self) -> list[nn.Module]:
        return [getattr(self, f"level{i}") for i in range(self.num_levels)]

    @property
    def alphas(self) -> list[Tensor]:
        return [getattr(self, f"alpha{i}") for i in range(self.num_levels)]

    def forward(self, below: Tensor, previous: Sequence[Tensor] | None = None) -> list[Tensor]:
        """below [B, C, ...] and the features of the former column, or None -> L features.

        Each is kept for backward, as autograd does: `ReversibleColumns` is what rebuilds them.
        """
        if not isinstance(below, Tensor):
            raise TypeError(f"below: expected a torch.Tensor, got {type(below).__name__}")
        if previous is not None:
            previous = checks.check_list("previous", previous, "features")
        if previous is not None and len(previous) != self.num_levels:
            raise ValueError(
                f"previous: expected {self.num_levels} features or None, got {len(previous)}"
            )
        for i, feature in enumerate(previous or ()):
            if not isinstance(feature, Tensor):
                raise TypeError(
                    f"previous[{i}]: expected a torch.Tensor, got {type(feature).__name__}"
                )
        start = {0: below, **dict(enumerate(previous or (), 1))}
        (state,) = run_stored(self.steps(previous is None), start, [self.num_levels - 1])
        return [state[1 + i] for i in range(self.num_levels)]

    def steps(self, is_first: bool, name: str = "") -> list[Step]:
        """Of a chain in which slot 0 is `below` of the first level and slot 1 + i is level i's."""
        steps = []
        for i, (level, alpha) in enumerate(zip(self.levels, self.alphas, strict=True)):
            has_above = not is_first and i + 1 < self.num_levels
            others = [None if is_first else 1 + j for j in self.also_above.get(i, ())]
            reads = (i, i + 2 if has_above else None, *others)
            steps.append(Step(f"{name}level{i}", level, 1 + i, reads, alpha, not is_first))
        return steps


class _Chain(nn.Module):
    """Runs steps, reversible or stored."""

    reversible: bool
    drift_check: bool
    drift_bound: float
    generators: tuple[torch.Generator, ...]
    exact: bool

    def __init__(
        self,
        reversible: bool,
        drift_check: bool,
        drift_bound: float,
        generators: Iterable[torch.Generator],
        exact: bool,
    ) -> None:
        super().__init__()
        checks.check_bool("reversible", reversible)
        checks.check_bool("drift_check", drift_check)
        checks.check_bool("exact", exact)
        if isinstance(drift_bound, bool) or not isinstance(drift_bound, Real):
            raise TypeError(f"drift_bound: expected a number, got {type(drift_bound).__name__}")
        if not drift_bound > 0:
            raise ValueError(f"drift_bound: expected more than 0, got {drift_bound}")
        self.reversible = reversible
        self.exact = exact
        self.drift_check = drift_check
        self.drift_bound = float(drift_bound)
        self.generators = tuple(checks.check_list("generators", generators, "torch.Generators"))
        for generator in self.generators:
            if not isinstance(generator, torch.Generator):
                raise TypeError(
                    f"generators: expected torch.Generators, got {type(generator).__name__}"
                )

    def _run(
        self, steps: Sequence[Step], start: dict[int, Tensor], taken: Sequence[int]
    ) -> list[State]:
        """What the slots hold after these steps."""
        if self._rebuilds(steps, start):
            bound = self.drift_bound if self.drift_check else None
            return run_reversible(steps, start, taken, self.generators, bound, self.exact)
        return run_stored(steps, start, taken)

    def _rebuilds(self, steps: Sequence[Step], start: dict[int, Tensor]) -> bool:
        return (
            self.reversible
            and torch.is_grad_enabled()
            # a graph for inference, and torch.func, have a use for the plain formula only
            and not torch.compiler.is_exporting()
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
            and not any(is_lazy(p) for step in steps for p in step.parameters())
            and (
                any(tensor.requires_grad for tensor in start.values())
                or any(step.is_learnt() for step in steps)
            )
        )

    def extra_repr(self) -> str:
        exact = "" if self.exact else ", exact=False"
        check = f", drift_check=True, drift_bound={self.drift_bound:g}" if self.drift_check else ""
        return f"reversible={self.reversible}{exact}{check}"


class ReversibleColumns(_Chain):
    """Columns one after another, of which training keeps the last one's features alone.

    Backward rebuilds those of the others, level after level from the last, and runs each level
    again for its gradients: memory for activations does not grow with the number of columns, and a
    training step takes about a third longer.  Features in float32 and half types carry what
    rounding takes from them, so that those rebuilt are those that were, to the bit, for some 20
    columns of alpha = 0.5, and gradients those of the stored form but for rounding.  Those in
    float64 carry nothing: each column multiplies their rounding by about 1 / alpha.

    Levels run twice: with the same random numbers and autocast, and with the buffers as they were,
    which change once.  Gradients to parameters come from one node of autograd, when all are known.
    A second derivative raises.  In torch.export, torch.func, forward mode, and where no gradient is
    wanted, the plain form runs.  Columns are not called themselves: hooks belong on their levels.

    Alphas small in magnitude end the exactness sooner, after about 24 / log2(1 / |alpha|) columns,
    be it of one channel: of alpha = 0.01, three or four.  `drift_check=True` raises then.  Levels
    give gradients through what they return alone: losses of what a forward hook, or an attribute,
    takes out of them do not reach parameters.

    Args:
        columns: `ReversibleColumn`s of as many levels each.
        reversible: False keeps all features instead, as autograd does.
        drift_check: whether backward compares what it has rebuilt for the first column with
            what that column gives when it runs again from the stem's output.
        drift_bound: the norm of the difference over that of the truth, at most, for `drift_check`.
        generators: those that levels draw random numbers from, but torch's default ones and those
            that are attributes of their modules.
        exact: False carries nothing in any dtype, as the authors' code, which saves some passes
            over the last features and the memory for them.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: RevCol (Cai et al., ICLR 2023, arXiv:2212.11696), section 3.1.
    """

    def __init__(
        self,
        columns: Iterable[ReversibleColumn],
        reversible: bool = True,
        drift_check: bool = False,
        drift_bound: float = DRIFT_BOUND,
        generators: Iterable[torch.Generator] = (),
        exact: bool = True,
    ) -> None:
        super().__init__(reversible, drift_check, drift_bound, generators, exact)
        columns = checks.check_list("columns", columns, "viops.nn.ReversibleColumns")
        for column in columns:
            if not isinstance(column, ReversibleColumn):
                raise TypeError(
                    f"columns: expected viops.nn.ReversibleColumns, got {type(column).__name__}"
                )
        counts = {column.num_levels for column in columns}
        if len(counts) != 1:
            raise ValueError(
                "columns: expected at least one, all with as many levels, "
                f"got {[column.num_levels for column in columns]} levels"
            )
        for i, column in enumerate(columns):
            self.add_module(str(i), column)
        self.num_columns = len(columns)

    @property
    def columns(self) -> list[ReversibleColumn]:
        return [getattr(self, str(i)) for i in range(self.num_columns)]

    def forward(
        self, x: Tensor, return_columns: Sequence[int] | None = None
    ) -> list[Tensor] | list[list[Tensor]]:
        """The stem's output [B, C, ...] -> the L features of the last column.

        Or, for each column that `return_columns` names, in that order, a list of its L features:
        losses may use any of them.  Features that nobody uses take no memory.

        Raises:
            TypeError, ValueError: an argument is not as above, or a level gives another shape than
                the same level of the first column.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        columns = self.columns
        for i, column in enumerate(columns):
            if has_hooks(column):
                raise ValueError(
                    f"columns[{i}]: expected hooks on its levels, got some on the column, which is "
                    "not called"
                )
            if type(column).forward is not ReversibleColumn.forward or "forward" in vars(column):
                raise ValueError(
                    f"columns[{i}]: expected ReversibleColumn's forward, got another, which is not "
                    "called"
                )
        wanted = [len(columns) - 1]
        if return_columns is not None:
            wanted = checks.check_list("return_columns", return_columns, "places of columns")
        for index in wanted:
            checks.check_int("return_columns", index, 0, len(columns) - 1, "the last column")
        steps = [step for i, column in enumerate(columns) for step in column.steps(i == 0, f"{i}.")]
        num_levels = columns[0].num_levels
        places = {column: num_levels * (column + 1) - 1 for column in sorted(set(wanted))}
        states = dict(zip(places, self._run(steps, {0: x}, list(places.values())), strict=True))
        features = [[states[column][1 + i] for i in range(num_levels)] for column in wanted]
        return features[0] if return_columns is None else features


class ReversibleBlocks(_Chain):
    """Pairs of residual branches on two streams, whose inputs backward rebuilds (RevNet's form):

    x1 = x1 + first(x2);  x2 = x2 + second(x1)

    Training keeps what the last pair gives and nothing else; as for `ReversibleColumns`, which says
    what holds for the branches, and what the arguments mean.

    Args:
        blocks: pairs of modules, each [B, ...] -> [B, ...] of the same shape.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: RevNet (Gomez et al., NeurIPS 2017, arXiv:1707.04585), section 3.1.
    """

    def __init__(
        self,
        blocks: Iterable[Sequence[nn.Module]],
        reversible: bool = True,
        drift_check: bool = False,
        drift_bound: float = DRIFT_BOUND,
        generators: Iterable[torch.Generator] = (),
        exact: bool = True,
    ) -> None:
        super().__init__(reversible, drift_check, drift_bound, generators, exact)
        self.blocks = nn.ModuleList()
        for block in checks.check_list("blocks", blocks, "pairs of modules"):
            pair = checks.check_list("blocks", block, "pairs of modules")
            for branch in pair:
                if not isinstance(branch, nn.Module):
                    raise TypeError(
                        f"blocks: expected pairs of modules, got one with {type(branch).__name__}"
                    )
            if len(pair) != 2:
                raise ValueError(f"blocks: expected pairs of modules, got one of {len(pair)}")
            self.blocks.append(nn.ModuleList(pair))
        if not self.blocks:
            raise ValueError("blocks: expected at least one pair of modules, got none")

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """The two streams, [B, ...] each -> the same after all pairs."""
        for name, x in (("x1", x1), ("x2", x2)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        steps = [
            Step(f"blocks.{i}.{stream}", branch, stream, (1 - stream,), None, True)
            for i, pair in enumerate(self.blocks)
            # children() would drop one that is there twice
            for stream, branch in enumerate(cast(nn.ModuleList, pair))
        ]
        (state,) = self._run(steps, {0: x1, 1: x2}, [len(steps) - 1])
        return state[0], state[1]
