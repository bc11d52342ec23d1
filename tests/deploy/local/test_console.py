"""Test the progress bar and the summary of `make generate`."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from deploy.local.console import JobBar, summary


def job(state: str, stage: str = "", step: int = 0, steps: int = 1) -> dict[str, Any]:
    progress = {"stage": stage, "step": step, "steps": steps} if stage else None
    finished = "2026-11-22T14:14:23Z" if state == "succeeded" else None
    return {"state": state, "progress": progress, "finished_at": finished}


def test_every_stage_seen_is_a_line_and_ends_complete() -> None:
    console = Console(file=io.StringIO(), width=100)
    with JobBar(console) as bar:
        bar.show(job("queued"))
        bar.show(job("running"))
        bar.show(job("running", "denoise", 3, 20))
        bar.show(job("running", "denoise", 18, 20))  # 19 and 20 pass between two polls
        bar.show(job("running", "vae", 4, 5))
        bar.show(job("succeeded"))
    assert isinstance(console.file, io.StringIO)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert [line[0] for line in lines] == ["queued", "denoise", "VAE"]
    assert [line[-2] for line in lines[1:]] == ["20/20", "5/5"]


def test_the_summary_names_file_request_and_the_seconds_of_each_stage() -> None:
    done = {
        "video": {"num_frames": 17, "width": 96, "height": 96},
        "request": {"mode": "w8a8", "seed": 7},
        "timings": {
            "queue_s": 0.012,
            "text_encoder_s": 0.05,
            "denoise_s": 6.6,
            "vae_s": 0.6,
            "mp4_s": 0.104,
            "total_s": 7.36,
        },
    }
    assert summary(done, Path("out.mp4")) == (
        "out.mp4: 17 frames of 96x96, mode w8a8, seed 7; seconds: "
        "queue 0.01, text encoder 0.05, denoise 6.60, VAE 0.60, MP4 0.10, total 7.36"
    )
