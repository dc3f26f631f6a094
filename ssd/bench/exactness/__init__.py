"""Certificates that output equals plain decoding."""
