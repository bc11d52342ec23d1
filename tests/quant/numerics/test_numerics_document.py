"""docs/numerics.md lists the codes and recipes that the toolkit has."""

import re
from pathlib import Path

import pytest

from quant.numerics import hif8
from quant.numerics.code_table import codes_markdown
from quant.numerics.scaling import POLICIES

DOCUMENT = Path(__file__).parents[3] / "docs" / "numerics.md"
CELL = re.compile(r"`([0-9A-F]{2})` \| `([01 ]+)` \| ([^ |]+)")


@pytest.fixture(scope="module")
def text() -> str:
    return DOCUMENT.read_text(encoding="utf-8")


def test_the_table_in_the_document_is_the_codes_command(text):
    begin, end = "<!-- codes: python -m quant codes -->\n", "\n<!-- codes end -->"
    table = text.split(begin)[1].split(end)[0]
    assert table == codes_markdown(), (
        "paste the output of `python -m quant codes` between the marks"
    )


def test_the_table_reads_back_as_the_values_of_all_codes():
    cells = CELL.findall(codes_markdown())
    assert [int(code, 16) for code, _, _ in sorted(cells)] == list(range(128))
    for code, bits, value in cells:
        assert int(bits.replace(" ", ""), 2) == int(code, 16)
        mantissa, _, power = value.replace("+∞", "inf").rpartition("·")
        text = power if not power.startswith("2^") else repr(2.0 ** int(power[2:]))
        number = float(mantissa or 1) * float(text)
        assert number == hif8.decode_code(int(code, 16)).value


def test_every_policy_is_explained(text):
    assert all(f"`{name}`" in text for name in POLICIES)
