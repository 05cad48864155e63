"""Decides which groups of subscriptions receive an event."""
