"""Define why a worker cannot start, how other ranks end a job, and the exit statuses.

    StartError
    ├── ConfigError         the configuration file is missing, malformed or contradicts itself
    ├── DeviceUnavailable   the device asked for is not there
    ├── RanksDiffer         ranks would run a mode on different files or kernels
    ├── ModelUnusable       the model folder lacks a component, or one cannot be read
    ├── TooLittleMemory     the device cannot hold what the configuration asks for
    └── ProofFailed         the tiny job at the start did not become a video
    RanksLost               the process of another rank has ended
    RankFailed              another rank could not do its part of a job

Each message is one or two sentences for an operator: the value, the bound, the remedy.
`worker/startup.py` prints it and exits. Errors of a job are in `jobs/errors.py`.
"""

from __future__ import annotations

from typing import Final


class StartError(Exception):
    """The worker cannot start as configured."""


class ConfigError(StartError):
    """The configuration file cannot be used."""


class DeviceUnavailable(StartError):
    """The device asked for cannot be used from this process."""


class RanksDiffer(StartError):
    """Ranks that run jobs together would run a mode on different files or kernels."""


class ModelUnusable(StartError):
    """The model folder cannot be loaded."""


class TooLittleMemory(StartError):
    """The model in its modes does not fit on the device; nothing was loaded."""


class ProofFailed(StartError):
    """The tiny job at the start failed, so no other job would succeed either."""


class RanksLost(Exception):
    """One of the ranks that run jobs together is unusable, so none of them can go on."""


class RankFailed(Exception):
    """The job has ended on another rank; all ranks can run the next one."""


EXIT_OUT_OF_MEMORY: Final = 82
"""Exit status of a process that ran out of memory in two jobs in a row."""

EXIT_UNFIT: Final = 84
"""Exit status of a process that cannot use its disk or ffmpeg, and did not recover by itself."""

EXIT_DEVICE_LOST: Final = 83
"""Exit status of a process whose device has become unusable."""

EXIT_HUNG: Final = 81
"""Exit status of a process that its watchdog ended."""
