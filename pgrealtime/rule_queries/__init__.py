"""Asks PostgreSQL about rules and rows, bounded in time."""
