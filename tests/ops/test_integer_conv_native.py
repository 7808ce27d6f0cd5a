"""INT16 convolutions below the public functions: the checks that guard memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from viops import native

LEVELS = [] if native.extension is None else list(native.extension.cpu_levels())


class TestNative:
    """The checks that guard memory hold for callers below the public functions."""

    def packed(self, w: Tensor, **options: object):
        given = {
            "groups": 1,
            "stride": (1, 1),
            "padding": (0, 0),
            "dilation": (1, 1),
            "to_input": False,
            "bits_w": 13,
            "bits": 13,
            **options,
        }
        return native.require().PackedFilters(w, **given)

    @pytest.mark.parametrize(
        ("error", "w", "options"),
        [
            (TypeError, torch.ones(4, 3, 1, 1), {}),
            (ValueError, torch.ones(4, 3, 1, dtype=torch.int16), {}),
            (ValueError, torch.ones(4, 0, 1, 1, dtype=torch.int16), {}),
            (ValueError, torch.ones(4, 3, 2, 2, dtype=torch.int16).mT, {}),
            (ValueError, torch.ones(4, 3, 1, 1, dtype=torch.int16), {"groups": 3}),
            (ValueError, torch.ones(4, 3, 1, 1, dtype=torch.int16), {"stride": (0, 1)}),
            (ValueError, torch.ones(4, 3, 1, 1, dtype=torch.int16), {"padding": (0, -1)}),
            (ValueError, torch.ones(4, 3, 1, 1, dtype=torch.int16), {"bits": 16}),
            (ValueError, torch.ones(4, 3, 1, 1, dtype=torch.int16), {"bits_w": 0}),
        ],
    )
    def test_filters(self, error: type, w: Tensor, options: dict) -> None:
        with pytest.raises(error):
            self.packed(w, **options)

    def convolve(self, **options: object) -> float:
        filters = self.packed(torch.ones(4, 3, 3, 3, dtype=torch.int16))
        images = {"memory_format": torch.channels_last}
        one = torch.ones(())
        given = {
            "x": torch.ones(2, 3, 5, 5, dtype=torch.int16).contiguous(**images),
            "x_scale": one,
            "w_scale": one,
            "bits": 13,
            "gain": None,
            "bias": None,
            "residual": None,
            "relu": False,
            "read_next": False,
            "height": 5,
            "width": 5,
            "y": torch.empty(2, 4, 3, 3).contiguous(**images),
            **options,
        }
        return filters.convolve(**given)

    @pytest.mark.parametrize(
        "options",
        [
            {"x": torch.ones(2, 3, 5, 5, dtype=torch.int16)},
            {"x": torch.ones(2, 3, 5, 5)},
            {"x": torch.ones(2, 4, 5, 5, dtype=torch.int16)},
            {"height": 6},
            {"height": 1},
            {"bits": 14},
            {"y": torch.empty(2, 4, 3, 3)},
            {"y": torch.empty(2, 4, 3, 4).contiguous(memory_format=torch.channels_last)},
            {"bias": torch.ones(3)},
            {"gain": torch.ones(4, dtype=torch.float64)},
            {"residual": torch.ones(2, 4, 3, 3)},
            {"x_scale": torch.ones(2)},
        ],
    )
    def test_convolve(self, options: dict) -> None:
        assert self.convolve() == 27
        with pytest.raises((ValueError, TypeError)):
            self.convolve(**options)

    def test_filters_keep_to_the_level_that_packed_them(self) -> None:
        filters = self.packed(torch.ones(4, 3, 1, 1, dtype=torch.int16))
        x = torch.ones(1, 3, 1, 1).contiguous(memory_format=torch.channels_last)
        previous = native.require().cpu_level()
        for name in LEVELS:
            native.set_cpu_level(name)
            y, one = torch.empty(1, 4, 1, 1), torch.ones(())
            filters.convolve_floats(x, True, 0, one, None, None, None, False, False, y)
            assert (y == 3).all()
        native.set_cpu_level(previous)
