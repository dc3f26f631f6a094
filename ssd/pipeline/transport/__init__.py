"""How frames and messages travel between processes. Nothing here knows a worker."""
