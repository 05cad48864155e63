"""Where a transaction is kept before Postgres may forget it."""
