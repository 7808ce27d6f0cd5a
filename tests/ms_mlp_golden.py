"""Parameters and inputs by seed for what tests/golden/ms_mlp.npz holds, and how it was made.

The arrays are what the classification code of github.com/JegZheng/MS-MLP computes on a CPU, in
float64 and rounded to float32, with the tensors that `draw_state` below and `draw_images` make.

- ``<size>_keys``: the SHA-256 of its state_dict's names and shapes, in order, as `digest` makes it;
  sizes t, s, b are those of its configs tiny, small, base.
- ``<size>_<batch>x<h>x<w>``: every fourth logit in eval mode, of so many images of h x w pixels.
- ``t_train_*``: tiny in training mode, with no drop path, on two images of 64 x 96: every fourth
  logit, and the norms of the gradients of sum(logits * weight) to all parameters, by rising name.
- ``block_*``: MixShiftBlock of `BLOCK` on two grids of 5 x 7: what enters its norm, the output, and
  the gradients of sum(output * weight) to the input and all parameters.

Images and grids of channels are drawn with seed rmt_golden.SEED + 1, weights of a loss with
rmt_golden.SEED + 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from rmt_golden import SEED, digest, draw_images, even
from torch import Tensor

PATH = Path(__file__).parent / "golden" / "ms_mlp.npz"
SIZES = {"t": ["2x224x224", "2x64x96"], "s": ["1x224x224"], "b": ["1x224x224"]}
#: Channels, rolls and sides of filters of the block alone; torch.chunk deals 4, 4, 4, 4, 3.
BLOCK = {"dim": 19, "shift_dist": (-2, -1, 0, 1, 2), "mix_size": (1, 3, 3, 5, 7)}
BLOCK_SHAPE = (2, 19, 5, 7)

__all__ = ["BLOCK", "BLOCK_SHAPE", "SEED", "SIZES", "digest", "draw_images", "draw_state", "load"]


def load() -> dict[str, Tensor]:
    """The arrays of the golden file; the digests are bytes."""
    with np.load(PATH) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def draw_state(state_dict: Mapping[str, Tensor], seed: int = SEED) -> dict[str, Tensor]:
    """Values for all of a state_dict, by rising name, as float32; gamma is about 1."""
    random = np.random.RandomState(seed)
    drawn = dict(state_dict)
    for name in sorted(state_dict):
        shape = tuple(state_dict[name].shape)
        value = even(random, *shape)
        if name.endswith("bias"):
            value *= 0.1
        elif len(shape) == 1:
            value = 1 + 0.1 * value
        else:
            value /= np.sqrt(np.prod(shape[1:]))
        drawn[name] = torch.from_numpy(value.astype(np.float32))
    return drawn
