"""The HTTP surface: PocketBase's, to the byte."""
