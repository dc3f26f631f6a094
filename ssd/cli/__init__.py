"""The ``ssd`` command."""
