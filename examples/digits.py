"""What the examples share: a small ResNet, scikit-learn's digits, a training loop and curves."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm


class Block(nn.Module):
    """x + branch(x), of two convolutions with a norm each."""

    def __init__(self, channels: int, out_channels: int, stride: int, norm: Callable) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False),
            norm(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            norm(out_channels),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, stride, bias=False), norm(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


def small_resnet(norm: Callable[[int], nn.Module], width: int) -> nn.Module:
    """[B, 1, 8, 8] -> [B, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        norm(width),
        nn.ReLU(),
        Block(width, width, 1, norm),
        Block(width, 2 * width, 2, norm),
        Block(2 * width, 4 * width, 2, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


class Digits(NamedTuple):
    """Images [N, 1, 8, 8] of mean 0 and variance 1, and classes [N]."""

    images: Tensor
    classes: Tensor

    def __getitem__(self, index: Tensor | slice) -> Digits:  # type: ignore[override]
        return Digits(self.images[index], self.classes[index])


def load(train_size: int) -> tuple[Digits, Digits]:
    """For training and for testing, the same at each call."""
    images, classes = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().view(-1, 1, 8, 8)
    x = (x - x.mean()) / x.std()
    y = torch.from_numpy(classes)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return tuple(Digits(x[part], y[part]) for part in (order[:train_size], order[train_size:]))


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """In percent, in eval mode."""
    model.eval()
    right = (model(digits.images).argmax(dim=1) == digits.classes).float().mean().item()
    model.train()
    return 100 * right


class Run(NamedTuple):
    """At each point of the curves the mean training loss since the last, and the test accuracy."""

    losses: list[float]
    accuracies: list[float]
    #: As trained.
    model: nn.Module


Variants = dict[str, Callable[[argparse.Namespace], nn.Module]]


def train(model: nn.Module, seed: int, options: argparse.Namespace, bar: tqdm) -> Run:
    training, testing = load(options.train_size)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), options.lr, momentum=0.9, weight_decay=options.weight_decay
    )
    per_epoch = len(training.classes) // options.batch_size
    num_steps = options.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=num_steps, pct_start=0.1
    )
    run, losses = Run([], [], model), []
    for step in range(num_steps):
        if step % per_epoch == 0:
            shuffled = torch.randperm(len(training.classes), generator=order)
            batches = shuffled[: per_epoch * options.batch_size].view(per_epoch, -1)
        images, classes = training[batches[step % per_epoch]]
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        bar.update()
        if (step + 1) % options.every == 0:
            run.losses.append(torch.stack(losses).mean().item())
            run.accuracies.append(accuracy(model, testing))
            losses = []
    return run


def train_all(variants: Variants, options: argparse.Namespace) -> dict[str, list[Run]]:
    """A run of each variant from each seed: the same weights, the same order of images."""
    torch.set_num_threads(options.threads)
    steps = options.epochs * (options.train_size // options.batch_size)
    runs: dict[str, list[Run]] = {name: [] for name in variants}
    with tqdm(total=steps * len(options.seeds) * len(runs), unit="step") as bar:
        for seed in options.seeds:
            for name, make in variants.items():
                bar.set_description(f"{name}, seed {seed}")
                torch.manual_seed(seed)
                runs[name].append(train(make(options), seed, options, bar))
    return runs


def spread(values: list[float]) -> str:
    """Mean and, of several, its standard error."""
    text = f"{statistics.mean(values):.3g}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values) / len(values) ** 0.5:.1g}"
    return text


class Panel(NamedTuple):
    """Curves that share axes: of each name one of each seed, by points."""

    label: str
    scale: str
    curves: dict[str, list[list[float]]]


def plot(panels: list[Panel], options: argparse.Namespace) -> None:
    """The mean over seeds and its standard error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(10, 4), layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        for name, of_seeds in panel.curves.items():
            values = torch.tensor(of_seeds)  # [seeds, points]
            mean = values.mean(dim=0)
            error = values.std(dim=0, correction=int(len(values) > 1)) / len(values) ** 0.5
            steps = options.every * torch.arange(1, len(mean) + 1)
            (line,) = axis.plot(steps, mean, marker="o", markersize=3, label=name)
            axis.fill_between(steps, mean - error, mean + error, alpha=0.2, color=line.get_color())
        axis.set(xlabel="step", ylabel=panel.label, yscale=panel.scale)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    figure.suptitle(
        f"Digits, {options.batch_size} images a batch, {len(options.seeds)} seeds, lr {options.lr}"
    )
    figure.savefig(options.plot, dpi=150)


def make_parser(description: str, **defaults: object) -> argparse.ArgumentParser:
    """Of the options that the examples share; batch_size, epochs, every, seeds, lr by default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--every", type=int, help="steps between points of the curves")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--lr", type=float, help="the highest, after a warm-up")
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--train-size", type=int, default=1000, help="others are for testing")
    parser.add_argument("--threads", type=int, default=1, help="small images want few")
    parser.add_argument("--plot", type=Path, help="file for the curves, such as curves.png")
    parser.add_argument("--quick", action="store_true", help="one short epoch, to see that it runs")
    parser.set_defaults(**defaults)
    return parser


def parse(parser: argparse.ArgumentParser, **quick: object) -> argparse.Namespace:
    """The options; those of `quick` where --quick is given."""
    options = parser.parse_args()
    if options.quick:
        vars(options).update(quick)
    steps = options.epochs * (options.train_size // options.batch_size)
    if steps < options.every:
        parser.error(
            "expected at least as many steps as --every; "
            f"got {steps} steps, --every {options.every}"
        )
    if options.plot:
        options.plot.touch()
    return options
