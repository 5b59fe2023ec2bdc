"""A config is resolved before its result is named: what files hold is part of the name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dhbe.checkpoint import inference, preprocessing
from dhbe.checkpoint.preprocessing import told
from dhbe.config.identity import cell_name
from dhbe.config.resolvers import name_of
from dhbe.experiment.pipeline import run
from tests.support.cli import metrics
from tests.support.cli import run as command
from tests.support.fixtures import small

SHORT = (
    *("model=resnet_tiny", "model.widths=[16,24]", "model.blocks=1", "data.image_size=16"),
    *("defense=clp", "probe.images=4", "probe.steps=1", "probe.width=4", "trainer.threads=1"),
)
CHOICES = {"data": "own", "model": "m", "attack": "none", "defense": "clp", "budget": "none"}


def weights(file: Path, seed: int) -> Path:
    """A checkpoint; another seed is another network of the same size."""
    torch.save(small(seed).network.state_dict(), file)
    return file


def picture(file: Path, colour: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(file)
    return file


def later(file: Path) -> None:
    """As if the file were written another time; two writes may fall into one tick of the clock."""
    then = file.stat().st_mtime_ns + 10**9
    os.utime(file, ns=(then, then))


def test_a_replaced_checkpoint_is_purified_anew_and_the_same_one_is_not(
    tmp_path: Path, compose_config, capsys: pytest.CaptureFixture[str]
) -> None:
    file = weights(tmp_path / "given.pt", 1)

    def purify() -> tuple[Path, str]:
        cfg = compose_config("task=purify", f"checkpoint={file}", *SHORT)
        folder = tmp_path / "results" / name_of(cfg)
        assert run(cfg, folder, CHOICES)["cell"] == folder.name
        assert metrics(folder)["cell"] == folder.name
        assert cell_name(yaml.safe_load((folder / "config.yaml").read_text())) == folder.name
        return folder, capsys.readouterr().out

    first, said = purify()
    assert "already there" not in said
    again, said = purify()
    assert again == first
    assert "already there" in said
    weights(file, 2)
    other, said = purify()
    assert other != first
    assert "already there" not in said
    assert (first / "metrics.json").exists()
    weights(file, 1)
    assert purify()[0] == first, "the content counts, not when it was written"


def test_a_checkpoint_is_looked_at_once_though_a_run_asks_twice(
    tmp_path: Path, compose_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Telling the normalisation takes seconds: once for the name, not again for the run."""
    looks = []
    monkeypatch.setattr(inference, "told", lambda *a, **k: looks.append(1) or told(*a, **k))
    monkeypatch.setattr(preprocessing, "PIXELS", 0)
    cfg = compose_config("task=purify", f"checkpoint={weights(tmp_path / 'given.pt', 1)}", *SHORT)
    name = name_of(cfg)
    assert run(cfg, tmp_path / "results" / name, CHOICES)["cell"] == name
    assert len(looks) == 1
    weights(tmp_path / "given.pt", 2)
    assert name_of(cfg) != name
    assert len(looks) == 2


@pytest.mark.long
def test_the_command_names_its_folder_like_the_result(tmp_path: Path) -> None:
    file = weights(tmp_path / "given.pt", 1)
    task = ("task=purify", f"checkpoint={file}", *SHORT, f"paths.results={tmp_path}/results")
    for seed, folders in ((1, 1), (1, 1), (2, 2)):
        weights(file, seed)
        done = command(tmp_path, *task)
        assert done.returncode == 0, done.stderr
        found = [f.parent for f in (tmp_path / "results").glob("*/metrics.json")]
        assert len(found) == folders
        assert {metrics(f)["cell"] for f in found} == {f.name for f in found}


def test_images_that_a_config_names_are_part_of_the_name(tmp_path: Path, compose_config) -> None:
    image = picture(tmp_path / "images" / "0" / "a.png", 10)
    file = weights(tmp_path / "given.pt", 1)
    task = ("task=purify", f"checkpoint={file}", *SHORT, f"data.test={tmp_path}/images")
    trained = ("data=image_folder", "data.classes=2", f"data.source.root={tmp_path}")
    parts = ("data.source.train=images", "data.source.test=images")
    for options in (task, (*trained, *parts)):
        first = name_of(compose_config(*options))
        assert name_of(compose_config(*options)) == first
        later(image)
        changed = name_of(compose_config(*options))
        assert changed != first
        picture(tmp_path / "images" / "1" / "b.png", 20)
        assert name_of(compose_config(*options)) not in (first, changed)


@pytest.mark.parametrize(
    ("option", "write"),
    [
        ("trigger", lambda f, i: picture(f, i)),
        ("model.factory", lambda f, i: f.write_text(f"def build(): ...  # {i}")),
    ],
)
def test_a_trigger_and_a_users_code_are_known_by_their_content(
    tmp_path: Path, compose_config, option: str, write
) -> None:
    file = tmp_path / ("trigger.png" if option == "trigger" else "mynet.py")
    options = ("model=own", f"model.factory={file}:build")
    if option == "trigger":
        images = picture(tmp_path / "images" / "0" / "a.png", 10).parent.parent
        given = weights(tmp_path / "given.pt", 1)
        options = ("task=purify", f"checkpoint={given}", *SHORT, f"trigger={file}")
        options += (f"data.test={images}",)
    names = []
    for content in (1, 1, 200):
        write(file, content)
        names.append(name_of(compose_config(*options)))
    assert names[0] == names[1] != names[2]


def test_what_cannot_be_resolved_is_named_and_left_to_its_run(
    tmp_path: Path, compose_config
) -> None:
    cfg = compose_config("task=purify", f"checkpoint={tmp_path}/none.pt")
    assert name_of(cfg) == name_of(cfg) != name_of(compose_config("task=purify", "checkpoint=b"))
