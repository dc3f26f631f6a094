"""Which outcomes of a round the draft prepares for."""
