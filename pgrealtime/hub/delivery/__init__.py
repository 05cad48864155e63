"""What is sent of an event."""
