"""Format the table of all HiFloat8 codes as Markdown, for `docs/numerics.md`.

`python -m quant codes` prints it. A test compares the document with it.
"""

from __future__ import annotations

from quant.numerics.hif8 import SIGN_BIT, CodeFields, decode_code

_COLUMNS = 4


def codes_markdown() -> str:
    """Return codes 0x00..0x7F with bits and values, in four columns of 32; 0x80.. mirror them."""
    lines = ["| code | bits | value " * _COLUMNS + "|", "|---|---|--:" * _COLUMNS + "|"]
    rows = SIGN_BIT // _COLUMNS
    for row in range(rows):
        cells = [_cells(row + column * rows) for column in range(_COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(code: int) -> str:
    return f"`{code:02X}` | `{_spaced_bits(code)}` | {_value(decode_code(code))}"


def _spaced_bits(code: int) -> str:
    """Return the eight bits with spaces between sign, dot prefix, exponent and mantissa."""
    bits = f"{code:08b}"
    kind, _, mantissa_bits, _ = decode_code(code)
    dot_bits = {"D4": 2, "D3": 2, "D2": 2, "D1": 3, "D0": 4, "infinity": 2}.get(kind, 4)
    if kind == "infinity":
        mantissa_bits = 1  # it takes the code of the largest D4 value
    elif kind in ("subnormal", "zero"):
        mantissa_bits = 3
    parts = bits[0], bits[1 : 1 + dot_bits], bits[1 + dot_bits : 8 - mantissa_bits]
    return " ".join(part for part in (*parts, bits[8 - mantissa_bits :]) if part)


def _value(fields: CodeFields) -> str:
    """Format the value: below 2**-4 as a mantissa times a power of two, otherwise as a decimal."""
    if fields.kind == "infinity":
        return "+∞"
    if fields.exponent is None or fields.exponent >= -4:
        return f"{fields.value:g}"
    mantissa = fields.value / 2.0**fields.exponent
    power = f"2^{fields.exponent}"
    return power if mantissa == 1 else f"{mantissa:g}·{power}"
