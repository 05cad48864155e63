"""PocketBase's realtime API for an existing PostgreSQL database."""

from importlib.metadata import version

__version__ = version("pgrealtime")
