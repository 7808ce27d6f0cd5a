"""Modules of batch channel norm, in one process and over several."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ... import checks
from ...tensors import accumulation_dtype, laid_out_as
from . import op, reference

Module = TypeVar("Module", bound=nn.Module)


class _BatchChannelNorm(nn.Module):
    #: Holds the parameters and statistics of the channels; its forward is not called.
    channel_norm: ClassVar[type[nn.Module]]
    #: How many axes x may have; None is any.
    dims: ClassVar[tuple[int, ...] | None] = None
    bn: Any

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        estimate: bool = False,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_int("num_features", num_features, 1, None, "")
        eps = checks.check_eps("eps", eps)
        if momentum is not None:
            op.check_momentum(momentum)
        checks.check_bool("estimate", estimate)
        bn = self.channel_norm(num_features, eps, momentum, device=device, dtype=dtype)
        self._set_up(bn, num_groups, estimate, activation)

    def _set_up(self, bn: Any, num_groups: int, estimate: bool, activation: str | None) -> None:
        checks.check_int("num_groups", num_groups, 1, None, "")
        if bn.num_features % num_groups:
            raise ValueError(
                f"num_groups: expected a divisor of num_features = {bn.num_features}, "
                f"got {num_groups}"
            )
        if activation not in (None, "relu"):
            raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
        self.num_groups = num_groups
        self.estimate = estimate
        self.activation = activation
        self.bn = bn
        if self.estimate:
            speed = torch.zeros(1, dtype=bn.running_mean.dtype, device=bn.running_mean.device)
            bn.register_buffer("estbn_moving_speed", speed)
        self.weight = nn.Parameter(bn.weight.detach().new_ones(1, num_groups, 1))
        self.bias = nn.Parameter(bn.weight.detach().new_zeros(1, num_groups, 1))

    @property
    def num_features(self) -> int:
        return self.bn.num_features

    def reset_parameters(self) -> None:
        """As at construction."""
        self.bn.reset_parameters()
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        if self.estimate:
            self.bn.estbn_moving_speed.zero_()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [B, C, ...] -> [B, C, ...], with residual [B, C, ...] added before the activation."""
        self._check(x)
        if not self.bn.training:
            return self._normalize(x, residual, False)
        if _is_recomputing():
            # the running statistics have been moved: estimates are what they normalised by
            return self._normalize(x, residual, not self.estimate, stay=True)
        return self._normalize(x, residual, True, self._momentum())

    def _check(self, x: Tensor) -> None:
        if isinstance(self.bn, nn.SyncBatchNorm):
            raise TypeError(
                "bn: torch's SyncBatchNorm has taken its place, and would do nothing here; "
                "viops.nn.convert_sync_batch_channel_norm converts the whole module"
            )
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor [B, C, ...], got {type(x).__name__}")
        if self.dims is not None and x.dim() not in self.dims:
            dims = " or ".join(map(str, self.dims))
            raise ValueError(f"x: expected {dims} axes, got shape {list(x.shape)}")
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"x: expected [B, C, ...], C = {self.num_features}, got shape {list(x.shape)}"
            )

    def _momentum(self) -> float | Tensor:
        """The share by which running statistics move in training; counts the batch."""
        bn = self.bn
        bn.num_batches_tracked.add_(1)
        if self.estimate:
            return bn.estbn_moving_speed
        if bn.momentum is None:  # the average of all batches
            return bn.num_batches_tracked.to(bn.running_mean.dtype).clamp(min=1).reciprocal()
        return bn.momentum

    def _normalize(
        self,
        x: Tensor,
        residual: Tensor | None,
        training: bool,
        momentum: float | Tensor = 0.0,
        stay: bool = False,
    ) -> Tensor:
        """stay: the running statistics are not moved in training."""
        bn = self.bn
        keeps_none = stay and training
        return op.batch_channel_norm(
            x,
            self.num_groups,
            bn.weight,
            bn.bias,
            None if keeps_none else bn.running_mean,
            None if keeps_none else bn.running_var,
            self.weight,
            self.bias,
            training=training,
            momentum=momentum,
            eps=bn.eps,
            estimate=self.estimate,
            activation=self.activation,
            residual=residual,
        )

    def extra_repr(self) -> str:
        text = f"num_groups={self.num_groups}" + ", estimate=True" * self.estimate
        return text + f", activation={self.activation!r}" * (self.activation is not None)


class BatchChannelNorm1d(_BatchChannelNorm):
    """Batch channel norm of x [B, C] or [B, C, L]: `BatchChannelNorm2d` says more."""

    channel_norm = nn.BatchNorm1d
    dims = (2, 3)


