"""Run a Valkey that refuses commands for a while, each time for another reason."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from deploy.local import valkey
from deploy.local.ports import LOOPBACK
from deploy.local.waiting import wait_until


@dataclass
class Server:
    """A Valkey of one test, and its folder and port."""

    redis: Redis
    folder: Path
    port: int

    @property
    def url(self) -> str:
        return f"redis://{LOOPBACK}:{self.port}/0"


@contextmanager
def running_server(folder: Path, port: int) -> Iterator[Server]:
    folder.mkdir()
    command = valkey.server_command(folder, port)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: valkey.answers(port), 30, "Valkey answers")
            with Redis(host=LOOPBACK, port=port) as redis:
                yield Server(redis, folder, port)
        finally:
            process.kill()


def fill(server: Server) -> None:
    server.redis.config_set("maxmemory", 1)


def make_room(server: Server) -> None:
    server.redis.config_set("maxmemory", 0)


def want_replicas(server: Server) -> None:
    server.redis.config_set("min-replicas-to-write", 1)


def want_none(server: Server) -> None:
    server.redis.config_set("min-replicas-to-write", 0)


def demote(server: Server) -> None:
    server.redis.replicaof(LOOPBACK, 1)


def demote_and_cut_off(server: Server) -> None:
    server.redis.config_set("replica-serve-stale-data", "no")
    demote(server)


def promote(server: Server) -> None:
    server.redis.replicaof("NO", "ONE")


def break_the_disk(server: Server) -> None:
    """Put a folder where the snapshot has to go, and have one fail."""
    (server.folder / "dump.rdb").mkdir()
    server.redis.config_set("save", "3600 1000000")
    server.redis.bgsave()
    info = server.redis.info
    wait_until(lambda: info("persistence")["rdb_last_bgsave_status"] == "err", 30)


def mend_the_disk(server: Server) -> None:
    server.redis.config_set("stop-writes-on-bgsave-error", "no")


def keep_busy(server: Server) -> None:
    """Run a script without an end, which counts as long after 10 ms."""
    server.redis.config_set("busy-reply-threshold", 10)

    def run() -> None:
        other = Redis(host=LOOPBACK, port=server.port)
        with other, suppress(RedisError):
            other.eval("while true do end", 0)

    threading.Thread(target=run, daemon=True).start()

    def is_busy() -> bool:
        try:
            return not server.redis.ping()
        except RedisError:
            return True

    wait_until(is_busy, 30)


def end_the_script(server: Server) -> None:
    server.redis.execute_command("SCRIPT", "KILL")


def forget_scripts(server: Server) -> None:
    server.redis.script_flush()


FAULTS: dict[str, tuple[Callable[[Server], None], Callable[[Server], None]]] = {
    "OOM": (fill, make_room),
    "NOREPLICAS": (want_replicas, want_none),
    "READONLY": (demote, promote),
    "MASTERDOWN": (demote_and_cut_off, promote),
    "MISCONF": (break_the_disk, mend_the_disk),
    "BUSY": (keep_busy, end_the_script),
}
