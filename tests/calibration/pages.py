"""Read an HTML page as a browser would before it runs any script."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass
class Page(HTMLParser):
    """Tags with their attributes, text outside scripts, and the scripts and styles."""

    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    text: str = ""
    scripts: list[str] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._in: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag in ("script", "style"):
            self._in = tag
            (self.scripts if tag == "script" else self.styles).append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._in:
            self._in = None

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in == "style":
            self.styles[-1] += data
        else:
            self.text += data

    def ids(self) -> list[str]:
        """The ids in document order."""
        return [a["id"] for _, a in self.tags if "id" in a]

    def loads(self) -> list[str]:
        """Everything outside scripts that would make a browser fetch something."""
        names = ("src", "href", "srcset", "data", "action", "poster")
        found = [a[n] for _, a in self.tags for n in names if n in a]
        return found + [s for s in self.styles if "url(" in s or "@import" in s]


def read(html: str) -> Page:
    """The page of ``html``."""
    page = Page()
    page.feed(html)
    page.close()
    return page
