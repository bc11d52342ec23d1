"""Check a rolling upgrade and its way back: `python -m benchmarks.serving.upgrade --rev REVISION`.

Two API processes and two workers with the miniature begin as the older revision, on one Valkey.
Jobs in every state, API keys, a comparison and webhooks are written. Then each process is replaced
in turn by this code, and later by the older one again. In between: what both revisions answer about
the same things is compared; each runs jobs that the other has queued; and jobs whose worker is
killed go on with a worker of the other revision. There is no baseline: every bound is absolute.

`--dump FILE` also writes what the older revision has left in Valkey, for
`tests/jobs/upgrade/test_older_records.py`, and ends there.

It prints a table, then the result as one line of JSON, and saves it in benchmarks/results/.
"""

import json
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

import httpx
import typer

from benchmarks import report
from benchmarks.report import ROOT, Row
from benchmarks.serving.redis_dump import as_text, dump
from deploy.local.cluster import Cluster
from deploy.local.ports import find_free_port
from deploy.local.waiting import wait_until
from jobs import redis_keys
from jobs.telemetry.settings import TracingSettings

SHORT = {"prompt": "a small red circle", "num_frames": 5, "num_inference_steps": 2, "seed": 5}
LONG = {**SHORT, "num_frames": 17, "num_inference_steps": 14}
SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"

_CHANGING = frozenset(
    {"url", "thumbnail_url", "preview_url", "starts_in_s", "last_used_at", "webhook", "queue"}
)
"""Parts of answers that differ from one request to the next: signatures, estimates and tries."""


def main(
    rev: Annotated[str, typer.Option(help="The older revision, such as a tag.")] = "HEAD~1",
    dump_to: Annotated[
        Path | None, typer.Option("--dump", help="Where to write what it leaves in Valkey.")
    ] = None,
) -> None:
    """Upgrade, go back, and write the result."""
    commit = _git("rev-parse", "--short", rev).decode().strip()
    with tempfile.TemporaryDirectory(prefix="wan-upgrade-") as folder:
        older = Path(folder) / "older"
        with tarfile.open(fileobj=BytesIO(_git("archive", commit))) as archive:
            archive.extractall(older, filter="data")
        with Upgrade(Path(folder) / "run", older) as upgrade:
            upgrade.write()
            if dump_to is not None:
                dump_to.write_text(as_text(commit, dump(upgrade.cluster.redis)), encoding="utf-8")
                return
            rows = list(report.log_rows(upgrade.rows()))
    document = report.result("upgrade", "cpu", {"from": commit}, rows)
    report.print_table(rows)
    report.save(document)
    print(json.dumps(document))


