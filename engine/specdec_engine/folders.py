"""The folder of our own files."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """$SPECDEC_CACHE, or the platform's cache folder for this user."""
    return Path(os.environ["SPECDEC_CACHE"]) if os.environ.get("SPECDEC_CACHE") else user_cache_path("specdec")
