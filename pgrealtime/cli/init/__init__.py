"""The command ``pgrealtime init``: writes a first configuration for the tables of a database."""
