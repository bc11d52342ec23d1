"""Read what `/metrics` shows, and what expressions for Prometheus name that it does not."""

import re
from collections.abc import Mapping

from fastapi.testclient import TestClient
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families as parse_text

SHAPE = {"model": "wan-mini", "mode": "bf16", "size": "96x96", "frames": "17", "guided": "1"}


class Shown:
    """The metrics of one answer."""

    def __init__(self, client: TestClient, **headers: str) -> None:
        answer = client.get("/metrics", headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/plain; version=")
        self.text = answer.text
        self.families: dict[str, Metric] = {each.name: each for each in parse_text(answer.text)}

    def value(self, sample: str, **labels: str) -> float:
        """Return the one sample that has at least these labels."""
        found = self.find(sample, **labels)
        assert len(found) == 1, f"{len(found)} samples of {sample} with {labels}"
        return next(iter(found.values()))

    def find(self, sample: str, **labels: str) -> dict[tuple[tuple[str, str], ...], float]:
        return {
            tuple(sorted(each.labels.items())): each.value
            for family in self.families.values()
            for each in family.samples
            if each.name == sample and labels.items() <= each.labels.items()
        }

    def labels(self) -> dict[str, set[str]]:
        """Return the names of all samples, each with its labels."""
        found: dict[str, set[str]] = {}
        for family in self.families.values():
            for each in family.samples:
                found.setdefault(each.name, set()).update(each.labels)
        return found


def unknown_in(
    expression: str,
    labels: Mapping[str, set[str]],
    told: set[str] = frozenset(),  # type: ignore[assignment]
) -> set[str]:
    """Return the metrics and labels that an expression, or a text beside it, names in vain.

    Args:
        labels: what is shown, as `Shown.labels` returns it.
        told: the labels that the text beside it names.
    """
    named = set(re.findall(r"\b(?:wan|process)_\w+", expression))
    assert named, f"{expression} names no metric of ours"
    missing = named - labels.keys()
    if missing:
        return missing
    # Prometheus adds these two.
    known = set.union(*(labels[name] for name in named)) | {"instance", "job"}
    grouped = re.findall(r"by \(([^)]*)\)", expression)
    used = {label.strip() for listed in grouped for label in listed.split(",")}
    used |= set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!=|!~|=)", expression))
    return (used | told) - known
