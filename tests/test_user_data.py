"""Images that users bring: which class is which, how pixels are read, links, tables, refusals."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from attacks.picture import Picture
from dhbe.config.identity import content, victim_recipe
from dhbe.config.resolvers import name_of
from dhbe.config.schema import plain
from dhbe.core.errors import ConfigError, DataError
from dhbe.data.images import decode
from dhbe.data.pixels import Pixels
from dhbe.data.sources import Parquet
from tests.support.fixtures import make_spec
from tests.support.user_data import SIZE, data, folder, labels, own, parquet, png, save, table, tree

# ------------------------------------------------------------------ one rule for labels


@pytest.mark.parametrize("reader", ["folder", "own", "parquet"])
@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        (["ant", "cat", "dog"], ["cat", "dog"], ([0, 1, 2], [1, 2])),
        (["ant", "cat"], ["dog"], ([0, 1], [2])),
        (["0", "1", "10"], ["10", "2"], ([0, 1, 10], [10, 2])),
        (["00", "01", "02"], ["2"], ([0, 1, 2], [2])),
    ],
    ids=["a class missing", "each part lacks some", "numbers", "padded numbers"],
)
def test_a_class_has_one_number_in_every_reader(
    tmp_path: Path, reader: str, train: list[str], test: list[str], expected
) -> None:
    classes = 11 if "10" in train else 3
    if reader == "parquet":
        for part, names in (("train", train), ("test", test)):
            table(tmp_path / f"{part}.parquet", image=[png()] * len(names), label=names)
        found = data(parquet(tmp_path), classes=classes).load()
    else:
        tree(tmp_path, train=train, test=test)
        both = own(tmp_path / "train", tmp_path / "test", classes=classes)
        one = data(folder(tmp_path), classes=classes)
        found = (both if reader == "own" else one).load()
    assert labels(found) == expected
    if classes == 3:
        lacking = min({0, 1, 2} - set(expected[1]))
        said = rf"/test\S* has no image of class {lacking}\b"
        assert any(re.search(said, note) for note in found.notes)


def test_a_list_of_classes_gives_the_numbers(tmp_path: Path) -> None:
    tree(tmp_path, train=["dog", "cat"], test=["cat"])
    (tmp_path / "classes.txt").write_text("\ufeffdog\ncat\n\nant\n", encoding="utf-8")
    assert labels(data(folder(tmp_path)).load()) == ([1, 0], [1])
    listed = own(None, tmp_path / "test", class_names=str(tmp_path / "classes.txt")).load()
    assert labels(listed)[1] == [1]
    given = data(folder(tmp_path), class_names=["ant", "dog", "cat"])
    assert labels(given.load()) == ([2, 1], [2])
    for part in ("train", "test"):
        table(tmp_path / f"{part}.parquet", image=[png()] * 2, label=["dog", "cat"])
    assert labels(data(parquet(tmp_path)).load()) == ([0, 1], [0, 1])


@pytest.mark.parametrize(
    ("train", "test", "given", "message"),
    [
        (["a", "b"], ["a"], None, r"2 sub-folders for 3 classes \(a, b\).*data.class_names="),
        (["a", "b", "c"], ["0", "1", "2"], None, "test names its classes by numbers, .*train does"),
        (["1", "2", "3"], ["1"], None, r"sub-folder 3, but .* 0..2 \(data.classes=3\); number"),
        (["a", "b"], ["x"], ["a", "b", "c"], "x not in the list of classes"),
        (["a", "b"], ["a"], ["a", "b"], r"2 names, expected 3 \(data.classes=3\)"),
        (["a", "b"], ["a"], ["a", "b", "a"], "data.class_names=.*: a more than once"),
        (["a", "b"], ["a"], "absent.txt", "data.class_names=absent.txt: cannot be read"),
    ],
)
def test_names_that_cannot_be_the_classes_are_refused(
    tmp_path: Path, train: list[str], test: list[str], given, message: str
) -> None:
    tree(tmp_path, train=train, test=test)
    for reader in (data(folder(tmp_path), class_names=given),
                   own(tmp_path / "train", tmp_path / "test", class_names=given)):  # fmt: skip
        with pytest.raises(DataError, match=message):
            reader.load()


def test_what_systems_leave_behind_is_no_data(tmp_path: Path) -> None:
    tree(tmp_path, train=["a", "b", "c"], test=["a", "b", "c"])
    before = content([tmp_path / "train"])
    for part in ("train", "test"):
        for junk in (".ipynb_checkpoints/a.png", "__MACOSX/a.png", "b/.cache/deep/x.png"):
            save(tmp_path / part / junk)
        for junk in ("._a.png", "b/._a.png", "a/Thumbs.db", "b/__MACOSX/._a.png", ".DS_Store"):
            file = tmp_path / part / junk
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"junk")
    expected = ([0, 1, 2], [0, 1, 2])
    assert labels(data(folder(tmp_path)).load()) == expected
    assert labels(own(tmp_path / "train", tmp_path / "test").load()) == expected
    assert content([tmp_path / "train"]) == before


# ------------------------------------------------------------------ pixels


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RAMP = np.linspace(0, 1, SIZE * SIZE).reshape(SIZE, SIZE)
WIDE = Image.fromarray(np.rint(RAMP * 65535).astype(np.uint16))
FLOAT = Image.fromarray(RAMP.astype(np.float32))
LEVELS = torch.from_numpy(np.rint(RAMP * 255).astype(np.int64))


@pytest.mark.parametrize(
    ("image", "kind", "said"),
    [
        (WIDE, "PNG", "scaled from 16 to 8 bits"),
        (WIDE, "TIFF", "scaled from 16 to 8 bits"),
        (WIDE, "PPM", "scaled from 16 to 8 bits"),
        (FLOAT, "TIFF", "scaled from floats"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_wide_pixels_are_scaled(image: Image.Image, kind: str, said: str, channels: int) -> None:
    notes: list[str] = []
    found = decode("x", encoded(image, kind), channels, SIZE, Pixels(), notes.append)
    assert found.shape[0] == channels
    assert np.abs(found.astype(int) - LEVELS.numpy()).max() <= 1
    assert said in notes[0]


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (RAMP.astype(np.float32) * 300, "floats from 0 to 300, expected 0 to 1"),
        (np.full((SIZE, SIZE), np.nan, np.float32), "floats from nan"),
        ((RAMP * 1e6).astype(np.int32), "signed integers, whose range is not known"),
    ],
)
def test_pixels_of_unknown_range_are_refused(pixels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=f"x.tif: not a readable image .{message}.*8 or 16 bits"):
        decode("x.tif", encoded(Image.fromarray(pixels), "TIFF"), 1, SIZE)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_unless_told_off(kind: str, orientation: int) -> None:
    """As Pillow's own ``exif_transpose`` turns them."""
    pixels = np.zeros((SIZE, SIZE), np.uint8)
    pixels[: SIZE // 2, : SIZE // 4] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    blob = encoded(Image.fromarray(pixels), kind, exif=exif)
    turns = [None, None, np.fliplr, lambda x: np.rot90(x, 2), np.flipud, np.transpose]
    turns += [lambda x: np.rot90(x, -1), lambda x: np.rot90(x, 2).T, np.rot90]
    turn = turns[orientation] or (lambda x: x)
    for upright, expected in ((True, turn(pixels)), (False, pixels)):
        notes: list[str] = []
        how = Pixels(exif_orientation=upright)
        found = decode("x", blob, 1, SIZE, how, notes.append)[0]
        assert np.abs(found.astype(int) - expected.astype(int)).max() < 60
        assert bool(notes) == (orientation > 1)
        assert all("data.exif_orientation=false" in n for n in notes)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparent_parts_show_the_background(mode: str) -> None:
    image = Image.new(mode, (SIZE, SIZE))
    options = {"transparency": 0} if mode in ("P", "L") else {}
    blob = encoded(image, "PNG", **options)
    for colour in ((255, 255, 255), (10, 20, 30)):
        notes: list[str] = []
        found = decode("x", blob, 3, SIZE, Pixels(background=colour), notes.append)
        assert found[:, 3, 3].tolist() == list(colour)
        assert f"data.background={list(colour)}" in notes[0]
    with pytest.raises(ConfigError, match=r"data.background=\[1, 2\]: expected three levels"):
        data(None, background=[1, 2])


def test_the_notes_say_what_was_done_to_images(tmp_path: Path) -> None:
    tree(tmp_path, train=["0", "1", "2"], test=["0", "1", "2"])
    WIDE.save(tmp_path / "test" / "1" / "wide.png")
    for storage in ("resident", "stream"):
        notes = data(folder(tmp_path), storage=storage).load().notes
        assert notes == ("t test: 1 of 4 images scaled from 16 to 8 bits",)
    found = own(None, tmp_path / "test").load().notes
    assert found == ("data.test: 1 of 4 images scaled from 16 to 8 bits",)


def test_a_trigger_picture_is_read_like_other_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    half = np.zeros((SIZE, SIZE), np.uint8)
    half[:4] = 255
    Image.fromarray(half).save(tmp_path / "turned.png", exif=exif)
    WIDE.save(tmp_path / "wide.png")
    for name, expected in (("turned", half[::-1] / 255), ("wide", LEVELS.numpy() / 255)):
        trigger = Picture(
            **{"path": str(tmp_path / f"{name}.png"), "opacity": 1.0, "row": 0, "column": 0},
            **{
                "spec": make_spec(image_size=SIZE),
                "poison_rate": 0.1,
                "cover_rate": 0.0,
                "poison_count": 0,
            },
            **{"target_class": 0, "target_rule": "all_to_one", "source_classes": []},
            pool="all",
            augmentation="crop_flip",
        )
        for channel in trigger.pattern.numpy():
            assert np.abs(channel - expected).max() < 0.01
        assert trigger.mask.eq(1).all()


# ------------------------------------------------------------------ links


def test_links_are_followed_once(tmp_path: Path) -> None:
    store = tree(tmp_path / "store", a=["deep", "deeper"])
    for part in ("train", "test"):
        tree(tmp_path, **{part: ["0", "1"]})
        (tmp_path / part / "2").symlink_to(store / "a")
        (tmp_path / part / "1" / "more").symlink_to(store / "a")
        (tmp_path / part / "1" / "again").symlink_to(store / "a")
        (tmp_path / part / "0" / "b.png").symlink_to(tmp_path / part / "0" / "a.png")
    expected = [0, 0, 1, 1, 1, 2, 2]
    assert labels(data(folder(tmp_path)).load()) == (expected, expected)
    assert labels(own(None, tmp_path / "test").load())[1] == expected
    before = content([tmp_path / "test"])
    save(store / "a" / "deep" / "new.png")
    assert content([tmp_path / "test"]) != before


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_link_that_leads_back_is_refused(tmp_path: Path, target: str) -> None:
    tree(tmp_path, train=["0", "1", "2"], test=["0", "1", "2"])
    (tmp_path / "train" / "1" / "back").symlink_to(target)
    for reader in (data(folder(tmp_path)), own(tmp_path / "train", None)):
        with pytest.raises(DataError, match=r"1/back: .*leads back to a folder that contains it"):
            reader.load()
    assert content([tmp_path / "train"])


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    tree(tmp_path, train=["0", "1", "2"], test=["0", "1", "2"])
    (tmp_path / "test" / "1" / "gone.png").symlink_to("/nowhere/x.png")
    (tmp_path / "test" / "1" / "self.png").symlink_to("self.png")
    (tmp_path / "test" / "2" / "folder.png").mkdir()
    os.mkfifo(tmp_path / "test" / "2" / "pipe.png")
    for reader in (data(folder(tmp_path)), own(None, tmp_path / "test")):
        with pytest.raises(DataError) as told:
            reader.load()
        text = str(told.value)
        assert text.startswith("4 images cannot be read:")
        for part in (
            "gone.png: a link to /nowhere/x.png",
            "self.png: a link to",
            "pipe.png: a dev",
        ):
            assert part in text
        assert "folder.png: a folder, not an image file; rename" in text
    assert content([tmp_path / "test"])
    (tmp_path / "train" / "3").symlink_to("/nowhere")
    with pytest.raises(DataError, match="train/3: a link to /nowhere, which is not there"):
        data(folder(tmp_path)).load()


# ------------------------------------------------------------------ tables


ROWS = [png(10), png(20), png(30)]
STRUCTS = [{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(ROWS)]


@pytest.mark.parametrize(
    "columns",
    [
        {"image": STRUCTS, "label": [0, 1, 2]},
        {"img": STRUCTS, "fine_label": [0, 1, 2], "coarse_label": [0, 0, 0]},
        {"image": [{"bytes": b} for b in ROWS], "label": [0.0, 1.0, 2.0]},
        {"image": ROWS, "label": ["a", "b", "c"]},
        {"image": ROWS, "label": ["0", "1", "2"]},
        {"picture": pa.array(ROWS, pa.large_binary()), "class": pa.array([0, 1, 2], pa.uint8())},
        {"data": ROWS, "label": pa.array(["a", "b", "c"]).dictionary_encode()},
        {"image": [{"path": f"files/{i}.png", "bytes": None} for i in range(3)], "y": [0, 1, 2]},
        {"file_name": ["files/0.png", "files/1.png", "files/2.png"], "label": [0, 1, 2]},
        {
            "image": pa.chunked_array([STRUCTS[:1], STRUCTS[1:]]),
            "label": [0, 1, 2],
            "id": [7, 8, 9],
        },
    ],
    ids=lambda c: "+".join(c),
)
@pytest.mark.parametrize("stream", [False, True])
def test_layouts_of_tables(tmp_path: Path, columns: dict, stream: bool) -> None:
    for i in range(3):
        save(tmp_path / "files" / f"{i}.png", 10 * (i + 1))
    table(tmp_path / "train.parquet", **columns)
    table(tmp_path / "test.parquet", **columns)
    found = data(parquet(tmp_path), storage="stream" if stream else "resident").load()
    assert found.train.labels.tolist() == [0, 1, 2]
    assert found.train.resident().images[:, 0, 0, 0].tolist() == [10, 20, 30]


def test_absolute_paths_and_booleans(tmp_path: Path) -> None:
    files = [str(save(tmp_path / "elsewhere" / f"{i}.png", i)) for i in range(2)]
    for part in ("train", "test"):
        rows = [{"bytes": None, "path": f} for f in files]
        table(tmp_path / f"{part}.parquet", image=rows, label=[True, False])
    assert labels(data(parquet(tmp_path), classes=2).load()) == ([1, 0], [1, 0])


def test_tables_are_found_by_name_pattern_or_absolute_path(tmp_path: Path, compose_config) -> None:
    (tmp_path / "in [1]").mkdir()
    file = table(tmp_path / "in [1]" / "a[0].parquet", image=STRUCTS, label=[0, 1, 2])
    (file.parent / "._a.parquet").write_bytes(b"junk")
    for pattern in ("in [[]1]/*.parquet", "in [1]/a[0].parquet", str(file)):
        source = Parquet(root=str(tmp_path), train=pattern, test=pattern)
        assert source.files("train") == [file]
        options = ("data.classes=3", f"paths.data={tmp_path}", "data.source.train=t")
        cfg = compose_config("data=image_parquet", *options, "data.source.test=t")
        cfg.data.source.train = pattern
        assert cfg.data.source.content == content([file])
    nothing = Parquet(root=str(tmp_path), train="", test="")
    with pytest.raises(DataError, match="no file matches ''"):
        nothing.load("train", channels=3, size=SIZE, stream=False)


def test_shards_that_differ_harmlessly_are_one_table(tmp_path: Path) -> None:
    table(tmp_path / "train-0.parquet", image=STRUCTS, label=pa.array([0, 1, 2], pa.int8()))
    table(tmp_path / "train-1.parquet", label=[0, 1, 2], extra=[0, 0, 0], image=ROWS)
    table(
        tmp_path / "train-2.parquet",
        image=[{"path": None, "bytes": b} for b in ROWS],
        label=pa.array([0, 1, 2], pa.int64()).dictionary_encode(),
    )
    table(tmp_path / "test.parquet", image=STRUCTS, label=[0, 1, 2])
    assert labels(data(parquet(tmp_path)).load()) == ([0, 1, 2] * 3, [0, 1, 2])


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {"scan": STRUCTS, "photo": STRUCTS, "label": [0, 1, 2]},
            {},
            r"its columns are scan \(struct.*photo.*label \(int64\)\. Say data.image_column=NAME, "
            "one of scan, photo",
        ),
        (
            {"image": STRUCTS, "colour": [0, 1, 2], "size": [0, 1, 2]},
            {},
            r"no column that is surely the label; .*data.label_column=NAME, one of colour, size",
        ),
        ({"image": STRUCTS, "label": [0, 1, 2]}, {"label_column": "x"}, "data.label_column=x; its"),
        ({"label": [0, 1, 2]}, {}, "none of them can hold images"),
        ({"image": STRUCTS, "label": [0, None, 2]}, {}, "row 1 has no label"),
        ({"image": STRUCTS, "label": [0, 0.5, 2]}, {}, "not whole numbers"),
    ],
)
def test_columns_that_cannot_be_told_are_asked_for(
    tmp_path: Path, columns: dict, options: dict, message: str
) -> None:
    for part in ("train", "test"):
        table(tmp_path / f"{part}.parquet", **columns)
    with pytest.raises(DataError, match=rf"train.parquet: .*{message}"):
        data(parquet(tmp_path), **options).load()


