"""Text of a continuation: the text of all less the text of the prompt, for every kind of tokenizer."""

import pytest
from tokenizer_helpers import KINDS, llama2

from retro_engine.generate.detokenizer import Detokenizer

TEXT = "The castle was built in 1302 by Adelheid, near the river. A café 城 🏰 end"


@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_of_a_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode(TEXT)
    whole = tokenizer.decode(ids)
    for cut in range(len(ids)):
        stream = Detokenizer(tokenizer, ids[:cut])
        said = "".join(stream.push([i]) for i in ids[cut:]) + stream.push([], is_last=True)
        before = tokenizer.decode(ids[:cut])
        is_whole = whole.startswith(before)  # else the prompt ends within a character, which comes with its rest
        assert said == whole[len(before) if is_whole else len(before.rstrip("\ufffd")) :], (cut, before)
        assert stream.length == len(said)
    assert Detokenizer(tokenizer).push(ids) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_of_a_text(kind: str) -> None:
    """What a token adds, and where it begins."""
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode("The castle was built near the river")
    pieces = [tokenizer.decode(ids[:1]), *tokenizer.pieces(ids[1:])]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert tokenizer.pieces(ids[1:]) == pieces[1:]


def test_half_a_character_is_held_back() -> None:
    tokenizer = llama2()
    first, *rest = tokenizer.encode("The \u57ce")
    stream = Detokenizer(tokenizer, [first])
    said = [stream.push([i]) for i in rest]
    assert "".join(said) == " \u57ce"
    assert said[-3:] == ["", "", "\u57ce"]


def test_bytes_that_make_no_character() -> None:
    """They change nothing of the text before them, which was whole."""
    tokenizer = llama2()
    byte, word = tokenizer.encode("\u57ce")[-1], tokenizer.encode("The castle")[-1]
    stream = Detokenizer(tokenizer, tokenizer.encode("The \u57ce"))
    assert stream.push([byte]) == ""
    assert stream.push([], is_last=True) == "\ufffd"
    stream = Detokenizer(tokenizer, tokenizer.encode("The \u57ce"))
    assert [stream.push([byte]), stream.push([byte]), stream.push([word])] == ["", "", "\ufffd\ufffd castle"]


def test_control_tokens_before_the_first_word() -> None:
    tokenizer = llama2()
    ids = tokenizer.encode("The castle was")
    assert tokenizer.bos_id is not None
    stream = Detokenizer(tokenizer, [tokenizer.bos_id])
    assert "".join(stream.push([i]) for i in ids) == "The castle was"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_a_text_after_another(kind: str) -> None:
    tokenizer = KINDS[kind]()
    before, after = tokenizer.encode("The castle"), tokenizer.encode("The castle was built")
    ids, places = tokenizer.encode_after("The castle", " was built")
    assert [*before, *ids] == after
    assert places[-1][1] == len(" was built")
