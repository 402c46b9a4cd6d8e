"""In-memory values that pass between rooms: windows of tokens, rows of activations. Nothing here reads or writes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from storage.arrays import Flag

UNUSABLE = Flag.BOS | Flag.PADDING | Flag.SPECIAL


@dataclass(frozen=True)
class Windows:
    """Windows of tokens ready for a forward pass; every array is [windows, context]."""

    token_ids: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    """Position within the window."""
    document_ids: npt.NDArray[np.int32]
    """Index of the document in its source."""
    flags: npt.NDArray[np.uint8]
    """Bits of `storage.arrays.Flag`."""
    offsets: npt.NDArray[np.int32]
    """[windows, context, 2]: characters [start, end) of the token in its document; (0, 0) for special tokens."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def take(self, which: npt.NDArray[np.intp] | slice) -> "Windows":
        """The windows named by an index array or a slice."""
        return Windows(
            self.token_ids[which],
            self.positions[which],
            self.document_ids[which],
            self.flags[which],
            self.offsets[which],
        )

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """[windows, context]: true for tokens of text, false for BOS, padding and special ones."""
        return np.asarray((self.flags & int(UNUSABLE)) == 0)


def concatenate(parts: list[Windows]) -> Windows:
    """All windows of `parts`, in order; `parts` is not empty."""
    return Windows(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("token_ids", "positions", "document_ids", "flags", "offsets")
        )
    )


def to_tensor(stored: npt.NDArray[Any], dtype: str) -> torch.Tensor:
    """Stored rows [n, d] -> a tensor that shares their memory; bf16 is stored as its uint16 bits."""
    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
