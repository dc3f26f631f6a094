"""What a request asks for and what it gets back. Every bound on a request is checked here."""
