"""Loads the compiled extension `viops._C`, and keeps the reason when it cannot be loaded."""

from __future__ import annotations

import importlib
from types import ModuleType


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("viops._C"), None
    except ImportError as error:
        return None, f"viops._C cannot be loaded: {error}"


#: The extension module, or None.
extension, load_error = _load()


#: The CPU level that the extension took when it was loaded, or None.
cpu_level: str | None = None if extension is None else extension.cpu_level()


def require() -> ModuleType:
    """The extension module; RuntimeError with the reason where there is none."""
    if extension is None:
        raise RuntimeError(load_error)
    return extension
