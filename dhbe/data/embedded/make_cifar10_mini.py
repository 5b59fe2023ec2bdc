"""Make the embedded subset of CIFAR-10: ``python -m dhbe.data.embedded.make_cifar10_mini ROOT``.

ROOT holds CIFAR-10 as parquet tables (``cifar10-train-*.parquet``, ``cifar10-test.parquet``). The
subset is class-balanced, seeded, and stored losslessly (WebP) in the same layout. Its SHA-256 sums
are written beside it and checked by the tests; a run on the same input reproduces the pixels.
"""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dhbe.core.rng import generator
from dhbe.data.images import ImageSet
from dhbe.data.sources import Parquet
from dhbe.data.splits import stratified

SIZES = {"train": 7600, "test": 1000}
"""Images kept: as many as fit in 16 MB."""


def _encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, quality=100, method=6, exact=True)
    return buffer.getvalue()


def make(root: str, target: Path) -> None:
    """Write ``cifar10_mini-{train,test}.parquet`` and ``SHA256SUMS`` into ``target``."""
    source = Parquet(root=root, train="cifar10-train-*.parquet", test="cifar10-test.parquet")
    sums = []
    for part in ("train", "test"):
        full: ImageSet = source.load(part, channels=3, size=32, stream=False)
        rng = generator(0, "cifar10_mini", part)
        index = stratified(full.labels, SIZES[part] / len(full), rng)
        chosen = full.subset(index).resident()
        images = [
            {"bytes": _encode(x.permute(1, 2, 0).numpy()), "path": f"{part}/{i:05d}.webp"}
            for x, i in zip(chosen.images, index.tolist(), strict=True)
        ]
        table = pa.table({"image": images, "label": chosen.labels.numpy()})
        file = target / f"cifar10_mini-{part}.parquet"
        pq.write_table(table, file, compression="none", use_dictionary=False)
        sums.append(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n")
    (target / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    make(sys.argv[1], Path(__file__).parent)
