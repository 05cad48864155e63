"""Logs and metrics: set up once, at the edge."""
