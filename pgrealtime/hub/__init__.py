"""Delivers events to subscribers. Doesn't know the replication slot."""
