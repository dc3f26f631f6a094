"""Measuring methods side by side."""
