"""Loads and encodes related records."""
