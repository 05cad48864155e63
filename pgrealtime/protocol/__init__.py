"""PocketBase's wire syntax: topics, JSON, forms, query strings, message frames."""
