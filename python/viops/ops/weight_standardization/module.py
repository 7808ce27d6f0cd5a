"""Convolutions and linear layers that standardise their weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize

from ... import checks, optimizer_steps
from ...dispatch import forced_backend, is_plain_eager, is_reference_forced
from ...tensor_state import state_of
from ...tensors import accumulation_dtype
from . import op

Layer = TypeVar("Layer", bound="_Standardizing")


class _Rows(NamedTuple):
    """How a weight becomes rows [O, K], one a filter, and back."""

    shape: tuple[int, ...]
    #: Groups of a transposed convolution, whose weight is [C, O / groups, ...]; else 0.
    transposed_groups: int
    #: The axes in memory, where it is in channels_last; the order within a filter is nothing to it.
    order: tuple[int, ...] | None

    def of(self, weight: Tensor) -> Tensor:
        if self.transposed_groups:
            weight = _swapped(weight, self.transposed_groups)
        elif self.order is not None:
            weight = weight.permute(self.order)
        return weight.reshape(weight.shape[0], math.prod(weight.shape[1:]))

    def back(self, rows: Tensor) -> Tensor:
        if self.transposed_groups:
            groups, (channels, per_group, *kernel) = self.transposed_groups, self.shape
            filters = rows.view(groups * per_group, channels // groups, *kernel)
            return _swapped(filters, groups)
        if self.order is None:
            return rows.view(self.shape)
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return rows.view([self.shape[axis] for axis in self.order]).permute(inverse)


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """[C, O / groups, ...] -> [O, C / groups, ...]; done twice it is undone."""
    channels, per_group, *kernel = weight.shape
    filters = weight.reshape(groups, channels // groups, per_group, *kernel).transpose(1, 2)
    return filters.reshape(groups * per_group, channels // groups, *kernel)


def _order(weight: Tensor) -> tuple[int, ...] | None:
    if weight.dim() < 4 or weight.is_contiguous():
        return None
    order = (0, *range(2, weight.dim()), 1)
    return order if weight.permute(order).is_contiguous() else None


class _Computed(NamedTuple):
    """A standardised weight, what it was computed from, and what its derivative takes."""

    key: tuple
    #: The storages that the key's addresses lie in: as long as one is referred to, even weakly, no
    #: other can take its place.
    storages: tuple[StorageWeakRef, ...]
    rows: Tensor  # [O, K]
    version: int  # of rows, which a user may write into
    mean: Tensor  # [O]
    factor: Tensor  # [O]


class _Use(torch.autograd.Function):
    """A standardised weight that was computed before, with a derivative for this use of it.

    Each use has a node of its own, so that what one backward frees the next does not miss.  It
    saves what the op itself does: with torch.utils.checkpoint one may stand for the other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        gain: Tensor | None,
        options: tuple[float, bool, bool],
        computed: _Computed,
    ) -> Tensor:
        """rows [O, K] of the weight, gain [O] -> [O, K]."""
        ctx.save_for_backward(rows, gain, computed.mean, computed.factor)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return computed.rows.detach()  # another tensor of the same memory

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is None:
            return (None,) * 4
        need_weight, need_gain = ctx.needs_input_grad[:2]
        grad_weight, grad_gain = op._standardize_weight.run_backward(
            grad, *ctx.saved_tensors, *ctx.options, need_gain
        )
        return grad_weight if need_weight else None, grad_gain if need_gain else None, None, None


