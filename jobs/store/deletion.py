"""Delete a job for good: its videos, and all that is known of it."""

from jobs.artifacts.store import ArtifactStore, artifact_key
from jobs.store.job_store import JobStore


def delete_job(store: JobStore, artifacts: ArtifactStore, job_id: str) -> bool:
    """Delete a job and its videos; says whether it is gone for good now.

    False for a running one: it is asked to stop, nobody can read it any more, and its id will be in
    `keys.DELETIONS` once it has ended; then this has to be called again. It may be repeated, also
    after an error.

    Raises:
        ArtifactsUnavailable: the videos cannot be reached. The record, without which nobody would
            know of them, is still there.
    """
    _delete_videos(artifacts, job_id)
    gone = store.purge(job_id)
    if gone:
        # An attempt may have put its video and ended since the first look.
        _delete_videos(artifacts, job_id)
    return gone


def _delete_videos(artifacts: ArtifactStore, job_id: str) -> None:
    """Every attempt's: one that was lost may have left a video that no record names."""
    folder, _, _ = artifact_key(job_id, "1").rpartition("/")
    for stored in list(artifacts.list(folder)):
        artifacts.delete(stored.key)
