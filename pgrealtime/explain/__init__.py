"""Explains whether a caller receives events of a record, and why."""
