"""Our operators for CPUs."""
