"""JSON schemas of requests, prepared for the grammar library: what it cannot hold is rewritten or refused by name."""
