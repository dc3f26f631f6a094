"""Builds the workers and runs their loops. The only room that knows all the others."""
