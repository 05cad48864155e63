"""The command ``pgrealtime sql``: prints what a database lacks of what a configuration needs."""
