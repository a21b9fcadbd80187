"""Texts: where they come from and how they become chunks of tokens with a hash each.

Calibration, search and held-out text are three different texts. Where a job names one source for
several of them, each gets a contiguous region of its own, and its chunks are spread evenly over
that region, so that neighbouring sentences never fall into two of them.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantization.errors import TextError

DEFAULT_SOURCE = "python-docs"
DATASET_PREFIX = "datasets:"
LONGEST_TEXT_CHARACTERS = 20_000_000
PLACEHOLDER = re.compile(r" ?(?<!\S)<unk>(?!\S)")  # a word of its own
FREQUENT = 1e-3  # placeholders by words, from which on they are a corpus's and not a text's own


@dataclass(frozen=True)
class TextRequest:
    """What a job asks for: a source and how much of it."""

    source: str
    chunks: int
    length: int


@dataclass(frozen=True)
class Text:
    """Chunks of token ids.

    Args:
        ids: chunks x length, int64; begins with the tokenizer's BOS where it adds one.
        hashes: SHA-256 of each chunk's ids; measurements are keyed by them.
        left_out: placeholders that the whole source had.
    """

    source: str
    ids: NDArray[np.int64]
    hashes: tuple[str, ...]
    left_out: int = 0

    @property
    def hash(self) -> str:
        """One hash over all chunks, in order."""
        return hashlib.sha256("".join(self.hashes).encode()).hexdigest()


def read_source(source: str) -> str:
    """The characters of a source.

    Args:
        source: `python-docs` (Python's own language reference, no network), a file's path, or
            `datasets:ID[:CONFIG[:SPLIT[:COLUMN]]]` of the Hugging Face hub.

    Raises:
        TextError: no such source, not readable, or not UTF-8.
    """
    if source == DEFAULT_SOURCE:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    if source.startswith(DATASET_PREFIX):
        return _read_dataset(source)
    try:
        return Path(source).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(
            f"can't read the text '{source}' ({error}); give a UTF-8 file, "
            f"'{DATASET_PREFIX}ID:CONFIG:SPLIT:COLUMN' or '{DEFAULT_SOURCE}'"
        ) from error


def without_placeholders(text: str) -> tuple[str, int]:
    """A text without the `<unk>` that stand for rare words in corpora of old (WikiText without "raw").

    Nobody serves them, and a tokenizer of today makes three tokens of each (15 % of all tokens of
    WikiText-2's validation split), which bend the gradients of a quantized model away from those on
    text of the same kind without them.

    Returns:
        The text, and how many were left out; none where they are as rare as words that are written about.
    """
    if "<unk>" not in text:
        return text, 0
    shorter, found = PLACEHOLDER.subn("", text)
    if found <= FREQUENT * (1 + text.count(" ")):
        return text, 0
    return shorter, found


def make_texts(
    tokenizer: Any, requests: Mapping[str, TextRequest], *, as_written: bool = False
) -> dict[str, Text]:
    """Tokenize the requests, each in a region of its own; deterministic.

    Placeholders are left out, but for texts of jobs that read them `as_written`.

    Raises:
        TextError: a source that can't be read, or that is too short for its chunks.
    """
    texts: dict[str, Text] = {}
    for source in dict.fromkeys(request.source for request in requests.values()):
        written, left_out = read_source(source), 0
        if not as_written:
            written, left_out = without_placeholders(written)
        ids = _tokenize(tokenizer, written)
        bos = _beginning(tokenizer)
        sharing = {role: r for role, r in requests.items() if r.source == source}
        wanted = {role: r.chunks * (r.length - len(bos)) for role, r in sharing.items()}
        if sum(wanted.values()) > len(ids):
            uses = ", ".join(f"{r.chunks} x {r.length} for {role}" for role, r in sharing.items())
            raise TextError(
                f"the text '{source}' is too short: {len(ids)} tokens where {uses} need "
                f"{sum(wanted.values())}; give a longer text, or fewer or shorter chunks"
            )
        start = 0
        for role, request in sharing.items():
            end = start + len(ids) * wanted[role] // sum(wanted.values())
            texts[role] = replace(_spread(source, ids[start:end], request, bos), left_out=left_out)
            start = end
    return {role: texts[role] for role in requests}


def consecutive(tokenizer: Any, request: TextRequest) -> Text:
    """The first chunks of a source, one right after the other, as most benchmarks take them.

    With whatever placeholders it has, so that figures compare with those of others.

    Raises:
        TextError: a source that can't be read, or that is too short.
    """
    ids = _tokenize(tokenizer, read_source(request.source))
    bos = _beginning(tokenizer)
    length = request.length - len(bos)
    if len(ids) < request.chunks * length:
        raise TextError(
            f"the text '{request.source}' is too short: {len(ids)} tokens where {request.chunks} x "
            f"{request.length} need {request.chunks * length}; give fewer or shorter chunks"
        )
    return _spread(request.source, ids[: request.chunks * length], request, bos)


def _spread(
    source: str, region: NDArray[np.int64], request: TextRequest, bos: NDArray[np.int64]
) -> Text:
    """Chunks at even distances over the region."""
    length = request.length - len(bos)
    starts = np.linspace(0, len(region) - length, request.chunks).astype(np.int64)
    chunks = np.stack([np.concatenate([bos, region[s : s + length]]) for s in starts])
    hashes = tuple(hashlib.sha256(c.astype("<i8").tobytes()).hexdigest() for c in chunks)
    return Text(source, chunks, hashes)


def _tokenize(tokenizer: Any, text: str) -> NDArray[np.int64]:
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return np.asarray(encoded["input_ids"], dtype=np.int64)


def _beginning(tokenizer: Any) -> NDArray[np.int64]:
    """The BOS token if the tokenizer puts one in front of a text, else nothing."""
    first = tokenizer("a")["input_ids"][:1]
    starts = bool(first) and first[0] == tokenizer.bos_token_id
    return np.asarray(first if starts else [], dtype=np.int64)


def _read_dataset(source: str) -> str:
    name, *rest = source.removeprefix(DATASET_PREFIX).split(":")
    config, split, column = (*rest, *("", "", "")[len(rest) :])[:3]
    try:
        from datasets import load_dataset

        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        pieces, characters = [], 0
        for row in rows:
            pieces.append(row[column or "text"])
            characters += len(pieces[-1])
            if characters > LONGEST_TEXT_CHARACTERS:
                break
    except Exception as error:  # datasets raises whatever its many readers do
        raise TextError(
            f"can't read the data set '{source}' ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:200]}); "
            f"the form is {DATASET_PREFIX}ID:CONFIG:SPLIT:COLUMN"
        ) from error
    return "\n".join(pieces)
