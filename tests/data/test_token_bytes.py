"""Bytes of tokens: byte-level vocabularies, single bytes of others, control tokens."""

import pytest

from retro_engine.data.token_bytes import TokenBytes
from retro_engine.data.tokenizer import EOD, PAD, Tokenizer

TEXTS = ["wörter", "日本語", "🙂🙃", "a\tb\n c", "\u00a0é\u0301", "\x00\x7f"]


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return Tokenizer.train(["river stone " * 4], 300)


def test_a_text_is_the_bytes_of_its_tokens(byte_level: Tokenizer) -> None:
    known = TokenBytes(byte_level)
    for text in TEXTS:
        ids = byte_level.encode(text)
        parts = [known.of(i, byte_level.decode([i])) for i in ids]
        assert b"".join(parts) == text.encode()
        assert all(parts)


def test_every_byte_has_its_token(byte_level: Tokenizer) -> None:
    known = TokenBytes(byte_level)
    found = {known.of(i, byte_level.decode([i])) for i in range(byte_level.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= found
    assert {EOD.encode(), PAD.encode()} <= found


def test_bytes_of_a_vocabulary_with_byte_fallback() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    vocab = {"</s>": 0, "\u2581a": 1, "é": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(backend.to_str())
    known = TokenBytes(tokenizer)
    ids = tokenizer.encode("é日")
    assert b"".join(known.of(i, tokenizer.decode([i])) for i in ids) == "é日".encode()
    assert known.of(1, " a") == b" a"
