"""Authentication of callers: principals, tokens, passwords, and the users' rows."""
