"""Sources, splits, augmentation, and the real files where they are."""

from __future__ import annotations

import hashlib
import io
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from dhbe.config.schema import plain
from dhbe.core.errors import DataError
from dhbe.core.rng import generator
from dhbe.core.types import DataSpec
from dhbe.data import Data, Resident, TrainingBatches, augment, to_float
from dhbe.data.images import ImageSet
from dhbe.data.loader import augmented, rotate
from dhbe.data.reading import Keep, Reading
from dhbe.data.sources import Folder, Parquet, Torchvision
from dhbe.data.splits import stratified
from tests.conftest import CONF, ROOT, names, needs_data
from tests.support.fixtures import make_spec

EMBEDDED = ROOT / "dhbe" / "data" / "embedded"


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tables(folder: Path, *, corrupt: bool = False) -> np.ndarray:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    rows = [{"bytes": png(p), "path": f"{i // 3:05d}_{i:05d}.png"} for i, p in enumerate(pixels)]
    if corrupt:
        rows[5]["bytes"] = rows[5]["bytes"][:40]
    for part in ("train", "test"):
        pq.write_table(
            pa.table({"image": rows, "label": [i % 2 for i in range(12)]}),
            folder / f"{part}.parquet",
        )
    return pixels


def data_of(source, **changes) -> Data:
    known = {
        "name": "t",
        "classes": 2,
        "channels": 3,
        "image_size": 8,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "flip": False,
        "crop_padding": 0,
        "balanced": True,
        "train_size": 0,
        "pool_fraction": 0.5,
        "split_seed": 0,
        "storage": "resident",
        "limit": 0,
        "source": source,
    }
    return Data(**(known | changes))


def test_every_data_config_composes(compose_config) -> None:
    found = names("data")
    assert len(found) == 13
    for name in found:
        extra = []
        if name == "image_folder":
            extra = ["data.classes=3", "data.source.root=somewhere"]
        if name == "image_parquet":
            extra = ["data.classes=3", "data.source.train=a", "data.source.test=b"]
        if name == "own":  # a checkpoint would answer these
            extra = ["data.classes=3", "data.channels=3", "data.image_size=32"]
            extra.append("data.normalization=cifar10")
        data = instantiate(plain(compose_config(f"data={name}", *extra))["data"])
        assert data.spec.name == name
        assert (CONF / "data" / f"{name}.yaml").exists()


@pytest.mark.long
def test_embedded_subset_is_balanced_small_and_as_recorded() -> None:
    sums = dict(line.split()[::-1] for line in (EMBEDDED / "SHA256SUMS").read_text().splitlines())
    files = sorted(EMBEDDED.glob("*.parquet"))
    assert {f.name for f in files} == sums.keys()
    assert sum(f.stat().st_size for f in files) <= 16_000_000
    for f in files:
        assert hashlib.sha256(f.read_bytes()).hexdigest() == sums[f.name]
    source = Parquet(root=str(EMBEDDED), train="*train.parquet", test="*test.parquet")
    for part, per_class in (("train", 760), ("test", 100)):
        images = source.load(part, channels=3, size=32, stream=False)
        assert images.labels.bincount().tolist() == [per_class] * 10


