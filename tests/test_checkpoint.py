"""Other people's files: read as data, recognised, purified in their own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dhbe.checkpoint import Checkpoint, CheckpointFile, completed
from dhbe.core.errors import ArtefactError, ConfigError
from tests.support.fixtures import small
from tests.support.networks import PreAct
from tests.support.writers import WRAPPINGS, Weights, backdoorbench, lightning


def without_weights(content: Any) -> Any:
    """The rest of a file, comparable."""
    if isinstance(content, dict):
        return {k: without_weights(v) for k, v in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_weights(v) for v in content]
    if isinstance(content, np.ndarray):
        return content.tolist()
    return "tensor" if isinstance(content, Tensor) else content


def purified_copy(file: Path, folder: Path) -> tuple[Path, Weights]:
    """Write the file back with all weights doubled (counters too); returns the new weights."""
    network = small(7)
    checkpoint = CheckpointFile(path=str(file))
    checkpoint.load_into(network)
    with torch.no_grad():
        for value in network.network.state_dict().values():
            value.mul_(2)
    before = file.read_bytes()
    target = checkpoint.write_back(network, folder)
    assert file.read_bytes() == before, "the input stays as it is"
    return target, network.network.state_dict()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_is_read_and_written_back(
    tmp_path: Path, wrapping: str, legacy: bool
) -> None:
    source = small(1)
    content = WRAPPINGS[wrapping](source.network.state_dict(), classes=4, image_size=16)
    file = tmp_path / "given.pt"
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    target = small(2)
    CheckpointFile(path=str(file)).load_into(target)
    for key, value in source.network.state_dict().items():
        assert torch.equal(target.network.state_dict()[key], value), key

    (tmp_path / "out").mkdir()
    copy, doubled = purified_copy(file, tmp_path / "out")
    assert copy.name == "given-purified.pt"
    back = torch.load(copy, weights_only=False)  # our own test data; numpy arrays need it
    assert without_weights(back) == without_weights(content)
    again = small(3)
    CheckpointFile(path=str(copy)).load_into(again)
    for key, value in doubled.items():
        assert torch.equal(again.network.state_dict()[key], value), key
    if wrapping.startswith("state dict"):
        small(4).network.load_state_dict(back, strict=True)
        torch.load(copy, mmap=not legacy, weights_only=True)


def test_safetensors_with_metadata_and_half_precision(tmp_path: Path) -> None:
    weights = {
        k: v.half() if v.is_floating_point() else v
        for k, v in small(1).network.state_dict().items()
    }
    save_file(weights, tmp_path / "given.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    copy, doubled = purified_copy(tmp_path / "given.safetensors", tmp_path / "out")
    back = load_file(copy)
    assert {k: v.dtype for k, v in back.items()} == {k: v.dtype for k, v in weights.items()}
    for key, value in doubled.items():
        assert torch.equal(back[key], value.to(back[key].dtype)), key


def test_weights_that_outgrow_their_type_are_not_written(tmp_path: Path) -> None:
    weights = {
        k: v.half() if v.is_floating_point() else v
        for k, v in small(1).network.state_dict().items()
    }
    torch.save(weights, tmp_path / "given.pt")
    network = small(2)
    checkpoint = CheckpointFile(path=str(tmp_path / "given.pt"))
    checkpoint.load_into(network)
    with torch.no_grad():
        network.network.head.weight.fill_(1e6)
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtefactError, match=r"head.weight does not fit torch.float16"):
        checkpoint.write_back(network, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["script", "trace", "export"])
def test_weights_of_programs_are_recovered_unexecuted(tmp_path: Path, kind: str) -> None:
    """Only the numbers come out again: the program's code has not been read."""
    source = small(1).network
    file = tmp_path / "given.pt2"
    x = torch.zeros(2, 3, 16, 16)
    if kind == "export":
        torch.export.save(torch.export.export(source, (x,)), file)
    else:
        program = torch.jit.script(source) if kind == "script" else torch.jit.trace(source, x)
        torch.jit.save(program, file)
    (tmp_path / "out").mkdir()
    copy, doubled = purified_copy(file, tmp_path / "out")
    assert copy.name == "given-purified.safetensors"
    if kind != "export":
        loaded = torch.jit.load(file)
        loaded.load_state_dict(load_file(copy), strict=True)
        assert torch.equal(loaded.state_dict()["head.weight"], doubled["head.weight"])
    for key, value in load_file(copy).items():
        assert torch.equal(value, doubled[key]), key


def test_files_answer_what_the_config_leaves_open(tmp_path: Path, compose_config) -> None:
    from dhbe.config.schema import plain

    weights = PreAct(classes=4).state_dict()
    content = backdoorbench(weights, classes=4, image_size=16)
    torch.save(content | {"model_name": "preactresnet18"}, tmp_path / "attack_result.pt")
    cfg = compose_config("task=purify", f"checkpoint={tmp_path}/attack_result.pt")
    tree, choices = completed(plain(cfg), {})
    assert choices["model"] == "preact_resnet18"
    data = tree["data"]
    assert (data["classes"], data["channels"], data["image_size"]) == (4, 3, 16)
    assert data["normalization"] == "cifar10"
    assert tree["victim"]["assumed"] == []


