"""Every kind of file in the published list: read and right, or refused with a remedy that works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.layouts import KINDS, check
from dhbe.checkpoint import preprocessing
from tests.conftest import sampled, tiered

pytestmark = pytest.mark.filterwarnings("ignore")


SLOW = re.compile("VGG|ViT|DenseNet|ConvNeXt|EfficientNet|DCP|Net-18|hub folder of t")
LARGE = [k for k in KINDS if SLOW.search(k.name)]
SMALL = [k for k in KINDS if k not in LARGE]


@pytest.mark.parametrize(
    "kind", [*sampled(SMALL, 6), *tiered(LARGE, lambda kind: False)], ids=lambda kind: kind.name
)
def test_a_kind_of_file(kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessing, "PIXELS", 0)  # a short look: these networks are untrained
    check(kind, tmp_path)


def test_the_list_is_long_and_without_repetitions() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 60
