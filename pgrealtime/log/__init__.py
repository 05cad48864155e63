"""Between the owner's reader and every replica: a log in NATS JetStream."""
