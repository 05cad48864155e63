"""Runs queries about rules and rows in PostgreSQL, with time limits."""
