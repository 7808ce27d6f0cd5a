"""Inputs by seed for tests/golden/weight_standardization.npz, and how it was made.

The arrays are what github.com/joe-siyuan-qiao/Batch-Channel-Normalization computes on a CPU, in
float64 and rounded to float32, from the weights that `draw` makes: for each of SHAPES the weight
that its Conv2d hands to the convolution, and the gradient of sum(that * coefficients) to its own.

- ``inside_<name>``, ``inside_grad_<name>``: imagenet/models/layers.py, with eps below the root.
- ``outside_<name>``, ``outside_grad_<name>``: DeepLabV3/deeplab.py, with eps added to the standard
  deviation; the code of the first repository, github.com/joe-siyuan-qiao/WeightStandardization, is
  the same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PATH = Path(__file__).parent / "golden" / "weight_standardization.npz"
SEED = 7
#: [O, C / groups, kh, kw]
SHAPES = {
    "conv": (8, 6, 3, 3),
    "pointwise": (5, 24, 1, 1),
    "depthwise": (12, 1, 3, 3),
    "small": (4, 5, 2, 3),
}
#: Standard deviation and mean of the weights: of the smallest eps is a large part.
SCALES = {"conv": (0.1, 0.03), "pointwise": (0.3, 0.0), "depthwise": (1.0, 0.5), "small": (1e-3, 0)}


def load() -> dict[str, Tensor]:
    """The arrays of the golden file."""
    with np.load(PATH) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _even(random: np.random.RandomState, *shape: int) -> np.ndarray:
    """Evenly distributed values of mean 0 and variance 1, the same with every version of numpy."""
    return (random.random_sample(shape) - 0.5) * np.sqrt(12)


def draw(name: str) -> tuple[Tensor, Tensor]:
    """A weight and the coefficients of its loss, float32, the same with every version of numpy."""
    random = np.random.RandomState(SEED + list(SHAPES).index(name))
    deviation, mean = SCALES[name]
    weight = _even(random, *SHAPES[name]) * deviation + mean
    coefficients = _even(random, *SHAPES[name])
    return (
        torch.from_numpy(weight.astype(np.float32)),
        torch.from_numpy(coefficients.astype(np.float32)),
    )
