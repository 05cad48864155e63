"""Who may see a row: the language, its meaning in SQL, and what decides it. Knows no driver."""
