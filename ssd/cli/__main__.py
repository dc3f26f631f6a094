"""``python -m ssd.cli``."""

from .app import main

main()
