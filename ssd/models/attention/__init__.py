"""Attention of decode rows over the slot cache."""
