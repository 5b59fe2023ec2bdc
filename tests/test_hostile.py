"""Hostile and broken checkpoints: every one refused, none executed, all within 1 GB."""

from __future__ import annotations

import pickletools
import re
import time
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.hostile import FILES, MARK, verdicts
from benchmarks.hostile_generated import EVIL, EVIL_CODE, every, tried, trusted
from dhbe.checkpoint import Checkpoint
from dhbe.core.errors import DHBEError
from dhbe.data.images import decode
from dhbe.data.sources import Parquet
from tests.conftest import tiered

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())
assert len(CORPUS) >= 4


@pytest.fixture(scope="module")
def slow() -> float:
    """CPU seconds that no refusal takes: 20 times what a million harmless opcodes take here.

    10 on an AMD EPYC without AVX-512.
    """
    start = time.process_time()
    for _ in pickletools.genops(b"(" + b"N" * 1_000_000 + b"t."):
        pass
    return 20 * (time.process_time() - start)


@pytest.mark.parametrize("part", tiered([40, 1], lambda part: part > 1))
def test_hostile_and_broken_files_are_refused_and_never_run(
    tmp_path: Path, slow: float, part: int
) -> None:
    """One file in forty, or all."""
    assert len(FILES) >= 30
    chosen = dict(list(FILES.items())[::part])
    found = verdicts(tmp_path, chosen)
    assert len(found) == len(chosen)
    for row in found:
        assert row["said"], f"accepted: {row['file']}"
        assert "victim.path=" in row["said"] or "data.classes" in row["said"], row["file"]
        assert row["seconds"] < slow, row
        assert row["mb"] < 1024, row
    assert not (tmp_path / MARK).exists()


def test_the_payloads_are_real(tmp_path: Path, monkeypatch) -> None:
    """The same files run their code in a reader that trusts them; else nothing was tested."""
    import pickle

    monkeypatch.chdir(tmp_path)
    FILES["bare pickle with payload, no torch.save"](tmp_path / "bare.pt")
    pickle.loads((tmp_path / "bare.pt").read_bytes())
    assert (tmp_path / MARK).exists()


@pytest.mark.long
def test_nothing_of_a_hostile_file_reaches_who_trusts_ours(tmp_path: Path, slow: float) -> None:
    """One known and one unknown name at every place, all bombs and polyglots.

    ``python -m benchmarks.hostile_generated`` tries the other names too.
    """
    inputs = every()
    assert len(inputs) >= 300
    chosen = {
        k: v
        for k, v in inputs.items()
        if not re.match(r"(eval|exec|subprocess|runpy|timeit|pdb|code|an unknown class|a known)", k)
    }
    assert len(chosen) > 130
    rows, ran = tried(tmp_path, chosen)
    assert not ran
    for row in rows:
        assert "TRACEBACK" not in (row["said"] or ""), row
        assert row["seconds"] < slow, row
        assert row["mb"] < 1024, row
    written = {r["file"] for r in rows if r["written"]}
    assert len(written) > 40
    for polyglot in ("safetensors that is a tar archive", "safetensors that is a pickle"):
        assert polyglot in written


@pytest.mark.long
def test_the_generated_payloads_are_real(tmp_path: Path) -> None:
    """A reader that trusts the inputs runs what lies at each of these places."""
    (tmp_path / f"{EVIL}.py").write_text(EVIL_CODE)
    for i, (name, make) in enumerate(every().items()):
        if name.startswith("an unknown function ") or name.startswith("safetensors that is a"):
            make(tmp_path / f"{i:03}")
    names = sorted(f.name for f in tmp_path.iterdir() if f.suffix != ".py")
    assert len(names) == 26
    assert len(trusted(tmp_path, names)) >= 24


@pytest.mark.parametrize("file", CORPUS, ids=lambda f: f.name)
def test_what_fuzzing_found_stays_mended(file: Path) -> None:
    """Inputs that once ended in something else than the project's own error."""

    def read() -> None:
        if file.name.startswith("image"):
            decode(file.name, file.read_bytes(), 3, 8)
            return
        if file.name.startswith("parquet"):
            source = Parquet(root=str(CORPUS[0].parent), train=file.name, test="")
            source.load("train", channels=3, size=8, stream=False)
            return
        checkpoint = Checkpoint(file)
        for key in checkpoint.places:
            checkpoint.read(key)

    with suppress(DHBEError):
        read()


def test_the_report_escapes_what_others_wrote(tmp_path: Path) -> None:
    """Names of tensors, files and notes are other people's text."""
    import json

    from dhbe.report.page import write_page

    evil = "<script>alert(1)</script>"
    rate = {"hits": 1, "total": 2, "wilson95": [0.1, 0.9]}
    none = dict.fromkeys(("acc", "asr", "asr_conditional", "ra"))
    metrics = {
        **dict.fromkeys(("data", "model", "attack", "defense", "budget", "selection"), evil),
        **{"victim": none, "purified": none, "counts": {"victim": none, "purified": none}},
        **{"der": None, "seed": 0, "notes": [evil], "cached_victim": True, "commit": evil},
        **{"versions": {evil: evil}, "device": evil, "precision": evil, "peak_memory_mb": 1.0},
        "seconds": {"victim": 0.0, "defense": 1.0, "evaluate": 0.0},
        "evidence": {
            "agreement": rate,
            "logit_change": None,
            "reach": {"victim": [rate], "purified": [rate]},
            "weights": {evil: 0.5},
        },
    }
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "config.yaml").write_text(evil)
    (tmp_path / "curves.csv").write_text("")
    (tmp_path / "pictures").mkdir()
    page = write_page(tmp_path).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 10
    assert "their logits differ by – on average" in page, "what was not finite is null in the file"
