"""A memory of a model's own states: what came after the most similar ones (kNN-LM, arXiv 1911.00172).

The state is the one that the output head reads. Owns RUN/memory/knn/ (docs/formats.md): `index.faiss`, the states by Faiss;
`tokens.bin`, u4 [N, 1], the token that came after each; `contents.bin`, i8 [N, 1], the mark of what its document says;
`manifest.json`. Letters: N states, T tokens that are asked about, K states that are found, D width.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from retro_engine.data import array_file, files
from retro_engine.data.array_file import ArrayFile
from retro_engine.errors import StoreError, UsageError
from retro_engine.retrieval.faiss_factory import make_faiss
from retro_engine.retrieval.inverted_lists import read_faiss

FORMAT = 1
FOUND = 64  # K
PROBES = 8  # lists that are looked through
FEW = 50_000  # states that are compared one by one
TRAINED = 1 << 16  # states that the index is trained on
TEMPERATURES = 2.0 ** np.arange(-6, 5)  # of the mean distance to the nearest state
ROUNDS = 30
LEAST = 1e-30  # of a probability
INDEX, TOKENS, CONTENTS = "index.faiss", "tokens.bin", "contents.bin"
AGAIN = "retro memory knn RUN makes it"


@dataclass(frozen=True)
class Recalled:
    """The states that were found for T tokens: how far they are, and whether the token came after them."""

    distances_TK: np.ndarray  # inf = none
    is_it_TK: np.ndarray

    @classmethod
    def joined(cls, parts: "Sequence[Recalled]") -> "Recalled":
        return cls(
            np.concatenate([part.distances_TK for part in parts]), np.concatenate([part.is_it_TK for part in parts])
        )

    def of(self, places: np.ndarray) -> "Recalled":
        return Recalled(self.distances_TK[places], self.is_it_TK[places])

    def shares(self, temperature: float) -> np.ndarray:
        """[T] of the weights exp(-distance / temperature), that of the states before the token; nan where none was found."""
        nearest = self.distances_TK.min(1, keepdims=True)
        with np.errstate(invalid="ignore"):
            weights = np.exp(-(self.distances_TK - nearest) / temperature)
            return (weights * self.is_it_TK).sum(1) / weights.sum(1)


@dataclass(frozen=True)
class KnnMixture:
    """p = (1 - w) p_model + w p_states, with one weight and one temperature."""

    weight: float
    temperature: float

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot be used."""
        if not 0 <= self.weight <= 1:
            raise UsageError(f"a weight of {self.weight:g} cannot be used", "it is a share: from 0 to 1")
        if not 0 < self.temperature < np.inf:
            raise UsageError(f"a temperature of {self.temperature:g} cannot be used", "it is above 0")

    @classmethod
    def fitted(cls, before_T: np.ndarray, recalled: Recalled) -> "KnnMixture":
        """Those that make tokens likeliest which the model gives the probabilities `before`."""
        nearest = recalled.distances_TK.min(1)
        scale = float(nearest[np.isfinite(nearest)].mean()) if np.isfinite(nearest).any() else 1.0
        best, most = cls(0.0, 1.0), -np.inf
        for temperature in TEMPERATURES * max(scale, 1e-6):
            shares, weight = recalled.shares(float(temperature)), 0.2
            known = np.isfinite(shares)
            for _ in range(ROUNDS if known.any() else 0):
                mixed = (1 - weight) * before_T[known] + weight * shares[known]
                weight = float((weight * shares[known] / np.maximum(mixed, LEAST)).mean())
            found = cls(min(weight, 1.0), float(temperature))
            likelihood = float(np.log(found.probabilities(before_T, recalled)).sum())
            if likelihood > most:
                best, most = found, likelihood
        return best

    def probabilities(self, before_T: np.ndarray, recalled: Recalled) -> np.ndarray:
        shares = recalled.shares(self.temperature)
        mixed = (1 - self.weight) * before_T + self.weight * shares
        return np.maximum(np.where(np.isfinite(shares), mixed, before_T), LEAST)


