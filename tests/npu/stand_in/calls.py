"""Collect every use of torch_npu in source code, and hold calls to the schemas of its operators."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("quant", "worker", "benchmarks", "deploy")

Schemas = dict[str, list[Any]]
"""The `torch.FunctionSchema`s of each operator, one for each overload."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an operator in source code.

    Attributes:
        where: file and line.
        positional: the number of arguments without a name; None if one is unpacked from a sequence.
        keywords: the names of the others; None stands for a mapping that is unpacked.
    """

    where: str
    operator: str
    positional: int | None
    keywords: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Attribute:
    """One use of `torch.npu` or of what is in torch_npu besides operators, as "conv.allow_hf32"."""

    where: str
    module: str
    path: str


@dataclass(frozen=True, slots=True)
class Uses:
    """All uses in some source code."""

    calls: tuple[Call, ...]
    attributes: tuple[Attribute, ...]


@cache
def uses_in(root: Path) -> Uses:
    """Collect the uses in the product's packages below a root."""
    found = [
        uses_of(file.read_text(encoding="utf-8"), str(file.relative_to(root)))
        for package in PACKAGES
        for file in sorted((root / package).rglob("*.py"))
    ]
    return Uses(
        tuple(call for each in found for call in each.calls),
        tuple(attribute for each in found for attribute in each.attributes),
    )


def uses_of(source: str, name: str) -> Uses:
    """Collect the uses in one file.

    An operator is whatever is called by a name in torch_npu or in `torch.ops.npu`, and whatever is
    called `npu_…`, so that no way of importing it hides a call.
    """
    tree = ast.parse(source)
    modules = _modules(tree)
    calls, attributes = [], []
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and (operator := _operator(node.func, modules)) is not None:
            calls.append(_call(node, operator, where))
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            module, path = _resolve(node, modules)
            if module is None or not path:
                continue
            if id(node) in called and _operator(node, modules) is not None:
                continue
            attributes.append(Attribute(where, module, path))
    return Uses(tuple(calls), tuple(attributes))


def _modules(tree: ast.AST) -> dict[str, str]:
    """Return the names that stand for torch_npu ("torch_npu") or `torch.npu` ("npu")."""
    found = {"torch_npu": "torch_npu", "torch.npu": "npu"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                if each.name == "torch_npu" and each.asname:
                    found[each.asname] = "torch_npu"
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            module = _made(node.value)
            for target in node.targets:
                if module and isinstance(target, ast.Name | ast.Attribute):
                    found[ast.unparse(target)] = module
    return found


def _made(call: ast.Call) -> str | None:
    """Return what a call that makes a module stands for."""
    text = ast.unparse(call)
    if text.endswith("import_module('torch_npu')"):
        return "torch_npu"
    return "npu" if isinstance(call.func, ast.Name) and call.func.id == "backend" else None


def _resolve(node: ast.expr, modules: dict[str, str]) -> tuple[str | None, str]:
    """Split `torch.npu.conv.allow_hf32` into its module and what is taken from it."""
    path: list[str] = []
    while isinstance(node, ast.Attribute):
        if ast.unparse(node) in modules:
            break
        path.insert(0, node.attr)
        node = node.value
    if isinstance(node, ast.Call):
        return _made(node), ".".join(path)
    return modules.get(ast.unparse(node)), ".".join(path)


def _operator(function: ast.expr, modules: dict[str, str]) -> str | None:
    if not isinstance(function, ast.Attribute):
        name = function.id if isinstance(function, ast.Name) else ""
        return name if name.startswith("npu_") else None
    text = ast.unparse(function)
    found = re.search(r"\bops\.npu\.(\w+)", text)
    if found is not None:
        return found.group(1)
    if function.attr.startswith("npu_"):
        return function.attr
    module, path = _resolve(function, modules)
    if module == "torch_npu" and "." not in path and path.islower():
        return path
    return None


def _call(node: ast.Call, operator: str, where: str) -> Call:
    starred = any(isinstance(each, ast.Starred) for each in node.args)
    positional = None if starred else len(node.args)
    return Call(where, operator, positional, tuple(each.arg for each in node.keywords))


def read_schemas(folder: Path) -> Schemas:
    """Read the operators of a wheel's `npu_native_functions*.yaml` files."""
    found: Schemas = defaultdict(list)
    for file in sorted(folder.glob("npu_native_functions*.yaml")):
        for text in _functions(file.read_text(encoding="utf-8")):
            name = text.partition("(")[0].partition(".")[0].strip()
            if name.startswith("npu_"):
                found[name].append(torch._C.parse_schema(f"npu::{text}"))
    return dict(found)


def _functions(text: str) -> Iterator[str]:
    for line in text.splitlines():
        entry = re.match(r"[\s-]*func:\s*(.*)", line)
        if entry is not None:
            text = entry.group(1).strip()
            yield text[1:-1].replace("''", "'") if text[:1] in "'\"" else text


def problems(calls: Iterable[Call], schemas: Schemas) -> list[str]:
    """Say of each call that no overload of its operator takes, why; nothing if all are right."""
    found = []
    for call in calls:
        overloads = schemas.get(call.operator)
        if overloads is None:
            found.append(f"{call.where}: there is no operator {call.operator}")
            continue
        reasons = [_problem(call, schema) for schema in overloads]
        if all(reasons):
            found.append(f"{call.where}: {call.operator} {reasons[0]}")
    return found


def _problem(call: Call, schema: Any) -> str | None:
    names = [each.name for each in schema.arguments]
    if names[:1] == ["self"]:
        names[0] = "input"  # the dispatcher's name of what the files call self
    by_position = [
        n for n, each in zip(names, schema.arguments, strict=True) if not each.kwarg_only
    ]
    if None in call.keywords:
        return "is called with keywords that are not written out, which cannot be checked"
    unknown = [each for each in call.keywords if each not in names]
    if unknown:
        return f"has no argument {unknown[0]}: {schema}"
    if call.positional is None:
        return None
    if call.positional > len(by_position):
        return f"takes {len(by_position)} arguments by position, not {call.positional}: {schema}"
    given = {*by_position[: call.positional], *call.keywords}
    if len(given) < call.positional + len(call.keywords):
        return f"gets an argument twice: {schema}"
    needed = (n for n, e in zip(names, schema.arguments, strict=True) if not e.has_default_value())
    missing = [each for each in needed if each not in given]
    return f"lacks the argument {missing[0]}: {schema}" if missing else None
