"""A tokenizer of a real one's size and kind, with words that mean nothing.

What a start takes depends on it: UMT5's `tokenizer.json` has 256,300 tokens in 17 MB. This writes
such a file, a Unigram model over the scripts of several languages, and beside it a configuration
like that in diffusers' Wan folders.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SPACE = "▁"
SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")
EXTRA_IDS = 300
LATIN = "abcdefghijklmnopqrstuvwxyz"
SCRIPTS = (("а", "я"), ("一", "龥"), ("ぁ", "ゖ"), ("א", "ת"), ("ء", "ي"))
LETTERS = {first: [chr(n) for n in range(ord(first), ord(last) + 1)] for first, last in SCRIPTS}
LATIN_SHARE, WORD_START_SHARE = 0.6, 0.5
LONGEST = 14


def write_tokenizer(folder: Path, tokens: int, seed: int) -> None:
    """Write `tokenizer.json` and its configuration, of `tokens` tokens, into a new folder."""
    words = list(islice(_words(random.Random(seed)), tokens - len(SPECIAL) - EXTRA_IDS))
    vocabulary = [(token, 0.0) for token in SPECIAL]
    # The commoner the earlier, as trained ones are.
    vocabulary += [(word, -5.0 - 10.0 * rank / len(words)) for rank, word in enumerate(words)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL.index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement=SPACE)]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))]
    )
    extra = [f"<extra_id_{number}>" for number in reversed(range(EXTRA_IDS))]
    tokenizer.add_special_tokens([*SPECIAL, *extra])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = _config(tokenizer, extra)
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _words(dice: random.Random) -> Iterator[str]:
    """Every printable ASCII character, every letter, then words, none twice."""
    letters = [letter for script in LETTERS.values() for letter in script]
    single = chain([SPACE], map(chr, range(33, 127)), letters)
    known: set[str] = set()
    for word in chain(single, _random_words(dice)):
        if word not in known:
            known.add(word)
            yield word


def _random_words(dice: random.Random) -> Iterator[str]:
    scripts = list(LETTERS.values())
    while True:
        script = LATIN if dice.random() < LATIN_SHARE else dice.choice(scripts)
        length = max(2, min(LONGEST, round(dice.gauss(6, 3))))
        start = SPACE if dice.random() < WORD_START_SHARE else ""
        yield start + "".join(dice.choices(script, k=length))


def _config(tokenizer: Tokenizer, extra: list[str]) -> dict[str, Any]:
    return {
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in (*SPECIAL, *extra)
        },
        "additional_special_tokens": extra,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": True,
        "eos_token": "</s>",
        "extra_ids": EXTRA_IDS,
        "model_max_length": 512,
        "pad_token": "<pad>",
        "tokenizer_class": "T5Tokenizer",
        "unk_token": "<unk>",
    }
