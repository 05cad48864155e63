"""Several processes that serve one port: the main process feeds and supervises its workers."""
