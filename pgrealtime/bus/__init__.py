"""Passes subscribe calls on to the process that holds the connection."""
