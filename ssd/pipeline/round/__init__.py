"""Values of a round. Nothing here knows a worker or a transport."""
