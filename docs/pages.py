"""The documentation as a site: ``python docs/pages.py [OUTPUT]``, default build/site.

Pages are those of zensical.toml. Some lie outside `docs`, so all are gathered in build/docs first,
with their links as the site needs them; a link that leads nowhere ends the build.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "zensical.toml"
# Page of the site -> file of the repository, for those that lie outside docs.
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
    "licence.md": "LICENSE",
}
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(#[^)]*)?\)")


def pages() -> list[tuple[str, Path]]:
    """Every page of the site in the order of its navigation, with the file that it is."""
    nav = tomllib.loads(CONFIG.read_text("utf-8"))["project"]["nav"]
    return [(page, ROOT / OUTSIDE.get(page, f"docs/{page}")) for page in _leaves(nav)]


def _leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for one in nav.values() if isinstance(nav, dict) else nav:
            yield from _leaves(one)


def mended(text: str, page: str, source: str) -> str:
    """A page's text with links as the site has them; ``source`` is its file below the root."""
    names = {name: site for site, name in OUTSIDE.items()}

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        target = names.get(target, target.removeprefix("docs/"))
        there = posixpath.relpath(target, posixpath.dirname(page) or ".")
        return f"]({there}{match[2] or ''})"

    return LINK.sub(link, text)


def gather(folder: Path) -> None:
    """Every page and picture, as the site's generator wants them."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs" / "pictures", folder / "pictures")
    for page, file in [*pages(), ("licence.md", ROOT / "LICENSE")]:
        text = file.read_text("utf-8")
        if file.suffix != ".md":
            text = f"# Licence\n\n```text\n{text}```\n"
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        (folder / page).write_text(mended(text, page, file.relative_to(ROOT).as_posix()), "utf-8")


def build(output: Path) -> None:
    """Gather the pages and make the site of them.

    Raises CalledProcessError where the generator finds fault, such as a broken link.
    """
    gather(ROOT / "build" / "docs")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    subprocess.run(command, cwd=ROOT, check=True)
    made = ROOT / "build" / "site"
    if output.resolve() != made:
        shutil.copytree(made, output, dirs_exist_ok=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "build" / "site")
