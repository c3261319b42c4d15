"""The Textual screens that show a run cycle by cycle."""