def test_tables_without_rows_are_refused(tmp_path: Path) -> None:
    none = {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}
    table(tmp_path / "train.parquet", **none)
    with pytest.raises(DataError, match=r"train\*.parquet: tables without rows"):
        data(parquet(tmp_path)).load()


def test_columns_can_be_named(tmp_path: Path) -> None:
    for part in ("train", "test"):
        columns = {"scan": STRUCTS, "photo": ROWS, "colour": [0, 0, 0], "size": [0, 1, 2]}
        table(tmp_path / f"{part}.parquet", **columns)
    named = data(parquet(tmp_path), image_column="photo", label_column="size")
    assert labels(named.load()) == ([0, 1, 2], [0, 1, 2])


def test_names_behind_numbers_can_be_reordered(tmp_path: Path) -> None:
    about = '{"info": {"features": {"label": {"names": ["a", "b", "c"]}}}}'
    for part in ("train", "test"):
        given = pa.table({"image": STRUCTS, "label": [0, 1, 2]})
        named = given.replace_schema_metadata({"huggingface": about})
        pq.write_table(named, tmp_path / f"{part}.parquet")
    assert labels(data(parquet(tmp_path)).load()) == ([0, 1, 2], [0, 1, 2])
    turned = data(parquet(tmp_path), class_names=["c", "b", "a"])
    assert labels(turned.load()) == ([2, 1, 0], [2, 1, 0])
    table(tmp_path / "train.parquet", image=STRUCTS, label=[0, 1, 2])
    with pytest.raises(DataError, match=r"data.class_names=.*: expected null, because .* numbers"):
        turned.load()


