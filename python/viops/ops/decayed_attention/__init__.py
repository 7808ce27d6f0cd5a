"""Decayed attention: see README.md beside this file."""

from .op import decayed_attention

__all__ = ["decayed_attention"]
