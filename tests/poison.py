"""Memory around tensors that kernels read and write: of one value, and looked at afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

#: Elements before and after: the address of the first is a multiple of nothing but an element.
MARGIN = 67


def poisoned(
    like: Tensor, fill: float = torch.nan, device: torch.device | str | None = None
) -> Tensor:
    """An output full of `fill` amid more of it, on the device; `like`, on its own, is dense.

    Shape, strides and dtype are those of `like`.
    """
    size = like.numel() + 2 * MARGIN
    storage = torch.full((size,), fill, dtype=like.dtype, device=device or like.device)
    return storage.as_strided(like.shape, like.stride(), MARGIN)


def amid(
    tensor: Tensor, fill: float = torch.nan, device: torch.device | str | None = None
) -> Tensor:
    """A dense tensor, strides included, amid elements of `fill`, on the device or its own."""
    return poisoned(tensor, fill, device).copy_(tensor)


def surroundings(tensor: Tensor) -> Tensor:
    """[2 MARGIN]: what lies before and after a tensor of `poisoned` or `amid`."""
    storage = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    storage.set_(tensor.untyped_storage())
    return torch.cat([storage[:MARGIN], storage[MARGIN + tensor.numel() :]])


def moved(tensor: Tensor, device: str) -> Tensor:
    """On the device with all memory that it is part of, surroundings included."""
    if tensor.device.type == device:
        return tensor
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def all_moved(arguments: dict, device: str) -> dict:
    """The arguments, those that are tensors as `moved` gives them."""
    return {k: moved(v, device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