def test_parquet_pixels_survive_and_streaming_agrees(tmp_path: Path) -> None:
    pixels = write_tables(tmp_path)
    source = Parquet(root=str(tmp_path), train="train.parquet", test="test.parquet", by_track=True)
    resident = source.load("train", channels=3, size=8, stream=False)
    streamed = source.load("train", channels=3, size=8, stream=True)
    assert torch.equal(resident.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert torch.equal(streamed.resident().images, resident.images)
    assert resident.groups.tolist() == [i // 3 for i in range(12)]
    order = torch.tensor([7, 1, 3])
    for a, b in zip(resident.batches(order, 2), streamed.batches(order, 2), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("stream", [False, True])
def test_only_images_that_are_kept_are_decoded(tmp_path: Path, stream: bool) -> None:
    """The broken one in row 5 stops a reader that keeps it, and no other."""
    pixels = write_tables(tmp_path, corrupt=True)
    source = Parquet(root=str(tmp_path), train="train.parquet", test="test.parquet", by_track=True)
    kept = torch.tensor([4, 6, 9])

    def read(keep: Keep) -> ImageSet:
        return source.load("train", channels=3, size=8, stream=stream, reading=Reading(keep=keep))

    found = read(lambda labels: kept[: len(labels)])
    assert torch.equal(found.resident().images, torch.from_numpy(pixels)[kept].permute(0, 3, 1, 2))
    assert found.groups.tolist() == [1, 2, 3]
    assert found.labels.tolist() == [0, 0, 1]
    with pytest.raises(DataError, match="row 5"):
        read(lambda labels: torch.arange(4, 7))


def test_folder_source(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for c, value in (("cat", 10), ("ant", 200)):
            (tmp_path / part / c).mkdir(parents=True)
            file = tmp_path / part / c / "1.png"
            file.write_bytes(png(np.full((8, 8, 3), value, np.uint8)))
    images = Folder(root=str(tmp_path), train="train", test="test").load(
        "train", channels=1, size=4, stream=False
    )
    assert images.labels.tolist() == [0, 1]  # ant, cat
    assert images.images[:, 0, 0, 0].tolist() == [200, 10]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Parquet(root="/nowhere", train="a*", test="b"), "paths.data=/nowhere: no file matches"),
        (Folder(root="/nowhere", train="train", test="test"), "data.source.root"),
        (
            Torchvision(
                dataset="CIFAR10",
                root="/nowhere",
                download=False,
                train={"train": True},
                test={"train": False},
            ),
            "data.source.otherwise.download=true",
        ),
    ],
    ids=["parquet", "folder", "torchvision"],
)
def test_missing_files_say_what_to_do(source, message: str) -> None:
    with pytest.raises(DataError, match=message):
        source.load("train", channels=3, size=8, stream=False)


def test_corrupt_image_and_table_are_named(tmp_path: Path) -> None:
    write_tables(tmp_path, corrupt=True)
    source = Parquet(root=str(tmp_path), train="train.parquet", test="test.parquet")
    with pytest.raises(DataError, match=r"row 5 \(00001_00005.png\): not a readable image"):
        source.load("train", channels=3, size=8, stream=False)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"train\.parquet: not a readable image table"):
        source.load("train", channels=3, size=8, stream=False)


def test_wrong_labels_and_counts_are_refused(tmp_path: Path) -> None:
    write_tables(tmp_path)
    source = Parquet(root=str(tmp_path), train="train.parquet", test="test.parquet")
    with pytest.raises(DataError, match="expected 13"):
        data_of(source, train_size=13).load()
    table = pa.table(
        {"image": [{"bytes": png(np.zeros((8, 8, 3), np.uint8)), "path": "x"}], "label": [9]}
    )
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"labels 9..9, expected 0..1 \(data.classes=2\)"):
        data_of(source).load()


def test_splits_are_disjoint_balanced_and_independent_of_the_run(tmp_path: Path) -> None:
    write_tables(tmp_path)
    source = Parquet(root=str(tmp_path), train="train.parquet", test="test.parquet")
    a, b = data_of(source).load(), data_of(source).load()
    assert not set(a.train_index.tolist()) & set(a.pool_index.tolist())
    assert len(a.train_index) + len(a.pool_index) == 12
    assert a.pool.labels.bincount().tolist() == [3, 3]
    assert torch.equal(a.pool_index, b.pool_index)


def test_groups_stay_together() -> None:
    labels = torch.arange(600) // 300
    groups = torch.arange(600) // 30
    chosen = stratified(labels, 0.1, generator(0, "t"), groups=groups)
    inside = torch.zeros(600, dtype=torch.bool)
    inside[chosen] = True
    for g in groups.unique():
        assert inside[groups == g].unique().numel() == 1
    assert labels[chosen].bincount().tolist() == [30, 30]


def test_augmentation_is_a_crop_and_mirror_of_each_image() -> None:
    x = torch.arange(1, 2 * 1 * 5 * 5 + 1, dtype=torch.float32).view(2, 1, 5, 5).repeat(50, 1, 1, 1)
    out = augment(x, padding=2, flip=True, rng=generator(0, "a"))
    assert out.shape == x.shape
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    seen = set()
    for image, source in zip(out, padded, strict=True):
        views = {
            (i, j, f): (v.flip(-1) if f else v)
            for i in range(5)
            for j in range(5)
            for f in (False, True)
            for v in [source[:, i : i + 5, j : j + 5]]
        }
        matches = [k for k, v in views.items() if torch.equal(v, image)]
        assert matches
        seen.add(matches[0])
    assert len(seen) > 20  # drawn per image, not per batch
    assert torch.equal(augment(x, padding=0, flip=False, rng=generator(0, "b")), x)


