"""Purifying a foreign checkpoint from end to end: command, console script, Python call."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import dhbe
from dhbe.cli import purify_arguments
from dhbe.core.errors import ConfigError
from dhbe.experiment import pipeline
from dhbe.models.resnet import SmallResNet
from tests.conftest import ROOT
from tests.support.cli import GAME, metrics, run

PROBE = ("probe.images=12", "probe.steps=2", "probe.width=4", "trainer.threads=1")


def network(seed: int = 0) -> SmallResNet:
    torch.manual_seed(seed)
    made = SmallResNet(
        widths=[16, 24], blocks=1, stem_stride=1, classes=5, channels=3, image_size=32
    )
    return made.eval()


SCAN = (
    *(
        "defense.imagination.count=10",
        "defense.imagination.steps=1",
        "defense.scan.patches=[3]",
        "defense.scan.larger=[]",
    ),
    *("defense.scan.corners=[3]", "defense.scan.search.steps=1", "defense.scan.search.judged=10"),
    *("defense.scan.search.per_class=2", "defense.scan.periods=1"),
)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a CIFAR ResNet in others' key layout, nested and behind ``module.``."""
    folder = tmp_path_factory.mktemp("given")
    theirs = {"^stem.0": "conv1", "^stem.1": "bn1", "^head": "fc"}
    weights = {}
    for key, value in network().state_dict().items():
        for pattern, name in theirs.items():
            key = re.sub(pattern, name, key)
        key = re.sub(r"^stages\.(\d)", lambda m: f"layer{int(m[1]) + 1}", key)
        weights[f"module.{key}"] = value
    torch.save({"state_dict": weights, "note": "<script>alert(1)</script>"}, folder / "a b.pth")
    for label in range(5):
        (folder / "images" / str(label)).mkdir(parents=True)
        for i in range(4):
            Image.effect_noise((32, 32), 30 + label).save(folder / f"images/{label}/{i}.png")
    return folder


def test_a_scan_writes_a_verdict_and_no_file_of_theirs(given: Path) -> None:
    task = ("task=scan", f"checkpoint='{given}/a b.pth'", "data.image_size=32")
    done = run(given, *task, *SCAN, *PROBE, "defense.threshold=1e-9", "hydra.run.dir=scanned")
    assert done.returncode == 0, done.stderr
    out = given / "scanned"
    (suspicious,) = metrics(out)["suspected"]["classes"]
    assert not list(out.glob("a b*"))
    page = (out / "report.html").read_text()
    assert f"Class {suspicious} stands out" in page
    assert "leaves the network as it is" in page
    assert "WARNING" not in page


def test_one_command_without_data(given: Path) -> None:
    before = (given / "a b.pth").read_bytes()
    task = ("task=purify", f"checkpoint='{given}/a b.pth'", "data.image_size=32")
    game = ("defense=dhbe_guided", *GAME)
    done = run(given, *task, *game, *PROBE, "hydra.run.dir=blind", WANDB_API_KEY="secret-key-0123")
    assert done.returncode == 0, done.stderr
    out = given / "blind"
    m = metrics(out)
    assert m["purified"]["acc"] is None
    assert m["model"] == "resnet_small"
    found = m["evidence"]
    assert found["agreement"]["total"] == 24
    assert {len(found["reach"][r]) for r in ("victim", "purified")} == {5}
    assert any(change > 0 for change in found["weights"].values())
    notes = " ".join(m["notes"])
    for part in ("data.normalization=cifar10 is assumed", "accuracy of neither", "no proof"):
        assert part in notes
    page = (out / "report.html").read_text()
    assert "Reach:" in page
    assert "<script" not in page
    for file in out.rglob("*"):
        assert file.is_dir() or b"secret-key-0123" not in file.read_bytes(), file
    assert (given / "a b.pth").read_bytes() == before
    old = torch.load(given / "a b.pth", weights_only=True)
    new = torch.load(out / "a b-purified.pth", weights_only=True)
    assert new["note"] == old["note"]
    assert list(new["state_dict"]) == list(old["state_dict"])
    assert any((new["state_dict"][k] != v).any() for k, v in old["state_dict"].items())


@pytest.mark.long
def test_with_a_users_images(given: Path) -> None:
    """Few-sample defense, accuracy before and after, and a suspected trigger."""
    folders = (f"data.clean={given}/images", f"data.test={given}/images", "data.image_size=32")
    done = run(
        given,
        *("task=purify", f"checkpoint='{given}/a b.pth'", *folders, *PROBE),
        *("defense=finetune", "defense.schedule.epochs=1", "hydra.run.dir=seen"),
        f"trigger={ROOT}/tests/trigger.png",
    )
    assert done.returncode == 0, done.stderr
    m = metrics(given / "seen")
    assert m["budget"] == "own"
    assert m["counts"]["purified"]["acc"]["total"] == 20
    assert m["counts"]["victim"]["asr"]["total"] == 16
    assert m["attack"] == "picture"
    assert re.search(r"the trigger moves \d+ of 20 images to another class", " ".join(m["notes"]))


@pytest.mark.long
def test_a_suppressed_shortcut_is_one_of_weights(given: Path) -> None:
    """The user's own class, with both its shortcuts, loads the network that SSFT measured."""
    options = {"image_size": 32, "classes": 5, "overrides": ["defense.schedule.epochs=1", *PROBE]}
    purified = dhbe.purify(network(), defense="ssft", clean=given / "images", **options)  # type: ignore[arg-type]
    loaded = network(1)
    loaded.load_state_dict(purified.state_dict(), strict=True)
    x = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(loaded(x), purified(x))
    assert (loaded.stages[1][0].downsample(torch.rand(1, 16, 8, 8)) == 0).all()


