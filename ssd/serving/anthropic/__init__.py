"""Anthropic's Messages API: another front door over the same generation."""
