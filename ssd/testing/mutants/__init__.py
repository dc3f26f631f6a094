"""Known bugs, seeded into the running code."""
