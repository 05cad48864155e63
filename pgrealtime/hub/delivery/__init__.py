"""Composes and renders the messages of events."""
