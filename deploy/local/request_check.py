"""Check a request against the worker's configuration, before anything is started for it.

The service would refuse the same, but only once the worker has loaded its model. What only the
running service knows, such as the tokens of a prompt, is left to it.
"""

from datetime import UTC, datetime
from pathlib import Path

from deploy.local.client import VideoRequest
from deploy.local.errors import LocalError, Refused
from jobs.catalog import Catalog, WorkerOffer
from jobs.errors import InvalidSpec
from jobs.spec import resolve_json
from worker.config import WorkerConfig, load_config
from worker.errors import ConfigError


def check_request(request: VideoRequest, worker_config: Path) -> None:
    """Check a request as the service will, once a worker with this configuration is live.

    Raises:
        LocalError: the configuration is missing or wrong.
        Refused: the request is, with everything that is wrong and what there is instead.
    """
    try:
        config = load_config(worker_config)
    except ConfigError as error:
        raise LocalError(str(error)) from error
    try:
        resolve_json(request.body(), _catalog(config))
    except InvalidSpec as error:
        lines = (f"  - {violation.detail}" for violation in error.violations)
        raise Refused("\n".join(["The request is not valid:", *lines])) from error


def _catalog(config: WorkerConfig) -> Catalog:
    """Return the catalog that consists of one worker with this configuration."""
    offer = WorkerOffer(
        worker_id="planned",
        queue="planned",
        device="",
        model=config.model.offer(fingerprint="unread"),
        modes=tuple(mode.offer() for mode in config.modes),
        started_at=datetime.now(UTC),
    )
    known = frozenset((config.model.name, mode.name) for mode in config.modes)
    return Catalog(offers=(offer,), waiting={offer.queue: 0}, known=known)
