"""Distributions of the tokens under each verification rule: enumerated, counted and sampled."""
