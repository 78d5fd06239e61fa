"""A page and its translation have the same headings, tables, commands and names; what is between them nobody compares."""

import re
from pathlib import Path

import pytest

from door import ROOT

TRANSLATED = sorted((ROOT / "docs").glob("*.ja.md"))
translated = pytest.mark.parametrize("page", TRANSLATED, ids=[page.name for page in TRANSLATED])


def original(page: Path) -> Path:
    """The English page."""
    return page.with_name(page.name.replace(".ja.md", ".md"))


def shape(text: str) -> list[str]:
    """Levels of headings, rows of tables with their number of columns, bullets and blocks of code, in their order."""
    blocks = re.sub(r"^```\w*\n.*?^```", "```", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^(#+|\||\*|```)( .*)?$", blocks, re.MULTILINE)
    return [start + (rest.count(" |") * "|" if start == "|" else "") for start, rest in lines]


def names(text: str) -> dict[str, int]:
    """What stands in code in the text, and how often."""
    found = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return {name: found.count(name) for name in found}


@translated
def test_both_have_the_same_shape(page):
    ours, theirs = (shape(file.read_text()) for file in (page, original(page)))
    assert ours == theirs and ours.count("##") > 4


@translated
def test_both_have_the_same_blocks_of_code(page):
    ours, theirs = (re.findall(r"^```.*?^```", file.read_text(), re.MULTILINE | re.DOTALL) for file in (page, original(page)))
    assert ours == theirs and ours


@translated
def test_both_have_the_same_names_and_messages(page):
    ours, theirs = (names(file.read_text()) for file in (page, original(page)))
    assert ours.keys() == theirs.keys() and len(ours) > 60
    # A message is quoted once in a table, in the same row.
    rows = [[re.findall(r"`([^`]+)`", line.split(" | ")[0]) for line in file.read_text().splitlines() if line.startswith("| ")]
            for file in (page, original(page))]
    assert rows[0] == rows[1]


@translated
def test_each_names_the_other(page):
    assert f"({original(page).name})" in page.read_text().split("\n## ")[0]
    assert f"({page.name})" in original(page).read_text().split("\n## ")[0]


@translated
def test_a_translation_links_to_translations(page):
    named = set(re.findall(r"\]\(([\w.]+\.md)", page.read_text())) - {original(page).name}
    assert not {name for name in named if (page.parent / name.replace(".md", ".ja.md")).is_file()}
