"""One client's response and what is queued for it."""
