"""Tables, types and privileges from ``pg_catalog``."""
