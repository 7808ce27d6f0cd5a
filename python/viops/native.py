"""Loads the compiled extension `viops._C`, and keeps the reason when it cannot be loaded."""

from __future__ import annotations

import importlib
from types import ModuleType

#: What this version of the package calls before any op does.
_EXPECTED = ("build_info", "cpu_level", "cpu_levels", "threads")


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("viops._C")
    except Exception as error:  # a broken or stale build may raise anything
        return None, f"viops._C cannot be loaded: {str(error) or type(error).__name__}"
    lacking = [name for name in _EXPECTED if not hasattr(module, name)]
    if lacking:
        return None, (
            "viops._C cannot be loaded: it is from another version of viops, "
            f"without {', '.join(lacking)}"
        )
    return module, None


#: The extension module, or None.
extension, load_error = _load()


#: The CPU level that the extension took when it was loaded, or None.
cpu_level: str | None = None if extension is None else extension.cpu_level()


def require() -> ModuleType:
    """The extension module; RuntimeError with the reason where there is none."""
    if extension is None:
        raise RuntimeError(load_error)
    return extension


def set_cpu_level(name: str) -> None:
    """Makes the extension use this CPU level; ValueError for one that the machine lacks."""
    global cpu_level
    require().set_cpu_level(name)
    cpu_level = name
