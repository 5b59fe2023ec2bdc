"""Images as users bring them: folders, tables, and what reads them."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dhbe.data import Data, OwnImages, Splits
from dhbe.data.sources import Folder, Parquet

SIZE = 8


def save(file: Path, value: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIZE, SIZE), (value, 0, 0)).save(file)
    return file


def tree(top: Path, **parts: list[str]) -> Path:
    """A data set with one image in each named class of each part."""
    for part, classes in parts.items():
        for name in classes:
            save(top / part / name / "a.png")
    return top


def data(source, **changes) -> Data:
    known = {
        **{"name": "t", "classes": 3, "channels": 3, "image_size": SIZE, "mean": [0.5] * 3},
        **{"std": [0.5] * 3, "flip": False, "crop_padding": 0, "balanced": True},
        **{"train_size": 0, "pool_fraction": 0.0, "split_seed": 0, "storage": "resident"},
        **{"limit": 0, "source": source},
    }
    return Data(**(known | changes))


def own(clean: Path | None, test: Path | None, **changes) -> OwnImages:
    known = {
        **{"name": "own", "classes": 3, "channels": 3, "image_size": SIZE, "order": None},
        **{"normalization": "half", "flip": False, "crop_padding": 0, "skip_unreadable": False},
        **{"clean": clean and str(clean), "test": test and str(test)},
    }
    return OwnImages(**(known | changes))


def folder(root: Path) -> Folder:
    return Folder(root=str(root), train="train", test="test")


def labels(splits: Splits | None) -> tuple[list[int], list[int]]:
    assert splits is not None
    return (splits.train.labels.tolist() + splits.pool.labels.tolist(), splits.test.labels.tolist())


def table(file: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), file)
    return file


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(root: Path) -> Parquet:
    return Parquet(root=str(root), train="train*.parquet", test="test*.parquet")
