"""The site that `sphinx-build -c docs . site` makes of what is written anyway: the packages' READMEs and docs/."""

from pathlib import Path
from tempfile import mkdtemp

from specdec_tui.export import export
from specdec_tui.streams import DEMO, read_frame

project = "specdec"
author = "the authors of specdec"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", *(f"{folder}/README.md" for folder in ("engine", "tui", "benchmarks"))]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "specdec"
html_static_path = [mkdtemp(prefix="specdec-site-")]  # docs/method.md has a recorded run in it
export(*read_frame(DEMO), Path(html_static_path[0]) / "run.html")
