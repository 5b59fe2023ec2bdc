"""Image files that a table names instead of holding them: they make its content as well."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def named_files(table: Path) -> list[Path]:
    """What the texts in a parquet table lead to, relative to its folder or absolute, once each.

    Empty where the table holds all images itself, or cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(table) as file:
            read = file.read(columns=list(_texts(file))).flatten()
        names = {v for c in read.columns for v in c.to_pylist() if v and isinstance(v, str)}
    except (pa.ArrowException, OSError, ValueError):
        return []
    return sorted(path for path in (table.parent / name for name in names) if _is_file(path))


def _texts(file: Any) -> Iterator[str]:
    """Columns of texts, and fields of structs that are called paths; none beside whole images."""
    found = []
    for number, column in enumerate(file.schema):
        text = str(column.logical_type) == "String"
        if text and (column.path == column.name or column.name == "path"):
            found.append(column.path)
        elif not text and column.physical_type == "BYTE_ARRAY" and _whole(file, number):
            return
    yield from found


def _whole(file: Any, column: int) -> bool:
    """Whether every row is known to hold something."""
    groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
    known = [group.column(column).statistics for group in groups]
    return all(s is not None and s.null_count == 0 and s.min not in (b"", None) for s in known)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a name, or a null byte
        return False
