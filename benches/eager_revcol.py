"""RevCol as its authors' formulation runs it: what the benches of reversible_columns compare with.

Norms of channels are spelt out on [B, C, h, w], linear layers see permuted views, gamma is a pass
of its own, and activations lie as convolutions of contiguous images leave them.  In the reversible
form each column is an autograd node that keeps the column's input and all its outputs: memory for
activations grows with the number of columns, though not with the number of blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from viops import models
from viops.grid_linear import GridLinear
from viops.models.revcol import ChannelNorm, Upsample
from viops.nn import ConvNeXtBlock

_MIN_ALPHA = 1e-3


def _with_parts_of(made: nn.Module, module: nn.Module) -> None:
    """Gives `made` the parameters and submodules of the module, under their names."""
    for name, parameter in module.named_parameters(recurse=False):
        made.register_parameter(name, parameter)
    for name, child in module.named_children():
        made.add_module(name, child)


class _ChannelNorm(nn.Module):
    def __init__(self, norm: ChannelNorm) -> None:
        super().__init__()
        _with_parts_of(self, norm)
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        centred = x - x.mean(1, keepdim=True)
        variance = centred.pow(2).mean(1, keepdim=True)
        scaled = centred / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * scaled + self.bias[:, None, None]


class _Block(nn.Module):
    def __init__(self, block: ConvNeXtBlock) -> None:
        super().__init__()
        _with_parts_of(self, block)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        hidden = self.act(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1))))
        out = self.gamma * self.pwconv2(hidden)
        return x + self.drop_path(out.permute(0, 3, 1, 2))


class _Upsample(nn.Module):
    def __init__(self, upsample: Upsample) -> None:
        super().__init__()
        _with_parts_of(self, upsample)
        self.factor = upsample.factor

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', factor * h, factor * w]."""
        x = self.channel_reschedule(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.interpolate(x, scale_factor=self.factor, mode="nearest")


_AUTHORS = {ChannelNorm: _ChannelNorm, ConvNeXtBlock: _Block, Upsample: _Upsample}


def _as_authors(module: nn.Module, grid_linear: bool) -> nn.Module:
    """The module with what is in it in the authors' formulation."""
    for name, child in module.named_children():
        module.add_module(name, _as_authors(child, grid_linear))
    if grid_linear and type(module) is nn.Linear:
        module.__class__ = GridLinear
    return _AUTHORS.get(type(module), lambda same: same)(module)


class _Column(nn.Module):
    """Four levels and their alphas, under the names of viops' column."""

    def __init__(self, column: nn.Module, reversible: bool, from_last: bool) -> None:
        super().__init__()
        _with_parts_of(self, column)
        self.reversible = reversible
        self.from_last = from_last
        self.num_levels = len(list(column.children()))

    @property
    def levels(self) -> list[nn.Module]:
        return [getattr(self, f"level{i}") for i in range(self.num_levels)]

    @property
    def alphas(self) -> list[Tensor]:
        return [getattr(self, f"alpha{i}") for i in range(self.num_levels)]

    def forward(self, x: Tensor, *previous: Tensor | int) -> Sequence[Tensor]:
        """The stem's output and the features of the former column, or zeros -> features."""
        for alpha in self.alphas:
            sign = alpha.data.sign()
            alpha.data.abs_().clamp_(_MIN_ALPHA).mul_(sign)
        if self.reversible:
            return _Reverse.apply(self, x, *previous)
        features: list[Tensor] = []
        for i, (level, alpha) in enumerate(zip(self.levels, self.alphas, strict=True)):
            below = features[-1] if features else x
            features.append(alpha * previous[i] + level(below, *self.sources(i, previous)))
        return features

    def sources(self, level: int, previous: Sequence[Any]) -> list[Any]:
        """What this level takes of the former column's features."""
        sources = [previous[level + 1] if level + 1 < self.num_levels else None]
        return [*sources, previous[-1]] if self.from_last and level == 0 else sources


class _RandomStates:
    """Of the generators of the CPU and of a tensor's GPU."""

    def __init__(self, x: Tensor) -> None:
        self.devices = [x.device] if x.is_cuda else []
        self.cpu = torch.get_rng_state()
        self.gpus = [torch.cuda.get_rng_state(device) for device in self.devices]

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in zip(self.devices, self.gpus, strict=True):
            torch.cuda.set_rng_state(state, device)


class _Reverse(torch.autograd.Function):
    """One column, whose levels run again in backward, from its outputs to the former column's."""

    @staticmethod
    def forward(ctx: Any, column: _Column, x: Tensor, *previous: Any) -> tuple[Tensor, ...]:
        ctx.column = column
        ctx.is_first = not isinstance(previous[0], Tensor)
        ctx.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in ("cpu", "cuda")
        ]
        ctx.states = []
        features: list[Tensor] = []
        for i, (level, alpha) in enumerate(zip(column.levels, column.alphas, strict=True)):
            ctx.states.append(_RandomStates(x))
            below = features[-1] if features else x
            features.append(level(below, *column.sources(i, previous)) + previous[i] * alpha)
        ctx.save_for_backward(x, *features)
        return tuple(features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        column: _Column = ctx.column
        count = column.num_levels
        x, *features = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        previous: list[Any] = [None] * count
        shortcuts: list[Any] = [None] * count
        graphs = []  # the authors' code keeps those of all levels until the column is done
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.random.fork_rng(ctx.states[0].devices))
            for kind, dtype, enabled in ctx.autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled))
            for i in reversed(range(count)):
                alpha, grad = column.alphas[i], grads[i]
                if i + 1 < count:
                    grad = grad + features[i].grad
                shortcuts[i] = grad * alpha.detach()
                ctx.states[i].restore()
                below = features[i - 1] if i else x
                out = column.levels[i](below, *column.sources(i, previous))
                torch.autograd.backward(out, grad, retain_graph=True)
                graphs.append(out)
                with torch.no_grad():
                    previous[i] = (1 / alpha) * (features[i] - out)
                torch.autograd.backward(previous[i] * alpha, grad)
                previous[i].requires_grad_()
        if ctx.is_first:
            return None, x.grad, *([None] * count)
        of_previous = [
            shortcut if feature.grad is None else shortcut + feature.grad
            for shortcut, feature in zip(shortcuts, previous, strict=True)
        ]
        return None, x.grad, *of_previous


