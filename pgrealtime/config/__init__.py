"""Reads and checks the configuration, whole, before anything opens."""
