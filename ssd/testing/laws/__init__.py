"""Exact and sampled laws of verification rules."""
