"""The configuration: sections and their keys, loading, and error messages."""
