"""Recent transactions, kept here so that the server may remove their WAL."""
