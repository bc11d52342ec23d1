"""Test the OpenAPI document with thousands of generated requests against a real service.

Requests are valid and invalid; no answer is a server error, and every answer is in the document.

`make fuzz` runs the same for longer. What counts as accepted is in schemathesis.toml.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.cluster import Cluster
from deploy.local.stack import ROOT
from tests.e2e import fuzz_hooks

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
"""Generated requests per operation and phase; in a run of fixed length, per round of the phases."""

SECONDS = int(os.environ.get("FUZZ_SECONDS", "0"))
"""How long to send requests: round after round until then. 0: one round, however long it takes."""

LEAST_CASES = 0 if SECONDS else 1000
"""What one round has to generate; what fits into a fixed time is the machine's business."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_answer_is_in_the_document(tmp_path: Path) -> None:
    engine = (sys.executable, "-m", "benchmarks.serving.fake_worker", "0")
    environment = {"SERVICE_MAX_WAITING": "100000", "SERVICE_RATE": "10000000/minute"}
    site = Cluster(tmp_path / "site", apis=1, workers=2, worker=engine, environment=environment)
    report = tmp_path / "report.json"
    with site:
        key = {"Authorization": f"Bearer {_ops_key(site)}"}
        kept = _workers(site, key)[0]["id"]
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{site.urls[0]}/openapi.json"),
            *("--max-examples", str(EXAMPLES), "--seed", "1", "--continue-on-failure"),
            *(("--max-time", str(SECONDS)) if SECONDS else ()),
            *("--header", f"Authorization: {key['Authorization']}"),
            *("--request-timeout", "20", "--suppress-health-check", "all", "--no-color"),
            *("--report", "json", "--report-json-path", str(report)),
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ
            | {"SCHEMATHESIS_HOOKS": fuzz_hooks.__name__, fuzz_hooks.KEPT_WORKER: kept},
            capture_output=True,
            text=True,
            check=False,
            timeout=3000,
        )
        assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:] + site.logs()
        metrics = httpx.get(f"{site.urls[0]}/metrics", headers=key)
        assert metrics.status_code == 200, "the run has lost its key, and tested nothing since"
        statuses = _statuses(metrics.text)
        states = {each["id"]: each["state"] for each in _workers(site, key)}
        assert states[kept] in ("idle", "busy"), "the run has drained all its workers"
    found = json.loads(report.read_text())
    sys.stdout.write(_figures(found, statuses))  # shown by `make fuzz`
    assert found["test_cases"]["generated"] >= LEAST_CASES, done.stdout[-3000:]
    assert found["operations"]["tested"] == found["operations"]["total"] > 0
    assert {each["status"] for each in found["phases"].values()} == {"success"}


def _workers(site: Cluster, key: dict[str, str]) -> list[dict[str, Any]]:
    answer = httpx.get(f"{site.urls[0]}/workers", headers=key)
    assert answer.status_code == 200, answer.text
    workers: list[dict[str, Any]] = answer.json()["workers"]
    return workers


def _statuses(metrics: str) -> Counter[str]:
    """Count the service's answers by status."""
    counts: Counter[str] = Counter()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == "wan_http_requests_total":
                counts[sample.labels["status"]] += int(sample.value)
    return counts


def _figures(found: dict[str, Any], statuses: Counter[str]) -> str:
    cases, operations = found["test_cases"], found["operations"]
    answers = ", ".join(f"{count:,} x {status}" for status, count in sorted(statuses.items()))
    return (
        f"\n{cases['generated']:,} cases for {operations['tested']} of {operations['total']} "
        f"operations in {found['running_time']:.0f} s; {cases['unique_failures']} failures\n"
        f"phases: {', '.join(found['phases'])}\nanswers: {answers}\n"
    )


def _ops_key(site: Cluster) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "service", "keys", "add", fuzz_hooks.KEY, "--role", "ops"],
        env=site.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return next(word for word in done.stdout.split() if word.startswith("wan_"))
