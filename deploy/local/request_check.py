"""Check a worker's configuration, and a request against it, before anything is started.

Worker and service would refuse the same, but only once Valkey runs and, for a request, the model is
loaded. What only they know, such as whether scales fit the model, is left to them.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from deploy.local.client import VideoRequest
from deploy.local.errors import LocalError, Refused
from jobs.catalog import Catalog, WorkerOffer
from jobs.errors import InvalidSpec
from jobs.spec import resolve_json
from worker.config import ModeConfig, WorkerConfig, load_config
from worker.errors import ConfigError, StartError

_RECIPES = Path(__file__).resolve().parents[2] / "quant" / "recipe" / "presets"


def check_config(worker_config: Path) -> WorkerConfig:
    """Read a worker's configuration, and check that what it names is there.

    Raises:
        LocalError: the configuration is missing or wrong, or the model's folder or a mode's file
            is missing: its command is named that makes it, if there is one.
    """
    try:
        config = load_config(worker_config)
    except ConfigError as error:
        raise LocalError(str(error)) from error
    if not config.model.path.is_dir():
        raise LocalError(
            f"there is no model folder {config.model.path}, which {worker_config} names"
        )
    for mode in config.modes:
        missing = next((path for path in _named_by(mode) if not path.exists()), None)
        if missing is not None:
            reason = _reason(config, mode) or f"there is no {missing}"
            raise LocalError(f"mode {mode.name} of {worker_config} cannot be served: {reason}")
    return config


def _named_by(mode: ModeConfig) -> Iterator[Path]:
    """Yield the files and folders that a mode needs."""
    yield from (path for path in (mode.scales, mode.packed) if path is not None)
    yield from (each.path for each in mode.lora)
    if mode.recipe is not None:
        is_path = Path(mode.recipe).suffix in {".toml", ".json"}
        yield Path(mode.recipe) if is_path else _RECIPES / f"{mode.recipe}.toml"


def _reason(config: WorkerConfig, mode: ModeConfig) -> str | None:
    """Return what a worker says of a mode, which has the command that makes what is missing."""
    # Imports torch, which takes seconds: only where it is known that something is missing.
    from quant import QuantError  # noqa: PLC0415
    from worker.model_loader.mode_plan import check_folder, plan_modes  # noqa: PLC0415

    try:
        check_folder(config.model.path)
        plan_modes(config.model_copy(update={"modes": (mode,)}), fingerprint="unread")
    except (QuantError, StartError) as error:
        return str(error)
    return None


def check_request(request: VideoRequest, worker_config: Path) -> None:
    """Check a request as the service will, once a worker with this configuration is live.

    Raises:
        LocalError: as `check_config`.
        Refused: the request is wrong, with all that is, and what there is instead.
    """
    config = check_config(worker_config)
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