class BatchChannelNorm2d(_BatchChannelNorm):
    """Batch channel norm of x [B, C, h, w]: batch norm, then group norm, with an affine each.

    The state_dict keys are those of the authors' code: ``bn.weight``, ``bn.bias`` [C],
    ``bn.running_mean``, ``bn.running_var`` [C] and ``bn.num_batches_tracked``, then ``weight`` and
    ``bias`` [1, G, 1]; with `estimate` also ``bn.estbn_moving_speed`` [1].

    ``bn`` is a torch.nn.BatchNorm2d that holds what belongs to the channels: its momentum and eps
    are those of this module, and with ``bn.eval()`` its running statistics normalise and stay.

    Args:
        num_features: channels C.
        num_groups: G, a divisor of C.
        eps: added to the variances of both norms.
        momentum: the share by which running statistics move in training; None keeps the average of
            all batches.
        estimate: the running statistics are moved first, and then normalise as constants.  The
            share by which they move is the value of the buffer ``bn.estbn_moving_speed``, which is
            zero at first and for the training loop to set, such as to 0.1; while it is zero they
            stay.  momentum is not used.
        activation: None, or "relu", which costs nothing here.
        device, dtype: of parameters and buffers.

    Source: Batch-Channel Normalization (Qiao et al., arXiv:1903.10520), section 4.
    """

    channel_norm = nn.BatchNorm2d
    dims = (4,)


class BatchChannelNorm3d(_BatchChannelNorm):
    """Batch channel norm of x [B, C, d, h, w]: `BatchChannelNorm2d` says more."""

    channel_norm = nn.BatchNorm3d
    dims = (5,)


