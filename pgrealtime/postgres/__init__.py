"""Connections to PostgreSQL, the query pool, and reads of rows by key."""
