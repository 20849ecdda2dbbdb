"""The check of links finds what is broken, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.links._look import broken_in_markdown, broken_in_site


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        ("other.html", None),
        ("other.html#place", None),
        ("#here", None),
        ("sub/", None),
        ("sub/index.html", None),
        ("https://example.org/x#y", None),
        ("http://127.0.0.1:8000/v1", None),
        ("mailto:somebody@example.org", None),
        ("data:image/png;base64,AAAA", None),
        ("nobody.html", "no such file"),
        ("other.html#nowhere", "no such place in it"),
        ("#nowhere", "no such place in it"),
        ("../outside.html", "no such file"),
        ("/other.html", "not relative"),
        ("https://example", "not a URL"),
        ("htp://example.org", "not a URL"),
    ],
)
def test_a_link_of_the_site(link: str, fault: str | None, tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "sub").mkdir(parents=True)
    (tmp_path / "outside.html").write_text("")
    (site / "sub" / "index.html").write_text('<a href="../index.html#here">up</a>')
    (site / "other.html").write_text('<h2 id="place">Place</h2><a name="old"></a><a href="#old">old</a>')
    (site / "index.html").write_text(f'<p id="here"><img src="{link}"></p>')
    found = broken_in_site(site)
    assert len(found) == (fault is not None)
    assert not fault or found[0].startswith(f"index.html: {link}: {fault}")


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        ("[x](docs/page.md)", None),
        ("[x](docs/page.md#a-place)", None),
        ("[x](LICENSE)", None),
        ("[x](#what-it-is)", None),
        ("[x](https://example.org)", None),
        ("[x]: docs/page.md", None),
        ("`[x](in-code.md)`", None),
        ("[x](docs/none.md)", "no such file"),
        ("[x]: docs/none.md", "no such file"),
        ("[x](docs/page.md#nowhere)", "no such place in it"),
        ("[x](#nowhere)", "no such place in it"),
    ],
)
def test_a_link_of_the_readme(link: str, fault: str | None, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "site").mkdir()
    (tmp_path / "LICENSE").write_text("")
    (tmp_path / "docs" / "page.md").write_text("# Page\n\n## A place\n")
    (tmp_path / "site" / "page.html").write_text('<h2 id="a-place">A place</h2>')
    readme = tmp_path / "README.md"
    readme.write_text(f"# Name\n\n## What it is?\n\n{link}\n")
    found = broken_in_markdown(readme, tmp_path, tmp_path / "site")
    assert len(found) == (fault is not None)
    assert not fault or found[0].endswith(fault)
