"""The YAML of a pairing: its sections, how it is loaded, and the words of its error messages."""
