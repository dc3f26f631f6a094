"""Structured output: schemas, regular expressions and grammars, compiled and matched."""
