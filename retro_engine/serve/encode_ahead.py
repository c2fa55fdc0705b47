"""Documents that are added to the library are encoded before anybody asks for them, where a model's encodings are kept.

One thread of the lowest priority, which looks whether the library has changed; it stops where the memory for encodings is full:
what was read lately is worth more than what nobody has asked for.
"""

import os
import threading

import torch

from retro_engine.errors import RetroError
from retro_engine.library.library import Library
from retro_engine.model.encodings import Encodings
from retro_engine.progress import note

EVERY_S = 0.5
DOCUMENTS = 16  # looked at together
BATCH = 8  # neighbors encoded together: as long the thread holds the model's weights in the caches that decoding uses


class EncodeAhead:
    """Encodes what comes to an open library from now on; close it before the library."""

    def __init__(self, library: Library, encodings: Encodings, R: int):
        self.library, self.encodings, self.R = library, encodings, R
        self._key = library.last_key()
        self.seen = library.version  # the version whose documents it has looked at
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="encode-ahead", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_closed.set()
        self._thread.join()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while not self._is_closed.wait(EVERY_S):
            try:
                self._look()
            except RetroError as error:  # a damaged document: searches that meet it say so too
                note(f"documents that were added are encoded when they are read: {error.what}")
                return

    def _look(self) -> None:
        version = self.library.version
        while version != self.seen:
            key, neighbors = self.library.added_after(self._key, DOCUMENTS)
            if key == self._key:
                self.seen = version
            self._key = key
            for first in range(0, len(neighbors), BATCH):
                rows = [torch.from_numpy(row[: self.R].astype("int64")) for row in neighbors[first : first + BATCH]]
                if self._is_closed.is_set() or not self.encodings.has_room(sum(map(len, rows))):
                    break
                tokens_WR = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
                self.encodings.of(tokens_WR.to(self.encodings.device), torch.tensor([len(row) for row in rows]))
