"""From a resolved predicate to sqlglot expressions."""
