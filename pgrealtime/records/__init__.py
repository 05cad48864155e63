"""Rows as PocketBase's JSON: field values, what is hidden from whom."""
