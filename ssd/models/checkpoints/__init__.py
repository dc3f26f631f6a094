"""Model folders and files: configurations, weights, tokenizers, defaults."""
