"""What tests of every kind need before they import their subject."""

import importlib.util
import os
import pathlib
import signal

import pytest
import torch
import torch._functorch.config

# graphs of an op's backward are kept on disk by its forward: those of an older derivative
torch._functorch.config.enable_autograd_cache = False

pytest.register_assert_rewrite("model_checks")  # so that its failures show values, as tests' do

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell's background jobs are started so, and what tests start and interrupt would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

if torch.cuda.is_available():
    # torch's deterministic mode, in which memory is poisoned, refuses cuBLAS without it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton and viops are imported


def _define_torchvision_ops() -> torch.library.Library | None:
    """Lets `import torchvision`, and so timm, work where torchvision's compiled part does not load.

    That is so where it was built for CUDA and torch was not.  Its import registers fakes for two
    compiled ops, whose schemas are all that it needs.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        for path in pathlib.Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(path)
            return None
    except OSError:
        pass
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_torchvision_library = _define_torchvision_ops()  # the ops live as long as it does
