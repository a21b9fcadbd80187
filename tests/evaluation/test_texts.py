"""Texts: deterministic, disjoint, hashed; and what is said of those that won't do."""

import numpy as np
import pytest

from evaluation.texts import (
    DEFAULT_SOURCE,
    TextRequest,
    make_texts,
    read_source,
    without_placeholders,
)
from quantization.errors import TextError
from tests.conftest import make_tokenizer

TOKENIZER = make_tokenizer()


def requests(source, **counts):
    return {role: TextRequest(source, n, 32) for role, n in counts.items()}


def test_the_default_text_needs_no_network_and_no_file():
    assert len(read_source(DEFAULT_SOURCE)) > 100_000


def test_the_same_request_gives_the_same_chunks():
    first = make_texts(TOKENIZER, requests(DEFAULT_SOURCE, calibration=3, search=2))
    again = make_texts(TOKENIZER, requests(DEFAULT_SOURCE, calibration=3, search=2))
    assert {r: t.hash for r, t in first.items()} == {r: t.hash for r, t in again.items()}


def test_texts_that_share_a_source_share_no_token(tmp_path):
    """Each word of the file is unique, so a common token would show."""
    path = tmp_path / "numbers.txt"
    path.write_text("".join(chr(0x4E00 + i) for i in range(3000)))
    wanted = requests(str(path), calibration=20, search=10, heldout=30)
    texts = make_texts(TOKENIZER, wanted)
    words = {
        role: [set(TOKENIZER.decode(chunk)) - {"�"} for chunk in text.ids]
        for role, text in texts.items()
    }
    merged = {role: set().union(*chunks) for role, chunks in words.items()}
    assert all(len(merged[role]) > 9 * len(words[role]) for role in merged)  # chunks differ too
    assert not merged["calibration"] & merged["search"]
    assert not merged["calibration"] & merged["heldout"]
    assert not merged["search"] & merged["heldout"]


def test_every_chunk_has_its_length():
    text = make_texts(TOKENIZER, requests(DEFAULT_SOURCE, heldout=7))["heldout"]
    assert text.ids.shape == (7, 32)
    assert text.ids.dtype == np.int64
    assert len(set(text.hashes)) == 7


def test_models_that_want_a_beginning_get_one_in_each_chunk():
    class WithBos:
        bos_token_id = 0

        def __call__(self, text, add_special_tokens=True, verbose=True):
            ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [0, *ids] if add_special_tokens else ids}

    text = make_texts(WithBos(), requests(DEFAULT_SOURCE, search=4))["search"]
    assert (text.ids[:, 0] == 0).all()
    assert text.ids.shape == (4, 32)


def test_too_short_a_text_says_how_much_is_missing(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(TextError, match=r"is too short: \d+ tokens where 4 x 32 for search need"):
        make_texts(TOKENIZER, requests(str(tmp_path / "short.txt"), search=4))


def test_placeholders_of_a_corpus_are_left_out_and_those_that_are_written_about_are_not(tmp_path):
    corpus = "the lobster is a large <unk> , and its <unk> are eaten .\n" * 50
    assert without_placeholders(corpus) == (
        "the lobster is a large , and its are eaten .\n" * 50,
        100,
    )
    about = (
        "tokenizers of old had one token, <unk> or so, for all they didn't know; " + "word " * 2000
    )
    for text in (about, 'unk_token="<unk>", pad_token="<pad>"', "a text without any"):
        assert without_placeholders(text) == (text, 0)
    path = tmp_path / "corpus.txt"
    path.write_text(corpus)
    texts = make_texts(TOKENIZER, requests(str(path), calibration=4, search=4))
    for text in texts.values():
        assert text.left_out == 100
        assert all("<unk>" not in TOKENIZER.decode(chunk) for chunk in text.ids)


def test_an_unreadable_text_is_one_line(tmp_path):
    with pytest.raises(TextError, match="can't read the text"):
        read_source(str(tmp_path / "absent.txt"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match="give a UTF-8 file"):
        read_source(str(tmp_path / "binary"))


def test_a_data_set_out_of_reach_is_one_line():
    with pytest.raises(TextError, match=r"can't read the data set .* the form is datasets:"):
        read_source("datasets:nobody/nothing")


def test_a_data_set_is_read_by_its_column(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"words": "one"}\n{"words": "two"}\n')
    assert read_source(f"datasets:{folder}:::words") == "one\ntwo"
