"""Serving: OpenAI-compatible HTTP, the client lane, the playground page, batch files."""
