"""Requests: the offline front, detokenizing, results."""
