"""Test the demo: it keeps running, restarts its worker, and leaves no process behind."""

import os
import signal
import socket
import subprocess
from contextlib import closing
from pathlib import Path

import httpx

from deploy.local import valkey
from deploy.local.waiting import wait_until
from jobs.record import JobRecord
from jobs.redis_client import connect
from jobs.state import JobState
from jobs.store.job_store import JobStore
from tests.support.launcher import Launcher, free_port, run


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{(port := free_port())}"
    with Launcher("demo", "--port", str(port), "--folder", str(tmp_path)) as demo:
        shown = demo.read_until("Ctrl-C stops everything")
        assert f"Ready: open {url} in a browser" in shown
        assert len(demo.processes()) == 4, demo.processes()  # launcher, Valkey, worker, service
        _kill_the_worker(demo)
        assert "the worker was killed by SIGKILL" in demo.read_until("starting it again")
        _generate(url)
        demo.interrupt()
        code, rest = demo.finish()
        assert code == 0
        assert rest.splitlines()[-1] == "Stopped: nothing is left running."
        demo.wait_until_nothing_is_left()


def test_ctrl_c_lets_the_job_in_hand_finish(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{(port := free_port())}"
    with Launcher("demo", "--port", str(port), "--folder", str(tmp_path)) as demo:
        demo.read_until("Ctrl-C stops everything")
        job_id = _begin_a_job(url, steps=20)
        demo.interrupt()
        code, rest = demo.finish()
        assert code == 0
        assert "a job in hand is finished first" in rest
        demo.wait_until_nothing_is_left()
    record = _record(tmp_path, job_id)
    assert record.state is JobState.SUCCEEDED
    assert record.video is not None
    assert (tmp_path / "artifacts" / record.video.key).is_file()
    assert "cold shut down" not in (tmp_path / "logs" / "worker.log").read_text()


def test_a_demo_that_is_killed_takes_its_children_along(tmp_path: Path) -> None:
    with Launcher("demo", "--port", str(free_port()), "--folder", str(tmp_path)) as demo:
        _wait_for_processes(demo, 4)
        demo.process.kill()
        demo.process.wait()
        demo.wait_until_nothing_is_left()


def test_sigterm_while_starting_leaves_no_process_behind(tmp_path: Path) -> None:
    with Launcher("demo", "--port", str(free_port()), "--folder", str(tmp_path)) as demo:
        _wait_for_processes(demo, 3)
        demo.process.send_signal(signal.SIGTERM)
        code, output = demo.finish()
        assert code == 0, output
        demo.wait_until_nothing_is_left()


def test_a_terminal_that_goes_away_ends_the_demo(tmp_path: Path) -> None:
    terminal, stdin = os.openpty()
    arguments = ("demo", "--port", str(free_port()), "--folder", str(tmp_path))
    with Launcher(*arguments, stdin=stdin) as demo:
        os.close(stdin)
        _wait_for_processes(demo, 2)
        os.close(terminal)
        code, output = demo.finish()
        assert code == 0, output
        demo.wait_until_nothing_is_left()


def test_two_demos_never_share_a_folder(tmp_path: Path) -> None:
    with Launcher("demo", "--port", str(free_port()), "--folder", str(tmp_path)) as first:
        _wait_for_processes(first, 2)
        code, output = run("demo", "--port", str(free_port()), "--folder", str(tmp_path))
    assert code == 1
    assert output.splitlines()[-1] == f"error: another demo runs on {tmp_path}: stop that one first"


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, output = run("demo", "--port", str(port))
    assert code == 1
    assert output == (
        f"error: port {port} on 127.0.0.1, which the service needs, is in use: "
        "stop what listens there, or choose another with `make demo PORT=…`\n"
    )


def _kill_the_worker(demo: Launcher) -> None:
    (pid,) = [pid for pid, command in demo.processes().items() if "-m worker" in command]
    os.kill(pid, signal.SIGKILL)


def _wait_for_processes(demo: Launcher, count: int) -> None:
    def are_there() -> bool:
        assert demo.process.poll() is None, demo.finish()
        return len(demo.processes()) >= count

    wait_until(are_there, 60, f"{count} processes run", lambda: str(demo.processes()))


def _begin_a_job(url: str, steps: int) -> str:
    """Create a job, wait until it is being denoised, and return its id."""
    body = {"prompt": "a small red circle", "seed": 1, "num_inference_steps": steps}
    with httpx.Client(base_url=url, trust_env=False) as client:
        job = client.post("/generate", json=body).json()

        def is_denoised() -> bool:
            progress = client.get(f"/jobs/{job['id']}").json()["progress"]
            return progress is not None and progress["stage"] == "denoise"

        wait_until(is_denoised, 60, "the job is being denoised", every_s=0.05)
    return str(job["id"])


def _record(folder: Path, job_id: str) -> JobRecord:
    """Read a job's record from the files of a stopped demo's Valkey."""
    command = valkey.server_command(folder / "valkey", port := free_port())
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: valkey.answers(port), 30, "Valkey answers")
            with closing(connect(f"redis://127.0.0.1:{port}/0")) as redis:
                return JobStore(redis).get(job_id)
        finally:
            server.terminate()


def _generate(url: str) -> None:
    """Run one job through the public API, until it has succeeded."""
    body = {"prompt": "a small red circle", "seed": 1, "mode": "fast"}
    with httpx.Client(base_url=url, trust_env=False) as client:
        accepted = client.post("/generate", json=body)
        assert accepted.status_code == 202, accepted.text

        def has_succeeded() -> bool:
            job = client.get(accepted.headers["Location"]).json()
            assert job["state"] in {"queued", "running", "succeeded"}, job
            return bool(job["state"] == "succeeded")

        wait_until(has_succeeded, 120, "the job succeeds", every_s=0.1)
