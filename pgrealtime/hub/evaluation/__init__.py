"""Who receives an event."""
