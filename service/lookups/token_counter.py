"""How many tokens a text has for a model, without the model.

Workers publish their tokenizers as text (`jobs.catalog`); this module reads them with the
`tokenizers` library, which needs no torch, and keeps the last few. A text is cleaned first as
diffusers' Wan pipeline cleans it, so the count is the one the worker comes to.
"""

import html
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice
from typing import Final

import ftfy
from redis import Redis
from tokenizers import Tokenizer

from jobs import catalog

logger = logging.getLogger(__name__)

MOST_KEPT: Final = 2
"""Tokenizers in memory: one in use, one for a change of models. A large one takes 0.7 GB."""


class TokenCounter:
    """Counts tokens with the tokenizers that live offers name. Safe to share between threads."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._kept: OrderedDict[str, Tokenizer | None] = OrderedDict()
        self._prepared: set[str] = set()
        self._lock = threading.Lock()

    def prepare(self, fingerprints: Iterable[str]) -> None:
        """Read one of the tokenizers that live offers name, before a request waits for it.

        The library lets nothing else of the process run while it reads a large one, for a second or
        more. So it is one at a time, no more than are kept, and each once: what had to go for
        another's sake comes back when it is needed. Redis errors pass through.
        """
        for fingerprint in islice(dict.fromkeys(fingerprints), MOST_KEPT):
            if fingerprint in self._prepared:
                continue
            with self._lock:
                there = self._keep(fingerprint)
            if there:
                self._prepared.add(fingerprint)
                return

    def count(self, fingerprint: str, text: str) -> int | None:
        """Count the tokens of `text`, the closing one included.

        None where the tokenizer is not in Redis or cannot be read: then the worker's own check,
        which comes later, has to do. Redis errors pass through.
        """
        tokenizer = self._tokenizer(fingerprint)
        return None if tokenizer is None else len(tokenizer.encode(cleaned(text)).ids)

    def _tokenizer(self, fingerprint: str) -> Tokenizer | None:
        # One reader at a time: reading a large tokenizer takes seconds, and once is enough.
        with self._lock:
            if not self._keep(fingerprint):
                logger.warning("Tokenizer %s is not in Redis: no tokens counted.", fingerprint)
                return None
            return self._kept[fingerprint]

    def _keep(self, fingerprint: str) -> bool:
        """Have it among those that are kept, the last to go; False if it is not in Redis."""
        if fingerprint not in self._kept:
            text = catalog.read_tokenizer(self._redis, fingerprint)
            if text is None:
                return False
            self._kept[fingerprint] = _read(fingerprint, text)
        self._kept.move_to_end(fingerprint)
        while len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return True


def cleaned(text: str) -> str:
    """Clean a prompt as diffusers' `prompt_clean` for Wan does."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def _read(fingerprint: str, text: str) -> Tokenizer | None:
    try:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.encode("a")  # some broken ones show here
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # the library's panics are no Exceptions
        logger.exception("Tokenizer %s cannot be read: no tokens counted.", fingerprint)
        return None
    # A file may ask to cut or to pad what it encodes; here everything counts, and nothing else.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