class KnnWriter:
    """Takes states as they are computed; `publish` makes the memory. Some (4 D + 16) bytes a state until the index is trained."""

    def __init__(self, width: int, expected: int):
        lists = 2 ** round(math.log2(max(expected, 2)) / 2)
        self.index = make_faiss("SQ8" if expected < FEW else f"IVF{lists},SQ8", width, "l2")
        self._waiting: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []
        self._contents: list[np.ndarray] = []

    def add(self, states_TD: Tensor, tokens_T: np.ndarray, contents_T: np.ndarray) -> None:
        self._waiting.append(states_TD.cpu().numpy())
        self._tokens.append(tokens_T.astype(np.uint32))
        self._contents.append(contents_T)
        if self.index.is_trained or sum(map(len, self._waiting)) >= TRAINED:
            self._flush()

    def _flush(self) -> None:
        states = np.concatenate(self._waiting)
        if not self.index.is_trained:
            self.index.train(states)
        self.index.add(states)
        self._waiting = []

    def publish(self, folder: Path, weights: str, tokenizer: str) -> "KnnMemory":
        """`weights`: fingerprint of the checkpoint whose states they are."""
        import faiss

        if self._waiting:
            self._flush()
        with files.publish_folder(folder) as aside:
            files.publish(aside / INDEX, [faiss.serialize_index(self.index).tobytes()])
            hashes = {INDEX: files.sha256_file(aside / INDEX)}
            for name, values in ((TOKENS, self._tokens), (CONTENTS, self._contents)):
                column = np.concatenate(values)[:, None]
                hashes[name] = array_file.write_array(aside / name, f"knn-{name[:-4]}", column, weights)
            content = {
                "format": FORMAT,
                "weights": weights,
                "tokenizer": tokenizer,
                "width": self.index.d,
                "states": self.index.ntotal,
                "files": hashes,
            }
            files.write_manifest(aside, "knn", content)
        return KnnMemory(folder)


class KnnMemory:
    """The memory of one folder."""

    kind = "knn"

    def __init__(self, folder: Path):
        """Raises MissingInputError, or StoreError for what is damaged, newer or contradicts itself."""
        self.folder = Path(folder)
        self.manifest = m = files.read_manifest(self.folder, "knn")
        if m["format"] != FORMAT:
            raise StoreError(f"{folder} has format {m['format']}", f"this program reads {FORMAT}", AGAIN)
        try:
            self.verify()
            self.index: Any = read_faiss(self.folder / INDEX)
            columns = [ArrayFile(self.folder / name, f"knn-{name[:-4]}", m["weights"]) for name in (TOKENS, CONTENTS)]
            self.tokens, self.contents = (column.checked()[:, 0] for column in columns)
        except StoreError as error:
            raise StoreError(error.what, error.why, AGAIN) from error
        sizes = {self.index.ntotal, len(self.tokens), len(self.contents)}
        if sizes != {m["states"]} or self.index.d != m["width"]:
            raise StoreError(f"{folder} contradicts itself", f"{sizes} states, its manifest says {m['states']}", AGAIN)
        if hasattr(self.index, "nprobe"):
            self.index.nprobe = PROBES
        self.is_held_out = np.zeros(len(self.contents), bool)

    def check(self, tokenizer: str, weights: str, owner: str) -> None:
        """Raises StoreError unless its states are those of `owner`'s weights."""
        for what, there in (("tokenizer", tokenizer), ("weights", weights)):
            if self.manifest[what] != there:
                here = self.manifest[what][:12]
                raise StoreError(f"{self.folder} has {what} {here}", f"{owner} has {there[:12]}", AGAIN)

    def without(self, contents: np.ndarray) -> tuple["KnnMemory", np.ndarray]:
        """The memory without the states of documents that say what these marks are of, and the marks that it held."""
        out = copy.copy(self)
        out.is_held_out = np.isin(self.contents, contents)
        if out.is_held_out.all():
            raise StoreError(
                f"{self.folder} holds nothing but documents that are held out",
                "what is predicted from itself says nothing",
                "evaluate other documents",
            )
        return out, np.unique(self.contents[out.is_held_out])

    def recall(self, states_TD: Tensor, tokens_T: np.ndarray) -> Recalled:
        distances, found = self.index.search(states_TD.cpu().numpy(), min(FOUND, len(self.tokens)))
        is_none = (found < 0) | self.is_held_out[found]
        is_it = (self.tokens[found] == tokens_T[:, None]) & ~is_none
        return Recalled(np.where(is_none, np.inf, distances).astype(np.float32), is_it)

    def summary(self) -> dict[str, Any]:
        m = self.manifest
        num_bytes = sum((self.folder / name).stat().st_size for name in m["files"])
        return {
            "kind": "knn",
            "tokens": m["states"],
            "bytes_per_token": num_bytes / m["states"],
            "weights_of": m["weights"],
            "tokenizer": m["tokenizer"],
            "fingerprint": m["fingerprint"],
        }

    def verify(self) -> None:
        """Compare every file with the manifest."""
        files.verify_files(self.folder, self.manifest["files"], needed=(INDEX, TOKENS, CONTENTS))
