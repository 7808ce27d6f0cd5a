"""Where tests of CUDA kernels run them: on a GPU where there is one, else on the CPU."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from viops import native

from . import builds

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ON_HOST = pytest.mark.skipif(ON_GPU, reason="the device, not the executor, runs the kernels here")


def extension() -> ModuleType:
    """What has the kernels."""
    return native.require() if ON_GPU else builds.extension()
