"""Files of prompts: what is read, and what is refused with its line and the reason."""

import codecs

import pytest

from jobs.errors import InvalidSpec
from service.comparisons.prompt_files import PromptLine, read_prompts


def refusal(name: str, content: bytes | str) -> list[str]:
    with pytest.raises(InvalidSpec) as caught:
        read_prompts(name, content)
    assert all(each.field.startswith("prompts_file") for each in caught.value.violations)
    return [each.detail for each in caught.value.violations]


def test_a_text_has_a_prompt_on_each_line() -> None:
    assert read_prompts("a.TXT", 'a red circle \r\n=1+1, "quoted"\rthird\n\n  \n') == (
        PromptLine(1, "a red circle"),
        PromptLine(2, '=1+1, "quoted"'),
        PromptLine(3, "third"),
    )


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_has_columns_in_any_order(delimiter: str) -> None:
    rows = [
        ["Seeds", " prompt ", "negative_prompt"],
        ["7 8", f'"a ""red"" circle{delimiter} moving"', "blurry"],
        ["", "a square", ""],
    ]
    text = "\n".join(delimiter.join(row) for row in rows)
    assert read_prompts("a.csv", text) == (
        PromptLine(2, f'a "red" circle{delimiter} moving', "blurry", (7, 8)),
        PromptLine(3, "a square"),
    )


@pytest.mark.parametrize(
    "content",
    [
        "prompt,seed\né ü,3\n".encode(),
        codecs.BOM_UTF8 + "prompt,seed\né ü,3\n".encode(),
        codecs.BOM_UTF16_LE + "prompt,seed\né ü,3\n".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "prompt,seed\né ü,3\n".encode("utf-16-be"),
        "prompt,seed\né ü,3\n".encode("latin-1"),
        "\ufeffprompt,seed\né ü,3\n",
    ],
)
def test_every_encoding_gives_the_same_prompts(content: bytes | str) -> None:
    assert read_prompts("a.csv", content) == (PromptLine(2, "é ü", None, (3,)),)


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ("a\nb\n“c”".encode("cp1252"), 3, "0x93"),
        ("a\né".encode() + b"\nb\xff", 3, "0xFF"),
        (codecs.BOM_UTF16_LE + "a\nb".encode("utf-16-le") + b"x", 2, "UTF-16"),
        ("a\nb".encode("utf-16-le"), 1, "U+0000"),
        (codecs.BOM_UTF32_LE + "a\nb".encode("utf-32-le"), 1, "U+0000"),
        ("a\n\nb", 2, "has no prompt"),
        ("a\nb\n \na \n", 3, "has no prompt"),
        ("a\nb\n" + "c" * 10_001, 3, "has 10001 characters"),
        ("a\nb\na ", 3, "repeats the prompt of line 1"),
        ("", 1, "there are no prompts"),
    ],
)
def test_a_text_is_refused_with_its_line(content: bytes | str, line: int, reason: str) -> None:
    first = refusal("a.txt", content)[0]
    assert first.startswith(f"Line {line} ")
    assert reason in first


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("text,seed\na,1", 1, "no column prompt"),
        ("prompt,category\na,b", 1, "names the column category"),
        ("prompt,prompt\na,b", 1, "twice"),
        ("prompt,seed,seeds\na,1,1", 1, "twice"),
        ("prompt,seed\na,1\nb", 3, "has 1 columns, and the header has 2"),
        ("prompt,seed\na,1\nb, c,2", 3, "has 3 columns, and the header has 2"),
        ("prompt,seed\na,1\n\nb,2", 3, "has no prompt"),
        ('prompt\na\n"b\nc\nd', 3, "check its quotes"),
        ('prompt\na\n"b" c', 3, "check its quotes"),
        ("prompt,seed\na,-1", 2, "has -1"),
        ("prompt,seed\na,9223372036854775808", 2, "no whole number from 0 to 9223372036854775807"),
        ("prompt,seed\na,1 2", 2, "call the column seeds"),
        ("prompt,seeds\na,1 2 1", 2, "seed 1 twice"),
        ("prompt,seeds\na," + " ".join(map(str, range(101))), 2, "101 seeds"),
    ],
)
def test_a_csv_is_refused_with_its_line(text: str, line: int, reason: str) -> None:
    first = refusal("a.csv", text)[0]
    assert first.startswith(f"Line {line} ")
    assert reason in first


def test_ten_thousand_rows_are_refused_at_the_first_that_is_too_many() -> None:
    rows = "prompt\n" + "\n".join(f"a circle {number}" for number in range(10_000))
    (detail,) = refusal("a.csv", rows)
    assert detail == ("Line 502 is one too many: there are 10000 prompts, and 500 are the most.")


def test_all_faulty_lines_are_named_up_to_a_number() -> None:
    details = refusal("a.csv", "prompt,seed\n" + "\n".join(f"p{n},x" for n in range(50)))
    assert [detail.split()[1] for detail in details[:20]] == [str(n) for n in range(2, 22)]
    assert details[20] == "30 more lines of the file are refused."


def test_other_kinds_of_files_are_refused_by_their_name() -> None:
    assert "prompts.xlsx is neither CSV nor TXT" in refusal("prompts.xlsx", b"PK\x03\x04")[0]
