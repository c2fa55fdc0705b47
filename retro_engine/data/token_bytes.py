"""The bytes that each token stands for, also where they are a part of a character only."""

import json

from retro_engine.data.tokenizer import Tokenizer

HALF = "\ufffd"


class TokenBytes:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self._backend = tokenizer.backend
        described = json.loads(tokenizer.json)
        decoder = json.dumps(described.get("decoder"))
        self._alphabet = _alphabet() if '"ByteLevel"' in decoder else None
        self._has_bytes = '"ByteFallback"' in decoder or bool((described.get("model") or {}).get("byte_fallback"))
        self._added = {index: token.content for index, token in self._backend.get_added_tokens_decoder().items()}

    def of(self, token: int, text: str) -> bytes:
        """`text` is what the token adds alone, which is its bytes unless they are half a character or a control token's."""
        if text and HALF not in text:
            return text.encode()
        if token in self._added:
            return self._added[token].encode()
        piece: str = self._backend.id_to_token(token) or ""
        if self._alphabet is not None and all(character in self._alphabet for character in piece):
            return bytes(self._alphabet[character] for character in piece)
        if self._has_bytes and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return text.encode()


def _alphabet() -> dict[str, int]:
    """The byte of each character of byte-level vocabularies: itself where it can be printed, else one from 256 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}
