"""viops: C++, CUDA and Triton kernels for efficient vision models, as drop-ins for torch."""

try:
    import torch as _torch  # noqa: F401
except ImportError as _error:
    raise ImportError(
        "viops needs PyTorch 2.10 or newer, and installs none so that yours is not touched: "
        "pip install torch"
    ) from _error

from typing import TYPE_CHECKING as _TYPE_CHECKING

from . import nn, patch
from .dispatch import BackendError, Explanation, explain, use_backend
from .ops.batch_channel_norm import batch_channel_norm
from .ops.decayed_attention import decayed_attention
from .ops.integer_conv import DfpTensor, integer_conv2d, integer_linear, quantize_dfp
from .ops.mix_shift import depthwise_norm, mix_shift
from .ops.reversible_columns import reversible_step, reversible_step_backward
from .ops.token_reorganization import (
    class_attention,
    class_attention_scores,
    reorganize_tokens,
    restore_tokens,
    softmax_attention,
)
from .ops.weight_standardization import standardize_weight, standardize_weights

if _TYPE_CHECKING:
    from . import models

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "DfpTensor",
    "Explanation",
    "batch_channel_norm",
    "class_attention",
    "class_attention_scores",
    "decayed_attention",
    "depthwise_norm",
    "explain",
    "integer_conv2d",
    "integer_linear",
    "mix_shift",
    "models",
    "nn",
    "patch",
    "quantize_dfp",
    "reorganize_tokens",
    "restore_tokens",
    "reversible_step",
    "reversible_step_backward",
    "softmax_attention",
    "standardize_weight",
    "standardize_weights",
    "use_backend",
]


def __getattr__(name: str) -> object:
    """viops.models is imported where it is asked for: it brings timm with it, where that is."""
    if name == "models":
        import importlib

        return importlib.import_module(".models", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
