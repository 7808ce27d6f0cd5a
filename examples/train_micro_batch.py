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

import viops
from digits import Panel, Run, Variants, make_parser, parse, plot, small_resnet, spread, train_all
from torch import nn


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


VARIANTS: Variants = {
    "BN": with_bn,
    "GN": with_gn,
    "GN+WS": with_gn_and_ws,
    "BCN+WS": with_bcn_and_ws,
}


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


def panels(runs: dict[str, list[Run]]) -> list[Panel]:
    losses = {name: [run.losses for run in of_seeds] for name, of_seeds in runs.items()}
    errors = {
        name: [[100 - value for value in run.accuracies] for run in of_seeds]
        for name, of_seeds in runs.items()
    }
    return [Panel("training loss", "log", losses), Panel("test error, %", "log", errors)]


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], got {text}")
    return value


def parse_options() -> argparse.Namespace:
    parser = make_parser(
        __doc__.partition("\n")[0],
        batch_size=2,
        epochs=4,
        every=100,
        seeds=[0, 1, 2, 3, 4],
        lr=0.003,
    )
    parser.add_argument("--norms", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument(
        "--share",
        type=share,
        default=0.003,
        help="by which BCN's estimates move at each step, of the size of a learning rate; "
        "0 normalises by the batch instead",
    )
    return parse(parser, epochs=1, seeds=[0], train_size=32, every=8)


def main() -> None:
    options = parse_options()
    runs = train_all({name: VARIANTS[name] for name in options.norms}, options)
    print(report(runs))
    if options.plot:
        plot(panels(runs), options)


if __name__ == "__main__":
    main()
