"""Simulating rounds from measured profiles, and planning with it."""
