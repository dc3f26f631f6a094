"""Draft ↔ verifier: frames, link, control lane, workers, rounds."""
