"""Test when a call is repeated, and when not."""

import time
from email.utils import formatdate

import pytest

from jobs.store.webhook_outbox import Outcome
from service.webhooks.delivery import Schedule
from service.webhooks.sender import Answer

EXACT = Schedule(jitter=0)


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_success(status: int) -> None:
    assert EXACT.outcome(Answer(status), 3) == Outcome(status)


@pytest.mark.parametrize("status", [100, 301, 302, 307, 308, 400, 401, 404, 429, 500, 503])
def test_anything_else_is_repeated(status: int) -> None:
    outcome = EXACT.outcome(Answer(status), 0)
    assert outcome.status == status
    assert outcome.error is not None
    assert str(status) in outcome.error
    assert outcome.retry_in_s == 5


def test_redirects_are_said_to_be_ignored() -> None:
    assert "redirects are not followed" in str(EXACT.outcome(Answer(302), 0).error)


def test_gone_is_final() -> None:
    outcome = EXACT.outcome(Answer(410, retry_after="5"), 0)
    assert outcome.retry_in_s is None
    assert outcome.error is not None


def test_pauses_grow_and_then_it_is_given_up() -> None:
    fault = Answer(error="no connection")
    pauses = [EXACT.outcome(fault, tries).retry_in_s for tries in range(8)]
    assert pauses == [5, 30, 120, 600, 3600, 21600, None, None]
    assert EXACT.outcome(fault, 0).error == "no connection"


def test_pauses_are_spread() -> None:
    pauses = {Schedule().outcome(Answer(500), 1).retry_in_s for _ in range(50)}
    assert len(pauses) > 10
    assert all(pause is not None and 24 <= pause <= 36 for pause in pauses)


def test_a_receiver_may_ask_for_patience_within_bounds() -> None:
    def pause(retry_after: str, tries: int = 0) -> float | None:
        return EXACT.outcome(Answer(503, retry_after=retry_after), tries).retry_in_s

    assert pause("20") == 20
    assert pause("1") == 5
    assert pause("86400") == 3600
    assert pause("9" * 400) == 3600
    assert pause("60", tries=5) == 21600
    assert pause("60", tries=6) is None
    assert pause(formatdate(time.time() + 100, usegmt=True)) == pytest.approx(100, abs=5)
    assert pause(formatdate(time.time() - 100, usegmt=True)) == 5
    for nonsense in ("soon", "-5", "", "1.5", "²", "Thu, 99 Nov 2026 00:00:00 GMT"):
        assert pause(nonsense) == 5
