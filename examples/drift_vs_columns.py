"""How far gradients of reversible columns lie from those of the stored form, against their number.

    python examples/drift_vs_columns.py --plot drift.png

Backward rebuilds each column's inputs from its outputs: what rounding adds is divided by alpha,
column after column, unless what it takes away is carried along, which viops does for all dtypes
but float64.  The number is norm(difference) / norm(stored), of the gradients to all parameters
together, for one model in both forms, in each dtype and for each value of alpha; then without what
is carried, as the authors' code has it.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch
from columns import Panel, loss_of, make_parser, parse, plot, small_revcol
from torch import Tensor
from tqdm import tqdm
from viops.models.revcol import RevCol

#: The dtype of weights and activations, and autocast's.
DTYPES = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16 autocast": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, None),
}


def gradients(model: RevCol, images: Tensor, autocast: torch.dtype | None) -> Tensor:
    """To all parameters, in float64 and joined."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        loss = loss_of(model, images)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([grad.double().flatten() for grad in grads])


def drift(
    num_columns: int, alpha: float, dtype: str, exact: bool, options: argparse.Namespace
) -> float:
    weights, autocast = DTYPES[dtype]
    model = small_revcol(num_columns, alpha).to(weights)
    model.exact = exact
    generator = torch.Generator().manual_seed(1)
    shape = options.batch_size, 3, options.image_size, options.image_size
    images = torch.randn(shape, generator=generator).to(weights)
    found = gradients(model, images, autocast)
    model.reversible = False
    truth = gradients(model, images, autocast)
    return ((found - truth).norm() / truth.norm()).item()


Curves = dict[tuple[str, bool], dict[str, list[float]]]


def report(curves: Curves, options: argparse.Namespace) -> str:
    lines = [
        "\nnorm(difference) / norm(stored) of all gradients",
        f"{'dtype':<18}  {'rests':<7}  {'alpha':>5}"
        + "".join(f"{n:>4} columns" for n in options.columns),
    ]
    for (dtype, exact), of_alphas in curves.items():
        for alpha, errors in of_alphas.items():
            numbers = "".join(f"{error:>12.1e}" for error in errors)
            lines.append(f"{dtype:<18}  {'carried' if exact else 'lost':<7}  {alpha:>5}{numbers}")
    return "\n".join(lines)


def main() -> None:
    parser = make_parser(__doc__.partition("\n")[0])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    parser.set_defaults(columns=[4, 8, 16, 32])
    options = parse(parser)
    kinds = [(dtype, exact) for dtype in DTYPES for exact in (True, False)]
    kinds.remove(("float64", True))  # which carries nothing
    curves: Curves = {kind: {} for kind in kinds}
    with tqdm(total=len(kinds) * len(options.alphas) * len(options.columns)) as bar:
        for dtype, exact in kinds:
            for alpha in options.alphas:
                errors = curves[dtype, exact][f"{alpha:g}"] = []
                for num_columns in options.columns:
                    errors.append(drift(num_columns, alpha, dtype, exact, options))
                    bar.update()
    print(report(curves, options))
    if options.plot:
        panels = [
            Panel(
                f"relative error, {dtype}, rests {'carried' if exact else 'lost'}",
                "log",
                {f"alpha {alpha}": errors for alpha, errors in of_alphas.items()},
            )
            for (dtype, exact), of_alphas in curves.items()
            if dtype in ("float32", "bfloat16 autocast")
        ]
        plot("Gradients of reversible columns against stored", panels, options)


if __name__ == "__main__":
    main()
