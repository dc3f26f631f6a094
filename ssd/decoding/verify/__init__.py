"""Verification rules: coupled, rejection and block, and the distributions that the last two compare."""
