"""Entry points of launchers: ``torchrun launch/torchrun.py``, ``python launch/ray_job.py``, and others.

They take the arguments of the ``ssd`` command.
"""
