"""Whether rows that are read now may be shown with an event committed earlier."""
