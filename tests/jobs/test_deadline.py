"""The time limit grows with the work, and leaves room on the slowest supported device."""

from jobs.deadline import timeout_s
from jobs.spec import GenerationRequest


def test_limit_of_the_large_model(request_for_video: GenerationRequest) -> None:
    large = request_for_video.model_copy(
        update={"size": "832x480", "num_frames": 81, "num_inference_steps": 50}
    )
    # 32,760 tokens: 600 s + 50 x (5 s + 131.04 s).
    assert timeout_s(large) == 7402


def test_limit_grows_with_each_factor(request_for_video: GenerationRequest) -> None:
    base = timeout_s(request_for_video)
    for change in ({"size": "640x640"}, {"num_frames": 81}, {"num_inference_steps": 50}):
        assert timeout_s(request_for_video.model_copy(update=change)) > base
