"""How far to draft, learned from events."""
