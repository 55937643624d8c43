"""The site builds without a warning, so no link of the docs is broken; nor is one in the files at the root."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
ROOT_PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / ".github").rglob("*.md"))


def test_the_site_builds_without_a_warning(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "docs", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "api" / "training.html").is_file()


@pytest.mark.unit
@pytest.mark.parametrize("page", ROOT_PAGES, ids=lambda page: page.name)
def test_links_outside_of_the_site(page):
    broken = [target for target in link_targets(page) if not (page.parent / target).exists()]
    assert not broken


def link_targets(page: Path) -> list[str]:
    """Targets of a page's links and images that are files of the repository. Such pages link to no anchors."""
    inlines = [token for token in MarkdownIt().parse(page.read_text(encoding="utf-8")) if token.type == "inline"]
    tokens = [child for token in inlines for child in token.children or ()]
    targets = [str(token.attrs.get("href") or token.attrs.get("src") or "") for token in tokens]
    return [target for target in targets if target and "://" not in target]
