"""The loop, and what steers it between cycles."""
