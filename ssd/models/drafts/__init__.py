"""Drafts with other token ids than the target, and functions in place of a model."""
