"""Collections: a configured table as PocketBase means it."""
