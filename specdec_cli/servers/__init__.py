"""Servers of other engines: which one, its counters, its figures, and what to set there."""
