"""A handful of files that a person recognises, made in code, to try the demo's predictor on."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class Example:
    """A file: a short name, what it is in a few words, its bytes.

    ``kind`` is "in" for one of the 214 types that magika knows and "strange" for any other.
    """

    name: str
    what: str
    data: bytes
    kind: Literal["in", "strange"]


def examples() -> list[Example]:
    """Six files under 10 kB; the same bytes on every call."""
    return [
        Example("shapes.py", "a Python file", PYTHON.encode(), "in"),
        Example("order.json", "half a JSON file", _half_json(), "in"),
        Example("index.html", "an HTML page", HTML.encode(), "in"),
        Example("gradient.png", "a PNG image", _png(), "in"),
        Example("noise.bin", "random bytes", np.random.default_rng(0).bytes(4096), "in"),
        Example("star.fits", "a FITS image: not among its types", _fits(), "strange"),
    ]


PYTHON = '''"""Areas of simple shapes."""

import math
from dataclasses import dataclass


@dataclass
class Circle:
    radius: float

    def area(self) -> float:
        return math.pi * self.radius**2


@dataclass
class Square:
    side: float

    def area(self) -> float:
        return self.side**2


def total(shapes: list[Circle | Square]) -> float:
    """Sum of the areas."""
    return sum(shape.area() for shape in shapes)


if __name__ == "__main__":
    print(total([Circle(1.0), Square(2.0)]))
'''

HTML = """<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <title>Harbour times</title>
  <link rel="stylesheet" href="/style.css">
</head>
<body>
  <h1>Harbour times</h1>
  <p>High water today, in local time.</p>
  <table>
    <tr><th>Port</th><th>Morning</th><th>Evening</th></tr>
    <tr><td>Brest</td><td>05:12</td><td>17:38</td></tr>
    <tr><td>Lisbon</td><td>03:47</td><td>16:09</td></tr>
  </table>
</body>
</html>
"""


def _half_json() -> bytes:
    lines = [{"sku": f"A-{i:03d}", "quantity": i % 4 + 1, "price": 9.5 + i} for i in range(12)]
    order = {"id": 4711, "customer": {"name": "Ada", "city": "London"}, "lines": lines}
    text = json.dumps(order).encode()
    return text[: len(text) // 2]


def _png(side: int = 64) -> bytes:
    """A grey gradient (PNG specification, sections 5 and 11: IHDR, IDAT, IEND)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    rows = b"".join(b"\0" + bytes((x + y) * 2 for x in range(side)) for y in range(side))
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def _fits(side: int = 32) -> bytes:
    """A star on a dark sky (FITS 4.0: cards of 80 bytes, big-endian data, blocks of 2,880)."""
    cards = [
        f"{'SIMPLE':8}= {'T':>20}",
        f"{'BITPIX':8}= {16:>20}",
        f"{'NAXIS':8}= {2:>20}",
        f"{'NAXIS1':8}= {side:>20}",
        f"{'NAXIS2':8}= {side:>20}",
        "OBJECT  = 'VEGA    '",
        "END",
    ]
    y, x = np.mgrid[:side, :side] - side / 2
    star: bytes = (1000 * np.exp(-(x**2 + y**2) / 8)).astype(">i2").tobytes()
    head = "".join(card.ljust(80) for card in cards).encode()
    return head.ljust(2880) + star.ljust(2880, b"\0")
