"""What must be one wherever token ids and chunks meet: the tokenizer, and the tokens a chunk.

Ids of one tokenizer read as another's are no error to any array, so whoever reads ids asks whose they are: a table of
its databases, a batch of its store, a model of every store, table and library that it reads.
"""

from dataclasses import dataclass

from retro_engine.errors import StoreError


@dataclass(frozen=True)
class Coding:
    """How the texts of a store, a library or a model became chunks of ids."""

    owner: str  # as errors name it: a folder, or "the model"
    tokenizer: str  # fingerprint
    chunk_size: int
    kind: str = "store"  # store | library | model

    def check(self, *others: "Coding") -> None:
        """Raise StoreError for the first that this one cannot read, naming both sides."""
        for other in others:
            for what, here, there in (
                ("tokenizer", self.tokenizer, other.tokenizer),
                ("chunk_size", str(self.chunk_size), str(other.chunk_size)),
            ):
                if here != there:
                    raise StoreError(
                        f"{self.owner} has {what} {here[:12]}", f"{other.owner} has {there[:12]}", self._remedy(other)
                    )

    def _remedy(self, other: "Coding") -> str:
        if other.kind == "library":
            return "a library takes both from a store: retro docs add LIBRARY FILES --store STORE makes one that fits"
        source = "CHECKPOINT" if self.kind == "model" and self.owner == "the model" else self.owner
        return f"prepare its files again: retro prepare --tokenizer {source} --chunk-size {self.chunk_size}"