class SyncBatchChannelNorm(_BatchChannelNorm):
    """Batch channel norm of x [B, C, ...] with the statistics of all processes' batches.

    In training each process gives the count, mean and variance of its part, and backward the sums
    of its gradients; results are those of one process on the joined batch.  Parts may differ in
    size.  The gradients of parameters are those of the process's own part, as
    DistributedDataParallel expects.  In eval, with one process or none, it is `BatchChannelNorm2d`.

    Args:
        process_group: those who share statistics; None is all.
        Others: those of `BatchChannelNorm2d`.
    """

    channel_norm = nn.BatchNorm2d

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        estimate: bool = False,
        activation: str | None = None,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, num_groups, eps, momentum, estimate, activation, device, dtype
        )
        self.process_group = process_group

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.bn.training or not _is_shared(self.process_group):
            return super().forward(x, residual)
        self._check(x)
        bn = self.bn
        # before the processes wait for each other
        op._check(
            x,
            self.num_groups,
            {"running_mean": bn.running_mean, "running_var": bn.running_var},
            False,
            False,
            self.activation,
            residual,
        )
        moves = not _is_recomputing()
        if self.estimate and not moves:
            return self._normalize(x, residual, False)
        mean, var, count = joint_statistics(op.as_planes(x.detach()), self.process_group)
        if not self.estimate:
            y = self._normalize_by(mean, var, count.clamp(min=1), x, residual)
        if moves:
            self._move(mean, var, count)
        return self._normalize(x, residual, False) if self.estimate else y

    @torch.no_grad()
    def _move(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        bn = self.bn
        # where there are no values at all they stay
        share = torch.as_tensor(self._momentum(), dtype=count.dtype) * (count > 0)
        if self.estimate:
            var = var + (mean - bn.running_mean).square()
        else:
            var = var * (count / (count - 1).clamp(min=1))
        for running, value in ((bn.running_mean, mean), (bn.running_var, var)):
            running.lerp_(value.to(running.dtype), share.to(running.dtype).reshape(()))

    def _normalize_by(
        self, mean: Tensor, var: Tensor, count: Tensor, x: Tensor, residual: Tensor | None
    ) -> Tensor:
        bn, planes = self.bn, op.as_planes(x)
        dtype = accumulation_dtype(x.dtype)
        if residual is not None:
            residual = laid_out_as(planes, reference.flat(residual))
        parameters = (t.to(dtype).reshape(-1) for t in (bn.weight, bn.bias, self.weight, self.bias))
        y = _Shared.apply(
            (self.process_group, count, (mean - mean.to(dtype)).to(dtype)),
            planes,
            residual,
            mean.to(dtype),
            var.to(dtype),
            None,
            *parameters,
            float(bn.eps),
            self.activation == "relu",
            reference.CONSTANTS,
        )
        return y.squeeze(2) if x.dim() == 2 else y.unflatten(2, x.shape[2:])


class _Shared(torch.autograd.Function):
    """The op with statistics of all processes' batches, and the gradient through them."""

    @staticmethod
    def forward(ctx: Any, shared: tuple[Any, Tensor, Tensor], *args: Any) -> Tensor:
        """shared: the group, how many values a channel has, and what its mean lost in rounding."""
        ctx.group, ctx.total, rest = shared
        x, residual, mean, var, speed, bn_weight, bn_bias, *others = args
        bias = bn_bias - rest * bn_weight * (var + others[2]).rsqrt()
        y, *statistics = op._batch_channel_norm._forward(
            x, residual, mean, var, speed, bn_weight, bias, *others
        )
        statistics[3] = rest  # the mean, relative to the shift
        op._setup(ctx, args, (y, *statistics))
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple:
        saved = ctx.saved_tensors
        if grad_y is None:  # the other processes wait for this one's sums
            grad_y = torch.zeros_like(saved[0])

        def run(count: int, totals: Tensor | None, need_residual: bool) -> tuple:
            return op._batch_channel_norm.run_backward(
                grad_y, *saved, ctx.eps, ctx.relu, count, totals, need_residual
            )

        own = run(0, None, False)
        totals = torch.stack((own[3], own[2]))  # [2, C]: of bn_bias, of bn_weight
        dist.all_reduce(totals, group=ctx.group)
        # the op divides by the count, which the device alone knows
        totals = (totals / ctx.total).to(own[2].dtype)
        grad_x, grad_residual, *_ = run(1, totals, ctx.relu and ctx.needs_input_grad[2])
        if not ctx.relu:
            grad_residual = grad_y
        gradients = (None, grad_x, grad_residual, None, None, None, *own[2:], None, None, None)
        return tuple(
            grad if needed else None
            for grad, needed in zip(gradients, ctx.needs_input_grad, strict=True)
        )


def _is_shared(group: Any) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def _is_recomputing() -> bool:
    """Whether a backward pass runs, as where torch.utils.checkpoint makes activations again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def joint_statistics(planes: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of planes [B, C, S] of all processes: the mean and the biased variance [C], and how many
    values a channel they are of, [], in float64."""
    wide = planes.to(accumulation_dtype(planes.dtype))
    count = planes.shape[0] * planes.shape[2]
    own = wide.new_zeros(3, wide.shape[1], dtype=torch.float64)  # count, mean, squared distances
    if count:
        shift = reference.shift_of(wide)[:, None]  # small where x is far from zero
        var, mean = torch.var_mean(wide - shift, dim=(0, 2), correction=0)
        own[0], own[1], own[2] = count, mean.double() + shift[:, 0], var.double() * count
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    counts, means, squares = torch.stack(parts, dim=1)  # [P, C] each
    total = counts.sum(dim=0)
    divisor = total.clamp(min=1)
    mean = (counts * means).sum(dim=0) / divisor
    squares = squares.sum(dim=0) + (counts * (means - mean).square()).sum(dim=0)
    return mean, squares / divisor, total[0]


def convert_sync_batch_channel_norm(module: Module, process_group: Any = None) -> Module:
    """Makes every batch channel norm in the module one that shares statistics.

    As torch's convert_sync_batchnorm: norms are replaced in place by a `SyncBatchChannelNorm` with
    the same parameters and buffers, and the module is returned, or its replacement.

    Args:
        module: a batch channel norm, or one that has some.
        process_group: those who share statistics; None is all.

    Returns:
        The same module, or where it is a norm itself its replacement.
    """
    return _converted(module, process_group, {})


def _converted(module: Any, process_group: Any, done: dict[nn.Module, nn.Module]) -> Any:
    """done: what has taken the place of each module that was met before."""
    if module in done:
        return done[module]
    done[module] = module
    if isinstance(module, _BatchChannelNorm):
        if isinstance(module, SyncBatchChannelNorm):
            return module
        if parametrize.is_parametrized(module):
            raise ValueError(
                "module: expected batch channel norms without parametrizations, got one with; "
                "register them after the conversion"
            )
        shared: Any = SyncBatchChannelNorm.__new__(SyncBatchChannelNorm)
        shared.__dict__ = module.__dict__.copy()
        for name in ("_parameters", "_buffers", "_modules"):
            shared.__dict__[name] = module.__dict__[name].copy()
        shared.process_group = process_group
        done[module] = shared
        return shared
    for name, child in list(module._modules.items()):
        if child is not None:
            converted = _converted(child, process_group, done)
            if converted is not child:
                setattr(module, name, converted)
    return module


__all__ = [
    "BatchChannelNorm1d",
    "BatchChannelNorm2d",
    "BatchChannelNorm3d",
    "SyncBatchChannelNorm",
    "convert_sync_batch_channel_norm",
]
