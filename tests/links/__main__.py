"""`python -m tests.links SITE`: exit status 1, and a line for each broken link, if there is one."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.links._look import broken_in_markdown, broken_in_site

ROOT = Path(__file__).resolve().parents[2]


def main(site: Path) -> int:
    """Look at the built site, and at the Markdown files beside it."""
    found = broken_in_site(site)
    for page in sorted(ROOT.glob("*.md")):
        found += broken_in_markdown(page, ROOT, site)
    for line in found:
        sys.stderr.write(f"{line}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
