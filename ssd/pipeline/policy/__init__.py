"""What to do next: method, lookahead, fallback. No torch."""
