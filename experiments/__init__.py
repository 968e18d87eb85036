"""What compares scores, and makes the tables of results."""
