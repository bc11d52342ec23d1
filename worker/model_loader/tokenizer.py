"""Read a model's tokenizer from its `tokenizer.json`, exactly as that file describes it.

UMT5's has 256,300 tokens in 17 MB, and the library holds the GIL while it reads them
(docs/decisions/014).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jobs.catalog import tokenizer_fingerprint
from worker.errors import ModelUnusable
from worker.model_loader.component_files import TOKENIZER, check_files, read_json

CONFIG = "tokenizer_config.json"
T5_PADDING = "<pad>"


@dataclass(frozen=True, slots=True)
class ModelTokenizer:
    """A tokenizer and its source.

    Attributes:
        tokenize: the callable for diffusers' pipelines. Its only named special token is padding.
        text: the content of tokenizer.json, UTF-8; the service counts the same tokens with it.
        fingerprint: the name of `text` in the catalog.
    """

    tokenize: PreTrainedTokenizerBase
    text: bytes = field(repr=False)
    fingerprint: str


def read_tokenizer(folder: Path) -> ModelTokenizer:
    """Read the tokenizer in `folder`.

    The class that its configuration names (`T5Tokenizer`) is not used: it builds a new tokenizer
    from the file's vocabulary, which takes four times as long and has another unknown token. Nor is
    `from_pretrained`, which in some versions reads the file twice.

    Only the padding token is taken from the configuration. Padding is always on the right, as the
    pipeline needs it, and no text is truncated.

    Raises:
        ModelUnusable: names the file that is missing or cannot be read; or no file says which token
            of the vocabulary is for padding.
    """
    check_files(folder, TOKENIZER)
    file, config_file = folder / TOKENIZER, folder / CONFIG
    try:
        text = file.read_bytes()
        # Without these two arguments, the library would take the file's own padding settings.
        tokenize = PreTrainedTokenizerFast(
            tokenizer_file=str(file), padding_side="right", pad_token=None
        )
        padding = tokenize.backend_tokenizer.padding or {}
        tokenize("a")  # some broken files fail only here
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's Rust panics are no Exceptions
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelUnusable(f"The model file {file} cannot be read: {reason}") from error
    config = read_json(config_file) if config_file.is_file() else {}
    pad_token = config.get("pad_token") or padding.get("pad_token") or T5_PADDING
    tokenize.pad_token = _checked_padding(tokenize, pad_token, file)
    return ModelTokenizer(tokenize, text, tokenizer_fingerprint(text))


def _checked_padding(tokenize: PreTrainedTokenizerBase, pad_token: object, file: Path) -> str:
    """Return the padding token, or refuse one that the file lacks.

    The library would add it to the vocabulary, beyond the rows of the embedding.
    """
    # Some configurations have an object around the text.
    token = pad_token.get("content") if isinstance(pad_token, dict) else pad_token
    if not isinstance(token, str) or tokenize.backend_tokenizer.token_to_id(token) is None:
        raise ModelUnusable(
            f"{file} has no token {token!r} to pad with: name one that it has as pad_token in "
            f"{file.parent / CONFIG}"
        )
    return token
