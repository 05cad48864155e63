"""From the replication stream to the changelog."""