def test_rotation_by_hand() -> None:
    """A quarter turn is rot90, no turn changes nothing, black comes in at corners."""
    x = torch.rand(3, 2, 5, 5, generator=generator(0, "x")) + 1
    out = rotate(x, torch.tensor([math.pi / 2, 0, math.pi / 4]))
    torch.testing.assert_close(out[0], x[0].rot90(1, (1, 2)), atol=1e-5, rtol=0)
    assert torch.equal(out[1], x[1])
    weight = 1 - (2 * math.sqrt(2) - 2)  # an eighth of a turn: corners lie sqrt(8) - 2 outside
    torch.testing.assert_close(out[2][:, 0, 0], weight * x[2][:, 0, 2], atol=1e-5, rtol=0)
    torch.testing.assert_close(out[2][:, 2, 2], x[2][:, 2, 2])


def test_recipes_of_augmentation() -> None:
    """VinAI's codes: 80 % cropped by up to 5 of 32 pixels, a quarter turned."""
    still = replace(make_spec(image_size=32, flip=False), augmentation="none")
    x = torch.full((4000, 3, 32, 32), 255, dtype=torch.uint8)
    assert augmented(x, still, generator(0, "a")) is x
    plain = augmented(x, replace(still, augmentation="crop_flip"), generator(0, "a"))
    assert torch.equal(plain, augment(x, padding=2, flip=False, rng=generator(0, "a")))
    out = augmented(x, replace(still, augmentation="crop_flip_rotate"), generator(0, "a"))
    assert torch.equal(
        out, augmented(x, replace(still, augmentation="crop_flip_rotate"), generator(0, "a"))
    )
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    turned = ((out > 0) & (out < 1)).flatten(1).any(1)  # bilinear edges
    assert abs(float(turned.float().mean()) - 0.25) < 0.03
    straight = out[~turned, 0]
    black = (straight == 0).all(2).sum(1), (straight == 0).all(1).sum(1)
    assert max(int(b.max()) for b in black) == 5
    moved = ((black[0] > 0) | (black[1] > 0)).float().mean()
    assert abs(float(moved) - 0.8 * (1 - 1 / 121)) < 0.03


def test_batches_depend_on_seed_and_epoch_only(images: Resident) -> None:
    def take(seed: int, epoch: int, skip: int = 0):
        loader = TrainingBatches(
            images, spec=make_spec(), batch_size=32, seed=seed, device=torch.device("cpu")
        )
        for e in range(skip):
            loader.set_epoch(e)
            list(loader)
        loader.set_epoch(epoch)
        return list(loader)

    first, again, other = take(0, 3), take(0, 3, skip=2), take(0, 4)
    assert len(first) == 2
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, images.labels[a.positions])
    assert not torch.equal(first[0].positions, other[0].positions)
    x = first[0].images
    assert x.dtype == torch.float32
    assert x.min() >= 0
    assert x.max() <= 1


def test_float_conversion_is_exact() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_float(x).mul(255).round().byte(), x)


@needs_data
@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "counts", "first", "mean"),
    [
        ("cifar10", [5000] * 10, [6, 9, 9, 4, 1, 1, 2, 7, 8, 3], [0.4914, 0.4822, 0.4465]),
        ("gtsrb", None, [0] * 10, [0.3398, 0.3117, 0.3210]),
    ],
)
def test_real_files(compose_config, name: str, counts, first, mean) -> None:
    config = plain(compose_config(f"data={name}", f"paths.data={os.environ['DHBE_DATA']}"))
    data = instantiate(config["data"])
    train = data.source.load("train", channels=3, size=32, stream=False)
    test = data.source.load("test", channels=3, size=32, stream=False)
    assert train.labels[:10].tolist() == first
    if counts:
        assert train.labels.bincount().tolist() == counts
        assert test.labels.bincount().tolist() == [c // 5 for c in counts]
    else:
        assert len(train) == 39_209
        assert len(test) == 12_630
        assert train.labels.unique().numel() == 43
    found = train.images.float().mean((0, 2, 3)).div(255)
    torch.testing.assert_close(found, torch.tensor(mean), atol=5e-4, rtol=0)


def test_batches_are_gathered_on_the_device(spec: DataSpec, images: Resident) -> None:
    """Each step's images come from the device, without a copy from the host."""
    device = torch.device("meta")
    moved = images.to(device)
    assert (moved.images.device, moved.labels.device) == (device, device)
    batches = TrainingBatches(images, spec=spec, batch_size=8, seed=0, device=torch.device("cpu"))
    assert batches.images.images.data_ptr() == images.images.data_ptr(), "nothing is copied on CPU"
