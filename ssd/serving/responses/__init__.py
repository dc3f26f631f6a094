"""OpenAI's Responses API: another front door over the same generation."""
