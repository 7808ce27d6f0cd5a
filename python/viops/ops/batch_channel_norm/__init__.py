"""Batch channel norm, from Qiao et al.: batch norm, then group norm, in one op."""

from .op import batch_channel_norm

__all__ = ["batch_channel_norm"]
