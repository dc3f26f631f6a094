"""Entries for launchers: ``torchrun launch/torchrun.py``, ``python launch/ray_job.py``. All take the
arguments of the ``ssd`` command."""
