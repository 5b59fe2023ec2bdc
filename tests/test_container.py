"""Files as containers: what lies beside the weights, what is written, names of other files."""

from __future__ import annotations

import argparse
import json
import pickle
import struct
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from dhbe.checkpoint import Checkpoint
from dhbe.checkpoint.rebuilt import mistaken, write_safetensors
from dhbe.cli import literal, plain_names, purify_arguments
from dhbe.core.errors import ArtefactError


class TheirCnn(nn.Module):
    """A user's network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)


def weights() -> dict[str, Any]:
    """Its state dict, filled."""
    torch.manual_seed(0)
    return TheirCnn().state_dict()


def doubled(file: Path) -> Path:
    """Written back with all weights doubled."""
    checkpoint = Checkpoint(file)
    out = file.parent / "out"
    out.mkdir(exist_ok=True)
    return checkpoint.write(out, {k: 2 * checkpoint.read(k) for k in checkpoint.places})


def trusting(file: Path) -> Any:
    """As a reader that executes whatever is named."""
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
def test_what_lies_beside_the_weights_is_no_reason_to_refuse(
    tmp_path: Path, legacy: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Wide keys as of torch 1.4, OmegaConf, a loss, a class of the user's own."""
    theirs = types.ModuleType("theirs")
    exec("class Meter:\n    pass\n", theirs.__dict__)
    sys.modules["theirs"] = theirs
    state = {"momentum_buffer": torch.arange(3.0)}
    kept = {
        "epoch": 3,
        "best": np.float64(0.5),
        "history": np.arange(6.0).reshape(2, 3).T,
        "big": 3**99,
        "optimizer": {"state": {140_234_066_432_016: state, -(2**63): 1, 3**50: 2}},
        "args": argparse.Namespace(lr=0.1, arch="cnn"),
        "shape": torch.Size([1, 2]),
        "type": torch.float16,
        "seen": {1, 2},
    }
    held = {
        "cfg": OmegaConf.create({"a": {"b": [1, 2]}}),
        "criterion": nn.CrossEntropyLoss(weight=torch.ones(2)),
        "meter": theirs.Meter(),
    }
    file = tmp_path / "given.ckpt"
    content = {"state_dict": weights(), **kept, **held}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    del sys.modules["theirs"]
    back = trusting(doubled(file))
    assert "theirs" not in sys.modules
    assert back.keys() == {"state_dict", *kept}
    assert back["history"].tolist() == kept["history"].tolist()  # type: ignore[attr-defined]
    found = back["optimizer"]["state"]
    assert list(found) == [140_234_066_432_016, -(2**63), 3**50]
    assert torch.equal(found[140_234_066_432_016]["momentum_buffer"], state["momentum_buffer"])
    for key in ("epoch", "best", "big", "args", "shape", "type", "seen"):
        assert back[key] == kept[key], key
    network = TheirCnn()
    network.load_state_dict(back["state_dict"], strict=True)
    assert torch.equal(network.fc.weight, 2 * weights()["fc.weight"])
    assert back["state_dict"]._metadata == weights()._metadata  # type: ignore[attr-defined]
    for name in held:
        assert f"{name} (" in caplog.text


def test_storages_that_are_shared_are_written_once(tmp_path: Path) -> None:
    flat = torch.rand(100_000)
    content = {"conv.weight": flat[:50_000].view(50, 1000), "fc.weight": flat[50_000:].view(50, -1)}
    torch.save(content, tmp_path / "given.pt")
    file = doubled(tmp_path / "given.pt")
    assert file.stat().st_size < 1.1 * (tmp_path / "given.pt").stat().st_size
    assert trusting(file)["fc.weight"].untyped_storage().nbytes() == 400_000


