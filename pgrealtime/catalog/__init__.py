"""What pg_catalog says about the tables: read by ``introspect``, held by ``model``."""
