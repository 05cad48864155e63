"""What an operator asks before and beside running: checks of configuration and database."""
