"""Other programs that decode with the same weights, behind one protocol."""
