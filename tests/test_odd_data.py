"""Images of users that look right and are read wrongly: each is read rightly, said, or refused."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dhbe.config.identity import content
from dhbe.config.linked import named_files
from dhbe.core.errors import DataError
from dhbe.data.images import decode
from tests.support.user_data import SIZE, data, folder, labels, own, parquet, png, save, table, tree

ROWS = [png(value) for value in (0, 100, 200)]


# ------------------------------------------------------------------ names of classes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["01", "1", "2"], "01 and 1 are the same number"),
        (["10", "2", "bird"], "10 would be class 0, because not all names are numbers"),
    ],
)
def test_numbers_that_are_no_classes_are_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    tree(tmp_path, train=names, test=names)
    for part in ("train", "test"):
        table(tmp_path / f"{part}.parquet", image=ROWS, label=names)
    readers = (data(folder(tmp_path)), own(tmp_path / "train", None), data(parquet(tmp_path)))
    for reader in readers:
        with pytest.raises(DataError, match=message):
            reader.load()
    listed = data(folder(tmp_path), class_names=names[::-1])
    assert labels(listed.load()) == ([2, 1, 0], [2, 1, 0])


def test_zeros_in_front_are_no_other_class_in_another_part(tmp_path: Path) -> None:
    tree(tmp_path, train=["00", "01", "02"], test=["0", "1", "2"])
    assert labels(data(folder(tmp_path)).load()) == ([0, 1, 2], [0, 1, 2])


def test_accents_are_compared_as_they_look(tmp_path: Path) -> None:
    """macOS writes é as two characters, other systems as one."""
    one, two = "caf\u00e9", "cafe\u0301"
    tree(tmp_path, train=[one, "dog", "zebra"], test=[two, "dog"])
    table(tmp_path / "train.parquet", image=ROWS, label=[one, "dog", "zebra"])
    table(tmp_path / "test.parquet", image=ROWS, label=[two, "dog", "zebra"])
    assert labels(data(folder(tmp_path)).load()) == ([0, 1, 2], [0, 1])
    assert labels(data(parquet(tmp_path)).load()) == ([0, 1, 2], [0, 1, 2])
    listed = data(folder(tmp_path), class_names=["zebra", two, "dog"])
    assert labels(listed.load()) == ([1, 2, 0], [1, 2])


def test_numbers_whose_names_are_other_numbers_are_asked_about(tmp_path: Path) -> None:
    """Hugging Face sorts folders as texts: its label 2 is the folder 10."""
    names = ["0", "1", "10"]
    about = {"huggingface": f'{{"info": {{"features": {{"label": {{"names": {names}}}}}}}}}'}
    about = {k: v.replace("'", '"') for k, v in about.items()}
    for part in ("train", "test"):
        rows = pa.table({"image": ROWS, "label": [0, 1, 2]}).replace_schema_metadata(about)
        pa.parquet.write_table(rows, tmp_path / f"{part}.parquet")
    with pytest.raises(
        DataError, match=r"label 2 is class '10'; which number is meant\?.*class_names"
    ):
        data(parquet(tmp_path)).load()
    splits = data(parquet(tmp_path), class_names=["0", "10", "1"]).load()
    assert labels(splits) == ([0, 2, 1], [0, 2, 1])


# ------------------------------------------------------------------ what is no image, or not seen


def test_files_that_are_not_read_are_counted(tmp_path: Path) -> None:
    tree(tmp_path, train=["0", "1", "2"], test=["0", "1", "2"])
    save(tmp_path / "train" / "stray.png")
    for name in ("a.heic", "b.HEIC", "c.avif", "noext"):
        (tmp_path / "train" / "0" / name).touch()
    save(tmp_path / "train" / "0" / "@eaDir" / "a.png" / "thumb.jpg")
    save(tmp_path / "train" / "$RECYCLE.BIN" / "a.png")
    for kind in ("jfif", "pbm"):
        Image.new("1", (SIZE, SIZE)).convert("L").save(tmp_path / f"a.{kind}")
        (tmp_path / f"a.{kind}").rename(tmp_path / "train" / "1" / f"z.{kind}")
    splits = data(folder(tmp_path)).load()
    assert splits is not None
    assert labels(splits)[0] == [0, 1, 1, 1, 2]
    notes = "\n".join(splits.notes)
    assert "4 files that are not read as images (2 .heic, 1 .avif, 1 noext)" in notes
    assert "1 images in no folder of a class" in notes


def test_broken_links_to_folders_are_named(tmp_path: Path) -> None:
    tree(tmp_path, train=["0", "1", "2"], test=["0"])
    (tmp_path / "train" / "1" / "more").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"train/1/more: a link to .*gone, which is not there"):
        data(folder(tmp_path)).load()
    (tmp_path / "train" / "1" / "more").unlink()
    (tmp_path / "train" / "1" / "x").symlink_to("y")
    (tmp_path / "train" / "1" / "y").symlink_to("x")
    with pytest.raises(DataError, match="train/1/x: a link to y"):
        data(folder(tmp_path)).load()


def test_one_table_is_not_both_parts(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", image=ROWS, label=[0, 1, 2])
    (tmp_path / "test.parquet").symlink_to("train.parquet")
    with pytest.raises(DataError, match=r"train.parquet: both in .*no image may be in both"):
        data(parquet(tmp_path)).load()


def test_other_types_of_columns(tmp_path: Path) -> None:
    table(
        tmp_path / "train.parquet",
        image=pa.array(ROWS, pa.binary_view()),
        label=pa.array(["a", "b", "c"], pa.string_view()),
    )
    table(
        tmp_path / "test.parquet", image=pa.array(ROWS).dictionary_encode(), label=["c", "b", "a"]
    )
    assert labels(data(parquet(tmp_path)).load()) == ([0, 1, 2], [2, 1, 0])


@pytest.mark.parametrize("name", ["__index_level_0__", "idx"])
def test_the_number_of_a_row_is_no_label(tmp_path: Path, name: str) -> None:
    for part in ("train", "test"):
        table(tmp_path / f"{part}.parquet", image=ROWS, **{name: [0, 1, 2]})
    with pytest.raises(DataError, match=f"no column that is surely the label.*{name}"):
        data(parquet(tmp_path)).load()


def test_labels_beyond_64_bits_are_refused(tmp_path: Path) -> None:
    for part in ("train", "test"):
        large = pa.array([0, 1, 2**63], pa.uint64())
        table(tmp_path / f"{part}.parquet", image=ROWS, label=large)
    with pytest.raises(DataError, match="labels that are no 64-bit integers"):
        data(parquet(tmp_path)).load()


def test_images_that_a_table_names_are_its_content(tmp_path: Path) -> None:
    """A changed image computes anew, though the table is the same."""
    names = [save(tmp_path / f"{i}.png", i).name for i in range(3)]
    both = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    files = {
        "texts": pa.array(names),
        "categories": pa.array(names).dictionary_encode(),
        "absolute": pa.array([str(tmp_path / name) for name in names]),
        "structs": pa.array([{"bytes": None, "path": n} for n in names], both),
        "partly": pa.array([{"bytes": b"x" * (n != "0.png"), "path": n} for n in names], both),
        "whole": pa.array([{"bytes": b"x", "path": n} for n in names], both),
    }
    tables = {k: table(tmp_path / f"{k}.parquet", image=v) for k, v in files.items()}
    before = {k: content([t]) for k, t in tables.items()}
    save(tmp_path / "0.png", 99)
    changed = {k for k, t in tables.items() if content([t]) != before[k]}
    assert changed == files.keys() - {"whole"}
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    assert named_files(tmp_path / "torn.parquet") == []


# ------------------------------------------------------------------ pixels


def wide_png(pixels: np.ndarray, colour: int, transparent: bytes) -> bytes:
    """16-bit PNG of pixels (H, W, C) with one transparent colour."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    parts = (
        (b"IHDR", head),
        (b"tRNS", transparent),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def grey_tiff(pixels: np.ndarray, *, kind: int, photometric: int) -> bytes:
    """One channel, one strip; ``kind`` 1: unsigned, 2: signed; ``photometric`` 0: white is zero."""
    height, width = pixels.shape
    entries = [
        *((256, width), (257, height), (258, 8 * pixels.itemsize), (259, 1), (262, photometric)),
        *((273, 8 + 2 + 10 * 12 + 4), (277, 1), (278, height), (279, pixels.nbytes), (339, kind)),
    ]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + table + bytes(4) + pixels.tobytes()


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3)])
def test_a_transparent_colour_of_16_bits_is_refused(colour: int, channels: int) -> None:
    """Pillow would compare it with pixels of 8 bits, or forget it."""
    pixels = np.full((SIZE, SIZE, channels), 0x8000)
    blob = wide_png(pixels, colour, struct.pack(">H", 0x8000) * channels)
    with pytest.raises(DataError, match="16 bits and a transparent colour; save it with an alpha"):
        decode("x.png", blob, 3, SIZE)


