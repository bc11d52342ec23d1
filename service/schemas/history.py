"""Define the JSON of what happened lately: failed jobs, and series over time."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Final, Self

from pydantic import BaseModel, Field

from service.monitoring.failures import FailedJob, Failures
from service.monitoring.series import Series
from service.schemas.operations import ShapeView


class FailedJobView(BaseModel):
    """A job that failed."""

    id: str
    detail: str
    failed_at: datetime
    owner: str
    worker: str | None = Field(description="The worker of its last attempt.")
    attempts: int
    shape: ShapeView | None

    @classmethod
    def of(cls, job: FailedJob) -> Self:
        """Build the view of a failed job."""
        shape = None if job.shape is None else ShapeView.of(job.shape)
        return cls(shape=shape, **{name: getattr(job, name) for name in _SHOWN})


_SHOWN: Final = ("id", "detail", "failed_at", "owner", "worker", "attempts")


class FailuresOfCodeView(BaseModel):
    """The jobs that failed for one reason, the latest first."""

    code: str = Field(examples=["out_of_device_memory"])
    number: int
    jobs: list[FailedJobView]


class FailuresView(BaseModel):
    """What failed since then, by code, the most frequent first."""

    since: datetime
    total: int = Field(description="How many failed; the latest 1,000 of them are listed.")
    codes: list[FailuresOfCodeView]

    @classmethod
    def of(cls, since: datetime, failures: Failures) -> Self:
        """Build the view of the latest failures."""
        by_code: dict[str, list[FailedJobView]] = defaultdict(list)
        for job in failures.jobs:
            by_code[job.code].append(FailedJobView.of(job))
        codes = [
            FailuresOfCodeView(code=code, number=len(jobs), jobs=jobs)
            for code, jobs in sorted(by_code.items(), key=lambda each: -len(each[1]))
        ]
        return cls(since=since, total=failures.total, codes=codes)


class ModeSeriesView(BaseModel):
    """The series of one mode; each list has a value for each step."""

    mode: str
    succeeded: Sequence[int]
    failed: Sequence[int]
    cancelled: Sequence[int]
    wait_s: Sequence[float | None] = Field(
        description="Mean wait of the jobs that began in a step; null if none did."
    )
    run_s: Sequence[float | None] = Field(
        description="Mean run of the jobs that succeeded in a step; null if none did."
    )


class SeriesView(BaseModel):
    """Jobs over time, in steps of equal length, of which the last is under way."""

    step_s: int = Field(description="60 for up to 6 hours, 300 for up to 24, else 1800.")
    at: Sequence[int] = Field(description="Unix seconds at which the steps begin.")
    modes: list[ModeSeriesView]

    @classmethod
    def of(cls, series: Series) -> Self:
        """Build the view of the series of all modes."""
        modes = [
            ModeSeriesView(mode=each.mode, wait_s=each.wait_s, run_s=each.run_s, **each.ended)
            for each in series.modes
        ]
        return cls(step_s=series.step_s, at=series.starts_s, modes=modes)
