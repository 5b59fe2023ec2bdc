"""Every command of the README and of the site works.

Those of ``RUN_HERE`` run on tiny settings; of the others the config is composed, checked and
assembled. ``.ci/run`` calls the make targets.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from dhbe.checkpoint import preprocessing
from dhbe.cli import plain_names
from dhbe.config.resolution import resolved
from dhbe.config.schema import plain
from dhbe.experiment.assembly import assemble
from dhbe.models.resnet import CifarResNet, SmallResNet
from tests.conftest import ROOT, sampled, tiered
from tests.support.cli import GAME, TINY
from tests.support.commands import called

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_HERE = ("README.md",)
FENCED = re.compile(r"```bash\n(.*?)```", re.DOTALL)
INLINE = re.compile(r"`((?:python|dhbe|dhbe-purify|make|pip) [^`\n]+)`")


def lines(page: Path) -> list[str]:
    """Commands in fenced blocks, and those in running text that are whole."""
    text = page.read_text()
    blocks = "\n".join(FENCED.findall(text)).replace("\\\n", " ")
    fenced = [x for x in blocks.splitlines() if x.strip() and not x.startswith("#")]
    return [x.split("  #")[0].strip() for x in fenced + INLINE.findall(text)]


COMMANDS = sorted({(page.name, line) for page in PAGES for line in lines(page)})
ALL = sorted({line for _, line in COMMANDS})
RUNS = sorted(
    {
        line
        for page, line in COMMANDS
        if page in RUN_HERE
        and line.startswith("python run.py")
        and not {"-m", "--help"} & {*line.split()}
    }
)
COMPOSED = [
    line
    for line in ALL
    if re.match(r"python run\.py|dhbe ", line) and line not in RUNS and "…" not in line
]
MODULES = [line for line in ALL if line.startswith("python -m ")]
SCRIPTS = [line for line in ALL if re.match(r"python (docs|examples)/", line)]
MAKE = [line for line in ALL if line.startswith("make ")]
INSTALL = [line for line in ALL if line.startswith("pip install")]
ELSEWHERE = ("pytest", "dhbe-purify FILE", "dhbe-purify suspicious.pt")
"""``.ci/run`` or ``tests/test_purify.py`` call these."""
REAL = ("data=cifar10", "data=gtsrb", "experiment=")


SIZES = {"classes": 10, "channels": 3, "image_size": 32}
CODE = """from dhbe.models.resnet import CifarResNet

def build():
    return CifarResNet(
        widths=[16, 32, 64], blocks=3, classes=10, channels=3, image_size=32
    )
