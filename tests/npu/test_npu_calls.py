"""Hold every torch_npu call of the product to the op schemas of the releases that we allow."""

from pathlib import Path

import pytest

from tests.npu.stand_in.calls import Schemas, problems, read_schemas, uses_in, uses_of
from tests.npu.stand_in.environment import NEWER_SCHEMAS, ROOT, WHEEL, missing_reason

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))

FOLDERS = {"2.13": WHEEL / "torch_npu" / "csrc" / "aten", "2.14": NEWER_SCHEMAS}


@pytest.fixture(scope="module", params=FOLDERS.values(), ids=list(FOLDERS))
def schemas(request: pytest.FixtureRequest) -> Schemas:
    return read_schemas(request.param)


def test_every_call_of_the_product_is_one_that_torch_npu_takes(
    schemas: Schemas, request: pytest.FixtureRequest
) -> None:
    calls = uses_in(ROOT).calls
    operators = sorted({call.operator for call in calls})
    unpacked = sum(call.positional is None for call in calls)
    print(
        f"\n{len(calls)} calls of {len(operators)} of {len(schemas)} operators: {operators}; of "
        f"{unpacked} that unpack arguments the number is checked where they run, in card/"
    )
    assert len(operators) >= 8
    assert problems(calls, schemas) == []


def test_calls_by_any_name_are_found() -> None:
    uses = uses_of(
        "import torch_npu as t\n"
        "def f(x):\n"
        "    import torch_npu\n"
        "    other = importlib.import_module('torch_npu')\n"
        "    torch_npu.npu_rms_norm(x, g)\n"
        "    t.npu_rms_norm(x, g)\n"
        "    other.npu_rms_norm(x, g)\n"
        "    self.npu.npu_rms_norm(x, g)\n"
        "    torch.ops.npu.npu_rms_norm.default(x, g)\n"
        "    from torch_npu import npu_rms_norm\n"
        "    npu_rms_norm(x, g)\n"
        "    torch_npu.npu.config.allow = 1\n"
        "    torch.npu.synchronize()\n"
        "    backend(kind).empty_cache()\n",
        "a.py",
    )
    assert [call.operator for call in uses.calls] == ["npu_rms_norm"] * 6
    found = [(each.module, each.path) for each in uses.attributes]
    assert sorted(found) == [
        ("npu", "empty_cache"),
        ("npu", "synchronize"),
        ("torch_npu", "npu.config.allow"),
    ]


WRONG = {
    "an unknown operator": ("npu_rms_norms(x, g)", "there is no operator npu_rms_norms"),
    "an unknown keyword": ("npu_rms_norm(x, g, eps=1e-6)", "has no argument eps"),
    "too many": ("npu_rms_norm(x, g, 1e-6, 2)", "takes 3 arguments by position, not 4"),
    "too few": ("npu_rms_norm(x)", "lacks the argument gamma"),
    "one twice": ("npu_rms_norm(x, g, gamma=g)", "gets an argument twice"),
    "by position what needs a name": (
        "npu_dynamic_quant(x, s)",
        "takes 1 arguments by position, not 2",
    ),
    "hidden keywords": ("npu_rms_norm(x, **more)", "cannot be checked"),
}


@pytest.mark.parametrize(("call", "says"), WRONG.values(), ids=list(WRONG))
def test_a_wrong_call_is_found(schemas: Schemas, call: str, says: str) -> None:
    right = uses_of("torch_npu.npu_rms_norm(x, g, epsilon=1e-6)", "right.py").calls
    wrong = uses_of(f"torch_npu.{call}", "wrong.py").calls
    (found,) = problems([*right, *wrong], schemas)
    assert found.startswith("wrong.py:1: ")
    assert says in found


def test_the_schemas_are_those_of_their_releases(schemas: Schemas) -> None:
    assert len(schemas) > 300
    assert {"npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul"} <= schemas.keys()


def test_without_a_wheel_one_sentence_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tests.npu.stand_in.environment.WHEEL", tmp_path)
    assert missing_reason() == "torch_npu is not there: make test-npu"
    (tmp_path / "missing").write_text("torch_npu 2.13.0 could not be fetched: no network\n")
    assert missing_reason() == "torch_npu 2.13.0 could not be fetched: no network"
