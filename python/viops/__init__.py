"""viops: C++, CUDA and Triton kernels for efficient vision models, as drop-ins for torch."""

try:
    import torch as _torch  # noqa: F401
except ImportError as _error:
    raise ImportError(
        "viops needs PyTorch 2.10 or newer, and installs none so that yours is not touched: "
        "pip install torch"
    ) from _error

from . import nn, patch
from .dispatch import BackendError, Explanation, explain, use_backend
from .ops.token_reorganization import (
    class_attention,
    class_attention_scores,
    reorganize_tokens,
    restore_tokens,
    softmax_attention,
)

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Explanation",
    "class_attention",
    "class_attention_scores",
    "explain",
    "nn",
    "patch",
    "reorganize_tokens",
    "restore_tokens",
    "softmax_attention",
    "use_backend",
]
