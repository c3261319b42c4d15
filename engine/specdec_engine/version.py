"""What this is a version of; `pyproject.toml` reads it, and so may every room."""

VERSION = "0.2.0"
