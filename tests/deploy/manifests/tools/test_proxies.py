"""Test that the real nginx and Caddy pass on event streams as they come, and parts of videos.

They stand before two real processes of the service, with the project's own configuration; only
addresses, certificates and folders are others.
"""

import re
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from deploy.local.cluster import Cluster
from deploy.local.ports import find_free_port
from deploy.local.waiting import wait_until
from tests.deploy.manifests.manifest_files import DEPLOY
from tests.deploy.manifests.tools.installed_tools import FOLDER, run, server, tool

pytestmark = pytest.mark.deploy

CADDYFILE = DEPLOY / "proxy" / "Caddyfile"
STEPS = 10


def caddy_environment(site: Cluster, address: str) -> dict[str, str]:
    upstreams = " ".join(url.removeprefix("http://") for url in site.urls)
    return {"WAN_SITE": address, "UPSTREAMS": upstreams, "HOME": str(site.folder)}


def nginx_configuration(site: Cluster, folder: Path, port: int) -> Path:
    """Write the project's file with this machine's addresses, and what is around it in Debian."""
    subprocess.run(
        [
            *(tool("openssl"), "req", "-x509", "-newkey", "ec", "-nodes"),
            *("-pkeyopt", "ec_paramgen_curve:P-256", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", "privkey.pem", "-out", "fullchain.pem"),
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    text = (DEPLOY / "proxy" / "nginx.conf").read_text(encoding="utf-8")
    for number, url in enumerate(site.urls):
        text, found = re.subn(rf"127\.0\.0\.1:800{number}", url.removeprefix("http://"), text)
        assert found == 1
    text = text.replace("/etc/nginx/wan/", f"{folder}/").replace("/var/log/nginx/", f"{folder}/")
    text = text.replace("listen 443 ", f"listen 127.0.0.1:{port} ")
    text = text.replace("listen 80;", f"listen 127.0.0.1:{find_free_port()};")
    around = "\n".join(
        f"{name}_temp_path {folder}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    path = folder / "nginx.conf"
    path.write_text(
        f"pid {folder}/nginx.pid;\ndaemon off;\nuser root;\nerror_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{\n{around}\n{text}}}\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture(params=["caddy", "nginx"])
def proxy(request: pytest.FixtureRequest, site: Cluster, tmp_path: Path) -> Iterator[httpx.Client]:
    """A client of the service that goes through a proxy."""
    port = find_free_port()
    if request.param == "caddy":
        url, verify = f"http://localhost:{port}", ""
        command = ["caddy", "run", "--adapter", "caddyfile", "--config", str(CADDYFILE)]
        environment = caddy_environment(site, url)
    else:
        path = nginx_configuration(site, tmp_path, port)
        url, verify = f"https://localhost:{port}", str(tmp_path / "fullchain.pem")
        command = ["nginx", "-e", "stderr", "-p", str(tmp_path), "-c", str(path)]
        environment = {}
    context = ssl.create_default_context(cafile=verify or None)
    client = httpx.Client(base_url=url, verify=context, timeout=30)
    with server(command, tmp_path, port, environment), client:
        yield client


def test_caddy_accepts_its_file(site: Cluster) -> None:
    environment = caddy_environment(site, "https://videos.example.com")
    command = ["caddy", "validate", "--adapter", "caddyfile", "--config", str(CADDYFILE)]
    answer = run(command, environment=environment)
    assert answer.returncode == 0, answer.stderr
    assert "Valid configuration" in answer.stdout + answer.stderr


def test_caddy_s_log_of_errors_has_no_signature(site: Cluster, tmp_path: Path) -> None:
    port = find_free_port()
    url = f"http://localhost:{port}"
    environment = caddy_environment(site, url)
    environment["UPSTREAMS"] = f"127.0.0.1:{find_free_port()}"
    text = CADDYFILE.read_text(encoding="utf-8")
    assert "lb_try_duration 10s" in text
    (tmp_path / "Caddyfile").write_text(text.replace("lb_try_duration 10s", "lb_try_duration 1s"))
    command = ["caddy", "run", "--adapter", "caddyfile", "--config", str(tmp_path / "Caddyfile")]
    with server(command, tmp_path, port, environment):
        answer = httpx.get(
            f"{url}/jobs/a/video?signature=secret", headers={"Referer": f"{url}/?signature=secret"}
        )
        assert answer.status_code in (502, 503)
        log = tmp_path / "caddy.log"
        wait_until(lambda: "/jobs/a/video" in log.read_text(), 10, "the error is in the log")
        assert "secret" not in log.read_text()


def test_nginx_accepts_its_file(site: Cluster, tmp_path: Path) -> None:
    path = nginx_configuration(site, tmp_path, find_free_port())
    servers = path.read_text().split("\nserver {")[1:]
    assert len(servers) == 2
    assert all("wan.log wan;" in each for each in servers), "Debian's own log holds signatures"
    answer = run(["nginx", "-t", "-e", "stderr", "-p", tmp_path, "-c", path])
    assert answer.returncode == 0, answer.stderr
    assert "warn" not in answer.stderr
    path.write_text(path.read_text().replace("proxy_buffering", "proxy_bufering"))
    assert run(["nginx", "-t", "-e", "stderr", "-p", tmp_path, "-c", path]).returncode != 0


def ask(proxy: httpx.Client) -> str:
    body = {"prompt": "a", "num_inference_steps": STEPS}
    answer = proxy.post("/generate", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def test_events_come_as_they_happen_and_videos_in_parts(proxy: httpx.Client) -> None:
    job = ask(proxy)
    at: list[float] = []
    with proxy.stream("GET", f"/jobs/{job}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        at += [time.monotonic() for line in stream.iter_lines() if line.startswith("data:")]
    assert len(at) > STEPS, "there is an event for each step"
    # A step takes 0.3 s. A proxy that collects them sends all at once.
    assert at[-1] - at[0] > 0.2 * STEPS
    assert sum(later - earlier > 0.1 for earlier, later in pairwise(at)) > STEPS / 2

    ended = proxy.get(f"/jobs/{job}").json()
    assert ended["state"] == "succeeded", ended
    link = urlsplit(ended["video"]["url"])
    assert f"{link.scheme}://{link.netloc}" == str(proxy.base_url).rstrip("/"), "a link for callers"
    whole = proxy.get(ended["video"]["url"])
    assert whole.status_code == 200
    part = proxy.get(ended["video"]["url"], headers={"Range": "bytes=4-11"})
    assert part.status_code == 206
    assert part.headers["content-range"] == f"bytes 4-11/{len(whole.content)}"
    assert part.content == whole.content[4:12]
    assert part.headers["etag"] == whole.headers["etag"]


def test_bodies_of_comparisons_pass_and_larger_ones_do_not(proxy: httpx.Client) -> None:
    answer = proxy.post("/comparisons", content=b"x" * 2_000_000)
    assert answer.headers["content-type"] == "application/problem+json", "the service refuses it"
    assert answer.status_code in (415, 422)
    assert proxy.post("/comparisons", content=b"x" * 6_000_000).status_code == 413


def test_a_caller_cannot_say_where_it_comes_from(proxy: httpx.Client, site: Cluster) -> None:
    proxy.get("/models?from=the-test", headers={"X-Forwarded-For": "203.0.113.9"})

    def logs() -> str:
        return "".join(path.read_text() for path in (site.folder / "logs").glob("api-*.log"))

    # The line is written after the answer.
    wait_until(lambda: "GET /models" in logs(), 10, "the request is in a log", logs)
    assert "203.0.113.9" not in logs()
    assert "the-test" not in logs()


def test_a_process_that_is_replaced_costs_no_answer(proxy: httpx.Client, site: Cluster) -> None:
    statuses: list[int] = []
    for name in ("api-0", "api-1"):
        statuses += [proxy.get("/models").status_code for _ in range(20)]
        before = site.restarts
        site.kill(name, signal.SIGTERM)
        deadline = time.monotonic() + 30
        while site.restarts == before or len(statuses) % 50:
            statuses.append(proxy.get("/models").status_code)
            assert time.monotonic() < deadline
            time.sleep(0.02)
        site.wait_until_ready()
    assert set(statuses) == {200}


def test_the_tools_are_unpacked_and_not_installed() -> None:
    for name in ("caddy", "nginx", "promtool"):
        assert Path(tool(name)).is_relative_to(FOLDER)
