"""timm's and torchvision's ReLUs and residual blocks that `micro_batch` fuses with norms."""

from __future__ import annotations

import sys
from typing import NamedTuple

from torch import Tensor, nn

from .vision_transformer import Patched


class FusedActivation(nn.Identity):
    """Stands where an activation was that the norm before it has taken over."""

    #: The activation; in a tuple, as it is no part of the model meanwhile.
    original: tuple[nn.Module]

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = (original,)
        self.train(original.training)

    def extra_repr(self) -> str:
        return f"{self.original[0]} in the norm"


class FusedBlock(Patched):
    """A residual block whose last norm adds the shortcut and has the activation."""

    prefix = "Fused"

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)


def _normalize(norm: nn.Module, x: Tensor, shortcut: Tensor) -> Tensor:
    """Under autocast the two may differ in dtype: the result has that of x."""
    return norm(x, shortcut.to(x.dtype))


class TimmBasicBlock(FusedBlock):
    """timm's BasicBlock without attention and drop path."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C', h', w']."""
        shortcut = self.shortcut(x)
        x = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        return self.act2(_normalize(self.bn2, self.conv2(x), shortcut))


class TimmBottleneck(FusedBlock):
    """timm's Bottleneck without attention and drop path."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C', h', w']."""
        shortcut = self.shortcut(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))
        return self.act3(_normalize(self.bn3, self.conv3(x), shortcut))


class TorchvisionBasicBlock(FusedBlock):
    """torchvision's BasicBlock, whose one ReLU is in all norms."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C', h', w']."""
        shortcut = self.shortcut(x)
        x = self.bn1(self.conv1(x))
        return _normalize(self.bn2, self.conv2(x), shortcut)


class TorchvisionBottleneck(FusedBlock):
    """torchvision's Bottleneck, whose one ReLU is in all norms."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C', h', w']."""
        shortcut = self.shortcut(x)
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(x))
        return _normalize(self.bn3, self.conv3(x), shortcut)


class Known(NamedTuple):
    """A class of timm's or torchvision's, and what its forward does."""

    module: str
    name: str
    #: The method in which a norm is followed by its activation.
    method: str
    #: (norm, what lies between and has to be an Identity, activation), by attribute.
    pairs: tuple[tuple[str, tuple[str, ...], str], ...]
    #: (norm, activation) where a shortcut is added between them, and the class that fuses them.
    residual: tuple[str, str] | None = None
    fused: type[FusedBlock] | None = None
    #: Attributes that have to be None where the shortcut is fused.
    absent: tuple[str, ...] = ()

    def runs(self, owner: nn.Module) -> bool:
        """Whether the owner's method is that of this class, which its model has loaded."""
        cls = getattr(sys.modules.get(self.module), self.name, None)
        return (
            cls is not None
            and isinstance(owner, cls)
            and getattr(type(owner), self.method) is getattr(cls, self.method)
            and self.method not in vars(owner)
        )


TIMM, TORCHVISION = "timm.models.resnet", "torchvision.models.resnet"
KNOWN = (
    Known(TIMM, "ResNet", "forward_features", (("bn1", (), "act1"),)),
    Known(
        TIMM,
        "BasicBlock",
        "forward",
        (("bn1", ("drop_block",), "act1"),),
        ("bn2", "act2"),
        TimmBasicBlock,
        ("se", "drop_path"),
    ),
    Known(
        TIMM,
        "Bottleneck",
        "forward",
        (("bn1", (), "act1"), ("bn2", ("drop_block",), "act2")),
        ("bn3", "act3"),
        TimmBottleneck,
        ("se", "drop_path"),
    ),
    Known(TORCHVISION, "ResNet", "_forward_impl", (("bn1", (), "relu"),)),
    # the ReLU is called several times, so that it is fused in all of them or in none
    Known(TORCHVISION, "BasicBlock", "forward", (), ("bn2", "relu"), TorchvisionBasicBlock),
    Known(TORCHVISION, "Bottleneck", "forward", (), ("bn3", "relu"), TorchvisionBottleneck),
)
