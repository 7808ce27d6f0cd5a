"""Puts ops into models that exist, and takes them out again."""
