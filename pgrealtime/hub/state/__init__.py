"""What dispatching, catching up and subscribe calls share."""
