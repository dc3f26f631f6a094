"""Tiny and widened models."""