class EagerRevCol(nn.Module):
    """A copy of the model that computes the same in the authors' formulation.

    The state_dict is the model's.

    Args:
        model: to be copied.
        reversible: whether columns are nodes that keep their outputs alone, or torch keeps all.
        grid_linear: whether the linear layers run as viops runs them, by oneDNN.
    """

    def __init__(
        self, model: models.RevCol, reversible: bool = True, grid_linear: bool = False
    ) -> None:
        super().__init__()
        self.is_supervised = model.inter_supv
        self.num_columns = model.config.num_columns
        self.num_levels = len(model.config.embed_dims)
        for name, child in copy.deepcopy(model).named_children():
            if name.startswith("subnet"):
                made = _as_authors(child, grid_linear)
                child = _Column(made, reversible, model.config.from_last)
            elif not name.startswith("cls"):
                child = _as_authors(child, grid_linear)
            self.add_module(name, child)
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> the last column's logits [B, num_classes]."""
        last = self.cls_blocks[-1] if self.is_supervised else self.cls
        return self._classify(last, self._tops(x)[-1])

    def forward_supervised(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Images -> as of viops' model."""
        quarter = self.num_columns // 4
        tops = self._tops(x)[quarter - 1 :: quarter]
        logits = map(self._classify, self.cls_blocks, tops)
        decoded = [decode(top) for decode, top in zip(self.decoder_blocks, tops, strict=False)]
        return list(logits), decoded

    def _tops(self, x: Tensor) -> list[Tensor]:
        """The last level's features of each column."""
        x = self.stem(x)
        features: Sequence[Any] = [0] * self.num_levels
        tops = []
        for i in range(self.num_columns):
            features = getattr(self, f"subnet{i}")(x, *features)
            tops.append(features[-1])
        return tops

    def _classify(self, classifier: nn.Module, top: Tensor) -> Tensor:
        norm, linear = classifier.classifier
        return linear(self.head_drop(norm(F.adaptive_avg_pool2d(top, 1).flatten(1))))
