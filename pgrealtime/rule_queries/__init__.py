"""Puts the engine's questions to PostgreSQL, bounded in time."""
