"""What a transaction means to subscribers."""
