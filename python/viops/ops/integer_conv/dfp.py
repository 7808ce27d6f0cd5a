"""Tensors in dynamic fixed point: int16 integers that share one scale.

Source: Das et al., "Mixed Precision Training of Convolutional Neural Networks using Integer
Operations", ICLR 2018, arXiv:1802.00930, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ... import checks
from ...dispatch import is_plain_eager

#: Widest magnitude: all of int16 but its sign, so that two products of it fit into an int32.
MOST_BITS = 15


class DfpTensor:
    """A tensor in dynamic fixed point: its values are ``data * scale``.

    ``data, scale = t`` takes it apart.  `viops.quantize_dfp` makes one of floats; this constructor
    takes integers that exist.  They must not be written into later.

    Args:
        data: int16, any shape and strides, within ±(2**bits - 1).
        scale: float32, one element, finite and positive; a tensor of one element is taken as [].
        bits: of a magnitude, 1 to 15.
        carrier: a floating-point tensor of data's shape that gradients flow to, as if the values
            were its own (the straight-through estimate); its values are not read.  None: no
            gradient.

    Returns:
        The tensor; its attributes are named as the arguments.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    data: Tensor
    scale: Tensor
    bits: int
    carrier: Tensor | None

    def __init__(
        self, data: Tensor, scale: Tensor, bits: int = MOST_BITS, carrier: Tensor | None = None
    ) -> None:
        if not isinstance(data, Tensor):
            raise TypeError(f"data: expected a torch.Tensor, got {type(data).__name__}")
        if data.dtype is not torch.int16:
            raise TypeError(f"data: expected int16, got {data.dtype}")
        checks.check_layout("data", data)
        if not isinstance(scale, Tensor):
            raise TypeError(f"scale: expected a torch.Tensor, got {type(scale).__name__}")
        if scale.dtype is not torch.float32:
            raise TypeError(f"scale: expected float32, got {scale.dtype}")
        if scale.numel() != 1:
            raise ValueError(f"scale: expected one element, got shape {list(scale.shape)}")
        checks.check_same("device", "scale", scale.device, "data", data.device)
        bits = check_bits(bits)
        if carrier is not None:
            if not isinstance(carrier, Tensor) or not carrier.is_floating_point():
                kind = carrier.dtype if isinstance(carrier, Tensor) else type(carrier).__name__
                raise TypeError(f"carrier: expected a floating-point tensor or None, got {kind}")
            if carrier.shape != data.shape:
                raise ValueError(
                    f"carrier: shape {list(carrier.shape)} differs from data's {list(data.shape)}"
                )
        if is_plain_eager(data, scale):
            limit = 2**bits - 1
            if data.numel() and not -limit <= int(data.min()) <= int(data.max()) <= limit:
                raise ValueError(
                    f"data: expected values within ±{limit}, of {bits} bits, "
                    f"got {int(data.min())} to {int(data.max())}"
                )
            if not 0 < float(scale) < float("inf"):
                raise ValueError(f"scale: expected a finite positive number, got {float(scale)}")
        self.data, self.scale, self.bits, self.carrier = data, scale.reshape(()), bits, carrier

    @classmethod
    def trusted(
        cls, data: Tensor, scale: Tensor, bits: int, carrier: Tensor | None = None
    ) -> DfpTensor:
        """The same of arguments that are known to be right."""
        made = cls.__new__(cls)
        made.data, made.scale, made.bits, made.carrier = data, scale, bits, carrier
        return made

    def dequantize(self) -> Tensor:
        """The values, float32."""
        return self.data.float() * self.scale

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    def dim(self) -> int:
        return self.data.dim()

    def detach(self) -> DfpTensor:
        """The same without a carrier."""
        return self.with_carrier(None)

    def with_carrier(self, carrier: Tensor | None) -> DfpTensor:
        """The same with another carrier."""
        return DfpTensor.trusted(self.data, self.scale, self.bits, carrier)

    def reshape(self, *shape: int) -> DfpTensor:
        """The same values in another shape."""
        carrier = None if self.carrier is None else self.carrier.reshape(*shape)
        return DfpTensor.trusted(self.data.reshape(*shape), self.scale, self.bits, carrier)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.data, self.scale))

    def __repr__(self) -> str:
        return f"DfpTensor(shape={list(self.shape)}, bits={self.bits}, scale={self.scale})"


def check_bits(bits: Any) -> int:
    """1 to 15."""
    return checks.check_int("bits", bits, 1, MOST_BITS, "int16 has no more")


def _flatten(tensor: DfpTensor) -> tuple[list[Any], int]:
    return [tensor.data, tensor.scale, tensor.carrier], tensor.bits


def _unflatten(parts: Any, bits: int) -> DfpTensor:
    data, scale, carrier = parts
    return DfpTensor.trusted(data, scale, bits, carrier)


pytree.register_pytree_node(DfpTensor, _flatten, _unflatten, serialized_type_name="viops.DfpTensor")
