"""Builds the service from its configuration, reloads it while it runs, and stops it in order."""
