"""Weight standardization and batch channel norm put into a ResNet or the like, and taken out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checks import check_int
from ..ops.batch_channel_norm.module import BatchChannelNorm2d
from ..ops.weight_standardization.module import WSConv2d
from ..plain_modules import has_hooks
from .fused_blocks import KNOWN, TORCHVISION, FusedActivation, FusedBlock, Known
from .model_checks import (
    check_module,
    check_no_hooks,
    check_not_patched,
    check_skip,
    is_skipped,
    name_of,
)
from .vision_transformer import own_class, patch_module

Model = TypeVar("Model", bound=nn.Module)


class StandardizedConv2d(WSConv2d):
    """What a Conv2d becomes; `undo` knows it by its class."""


class _Plan:
    """What is going to be replaced; nothing is before all has been checked."""

    def __init__(self, model: nn.Module, skip: Sequence[str]) -> None:
        self.model = model
        self.skip = skip
        self.skipped = {
            id(module) for name, module in model.named_modules() if is_skipped(name, skip)
        }
        self.convs: list[Any] = []
        self.norms: dict[int, Any] = {}  # by id
        #: ids of norms that take over a ReLU
        self.with_relu: set[int] = set()
        #: (owner, attribute) of the ReLUs that are taken over
        self.activations: list[tuple[nn.Module, str]] = []
        self.blocks: list[tuple[Any, Any]] = []  # with the mixin of each
        places = (child for module in model.modules() for child in module._modules.values())
        self._num_places = Counter(map(id, places))
        self._find_layers()
        for owner in model.modules():
            self._find_activations(owner)

    def _find_layers(self) -> None:
        layers: list[tuple[str, nn.Module]] = []
        for name, module in self.model.named_modules():
            is_within = layers and name.startswith(f"{layers[-1][0]}.")  # such as a parametrization
            if is_within or isinstance(module, (nn.Identity, nn.Sequential)):
                continue
            if _computes(module):
                layers.append((name, module))
        following = [module for _, module in layers[1:]] + [None]
        for (name, module), after in zip(layers, following, strict=True):
            if is_skipped(name, self.skip):
                continue
            if isinstance(module, nn.Conv2d) and _is_to_standardize(module, after):
                _check_conv(name, module)
                self.convs.append(module)
            elif isinstance(module, _BatchNorm) and not _is_other_norm(module):
                _check_norm(name, module)
                self.norms[id(module)] = module

    def _find_activations(self, owner: nn.Module) -> None:
        if type(owner).forward is nn.Sequential.forward:
            names = list(owner._modules)
            for norm, activation in pairwise(names):
                self._fuse(owner, norm, (), activation)
        for known in KNOWN:
            if known.runs(owner):
                for pair in known.pairs:
                    self._fuse(owner, *pair)
                if known.fused is not None:
                    self._fuse_shortcut(owner, known)

    def _fuse(self, owner: Any, norm: str, between: tuple[str, ...], activation: str) -> None:
        if self._takes_relu(getattr(owner, norm)) and self._is_free(getattr(owner, activation)):
            if all(type(getattr(owner, name)) is nn.Identity for name in between):
                self.with_relu.add(id(getattr(owner, norm)))
                self.activations.append((owner, activation))

    def _fuse_shortcut(self, block: Any, known: Known) -> None:
        assert known.residual is not None
        assert known.fused is not None
        norm, activation = known.residual
        norms = [norm]
        if known.module == TORCHVISION:
            norms = [name for name in ("bn1", "bn2", "bn3") if hasattr(block, name)]
        if (
            self._is_free(getattr(block, activation))
            and id(block) not in self.skipped
            and all(self._takes_relu(getattr(block, name)) for name in norms)
            and all(getattr(block, name) is None for name in known.absent)
        ):
            self.with_relu.update(id(getattr(block, name)) for name in norms)
            self.activations.append((block, activation))
            self.blocks.append((block, known.fused))

    def _is_free(self, activation: object) -> bool:
        """Whether it is a ReLU that a norm may take over."""
        return _is_relu(activation) and id(activation) not in self.skipped

    def _takes_relu(self, norm: nn.Module) -> bool:
        is_plain = type(norm) is nn.BatchNorm2d and id(norm) in self.norms
        return is_plain and self._num_places[id(norm)] == 1


def micro_batch(
    model: Model,
    num_groups: int = 32,
    estimate: bool = False,
    skip: Sequence[str] = (),
) -> Model:
    """Makes a network with batch norm one for batches of few images: WS and BCN.

    - A Conv2d that a norm of its output channels follows becomes a `viops.nn.WSConv2d`.  Followed
      means registered right before it, in the order of ``model.named_modules()``, but for Identity.
      Depthwise convolutions, and layers without a norm after them, such as the classifier, stay.
    - A BatchNorm2d, and timm's BatchNormAct2d, becomes a `viops.nn.BatchChannelNorm2d`.  The norm
      that was there is its ``bn``, with the parameters and statistics that it had.
    - A ReLU right after such a norm runs within it, and so does the sum of a residual block: in
      timm's BatchNormAct2d, ResNet, BasicBlock and Bottleneck, in torchvision's, and in
      nn.Sequential.  A `FusedActivation` stands in its place; hooks of a torchvision block's ReLU
      keep the block as it is.

    Where all of a norm's weights are zero, as they are at the end of a new residual branch, group
    norm would scale the first step away from zero to one: those zeros go to the weight of the
    groups, as the authors have it, and ones to ``bn.weight``.

    The model is changed in place; its parameters stay the same objects.  state_dict keys stay but
    for norms: what was ``bn1.weight`` is ``bn1.bn.weight`` and so on, beside new ``bn1.weight`` and
    ``bn1.bias`` [1, G, 1].  An optimizer made before lacks the new parameters.
    `viops.patch.undo` takes everything back.

    Args:
        model: a network, such as timm's and torchvision's resnets, resnexts, regnets and densenets,
            not wrapped in anything: patch first, then compile or distribute.
        num_groups: of channels in each norm; where it does not divide them, the largest number
            below that does.  A group of one channel undoes what batch norm does to it, so take
            less in a narrow network.
        estimate: whether norms take the micro-batch form; they have a buffer
            ``bn.estbn_moving_speed`` each, which is zero at first and for the training loop to set.
        skip: names of modules that stay as they are, with all that is in them.

    Returns:
        The same model.

    Raises:
        TypeError: a norm, or a convolution before one, is of another class than torch's own: give
            its name in `skip`.
        ValueError: there is nothing to patch, the model is patched already, a norm lacks parameters
            or statistics or has hooks, or an argument is not as above.

    Source: Micro-Batch Training (Qiao et al., arXiv:1903.10520), sections 3 and 4.
    """
    _check_model(model)
    check_int("num_groups", num_groups, 1, None, "")
    plan = _Plan(model, check_skip(model, skip))
    if not plan.convs and not plan.norms:
        raise ValueError(
            "model: expected one with batch norms, or with convolutions before norms, got "
            f"{name_of(model)}"
        )
    for conv in plan.convs:
        conv.__class__ = StandardizedConv2d
        conv._set_options(1e-5, True, True, False)
    for owner, name in plan.activations:
        owner._modules[name] = FusedActivation(getattr(owner, name))
    for block, mixin in plan.blocks:
        patch_module(block, mixin)
    replacements = {
        key: _replacement(bn, num_groups, estimate, key in plan.with_relu)
        for key, bn in plan.norms.items()
    }
    _replace(model, lambda child: replacements.get(id(child), child))
    return model


def undo(model: Model) -> Model:
    """Takes out of the model what `micro_batch` put in, in place; returns the same model.

    What the norms' group weights and biases have learnt is lost.

    Raises:
        ValueError: the model is not patched.
    """
    if not is_patched(model):
        raise ValueError(
            "model: expected one that viops.patch.micro_batch has patched, got " + name_of(model)
        )
    for name, module in model.named_modules():
        if isinstance(module, StandardizedConv2d) and type(module) is not StandardizedConv2d:
            raise ValueError(
                f"{name}: expected what micro_batch put in, got {name_of(module)}: take "
                "parametrizations out first"
            )
    _replace(model, _original)
    modules: list[Any] = list(model.modules())
    for module in modules:
        if isinstance(module, FusedBlock):
            module.__class__ = own_class(module)
        if isinstance(module, StandardizedConv2d):
            conv: Any = module
            conv.__dict__.pop("_was_captured", None)
            del conv.eps, conv.unbiased, conv.eps_inside, conv.gain, conv._computed
            conv.__class__ = nn.Conv2d
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether micro_batch has changed something in the model."""
    return any(
        isinstance(module, (StandardizedConv2d, FusedActivation, FusedBlock)) or _is_put_in(module)
        for module in model.modules()
    )


