"""Parquet tables of images, as Hugging Face ``datasets`` and others write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dhbe.core.errors import DataError
from dhbe.data.images import image_bytes

IMAGES = ("image", "img", "picture", "jpg", "png", "image_path", "path", "file_name", "file")
PATHS = (
    *("image_path", "path", "file_name", "file", "filename", "id", "__key__"),
    *("idx", "index", "__index_level_0__"),
)
LABELS = ("label", "fine_label", "labels", "class", "target", "cls", "category")
"""Names of columns, the likeliest first; what is a path or a number of a row is no label."""
DAMAGE = (pa.ArrowException, OSError, KeyError, ValueError, TypeError, AttributeError)


class Table(NamedTuple):
    """Rows of one or several files.

    Attributes:
        blobs: encoded image files; empty where ``paths`` names a file instead.
        paths: names of the images, empty if the table has none.
        folders: of the table that each row is from, for paths that are relative.
        labels: whole numbers or texts.
        columns: names of the two columns.
        names: texts behind the whole numbers, if the files say.
    """

    blobs: Any
    paths: Any
    folders: Sequence[Path]
    labels: list[Any]
    columns: tuple[str, str]
    names: list[str] | None

    @property
    def texts(self) -> bool:
        """Whether labels are texts."""
        return bool(self.labels) and isinstance(self.labels[0], str)

    def named(self) -> Table:
        """With texts as labels, where they are numbers whose names are known.

        Raises:
            DataError: a number without a name.
        """
        if self.texts or self.names is None:
            return self._replace(labels=[str(x) for x in self.labels])
        beyond = [x for x in self.labels if not 0 <= x < len(self.names)]
        if beyond:
            raise DataError(
                f"{self.folders[0]}: label {beyond[0]}, but names for 0..{len(self.names) - 1}; "
                "write the table with a name for every label"
            )
        return self._replace(labels=[self.names[x] for x in self.labels])

    def encoded(self, row: int, table: str) -> tuple[str, bytes]:
        """(name for messages, image file) of a row."""
        path = self.paths[row].as_py()
        name = f"{table}, row {row}" + (f" ({path})" if path else "")
        blob = self.blobs[row].as_py()
        if blob or not path:
            return name, blob
        try:
            return name, image_bytes(self.folders[row] / path)
        except DataError as error:
            raise DataError(f"{table}, row {row}: {error}") from error


def read(
    files: Sequence[Path], image: str | None, label: str | None, *, pixels: bool = True
) -> Table:
    """The rows of all files in order.

    Args:
        image, label: names of the columns; None finds them.
        pixels: read the images too; else only their labels.

    Raises:
        DataError: a file is damaged, or has no such columns; names those it has.
    """
    parts = [_read(file, image, label, pixels) for file in files]
    parts = [part for part in parts if part.labels] or parts[:1]
    first = parts[0]
    for part in parts[1:]:
        agree(first, part)
    return Table(
        pa.concat_arrays([p.blobs for p in parts]),
        pa.concat_arrays([p.paths for p in parts]),
        [folder for p in parts for folder in p.folders],
        [x for p in parts for x in p.labels],
        first.columns,
        first.names,
    )


def agree(one: Table, other: Table) -> None:
    """Check that numbers mean the same classes in both.

    Raises:
        DataError: the tables give them different names.
    """
    if one.texts != other.texts and one.labels and other.labels:
        raise DataError(
            f"{one.folders[0]}: labels are numbers in some tables and texts in others; write them "
            "alike"
        )
    if None not in (one.names, other.names) and one.names != other.names:
        raise DataError(
            f"{one.folders[0]}: tables whose labels are {one.names} here and "
            f"{other.names} there, so a number means two classes; write them with the same names"
        )


def _read(file: Path, image: str | None, label: str | None, pixels: bool) -> Table:
    try:
        schema = pq.read_schema(file)
        images = _column(file, schema, "image", image, IMAGES, _holds_images)
        labels = _column(file, schema, "label", label, LABELS, _holds_labels)
        table = pq.read_table(file, columns=[images, labels] if pixels else [labels])
        column = table.column(images) if pixels else pa.array([], pa.binary())
        blobs, paths = _images(column)
        return Table(
            blobs,
            paths,
            [file.parent] * len(table),
            _labels(table.column(labels)),
            (images, labels),
            _names(schema, labels),
        )
    except DAMAGE as error:
        raise DataError(f"{file}: not a readable image table ({error}); fetch it anew") from error


def _column(
    file: Path, schema: Any, what: str, given: str | None, usual: Sequence[str], holds: Any
) -> str:
    able = [f.name for f in schema if holds(f)]
    if given is not None and given in able:
        return given
    known = [name for name in usual if name in able]
    if given is None and (known or len(able) == 1):
        return (known or able)[0]
    there = ", ".join(f"{f.name} ({_brief(f.type)})" for f in schema)
    asked = f"data.{what}_column={given}" if given else f"no column that is surely the {what}"
    raise DataError(
        f"{file}: {asked}; its columns are {there}. Say data.{what}_column=NAME"
        + (f", one of {', '.join(able)}" if able else f"; none of them can hold {what}s")
    )


def _brief(kind: Any) -> str:
    return str(kind) if len(str(kind)) < 60 else f"{str(kind)[:56]} ..."


def _plain(kind: Any) -> Any:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: Any) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in tests)


def _is_binary(kind: Any) -> bool:
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(test(kind) for test in (*tests, pa.types.is_fixed_size_binary))


def _holds_images(field: Any) -> bool:
    """Files, as structs or bare bytes, or the paths of files under a name that says so."""
    if pa.types.is_struct(field.type):
        return any(f.name in ("bytes", "path") for f in field.type)
    kind = _plain(field.type)
    return _is_binary(kind) or (field.name in IMAGES and _is_text(kind))


def _holds_labels(field: Any) -> bool:
    if field.name in PATHS:
        return False
    kind = _plain(field.type)
    numbers = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)
    return bool(numbers or _is_text(kind))


def _images(column: Any) -> tuple[Any, Any]:
    """(files, names) of a column of structs or bare bytes; empty where there is none."""
    files = names = None
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if _is_text(column.type):
        names = column
    elif pa.types.is_struct(column.type):
        chunks, fields = column.chunks, {f.name: f.type for f in column.type}
        files, names = (
            pa.chunked_array([c.field(name) for c in chunks], fields[name])
            if name in fields
            else None
            for name in ("bytes", "path")
        )
    else:
        files = column
    size = len(column)
    return _filled(files, pa.large_binary(), b"", size), _filled(names, pa.large_string(), "", size)


def _filled(column: Any, kind: Any, empty: Any, size: int) -> Any:
    if column is None:
        return pa.array([empty] * size, kind)
    if pa.types.is_fixed_size_binary(column.type):
        column = column.cast(pa.binary())
    column = column.cast(kind)  # before they are one: 32 bits count no more than 2 GB
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    filled = pc.fill_null(column, pa.scalar(empty, kind))
    filled.validate(full=True)  # a name that is no text fails here, not in a message
    return filled


def _labels(column: Any) -> list[Any]:
    """Whole numbers or texts.

    Raises:
        ValueError: others, or none.
    """
    values: list[Any] = column.combine_chunks().to_pylist()
    missing = [row for row, value in enumerate(values) if value is None]
    if missing:
        raise ValueError(f"row {missing[0]} has no label")
    if values and not isinstance(values[0], str):
        whole = [int(v) for v in values]
        if whole != values:
            raise ValueError("labels that are not whole numbers")
        if whole and not -(2**63) <= min(whole) <= max(whole) < 2**63:
            raise ValueError("labels that are no 64-bit integers")
        return whole
    return values


def _names(schema: Any, column: str) -> list[str] | None:
    """What Hugging Face's ``ClassLabel`` says of the numbers."""
    about = (schema.metadata or {}).get(b"huggingface")
    try:
        names = json.loads(about)["info"]["features"][column]["names"] if about else None
    except (ValueError, KeyError, TypeError):
        return None
    return names if isinstance(names, list) else None
