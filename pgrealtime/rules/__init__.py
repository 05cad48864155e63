"""The rules: their language, SQL, evaluation in memory, and the engine that applies them."""
