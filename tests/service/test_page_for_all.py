"""Whether anybody can use the live page: width, contrast, names, keyboard; and what it may load."""

from __future__ import annotations

import re

import pytest

from tests.service.pages import FORM, browser, each, feed, overflow, tab, visit

__all__ = ["browser", "tab", "visit"]

PARTS = ("api", "charts", "dom", "metrics", "panel", "traffic", "try")
# Everything that a keyboard must reach, as far as it is shown.
CONTROLS = "a[href], button, input, select, textarea, summary, [tabindex='0']"
SHOWN = f'[...document.querySelectorAll("{CONTROLS}")].filter((e) => e.checkVisibility())'
# [text, contrast] of every text that falls short, by the definition of WCAG 2.2, 1.4.3.
FAINT = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = (c) => [...c].slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const ground = (node) => {
    for (let n = node; n; n = n.parentElement) {
      const c = rgba(getComputedStyle(n).backgroundColor);
      if (c[3] === 255) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  let seen = 0;
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim());
    const field = /^(INPUT|TEXTAREA|SELECT)$/.test(node.tagName);
    if (!(own || field) || !node.checkVisibility()) continue;
    seen += 1;
    const style = getComputedStyle(node);
    const colour = rgba(node instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(colour), light(ground(node))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) found.push([node.textContent.slice(0, 40), contrast]);
  }
  return [seen, found];
})()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_anybody_can_use_it(served, visit, tmp_path, width, dark):
    server = served()
    feed(server, "classification", 200, 150)
    page = visit(server, width, wait=FORM, phone=width == 390, dark=dark)
    page.click("#try button.main")
    page.wait("document.querySelector('.answer')")
    page.value("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    page.value("document.querySelector('#key').hidden = false")
    page.value("document.querySelector('#pause').click()")  # so that it stays so
    page.wait("document.querySelector('#state').textContent === 'Paused'")
    page.value("document.querySelector('#key').hidden = false")
    assert overflow(page) <= 0
    seen, faint = page.value(FAINT)
    assert seen > 100 and faint == []
    picture = tmp_path / "page.png"
    page.picture(picture)
    assert int.from_bytes(picture.read_bytes()[16:20], "big") == width
    labels = page.value(each("input, select, textarea", "e.labels[0]?.textContent.trim()"))
    assert len(labels) >= 6 and all(labels)
    figures = page.value(each("svg", "[e.getAttribute('role'), e.getAttribute('aria-label')]"))
    assert len(figures) >= 5 and all(role == "img" and name for role, name in figures)
    names = "document.getElementById(e.getAttribute('aria-labelledby')).textContent"
    assert page.value(each("section", names)) == ["tiny", "Traffic", "Try it"]
    ids = page.value(each("[id]", "e.id"))
    assert len(ids) == len(set(ids))
    page.value(f"window.controls = {SHOWN}; document.body.tabIndex = -1; document.body.focus()")
    reached = []
    for _ in range(page.value("window.controls.length")):
        page.press("Tab")
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        at = page.value(f"[window.controls.indexOf(document.activeElement), {outline}]")
        assert at[1] != "none", page.value("document.activeElement.outerHTML")
        reached.append(at[0])
    assert reached == list(range(len(reached)))  # each of them once, in the order of the page
    assert page.console == []


def test_the_page_asks_nobody_else_and_carries_no_inline_code(served):
    server = served()
    page = server.client.get("/").text
    scripts = {n: server.client.get(f"/page/{n}.js") for n in PARTS}
    assert all(s.headers["content-type"].startswith("text/javascript") for s in scripts.values())
    parts = [server.client.get(p).text for p in ("/page.js", "/page.css", "/page/figures.css")]
    everything = page + "".join([*parts, *(s.text for s in scripts.values())])
    links = re.findall(r"https?://[^\s\"']+", everything)
    assert links == ["http://www.w3.org/2000/svg"]  # a namespace, not an address
    assert re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", page) is None
    assert (
        re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", everything) is None
    )
    assert server.client.get("/page/__init__.py").status_code == 404
