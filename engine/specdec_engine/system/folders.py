"""The folder of our own files."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """$SPECDEC_CACHE, or the platform's cache folder for this user."""
    named = os.environ.get("SPECDEC_CACHE")
    return Path(named).expanduser() if named else user_cache_path("specdec")