class _Standardizing(nn.Module):
    """A layer that standardises the filters of its weight; a mixin before torch's class.

    Where gradients are asked for, the standardised weight is taken again as long as the weight has
    not changed.  A change is what torch's version counter counts, another tensor or memory in the
    weight's place, or a step of any torch.optim.Optimizer.  `WSConv2d` says what is none.
    """

    plain: ClassVar[type[nn.Module]]
    transposed: ClassVar[bool] = False
    eps: float
    unbiased: bool
    eps_inside: bool
    gain: nn.Parameter | None
    #: Whether a CUDA graph was captured that standardises the weight.
    _was_captured: bool = False

    if TYPE_CHECKING:  # attributes of torch's classes

        def __getattr__(self, name: str) -> Any: ...

    def __init__(
        self,
        *args: Any,
        eps: float = 1e-5,
        unbiased: bool = True,
        eps_inside: bool = True,
        gain: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._set_options(eps, unbiased, eps_inside, gain)

    def _set_options(self, eps: float, unbiased: bool, eps_inside: bool, gain: bool) -> None:
        self.eps = checks.check_eps("eps", eps)
        checks.check_bool("unbiased", unbiased)
        checks.check_bool("eps_inside", eps_inside)
        self.unbiased, self.eps_inside = unbiased, eps_inside
        size = self.weight.shape[0] if not self.transposed else self.out_channels
        ones = torch.ones(size, dtype=self.weight.dtype, device=self.weight.device)
        self.register_parameter("gain", nn.Parameter(ones) if gain else None)
        self._computed: _Computed | None = None

    def standardized_weight(self) -> Tensor:
        """What the layer computes with, of weight's shape; gradients go to weight and gain."""
        weight, gain = self.weight, self.gain
        tensors = (weight,) if gain is None else (weight, gain)
        if not self._may_keep(tensors):
            return self._standardize(weight, gain)
        groups = self.groups if self.transposed else 0
        form = _Rows(tuple(weight.shape), groups, None if groups else _order(weight))
        rows, options = form.of(weight), (self.eps, self.unbiased, self.eps_inside)
        wide = None if gain is None else gain.to(accumulation_dtype(weight.dtype))
        computed = self._compute(tensors, rows.detach(), wide, options)
        return form.back(_Use.apply(rows, wide, options, computed))

    def forget(self) -> None:
        """Drops the standardised weight, so that the next use computes it anew."""
        self._computed = None

    def _may_keep(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether a result of these may outlast this call.

        Not within a trace or a transform, nor without gradients: what a network that only infers
        gets from others, such as by torch.distributed, no version counter shows.
        """
        if not (
            torch.is_grad_enabled()
            and any(t.requires_grad for t in tensors)
            and is_plain_eager(*tensors)
            and not is_reference_forced()
            and all(type(t) is nn.Parameter and not t.is_inference() for t in tensors)
        ):
            return False
        if tensors[0].is_cuda:
            if torch.cuda.is_current_stream_capturing():
                self._was_captured = True  # a replay changes weights, and no counter
            return not self._was_captured
        return not any(t.is_shared() for t in tensors)  # with processes, which count on their own

    def _standardize(self, weight: Tensor, gain: Tensor | None) -> Tensor:
        filters = _swapped(weight, self.groups) if self.transposed else weight
        out = op.standardize_weight(
            filters,
            eps=self.eps,
            unbiased=self.unbiased,
            eps_inside=self.eps_inside,
            gain=gain,
        )
        return _swapped(out, self.groups) if self.transposed else out

    def _compute(
        self,
        tensors: tuple[Tensor, ...],
        rows: Tensor,
        gain: Tensor | None,
        options: tuple[float, bool, bool],
    ) -> _Computed:
        key = (
            *map(state_of, tensors),
            options,
            (optimizer_steps.count(), forced_backend()),
            torch.cuda.current_stream(tensors[0].device) if tensors[0].is_cuda else None,
        )
        computed = self._computed  # read once: another thread may change it meanwhile
        if (
            computed is not None
            and computed.key == key
            and computed.version == computed.rows._version
            and all(
                t.untyped_storage()._cdata == kept.cdata
                for t, kept in zip(tensors, computed.storages, strict=True)
            )
        ):
            return computed
        optimizer_steps.start()
        self._computed = computed = None  # before another of its size is made
        storages = tuple(StorageWeakRef(t.untyped_storage()) for t in tensors)
        with torch.no_grad():
            out, mean, factor = op._standardize_weight(rows, gain, *options)
        self._computed = computed = _Computed(key, storages, out, out._version, mean, factor)
        return computed

    def fold(self) -> Any:
        """torch's own layer with the standardised weight, that computes the same: for inference.

        A copy, with everything else that this layer has, hooks too; a parametrized weight or bias
        becomes a plain one.

        Raises:
            TypeError: a subclass has a forward of its own.
            ValueError: hooks compute the weight, as those of torch.nn.utils.prune do.
        """
        own = next(cls for cls in type(self).__mro__ if cls.__module__ == __name__)
        if type(self).forward is not own.forward:  # type: ignore[attr-defined]
            raise TypeError(
                f"fold: expected a layer with the forward of {own.__name__}, "
                f"got {type(self).__name__} with its own"
            )
        if not parametrize.is_parametrized(self, "weight") and "weight" not in self._parameters:
            raise ValueError(
                "weight: expected a parameter, got what hooks compute: remove them first, "
                "as with torch.nn.utils.prune.remove"
            )
        folded: Any = copy.deepcopy(self)
        with torch.no_grad():
            computed = {name: getattr(folded, name) for name in self._parametrized()}
            computed["weight"] = folded._standardize(folded.weight, folded.gain)
        folded._modules.pop("parametrizations", None)
        folded.__dict__.pop("_was_captured", None)
        del folded.eps, folded.unbiased, folded.eps_inside, folded._computed
        folded._parameters.pop("gain", None)
        folded.__class__ = self.plain
        for name, value in computed.items():
            if name != "gain":
                trains = getattr(self, name).requires_grad
                setattr(folded, name, nn.Parameter(value.detach(), trains))
        return folded

    def _parametrized(self) -> list[str]:
        return list(self.parametrizations) if parametrize.is_parametrized(self) else []

    @classmethod
    def unfold(
        cls: type[Layer],
        layer: nn.Module,
        *,
        eps: float = 1e-5,
        unbiased: bool = True,
        eps_inside: bool = True,
        gain: bool = False,
    ) -> Layer:
        """A copy of torch's own layer that standardises its weight from now on.

        Standardising takes the mean and the scale of each filter away, and nothing can tell
        what they were before `fold`.  With ``gain=True`` the gains are set to the scale that the
        layer's filters have: a layer whose filters have mean zero, such as one that `fold` gives,
        then computes what it did before, and another what it did with the means taken off.
        Without gain the weight is the layer's, and each filter's output changes by a factor;
        for a layer that `fold` gives, without a gain of its own, that factor is 1 up to eps over
        the variance that the filter once had.

        Raises:
            TypeError: the layer is not of the class that this one derives from.
        """
        if type(layer) is not cls.plain:
            raise TypeError(
                f"layer: expected torch's {cls.plain.__name__}, got {type(layer).__name__}"
            )
        unfolded: Any = copy.deepcopy(layer)
        unfolded.__class__ = cls
        unfolded._set_options(eps, unbiased, eps_inside, gain)
        if gain:
            with torch.no_grad():
                filters = unfolded.weight
                if cls.transposed:
                    filters = _swapped(filters, unfolded.groups)
                factor = op._standardize_weight(
                    filters.contiguous().flatten(1), None, eps, bool(unbiased), bool(eps_inside)
                )[2]
                unfolded.gain.copy_(1 / factor)
        return unfolded

    def _apply(self: Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        self.forget()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: object) -> None:
        self.forget()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_computed": None}

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, eps={self.eps}"
        for name, usual in (("unbiased", True), ("eps_inside", True)):
            value = getattr(self, name)
            text += f", {name}={value}" * (value is not usual)
        return text + ", gain=True" * (self.gain is not None)


class _WSConv(_Standardizing):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardized_weight(), self.bias)


class WSConv1d(_WSConv, nn.Conv1d):
    """nn.Conv1d whose filters are standardised: `WSConv2d` says more."""

    plain = nn.Conv1d


class WSConv2d(_WSConv, nn.Conv2d):
    """nn.Conv2d whose filters are standardised before each use.

    In training the standardised weight is computed once a step: not again where the layer is used
    several times, or gradients are accumulated.  Whatever changes the weight ends that, but for
    what torch's version counter does not count: between two forward passes without an optimizer's
    step, writes through ``weight.data`` or NumPy, or by torch.distributed's collectives.  Call
    `forget` after those.  Without gradients it is computed at each use; `fold` gives a layer for
    inference.

    Args:
        *args, **options: those of nn.Conv2d.
        eps, unbiased, eps_inside: those of `viops.standardize_weight`.
        gain: whether each filter is multiplied with a parameter ``gain`` [O], ones at first.

    State_dict keys are those of nn.Conv2d, and ``gain`` where there is one.

    Source: Weight Standardization (Qiao et al., arXiv:1903.10520), section 3.
    """

    plain = nn.Conv2d


class WSConv3d(_WSConv, nn.Conv3d):
    """nn.Conv3d whose filters are standardised: `WSConv2d` says more."""

    plain = nn.Conv3d


class _WSConvTranspose(_Standardizing):
    transposed = True
    convolve: ClassVar[Callable[..., Tensor]]

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        output_padding = self._output_padding(
            x,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            self.weight.dim() - 2,
            self.dilation,
        )
        return type(self).convolve(
            x,
            self.standardized_weight(),
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )


class WSConvTranspose1d(_WSConvTranspose, nn.ConvTranspose1d):
    """nn.ConvTranspose1d whose filters are standardised: `WSConvTranspose2d` says more."""

    plain = nn.ConvTranspose1d
    convolve = staticmethod(F.conv_transpose1d)


class WSConvTranspose2d(_WSConvTranspose, nn.ConvTranspose2d):
    """nn.ConvTranspose2d whose filters are standardised before each use.

    A filter is what one output channel is computed with: ``weight[:, o]`` of the channels of its
    group, over axis 0 and the places of the kernel, not over what comes from one input channel.

    Args:
        *args, **options: those of nn.ConvTranspose2d, and of `WSConv2d`.
    """

    plain = nn.ConvTranspose2d
    convolve = staticmethod(F.conv_transpose2d)


class WSConvTranspose3d(_WSConvTranspose, nn.ConvTranspose3d):
    """nn.ConvTranspose3d whose filters are standardised: `WSConvTranspose2d` says more."""

    plain = nn.ConvTranspose3d
    convolve = staticmethod(F.conv_transpose3d)


class WSLinear(_Standardizing, nn.Linear):
    """nn.Linear whose rows are standardised: `WSConv2d` says more."""

    plain = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.standardized_weight(), self.bias)


__all__ = [
    "WSConv1d",
    "WSConv2d",
    "WSConv3d",
    "WSConvTranspose1d",
    "WSConvTranspose2d",
    "WSConvTranspose3d",
    "WSLinear",
]
