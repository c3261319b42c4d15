"""The records and numbers that every room uses."""
