"""Parsers of a model's answer: reasoning and tool calls, split off its text as it comes."""
