"""Documents: their links lead somewhere, the paths they name exist, and the site shows every page."""

import re
from pathlib import Path

import pytest
import yaml
from support.documented_commands import DOCUMENTS, ROOT
from support.fault_table import HEADER, HEADING
from support.page_sections import write_section

LINK = re.compile(r"\]\(([^)\s]+)\)")
DOCS = ROOT / "docs"
ALL = [*DOCUMENTS, ROOT / "CHANGELOG.md"]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs form them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken(page: Path, target: str) -> bool:
    """Whether a link of a page leads to no file or no heading; links to other sites are not followed."""
    if re.match(r"https?:", target):
        return False
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    return not file.exists() or (bool(anchor) and anchor not in anchors(file))


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    assert [target for target in LINK.findall(page.read_text(encoding="utf-8")) if broken(page, target)] == []


def test_a_broken_link_is_noticed():
    page = DOCS / "train.md"
    assert broken(page, "no_such_page.md") and broken(page, "train.md#no-such-heading") and broken(page, "#nothing")
    assert not broken(page, "cluster.md#exit-codes") and not broken(page, "https://arxiv.org/abs/2510.24711")


def test_links_of_the_site_stay_in_docs():
    """mkdocs publishes docs/ alone, so that a link out of it would be broken there."""
    links = {(page.name, target) for page in DOCS.glob("*.md") for target in LINK.findall(page.read_text("utf-8"))}
    assert len(links) > 40
    assert [(name, target) for name, target in sorted(links) if target.startswith("..")] == []


def test_the_site_and_its_first_page_list_every_page():
    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for value in (entry.values() if isinstance(entry, dict) else entry) for page in pages(value)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))
    linked = {target.partition("#")[0] for target in LINK.findall((DOCS / "index.md").read_text("utf-8"))}
    assert linked >= set(listed) - {"index.md"}


def test_the_readme_is_short_and_links_the_glossary():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert "(docs/glossary.md)" in text and "(docs/troubleshooting.md)" in text
    assert "(../docs/glossary.md)" in (ROOT / "megapromoe" / "README.md").read_text(encoding="utf-8")


def test_a_program_replaces_its_section_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\nIntroduction.\n\n## First\n\nold\n\n### Part\n\nold\n\n## Last\n\ntext\n")
    write_section(page, "First", "new\n")
    assert page.read_text() == "# Page\n\nIntroduction.\n\n## First\n\nnew\n\n## Last\n\ntext\n"
    write_section(page, "Last", "end")
    write_section(page, "Added", "more")
    assert page.read_text().endswith("## First\n\nnew\n\n## Last\n\nend\n\n## Added\n\nmore\n")
    write_section(tmp_path / "new.md", "Only", "text")
    assert (tmp_path / "new.md").read_text() == "## Only\n\ntext\n"


@pytest.mark.parametrize(
    "name, headings",
    [
        ("equality.md", ["Every layout trains the same function", "A run that changes its layout"]),
        ("faults.md", [HEADING, "Damaged files"]),
    ],
)
def test_written_sections_are_in_their_pages(name, headings, tmp_path):
    """Each page is as its programs would write it from the same numbers."""
    text = (DOCS / name).read_text(encoding="utf-8")
    start, *sections = re.split(r"^## ", text, flags=re.M)
    assert [section.partition("\n")[0] for section in sections] == headings and start.startswith("# ")
    (tmp_path / name).write_text(text, encoding="utf-8")
    for section in sections:
        heading, _, content = section.partition("\n")
        write_section(tmp_path / name, heading, content)
    assert (tmp_path / name).read_text(encoding="utf-8") == text
    assert name != "faults.md" or f"## {HEADING}\n\n{HEADER}" in text


def test_modules_of_the_glossary_exist():
    modules = re.findall(r"`([a-z_/]+\.py)`", (DOCS / "glossary.md").read_text(encoding="utf-8"))
    assert len(modules) > 40 and [name for name in modules if not (ROOT / "megapromoe" / name).is_file()] == []


def test_paths_that_documents_name_exist():
    named = {
        (page, path)
        for page in DOCUMENTS
        for path in re.findall(r"`((?:megapromoe|tests|tools|launchers)/[\w/]+\.(?:py|sh))", page.read_text("utf-8"))
    }
    assert len(named) > 60
    assert sorted(f"{page.name}: {path}" for page, path in named if not (ROOT / path).is_file()) == []
