"""Define every error that a caller or an operator may see, as one tree.

    AppError
    ├── InvalidSpec            the request asks for something that is not offered
    ├── JobNotFound            no record under this id
    ├── JobNotCancellable      the job has already succeeded or failed
    ├── JobAlreadyFinished     a worker claims a job that has already ended
    ├── JobHeld                a worker claims a job that another worker is running
    ├── IdempotencyConflict    the same Idempotency-Key came with another body
    ├── TooManyRequests        the caller should try again later
    │   ├── QueueFull          the queue has reached its limit
    │   ├── QuotaExceeded      the caller's own jobs have reached their limit
    │   ├── RateLimited        the caller sends requests too often
    │   ├── TooManySignIns     too many sign-ins from one address, or with one key
    │   ├── TooManyOwnStreams  the caller's open event streams have reached their limit
    │   └── TooManyOwnDownloads  the downloads of one key's videos have reached their limit
    ├── TooManyStreams         this process' open event streams have reached their limit
    ├── TooManyDownloads       this process' open downloads have reached their limit
    ├── Unauthenticated        the request has no API key and no session, or an unknown one
    ├── Forbidden              the caller is known, but not allowed to do this
    │   └── LinkRefused        a video link is forged, altered or too old
    ├── VideoNotReady          the video or a picture is requested before the job succeeded
    ├── VideoGone              the job succeeded, but its file no longer exists
    ├── PictureNotMade         the video is there, but it has no thumbnail or spritesheet
    ├── NoPreview              the job has no preview now
    ├── ModeNotServed          the mode is known, but no live worker serves it
    ├── NoLiveWorker           no worker is live, so nothing is served
    ├── WorkerNotFound         no live worker has this id
    ├── KeyNotFound            no API key has this name or id
    ├── KeyConflict            the key's state, or that of other keys, forbids the change
    ├── StoreUnavailable       Redis cannot be reached or refuses to write
    ├── RecordUnreadable       a record in Redis was not written by this version
    ├── ArtifactRefused        an artifact address or key is malformed or not supported
    ├── ArtifactsUnavailable   the artifact store does not respond, or refuses access
    ├── ComparisonNotFound     no comparison under this id
    ├── ComparisonConflict     the comparison is not in a state in which this can be done
    ├── RaterNotFound          the comparison has no such rater, or not any more
    ├── ItemNotFound           no pair was shown under this id
    ├── AlreadyVoted           the rater has answered this pair before
    ├── NothingToUndo          there is no last answer that could be taken back
    ├── PairLeftOut            one of the two videos is missing, so nobody can judge them
    ├── StaleAttempt           the job has ended, or a newer attempt owns it
    ├── GenerationCancelled    the caller cancelled the job
    └── GenerationFailed       the pipeline did not produce a video
        ├── ArtifactNotStored  the video was made and could not be stored
        ├── OutOfDeviceMemory  the device ran out of memory
        ├── WorkerLost         too many workers that ran the job crashed, hung or were killed
        ├── WorkerUnfit        the worker, not the job, is at fault: its disk, its ffmpeg
        ├── GenerationTimedOut the attempt took longer than it may
        └── PromptTooLong      the prompt has more tokens than the text encoder takes

The classes do not depend on HTTP (`service/middleware/problems.py` maps them to statuses) or on
torch. A failure crosses Redis as `code` and `detail`, never as a traceback.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


class AppError(Exception):
    """An error with a stable `code`, a short `title` and a `detail` sentence for the reader.

    `context` holds further facts for the reader, as JSON values by name.
    """

    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Something went wrong inside the service"

    def __init__(self, detail: str, **context: object) -> None:
        super().__init__(detail)
        self.detail = detail
        self.context = context


@dataclass(frozen=True, slots=True)
class Violation:
    """One field that is out of bounds, with the `value` and the `bound` to show to the caller."""

    field: str
    value: object
    bound: str
    detail: str


class InvalidSpec(AppError):
    """One or more fields are out of bounds; all of them are in `violations`."""

    code = "invalid_spec"
    title = "The request is not valid"

    def __init__(self, violations: Sequence[Violation]) -> None:
        assert violations, "an InvalidSpec needs at least one violation"
        super().__init__(" ".join(v.detail for v in violations))
        self.violations = tuple(violations)

    @classmethod
    def of(cls, field: str, value: object, bound: str, detail: str) -> "InvalidSpec":
        """Build the error for a single field."""
        return cls([Violation(field, value, bound, detail)])


class JobNotFound(AppError):
    code = "job_not_found"
    title = "No such job"


class JobNotCancellable(AppError):
    code = "job_not_cancellable"
    title = "The job has already ended"


class JobAlreadyFinished(AppError):
    """Raised by a claim of a job that has ended: the task should end without an error."""

    code = "job_already_finished"
    title = "The job has already ended"


class JobHeld(AppError):
    """Raised by a claim of a job that a live attempt owns: the task should end without an error."""

    code = "job_held"
    title = "Another worker is running the job"


class IdempotencyConflict(AppError):
    code = "idempotency_conflict"
    title = "This Idempotency-Key belongs to another request"


class TooManyRequests(AppError):
    """Raised beyond a limit; `retry_after_s` in the context is how long the caller should wait."""

    code = "too_many_requests"
    title = "Too many requests"


class QueueFull(TooManyRequests):
    code = "queue_full"
    title = "The queue is full"


class QuotaExceeded(TooManyRequests):
    code = "quota_exceeded"
    title = "Too many of your jobs are waiting or running"


class RateLimited(TooManyRequests):
    code = "rate_limited"
    title = "Too many requests from this key"


class TooManySignIns(TooManyRequests):
    code = "too_many_sign_ins"
    title = "Too many attempts to sign in"


class TooManyOwnStreams(TooManyRequests):
    code = "too_many_own_streams"
    title = "Too many of your event streams are open"


class TooManyOwnDownloads(TooManyRequests):
    code = "too_many_own_downloads"
    title = "Too many of your videos are being fetched"


class TooManyDownloads(AppError):
    code = "too_many_downloads"
    title = "Too many videos are being fetched"


class TooManyStreams(AppError):
    code = "too_many_streams"
    title = "Too many event streams are open"


class Unauthenticated(AppError):
    code = "unauthenticated"
    title = "An API key is needed"


class Forbidden(AppError):
    code = "forbidden"
    title = "This is not allowed"


class LinkRefused(Forbidden):
    code = "link_refused"
    title = "The link is not valid"


class VideoNotReady(AppError):
    code = "video_not_ready"
    title = "The job has no video"


class VideoGone(AppError):
    code = "video_gone"
    title = "The video is no longer stored"


class PictureNotMade(AppError):
    code = "picture_not_made"
    title = "The video has no such picture"


class NoPreview(AppError):
    code = "no_preview"
    title = "The job has no preview now"


class ModeNotServed(AppError):
    code = "mode_not_served"
    title = "No live worker serves this mode"


class NoLiveWorker(AppError):
    code = "no_live_worker"
    title = "No worker is live"


class WorkerNotFound(AppError):
    code = "worker_not_found"
    title = "No such worker"


class KeyNotFound(AppError):
    code = "key_not_found"
    title = "No such API key"


class KeyConflict(AppError):
    code = "key_conflict"
    title = "The API keys do not allow this now"


class StoreUnavailable(AppError):
    code = "store_unavailable"
    title = "The job store cannot be reached"


class RecordUnreadable(AppError):
    code = "record_unreadable"
    title = "A stored record cannot be read"


class ArtifactRefused(AppError):
    code = "artifact_refused"
    title = "The artifact store does not serve this address"


class ArtifactsUnavailable(AppError):
    code = "artifacts_unavailable"
    title = "The videos cannot be reached"


class ComparisonNotFound(AppError):
    code = "comparison_not_found"
    title = "No such comparison"


class ComparisonConflict(AppError):
    code = "comparison_conflict"
    title = "The comparison is in another state"


class RaterNotFound(AppError):
    code = "rater_not_found"
    title = "No such rater"


class ItemNotFound(AppError):
    code = "item_not_found"
    title = "No such pair was shown"


class AlreadyVoted(AppError):
    code = "already_voted"
    title = "This pair was answered before"


class NothingToUndo(AppError):
    code = "nothing_to_undo"
    title = "There is no answer to take back"


class PairLeftOut(AppError):
    code = "pair_left_out"
    title = "This pair cannot be judged"


class StaleAttempt(AppError):
    """Raised by every write of an attempt that no longer owns the job: stop and write nothing."""

    code = "stale_attempt"
    title = "This attempt no longer owns the job"


class GenerationCancelled(AppError):
    code = "generation_cancelled"
    title = "The generation was cancelled"


class GenerationFailed(AppError):
    code = "generation_failed"
    title = "The generation failed"


class ArtifactNotStored(GenerationFailed):
    code = "artifact_not_stored"
    title = "The video could not be stored"


class WorkerLost(GenerationFailed):
    code = "worker_lost"
    title = "The workers that ran the job were lost"


class WorkerUnfit(GenerationFailed):
    """Raised in a worker that cannot do its part of any job. The detail names no path and no host.

    The job goes back to its queue, and fails with this code only after too many such workers.
    """

    code = "worker_unfit"
    title = "The workers that ran the job were at fault"


class OutOfDeviceMemory(GenerationFailed):
    code = "out_of_device_memory"
    title = "The device ran out of memory"


class GenerationTimedOut(GenerationFailed):
    code = "generation_timed_out"
    title = "The generation took too long"


class PromptTooLong(GenerationFailed):
    code = "prompt_too_long"
    title = "The prompt has more tokens than the text encoder takes"
