"""The command ``pgrealtime check``: finds problems of configuration and database."""
