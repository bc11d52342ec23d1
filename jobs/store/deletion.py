"""Delete a job permanently: its videos, their pictures, and everything about it in Redis."""

from jobs.artifacts.store import ArtifactStore, artifact_key
from jobs.store.job_store import JobStore


def delete_job(store: JobStore, artifacts: ArtifactStore, job_id: str) -> bool:
    """Delete a job, its videos and their pictures; return whether that is complete.

    For a running job it returns False: the job is cancelled and can no longer be read. Its id is
    put into `redis_keys.DELETIONS` once it has ended, and then this has to be called again. Calls
    may be repeated, also after an error.

    Raises:
        ArtifactsUnavailable: the artifact store does not respond. The record, without which the
            videos could not be found again, is kept.
    """
    _delete_videos(artifacts, job_id)
    gone = store.purge(job_id)
    if gone:
        # An attempt may have stored its video and ended since the first deletion.
        _delete_videos(artifacts, job_id)
    return gone


def _delete_videos(artifacts: ArtifactStore, job_id: str) -> None:
    """Delete the files of every attempt: a lost one may have left some that no record names."""
    folder, _, _ = artifact_key(job_id, "1").rpartition("/")
    for stored in list(artifacts.list(folder)):
        artifacts.delete(stored.key)
