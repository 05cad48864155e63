"""Who hears what. Has never heard of the replication slot."""
