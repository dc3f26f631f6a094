"""The transformers boundary: loading, vocabularies, KV cache, attention, forwards."""
