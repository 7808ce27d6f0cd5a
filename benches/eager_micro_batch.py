"""Networks with weight standardization and batch channel norm as the authors' formulation runs
them: what the benches of batch channel norm compare with."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
import viops
from torch import Tensor, nn
from viops.patch.micro_batch import StandardizedConv2d


def standardize_weight(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """[O, C, kh, kw]: axis by axis, each step a tensor of its own."""
    mean = weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
    weight = weight - mean
    std = (weight.flatten(1).var(dim=1) + eps).sqrt().view(-1, 1, 1, 1)
    return weight / std.expand_as(weight)


def norm_of_groups(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """[B, C, ...], and [1, G, 1] each: batch norm with the groups of all images for channels."""
    batch = x.shape[0]
    out = x.reshape(1, batch * num_groups, -1)
    out = torch.batch_norm(out, None, None, None, None, True, 0.0, eps, True)
    return (weight * out.view(batch, num_groups, -1) + bias).view_as(x)


def batch_channel_norm(
    x: Tensor,
    num_groups: int,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """In training: torch's batch norm, then the norm of groups."""
    out = F.batch_norm(x, running_mean, running_var, bn_weight, bn_bias, True, 0.1, eps)
    return norm_of_groups(out, num_groups, weight, bias, eps)


def estimate(
    x: Tensor,
    num_groups: int,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    share: float,
    eps: float = 1e-5,
) -> Tensor:
    """In training, the micro-batch form: x [B, C, h, w]."""
    with torch.no_grad():
        planes = x.transpose(0, 1).contiguous().flatten(1)  # [C, B h w]
        mean = planes.mean(dim=1)
        spread = (planes - running_mean[:, None]).square().mean(dim=1)
        running_mean.mul_(1 - share).add_(mean, alpha=share)
        running_var.mul_(1 - share).add_(spread, alpha=share)
    out = (x - running_mean.view(1, -1, 1, 1)) / (running_var + eps).sqrt().view(1, -1, 1, 1)
    out = bn_weight.view(1, -1, 1, 1) * out + bn_bias.view(1, -1, 1, 1)
    return norm_of_groups(out, num_groups, weight, bias, eps)


class _Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, standardize_weight(self.weight), self.bias)


class _Norm(nn.Module):
    def __init__(self, norm: viops.nn.BatchChannelNorm2d) -> None:
        super().__init__()
        self.num_groups = norm.num_groups
        self.bn, self.weight, self.bias = norm.bn, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return norm_of_groups(self.bn(x), self.num_groups, self.weight, self.bias, self.bn.eps)


def eager_micro_batch(model: nn.Module) -> nn.Module:
    """A copy of a model that viops.patch.micro_batch has patched, in the authors' formulation.

    Where it was patched, activations and sums are the model's own again.
    """
    model = copy.deepcopy(model)
    norms = {
        name: _Norm(module)
        for name, module in model.named_modules()
        if isinstance(module, viops.nn.BatchChannelNorm2d)
    }
    convs = [m for m in model.modules() if isinstance(m, StandardizedConv2d)]
    viops.patch.undo(model)
    for name, norm in norms.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, norm)
    for conv in convs:
        conv.__class__ = _Conv2d
    return model
