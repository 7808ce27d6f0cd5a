"""INT16 training, from Das et al.: convolutions of integers that share a scale."""

from .convolution import integer_conv2d, integer_linear
from .dfp import DfpTensor
from .op import quantize_dfp

__all__ = ["DfpTensor", "integer_conv2d", "integer_linear", "quantize_dfp"]
