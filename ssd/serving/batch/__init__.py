"""Batch files: lines, results, and the journal that survives a kill."""
