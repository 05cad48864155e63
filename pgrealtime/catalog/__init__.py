"""Tables, types and privileges from ``pg_catalog``, and SQL for their names."""
