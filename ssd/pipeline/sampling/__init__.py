"""What the requests in the slots ask of sampling."""
