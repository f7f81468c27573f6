"""Sections of the pages in docs/ that programs write: the rest of a page stays as people have written it."""

import re
from pathlib import Path


def write_section(page: Path, heading: str, text: str) -> None:
    """Replaces the text under `## heading` up to the next heading of that level, or appends the section.

    Args:
        page: a Markdown file; created if it does not exist.
        heading: the heading, without its marks.
        text: what the section holds, without its heading.
    """
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    start, *sections = re.split(r"^## ", before, flags=re.M)
    section = f"{heading}\n\n{text.strip()}\n"
    number = next((i for i, other in enumerate(sections) if other.partition("\n")[0] == heading), len(sections))
    sections[number : number + 1] = [section]
    parts = [part.strip("\n") + "\n" for part in sections]
    page.write_text("\n".join([start.strip("\n") + "\n", *(f"## {part}" for part in parts)]).lstrip("\n"), "utf-8")
