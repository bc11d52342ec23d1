"""One job on several cards: the same latents, all of them in step, and none left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from jobs.catalog import ModeOffer
from tests.support.torchrun_ranks import JOBS, LAST, TEAMS, faults_of
from worker.distributed.follower import check_alike, lead
from worker.errors import RanksUnlike
from worker.model_loader.loader import Mode

ROOT = Path(__file__).resolve().parents[3]
ENDS = {
    "the leader is told to stop": "GenerationCancelled",
    "a follower's memory is full": "OutOfMemoryError",
    "the leader's memory is full": "MemoryError",
    "a follower fails": "RankFailed",
}


@pytest.fixture(scope="module")
def made(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the crew of `card_crew` leaves behind; nobody of it does."""
    folder = tmp_path_factory.mktemp("crew")
    command = [sys.executable, "-m", "tests.support.torchrun_ranks", str(config_file), str(folder)]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        crew = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            assert crew.wait(240) == 0, (folder / "log").read_text()
            yield folder
        finally:
            with suppress(ProcessLookupError):
                os.killpg(crew.pid, signal.SIGKILL)
            crew.wait()


def latents(made: Path, cards: int, name: str) -> np.ndarray:
    read: np.ndarray = np.load(made / str(cards) / f"{name}.npy")
    return read


Kind = tuple[str, str | None, str | None]


def test_cards_on_different_kernels_are_refused() -> None:
    fine: Kind = ("w8a8", "cuda", None)
    slow: Kind = ("w8a8", "eager", "Its compiler is missing.")
    check_alike([[fine], [fine]])
    check_alike([[slow], [slow]])  # which the leader's offer says
    for cards in ([[fine], [fine], [slow]], [[slow], [fine]]):
        with pytest.raises(RanksUnlike, match=r"'w8a8' runs on .* Its compiler is missing\. Give"):
            check_alike(cards)


class Unlike:
    """As far as the sharing out asks the other cards: their compilers are missing."""

    def ask_all(self, value: list[Kind]) -> list[list[Kind]]:
        slow: list[Kind] = [(name, "eager", "A compiler is missing.") for name, _, _ in value]
        return [value, slow]


def test_cards_are_compared_before_they_share_anything() -> None:
    offer = ModeOffer(name="w8a8", description="d", kernels="cuda")
    mode = Mode(offer, cast(Any, "no transformer"), None, 0)
    with pytest.raises(RanksUnlike, match="on eager kernels on card 1 and on cuda on card 0"):
        lead(cast(Any, Unlike()), [mode])


@pytest.mark.parametrize("cards", TEAMS)
@pytest.mark.parametrize("job", JOBS)
def test_the_latents_are_those_of_one_card_to_the_last_bit(
    made: Path, cards: int, job: str
) -> None:
    assert latents(made, 1, job).std() > 0.1
    assert np.array_equal(latents(made, cards, job), latents(made, 1, job))


@pytest.mark.parametrize(
    ("cards", "fault"), [(cards, fault) for cards in TEAMS for fault in faults_of(cards)]
)
def test_a_job_ends_on_all_cards_and_the_next_one_is_whole(
    made: Path, cards: int, fault: str
) -> None:
    ended = json.loads((made / str(cards) / "ended.json").read_text())
    assert ended[fault] == [ENDS[fault], False]
    assert np.array_equal(latents(made, cards, f"after {fault}"), latents(made, 1, "tiny"))


@pytest.mark.parametrize("cards", TEAMS)
def test_a_card_that_dies_takes_the_others_with_it(made: Path, cards: int) -> None:
    ended = json.loads((made / str(cards) / "ended.json").read_text())
    assert ended[LAST] == ["RanksLost", True]
    statuses = json.loads((made / str(cards) / "statuses.json").read_text())
    assert statuses == [0, *[83] * (cards - 2), -signal.SIGKILL]
