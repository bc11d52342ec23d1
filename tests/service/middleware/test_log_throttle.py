"""Test that what strangers can cause to be logged is bounded, and nothing else is."""

import logging

import pytest

from service.middleware.log_throttle import EVERY_S, MOST, LogThrottle


def test_lines_that_begin_alike_are_bounded_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    logger = logging.getLogger("noisy.of.this.test")
    throttle = LogThrottle(lambda: now)
    logger.addFilter(throttle)
    with caplog.at_level(logging.INFO):
        for number in range(1000):
            logger.error("cannot accept\nsocket %d", number)
            logger.warning("another kind") if number < 3 else None
        now = EVERY_S
        logger.error("cannot accept\nsocket %d", 1000)
        now = 2 * EVERY_S
        logger.error("cannot accept\nsocket %d", 1001)
    logger.removeFilter(throttle)
    assert caplog.messages.count("another kind") == 3
    accepts = [each for each in caplog.messages if each.startswith("cannot accept")]
    assert len(accepts) == MOST + 2
    assert (
        accepts[-2] == f"cannot accept\nsocket 1000 ({1000 - MOST} more like this were not logged)"
    )
    assert accepts[-1] == "cannot accept\nsocket 1001"
