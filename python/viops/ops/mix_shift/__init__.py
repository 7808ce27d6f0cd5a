"""Mix-shift, from MS-MLP, and the depthwise convolution with layer norm of ConvNeXt."""

from .op import depthwise_norm, mix_shift

__all__ = ["depthwise_norm", "mix_shift"]
