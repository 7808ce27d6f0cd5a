"""Trains a small ResNet on scikit-learn's digits, two images at a time, with four kinds of norm.

    python examples/train_micro_batch.py --plot curves.png

BN is batch norm, GN group norm, WS weight standardization, BCN batch-channel norm, as in Qiao et
al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization".  All start
from the same weights, see the same images in the same order and take as many steps; each is trained
from several seeds.  The curves show the mean over seeds and its standard error.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import viops
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


def with_bn(options: argparse.Namespace) -> nn.Module:
    return small_resnet(nn.BatchNorm2d, options.width)


def with_gn(options: argparse.Namespace) -> nn.Module:
    return small_resnet(functools.partial(nn.GroupNorm, options.groups), options.width)


def with_gn_and_ws(options: argparse.Namespace) -> nn.Module:
    return viops.patch.micro_batch(with_gn(options))  # convolutions alone: there is no batch norm


def with_bcn_and_ws(options: argparse.Namespace) -> nn.Module:
    """With estimates, as for batches of few images; with a share of zero, by the batch itself."""
    estimate = options.share > 0
    model = viops.patch.micro_batch(with_bn(options), options.groups, estimate)
    for module in model.modules():
        if estimate and isinstance(module, viops.nn.BatchChannelNorm2d):
            module.bn.estbn_moving_speed.fill_(options.share)
    return model


VARIANTS: dict[str, Callable[[argparse.Namespace], nn.Module]] = {
    "BN": with_bn,
    "GN": with_gn,
    "GN+WS": with_gn_and_ws,
    "BCN+WS": with_bcn_and_ws,
}


class Digits(NamedTuple):
    """Images [N, 1, 8, 8] of mean 0 and variance 1, and classes [N]."""

    images: Tensor
    classes: Tensor

    def __getitem__(self, index: Tensor) -> Digits:  # type: ignore[override]
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


def train(name: str, seed: int, options: argparse.Namespace, bar: tqdm) -> Run:
    training, testing = load(options.train_size)
    torch.manual_seed(seed)  # of the weights and of the order of images
    model = VARIANTS[name](options)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), options.lr, momentum=0.9, weight_decay=options.weight_decay
    )
    per_epoch = len(training.classes) // options.batch_size
    num_steps = options.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=num_steps, pct_start=0.1
    )
    run, losses = Run([], []), []
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


def spread(values: list[float]) -> str:
    """Mean and, of several, its standard error."""
    text = f"{statistics.mean(values):.3g}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values) / len(values) ** 0.5:.1g}"
    return text


def report(runs: dict[str, list[Run]]) -> str:
    lines = [
        f"\n{'norm':<8}  {'test error, %':<15}  {'over all points':<15}  training loss at the end"
    ]
    for name, of_seeds in runs.items():
        last = spread([100 - run.accuracies[-1] for run in of_seeds])
        mean = spread([100 - statistics.mean(run.accuracies) for run in of_seeds])
        loss = spread([run.losses[-1] for run in of_seeds])
        lines.append(f"{name:<8}  {last:<15}  {mean:<15}  {loss}")
    return "\n".join(lines)


def plot(runs: dict[str, list[Run]], options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, field, label in zip(
        panels, Run._fields, ("training loss", "test error, %"), strict=True
    ):
        for name, of_seeds in runs.items():
            values = torch.tensor([getattr(run, field) for run in of_seeds])  # [seeds, epochs]
            if field == "accuracies":
                values = 100 - values
            mean = values.mean(dim=0)
            error = values.std(dim=0, correction=int(len(values) > 1)) / len(values) ** 0.5
            steps = options.every * torch.arange(1, len(mean) + 1)
            (line,) = panel.plot(steps, mean, marker="o", markersize=3, label=name)
            panel.fill_between(steps, mean - error, mean + error, alpha=0.2, color=line.get_color())
        panel.set(xlabel="step", ylabel=label, yscale="log")
        panel.grid(alpha=0.3, which="both")
    panels[0].legend()
    figure.suptitle(
        f"Digits, {options.batch_size} images a batch, {len(options.seeds)} seeds, lr {options.lr}"
    )
    figure.savefig(options.plot, dpi=150)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--norms", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--every", type=int, default=100, help="steps between points of the curves")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--lr", type=float, default=0.003, help="the highest, after a warm-up")
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument(
        "--share",
        type=float,
        default=0.003,
        help="by which BCN's estimates move at each step, of the size of a learning rate; "
        "0 normalises by the batch instead",
    )
    parser.add_argument("--train-size", type=int, default=1000, help="others are for testing")
    parser.add_argument("--threads", type=int, default=1, help="small images want few")
    parser.add_argument("--plot", type=Path, help="file for the curves, such as curves.png")
    parser.add_argument("--quick", action="store_true", help="one short epoch, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.seeds, options.train_size, options.every = 1, [0], 32, 8
    steps = options.epochs * (options.train_size // options.batch_size)
    if steps < options.every or not 0 <= options.share <= 1:
        parser.error(
            "expected at least as many steps as --every, and --share in [0, 1]; "
            f"got {steps} steps, --every {options.every}, --share {options.share}"
        )
    if options.plot:
        options.plot.touch()
    return options


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    steps = options.epochs * (options.train_size // options.batch_size)
    runs: dict[str, list[Run]] = {name: [] for name in options.norms}
    with tqdm(total=steps * len(options.seeds) * len(runs), unit="step") as bar:
        for seed in options.seeds:
            for name, of_seeds in runs.items():
                bar.set_description(f"{name}, seed {seed}")
                of_seeds.append(train(name, seed, options, bar))
    print(report(runs))
    if options.plot:
        plot(runs, options)


if __name__ == "__main__":
    main()
