"""Why a worker cannot start, and what other cards bring a job to.

    StartError
    ├── ConfigError         the configuration file is missing, malformed or contradicts itself
    ├── DeviceUnavailable   the device asked for is not there
    ├── RanksUnlike         several cards that would run the same jobs differently
    ├── ModelUnusable       the model folder lacks a part, or a part cannot be read
    └── TooLittleMemory     the device cannot hold what the configuration asks for
    RanksLost               a process that runs the same jobs on another card is gone
    RankFailed              another card could not do its part of a job

Each message is one sentence or two for an operator: the value, the bound, the remedy.
`worker/startup.py` prints it and exits. What goes wrong during a job belongs to `jobs/errors.py`.
"""

from __future__ import annotations

from typing import Final


class StartError(Exception):
    """The worker cannot start as configured."""


class ConfigError(StartError):
    """The configuration file cannot be used."""


class DeviceUnavailable(StartError):
    """The device asked for cannot be used from this process."""


class RanksUnlike(StartError):
    """Cards that are to run jobs together run a mode on different kernels."""


class ModelUnusable(StartError):
    """The model folder cannot be loaded."""


class TooLittleMemory(StartError):
    """The model in its modes does not fit onto the device; nothing was loaded."""


class RanksLost(Exception):
    """Of several cards that run jobs together one can do nothing more, so none can."""


class RankFailed(Exception):
    """The job has ended on another card; this one, and that one, are fit for the next."""


EXIT_OUT_OF_MEMORY: Final = 82
"""The status of a process that ran out of memory in two jobs in a row."""

EXIT_DEVICE_LOST: Final = 83
"""The status of a process whose device does nothing more for it."""

EXIT_HUNG: Final = 81
"""The status of a process that its watchdog has ended."""
