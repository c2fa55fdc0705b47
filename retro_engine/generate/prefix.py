"""Prompts that were taken in before: their keys and values, and what their last chunk read, least used forgotten first.

A prompt is kept in pieces of some chunks. A piece's key is a hash of all tokens up to its end, the padding before them
and the neighbors of their chunks, so a piece is used again only where it would be computed the same; and of who asks:
the time of an answer would tell one caller what another has asked.
"""

import hashlib
import struct
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from retro_engine.model.decode_cache import DecodeCache
from retro_engine.retrieval.hit import Found


@dataclass(kw_only=True)
class _Piece:
    stop: int  # tokens up to its end
    front: list[Tensor]  # [t, g, e]: what stood in front then, keys of all decoder layers, then values
    keys_values: list[Tensor]  # [t, g, e]: keys of all decoder layers, then values
    hidden: Tensor  # [m, d] state of the open chunk
    cross: list[Tensor]  # [x, g, e]: keys of all cross-attending layers, then values
    cross_valid: Tensor  # [x]
    logits: Tensor | None  # [V] after its last token, where a prompt ended there

    @property
    def nbytes(self) -> int:
        tensors = [*self.front, *self.keys_values, self.hidden, *self.cross, self.cross_valid]
        return sum(t.nbytes for t in tensors) + (0 if self.logits is None else self.logits.nbytes)


class PrefixCache:
    """At most `max_bytes` of pieces."""

    def __init__(self, max_bytes: int, is_shared: bool = False):
        """`is_shared`: callers use each other's pieces."""
        self.max_bytes, self.nbytes, self.is_shared = max_bytes, 0, is_shared
        self.asked = self.reused = 0  # tokens of prompts, and those of them that were remembered
        self._pieces: OrderedDict[bytes, _Piece] = OrderedDict()

    def forget(self) -> None:
        """All pieces, and what was counted."""
        self._pieces.clear()
        self.nbytes = self.asked = self.reused = 0

    def restore(self, keys: list[bytes], cache: DecodeCache, row: int) -> tuple[int, Tensor | None]:
        """Put the longest known beginning into a row; return its tokens and, where it is the whole prompt, the logits."""
        known: list[_Piece] = []
        for key in keys:
            if key not in self._pieces:
                break
            known.append(self._pieces[key])
        if known and len(known) == len(keys) and known[-1].logits is None:
            known.pop()
        for key in reversed(keys[: len(known)]):  # what others build on is forgotten last
            self._pieces.move_to_end(key)
        start, everywhere = 0, (*cache.keys_BSGE, *cache.values_BSGE)
        for piece in known:
            for tensor, part in zip(everywhere, piece.keys_values):
                tensor[row, cache.origin + start : cache.origin + piece.stop] = part
            start = piece.stop
        if known:
            last, half = known[-1], len(cache.cross_keys_BXGE)
            cache.hidden_BMD[row] = last.hidden
            cross = [part[None] for part in last.cross]
            cache.put_cross([row], list(zip(cross[:half], cross[half:])), last.cross_valid[None])
            end = int(cache.pads_B[row])
            cache.begins_B[row] = begin = end - last.front[0].shape[0]
            for tensor, part in zip(everywhere, last.front):
                tensor[row, begin:end] = part
            cache.lengths_B[row] = cache.origin + start
        is_whole = bool(known) and len(known) == len(keys)
        return start, known[-1].logits if is_whole else None

    def store(
        self, keys: list[bytes], number: int, cache: DecodeCache, row: int, start: int, logits: Tensor | None
    ) -> None:
        """Keep piece `number` of a prompt, just computed in a row from token `start` on."""
        stop, width = int(cache.lengths_B[row]), cache.cross_width(row)
        everywhere = (*cache.keys_BSGE, *cache.values_BSGE)
        front = slice(int(cache.begins_B[row]), int(cache.pads_B[row]))
        piece = _Piece(
            stop=stop - cache.origin,
            front=[tensor[row, front].clone() for tensor in everywhere],
            keys_values=[tensor[row, cache.origin + start : stop].clone() for tensor in everywhere],
            hidden=cache.hidden_BMD[row].clone(),
            cross=[tensor[row, :width].clone() for tensor in (*cache.cross_keys_BXGE, *cache.cross_values_BXGE)],
            cross_valid=cache.cross_valid_BX[row, :width].clone(),
            logits=None if logits is None else logits.clone(),
        )
        old = self._pieces.pop(keys[number], None)
        self.nbytes -= 0 if old is None else old.nbytes
        if piece.nbytes > self.max_bytes:
            return
        self._pieces[keys[number]] = piece
        self.nbytes += piece.nbytes
        while self.nbytes > self.max_bytes:
            self.nbytes -= self._pieces.popitem(last=False)[1].nbytes


def keys_of(
    tokens: list[int],
    pad: int,
    found: list[Found],
    *,
    piece_tokens: int,
    piece_chunks: int,
    caller: str = "",
    is_reading: bool = False,
) -> list[bytes]:
    """The key of every piece of a caller's prompt; `found` has the neighbors of its chunks, or nothing. `is_reading`: it
    has something in front even where it found nothing.
    """
    who = caller.encode()
    digest, keys = hashlib.sha256(struct.pack("<2q?", len(who), pad, is_reading) + who), []
    for number, start in enumerate(range(0, len(tokens), piece_tokens)):
        part = tokens[start : start + piece_tokens]
        digest.update(struct.pack(f"<q{len(part)}q", len(part), *part))
        for one in found[number * piece_chunks : (number + 1) * piece_chunks]:
            digest.update(struct.pack("<2q", *one.tokens_KR.shape))
            digest.update(one.tokens_KR.tobytes() + one.lengths_K.tobytes())
        keys.append(digest.copy().digest())
    return keys
