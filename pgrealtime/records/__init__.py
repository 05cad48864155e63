"""Rows as PocketBase's JSON: values of fields, hidden fields, the option ``fields``."""
