"""Weight standardization, from Qiao et al.: filters of mean zero and variance one."""

from .op import standardize_weight, standardize_weights

__all__ = ["standardize_weight", "standardize_weights"]
