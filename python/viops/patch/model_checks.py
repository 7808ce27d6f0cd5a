"""What all patches ask of a model and of the arguments that name parts of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from ..plain_modules import has_hooks


def name_of(value: object) -> str:
    """The name of its class, with the module's."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def check_not_patched(is_patched: bool, hint: str = "") -> None:
    if is_patched:
        raise ValueError(
            "model: it is patched already; expected one that is not: viops.patch.undo takes "
            f"the patch out{hint}"
        )


def check_skip(model: nn.Module, skip: Sequence[str]) -> tuple[str, ...]:
    """Names of modules of the model."""
    if (
        isinstance(skip, str)
        or not isinstance(skip, Iterable)
        or not all(isinstance(name, str) for name in skip)
    ):
        raise TypeError(f"skip: expected a sequence of names of modules, got {skip!r}")
    names = {name for name, _ in model.named_modules()} - {""}
    for name in skip:
        if name not in names:
            raise ValueError(f"skip: {name!r} is no module of the model; expected names of some")
    return tuple(skip)


def is_skipped(name: str, skip: Iterable[str]) -> bool:
    """Whether the module of this name is one that `skip` names, or in one."""
    return any(name == entry or name.startswith(f"{entry}.") for entry in skip)


def check_no_hooks(name: str, module: nn.Module) -> None:
    """The module is not going to be called."""
    if has_hooks(module):
        raise ValueError(
            f"{name}: it has hooks, which nothing would call; expected none, or its name in skip"
        )
