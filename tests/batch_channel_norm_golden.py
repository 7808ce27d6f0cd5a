"""Parameters and inputs by seed for tests/golden/batch_channel_norm.npz, and how it was made.

The arrays are what github.com/joe-siyuan-qiao/Batch-Channel-Normalization computes on a CPU, in
float64 and rounded to float32, with the tensors that `draw_state` and `draw` below make.

- ``layers_*``: imagenet/models/layers.py: its BatchNorm2d(64), which has 32 groups, of x
  [4, 64, 5, 7], and its Conv2d(6, 8, 3, padding=1) of [2, 6, 5, 7].
- ``deeplab_*``: DeepLabV3/deeplab.py: PBCNorm(12, 4, 0.1) of [5, 12, 3, 4], in one
  process, and the same convolution, in which eps is added to the standard deviation.
- ``resnet_*``: imagenet/models' l_resnet18 with 10 classes, in training mode, of images
  [3, 3, 64, 64].

Of norms and convolutions (``norm_*``, ``conv_*``): the output ``y`` in training mode, the gradients
of sum(y * weight) to x and all parameters, ``grad_*``, the running statistics afterwards, and the
output in eval mode with those, ``eval``.  Of the model: the logits, the norms of the gradients of
sum(logits * weight) to all parameters and of the running statistics, by rising name.

The code calls the batch norm of its norms ``pbn``, which is ``bn`` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PATH = Path(__file__).parent / "golden" / "batch_channel_norm.npz"
SEED = 11


def load() -> dict[str, Tensor]:
    """The arrays of the golden file."""
    with np.load(PATH) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _even(random: np.random.RandomState, *shape: int) -> np.ndarray:
    """Evenly distributed values of mean 0 and variance 1, the same with every version of numpy."""
    return (random.random_sample(shape) - 0.5) * np.sqrt(12)


def draw_state(state_dict: Mapping[str, Tensor], seed: int = SEED) -> dict[str, Tensor]:
    """Values for all of a state_dict but counts, by rising name, as float32."""
    random = np.random.RandomState(seed)
    drawn = dict(state_dict)
    for name in sorted(state_dict):
        shape = tuple(state_dict[name].shape)
        if name.endswith("num_batches_tracked"):
            continue
        value = _even(random, *shape)
        if name.endswith(("bias", "running_mean")):
            value *= 0.2
        elif name.endswith("running_var") or len(shape) in (1, 3):
            value = 1 + 0.2 * value
        else:  # filters, neither small nor of mean zero
            value = (value + 0.3) / np.sqrt(np.prod(shape[1:]))
        drawn[name] = torch.from_numpy(value.astype(np.float32))
    return drawn


def draw(*shape: int, seed: int = SEED + 1) -> Tensor:
    """Inputs and weights of a loss, as float32."""
    return torch.from_numpy(_even(np.random.RandomState(seed), *shape).astype(np.float32))
