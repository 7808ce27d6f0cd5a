"""Convolutions and linear layers of INT16 integers, with float32 master weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ... import optimizer_steps
from ...dispatch import is_plain_eager, is_reference_forced
from ...tensor_state import state_of
from . import convolution, op
from .dfp import DfpTensor


class _Kept(NamedTuple):
    """A weight's integers and what they were made of."""

    key: tuple
    #: As long as it is referred to, even weakly, no other storage can be at the key's address.
    storage: StorageWeakRef
    integers: DfpTensor

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of a layer makes its own."""

    def __reduce__(self) -> tuple:
        return _nothing, ()


def _nothing() -> None:
    """What is unpickled in a _Kept's place."""


class _Integer(nn.Module):
    """A layer that multiplies integers; a mixin before torch's class.

    The weight stays float.  Its integers, and what the kernels make of them, are kept until it
    changes: until torch's version counter counts a write, another tensor or memory is in its
    place, or any torch.optim.Optimizer has taken a step.  A write that none of these shows needs
    `forget`: one through ``weight.data``, through NumPy or another tensor of the same memory, such
    as a training loop without an optimizer has.
    """

    if TYPE_CHECKING:  # attributes of torch's classes

        def __getattr__(self, name: str) -> Any: ...

    def __init__(
        self,
        *args: Any,
        bits: int = 13,
        scaling: str = "power_of_two",
        rounding: str = "nearest",
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._set_options(bits, scaling, rounding)

    def _set_options(self, bits: int, scaling: str, rounding: str) -> None:
        self.bits = op.check_options(bits, scaling, rounding, None)
        self.scaling, self.rounding = scaling, rounding
        self._kept: _Kept | None = None

    @property
    def _options(self) -> dict[str, Any]:
        return {"bits": self.bits, "scaling": self.scaling, "rounding": self.rounding}

    def quantized_weight(self) -> DfpTensor:
        """The weight's integers; gradients of what is computed from them go to the weight."""
        weight, options = self.weight, tuple(self._options.values())
        if not self._may_keep(weight):
            return self._quantize(weight)
        key = state_of(weight), options, optimizer_steps.count()
        kept = self._kept  # read once: another thread may change it meanwhile
        storage = weight.untyped_storage()
        if kept is None or kept.key != key or kept.storage.cdata != storage._cdata:
            optimizer_steps.start()
            self._kept = kept = None  # before others of their size are made
            with torch.inference_mode(False), torch.no_grad():  # training may take them next
                integers = self._quantize(weight.detach())
            self._kept = kept = _Kept(key, StorageWeakRef(storage), integers)
        integers = kept.integers
        carrier = weight if weight.requires_grad and torch.is_grad_enabled() else None
        return DfpTensor.trusted(integers.data, integers.scale, integers.bits, carrier)

    def _quantize(self, weight: Tensor) -> DfpTensor:
        return op.quantize_operand(
            "weight", weight, self.bits, self.scaling, self.rounding, generator=None
        )

    def _may_keep(self, weight: Tensor) -> bool:
        """Not within a trace or a transform; not what others write, or anew for each use."""
        return (
            is_plain_eager(weight)
            and not is_reference_forced()
            and type(weight) is nn.Parameter
            and not weight.is_inference()
            and not weight.is_cuda
            and not weight.is_shared()
            and self.rounding != "stochastic"
        )

    def forget(self) -> None:
        """Drops the weight's integers, so that the next use makes them anew."""
        self._kept = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.forget()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        how = f"bits={self.bits}, scaling={self.scaling}, rounding={self.rounding}"
        return f"{super().extra_repr()}, {how}"


class Int16Conv2d(_Integer, nn.Conv2d):
    """nn.Conv2d whose products are those of INT16 integers, forward and backward.

    Args:
        *args, **options: of nn.Conv2d.
        bits, scaling, rounding: as in `viops.integer_conv2d`.

    Takes a floating-point [B, C, H, W] or [C, H, W], or a DfpTensor [B, C, H, W]; returns float32.
    state_dict keys are those of nn.Conv2d.  The weight's integers are kept until its version
    counter counts a write, another tensor or memory takes its place, or an optimizer has taken a
    step; a write through ``weight.data`` or NumPy between those needs `forget`.

    Source: Das et al., arXiv:1802.00930.
    """

    def forward(self, input: Tensor | DfpTensor) -> Tensor:
        """[B, C, H, W] -> [B, O, OH, OW]."""
        if isinstance(input, Tensor) and input.dim() == 3:
            return self.forward(input[None])[0]
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            if not isinstance(input, Tensor):
                raise TypeError(
                    f"input: expected a torch.Tensor where padding_mode is {self.padding_mode!r}, "
                    f"got {type(input).__name__}"
                )
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        if isinstance(input, Tensor):
            input = op.kept_or_quantized(input, **self._options)
        return convolution.integer_conv2d(  # type: ignore[return-value]
            input,
            self.quantized_weight(),
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            **self._options,
        )


class Int16Linear(_Integer, nn.Linear):
    """nn.Linear whose products are those of INT16 integers, forward and backward.

    Args:
        *args, **options: of nn.Linear.
        bits, scaling, rounding: as in `viops.integer_linear`.

    Takes a floating-point [..., K] or a DfpTensor of it; returns float32.  state_dict keys are
    those of nn.Linear.

    Source: Das et al., arXiv:1802.00930.
    """

    def forward(self, input: Tensor | DfpTensor) -> Tensor:
        """[..., K] -> [..., O]."""
        if isinstance(input, Tensor):
            input = op.kept_or_quantized(input, **self._options)
        return convolution.integer_linear(
            input, self.quantized_weight(), self.bias, **self._options
        )


__all__ = ["Int16Conv2d", "Int16Linear"]
