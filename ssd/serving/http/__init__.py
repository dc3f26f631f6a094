"""What every HTTP front door shares: the border, access, errors, the server's state."""
