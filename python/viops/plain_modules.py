"""Whether a module's call may be left out, its parameters being all that it adds to the model."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of it would call hooks of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_bare(module: nn.Module) -> bool:
    """Whether a call of it runs its class's forward and nothing else, global hooks aside."""
    return not ("forward" in vars(module) or has_hooks(module))


def are_watched() -> bool:
    """Whether the calls of all modules are, by hooks for all of them."""
    return _has_any_global_hook()


def is_depthwise(conv: nn.Module) -> bool:
    """Whether it is torch's Conv2d, depthwise, of an odd side, and keeps the grid.

    Zeros lie around the grid.
    """
    if type(conv) is not nn.Conv2d:
        return False
    side = conv.kernel_size[0]
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.weight.shape[2:] == conv.kernel_size == (side, side)
        and side % 2 == 1
        and conv.padding == (side // 2, side // 2)
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
    )
