"""Token trees: shapes, widths, and combs of candidates."""
