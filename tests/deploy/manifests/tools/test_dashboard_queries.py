"""Test that a real Prometheus that scrapes the real service answers each query of the dashboard."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml

from deploy.local.cluster import Cluster
from deploy.local.ports import find_free_port
from deploy.local.waiting import wait_until
from tests.deploy.manifests.manifest_files import DEPLOY, K8S
from tests.deploy.manifests.tools.installed_tools import server

pytestmark = pytest.mark.deploy

SILENT_HERE = {
    "wan_worker_memory_",  # a CPU has no memory of its own
    "wan_worker_saturated_ratio",  # the engine has no modes that are quantized
    "wan_worker_flushed_ratio",
    "wan_attempts_",  # nothing was lost or given back
    'state="failed"',
    "wan_webhook_calls_total",
    "wan_queue_oldest_age_seconds",  # no job waits
}
"""What has no series where all is well, and no device."""


@pytest.fixture(scope="module")
def prometheus(site: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Prometheus with the project's configuration, after it has seen a job."""
    folder, port = tmp_path_factory.mktemp("prometheus"), find_free_port()
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    (scraped,) = config["scrape_configs"]
    scraped["static_configs"][0]["targets"] = [url.removeprefix("http://") for url in site.urls]
    del scraped["authorization"]  # on loopback the service is open
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    alerts = (DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8")
    (folder / "alerts.yml").write_text(alerts, encoding="utf-8")
    command = ["prometheus", f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}"]
    url = f"http://127.0.0.1:{port}/api/v1"
    with server(command, folder, port), httpx.Client(base_url=url) as client:
        job = site.submit(prompt="a", num_inference_steps=2)
        assert site.wait_for_end(job)["state"] == "succeeded"
        wait_until(lambda: len(ask(client, "rate(wan_jobs_ended_total[5m]) >= 0")) >= 2, 60)
        yield client


def ask(client: httpx.Client, query: str) -> list[dict[str, Any]]:
    answer = client.get("/query", params={"query": query})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]["result"]
    return found


def queries() -> list[str]:
    text = (DEPLOY / "grafana" / "dashboards" / "wan.json").read_text(encoding="utf-8")
    panels = json.loads(text)["panels"]
    found = [each["expr"] for panel in panels for each in panel.get("targets", ())]
    return [each.replace("$model", ".*").replace("$job", "wan") for each in found]


@pytest.mark.parametrize("query", queries())
def test_each_query_has_an_answer(query: str, prometheus: httpx.Client) -> None:
    assert "$" not in query
    answer = ask(prometheus, query)
    if not any(part in query for part in SILENT_HERE):
        assert answer, f"nothing answers {query}"


def test_a_worker_is_counted_once(prometheus: httpx.Client) -> None:
    text = (DEPLOY / "grafana" / "dashboards" / "wan.json").read_text(encoding="utf-8")
    (panel,) = (p for p in json.loads(text)["panels"] if p["title"] == "Workers that take jobs")
    (result,) = ask(prometheus, panel["targets"][0]["expr"].replace("$model", ".*"))
    assert result["value"][1] == "1"
    assert len(ask(prometheus, "count by (instance) (wan_workers)")) == 2


def test_the_autoscaler_s_query_gives_one_number(prometheus: httpx.Client) -> None:
    scaled = yaml.safe_load((K8S / "base" / "autoscaling.yaml").read_text(encoding="utf-8"))
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]
    (result,) = ask(prometheus, query)
    assert re.fullmatch(r"\d+", result["value"][1])


def test_no_alert_fires_where_all_is_well(prometheus: httpx.Client) -> None:
    answer = prometheus.get("/alerts").json()["data"]["alerts"]
    firing = {each["labels"]["alertname"] for each in answer}
    # The embedded Valkey of the tests is safe, and its worker runs as fast as it can.
    assert not firing
