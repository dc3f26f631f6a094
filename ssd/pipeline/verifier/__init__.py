"""The verifier: the worker that runs the target model and leads the rounds."""