@pytest.mark.parametrize("depth", ["u1", "<u2"])
@pytest.mark.parametrize(("photometric", "expected"), [(1, 64), (0, 191)])
def test_white_is_zero_where_a_tiff_says_so(depth: str, photometric: int, expected: int) -> None:
    top = np.iinfo(np.dtype(depth)).max
    pixels = np.full((SIZE, SIZE), 64 * top // 255, depth)
    read = decode("x.tif", grey_tiff(pixels, kind=1, photometric=photometric), 1, SIZE)
    assert read.min() == read.max() == expected


@pytest.mark.parametrize("depth", ["i1", "<i2", "<i4"])
def test_signed_pixels_are_refused(depth: str) -> None:
    blob = grey_tiff(np.full((SIZE, SIZE), 64, depth), kind=2, photometric=1)
    with pytest.raises(DataError, match="signed integers, whose range is not known"):
        decode("x.tif", blob, 1, SIZE)


def test_the_first_picture_of_a_phone_is_read() -> None:
    """JPEG files with further pictures for other screens (MPO) are no animations."""
    buffer, said = io.BytesIO(), []
    first, second = (Image.new("RGB", (SIZE, SIZE), c) for c in ("white", "black"))
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    assert decode("x.jpg", buffer.getvalue(), 3, SIZE, say=said.append).min() == 255
    assert said == ["with further pictures in the same JPEG file (MPO); the first is read"]


def test_what_is_no_image_is_told_in_words() -> None:
    """No address in memory, so that two runs say the same."""
    for blob, cause in ((b"", "empty"), (os.urandom(50), "none of PNG, JPEG")):
        with pytest.raises(DataError, match=rf"x.png: not a readable image \({cause}"):
            decode("x.png", blob, 3, SIZE)


def test_one_folder_as_both_parts_is_said(tmp_path: Path) -> None:
    tree(tmp_path, train=["0", "1", "2"])
    (tmp_path / "test").symlink_to("train")
    splits = data(folder(tmp_path)).load()
    assert splits is not None
    assert any("train and test are one folder" in note for note in splits.notes)
    splits = own(tmp_path / "train", tmp_path / "test").load()
    assert splits is not None
    assert splits.notes[0].startswith("WARNING: data.clean and data.test are one folder")
    splits = own(tmp_path / "train", None).load()
    assert splits is not None
    assert not splits.notes