def test_copies_of_the_network_are_purified_alike(tmp_path: Path) -> None:
    own = weights()
    content = {
        "state_dict": own,
        "model_ema": {f"module.{k}": v * 0.9 for k, v in own.items()},
        "averaged": {"shadow": [v for k, v in own.items() if v.is_floating_point()][:0]},
        "list": [v + 1 for v in own.values()],
        "other": {"net": {k: v.numpy() for k, v in own.items()}},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(4, 3, 3, 3)}}},
    }
    torch.save(content, tmp_path / "given.pt")
    back = trusting(doubled(tmp_path / "given.pt"))
    notes = " ".join(Checkpoint(tmp_path / "given.pt").notes)
    for path in ("model_ema.module", "list", "other.net"):
        assert path in notes
    for key, value in own.items():
        twice = 2 * value
        assert torch.equal(back["state_dict"][key], twice)
        assert torch.equal(back["model_ema"][f"module.{key}"], twice)
        assert np.array_equal(back["other"]["net"][key], twice.numpy())
    assert all(map(torch.equal, back["list"], (2 * v for v in own.values())))
    assert back["optimizer"]["state"][0]["exp_avg"].eq(1).all()


def test_half_a_copy_is_refused(tmp_path: Path) -> None:
    own = weights()
    half = {k: v.clone() for k, v in own.items() if not k.startswith("fc")}
    torch.save({"state_dict": own, "student": half}, tmp_path / "given.pt")
    with pytest.raises(ArtefactError, match=r"under 'student' lie 7 of the network's 9 weights"):
        Checkpoint(tmp_path / "given.pt")
    torch.save(own, tmp_path / "given.pt")  # the remedy
    assert len(Checkpoint(tmp_path / "given.pt").places) == 9


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a.pth.tar", "a-purified.pth"),
        ("a.th", "a-purified.th"),
        ("a.safetensors", "a-purified.pt"),
        ("a", "a-purified.pt"),
        ("epoch=9-step=100.ckpt", "epoch=9-step=100-purified.ckpt"),
        ("${oc.env:HOME}.onnx", "${oc.env:HOME}.onnx-purified.pt"),
    ],
)
def test_written_files_bear_the_suffix_of_what_they_are(
    tmp_path: Path, given: str, expected: str
) -> None:
    torch.save(weights(), tmp_path / given)
    assert doubled(tmp_path / given).name == expected
    save_file(weights(), tmp_path / given)
    assert doubled(tmp_path / given).suffix == ".safetensors"


def test_no_header_of_ours_is_a_pickle_or_an_archive(tmp_path: Path) -> None:
    """The length of a safetensors header comes first: its low byte takes every value in turn."""
    tensors, first, needed = {"w": torch.ones(1)}, set(), 0
    for length in range(0, 300, 8):
        metadata = {"note": "x" * length}
        save_file(tensors, tmp_path / "theirs", metadata)
        needed += mistaken(tmp_path / "theirs")
        write_safetensors(tensors, metadata, tmp_path / "ours")
        first.add((tmp_path / "ours").read_bytes()[0])
        assert torch.equal(load_file(tmp_path / "ours")["w"], tensors["w"])
        with pytest.raises(pickle.UnpicklingError, match="invalid load key"):
            pickle.loads((tmp_path / "ours").read_bytes())
    assert needed > 5
    assert len(first) > 5


def test_a_file_that_changes_between_two_readings_is_noticed(tmp_path: Path) -> None:
    """What is hashed and what is read are the same bytes, however short the change was."""
    file = tmp_path / "given.safetensors"
    save_file({"conv.weight": torch.ones(4, 100_000), "fc.weight": torch.ones(4, 4)}, file)
    checkpoint = Checkpoint(file)
    checkpoint.read("fc.weight")
    checkpoint.file.digest()
    before = file.read_bytes()
    with file.open("r+b") as stream:  # the same inode, as an attacker would
        stream.seek(800_000)
        stream.write(b"\0\0\0\1")
    checkpoint.file.source._cache.clear()
    with pytest.raises(ArtefactError, match="changed while it was read"):
        checkpoint.read("conv.weight")
    file.write_bytes(before)
    assert checkpoint.read("conv.weight").eq(1).all()


