"""What changes with a tensor's values, for keys of what is kept with it."""

from __future__ import annotations

from torch import Tensor


def state_of(tensor: Tensor) -> tuple:
    """Another one after a write that torch's version counter counts, or where memory, strides,
    shape or dtype are others.

    Not for tensors made in inference mode, which have no counter.  Freed memory may come back under
    its old address: who keeps no tensor alive compares storages as well.
    """
    return tensor._version, tensor.data_ptr(), tensor.stride(), tensor.shape, tensor.dtype
