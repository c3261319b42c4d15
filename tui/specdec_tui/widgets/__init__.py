"""Widgets: what a screen is made of. Each draws what a view says, and tells of what was pointed at."""
