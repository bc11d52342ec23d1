"""Run the real worker and engine on a device with injected faults.

`python -m tests.support.faulty_worker FOLDER`: each file in the folder is one fault, and its name
says which. The device takes one at each synchronization, which is where real devices fail.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.artifacts.known_store import open_known_artifacts
from worker.config import load_config
from worker.consumer.serve import ServeContext, serve
from worker.device import Device, pick_device
from worker.process.logs import configure_logging
from worker.settings import WorkerSettings
from worker.startup import load_engine, open_redis


@dataclass(frozen=True, slots=True)
class FaultyDevice(Device):
    """A device with a folder of faults; its other fields are the real device's."""

    faults: Path = Path()

    def synchronize(self) -> None:
        for path in sorted(self.faults.iterdir()):
            try:
                path.unlink()
            except FileNotFoundError:
                continue  # another worker took this one
            _fail(path.name.partition("-")[0])
            return


def _fail(fault: str) -> None:
    match fault:
        case "oom":
            raise torch.OutOfMemoryError("the fault test fills the memory")
        case "hang":
            ctypes.CDLL(None).sleep(3600)  # in native code, like a driver that hangs
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case _:
            raise AssertionError(f"no such fault: {fault}")


def main() -> None:
    faults = Path(sys.argv[1])
    settings = WorkerSettings()
    ids = configure_logging(settings.log_format)
    with ExitStack() as opened:
        redis = opened.enter_context(open_redis(settings.redis_url.get_secret_value()))
        device = pick_device(settings.device, settings.threads)
        real = {each.name: getattr(device, each.name) for each in dataclasses.fields(device)}
        engine = load_engine(load_config(settings.config), FaultyDevice(**real, faults=faults))
        artifacts = open_known_artifacts(settings.artifacts_url, redis)
        artifacts.probe()
        status = serve(ServeContext(engine, redis, artifacts), settings, ids)
    if status:
        os._exit(status)


if __name__ == "__main__":
    main()
