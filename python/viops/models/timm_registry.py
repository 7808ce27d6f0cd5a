"""Our models for timm.create_model, as "viops_rmt_t" and so on, where timm is installed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from . import ms_mlp, revcol, rmt
from .image_model import ImageModel, Sizes


class Family(NamedTuple):
    """Models of one class; `cfg` is what timm is to know about them beside `_default_cfg`."""

    model: type[ImageModel]
    configs: dict[str, Sizes]
    cfg: dict[str, Any]


FAMILIES = (
    Family(rmt.RMT, {**rmt.CONFIGS}, {"first_conv": "patch_embed.proj.0"}),
    Family(ms_mlp.MSMLP, {**ms_mlp.CONFIGS}, {"first_conv": "patch_embed.proj", "crop_pct": 0.875}),
    Family(
        revcol.RevCol,
        {**revcol.CONFIGS},
        {"first_conv": "stem.0", "classifier": "cls.classifier.1", "crop_pct": 0.875},
    ),
)


def _default_cfg(**options: Any) -> dict[str, Any]:
    """What timm is to know about the models; there are no weights to download."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "classifier": "head",
        **options,
    }


default_cfgs = {
    f"viops_{size}": _default_cfg(**family.cfg) for family in FAMILIES for size in family.configs
}


def register() -> None:
    """Adds the models to timm's registry, and warns where timm is there but does not load."""
    if importlib.util.find_spec("timm") is None:
        return
    try:
        from timm.models import register_model
    except (ImportError, RuntimeError) as error:  # torchvision's, where it does not fit torch
        text = f"timm does not load, so that it has no model of viops: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        return
    for family in FAMILIES:
        for size, config in family.configs.items():
            register_model(_entrypoint(family.model, size, config))


def _entrypoint(model: type[ImageModel], size: str, config: Sizes) -> Callable[..., nn.Module]:
    """The function that timm calls to create a model."""

    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        from timm.models import build_model_with_cfg

        return build_model_with_cfg(
            model,
            f"viops_{size}",
            pretrained,
            config=config,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **options,
        )

    create.__name__ = create.__qualname__ = f"viops_{size}"
    create.__doc__ = f"{size} of viops.models."
    return create
