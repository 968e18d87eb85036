"""What makes the tables of results."""
