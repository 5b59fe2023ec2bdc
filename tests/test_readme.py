"""Every command of the README and of the site works.

Their configs are composed, checked and assembled; then the commands run, on tiny settings, unless
they need more than one machine or package. ``.ci/run`` calls the make targets.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shlex
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml
from pyarrow import parquet

from dhbe.checkpoint import preprocessing
from dhbe.cli import plain_names
from dhbe.config.resolution import resolved
from dhbe.config.schema import plain
from dhbe.experiment.assembly import assemble
from dhbe.models.resnet import CifarResNet, SmallResNet
from tests.conftest import ROOT, sampled
from tests.support.cli import GAME
from tests.support.commands import called
from tests.support.report import write_cell

EMBEDDED = ROOT / "dhbe" / "data" / "embedded"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
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
COMPOSED = [line for line in ALL if re.match(r"python run\.py|dhbe ", line) and "…" not in line]
OTHERS = r"launcher|=ddp|\bNAME\b|=corner|paper_|=ep$"
"""They need other packages, two processes, a name, an attack of the user, days, all of CIFAR-10."""
RUNS = [line for line in COMPOSED if not re.search(OTHERS, line)]
MODULES = [line for line in ALL if line.startswith("python -m ")]
SCRIPTS = [line for line in ALL if re.match(r"python (docs|examples)/", line)]
MAKE = [line for line in ALL if line.startswith("make ")]
INSTALL = [line for line in ALL if line.startswith("pip install")]
ELSEWHERE = ("pytest", "dhbe-purify FILE", "dhbe-purify suspicious.pt")
"""``.ci/run`` or ``tests/test_purify.py`` call these."""


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


@pytest.mark.long
@pytest.mark.parametrize("line", [x for x in MODULES if "dhbe.report " in x])
def test_reports_are_made(line: str, tmp_path: Path) -> None:
    """The other modules run in tests of their own."""
    for folder in ("outputs/results", "outputs/board_runs"):
        for seed in range(2):
            write_cell(tmp_path / folder / str(seed), seed=seed, asr=0.1, data="cifar10")
    shutil.copytree(ROOT / "docs" / "results" / "board", tmp_path / "docs" / "results" / "board")
    done = called(shlex.split(line)[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


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


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of the package's images under the names of CIFAR-10 and GTSRB."""
    folder = tmp_path_factory.mktemp("data")
    for part, count in (("train", 430), ("test", 86)):
        table = parquet.read_table(EMBEDDED / f"cifar10_mini-{part}.parquet")[:count]
        name = "train-1-of-1" if part == "train" else part
        parquet.write_table(table, folder / f"cifar10-{name}.parquet")
        images = [
            {"bytes": row["bytes"], "path": f"{i % 43:05d}/{i // 86:05d}_{i % 30:05d}.ppm"}
            for i, row in enumerate(table["image"].to_pylist())
        ]
        signs = pa.table({"image": images, "label": [i % 43 for i in range(count)]})
        parquet.write_table(signs, folder / f"gtsrb32-{name}.parquet")
    return folder


SHORT = {
    "": "trainer.threads=1 trainer.observe_every=0",
    "data=gtsrb": "data.train_size=0",
    "data=cifar10": "data.train_size=0",
    "experiment=": "data.train_size=0 model=resnet_tiny attack.poison_count=3",
    "model=resnet_small": "model.widths=[16,24]",
    "victim=finetune": "victim.schedule.epochs=1",
    "task=": "probe.images=12 probe.steps=2 probe.width=4 data.normalization=none",
    "task=scan": "defense.imagination.count=10 defense.imagination.steps=1",
    "checkpoint": "probe.images=12 probe.steps=2 probe.width=4",
    "defense=anp": "defense.schedule.epochs=1",
    "defense=finetune": "defense.schedule.epochs=1",
    "defense=ft_sam": "defense.schedule.epochs=1",
    "defense=seam": "defense.forget_schedule.epochs=1 defense.recover_schedule.epochs=1",
    "defense=otbr": "defense.steps=1",
    "+sweep=": "attack=badnets seed=0 defense=clp,none",
}
"""What makes a command short that has these words."""


def shortened(words: list[str]) -> list[str]:
    """The same command on few images, for an epoch or two."""
    defense = next((w for w in words if w.startswith("defense=")), "defense=")
    told = any(w.startswith(("data=", "task=")) for w in words)
    own = not any(re.match(r"victim=(zoo|checkpoint|finetune)|task=", w) for w in words)
    extra = [] if told else ["data.limit=300"]
    extra += ["victim.epochs=2"] if own else []
    extra += [] if any("model=" in w for w in words) or not own else ["model.widths=[16,24]"]
    extra += [o for k, v in SHORT.items() if any(w.startswith(k) for w in words) for o in v.split()]
    if "task=purify" in words and defense == "defense=":
        words, defense = [*words, "defense=dhbe_guided"], "defense=dhbe_guided"
    game = not any(w.startswith(("task=scan", "+sweep=")) for w in words)
    if game and re.fullmatch(r"defense=((dhbe|dfad)\w*)?", defense):
        extra += GAME
    if "auto" in defense:  # make demo runs it
        words = [*(w for w in words if w != defense), "defense=clp"]
    given = {w.split("=")[0].lstrip("+") for w in words}
    return [*words, *(o for o in dict.fromkeys(extra) if o.split("=")[0] not in given)]


@pytest.mark.long
@pytest.mark.parametrize("line", RUNS)
def test_command_runs(line: str, tmp_path: Path, small_data: Path) -> None:
    words = shlex.split(line)[2 if line.startswith("python") else 1 :]
    files(tmp_path, words)
    shows = {"--help", "--cfg", "-sc"} & {*words}
    done = called(
        [str(ROOT / "run.py"), *(words if shows else shortened(words))],
        cwd=tmp_path,
        env=os.environ | {"DHBE_DATA": str(small_data)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout if shows else list(tmp_path.rglob("metrics.json"))


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
