"""Finds which subscribers may see a row, without evaluating each one."""
