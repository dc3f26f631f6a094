"""What ``scripts/gpu_check.py`` runs, by noun: the bench, checks, forwards, engines, the report."""
