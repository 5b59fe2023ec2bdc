"""Location of a tensor in a file: record, dtype, and strided view of the record."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MAX_HEADER = 16 * 2**20
"""Bytes of a safetensors header, a JSON record."""
MAX_PICKLE = 64 * 2**20
MAX_TENSORS = 10_000
MAX_NAME = 300
"""Characters of a weight's name; the longest of known networks have 80."""

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


class Place(NamedTuple):
    """Location of a tensor: record, dtype, and strided view of the record in elements."""

    record: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor by itself."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def reach(self) -> int:
        """Bytes from its first to behind its last element."""
        if not self.nbytes:
            return 0
        last = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    def view(self, raw: bytearray) -> Tensor:
        """The tensor inside the record's bytes; shares their memory."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(raw, dtype=self.dtype)
        return flat.as_strided(self.shape, self.stride, self.offset)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor in row order."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def overlaps(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether two elements of a strided view may lie in one place."""
    reach = 1
    for step, count in sorted((s, n) for n, s in zip(shape, stride, strict=True) if n > 1):
        if step < reach:
            return True
        reach = step * (count - 1) + reach
    return False
