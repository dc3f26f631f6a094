"""Guesses from the text itself: n-grams, copied continuations, common prefixes."""
