"""Drafts made for one target: it writes text, a small network learns to say what it would say next."""
