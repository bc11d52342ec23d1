"""Define a table of results, which is written as CSV and shown on a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its heading, with the unit, and how its numbers are shown on a page.

    Attributes:
        digits: after the point; None shows a number as it is.
        significant: digits in all, for numbers of different sizes in one column.
        whole: whether words stay on one line, however long they are.
    """

    heading: str
    digits: int | None = None
    significant: int | None = None
    whole: bool = False

    def shown(self, cell: Cell) -> str:
        """Return a cell as a page shows it; a cell without a value is a dash."""
        if cell is None:
            return "–"
        if isinstance(cell, float) and self.digits is not None:
            return f"{cell:.{self.digits}f}".replace("-", "−")
        if isinstance(cell, float) and self.significant is not None:
            return f"{cell:.{self.significant}g}".replace("-", "−")
        return str(cell)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under headings.

    Attributes:
        marked: numbers of the rows that a page emphasizes.
    """

    columns: tuple[Column, ...]
    rows: Sequence[Sequence[Cell]]
    marked: frozenset[int] = frozenset()

    def csv(self) -> str:
        """Return the table with all digits, as RFC 4180 has it but with line feeds."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([column.heading for column in self.columns])
        writer.writerows([["" if cell is None else cell for cell in row] for row in self.rows])
        return text.getvalue()
