"""Self-contained HTML pages, with their figures and tables as files beside them."""

from __future__ import annotations

import base64
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import pandas as pd

from gradflow.cache import Cache
from gradflow.errors import GradflowError
from gradflow.helpers import Helpers
from gradflow.sketches import Making, Sheet, Sketch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INDEX = "index.html"

ASSETS = Path(__file__).with_name("page_assets")
"""What pages are made of, each file as it is: nothing is built, minified or fetched. uPlot
(uPlot.LICENSE) draws lines and axes: 51 kB, where ECharts and Vega take a megabyte and Plotly more
than four, and ten thousand points in a few milliseconds; it is kept up, and needs nothing else."""
_THEME = ("theme.js",)
_EXPLORER = ("uPlot.iife.min.js", "data.js", "viridis.js", "charts.js", "explore.js")
_LIVE = ("live.js",)


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


class Html(str):
    """Text that is HTML already: pages do not escape it."""


def html(value: object) -> str:
    """Any value as HTML."""
    return value if isinstance(value, Html) else escape(str(value))


def link(target: str, words: str) -> Html:
    return Html(f'<a href="{escape(target)}">{escape(words)}</a>')


@dataclass(frozen=True)
class Card:
    """A question of the overview, and its answer.

    `kind` is hurts, helps or neither; `pair` the ids of two runs to look at.
    """

    asked: str
    word: str
    because: str
    kind: str = "neither"
    pair: tuple[str, str] | None = None


def _pair_button(card: Card) -> str:
    if card.pair is None:
        return ""
    a, b = map(escape, card.pair)
    return f'<button type="button" data-show-a="{a}" data-show-b="{b}">Look at this pair</button>'


_SHORT, _LINES = 16, 6


def _look(text: object) -> str:
    """Of a table's cell: a short text is one line, a long one wide enough for a few."""
    length = len(re.sub(r"<[^>]*>", "", str(text)) if isinstance(text, Html) else str(text))
    return f' class="long" style="min-width:{length // _LINES}ch"' if length > _SHORT else ""


class Page:
    """Collects a page's sections, and writes its figures and tables beside it.

    Args:
        directory: where the page will lie.
        kept: what was made before; helpers: processes that share the work.
    """

    def __init__(self, directory: Path, kept: Cache | None = None, helpers: Helpers | None = None):
        self.directory = directory
        self._making = Making(kept or Cache(), helpers or Helpers(1))
        self._sheets: dict[str, tuple[Path, object]] = {}
        self._sketched: dict[str, tuple[str, int, str, str]] = {}
        self.links: list[str] = []
        self.parts: list[str] = []
        self._above = 0  # parts before the explorer
        self._data: list[str] = []
        for name in ("figures", "tables"):
            (directory / name).mkdir(exist_ok=True)

    def section(self, anchor: str, heading: str, short: str = "") -> None:
        """A section; `short` is what the list of sections calls it."""
        self.links.append(f"<li>{link(f'#{anchor}', short or heading)}</li>")
        self.parts.append(f'<h2 id="{anchor}">{escape(heading)}</h2>')

    def heading(self, text: object, anchor: str = "") -> None:
        if text:
            mark = f' id="{anchor}"' if anchor else ""
            self.parts.append(f"<h3{mark}>{html(text)}</h3>")

    def cards(self, cards: Sequence[Card]) -> None:
        """Questions, each with its answer in a word or two and what that rests on."""
        items = "".join(
            f'<li class="card {card.kind}"><p class="asked">{html(card.asked)}</p>'
            f'<p class="word">{html(card.word)}</p><p class="because">{html(card.because)}</p>'
            f"{_pair_button(card)}</li>"
            for card in cards
        )
        self.parts += [f'<ul class="cards">{items}</ul>'] if items else []

    def text(self, text: object, *, note: bool = False) -> None:
        mark = ' class="note"' if note else ""
        self.parts.append(f"<p{mark}>{html(text)}</p>")

    def items(self, lines: Sequence[str]) -> None:
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        self.parts += [f"<ul>{items}</ul>"] if items else []

    def code(self, lines: Sequence[str]) -> None:
        self.parts.append(f"<pre><code>{escape(chr(10).join(lines))}</code></pre>")

    def table(self, frame: pd.DataFrame, numbers: Sequence[str] = ()) -> None:
        """A table as it stands; `numbers` are columns to be right-aligned."""

        def cell(tag: str, name: str, text: object) -> str:
            side = ' class="number"' if name in numbers else "" if tag == "th" else _look(text)
            scope = ' scope="col"' if tag == "th" else ""
            return f"<{tag}{side}{scope}>{html(text)}</{tag}>"

        names = list(frame.columns)
        head = "".join(cell("th", name, name) for name in names)
        rows = (
            "<tr>" + "".join(cell("td", n, v) for n, v in zip(names, row, strict=True)) + "</tr>"
            for row in frame.to_numpy(dtype=object)
        )
        self.parts.append(
            f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )

    def csv(self, name: str, frame: pd.DataFrame) -> None:
        """Write a table's file."""
        frame.to_csv(self._table(name), index=False)

    def long_csv(
        self, name: str, parts: Sequence[pd.DataFrame], by: str, missing: str = ""
    ) -> None:
        """Write a long table's file with the page: its parts one under another.

        Args:
            by: a column of which each part has one value.
            missing: stands for a NaN in columns that are not Arrow-backed.
        """
        path = self._table(name)
        parts[0][:0].to_csv(path, index=False)
        for part in parts:
            value = part[by].iloc[0]
            entry = f"{name}-{value}.csv"
            self._sheets[entry] = path, value
            self._making.add(entry, Sheet(part, by, missing))

    def _table(self, name: str) -> Path:
        return self.directory / "tables" / f"{name}.csv"

    def figure(self, name: str, figure: Figure | Sketch, alt: str, caption: str) -> None:
        """A figure, drawn now; or, of a sketch, by the time that the page is written."""
        if isinstance(figure, Sketch):
            self._sketched[f"{name}.figure"] = (name, len(self.parts), alt, caption)
            self.parts.append("")
            self._making.add(f"{name}.figure", figure)
            return
        from gradflow import plots

        files = plots.save(figure, self.directory / "figures" / name)
        drawn = {path.suffix[1:]: path.read_bytes() for path in files}
        self.parts.append(_figure(name, drawn, alt, caption))

    def _make(self) -> None:
        """Write what was to be written with the page."""
        for entry, files in self._making.results().items():
            if entry in self._sheets:
                path, value = self._sheets[entry]
                with path.open("ab") as file:
                    file.write(Sheet.text(files, value))
                continue
            name, place, alt, caption = self._sketched[entry]
            for kind, data in files.items():
                (self.directory / "figures" / f"{name}.{kind}").write_bytes(data)
            self.parts[place] = _figure(name, files, alt, caption)

    def explorer(self, heading: str, index: Mapping[str, Any], views: Mapping[str, bytes]) -> None:
        """The interactive views, between what comes before and after.

        Args:
            index: what `page_assets/explore.js` reads of runs, groups, arms and colours.
            views: of each run, by its id, what `gradflow.views.pack` made.
        """
        self.links.append(f"<li>{link('#explore', heading)}</li>")
        self._above = len(self.parts)
        # In a script no text ends but at "</script": nothing may look like it.
        text = json.dumps(index, allow_nan=False).replace("<", "\\u003c")
        self._data = [f'<script type="application/json" id="gradflow-index">{text}</script>']
        self._data += [
            f'<script type="application/octet-stream" data-run="{escape(run_id)}">'
            f"{base64.b64encode(view).decode()}</script>"
            for run_id, view in views.items()
        ]

    def write(self, title: str, subtitle: object, name: str = INDEX) -> None:
        self._make()
        explorer = bool(self._data)
        styles = ["page.css", *["uPlot.min.css"] * explorer]
        scripts = [*_THEME, *(_EXPLORER if explorer else ()), *(_LIVE if name == INDEX else ())]
        code = [f"<script>\n{_asset(script)}</script>" for script in scripts]
        page = Template(_asset("page.html")).substitute(
            title=escape(title), subtitle=html(subtitle), links="".join(self.links),
            styles="\n".join(map(_asset, styles)), above="\n".join(self.parts[: self._above]),
            explorer=_asset("explorer.html") if explorer else "",
            below="\n".join(self.parts[self._above :]),
            data=f'<div id="data" hidden>{"".join(self._data)}</div>',
            scripts="\n".join([*code, *["<script>gradflow.start();</script>"] * explorer]),
        )  # fmt: skip
        (self.directory / name).write_text(page, encoding="utf-8")


