"""Builds the program from its configuration, replaces parts while it runs, stops it in order."""
