"""Token trees: their shapes, their widths, and combs of candidates."""
