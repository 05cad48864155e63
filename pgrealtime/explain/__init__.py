"""Would this caller receive an event of this record, and why."""
