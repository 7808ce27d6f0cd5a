"""What the examples of reversible columns share: a small RevCol, a loss, options and a plot."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import viops
from torch import Tensor, nn
from viops.models.revcol import Config, RevCol


def small_revcol(num_columns: int, alpha: float = 0.5) -> RevCol:
    """Levels of 32 to 256 channels; branches as large as trained ones, shortcuts times alpha."""
    torch.manual_seed(0)
    config = Config((32, 64, 128, 256), (1, 1, 2, 1), num_columns, drop_path_rate=0.0)
    model = RevCol(config, num_classes=10)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = name.rpartition(".")[2]
            if last == "gamma":
                parameter.fill_(0.3)
            elif last.startswith("alpha"):
                parameter.fill_(alpha)
    return model


def loss_of(model: nn.Module, images: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images).float(), torch.arange(len(images)) % 10)


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--columns", type=int, nargs="+", help="numbers of columns")
    parser.add_argument("--image-size", type=int, default=64, help="side, a multiple of 32")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plot", type=Path, help="file for the curves, such as curves.png")
    parser.add_argument("--quick", action="store_true", help="two columns, to see that it runs")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    if options.quick:
        options.columns, options.image_size, options.batch_size = [1, 2], 32, 2
    if min(options.columns) < 1:
        parser.error(f"--columns: expected at least 1, got {options.columns}")
    if options.image_size < 32 or options.image_size % 32:
        parser.error(f"--image-size: expected a multiple of 32, got {options.image_size}")
    if options.batch_size < 1:
        parser.error(f"--batch-size: expected at least 1, got {options.batch_size}")
    if options.plot:
        options.plot.touch()
    torch.set_num_threads(options.threads)
    return options


class Panel(NamedTuple):
    """Curves that share axes, by the number of columns."""

    label: str
    scale: str
    curves: dict[str, list[float]]


def plot(title: str, panels: list[Panel], options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (5 * len(panels), 4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for name, values in panel.curves.items():
            axis.plot(options.columns, values, marker="o", markersize=4, label=name)
        axis.set(xlabel="columns", ylabel=panel.label, yscale=panel.scale)
        axis.set_xticks(options.columns)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{title}, viops {viops.__version__}")
    figure.savefig(options.plot, dpi=100)
