"""Sequences of different lengths in the rows of one cache: what `Generator.generate_all` and the engine share.

Letters: T prompt tokens, M chunk length, V vocabulary.
"""

import contextlib
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from retro_engine.generate import drafts
from retro_engine.generate.free_cores import FreeCores
from retro_engine.generate.prefix import PrefixCache, keys_of
from retro_engine.generate.request import Event
from retro_engine.generate.sequence import DecodingSequence, stacked
from retro_engine.model import ops
from retro_engine.model.decode_cache import new_cache
from retro_engine.model.decode_prefix import read_in_front
from retro_engine.model.decoding import decode_one, prefill
from retro_engine.model.encodings import Encodings
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.hit import Found

PIECE_CHUNKS = 4  # of a prompt, taken in at once, where its pieces are kept for other prompts
ALONE_CHUNKS = 8  # where they are not: products of more rows are faster


class DecodingBatch:
    """Sequences that decode together, each in a row of the cache, and one that joins them piece by piece."""

    def __init__(
        self,
        model: RetroModel,
        pad_id: int,
        size: int,
        capacity: int,
        neighbor_tokens: int,
        deterministic: bool = False,
        prefixes: PrefixCache | None = None,
        encodings: Encodings | None = None,
        cores: FreeCores | None = None,
    ):
        """`deterministic`: rows are computed one by one, so that what is with them changes no bit. `cores`: steps use those that are
        free, not all.
        """
        self.model, self.pad_id, self.device = model, pad_id, model.device
        encode = None if encodings is None else partial(encodings.of, apart=deterministic)
        self.cache = new_cache(model, size, capacity, neighbor_tokens, encode)
        self.size, self.deterministic, self.prefixes = size, deterministic, prefixes
        self._cores = cores if ops.steps_in_cpp(self.cache.hidden_BMD) else None
        self.decoding: list[DecodingSequence] = []  # in the order of their rows
        self.joining: DecodingSequence | None = None  # in the row after them
        self._drafts: dict[DecodingSequence, list[int]] = {}  # of the step that was made last
        self._keys: list[bytes] = []
        self._found: list[Found] = []

    def join(self, sequence: DecodingSequence, found: list[Found]) -> None:
        """`found`: the neighbors of the prompt's chunks. In front of the decoder's keys each chunk of a prompt, all of which
        is there, reads its own from its first token on: what is asked meets what it was found for.
        """
        assert self.joining is None and len(self.decoding) < self.size
        self.joining, self._found, row = sequence, found, len(self.decoding)
        sequence.read = sum(int(one.lengths_K.sum()) for one in {id(one): one for one in found}.values())
        self.cache.clear(row, sequence.pad, sequence.is_reading)
        first = sequence.given if sequence.given is not None else next(iter(found), None)
        if self.cache.reads(row) and first is not None:
            read_in_front(self.cache, [row], *stacked([first], self.pad_id, self.device))
            self._found = [*found[1:], *found[-1:]]
            if not sequence.looks_anew:  # it stays
                sequence.keep_found(first)
                self._found = []
        self._keys = []
        if self.prefixes is not None:
            piece = PIECE_CHUNKS * sequence.chunk_size
            prompt = sequence.tokens[: sequence.prompt_length]
            caller = "" if self.prefixes.is_shared else sequence.request.caller
            self._keys = keys_of(
                prompt,
                sequence.pad,
                found,
                piece_tokens=piece,
                piece_chunks=PIECE_CHUNKS,
                caller=caller,
                is_reading=self.cache.reads(row),
            )

    @torch.no_grad()
    def take_in(self) -> Tensor | None:
        """The next piece of the joining prompt; logits [V] of its last token when that was all."""
        sequence, row = self.joining, len(self.decoding)
        assert sequence is not None
        if self._cores is not None:
            self._cores.look()
        M, logits = sequence.chunk_size, None
        has_all_logits = sequence.request.echo and sequence.request.logprobs is not None
        if sequence.filled == 0 and self.prefixes is not None and not has_all_logits:
            sequence.filled, logits = self.prefixes.restore(self._keys, self.cache, row)
            sequence.cached = max(0, sequence.filled - sequence.pad)
            self.prefixes.asked += sequence.prompt_length - sequence.pad
            self.prefixes.reused += sequence.cached
        if logits is None:
            start = sequence.filled
            most = PIECE_CHUNKS if self.prefixes is not None else ALONE_CHUNKS
            stop = min(start + most * M, sequence.prompt_length)
            tokens = torch.tensor([sequence.tokens[start:stop]], device=self.device)
            chunks = self._found[start // M : stop // M]
            neighbors = lengths = None
            if chunks:
                neighbors, lengths = (part[None] for part in stacked(chunks, self.pad_id, self.device))
            one = self.cache.part(row, row + 1)
            keeps = not sequence.looks_anew
            logits_TV = prefill(
                self.model, one, tokens, neighbors, lengths, last_only=not has_all_logits, keeps_front=keeps
            )[0]
            if has_all_logits:
                sequence.note_prompt(logits_TV, start)
            sequence.filled, logits = stop, logits_TV[-1]
            if self.prefixes is not None:
                known = logits if stop == sequence.prompt_length else None
                self.prefixes.store(self._keys, start // (PIECE_CHUNKS * M), self.cache, row, start=start, logits=known)
        if sequence.filled < sequence.prompt_length:
            return None
        if self._found:
            sequence.keep_found(self._found[-1])
        return logits

    def settle(self) -> None:
        """The sequence that joined decodes with the others, unless it has ended."""
        sequence, self.joining = self.joining, None
        assert sequence is not None
        if sequence.finish_reason is None:
            self.decoding.append(sequence)

    @torch.no_grad()
    def step(
        self, found: dict[DecodingSequence, Found], waits: frozenset[DecodingSequence] = frozenset()
    ) -> list[Tensor]:
        """Each decoding sequence's newest token, and t - 1 that are drafted -> logits [t, V], for `accepted`; nothing counts of
        those that wait.

        `found`: the neighbors of the chunks that end with it.
        """
        for sequence in self.decoding:
            if sequence not in waits:
                sequence.filled += 1
                if sequence in found:
                    sequence.read += int(found[sequence].lengths_K.sum())
                    sequence.keep_found(found[sequence])
        each = [[sequence] for sequence in self.decoding] if self.deterministic else [self.decoding]
        self._drafts = {}
        for sequences in each:
            if len(sequences) <= drafts.MOST_SEQUENCES:
                self._drafts |= self._draft([s for s in sequences if s not in waits and s.drafts is not None])
        firsts = range(len(self.decoding)) if self.deterministic else [0]
        return [
            logits for first, sequences in zip(firsts, each) for logits in self._step(first, sequences, found, waits)
        ]

    def _draft(self, sequences: list[DecodingSequence]) -> dict[DecodingSequence, list[int]]:
        """What may come of sequences that step together, where it is worth its time."""
        if not sequences:
            return {}
        guesses = [sequence.guesses(drafts.MOST_ROWS - 1) for sequence in sequences]
        counts = drafts.worthwhile([[chance for _, chance in each] for each in guesses])
        return {s: [token for token, _ in each[:count]] for s, each, count in zip(sequences, guesses, counts) if count}

    def accepted(self, sequence: DecodingSequence, logits_TV: Tensor) -> list[Event | None]:
        """Choose the tokens that come of a step's logits: as many as its draft holds, and one more."""
        with self._threads(
            is_reading=False
        ):  # a largest value is looked for by several, of which one might wait for its core
            return self._accepted(sequence, logits_TV)

    def _accepted(self, sequence: DecodingSequence, logits_TV: Tensor) -> list[Event | None]:
        events, draft = [sequence.accept(logits_TV[0])], self._drafts.get(sequence, [])
        while sequence.finish_reason is None and len(events) < len(logits_TV):
            if sequence.tokens[-1] != draft[len(events) - 1]:
                break
            events.append(sequence.accept(logits_TV[len(events)]))
        if len(logits_TV) > 1 and sequence.drafts is not None:
            sequence.drafts.count(len(draft), len(events) - 1)
            sequence.filled += len(events) - 1
            self.cache.lengths_B[self.decoding.index(sequence)] += len(events) - 1
        return events

    def _step(
        self,
        first: int,
        sequences: list[DecodingSequence],
        found: dict[DecodingSequence, Found],
        waits: frozenset[DecodingSequence],
    ) -> Sequence[Tensor]:
        tokens = torch.tensor([s.tokens[-1] for s in sequences], device=self.device)
        ending = [row for row, s in enumerate(sequences) if s in found]
        neighbors: tuple[Tensor | None, Tensor | None] = (None, None)
        if ending:
            neighbors = stacked([found[sequences[row]] for row in ending], self.pad_id, self.device)
        advances = torch.tensor([s not in waits for s in sequences], device=self.device)
        part = self.cache.part(first, first + len(sequences))
        ahead = [self._drafts.get(sequence, []) for sequence in sequences]
        with self._threads(is_reading=bool(ending)):
            logits = decode_one(self.model, part, tokens, *neighbors, ending=ending, advances_B=advances, ahead=ahead)
        return logits.split([1 + len(guesses) for guesses in ahead])

    def _threads(self, is_reading: bool) -> contextlib.AbstractContextManager[None]:
        """All where neighbors are encoded: as those of prompts, the bits of these products may depend on how many compute them."""
        return contextlib.nullcontext() if self._cores is None or is_reading else self._cores.threads()

    def holds(self, sequence: DecodingSequence) -> bool:
        return sequence is self.joining or sequence in self.decoding

    def leave(self, sequence: DecodingSequence) -> None:
        """Free its row; the last row moves there."""
        if sequence is self.joining:
            self.joining = None
            return
        row, last = self.decoding.index(sequence), len(self.decoding) - 1
        if row < last:
            self.cache.move(last, row, len(self._drafts.get(self.decoding[last], [])))
            self.decoding[row] = self.decoding[last]
        self.decoding.pop()
        if self.joining is not None:
            self.cache.move(last + 1, last)
