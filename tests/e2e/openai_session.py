"""Use OpenAI's Videos API like a client, with the version of `openai` that is on the path.

This is a separate program, because two versions cannot be imported into one process: `python -m
tests.e2e.openai_session BASE_URL KEY VERSION FOLDER` exits with 0 if every answer is as expected.
KEY is `none` if no key is needed. `test_openai_client.py` runs it against the fake engine.
"""

import sys
from pathlib import Path
from typing import Any

import openai

from worker.engine.fake_engine import FAILING

PROMPT = "a small red circle moving right on a black background"


def main() -> None:
    base_url, key, version, folder = sys.argv[1:]
    assert openai.__version__ == version, openai.__version__
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key=key)
    # Sizes and seconds of other models than Sora are not in the client's types.
    videos: Any = client.videos
    a_key_is_needed(base_url, key)
    first = create(videos, version)
    second = create_and_poll(videos)
    listing(videos, {first, second})
    download(videos, second, Path(folder))
    failed_job(videos)
    refusals(videos)
    delete(videos, second)


def a_key_is_needed(base_url: str, key: str) -> None:
    unknown: Any = openai.OpenAI(base_url=f"{base_url}/v1", api_key="sk-proj-stranger").videos
    if key == "none":
        unknown.list()
        return
    for ask in (unknown.list, lambda: unknown.create(prompt=PROMPT)):
        error = raised(openai.AuthenticationError, ask)
        assert error.code == "unauthenticated", error


def create(videos: Any, version: str) -> str:
    """Create a video. The older client sends JSON, the current one a form; both mean the same."""
    answer = videos.with_raw_response.create(
        prompt=PROMPT,
        model="plain",
        seconds="1",
        size="64x32",
        extra_body={"seed": 200, "num_inference_steps": 5, "guidance_scale": 2.5},
    )
    sent = answer.http_request.headers["content-type"].partition(";")[0]
    assert sent == ("application/json" if version == "2.8.0" else "multipart/form-data"), sent
    assert 500 <= int(answer.headers["openai-poll-after-ms"]) <= 5000
    video = answer.parse()
    assert (video.object, video.model, video.status) == ("video", "fake:plain", "queued"), video
    assert (video.seconds, video.size, video.prompt) == ("1", "64x32", PROMPT), video
    extra = (video.seed, video.num_frames, video.num_inference_steps, video.guidance_scale)
    assert extra == (200, 9, 5, 2.5), video
    assert videos.retrieve(video.id).id == video.id
    done = videos.poll(video.id)
    assert (done.status, done.progress, done.error) == ("completed", 100, None), done
    assert done.created_at <= done.completed_at < done.expires_at, done
    return str(video.id)


def create_and_poll(videos: Any) -> str:
    video = videos.create_and_poll(prompt=PROMPT, extra_body={"num_frames": 5})
    assert (video.status, video.model, video.seconds) == ("completed", "fake:plain", "0.5"), video
    return str(video.id)


def listing(videos: Any, own: set[str]) -> None:
    newest = [video.id for video in videos.list(limit=1)]
    assert set(newest) >= own, newest
    oldest = [video.id for video in videos.list(limit=1, order="asc")]
    assert oldest == newest[::-1], (newest, oldest)
    page = videos.list(limit=1, after=newest[0])
    assert [video.id for video in page.data] == newest[1:2]


def download(videos: Any, video_id: str, folder: Path) -> None:
    videos.download_content(video_id).write_to_file(folder / "video.mp4")
    videos.download_content(video_id, variant="video").write_to_file(folder / "again.mp4")
    for variant in ("thumbnail", "spritesheet"):
        picture = videos.download_content(video_id, variant=variant)
        assert picture.response.headers["content-type"] == "image/webp", picture.response.headers
        picture.write_to_file(folder / f"{variant}.webp")
    error = raised(
        openai.BadRequestError, lambda: videos.download_content(video_id, variant="poster")
    )
    assert error.param == "variant", error


def failed_job(videos: Any) -> None:
    video = videos.create_and_poll(prompt=FAILING)
    assert video.status == "failed", video
    assert video.error.code == "generation_failed", video
    assert video.error.message == "The prompt asks for a failure.", video


def refusals(videos: Any) -> None:
    for ask in (videos.retrieve, videos.poll, videos.delete, videos.download_content):
        error = raised(openai.NotFoundError, lambda ask=ask: ask("video_123"))
        assert error.code == "job_not_found", error
    error = raised(openai.BadRequestError, lambda: videos.create(prompt=PROMPT, model="sora-2"))
    assert error.param == "model", error
    assert "fake:plain" in error.message, error
    error = raised(openai.BadRequestError, lambda: videos.create(prompt=PROMPT, seconds="8"))
    assert error.param == "seconds", error
    image = ("a.png", b"\x89PNG", "image/png")
    error = raised(
        openai.BadRequestError, lambda: videos.create(prompt=PROMPT, input_reference=image)
    )
    assert error.param == "input_reference", error


def delete(videos: Any, finished: str) -> None:
    running = videos.create(prompt=PROMPT, extra_body={"num_inference_steps": 1000})
    while videos.retrieve(running.id).status != "in_progress":
        pass
    raised(openai.NotFoundError, lambda: videos.download_content(running.id))
    queued = videos.create(prompt=PROMPT)
    assert videos.retrieve(queued.id).queue_position == 1
    for video_id in (queued.id, running.id, finished):
        answer = videos.delete(video_id)
        assert (answer.id, answer.object, answer.deleted) == (video_id, "video.deleted", True)
        raised(openai.NotFoundError, lambda video_id=video_id: videos.retrieve(video_id))


def raised(kind: type[openai.APIStatusError], ask: Any) -> Any:
    """Return the error of this kind that `ask` raises."""
    try:
        answer = ask()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}, but {answer!r}")


if __name__ == "__main__":
    main()
