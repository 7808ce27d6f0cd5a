"""Parameters and inputs by seed for what tests/golden/revcol.npz holds, and how it was made.

The arrays are what the classification code of github.com/megvii-research/RevCol computes on a CPU,
in float64 and rounded to float32, with the tensors that `draw_state` and rmt_golden's `draw_images`
make.  Models t, s, b, l, xl, h are its revcol_tiny to revcol_huge; those of `NARROW` are its
FullNet and, where `from_last` is set, its RevColHuge, of few channels.  In names, "supervised" is
inter_supv, and "plain" is none.

- ``<model>_<plain or supervised>_keys``: the SHA-256 of its state_dict's names and shapes, in
  order, as `digest` makes it.
- ``<model>_<plain or supervised>``: in eval mode, every fourth logit of two images of `IMAGES`: of
  the last column [2, C] or of all four classifiers [4, 2, C].  This is of t, b without
  supervision, and the narrow ones.
- ``<model>_images``: of the supervised model, what `sample` keeps of the decoders' images.
- ``<model>_<plain or supervised>_grads``: in training mode, with no drop path, the norms of the
  gradients of the sum of all logits times `draw_weights`, and of all decoded images times those, to
  all parameters, by rising name.  The authors' stored and reversible forms agree on them.  This
  is of t with supervision, and the narrow ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rmt_golden import SEED, digest, draw_images, even
from torch import Tensor
from viops.models.revcol import Config

PATH = Path(__file__).parent / "golden" / "revcol.npz"
IMAGES = (2, 3, 64, 96)
NARROW = {
    "narrow": Config((12, 16, 24, 32), (1, 2, 2, 1), 4, 0.2),
    "wide_filters": Config((8, 12, 16, 20), (2, 1, 1, 1), 8, 0.2, kernel_size=5),
    "from_last": Config((12, 16, 24, 32), (1, 1, 2, 1), 4, 0.2, from_last=True),
}
#: Of the narrow models; that of wide_filters has the simpler decoders.
NUM_CLASSES = {"narrow": 36, "wide_filters": 1004, "from_last": 36}

__all__ = [
    "IMAGES",
    "NARROW",
    "NUM_CLASSES",
    "digest",
    "draw_images",
    "draw_state",
    "draw_weights",
    "load",
    "sample",
    "supervised_loss",
]


def load() -> dict[str, Tensor]:
    """The arrays of the golden file; the digests are bytes."""
    with np.load(PATH) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def draw_state(state_dict: Mapping[str, Tensor], seed: int = SEED) -> dict[str, Tensor]:
    """Values for all of a state_dict, by rising name, as float32.

    gamma is about 1 and alpha about 0.5, so that both count in the outputs.
    """
    random = np.random.RandomState(seed)
    drawn = dict(state_dict)
    for name in sorted(state_dict):
        shape = tuple(state_dict[name].shape)
        value = even(random, *shape)
        if name.endswith("bias"):
            value *= 0.1
        elif ".alpha" in name:
            value = 0.5 + 0.2 * value
        elif len(shape) == 1:
            value = 1 + 0.1 * value
        else:
            value /= np.sqrt(np.prod(shape[1:]))
        drawn[name] = torch.from_numpy(value.astype(np.float32))
    return drawn


def draw_weights(out: Tensor, index: int) -> Tensor:
    """Those of a loss, as many as a model's output number `index` has values."""
    return draw_images(*out.shape, seed=SEED + 2 + index).to(out.dtype)


def supervised_loss(outputs: Sequence[Tensor]) -> Tensor:
    """The sum of all values, each times a drawn weight."""
    return torch.stack([(out * draw_weights(out, i)).sum() for i, out in enumerate(outputs)]).sum()


def sample(images: Sequence[Tensor]) -> Tensor:
    """Some pixels of N images [B, C, H, W], of all places in a patch -> [N, B, C, h, w]."""
    return torch.stack([image[:, :, 3::9, 1::13] for image in images])
