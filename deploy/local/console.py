"""Format what the commands print: instructions, the progress of a job, and its summary."""

from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from deploy.local.client import Job
from deploy.local.stack import StackConfig

_STAGES = {
    "text_encoder": "text encoder",
    "denoise": "denoise",
    "vae": "VAE",
    "mp4": "MP4",
}

_DEMO = """\
Ready: open {url} in a browser
  the API, with examples: {url}/docs
Or try:
  curl -s {url}/generate -H 'Content-Type: application/json' -d '{{"prompt": "{prompt}"}}'
  curl -s {url}/jobs
Data and logs: {folder}; Valkey: {redis}
Ctrl-C stops everything."""
_PROMPT = "a small red circle moving right on a black background"


def demo_text(config: StackConfig) -> str:
    """Return the instructions that `demo` prints once everything is ready."""
    return _DEMO.format(
        url=config.service_url, prompt=_PROMPT, folder=config.folder, redis=config.redis_url
    )


def stopping_text(config: StackConfig) -> str:
    """Return what `demo` prints at the first Ctrl-C."""
    return (
        f"Stopping: a job in hand is finished first, for at most {config.worker_grace_s:.0f} s. "
        "Ctrl-C again ends it at once; the next demo then runs it again."
    )


def summary(job: Job, out: Path) -> str:
    """Return one line: the file, its properties, and the seconds of every stage."""
    video, request, timings = job["video"], job["request"], job["timings"]
    stages = [f"queue {timings['queue_s']:.2f}"]
    stages += [f"{label} {timings[f'{stage}_s']:.2f}" for stage, label in _STAGES.items()]
    return (
        f"{out}: {video['num_frames']} frames of {video['width']}x{video['height']}, "
        f"mode {request['mode']}, seed {request['seed']}; "
        f"seconds: {', '.join(stages)}, total {timings['total_s']:.2f}"
    )


class JobBar:
    """A progress bar for each stage of a job, updated with the job's JSON."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<13}"),
            BarColumn(),
            TextColumn("{task.fields[steps]:>9}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._stage = ""
        self._task: TaskID | None = None
        self._total: int | None = None  # steps of the stage, once known

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show(self, job: Job) -> None:
        """Update the bar."""
        progress = job["progress"] or {}
        if job["finished_at"]:
            self._finish()
            return
        stage = _STAGES[progress["stage"]] if progress else "queued"
        if stage != self._stage:
            self._finish()
            self._stage = stage
            self._task = self._progress.add_task(stage, total=None, steps="")
        if self._task is not None and progress:
            self._show_step(self._task, progress["step"], progress["steps"])

    def _show_step(self, task: TaskID, step: int, steps: int) -> None:
        self._total = steps
        self._progress.update(task, total=steps, completed=step, steps=f"{step}/{steps}")

    def _finish(self) -> None:
        """Complete the bar of a stage, as its last steps may have passed between two polls."""
        if self._task is not None:
            if self._total is None:
                self._progress.update(self._task, total=1, completed=1)
            else:
                self._show_step(self._task, self._total, self._total)
            self._progress.stop_task(self._task)
        self._task = self._total = None
