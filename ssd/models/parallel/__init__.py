"""Tensor parallelism: layers divided among processes."""
