"""Connects to PostgreSQL and reads rows, whatever is asked."""
