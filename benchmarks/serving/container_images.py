"""Build the images of service and worker.cpu without a container engine, and run a job in them.

Usage, as root on Debian with mmdebstrap and buildah:
`python -m benchmarks.serving.container_images [--folder F] [--volume A:B:ro] [--build-arg N=V]`

The base is a minimal Debian with Python. buildah builds by `chroot`, which needs no right to make
containers. The processes run as the images' user, on a root that is mounted read-only, with the
images' variables, commands and health checks; Valkey runs beside them. What an engine would add,
namespaces and limits, is not tried.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.report import ROOT, Row, log_rows, print_table, result, save
from deploy.local import valkey
from deploy.local.ports import LOOPBACK, find_free_port
from deploy.local.waiting import wait_until

BASE = "localhost/wan-base"
IMAGES = {"service": "service", "cpu": "worker.cpu"}
POLICY = {"default": [{"type": "insecureAcceptAnything"}]}  # for the base, which nobody signed
PASSWORD = "0123456789abcdef"
REQUEST = {"prompt": "a small red circle moving right on a black background", "seed": 7}


class Builder:
    """buildah with a storage of its own in a folder."""

    def __init__(self, folder: Path, options: Sequence[str]) -> None:
        self._folder = folder
        self._options = options
        self._policy = folder / "policy.json"
        self._policy.write_text(json.dumps(POLICY))

    def base(self) -> None:
        """Make the base, if it is not there: what Python's official image is in a registry."""
        self.run("rm", "--all")  # an earlier run's containers have the names of this one's
        if self.run("images", "--quiet", "--filter", f"reference={BASE}"):
            return
        archive = self._folder / "base.tar"
        if not archive.exists():
            release = dict(
                line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines()
            )["VERSION_CODENAME"]
            packages = "python3,python3-venv,ca-certificates"
            partial = self._folder / "partial.tar"
            command = ["mmdebstrap", "--variant=minbase", f"--include={packages}", release]
            subprocess.run([*command, partial], check=True)
            partial.rename(archive)
        container = self.run("from", "--signature-policy", str(self._policy), "scratch")
        self.run("add", container, str(archive), "/")
        self.run("commit", "--signature-policy", str(self._policy), "--rm", container, BASE)

    def build(self, image: str) -> None:
        """Build an image as `make images` does, on this base."""
        options = ["--isolation", "chroot", "--signature-policy", str(self._policy)]
        environment = os.environ | {
            "ENGINE": "buildah",
            "TAG": "trial",
            "OPTIONS": " ".join(
                [*self._storage, *options, f"--build-arg BASE={BASE}", *self._options]
            ),
        }
        script = ROOT / "docker" / "build.sh"
        subprocess.run(["sh", script, image], check=True, env=environment, cwd=ROOT)

    def mount(self, name: str) -> Path:
        """Return the folder with an image's files."""
        policy = ("--signature-policy", str(self._policy))
        container = self.run("from", *policy, "--pull-never", "--name", f"{name}-trial", name)
        return Path(self.run("mount", container))

    def configuration(self, name: str) -> dict[str, Any]:
        """Return what an image says about how it is run."""
        document = json.loads(self.run("inspect", "--type", "image", name))
        found: dict[str, Any] = document["Docker"]["config"]
        return found

    @property
    def _storage(self) -> list[str]:
        storage = self._folder / "storage"
        return [
            "--root",
            str(storage),
            "--runroot",
            str(storage / "run"),
            "--storage-driver",
            "vfs",
        ]

    def run(self, command: str, *arguments: str) -> str:
        """Run buildah; return the last line it prints, or all if that is JSON."""
        line = ["buildah", *self._storage, command, *arguments]
        output = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        return output if output.startswith("{") else output.rpartition("\n")[2]


