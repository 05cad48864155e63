"""Connections that read on from the changelog by themselves."""
