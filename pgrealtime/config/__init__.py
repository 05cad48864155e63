"""Reads and validates the whole configuration, before anything is opened."""
