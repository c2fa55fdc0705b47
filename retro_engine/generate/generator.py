"""Generation with retrieval at every chunk boundary: prompts in, cached decoding, attribution.

Letters: M chunk length, K neighbors, R tokens per neighbor, V vocabulary.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from retro_engine.data.coding import Coding
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import UsageError
from retro_engine.generate.decoding_batch import DecodingBatch
from retro_engine.generate.drafts import Drafts
from retro_engine.generate.free_cores import FreeCores
from retro_engine.generate.grammar import Grammars
from retro_engine.generate.request import Generation, Request
from retro_engine.generate.sampling import Sampling
from retro_engine.generate.sequence import DecodingSequence
from retro_engine.memory.next_token import MemoryBeside
from retro_engine.model.encoding_file import EncodingFile
from retro_engine.model.encodings import Encodings
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.hit import Found, Hit, NeighborSource

PLAIN = "this model is a plain decoder (model.retrieval=false)", "let it read in front: open_model.read_in_front"
MAX_FOUND = 1024  # texts whose neighbors are remembered
NEIGHBOR_BYTES = 512 << 20  # of encoded neighbors that are kept
KnownTexts = dict[tuple[tuple[str, ...], int], tuple[Found, list[str]]]  # texts, R -> them as neighbors, notes


class Generator:
    """A model with its tokenizer and, with a retriever, live retrieval."""

    def __init__(
        self,
        model: RetroModel,
        tokenizer: Tokenizer,
        retriever: NeighborSource | None = None,
        neighbor_bytes: int | None = None,
        drafts: bool = True,
        encoded: Sequence[EncodingFile] = (),
        beside: MemoryBeside | None = None,
    ):
        """`neighbor_bytes`: of encoded neighbors that are kept, 0 = none (None: 512 MiB where the model lets them be kept);
        `encoded`: those that `retro encode` wrote (`encode_store.open_encodings`). `drafts`: what quotes is read ahead (the
        tokens stay what they are). `beside`: a memory that is mixed in.

        Raises StoreError when the retriever's texts were made with another tokenizer or in other chunks, UsageError for
        `neighbor_bytes` that cannot be used.
        """
        if model.config.partial_chunk != "last":
            raise UsageError(
                f"model.partial_chunk={model.config.partial_chunk}", "such a model cannot be decoded with a cache"
            )
        if retriever is not None and not model.config.retrieval:
            raise UsageError(f"{retriever.name} cannot be read", *PLAIN)
        self.model, self.tokenizer, self.retriever, self.drafts = model, tokenizer, retriever, drafts
        if neighbor_bytes is None:
            neighbor_bytes = NEIGHBOR_BYTES if model.config.encodes_alone else 0
        self.beside, self.cores = beside, FreeCores()
        self.encodings = Encodings(model, neighbor_bytes, encoded) if neighbor_bytes or encoded else None
        self._found: OrderedDict[tuple[str, str, str, int, int, str | None, str], Found] = OrderedDict()
        self._lock = threading.Lock()
        self._grammars = Grammars(tokenizer)
        if retriever is not None:
            model_coding(model, tokenizer).check(retriever.coding)

    def generate(
        self,
        prompt: str | list[int],
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        neighbors: Sequence[str] | None = None,
        num_neighbors: int | None = None,
        retrieved_length: int | None = None,
        pad_prompt: bool = True,
    ) -> Generation:
        """Continue `prompt`; ends at the end-of-document token or after `max_new_tokens`. `Request` says more.

        `neighbors`: texts to read from the prompt's last token on (in front: from its first) instead of retrieved ones; [] =
        retrieval off.
        Raises UsageError for an empty prompt or a setting that cannot be used.
        """
        request = Request(
            prompt,
            max_new_tokens,
            sampling=sampling or Sampling(),
            neighbors=neighbors,
            num_neighbors=num_neighbors,
            retrieved_length=retrieved_length,
            pad_prompt=pad_prompt,
        )
        return self.generate_all([request])[0]

    def generate_all(self, requests: Sequence[Request], deterministic: bool = False) -> list[Generation]:
        """Generate several sequences, of any lengths, together."""
        sequences = [self.open(request) for request in requests]
        batch = DecodingBatch(
            self.model,
            pad_id=self.tokenizer.pad_id,
            size=len(sequences),
            capacity=max((s.total for s in sequences), default=0),
            neighbor_tokens=max((s.neighbor_tokens for s in sequences), default=0),
            deterministic=deterministic,
            encodings=self.encodings,
            cores=self.cores,
        )
        for sequence in sequences:
            batch.join(sequence, self.find(sequence, sequence.prompt_length))
            first = None
            while first is None:
                first = batch.take_in()
            sequence.accept(first)
            batch.settle()
        while batch.decoding:
            found = {s: self.find(s, len(s.tokens)) for s in batch.decoding if s.completes()}
            logits = batch.step({s: f[0] for s, f in found.items()})
            for sequence, logits_TV in zip(list(batch.decoding), logits):
                batch.accepted(sequence, logits_TV)
                if sequence.finish_reason is not None:
                    batch.leave(sequence)
        return [sequence.generation() for sequence in sequences]

    def forget(self) -> None:
        """All that is remembered of what was read, and what was counted."""
        with self._lock:
            self._found.clear()
        if self.encodings is not None:
            self.encodings.forget()
        if self.beside is not None:
            self.beside.lookups = 0

    def open_all(self, requests: Sequence[Request]) -> list[DecodingSequence]:
        """`open` of each; neighbors that are given to several are encoded once."""
        known: KnownTexts = {}
        return [self.open(request, known) for request in requests]

    def open(self, request: Request, known: KnownTexts | None = None) -> DecodingSequence:
        """A sequence to work on. Raises UsageError for a request that cannot be answered."""
        config = self.model.config
        R = config.r if request.retrieved_length is None else request.retrieved_length
        K = config.num_neighbors if request.num_neighbors is None else request.num_neighbors
        if config.r < R or R < 1:
            raise UsageError(
                f"retrieved_length={R} cannot be used", f"the model takes 1 to {config.r} tokens a neighbor"
            )
        prompt_ids = self._prompt_ids(request)
        texts = request.neighbors
        if texts and not config.retrieval:
            raise UsageError("neighbors were given", *PLAIN)
        has_neighbors = bool(texts) if texts is not None else self.retriever is not None
        is_reading = config.retrieval and has_neighbors
        if request.where is not None and not is_reading:
            raise UsageError("a filter cannot be used", "there are no documents to retrieve from", "leave it out")
        given, notes = self._given(texts, request, R, {} if known is None else known) if texts else (None, [])
        M = config.chunk_size
        waits = is_reading and (given is None or not config.reads_prefix)  # for a chunk's end, to read from then on
        pad = -len(prompt_ids) % M if waits and request.pad_prompt else 0
        if waits and not request.pad_prompt and len(prompt_ids) < M:
            notes.append(
                f"inference.pad_prompt=false: the first retrieval happens at token {M}, the prompt has {len(prompt_ids)}"
            )
        tokens = [self.tokenizer.pad_id] * pad + prompt_ids
        sequence = DecodingSequence(
            request=request,
            tokenizer=self.tokenizer,
            chunk_size=M,
            tokens=tokens,
            pad=pad,
            K=K,
            R=R,
            is_reading=is_reading,
            in_front=config.reads_prefix,
            given=given,
            notes=notes,
            drafts=Drafts() if self.drafts else None,
            beside=self.beside,
            matcher=None if request.grammar is None else self._grammars.matcher(request.grammar),
        )
        self._check_length(len(tokens), request, config.positions_in_front(sequence.neighbor_tokens))
        return sequence

    def _check_length(self, num_tokens: int, request: Request, in_front: int) -> None:
        most = self.model.config.most_tokens
        if most is not None and in_front + num_tokens + request.max_new_tokens > most:
            asked = f"{num_tokens} prompt and {request.max_new_tokens} new tokens"
            why = f"the model has {most} positions" + (f", {in_front} of them for its neighbors" if in_front else "")
            raise UsageError(asked, why, "ask for fewer")
        if request.sampling.min_tokens and self.tokenizer.vocab_size <= len(self.tokenizer.end_ids):
            raise UsageError("min_tokens cannot be used", "the vocabulary has no other token")

    def _prompt_ids(self, request: Request) -> list[int]:
        eod, size = self.tokenizer.eod_id, self.model.config.vocab_size
        if isinstance(request.prompt, str):
            ids = self.tokenizer.encode(request.prompt)
        else:
            ids = list(request.prompt)
            wrong = next((i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < size), None)
            if wrong is not None:
                raise UsageError(f"token {wrong} in the prompt", f"ids are whole numbers from 0 to {size - 1}")
            resets = self.model.config.eod_id == eod and self.model.config.reset_attention
            if eod in ids and (resets or not request.is_chat):
                raise UsageError(f"token {eod} in the prompt", "it ends a document: one document is continued")
        if not ids:
            raise UsageError("the prompt is empty", "there is nothing to continue")
        if request.add_bos:
            if self.tokenizer.bos_id is None:
                raise UsageError("add_BOS=true", "the tokenizer has no beginning-of-document token", "add_BOS=false")
            if ids[0] != self.tokenizer.bos_id:  # a chat template may have written it
                ids.insert(0, self.tokenizer.bos_id)
        return ids

    def find(self, sequence: DecodingSequence, stop: int) -> list[Found]:
        """The neighbors of the chunks that the tokens up to `stop` complete; [] where it reads none.

        Given neighbors are read from the prompt's last token on: the chunks before have none. In front of the decoder's keys they
        stand from its first token on: then they are all there is.
        """
        if sequence.given is not None and sequence.in_front:
            return [sequence.given]
        num_chunks = stop // sequence.chunk_size - sequence.filled // sequence.chunk_size
        if not sequence.is_reading or not num_chunks:
            return []
        if sequence.given is None:
            return self._retrieve(sequence.texts(stop), sequence)
        none = Found(sequence.given.tokens_KR, np.zeros_like(sequence.given.lengths_K), [])
        return [none] * (num_chunks - 1) + [sequence.given]

    def _retrieve(self, texts: list[str], sequence: DecodingSequence) -> list[Found]:
        """What was found for a text is remembered as long as nothing else could be."""
        assert self.retriever is not None
        version, skip = self.retriever.version, sequence.request.passed_over
        K, R = sequence.K + skip, sequence.R
        mode, where = sequence.request.mode, sequence.request.where
        filtered = "" if where is None else json.dumps(where.json)  # where 1 is not true
        keys = [(sequence.request.caller, version, text, K, R, mode, filtered) for text in texts]
        with self._lock:
            known = {key: self._found[key] for key in keys if key in self._found}
        missing = [key for key in dict.fromkeys(keys) if key not in known]
        if missing:
            known |= dict(zip(missing, self.retriever.neighbors([key[2] for key in missing], K, R, mode, where)))
        with self._lock:
            for key in keys:
                self._found[key] = known[key]
                self._found.move_to_end(key)
            while len(self._found) > MAX_FOUND:
                self._found.popitem(last=False)
        found = [known[key].above(sequence.request.min_score) for key in keys]
        return [Found(f.tokens_KR[skip:], f.lengths_K[skip:], f.hits[skip:]) for f in found] if skip else found

    def _given(self, texts: Sequence[str], request: Request, R: int, known: KnownTexts) -> tuple[Found, list[str]]:
        """The given texts that a request reads as neighbors, and what is to be said of them."""
        chosen = tuple(texts[request.passed_over :][: request.num_neighbors])
        notes = [f"{len(texts)} neighbors were given, {len(chosen)} are read"] if len(chosen) < len(texts) else []
        if (chosen, R) not in known:
            known[chosen, R] = self._encode_given(chosen, R)
        found, about = known[chosen, R]
        return found, notes + about

    def _encode_given(self, texts: Sequence[str], R: int) -> tuple[Found, list[str]]:
        rows, notes = self.tokenizer.encode_batch(texts), []
        for number, (text, row) in enumerate(zip(texts, rows)):
            if not text:
                notes.append(f"neighbor {number + 1} is empty: it is not read")
            elif len(row) > R:
                notes.append(f"neighbor {number + 1} is longer than {R} tokens: the rest is cut")
        hits = [Hit.given(number, text) for number, text in enumerate(texts)]
        return Found(*_padded(rows, R, self.tokenizer.pad_id), hits), notes


def model_coding(model: RetroModel, tokenizer: Tokenizer, owner: str = "the model") -> Coding:
    """What whatever the model reads must have too."""
    return Coding(owner, tokenizer.fingerprint, model.config.chunk_size, "model")


def encode_neighbors(tokenizer: Tokenizer, texts: Sequence[str], R: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts -> tokens [K, R] padded and lengths [K]; what is past R tokens is cut, an empty text has length 0."""
    return _padded(tokenizer.encode_batch(texts), R, tokenizer.pad_id)


def _padded(rows: Sequence[list[int]], R: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((len(rows), R), pad_id, np.int64)
    lengths = np.array([min(R, len(row)) for row in rows], np.int64)
    for number, row in enumerate(rows):
        tokens[number, : lengths[number]] = row[:R]
    return tokens, lengths
