"""Drawings as text, inside an HTML page or a file of their own: logarithmic axes, points, lines and grids of cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B4C9A", "#8C6D31")
"""Okabe and Ito 2008, told apart by colour-blind readers, without the yellow, and two more."""


def tag(name: str, text: str = "", /, **attributes: object) -> str:
    """An element; `_` in a name stands for `-`, and `class_` for `class`."""
    names = {key: key.rstrip("_").replace("_", "-") for key in attributes}
    written = "".join(f' {names[key]}="{escape(str(value))}"' for key, value in attributes.items())
    return f"<{name}{written}>{text}</{name}>"


@dataclass(kw_only=True)
class LogPlot:
    """A plot on two logarithmic axes, or with `linear_x`, `linear_y`; what is added is in the units of the axes.

    Ticks stand at powers of ten, or at round numbers of a linear axis; those of x also at `x_ticks`.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str
    y_label: str
    size: tuple[int, int] = (720, 420)
    linear_x: bool = False
    linear_y: bool = False
    x_ticks: Sequence[float] = ()
    parts: list[str] = field(default_factory=list)

    LEFT, BOTTOM, EDGE = 70, 46, 14

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies in pixels."""
        width, height = self.size[0] - self.LEFT - self.EDGE, self.size[1] - self.BOTTOM - self.EDGE
        return (
            round(self.LEFT + width * (_linear_share if self.linear_x else _share)(x, self.x), 2),
            round(self.EDGE + height * (1 - (_linear_share if self.linear_y else _share)(y, self.y)), 2),
        )

    def line(self, points: Sequence[tuple[float, float]], **attributes: object) -> None:
        """A line through points."""
        path = " ".join(f"{px},{py}" for px, py in (self.at(*point) for point in points))
        self.parts.append(tag("polyline", points=path, fill="none", **attributes))

    def point(self, x: float, y: float, title: str, colour: str, *, filled: bool, **data: object) -> None:
        """A dot with a title that shows under the mouse; `data` are kept as data-* attributes."""
        px, py = self.at(x, y)
        kept = {f"data_{name}": value for name, value in data.items()}
        self.parts.append(
            tag("circle", tag("title", escape(title)), cx=px, cy=py, r=6 if filled else 4,
                fill=colour if filled else "white", stroke=colour, stroke_width=2, **kept)
        )  # fmt: skip

    def text(self, x: float, y: float, text: str, **attributes: object) -> None:
        """A word at a point."""
        px, py = self.at(x, y)
        self.parts.append(tag("text", escape(text), x=px, y=py, **attributes))

    def drawn(self) -> str:
        """The plot with its frame and ticks."""
        left, bottom = self.at(self.x[0], self.y[0])
        right, top = self.at(self.x[1], self.y[1])
        frame = [tag("rect", x=left, y=top, width=right - left, height=bottom - top, fill="none", stroke="#888")]
        own_ticks = _linear_ticks(self.x) if self.linear_x else _power_ticks(self.x)
        x_ticks = [(x, f"{x:g}") for x in self.x_ticks] or own_ticks
        for x, label in x_ticks:
            px, _ = self.at(x, self.y[0])
            frame.append(tag("line", x1=px, x2=px, y1=top, y2=bottom, stroke="#ddd"))
            frame.append(tag("text", label, x=px, y=bottom + 16, text_anchor="middle"))
        for y, label in _linear_ticks(self.y) if self.linear_y else _power_ticks(self.y):
            _, py = self.at(self.x[0], y)
            frame.append(tag("line", x1=left, x2=right, y1=py, y2=py, stroke="#ddd"))
            frame.append(tag("text", label, x=left - 6, y=py + 4, text_anchor="end"))
        frame.append(tag("text", escape(self.x_label), x=(left + right) / 2, y=bottom + 36, text_anchor="middle"))
        turn = f"translate(16 {(top + bottom) / 2}) rotate(-90)"
        frame.append(tag("text", escape(self.y_label), transform=turn, text_anchor="middle"))
        return _svg(self.size, [*frame, *self.parts])


def grid(
    columns: Sequence[object],
    rows: Sequence[object],
    cells: Mapping[tuple[int, int], tuple[str, str, Mapping[str, object]]],
    *,
    x_label: str,
    y_label: str,
    opacity: Mapping[tuple[int, int], float],
    marked: tuple[int, int],
) -> str:
    """Coloured cells by (column, row), the first row at the bottom.

    A cell is colour, title and data-* attributes; `marked` has a frame.
    """
    side, height, left, edge = 52, 26, 70, 8
    size = (left + side * len(columns) + edge, height * len(rows) + 50)
    parts = []
    for (column, row), (colour, title, data) in cells.items():
        x, y = left + side * column, edge + height * (len(rows) - 1 - row)
        kept = {f"data_{name}": value for name, value in data.items()}
        parts.append(
            tag("rect", tag("title", escape(title)), x=x, y=y, width=side - 2, height=height - 2, fill=colour,
                fill_opacity=opacity[column, row], **kept)
        )  # fmt: skip
    x, y = left + side * marked[0], edge + height * (len(rows) - 1 - marked[1])
    parts.append(tag("rect", x=x, y=y, width=side - 2, height=height - 2, fill="none", stroke="black", stroke_width=2))
    bottom = edge + height * len(rows)
    parts += [
        tag("text", escape(str(name)), x=left + side * (index + 0.5), y=bottom + 14, text_anchor="middle")
        for index, name in enumerate(columns)
    ]
    parts += [
        tag("text", escape(str(name)), x=left - 6, y=edge + height * (len(rows) - 0.4 - index), text_anchor="end")
        for index, name in enumerate(rows)
    ]
    parts.append(tag("text", escape(x_label), x=left + side * len(columns) / 2, y=bottom + 34, text_anchor="middle"))
    turn = f"translate(16 {edge + height * len(rows) / 2}) rotate(-90)"
    parts.append(tag("text", escape(y_label), transform=turn, text_anchor="middle"))
    return _svg(size, parts)


def _svg(size: tuple[int, int], parts: Sequence[str]) -> str:
    return tag("svg", "\n".join(parts), viewBox=f"0 0 {size[0]} {size[1]}", width=size[0], height=size[1], role="img")


def _share(value: float, limits: tuple[float, float]) -> float:
    return math.log(value / limits[0]) / math.log(limits[1] / limits[0])


def _linear_share(value: float, limits: tuple[float, float]) -> float:
    return (value - limits[0]) / (limits[1] - limits[0])


def _power_ticks(limits: tuple[float, float]) -> list[tuple[float, str]]:
    powers = range(math.ceil(math.log10(limits[0]) - 1e-9), math.floor(math.log10(limits[1]) + 1e-9) + 1)
    return [(10.0**power, f"10{tag('tspan', str(power), dy=-5, font_size='8')}") for power in powers]


def _linear_ticks(limits: tuple[float, float]) -> list[tuple[float, str]]:
    """Multiples of 1, 2 or 5 times a power of ten, five to ten of them."""
    rough = (limits[1] - limits[0]) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = max(factor * unit for factor in (1, 2, 5) if factor * unit <= rough)
    first, last = math.ceil(limits[0] / step - 1e-9), math.floor(limits[1] / step + 1e-9)
    return [(number * step, f"{number * step:.6g}") for number in range(first, last + 1)]


def standalone(drawing: str) -> str:
    """A drawing as the text of an .svg file: with its namespace, a white ground and a font."""
    opening, rest = drawing.split(">", 1)
    style = "text { font: 11px system-ui, sans-serif; fill: #333 }"
    ground = tag("rect", width="100%", height="100%", fill="white")
    return f'{opening} xmlns="http://www.w3.org/2000/svg">{tag("style", style)}{ground}{rest}\n'
