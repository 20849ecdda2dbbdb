"""The dashboard's files keep to what its Content-Security-Policy and any mount point allow. How it works: `make test-ui`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import llmux_asgi.admin
from llmux_asgi.admin._static import StaticFiles

FOLDER = Path(llmux_asgi.admin.__file__).parent / "static"
FILES = {path.name: path.read_text() for path in sorted(FOLDER.iterdir())}
SCRIPTS = sorted(name for name in FILES if name.endswith(".js"))


def test_all_of_them_are_served() -> None:
    assert set(FILES) == set(StaticFiles()._files)


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_is_loaded_from_elsewhere(name: str) -> None:
    urls = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", re.sub(r"(?m)^\s*//.*$", "", FILES[name])))
    assert urls <= {"http://www.w3.org"}  # the namespace of SVG


def test_the_page_has_no_script_and_no_style_in_it_and_its_addresses_are_relative() -> None:
    page = FILES["index.html"]
    assert re.findall(r"<script(?![^>]*\bsrc=)", page) == []
    assert re.findall(r"<style|\sstyle=|\son\w+=", page) == []
    for address in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert address.startswith("#") or address.removeprefix("static/") in FILES, address


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_set_text_and_never_markup(name: str) -> None:
    unwanted = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function|setAttribute\(.style"
    assert re.findall(unwanted, FILES[name]) == []
    for module in re.findall(r'from "([^"]+)"', FILES[name]):
        assert module.removeprefix("./") in FILES, module


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_element_that_a_script_looks_for_is_in_the_page(name: str) -> None:
    there = set(re.findall(r'\bid="([\w-]+)"', FILES["index.html"]))
    assert set(re.findall(r'\$\("([\w-]+)"\)', FILES[name])) <= there