@dataclass(frozen=True)
class Root:
    """An image's files as a container would see them: read-only, with /tmp and what is mounted."""

    path: Path
    config: dict[str, Any]

    def command(self, words: Sequence[str], environment: dict[str, str]) -> list[str]:
        """Return the command that runs `words` in this root, as the image's user."""
        user = self.config["User"]
        own = [*self.config["Env"], *(f"{name}={value}" for name, value in environment.items())]
        return ["env", "-i", *own, "chroot", f"--userspec={user}", str(self.path), *words]

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; return what it printed and how it ended."""
        line = self.command(words, environment)
        return subprocess.run(line, capture_output=True, text=True, check=False)

    def is_healthy(self, **environment: str) -> bool:
        """Run the image's health check."""
        kind, *words = self.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        return self.run(*words, **environment).returncode == 0

    @contextmanager
    def process(self, log: Path, **environment: str) -> Iterator[None]:
        """Run the image's own command until the block ends; then send it SIGTERM."""
        words = [*(self.config.get("Entrypoint") or ()), *self.config["Cmd"]]
        with log.open("w") as output:
            process = subprocess.Popen(
                self.command(words, environment), stdout=output, stderr=output
            )
        try:
            yield
            assert process.poll() is None, log.read_text()
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@contextmanager
def root_of(
    source: Path, config: dict[str, Any], mounts: dict[Path, str], target: Path
) -> Iterator[Root]:
    """Mount an image's files read-only, /tmp in memory, and `mounts` at their places."""
    target.mkdir(exist_ok=True)
    for place in ("/app/models", "/artifacts", "/dev", "/proc"):
        (source / place.strip("/")).mkdir(parents=True, exist_ok=True)  # an engine would
    with ExitStack() as mounted:

        def mount(*words: object) -> None:
            subprocess.run(["mount", *map(str, words)], check=True)
            mounted.callback(subprocess.run, ["umount", "-R", str(words[-1])], check=True)

        mount("--bind", source, target)
        subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)
        mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", target / "tmp")
        mount("-t", "proc", "proc", target / "proc")
        mount("--rbind", "/dev", target / "dev")
        subprocess.run(["mount", "--make-rslave", target / "dev"], check=True)
        for outside, inside in mounts.items():
            at = target / inside.partition(":")[0].strip("/")
            mount("--bind", outside, at)
            if inside.endswith(":ro"):
                subprocess.run(["mount", "-o", "remount,bind,ro", at], check=True)
        yield Root(target, config)


def size_of(folder: Path) -> float:
    """Return the MB of an image's files, uncompressed."""
    output = subprocess.run(["du", "-sb", folder], check=True, capture_output=True, text=True)
    return int(output.stdout.split()[0]) / 1e6


def check_user(root: Root, imports: str, not_imports: str = "") -> None:
    """Check that the image's user is nobody special, and can write to /tmp alone."""
    assert root.run("id", "-u").stdout.strip() == "10001"
    for place in ("/", "/app", "/opt/wan"):
        answer = root.run("touch", f"{place}/written")
        assert "Read-only file system" in answer.stderr, answer
    assert root.run("touch", "/tmp/written").returncode == 0
    assert root.run("python", "-c", f"import {imports}").returncode == 0
    if not_imports:
        answer = root.run("python", "-c", f"import {not_imports}")
        assert f"No module named '{not_imports}'" in answer.stderr, answer


