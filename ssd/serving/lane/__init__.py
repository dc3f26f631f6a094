"""The client lane: the Python client's ZMQ protocol."""