ONNX = b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:" + bytes(40)
OTHERS = {
    "lfs.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "page.pt": (b"\n<!DOCTYPE html><html>Not found</html>", "HTML page"),
    "net.onnx": (ONNX, "an ONNX model: .*torch.save"),
    "net.h5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "Keras"),
    "net.npy": (b"\x93NUMPY\x01\x00" + bytes(40), "torch.from_numpy"),
    "net.tar.gz": (b"\x1f\x8b\x08" + bytes(40), "tar xzf"),
    "net.json": (b'{"a": [1, 2, 3, 4, 5, 6]}', "JSON"),
    "short": (b"abc", "3 bytes"),
    "none.pt": (b"", "0 bytes"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named_with_what_helps(tmp_path: Path, name: str) -> None:
    raw, said = OTHERS[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ArtefactError, match=said):
        Checkpoint(tmp_path / name)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
def test_whole_pickled_networks_are_named_with_what_helps(tmp_path: Path, legacy: bool) -> None:
    for content in (TheirCnn(), {"model": TheirCnn(), "epoch": 3}):
        torch.save(content, tmp_path / "given.pt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(
            ArtefactError, match=r"whole pickled network of class .*TheirCnn.*save\("
        ):
            Checkpoint(tmp_path / "given.pt")


def test_keras_and_numpy_archives_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "net.npz", w=np.ones(3))
    with pytest.raises(ArtefactError, match="numpy arrays"):
        Checkpoint(tmp_path / "net.npz")
    import zipfile

    with zipfile.ZipFile(tmp_path / "net.keras", "w") as made:
        made.writestr("config.json", "{}")
        made.writestr("model.weights.h5", b"")
    with pytest.raises(ArtefactError, match="Keras"):
        Checkpoint(tmp_path / "net.keras")


def test_messages_stay_short(tmp_path: Path) -> None:
    header = {"x" * 4_000_000: {"dtype": "F32", "shape": ["y" * 4_000_000], "data_offsets": [0, 4]}}
    raw = json.dumps(header).encode()
    (tmp_path / "a.pt").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4))
    with pytest.raises(ArtefactError) as caught:
        Checkpoint(tmp_path / "a.pt")
    assert len(str(caught.value)) < 1_000


NAMES = (
    *("${oc.env:SECRET}.pt", "${package_data:this}/x.pt", r"a\.pt", "epoch=9-step=100.ckpt"),
    *("a b.pt", "[a] {b}.pt", "~", "it's", r"a\'b", r"\${a}", "a\\", "'", "$${x}", "a,b", "#x"),
    *("null", "1", "???", "'q'", '"q"', "é\t☃", "${checkpoint}", r"\\'${", " pad "),
)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files_are_names(name: str, compose_config: Any, monkeypatch: Any) -> None:
    """They reach the run as they are, past Hydra's grammar and past interpolation."""
    from dhbe.config.schema import plain

    monkeypatch.setenv("SECRET", "key-0123")
    monkeypatch.setattr("os.path.lexists", lambda _: True)
    for arguments in (
        ["task=purify", f"checkpoint={literal(name)}"],
        plain_names(["task=purify", f"checkpoint={name}"]),
    ):
        tree = plain(compose_config(*arguments))
        assert tree["victim"]["path"].removeprefix("./") == name
    monkeypatch.setattr("os.path.exists", lambda _: True)
    assert purify_arguments([name])[1] == f"checkpoint={literal(name)}"


def test_sweeps_over_several_files_stay_sweeps(tmp_path: Path) -> None:
    several = ["--multirun", "task=purify", "checkpoint=a.pt,b.pt"]
    assert plain_names(several) == several
    assert plain_names(["checkpoint='a b.pt'", "seed=1"]) == ["checkpoint='a b.pt'", "seed=1"]


def test_ordered_dicts_stay_ordered(tmp_path: Path) -> None:
    torch.save(OrderedDict(reversed(weights().items())), tmp_path / "given.pt")
    back = trusting(doubled(tmp_path / "given.pt"))
    assert type(back) is OrderedDict
    assert list(back) == list(reversed(weights()))