def run_job(service: Root, worker: Root, folder: Path, rows: list[Row]) -> None:
    """Start both, ask for a video as a caller does, and check it."""
    port, valkey_port = find_free_port(), find_free_port()
    data = folder / "valkey"
    shutil.rmtree(data, ignore_errors=True)  # an earlier run's knows another artifact store
    data.mkdir()
    store = {
        "REDIS_URL": f"redis://:{PASSWORD}@{LOOPBACK}:{valkey_port}/0",
        "ARTIFACTS_URL": "file:///artifacts",
    }
    serving = store | {"SERVICE_PORT": str(port)}
    with ExitStack() as running:
        command = valkey.server_command(data, valkey_port, PASSWORD)
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        running.callback(server.wait)
        running.callback(server.terminate)
        wait_until(lambda: valkey.answers(valkey_port, PASSWORD), 60, "Valkey answers")
        refused = service.run("python", "-m", "service", **serving)
        assert refused.returncode == 1, "it starts without a key"
        assert "there is no API key" in refused.stderr, refused
        made = service.run("python", "-m", "service", "keys", "add", "me", "--role", "ops", **store)
        key = made.stdout.strip().splitlines()[-1]
        assert not worker.is_healthy()
        checked = worker.run("python", "-m", "worker", "doctor", "--files")
        assert checked.returncode == 0, checked
        started = time.perf_counter()
        running.enter_context(service.process(folder / "service.log", **serving))
        wait_until(lambda: service.is_healthy(**serving), 60, "the service is healthy")
        rows += log_rows([Row("service, start to healthy", time.perf_counter() - started, "s")])
        started = time.perf_counter()
        running.enter_context(worker.process(folder / "worker.log", **store))
        wait_until(worker.is_healthy, 300, "the worker is ready", (folder / "worker.log").read_text)
        rows += log_rows([Row("worker, start to ready", time.perf_counter() - started, "s")])
        client = httpx.Client(
            base_url=f"http://{LOOPBACK}:{port}", headers={"Authorization": f"Bearer {key}"}
        )
        running.callback(client.close)
        started = time.perf_counter()
        job = client.post("/generate", json=REQUEST).json()["id"]
        wait_until(
            lambda: client.get(f"/jobs/{job}").raise_for_status().json()["state"] == "succeeded",
            300,
            "the job",
            every_s=0.5,  # a key may send ten requests a second
        )
        rows += log_rows([Row("a job of the miniature", time.perf_counter() - started, "s")])
        video = client.get(client.get(f"/jobs/{job}").json()["video"]["url"])
        assert video.content[4:8] == b"ftyp", video.content[:20]
        (stored,) = (folder / "artifacts").rglob("*.mp4")
        assert stored.stat().st_uid == 10001
    log = (folder / "worker.log").read_text()
    assert "Traceback" not in log, log


def main(
    folder: Annotated[Path, typer.Option(help="Where everything is built.")] = Path("var/images"),
    volume: Annotated[list[str] | None, typer.Option(help="Given to buildah.")] = None,
    build_arg: Annotated[list[str] | None, typer.Option(help="Given to buildah.")] = None,
) -> None:
    """Build, measure, run a job, and write the result."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    options = [f"--volume {each}" for each in volume or ()]
    options += [f"--build-arg {each}" for each in build_arg or ()]
    builder = Builder(folder, options)
    builder.base()
    rows: list[Row] = []
    for image in IMAGES:
        started = time.perf_counter()
        builder.build(image)
        rows += log_rows([Row(f"{image}, building", time.perf_counter() - started, "s")])
    base = size_of(builder.mount(BASE))
    names = {"service": "wan-service:trial", "cpu": "wan-worker:trial-cpu"}
    sources = {image: builder.mount(f"localhost/{name}") for image, name in names.items()}
    rows += log_rows(
        Row(f"{image}, its files", size_of(sources[image]), "MB", base) for image in IMAGES
    )
    artifacts = folder / "artifacts"
    shutil.rmtree(artifacts, ignore_errors=True)
    artifacts.mkdir()
    os.chown(artifacts, 10001, 10001)
    mounts = {artifacts: "/artifacts"}
    models = {ROOT / "models": "/app/models:ro"}
    configs = {image: builder.configuration(f"localhost/{name}") for image, name in names.items()}
    with (
        root_of(sources["service"], configs["service"], mounts, folder / "root-service") as service,
        root_of(sources["cpu"], configs["cpu"], mounts | models, folder / "root-cpu") as worker,
    ):
        check_user(service, "fastapi, service.app", "torch")
        check_user(worker, "torch, worker.startup")
        run_job(service, worker, folder, rows)
    print_table(rows)
    save(
        result(
            "container_images", "cpu", {"isolation": "chroot", "base": "mmdebstrap minbase"}, rows
        )
    )


if __name__ == "__main__":
    typer.run(main)
