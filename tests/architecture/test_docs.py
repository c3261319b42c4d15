"""What people read: every link leads somewhere, and every command is one that this program takes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from specdec_cli.main import COMMANDS, app
from specdec_cli.servers.attached import SERVER_FLAGS, take_server_flags
from specdec_engine.core.registry import OURS

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *(ROOT / name / "README.md" for name in ("engine", "tui", "benchmarks")),
    ]
)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)")
TYPED = re.compile(r"(?:^|\| )(?:\.venv/bin/)?specdec (.+)$|`specdec ([^`]+)`", re.MULTILINE)
README_BYTES = 8000
"""A first page that is read to its end."""


def named(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    targets = [target for target in LINK.findall(page.read_text("utf-8")) if target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_site_is_made_without_a_warning(tmp_path):
    """Every link and every heading that is linked to, among them."""
    command = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", "-c", "docs", ".", str(tmp_path)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "acceptance" in (tmp_path / "docs" / "method.html").read_text("utf-8")


def typed(page):
    """The arguments of each command on a page, and whether running text speaks of it, where it need not be whole."""
    text = page.read_text("utf-8")
    for match in TYPED.finditer(text):
        words = shlex.split((match[1] or match[2]).replace("…", " "), comments=True)
        if words and words[0] in COMMANDS:
            yield words, match[1] is None


def refusal(words, spoken_of=False):
    """Why these words are no command, by names of options and kinds of values; empty if they are one. Nothing runs."""
    program = typer.main.get_command(app)
    with program.make_context("specdec", [], resilient_parsing=True) as context:
        try:
            own = take_server_flags(words[1:])
            program.get_command(context, words[0]).make_context(words[0], own, parent=context)
        except typer.Exit:  # --help
            return ""
        except typer.TyperException as error:
            return "" if spoken_of and type(error).__name__ == "MissingParameter" else str(error)
        finally:
            SERVER_FLAGS.clear()
    return ""


@pytest.mark.parametrize("page", [page for page in PAGES if list(typed(page))], ids=named)
def test_commands_are_ones_that_are_taken(page):
    assert [(words, why) for words, spoken_of in typed(page) if (why := refusal(words, spoken_of))] == []


@pytest.mark.parametrize(
    "words", [["generate", "--drafts", "x", "y"], ["bench", "--temperature"], ["watch", "--rule", "none"]]
)
def test_commands_that_are_not_taken_are_found(words):
    assert refusal(words)


def test_the_first_page_is_short_and_leads_to_every_other():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.encode()) < README_BYTES
    assert {f"docs/{page.name}" for page in ROOT.glob("docs/*.md") if page.stem != "index"} <= set(LINK.findall(text))


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_on_the_first_page_or_on_one_of_the_docs(name):
    pages = (page for page in PAGES if page.name == "README.md" or page.parent.name == "docs")
    assert any(f"specdec {name}" in page.read_text("utf-8") for page in pages), f"no page names specdec {name}"


@pytest.mark.parametrize("entry", OURS, ids=lambda entry: entry.name)
def test_each_way_of_drafting_has_its_row_in_the_docs(entry):
    forms = ", ".join(f"`{form}`" for form in entry.forms)
    row = f"| {forms} | {entry.about}"
    rows = (ROOT / "docs" / "generate.md").read_text("utf-8").splitlines()
    assert any(line.startswith(row) for line in rows), f"docs/generate.md has no row that begins with {row}"
