"""Parameters and inputs by seed for what tests/golden/rmt.npz holds, and how it was made.

The arrays are what the classification code of github.com/qhfan/RMT computes on a CPU, in float64
and rounded to float32, with the tensors that `draw_state` and `draw_images` below make; angles and
decays are those that its constructors make.

- ``<size>_keys``: the SHA-256 of its state_dict's names and shapes, in order, as `digest` makes it;
  sizes t, s, b, l are RMT_T3, RMT_S, RMT_M2, RMT_L6.
- ``<size>_<h>x<w>``: every fourth logit in eval mode, of two images of h x w pixels.
- ``t_train_*``: RMT_T3 in training mode, with no drop path, on four images of 64 x 64: every fourth
  logit, the norms of the batch norms' running statistics afterwards, and the norms of the gradients
  of sum(logits * weight) to all parameters, both by rising name.
- ``whole_*`` and ``chunk_*``: VisionRetentionAll and VisionRetentionChunk with 32 channels and 4
  heads on two grids of 5 x 7, RetNetRelPos2d's initial value 2 and range 4: its sin and cos, the
  output, and the gradients of sum(output * weight) to the input and all parameters.

Images and grids of tokens are drawn with seed SEED + 1, weights with SEED + 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PATH = Path(__file__).parent / "golden" / "rmt.npz"
SEED = 5
CONSTANT = ("angle", "decay", "num_batches_tracked")


def load() -> dict[str, Tensor]:
    """The arrays of the golden file; the digests are bytes."""
    with np.load(PATH) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def digest(state_dict: Mapping[str, Tensor]) -> Tensor:
    """[32], uint8."""
    lines = [f"{name} {list(value.shape)}" for name, value in state_dict.items()]
    return torch.tensor(list(hashlib.sha256("\n".join(lines).encode()).digest()), dtype=torch.uint8)


def even(random: np.random.RandomState, *shape: int) -> np.ndarray:
    """Evenly distributed values of mean 0 and variance 1, the same with every version of numpy."""
    return (random.random_sample(shape) - 0.5) * np.sqrt(12)


def _gain(name: str) -> float:
    if "q_proj" in name or "k_proj" in name:
        return 1.5  # attention is far from uniform
    return 0.4 if "blocks" in name else 1.0


def draw_state(state_dict: Mapping[str, Tensor], seed: int = SEED) -> dict[str, Tensor]:
    """Values for all of a state_dict but what is constant, by rising name, as float32."""
    random = np.random.RandomState(seed)
    drawn = dict(state_dict)
    for name in sorted(state_dict):
        if name.endswith(CONSTANT):
            continue
        shape = tuple(state_dict[name].shape)
        value = even(random, *shape)
        if name.endswith(("bias", "running_mean")):
            value *= 0.1
        elif name.endswith("running_var"):
            value = 1 + 0.3 * value
        elif "gamma" in name:
            value *= 0.3
        elif len(shape) == 1:
            value = 1 + 0.1 * value
        else:
            value *= _gain(name) / np.sqrt(np.prod(shape[1:]))
        drawn[name] = torch.from_numpy(value.astype(np.float32))
    return drawn


def draw_images(*shape: int, seed: int = SEED + 1) -> Tensor:
    """Images, grids of tokens and weights of a loss, as float32."""
    return torch.from_numpy(even(np.random.RandomState(seed), *shape).astype(np.float32))