def test_the_metadata_of_safetensors_answers_too(tmp_path: Path, compose_config) -> None:
    from dhbe.config.schema import plain

    said = {"mean": "[0.1, 0.2, 0.3]", "std": "[0.5,0.5,0.5]", "image_size": "16"}
    file = tmp_path / "given.safetensors"
    save_file(small(1).network.state_dict(), file, said | {"stem_stride": "2"})
    tree, _ = completed(plain(compose_config("task=purify", f"checkpoint={file}")), {})
    assert tree["data"]["normalization"] == {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    assert tree["data"]["image_size"] == 16
    assert tree["victim"]["assumed"] == []


@pytest.mark.long
def test_what_is_not_known_is_said(tmp_path: Path, compose_config) -> None:
    from dhbe.config.schema import plain

    file = tmp_path / "plain.pt"
    torch.save(small(1).network.state_dict(), file)
    task = ("task=purify", f"checkpoint={file}")
    with pytest.raises(ConfigError, match=r"model.stem_stride=1; .*model.stem_stride=2"):
        completed(plain(compose_config(*task)), {})
    chosen = compose_config(*task, "model=resnet_tiny", "model.widths=[16,24]")
    tree, _ = completed(plain(chosen), {})
    size, normalisation = tree["victim"]["assumed"]
    assert "data.image_size=32 is assumed" in size
    assert "data.normalization=cifar10 is assumed" in normalisation


def test_misfits_are_listed(tmp_path: Path) -> None:
    weights = small(1).network.state_dict()
    weights["head.weight"] = torch.zeros(7, 24)
    weights["extra.weight"] = weights.pop("stem.0.weight")
    torch.save(weights, tmp_path / "odd.pt")
    with pytest.raises(ArtefactError) as caught:
        CheckpointFile(path=str(tmp_path / "odd.pt")).load_into(small(2))
    for part in ("missing stem.0.weight", "unknown extra.weight", "(7, 24), expected (4, 24)"):
        assert part in str(caught.value)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    weights = small(1).network.state_dict()
    weights["head.weight"] = weights["head.weight"].to(torch.int8)
    torch.save(weights, tmp_path / "given.pt")
    with pytest.raises(ArtefactError, match=r"head.weight is made of torch.int8"):
        CheckpointFile(path=str(tmp_path / "given.pt")).load_into(small(2))


def test_weights_that_shared_their_place_are_not_mixed_up(tmp_path: Path) -> None:
    weights = small(1).network.state_dict()
    twin = next(k for k in weights if k.endswith("0.bn2.weight"))
    weights[twin] = weights[twin.replace("bn2", "bn1")]
    torch.save(weights, tmp_path / "given.pt")
    network = small(2)
    checkpoint = CheckpointFile(path=str(tmp_path / "given.pt"))
    checkpoint.load_into(network)
    (tmp_path / "out").mkdir()
    checkpoint.write_back(network, tmp_path / "out")
    with torch.no_grad():
        network.network.state_dict()[twin].add_(1)
    with pytest.raises(ArtefactError, match="shares its place in the file with another"):
        checkpoint.write_back(network, tmp_path / "out")


def test_texts_of_a_file_are_never_evaluated(tmp_path: Path, compose_config, monkeypatch) -> None:
    """Names of tensors end up in the config's notes; as interpolations they could read secrets."""
    from dhbe.config.resolution import resolved
    from dhbe.config.schema import plain
    from dhbe.experiment.assembly import assemble

    monkeypatch.setenv("SECRET", "key-0123")
    evil = ("${oc.env:SECRET}", "${package_data:this}", "${", "\x1b[2J")
    weights = {f"module.{k}": v for k, v in small(1).network.state_dict().items()}
    torch.save(weights | {name: torch.ones(1) for name in evil}, tmp_path / "given.pt")
    cfg = compose_config(
        *("task=purify", f"checkpoint={tmp_path}/given.pt", "model=resnet_tiny"),
        *("model.widths=[16,24]", "model.blocks=1", "data.image_size=16"),
    )
    tree, _ = resolved(plain(cfg), {})
    said = " ".join(assemble(tree).source.assumed)
    assert "${oc.env:SECRET}" in said
    assert "key-0123" not in said
    assert "\x1b" not in said


def test_names_that_mean_one_weight_are_not_chosen_from(tmp_path: Path) -> None:
    weights = small(1).network.state_dict()
    theirs = {k.replace("head.", "linear."): v for k, v in weights.items()}
    torch.save(theirs | {"fc.weight": weights["head.weight"]}, tmp_path / "given.pt")
    with pytest.raises(ArtefactError, match="do not fit"):
        CheckpointFile(path=str(tmp_path / "given.pt")).load_into(small(2))


def test_tensors_outside_the_network_are_listed(tmp_path: Path) -> None:
    torch.save(
        lightning(small(1).network.state_dict(), classes=4, image_size=16), tmp_path / "last.ckpt"
    )
    checkpoint = Checkpoint(tmp_path / "last.ckpt")
    assert set(checkpoint.others) == {"criterion.weight"}
    assert checkpoint.facts["num_classes"] == 4


def test_a_file_that_changes_during_the_run_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "given.pt"
    torch.save(small(1).network.state_dict(), file)
    checkpoint = CheckpointFile(path=str(file), sha256="0" * 64)
    with pytest.raises(ArtefactError, match="changed during the run"):
        checkpoint.load_into(small(2))
    file.unlink()
    with pytest.raises(ArtefactError, match="no such file"):
        checkpoint.load_into(small(2))
