"""From the text of a rule to a resolved predicate. Knows no SQL."""