"""


def files(folder: Path, words: list[str]) -> None:
    """What the commands name: checkpoints, and the code of a network."""
    tiny = SmallResNet(widths=[16, 24], blocks=1, stem_stride=2, **SIZES)
    known = CifarResNet(widths=[16, 32, 64], blocks=3, **SIZES)
    suspicious = tiny if "model=resnet_tiny" in words else known
    for name, network in (("suspicious", suspicious), ("resnet20", known), ("weights", known)):
        torch.save(network.state_dict(), folder / f"{name}.pt")
    (folder / "mynet.py").write_text(CODE)


def test_every_command_is_known() -> None:
    assert len(RUNS) >= 2
    known = {*RUNS, *COMPOSED, *MODULES, *SCRIPTS, *MAKE, *INSTALL, *ELSEWHERE}
    left = [
        x for x in ALL if x not in known and not x.startswith(("eval ", "export ")) and "…" not in x
    ]
    assert not left


def test_make_targets_and_extras_exist() -> None:
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    for line in MAKE:
        target = line.split()[1]
        assert f"\n{target}:" in makefile
        assert f"make {target}" in ci or target == "zoo"  # which takes hours
    project = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    extras = set(re.findall(r"^(\w+) = \[", project.partition("\n[")[0], re.MULTILINE))
    for line in INSTALL:
        for found in re.findall(r"\[([\w,]+)\]", line):
            assert set(found.split(",")) <= extras, line


@pytest.mark.parametrize("line", MODULES)
def test_modules_know_their_options(line: str, tmp_path: Path) -> None:
    words = shlex.split(line)
    if words[2] == "http.server":
        return
    assert importlib.util.find_spec(words[2]) is not None
    options = [w for w in words[3:] if w.startswith("--")]
    if not options:
        return
    done = called(["-m", words[2], "--help"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not [o for o in options if o not in done.stdout]


@pytest.mark.parametrize("line", SCRIPTS)
def test_scripts_exist(line: str) -> None:
    """``tests/test_examples.py`` runs them."""
    assert (ROOT / line.split()[1]).exists()


@pytest.mark.parametrize("line", sampled(COMPOSED, 4))
def test_command_composes(line: str, tmp_path: Path, compose_config, monkeypatch) -> None:
    words = shlex.split(line)[2 if line.startswith("python") else 1 :]
    if {"--help", "--version", "-sc"} & {*words} or re.search(r"\b(FILE|FOLDER|NAME)\b", line):
        return
    words = [w for w in words if w != "-m" and not w.startswith(("hydra/", "hydra.", "--"))]
    words = [w for w in words if w not in ("job", "attack")]
    words = [re.sub(r"=([^\[{,]+),.*", r"=\1", w) for w in plain_names(words)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preprocessing, "PIXELS", 0)  # a short look: these networks are untrained
    files(tmp_path, words)
    if any(w.startswith("+sweep=") for w in words):
        (name,) = (w.split("=")[1] for w in words if w.startswith("+sweep="))
        assert (ROOT / "sweeps" / f"{name}.yaml").exists()
    if {"defense=my_defense", "attack=corner"} & {*words}:
        return  # tests/test_examples.py, tests/test_adding_a_method.py
    cfg = compose_config(*words)
    choices = {w.split("=")[0]: w.split("=")[1] for w in words if "/" not in w and "=" in w}
    tree, _ = resolved(plain(cfg), {"model": "inferred"} | choices)
    assemble(tree)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name in ("purify.md", "zoo.md")], ids=lambda p: p.name
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(page), "exec"), {})


@pytest.mark.parametrize("line", tiered(RUNS, "python run.py".__eq__))
def test_command_runs(line: str, tmp_path: Path) -> None:
    words = shlex.split(line)[2:] if line.startswith("python") else shlex.split(line)[1:]
    if "DHBE_DATA" not in os.environ and any(w.startswith(REAL) for w in words):
        pytest.skip("set DHBE_DATA to run this command on real data")
    files(tmp_path, words)
    extra = ["data.limit=300", "data.train_size=0", *TINY[2:]]
    if "task=purify" in words:
        extra = ["trainer.threads=1"]
        words += [] if any(w.startswith("defense=") for w in words) else ["defense=dhbe_guided"]
    if "victim=zoo" in words:
        extra = [*extra[:2], "trainer.threads=1"]
    if "victim=finetune" in words:
        extra = [*extra[:2], "trainer.threads=1", "victim.schedule.epochs=1"]
    if {"victim=checkpoint", "task=purify"} & {*words}:
        extra = [e for e in extra if e != "victim.epochs=2"]
        extra += ["probe.images=12", "probe.steps=2", "probe.width=4", "data.normalization=none"]
    if any(w.startswith(("victim=cpu", "experiment=")) for w in words):
        extra = ["model=resnet_tiny", *extra]
    if any(w.startswith("experiment=") for w in words):
        extra.append("attack.poison_count=3")  # the protocol's number is for the whole set
    chosen = [w for w in words if w.startswith("defense=")] or ["defense=dhbe"]
    if chosen[0].startswith(("defense=dhbe", "defense=dfad")):
        extra += GAME
    if chosen[0] == "defense=ft_sam":
        extra.append("defense.schedule.epochs=1")
    done = called([str(ROOT / "run.py"), *words, *extra], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("metrics.json"))


@pytest.mark.parametrize(
    "name", sampled(sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml")), 4)
)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_values_of_every_sweep_assemble(name: str, every: bool, compose_config) -> None:
    """The first and the last of each parameter, or each value at least once."""
    file = yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())
    parameters = {
        k: re.split(r",\s*(?![^{]*\})", str(v))
        for k, v in file["hydra"]["sweeper"]["params"].items()
    }
    assert math.prod(map(len, parameters.values())) >= 3
    parameters["seed"] = parameters["seed"][:1]  # it decides nothing here
    given = ["victim.path=given.pt"] if name == "finetuned_victims" else []
    longest = max(map(len, parameters.values()))
    for i in range(longest) if every else (0, -1):
        overrides = [*given, *(f"{k}={axis[i % len(axis)]}" for k, axis in parameters.items())]
        tree = plain(compose_config(f"+sweep={name}", *overrides))
        assemble(resolved(tree, {})[0] if "victim.name" in parameters else tree)
