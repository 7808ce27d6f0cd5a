"""Trains a small ResNet on scikit-learn's digits in float32 and in INT16.

    python examples/train_int16.py --plot curves.png

In INT16, as in Das et al., "Mixed Precision Training of Convolutional Neural Networks using Integer
Operations", all convolutions but the first multiply integers, forward and backward; the first
convolution, the last linear layer, batch norm and the optimizer's weights stay float32.  Both start
from the same weights, see the same images in the same order and take as many steps.  The curves
show the mean over seeds and its standard error.
"""

from __future__ import annotations

import argparse
import statistics
from typing import NamedTuple

import torch
import torch.nn.functional as F
import viops
from digits import (
    Panel,
    Run,
    Variants,
    load,
    make_parser,
    parse,
    plot,
    small_resnet,
    spread,
    train_all,
)
from torch import Tensor, nn


def in_float32(options: argparse.Namespace) -> nn.Module:
    return small_resnet(nn.BatchNorm2d, options.width)


def in_int16(options: argparse.Namespace) -> nn.Module:
    return viops.patch.int16(
        in_float32(options), bits=options.bits, scaling=options.scaling, rounding=options.rounding
    )


VARIANTS: Variants = {"float32": in_float32, "INT16": in_int16}


class Noise(NamedTuple):
    """Signal-to-noise ratios in dB of what a layer computes, against float64."""

    output: float
    grad_weight: float
    grad_input: float


def signal_to_noise(result: Tensor, truth: Tensor) -> float:
    """In dB."""
    noise = result.double() - truth
    return 10 * (result.double().square().sum() / noise.square().sum()).log10().item()


def noise_of(layer: nn.Conv2d, x: Tensor, grad_y: Tensor) -> Noise:
    """Of x [B, C, H, W] and the gradient [B, O, OH, OW] to the layer's output."""

    def in_float64(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)

    x = x.detach().requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (x, layer.weight)]
    y, truth = layer(x), in_float64(*wide)
    grad_x, grad_weight = torch.autograd.grad(y, (x, layer.weight), grad_y)
    true_grad_x, true_grad_weight = torch.autograd.grad(truth, wide, grad_y.double())
    return Noise(
        signal_to_noise(y.detach(), truth.detach()),
        signal_to_noise(grad_weight, true_grad_weight),
        signal_to_noise(grad_x, true_grad_x),
    )


def noise_by_layer(model: nn.Module, options: argparse.Namespace) -> dict[str, Noise]:
    """Of the INT16 layers, on the activations and gradients of a batch in training."""
    seen: dict[str, tuple[nn.Conv2d, Tensor, Tensor]] = {}  # with the input and the output

    def note(name: str, layer: nn.Conv2d, x: Tensor, y: Tensor) -> None:
        y.retain_grad()
        seen[name] = layer, x, y

    hooks = [
        layer.register_forward_hook(lambda layer, args, y, name=name: note(name, layer, args[0], y))
        for name, layer in model.named_modules()
        if isinstance(layer, viops.nn.Int16Conv2d)
    ]
    training, _ = load(options.train_size)
    images, classes = training[: options.batch_size]
    F.cross_entropy(model(images), classes).backward()
    for hook in hooks:
        hook.remove()
    return {name: noise_of(layer, x, y.grad) for name, (layer, x, y) in seen.items()}


def report_accuracy(runs: dict[str, list[Run]], seeds: list[int]) -> str:
    plain, integer = ([run.accuracies[-1] for run in runs[name]] for name in VARIANTS)
    differences = [b - a for a, b in zip(plain, integer, strict=True)]
    lines = ["\ntest accuracy, %", f"{'seed':<6}  {'float32':>7}  {'INT16':>7}  difference, points"]
    for seed, *values in zip(seeds, plain, integer, differences, strict=True):
        lines.append("{:<6}  {:7.2f}  {:7.2f}  {:+.2f}".format(seed, *values))
    means = statistics.mean(plain), statistics.mean(integer), spread(differences)
    lines.append("{:<6}  {:7.2f}  {:7.2f}  {}".format("mean", *means))
    return "\n".join(lines)


def report_noise(models: list[nn.Module], options: argparse.Namespace) -> str:
    of_seeds = [noise_by_layer(model, options) for model in models]
    lines = [
        "\nsignal-to-noise ratio of the INT16 layers against float64, dB, mean over seeds",
        f"{'layer':<14}  {'output':>6}  {'gradient to weight':>18}  {'gradient to input':>17}",
    ]
    for name in of_seeds[0]:
        output, grad_weight, grad_input = map(
            statistics.mean, zip(*(noise[name] for noise in of_seeds), strict=True)
        )
        lines.append(f"{name:<14}  {output:6.1f}  {grad_weight:18.1f}  {grad_input:17.1f}")
    return "\n".join(lines)


def panels(runs: dict[str, list[Run]]) -> list[Panel]:
    losses = {name: [run.losses for run in of_seeds] for name, of_seeds in runs.items()}
    accuracies = {name: [run.accuracies for run in of_seeds] for name, of_seeds in runs.items()}
    return [
        Panel("training loss", "log", losses),
        Panel("test accuracy, %", "linear", accuracies),
    ]


def parse_options() -> argparse.Namespace:
    parser = make_parser(
        __doc__.partition("\n")[0],
        batch_size=20,
        epochs=10,
        every=50,
        seeds=[0, 1, 2, 3, 4],
        lr=0.05,
    )
    parser.add_argument("--bits", type=int, default=13, help="of a magnitude, 1 to 15")
    parser.add_argument("--scaling", choices=("power_of_two", "max"), default="power_of_two")
    parser.add_argument(
        "--rounding", choices=("nearest", "stochastic", "truncate"), default="nearest"
    )
    return parse(parser, epochs=1, seeds=[0], train_size=160, every=4, width=8)


def main() -> None:
    options = parse_options()
    runs = train_all(VARIANTS, options)
    print(report_accuracy(runs, options.seeds))
    print(report_noise([run.model for run in runs["INT16"]], options))
    if options.plot:
        plot(panels(runs), options)


if __name__ == "__main__":
    main()