def test_choices_that_do_not_go_together(given: Path, compose_config) -> None:
    for attack, choice, message in (
        ("none", "trigger=a.png", "data.test=None: expected labelled images to try trigger=a.png"),
        ("blend", "trigger=a.png", "trigger=a.png: expected alone, not with attack=blend"),
        ("none", "defense=finetune", r"data.clean is not set\): FineTune needs clean images"),
    ):
        task = ("task=purify", f"checkpoint='{given}/a b.pth'", f"attack={attack}", choice)
        with pytest.raises(ConfigError, match=message):
            pipeline.run(compose_config(*task), given / "no", {"attack": attack, "data": "own"})
    assert not (given / "no").exists()


def test_the_result_never_replaces_its_input(given: Path) -> None:
    inside = given / "blind" / "purified.safetensors"
    base = ("task=purify", f"checkpoint={inside}", "defense=clp", *PROBE)
    done = run(given, *base, "hydra.run.dir=blind", "force=true")
    assert done.returncode == 2, done.stderr
    assert "inside the result folder" in done.stderr
    assert inside.exists()


def test_what_a_defense_cannot_do_is_said(tmp_path: Path) -> None:
    import timm

    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, depth=1
    )
    with pytest.raises(
        ConfigError, match=r"no convolution followed by BatchNorm; use defense=dhbe"
    ):
        dhbe.purify(vit, image_size=32, classes=10, defense="clp")


def test_the_console_script_takes_a_file() -> None:
    assert purify_arguments(["a b.pt", "seed=1"]) == [
        "task=purify",
        "checkpoint='a b.pt'",
        "seed=1",
    ]
    assert purify_arguments(["--help"]) == ["task=purify", "--help"]
    assert purify_arguments(["it's.pt"])[1] == r"checkpoint='it\'s.pt'"
    with pytest.raises(ConfigError, match="name the checkpoint first"):
        purify_arguments(["seed=1"])
    done = subprocess.run(
        [sys.executable, "-c", "from dhbe.cli import purify; purify()", "seed=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 2
    assert "name the checkpoint first" in done.stderr


def test_the_python_call_of_the_documentation() -> None:
    text = (ROOT / "docs" / "purify.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    purified = names["purified"]
    assert isinstance(purified, nn.Module)
    assert not purified.training


@pytest.mark.long
def test_the_python_call_can_measure_and_report(given: Path, tmp_path: Path, capsys) -> None:
    options = {"image_size": 32, "classes": 5, "overrides": [*GAME, *PROBE]}
    options["defense"] = "dhbe_guided"
    seen = {"test": given / "images", "trigger": ROOT / "tests" / "trigger.png"}
    purified = dhbe.purify(network(), report=tmp_path / "out", **seen, **options)  # type: ignore[arg-type]
    m = metrics(tmp_path / "out")
    assert m["counts"]["purified"]["acc"]["total"] == 20
    assert m["counts"]["victim"]["asr"]["total"] == 16
    assert {len(m["evidence"]["reach"][r]) for r in ("victim", "purified")} == {5}
    assert (m["model"], m["attack"]) == ("SmallResNet", "picture")
    assert (tmp_path / "out" / "report.html").exists()
    stored = load_file(tmp_path / "out" / "purified.safetensors")
    assert torch.equal(stored["network.head.weight"], purified.head.weight)
    with pytest.raises(ConfigError, match=r"report=.*out: expected a new or empty folder"):
        dhbe.purify(network(), report=tmp_path / "out", **options)  # type: ignore[arg-type]
    assert capsys.readouterr().out == "", "a library prints nothing"


@pytest.mark.long
def test_the_python_call_leaves_the_model_alone_and_plays_the_game() -> None:
    model = network()
    before = json.dumps({k: v.tolist() for k, v in model.state_dict().items()})
    options = {"image_size": 32, "classes": 5, "normalization": {"mean": [0.5], "std": [0.2]}}
    purified = dhbe.purify(model, **options, defense="dhbe_guided", overrides=GAME)  # type: ignore[arg-type]
    assert json.dumps({k: v.tolist() for k, v in model.state_dict().items()}) == before
    assert not torch.equal(purified.head.weight, model.head.weight)
    with pytest.raises(ConfigError, match=r"data\.normalization=mars: expected one of none, half"):
        dhbe.purify(model, image_size=32, classes=5, normalization="mars")
    with pytest.raises(ConfigError, match="FineTune needs clean images"):
        dhbe.purify(model, image_size=32, classes=5, defense="finetune")


@pytest.mark.long
def test_a_model_can_be_scanned_in_memory() -> None:
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sizes = {"image_size": 32, "classes": 5, "normalization": "none"}
    found = dhbe.scan(model, **sizes, overrides=[*SCAN, "defense.threshold=1e-9"])  # type: ignore[arg-type]
    assert found.classes == [found.scores.index(max(found.scores))]
    assert len(found.scores) == 5
    assert found.threshold == 1e-9
    assert any("score by kind of trigger" in note for note in found.notes)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    quiet = dhbe.scan(model, **sizes, overrides=[*SCAN, "defense.threshold=1e9"])  # type: ignore[arg-type]
    assert (quiet.classes, quiet.scores) == ([], found.scores)
