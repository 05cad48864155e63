"""Who may see a row: the rule language, its SQL, its evaluation in memory, the engine."""
