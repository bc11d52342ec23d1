"""Files of prompts as editors on all systems write them, and what the service would refuse."""

import sys
import unicodedata

import pytest

from jobs import text_rules
from quant.calibration import prompts
from quant.calibration.prompts import PromptSet
from quant.errors import CalibrationError

LINES = tuple(f"prompt {number}" for number in range(8))


@pytest.fixture
def read(tmp_path):
    def read(data: bytes) -> tuple[str, ...]:
        path = tmp_path / "prompts.txt"
        path.write_bytes(data)
        return PromptSet.read(path).prompts

    return read


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_of_all_systems_and_a_byte_order_mark_are_read(read, end, mark):
    assert read(mark + end.join(LINES).encode()) == LINES
    assert read(mark + (end.join(LINES) + end * 3).encode()) == LINES


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u00a0", "\u3000", "\t"])
def test_other_blanks_do_not_split_a_prompt(read, separator):
    long = f"a red ball{separator}that rolls"
    assert read("\n".join([*LINES, long]).encode()) == (*LINES, long)


@pytest.mark.parametrize("control", ["\x85", "\v", "\f", "\x1c", "\x1d", "\x1e", "\0", "\x1b"])
@pytest.mark.parametrize("text", ["a{}b", "{}", "end{}"])
def test_control_characters_are_refused_with_their_line(read, control, text):
    data = "\r\n".join([*LINES, text.format(control)]).encode()
    with pytest.raises(CalibrationError, match=rf"line 9 holds .* U\+{ord(control):04X}, which"):
        read(data)


@pytest.mark.parametrize(
    "blank", ["&nbsp;", "&#8203;", "\u200b", "\ufeff", "&amp;nbsp;", "&shy;", "&#x2800;", "\u3164"]
)
def test_a_prompt_that_is_blank_once_cleaned_is_refused_with_its_line(read, blank):
    with pytest.raises(CalibrationError, match=r"line 3, .*, is blank once the pipeline has read"):
        read("\r".join([*LINES[:2], blank, *LINES[2:]]).encode())


def test_entities_within_a_prompt_stay(read):
    assert read("\n".join([*LINES, "salt &amp; pepper"]).encode())[-1] == "salt &amp; pepper"


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_latin1_is_refused_with_its_line(read, end):
    with pytest.raises(CalibrationError, match=r"not UTF-8 text, as byte 0xFC in line 5 shows"):
        read(end.join([b"a", b"b", b"", b"d", "gr\u00fcn".encode("latin-1")]))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_encodings_are_refused_with_their_line(read, encoding):
    with pytest.raises(CalibrationError, match="line 1"):
        read("\n".join(LINES).encode(encoding))


def test_the_service_sees_the_same_characters():
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        if unicodedata.category(character) != "Cs":
            assert prompts.is_visible(character) == text_rules.is_visible(character), hex(number)
