"""Who receives which event. Knows nothing of the replication slot."""
