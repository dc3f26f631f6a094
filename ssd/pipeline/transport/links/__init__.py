"""Links: fixed-size frames between draft and verifier."""
