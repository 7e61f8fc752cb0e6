"""Self-contained HTML pages, with their figures and tables as files beside them."""

from __future__ import annotations

import base64
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import pandas as pd

from gradflow.errors import GradflowError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INDEX = "index.html"

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="gradflow">
<title>gradflow report: $title</title>
<style>
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .5rem; border-top: 1px solid #ddd; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
p, li { max-width: 50rem; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
a { color: #00517f; }
figure { margin: 1rem 0 1.5rem; }
figcaption { max-width: 50rem; font-size: .9rem; color: #444; }
.wide { overflow-x: auto; }
.wide img { display: block; width: 100%; min-width: 34rem; max-width: 52rem; height: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; }
thead th { border-bottom: 1px solid #888; white-space: nowrap; }
tbody tr { border-bottom: 1px solid #eee; }
td.number, th.number { text-align: right; white-space: nowrap; }
td:first-child { white-space: nowrap; }
code, pre { font: .85rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
pre { background: #f5f5f5; padding: .6rem; overflow-x: auto; }
.note { color: #555; font-size: .9rem; }
.verdict { border-left: .3rem solid; padding-left: .4rem; font-weight: 600; white-space: nowrap; }
.reproduced { color: #00517f; }
.contradicted { color: #b3400a; }
.inconclusive { color: #8a1f6a; }
.not-run { color: #555; }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="note">$subtitle</p>
<nav aria-label="Sections"><ul>$links</ul></nav>
</header>
<main>
$body
</main>
</body>
</html>
""")


class Html(str):
    """Text that is HTML already: pages do not escape it."""


def html(value: object) -> str:
    """Any value as HTML."""
    return value if isinstance(value, Html) else escape(str(value))


def link(target: str, words: str) -> Html:
    return Html(f'<a href="{escape(target)}">{escape(words)}</a>')


class Page:
    """Collects a page's sections, and writes its figures and tables beside it.

    Args:
        directory: where the page will lie.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.links: list[str] = []
        self.parts: list[str] = []
        for name in ("figures", "tables"):
            (directory / name).mkdir(exist_ok=True)

    def section(self, anchor: str, heading: str) -> None:
        self.links.append(f"<li>{link(f'#{anchor}', heading)}</li>")
        self.parts.append(f'<h2 id="{anchor}">{escape(heading)}</h2>')

    def heading(self, text: object, anchor: str = "") -> None:
        if text:
            mark = f' id="{anchor}"' if anchor else ""
            self.parts.append(f"<h3{mark}>{html(text)}</h3>")

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
            side = ' class="number"' if name in numbers else ""
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

    def csv(self, name: str, frame: pd.DataFrame, missing: str = "") -> None:
        """Write a table's file; `missing` stands for a NaN in columns that are not Arrow-backed."""
        frame.to_csv(self.directory / "tables" / f"{name}.csv", index=False, na_rep=missing)

    def figure(self, name: str, figure: Figure, alt: str, caption: str) -> None:
        stem = self.directory / "figures" / name
        from gradflow import plots

        files = plots.save(figure, stem)
        image = base64.b64encode(files[0].read_bytes()).decode()
        links = ", ".join(link(f"figures/{f.name}", f.suffix[1:].upper()) for f in files)
        self.parts.append(
            f'<figure id="figure-{name}"><div class="wide">'
            f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{image}"></div>'
            f"<figcaption>{escape(caption)} ({links})</figcaption></figure>"
        )

    def write(self, title: str, subtitle: object, name: str = INDEX) -> None:
        page = _PAGE.substitute(
            title=escape(title), subtitle=html(subtitle), links="".join(self.links),
            body="\n".join(self.parts),
        )  # fmt: skip
        (self.directory / name).write_text(page, encoding="utf-8")


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
