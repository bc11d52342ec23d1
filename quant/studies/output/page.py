"""Build the page of a study: one HTML file without scripts that needs no other file.

It reads well on a screen and on paper, and its figures are inside. It may link to files beside it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from urllib.parse import quote

from quant.studies.output.table import Cell, Column, Table

_LONG = 32
"""Characters of a cell's words from which on they are broken into lines."""

_FOCUSABLE = 'tabindex="0" role="group"'
"""What may have to be scrolled, so that keys can."""

_STYLE = """
:root { color-scheme: light; --ink: #1c2330; --soft: #5b6472; --line: #d8dde4; }
:root { --mark: rgb(0 89 255 / 7%); } /* what is below, such as a shadow, is seen through it */
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: #fff; margin: 0; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; }
h2 { border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .5rem 0; }
.about { color: var(--soft); }
.finding { border-left: 4px solid #2f6fde; background: var(--mark); padding: .6rem .9rem; }
.scroll { overflow-x: auto; }
/* A table that goes on to the right has a shadow there, which what ends it covers. */
.table {
  background:
    linear-gradient(to left, #fff 1.5rem, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to left, rgb(0 0 0 / 30%), transparent) right / .75rem 100% no-repeat scroll;
}
table { border-collapse: collapse; margin: .75rem 0; font-size: .875rem; }
table { font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .55rem; border-bottom: 1px solid var(--line); }
th { vertical-align: bottom; font-weight: 600; }
td { white-space: nowrap; }
th.words, td.words { text-align: left; }
td.long { white-space: normal; min-width: 14rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.marked td { background: var(--mark); font-weight: 600; }
/* The first column stays in sight, unless it is long, or narrow screens had little else. */
:is(th, td):first-child:not(.long) { position: sticky; left: 0; background: #fff; }
tr.marked td:first-child:not(.long) { background: linear-gradient(var(--mark) 0 0) #fff; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; min-width: 36rem; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .9rem; max-width: 46rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media print {
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; }
  figure, tr, .finding { break-inside: avoid; } h2 { break-after: avoid; }
  .scroll { overflow: visible; background: none; } table { font-size: 6.5pt; }
  th, td { padding: .15rem .3rem; } td.long { min-width: 0; } figure img { min-width: 0; }
  :is(th, td):first-child:not(.long) { position: static; }
}
"""


@dataclass(slots=True)
class Page:
    """A page that is filled from top to bottom."""

    title: str
    about: str
    _parts: list[str] = field(default_factory=list)

    def finding(self, text: str) -> None:
        """Add a sentence that says what was found."""
        self._parts.append(f'<p class="finding">{escape(text)}</p>')

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def table(self, table: Table) -> None:
        """Add a table."""
        kinds = [
            _class_of(column, [row[place] for row in table.rows])
            for place, column in enumerate(table.columns)
        ]
        heads = zip(kinds, table.columns, strict=True)
        head = "".join(f"<th{words}>{escape(column.heading)}</th>" for words, column in heads)
        body = []
        for number, row in enumerate(table.rows):
            cells = zip(kinds, table.columns, row, strict=True)
            shown = "".join(
                f"<td{words}>{escape(column.shown(cell))}</td>" for words, column, cell in cells
            )
            kind = ' class="marked"' if number in table.marked else ""
            body.append(f"<tr{kind}>{shown}</tr>")
        self._add_table(f"<tr>{head}</tr>", body)

    def links(
        self, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Mapping[str, str]]]]
    ) -> None:
        """Add a table of links to files beside the page.

        Args:
            heads: of all columns.
            rows: what a row is of, and for each further column what it links to, by its words.
        """
        head = "".join(f'<th class="words">{escape(each)}</th>' for each in heads)
        body = []
        for name, cells in rows:
            shown = [f'<td class="words long">{escape(name)}</td>']
            for cell in cells:
                links = (
                    f'<a href="{escape(quote(target))}">{escape(words)}</a>'
                    for words, target in cell.items()
                )
                shown.append(f'<td class="words">{" ".join(links)}</td>')
            body.append(f"<tr>{''.join(shown)}</tr>")
        self._add_table(f"<tr>{head.replace('words', 'words long', 1)}</tr>", body)

    def figure(self, picture: bytes, caption: str) -> None:
        """Add a PNG, with what it shows in words."""
        data = base64.b64encode(picture).decode()
        self._parts.append(
            f'<figure><div class="scroll" {_FOCUSABLE} aria-label="Picture">'
            f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}"></div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def facts(self, facts: dict[str, str]) -> None:
        """Add names and their values, such as what the results depend on."""
        pairs = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
        self._parts.append(f"<dl>{''.join(pairs)}</dl>")

    def _add_table(self, head: str, rows: Sequence[str]) -> None:
        self._parts.append(
            f'<div class="scroll table" {_FOCUSABLE} aria-label="Table">'
            f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"
        )

    def html(self) -> str:
        """Return the whole page."""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
            f"<h1>{escape(self.title)}</h1>\n"
            f'<p class="about">{escape(self.about)}</p>\n'
            + "\n".join(self._parts)
            + "\n</main>\n</body>\n</html>\n"
        )


def _class_of(column: Column, cells: Sequence[Cell]) -> str:
    """Return the class of a column's cells: numbers to the right, words to the left."""
    words = [cell for cell in cells if isinstance(cell, str)]
    if not words:
        return ""
    is_long = max(map(len, words)) > _LONG and not column.whole
    return ' class="words long"' if is_long else ' class="words"'
