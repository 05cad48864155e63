"""Turns transactions into events, and divides them into slices."""
