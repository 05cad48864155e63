"""From the replication slot to whole transactions. Doesn't know subscriptions."""