def test_numbers_that_mean_other_classes_elsewhere_are_refused(tmp_path: Path) -> None:
    for part, names in (("train", '["a", "b", "c"]'), ("test", '["c", "b", "a"]')):
        about = '{"info": {"features": {"label": {"names": ' + names + "}}}}"
        given = pa.table({"image": STRUCTS, "label": [0, 1, 2]})
        pq.write_table(
            given.replace_schema_metadata({"huggingface": about}), tmp_path / f"{part}.parquet"
        )
    with pytest.raises(DataError, match="a number means two classes"):
        data(parquet(tmp_path)).load()


# ------------------------------------------------------------------ before anything is trained


@pytest.mark.parametrize("storage", ["resident", "stream"])
def test_all_unreadable_images_are_listed_before_training(tmp_path: Path, storage: str) -> None:
    tree(tmp_path, train=["0", "1", "2"], test=["0", "1", "2"])
    for i in range(3):
        (tmp_path / "train" / str(i) / "bad.png").write_bytes(png()[:40])
    with pytest.raises(DataError) as told:
        data(folder(tmp_path), storage=storage).load()
    assert str(told.value).startswith("3 images cannot be read:")
    assert all(f"train/{i}/bad.png: not a readable image" in str(told.value) for i in range(3))
    rows = [ROWS[0], b"", ROWS[1][:50]]
    for part in ("train", "test"):
        table(tmp_path / f"{part}.parquet", image=rows, label=[0, 1, 2])
    with pytest.raises(DataError, match=r"(?s)2 images cannot be read:.*row 1: .*row 2: "):
        data(parquet(tmp_path), storage=storage).load()


