"""Rows that a query must not find: those of documents that say what the query's own document says, its copies among them.

Letters: N rows of a database, C contents, Q queries, K results.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LeftOut:
    """Numbers of contents: of every row, and of what each query must not find."""

    contents_N: np.ndarray  # i32; below 0: no query finds the row
    sizes_C: np.ndarray  # rows of each content
    num_hidden: int  # rows below 0
    own_Q: np.ndarray  # i32; -1 = nothing but what no query finds

    @classmethod
    def of(cls, contents_N: np.ndarray) -> "LeftOut":
        """For one database and no query yet (`for_queries`)."""
        is_shown = contents_N >= 0
        sizes = np.bincount(contents_N[is_shown], minlength=1)
        return cls(contents_N, sizes, int((~is_shown).sum()), np.empty(0, np.int32))

    def for_queries(self, own_Q: np.ndarray) -> "LeftOut":
        return LeftOut(self.contents_N, self.sizes_C, self.num_hidden, own_Q.astype(np.int32))

    @property
    def counts(self) -> np.ndarray:
        """[Q] how many rows each query must not find."""
        sizes = self.sizes_C[np.minimum(self.own_Q, len(self.sizes_C) - 1)]
        return self.num_hidden + np.where((self.own_Q >= 0) & (self.own_Q < len(self.sizes_C)), sizes, 0)

    def holds(self, found_QK: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """[Q, K] whether results of some queries (their numbers [Q]) must not be found."""
        contents = self.contents_N[np.maximum(found_QK, 0)]
        return (found_QK >= 0) & ((contents < 0) | (contents == self.own_Q[queries][:, None]))
