"""Verification rules: coupled, rejection and block, and the draft distributions the last two use."""
