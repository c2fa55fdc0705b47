"""Neighbors gathered where the model is: the stores' tokens lie on the GPU, and a batch brings ids instead of tokens.

The table is the concatenation of the database stores, in the order in which ids count through them. Where it would
take more than SHARE of the GPU's memory it stays in host memory that the GPU reads in place (csrc/cuda).
Letters: U rows, M tokens per row, L chunks, K neighbors, R tokens per neighbor.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from retro_engine.data.store import Store
from retro_engine.model import ops

SHARE = 0.25  # of the GPU's memory


class DeviceTable:
    """Tokens, documents and valid lengths of every row of `stores`, for `ops.gather_neighbors`."""

    def __init__(self, stores: Sequence[Store], device: torch.device):
        self.pad_id, self.device = stores[0].pad_id, device
        parts = [store.rows(0, store.num_rows) for store in stores]
        first = np.cumsum([0] + [store.num_documents for store in stores])
        documents = [store.row_documents() + start for store, start in zip(stores, first)]
        tokens_UM = np.concatenate([tokens for tokens, _ in parts])
        if tokens_UM.dtype != np.uint16:
            tokens_UM = tokens_UM.astype(np.int32)
        self._table = torch.from_numpy(tokens_UM)
        self._documents = torch.from_numpy(np.concatenate(documents).astype(np.int32)).to(device)
        self._row_lengths = torch.from_numpy(np.concatenate([n for _, n in parts]).astype(np.int32)).to(device)
        if device.type == "cuda":
            num_bytes = self._table.numel() * self._table.element_size()
            if num_bytes <= SHARE * torch.cuda.get_device_properties(device).total_memory:
                self._table = self._table.to(device)
            else:
                ops.register_host(self._table)

    def gather(self, ids_BLK: np.ndarray, retrieved_length: int) -> tuple[Tensor, Tensor]:
        """Tokens [b, l, k, r] and valid lengths [b, l, k], both i64; -1 = missing, length 0."""
        ids = torch.from_numpy(ids_BLK).to(self.device)
        tokens, lengths = ops.gather_neighbors(
            self._table,
            self._documents,
            row_lengths=self._row_lengths,
            ids=ids,
            retrieved_length=retrieved_length,
            pad_id=self.pad_id,
        )
        return tokens.long(), lengths


def gathers_on_device(device: torch.device) -> bool:
    """Whether training batches bring neighbor ids and the device gathers the tokens; on a CPU the loader does."""
    return device.type == "cuda"