def test_a_changed_data_set_has_another_name(tmp_path: Path, compose_config) -> None:
    """Even if size and times are those of before, as where an archive sets them."""
    root = tree(tmp_path / "data", train=["0", "1", "2"], test=["0", "1", "2"])
    for part in ("train", "test"):
        table(root / f"{part}.parquet", image=ROWS, label=["a", "b", "c"])
    listed = root / "classes.txt"
    given = root / "given.txt"
    given.write_text("a\nb\nc\n")
    sets = (
        ("data=image_folder", f"data.source.root={root}"),
        ("data=image_parquet", f"paths.data={root}", "data.source.train=train.parquet",
         "data.source.test=test.parquet"),
        ("data=image_folder", f"data.source.root={root}", f"data.class_names={given}"),
    )  # fmt: skip

    def names() -> list[str]:
        return [name_of(compose_config(*options, "data.classes=3")) for options in sets]

    image = root / "test" / "1" / "a.png"
    before, first = image.stat(), names()
    assert names() == first
    pixels = bytearray(image.read_bytes())
    pixels[45] ^= 1
    image.write_bytes(bytes(pixels))
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = names()
    assert [a != b for a, b in zip(first, second, strict=True)] == [True, False, True]
    whole = plain(compose_config(*sets[0], "data.classes=3"))
    same = {"attacked": False, "images": "same", "precision": "32-true", "tf32": False}
    recipes = [
        victim_recipe(whole | {"data": {"source": {"content": c}}}, **same) for c in ("1", "2")
    ]
    assert recipes[0] != recipes[1], "the victim is trained anew as well"
    listed.write_text("c\nb\na\n")
    third = names()
    assert all(a != b for a, b in zip(second, third, strict=True))
    given.write_text("c\nb\na\n")
    assert [a != b for a, b in zip(third, names(), strict=True)] == [False, False, True]