_POINTS = 9.6
"""Of a figure's width, to a rem: its text is as large as the page's, whatever its panels."""


def _figure(name: str, files: Mapping[str, bytes], alt: str, caption: str) -> str:
    image = base64.b64encode(files["svg"]).decode()
    links = ", ".join(link(f"figures/{name}.{kind}", kind.upper()) for kind in files)
    width = re.search(rb'<svg[^>]* width="([0-9.]+)pt"', files["svg"])
    look = f' style="--own:{float(width[1]) / _POINTS:.1f}rem"' if width else ""
    return (
        f'<figure id="figure-{name}"><div class="wide">'
        f'<img alt="{escape(alt)}"{look} src="data:image/svg+xml;base64,{image}"></div>'
        f"<figcaption>{escape(caption)} ({links})</figcaption></figure>"
    )


def publish(out: str | Path, compose: Callable[[Path], None]) -> Path:
    """What `compose` writes into a directory of its own, moved to `out`; the path of its index.

    An older report in `out` is replaced file by file once the new one is whole, the index last.
    Files that the older one did not link to stay.

    Raises:
        GradflowError: `out` cannot be written.
    """
    directory = Path(out)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".new-", dir=directory))
        try:
            compose(staging)
            _replace(staging, directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        if isinstance(error, GradflowError):  # of a run that cannot be read
            raise
        raise GradflowError(f"{directory}: cannot be written ({error.strerror})") from None
    return directory / INDEX


def _replace(staging: Path, directory: Path) -> None:
    before = _linked(directory)
    new = [path for path in staging.rglob("*") if path.is_file() and path.name != INDEX]
    for path in [*new, staging / INDEX]:
        target = directory / path.relative_to(staging)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    for name in before - {str(path.relative_to(staging)) for path in new}:
        (directory / name).unlink(missing_ok=True)


_WRITTEN = re.compile(r'href="((?:figures|tables)/[^"/]+|[a-z]+\.html)["#]')


def _linked(directory: Path) -> set[str]:
    """The files of ours to which a report's index links, and those to which its pages link."""

    def links(name: str) -> set[str]:
        path = directory / name
        return set(_WRITTEN.findall(path.read_text(encoding="utf-8"))) if path.exists() else set()

    names = links(INDEX)
    return names.union(*(links(name) for name in names if name.endswith(".html"))) - {INDEX}
