"""Collections: configured tables as PocketBase's clients see them."""
