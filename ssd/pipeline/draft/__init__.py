"""The draft: the worker that prepares speculations."""
