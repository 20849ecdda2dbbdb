"""Links of the built site, and of the Markdown files that are not part of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["broken_in_markdown", "broken_in_site"]

_SCHEMES = {"http", "https", "mailto"}
_ATTRIBUTES = {"href", "src", "data"}


@dataclass
class _Page(HTMLParser):
    """What a page refers to, and what may be referred to in it."""

    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            elif name in _ATTRIBUTES and value:
                self.links.append(value)


@cache
def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def broken_in_site(site: Path) -> list[str]:
    """One line for each link of the pages in `site` that leads nowhere. Of what is outside only the form is looked at.

    404.html is left out: it is served for any path, so its links begin at the root of wherever the site is.
    """
    pages = sorted(path for path in site.rglob("*.html") if path.name != "404.html")
    found = ((page, link, _fault(link, page, site)) for page in pages for link in _read(page).links)
    return [f"{page.relative_to(site)}: {link}: {fault}" for page, link, fault in found if fault]


def _fault(link: str, page: Path, root: Path) -> str | None:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        if parts.scheme == "data" or parts.hostname in ("127.0.0.1", "localhost"):
            return None
        well_formed = parts.scheme in _SCHEMES and ("." in (parts.hostname or "") or parts.scheme == "mailto")
        return None if well_formed and " " not in link else "not a URL"
    if parts.path.startswith("/"):
        return "not relative: the site may be anywhere"
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if target.is_dir():
        target /= "index.html"
    if not target.is_file() or not target.is_relative_to(root.resolve()):
        return "no such file"
    if parts.fragment and target.suffix == ".html":
        anchor = unquote(parts.fragment)
        # `#__codelineno` and the like are made by scripts of the theme.
        if anchor not in _read(target).anchors and not anchor.startswith("__"):
            return "no such place in it"
    return None


def broken_in_markdown(page: Path, root: Path, site: Path) -> list[str]:
    """The same for a Markdown file of the repository at `root`, such as its README, whose links lead to files in it.

    Anchors into `docs/` are looked up in the pages that `site` has of them, those into other Markdown files in their headings.
    """
    found: list[str] = []
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
    for link in links:
        parts = urlsplit(link)
        if parts.scheme:
            fault = _fault(link, page, root)
        else:
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            fault = None if target.exists() else "no such file"
            if fault is None and parts.fragment and parts.fragment not in _anchors(target, root, site):
                fault = "no such place in it"
        if fault:
            found.append(f"{page.relative_to(root)}: {link}: {fault}")
    return found


def _anchors(page: Path, root: Path, site: Path) -> set[str]:
    docs = (root / "docs").resolve()
    if page.is_relative_to(docs):
        return _read(site / page.relative_to(docs).with_suffix(".html")).anchors
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
