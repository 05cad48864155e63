"""Evaluates predicates in the process, where that gives exactly what the SQL gives."""
