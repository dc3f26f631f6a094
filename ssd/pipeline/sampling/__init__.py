"""What the slots' requests ask for in sampling, and the drafting walk that chooses tokens by it."""
