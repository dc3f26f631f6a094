"""Workloads, measuring and reports."""
