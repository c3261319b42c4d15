"""The site that `sphinx-build -c docs . site` makes of what is written anyway: the packages' READMEs and docs/."""

project = "specdec"
author = "the authors of specdec"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", *(f"{folder}/README.md" for folder in ("engine", "tui", "benchmarks"))]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "specdec"
