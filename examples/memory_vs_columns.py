"""Memory for activations and time of a training step of RevCol, against its number of columns.

    python examples/memory_vs_columns.py --plot curves.png

One model in four forms:

- stored: autograd keeps all activations.
- checkpoint: torch.utils.checkpoint around each column; its features are kept.
- a node a column: as the authors' code has it, backward rebuilds a column's inputs, but each
  column keeps its features.
- viops: one node for all columns, of which the last one's features are kept.

Memory is what tensors hold between forward and backward, parameters aside.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from columns import Panel, loss_of, make_parser, parse, plot, small_revcol
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from viops.cli.measure import best_seconds, held_bytes
from viops.models.revcol import RevCol
from viops.nn import ReversibleColumn
from viops.ops.reversible_columns.engine import run_reversible

Features = list[Tensor] | None


def checkpointed(column: ReversibleColumn, below: Tensor, previous: Features) -> list[Tensor]:
    def run(below: Tensor, *previous: Tensor) -> tuple[Tensor, ...]:
        return tuple(column(below, list(previous) or None))

    return list(checkpoint(run, below, *(previous or ()), use_reentrant=False))


def a_node(column: ReversibleColumn, below: Tensor, previous: Features) -> list[Tensor]:
    """A chain of one column, whose node keeps what it gives to the next."""
    start = {0: below, **dict(enumerate(previous or (), 1))}
    steps = column.steps(previous is None)
    (state,) = run_reversible(steps, start, [len(steps) - 1])
    return [state[1 + i] for i in range(len(steps))]


class ByColumns(torch.nn.Module):
    """The model with something around each column."""

    def __init__(self, model: RevCol, run: Callable[..., list[Tensor]]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, images: Tensor) -> Tensor:
        x = self.model.stem(images.contiguous(memory_format=torch.channels_last))
        features: Features = None
        for i in range(self.model.config.num_columns):
            features = self.run(self.model.get_submodule(f"subnet{i}"), x, features)
        return self.model.forward_head(features[-1])


def forms(num_columns: int) -> dict[str, torch.nn.Module]:
    """The same model four times."""
    stored = small_revcol(num_columns)
    stored.reversible = False
    return {
        "stored": stored,
        "checkpoint": ByColumns(small_revcol(num_columns), checkpointed),
        "a node a column": ByColumns(small_revcol(num_columns), a_node),
        "viops": small_revcol(num_columns),
    }


def step(model: torch.nn.Module, images: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    loss_of(model, images).backward()


def measure(options: argparse.Namespace) -> tuple[dict, dict]:
    """MB and ms of each form, by number of columns."""
    images = torch.randn(options.batch_size, 3, options.image_size, options.image_size)
    memory: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {}
    for num_columns in options.columns:
        models = forms(num_columns)
        runs = {name: functools.partial(step, model, images) for name, model in models.items()}
        rounds = tqdm(range(options.rounds), desc=f"{num_columns} columns", leave=False)
        seconds = best_seconds(runs, rounds, "cpu")
        for name, model in models.items():
            held = held_bytes(functools.partial(loss_of, model, images), "cpu")
            memory.setdefault(name, []).append(held / 1e6)
            times.setdefault(name, []).append(seconds[name] * 1e3)
    return memory, times


def report(title: str, curves: dict[str, list[float]], options: argparse.Namespace) -> str:
    lines = [f"\n{title}", "columns         " + "".join(f"{n:8}" for n in options.columns)]
    lines += [f"{name:<16}" + "".join(f"{v:8.1f}" for v in row) for name, row in curves.items()]
    return "\n".join(lines)


def main() -> None:
    parser = make_parser(__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="the best of so many steps")
    parser.set_defaults(columns=[2, 4, 8, 16], image_size=128)
    options = parse(parser)
    memory, times = measure(options)
    print(report("memory between forward and backward, MB", memory, options))
    print(report("time of a training step, ms", times, options))
    if options.plot:
        panels = [Panel("MB kept for backward", "log", memory), Panel("ms a step", "linear", times)]
        plot(f"RevCol, {options.batch_size} images of side {options.image_size}", panels, options)


if __name__ == "__main__":
    main()