class Upgrade:
    """A cluster that begins as the older revision."""

    def __init__(self, folder: Path, older: Path) -> None:
        self._older = older
        self._hook_port = find_free_port()
        environment = {
            "PYTHONPATH": "",
            "SERVICE_MAX_WAITING": "100",
            "SERVICE_QUOTA": "100",
            "SERVICE_PUBLIC_URL": "https://video.example.com",
            "SERVICE_WEBHOOK_HOSTS": f"127.0.0.1:{self._hook_port}",
            "SERVICE_WEBHOOK_SECRET": SECRET,
            "SERVICE_WEBHOOK_HTTP": "1",
            "SERVICE_WEBHOOK_PRIVATE": "1",
        }
        # With traces, so that records hold what only this revision writes. Nobody receives them.
        tracing = {"OTEL_TRACES_EXPORTER": "otlp"}
        TracingSettings.model_validate(tracing)
        self.cluster = Cluster(folder, environment=environment | tracing)
        for name in ("api-0", "api-1", "worker-0", "worker-1"):
            self.cluster.set_tree(name, older)
        self._key = ""
        self._jobs: list[str] = []
        self._comparison = ""

    def __enter__(self) -> "Upgrade":
        self.cluster.__enter__()
        for name in ("api-0", "worker-0"):
            self._check_tree(name, self._older)
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.stop()

    def write(self) -> None:
        """Have the older revision write something of everything."""
        added = subprocess.run(
            [sys.executable, "-m", "service", "keys", "add", "ops", "--role", "ops"],
            cwd=self._older,
            env=self.cluster.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        self._key = next(word for word in added.stdout.split() if word.startswith("wan_"))
        for name, role in (("alice", "user"), ("rachel", "rater")):
            self._call("POST", "/keys", json={"name": name, "role": role})
        self._call("POST", "/keys/alice/revoke")
        hook = {"webhook_url": f"http://127.0.0.1:{self._hook_port}/hook"}
        succeeded = self._submit(SHORT | hook | {"metadata": {"shot": "7"}})
        self._finish(succeeded)
        self._finish(self._submit(SHORT | {"mode": "w8a8"}))
        cancelled = self._submit(LONG | hook)
        self._call("DELETE", f"/jobs/{cancelled}")
        self._finish(cancelled, "cancelled")
        for body in (LONG, SHORT | {"count": 2}):
            self._submit(body)
        for each in self._jobs[-3:]:
            self._finish(each)
        prompts = {"prompts": [SHORT["prompt"]], "seeds": 1, "title": "upgrade"}
        shared = {"settings": {"num_frames": 5, "num_inference_steps": 2}}
        modes = {"reference": {"mode": "bf16"}, "candidate": {"mode": "w8a8"}}
        made = self._call("POST", "/comparisons", json=prompts | modes | shared)
        self._comparison = str(made.json()["id"])
        wait_until(self._comparison_is_ready, 120, "the comparison is ready", self.cluster.logs)
        # They wait: their worker is to be of the other revision.
        self._stop_workers()
        self._submit(SHORT)
        self._submit(LONG | hook)

    def rows(self) -> Iterator[Row]:
        """Replace one process after another; yield what was found."""
        waiting = [job_id for job_id in self._jobs if self._state(job_id) == "queued"]
        self._replace("api-1", ROOT)
        yield self._differences("answers of the new service that differ")
        self._start_worker("worker-1", ROOT)
        yield self._succeeded("jobs queued by the old service, run by a new worker", waiting)
        self._start_worker("worker-0", self._older)
        self._stop_worker("worker-1")
        yield self._succeeded(
            "jobs queued by the new service, run by an old worker", [self._submit(SHORT, api=1)]
        )
        yield self._handed_over("worker-0", "worker-1", "an old worker", "a new one")
        yield self._handed_over("worker-1", "worker-0", "a new worker", "an old one")
        self._replace("api-0", ROOT)
        with self._receiver() as calls:
            redis: Any = self.cluster.redis
            # Those that failed wait for minutes. They are due now.
            for each in redis.zrange(redis_keys.WEBHOOKS_DUE, 0, -1):
                redis.zadd(redis_keys.WEBHOOKS_DUE, {each: 0})
            none_due = lambda: redis.zcard(redis_keys.WEBHOOKS_DUE) == 0  # noqa: E731
            wait_until(none_due, 60, "all webhooks are called", self.cluster.logs)
            yield Row("webhooks of both revisions, delivered by the new (bound 3)", len(calls), "1")
        self._replace("api-0", self._older)
        yield self._differences("answers of the old service that differ, after the way back")
        ended = sum(len(self.cluster.end_states(job_id)) == 1 for job_id in self._jobs)
        yield Row("jobs that have ended once (bound: all)", ended, "1", baseline=len(self._jobs))

    def _differences(self, what: str) -> Row:
        """Compare what the two API processes answer; fields that only one has do not count."""
        paths = [f"/jobs/{job_id}" for job_id in self._jobs]
        paths += ["/keys", "/models", f"/comparisons/{self._comparison}"]
        paths += [f"/comparisons/{self._comparison}/{part}" for part in ("pairs", "report")]
        found = [
            f"{path}{where}"
            for path in paths
            for where in differences(*(self._call("GET", path, api=api).json() for api in (0, 1)))
        ]
        if found:
            print("\n".join(found), file=sys.stderr)
        return Row(f"{what} (bound 0, of {len(paths)})", len(found), "1")

    def _succeeded(self, what: str, job_ids: list[str]) -> Row:
        for job_id in job_ids:
            self._finish(job_id)
        return Row(f"{what} (bound {len(job_ids)})", len(job_ids), "1")

    def _handed_over(self, killed: str, heir: str, was: str, now: str) -> Row:
        """Kill a worker in the middle of a job, which one of the other revision then ends."""
        job_id = self._submit(LONG)
        wait_until(lambda: self._is_denoising(job_id), 60, f"{job_id} runs", self.cluster.logs)
        assert self.cluster.name_of(self.cluster.record(job_id)["worker"]) == killed
        self.cluster.pause_restarts(killed)
        self.cluster.kill(killed)
        self._start_worker(heir, ROOT if heir == "worker-1" else self._older)
        self._finish(job_id)
        assert self._call("GET", f"/jobs/{job_id}").json()["attempts"] == 2
        return Row(f"jobs begun by {was} that was killed, ended by {now} (bound 1)", 1, "1")

    def _replace(self, name: str, tree: Path) -> None:
        """Stop a process as an upgrade does, and let it start again with other code."""
        pid = self.cluster.children[name].pid
        self.cluster.set_tree(name, tree)
        self.cluster.kill(name, signal.SIGTERM)
        wait_until(lambda: self.cluster.children[name].pid != pid, 60, f"{name} starts again")
        wait_until(lambda: self._is_up(name), 120, f"{name} answers", self.cluster.logs)
        self._check_tree(name, tree)

    def _is_up(self, name: str) -> bool:
        if not name.startswith("api"):
            return True
        try:
            url = self.cluster.urls[int(name[-1])]
            return httpx.get(f"{url}/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def _start_worker(self, name: str, tree: Path) -> None:
        self.cluster.set_tree(name, tree)
        self.cluster.resume_restarts(name)
        wait_until(lambda: self._serves(name), 120, f"{name} serves", self.cluster.logs)
        self._check_tree(name, tree)

    def _stop_worker(self, name: str) -> None:
        self.cluster.pause_restarts(name)
        self.cluster.kill(name, signal.SIGTERM)
        child = self.cluster.children[name]
        wait_until(lambda: child.exit_code is not None, 120, f"{name} ends", self.cluster.logs)

    def _stop_workers(self) -> None:
        # The offers are kept for as long as two submissions take, or the service would refuse them.
        for name in ("worker-0", "worker-1"):
            self.cluster.pause_restarts(name)
            self.cluster.kill(name)
        time.sleep(0.5)

    def _serves(self, name: str) -> bool:
        """Return whether a worker lives and has published its offer."""
        if self.cluster.children[name].exit_code is not None:
            return False
        ids: Any = self.cluster.redis.zrange(redis_keys.WORKERS, 0, -1)
        return name in {self.cluster.name_of(each.decode()) for each in ids}

    def _check_tree(self, name: str, tree: Path) -> None:
        """Make sure that a process runs the code in a folder, as it was meant to."""
        cwd = Path(f"/proc/{self.cluster.children[name].pid}/cwd").resolve()
        assert cwd == tree.resolve(), f"{name} runs in {cwd}"

    def _comparison_is_ready(self) -> bool:
        found = self._call("GET", f"/comparisons/{self._comparison}/pairs").json()
        pairs = found["pairs"]
        return bool(pairs) and all(pair["state"] == "ready" for pair in pairs)

    def _is_denoising(self, job_id: str) -> bool:
        progress = self._call("GET", f"/jobs/{job_id}").json()["progress"] or {}
        return progress.get("stage") == "denoise" and progress["step"] >= 2

    def _state(self, job_id: str) -> str:
        return str(self._call("GET", f"/jobs/{job_id}").json()["state"])

    def _finish(self, job_id: str, state: str = "succeeded") -> None:
        ended = ("succeeded", "failed", "cancelled")
        wait_until(lambda: self._state(job_id) in ended, 120, f"{job_id} ends", self.cluster.logs)
        assert self._state(job_id) == state, self._call("GET", f"/jobs/{job_id}").text

    def _submit(self, body: dict[str, Any], api: int = 0) -> str:
        answer = self._call("POST", "/generate", api=api, json=body)
        made = answer.json().get("jobs") or [answer.json()]
        self._jobs += [str(job["id"]) for job in made]
        return self._jobs[-1]

    def _call(self, method: str, path: str, *, api: int = 0, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        url = self.cluster.urls[api] + path
        answer = httpx.request(method, url, headers=headers, timeout=30, **options)
        assert answer.status_code < 300, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer

    @contextmanager
    def _receiver(self) -> Iterator[list[bytes]]:
        """Receive webhooks."""
        calls: list[bytes] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                calls.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", self._hook_port), Handler)
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield calls
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Yield where two answers differ; fields that only one of them has are no difference."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one.keys() & other.keys() - _CHANGING:
            yield from differences(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{where}[{number}]")
    elif one != other:
        yield f"{where}: {one!r} and {other!r}"


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout


if __name__ == "__main__":
    typer.run(main)