def _is_put_in(module: Any) -> bool:
    """Whether it stands for a norm; viops.nn.convert_sync_batch_channel_norm changes the class."""
    return "zeros_moved" in vars(module)


def _replace(model: nn.Module, change: Callable[[Any], nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = change(child)


def _replacement(bn: Any, num_groups: int, estimate: bool, relu: bool) -> BatchChannelNorm2d:
    """The batch channel norm with this batch norm in it, and what of it comes after."""
    norm: Any = BatchChannelNorm2d.__new__(BatchChannelNorm2d)
    nn.Module.__init__(norm)
    drop, act = getattr(bn, "drop", nn.Identity()), getattr(bn, "act", nn.Identity())  # timm's
    if isinstance(drop, nn.Identity) and _is_relu(act):
        relu = True
    elif not (isinstance(drop, nn.Identity) and isinstance(act, nn.Identity)):
        norm.register_forward_hook(_drop_and_act)
    num_groups = _largest_divisor(bn.num_features, num_groups)
    norm._set_up(bn, num_groups, estimate, "relu" if relu else None)
    norm.weight.requires_grad_(bn.weight.requires_grad)
    norm.bias.requires_grad_(bn.bias.requires_grad)
    norm.zeros_moved = not bn.weight.is_meta and not bn.weight.any()
    if norm.zeros_moved:
        with torch.no_grad():
            norm.weight.zero_()
            bn.weight.fill_(1)
    norm.train(bn.training)
    return norm


def _drop_and_act(norm: Any, args: tuple, out: Tensor) -> Tensor:
    """What timm's BatchNormAct2d does after the norm, where that is no ReLU."""
    return norm.bn.act(norm.bn.drop(out))


def _original(module: Any) -> nn.Module:
    if isinstance(module, FusedActivation):
        return module.original[0].train(module.training)
    if not _is_put_in(module):
        return module
    bn = module.bn
    if module.zeros_moved:
        with torch.no_grad():  # zero as before, where they have not been trained
            bn.weight.mul_(
                module.weight.reshape(-1).repeat_interleave(bn.num_features // module.num_groups)
            )
    if module.estimate:
        del bn.estbn_moving_speed
    return bn


def _largest_divisor(channels: int, limit: int) -> int:
    return max(size for size in range(1, min(channels, limit) + 1) if channels % size == 0)


def _computes(module: nn.Module) -> bool:
    """Whether a module computes by itself; others call those in them."""
    return isinstance(module, (nn.Conv2d, _BatchNorm)) or not module._modules


def _is_to_standardize(conv: nn.Conv2d, after: nn.Module | None) -> bool:
    if isinstance(after, nn.GroupNorm):
        channels = after.num_channels
    elif isinstance(after, _BatchNorm):
        channels = after.num_features
    else:
        return False
    is_depthwise = conv.groups == conv.in_channels > 1
    is_single = conv.groups == conv.in_channels and conv.kernel_size == (1, 1)  # would become zero
    return (
        channels == conv.out_channels
        and not (is_depthwise or is_single)
        and not isinstance(conv, WSConv2d)
    )


def _is_other_norm(norm: nn.Module) -> bool:
    """Whether it is of vectors or volumes, and stays."""
    return isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm3d))


def _is_relu(module: object) -> bool:
    return type(module) is nn.ReLU and not has_hooks(module)


def _check_model(model: nn.Module) -> None:
    check_module(model)
    check_not_patched(is_patched(model))
    if isinstance(model, _BatchNorm):
        raise ValueError(
            f"model: expected one that has norms in it, got the norm {name_of(model)} itself; "
            "viops.nn.BatchChannelNorm2d is what stands for it"
        )


def _check_conv(name: str, conv: nn.Conv2d) -> None:
    if type(conv) is not nn.Conv2d:
        raise TypeError(
            f"{name}: expected torch's Conv2d before a norm, got {name_of(conv)}; with its name in "
            "skip it stays as it is"
        )


def _timm_norm() -> type | None:
    return getattr(sys.modules.get("timm.layers.norm_act"), "BatchNormAct2d", None)


def _check_norm(name: str, norm: Any) -> None:
    if type(norm) not in (nn.BatchNorm2d, _timm_norm()):
        hint = "with its name in skip it stays as it is"
        if isinstance(norm, nn.SyncBatchNorm):
            hint = "patch before viops.nn.convert_sync_batch_channel_norm"
        raise TypeError(
            f"{name}: expected torch's BatchNorm2d or timm's BatchNormAct2d, got {name_of(norm)}; "
            + hint
        )
    for option, value in (
        ("affine=True", norm.weight),
        ("affine=True", norm.bias),
        ("track_running_stats=True", norm.running_mean),
    ):
        if value is None:
            raise ValueError(f"{name}: expected a norm with {option}; in skip it stays as it is")
    check_no_hooks(name, norm)
