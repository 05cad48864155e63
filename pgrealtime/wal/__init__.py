"""From the replication slot to whole transactions. Has never heard of subscriptions."""
