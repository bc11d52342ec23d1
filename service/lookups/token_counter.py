"""Count the tokens of a prompt as a model's worker will count them.

Workers publish their tokenizers as text (`jobs.catalog`). This module parses them with the
`tokenizers` library, which needs no torch, and keeps the last few in memory. A prompt is cleaned
first, as diffusers' Wan pipeline cleans it, so that the count is the worker's.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice
from typing import Final

from redis import Redis
from tokenizers import Tokenizer

from jobs import catalog
from jobs.text_rules import cleaned

logger = logging.getLogger(__name__)

MAX_TOKENIZERS: Final = 2
"""Tokenizers in memory: one in use, one for a change of models. A large one takes 0.7 GB."""


class TokenCounter:
    """Counts tokens with the tokenizers that live offers name. Safe to share between threads."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._kept: OrderedDict[str, Tokenizer | None] = OrderedDict()
        self._prepared: set[str] = set()
        self._lock = threading.Lock()

    def prepare(self, fingerprints: Iterable[str]) -> None:
        """Parse one of the tokenizers that live offers name, before a request waits for it.

        Parsing a large tokenizer takes a second or more, in which no other thread of the process
        runs. So a call parses at most one. Only the first `MAX_TOKENIZERS` are prepared, each once:
        one that was evicted is parsed again when a request needs it. Redis errors are raised.
        """
        for fingerprint in islice(dict.fromkeys(fingerprints), MAX_TOKENIZERS):
            if fingerprint in self._prepared:
                continue
            with self._lock:
                is_kept = self._keep(fingerprint)
            if is_kept:
                self._prepared.add(fingerprint)
                return

    def count(self, fingerprint: str, text: str) -> int | None:
        """Count the tokens of `text`, with the end-of-sequence token.

        Return None if the tokenizer is not in Redis or cannot be parsed. Only the worker checks the
        length then, later. Redis errors are raised.
        """
        tokenizer = self._tokenizer(fingerprint)
        return None if tokenizer is None else len(tokenizer.encode(cleaned(text)).ids)

    def _tokenizer(self, fingerprint: str) -> Tokenizer | None:
        # One thread at a time: parsing a large tokenizer takes seconds, and once is enough.
        with self._lock:
            if not self._keep(fingerprint):
                logger.warning("Tokenizer %s is not in Redis: no tokens counted.", fingerprint)
                return None
            return self._kept[fingerprint]

    def _keep(self, fingerprint: str) -> bool:
        """Cache a tokenizer as the last to be evicted; return False if Redis does not have it."""
        if fingerprint not in self._kept:
            text = catalog.read_tokenizer(self._redis, fingerprint)
            if text is None:
                return False
            self._kept[fingerprint] = _read(fingerprint, text)
        self._kept.move_to_end(fingerprint)
        while len(self._kept) > MAX_TOKENIZERS:
            self._kept.popitem(last=False)
        return True


def _read(fingerprint: str, text: str) -> Tokenizer | None:
    try:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.encode("a")  # some broken ones fail only here
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic in the library is not an Exception
        logger.exception("Tokenizer %s cannot be read: no tokens counted.", fingerprint)
        return None
    # A file may configure truncation or padding; here all tokens of the text count, and no others.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
