"""Coverage-guided fuzzing of reading and writing: ``python -m benchmarks.coverage_fuzz``.

Needs ``pip install -e .[fuzz]`` (Python up to 3.13, Linux or macOS). The first byte of an input
says which container the rest goes into, so that mutations reach the pickle of a zip archive instead
of its checksums. What is read is written back and opened again; see ``benchmarks.fuzz``. An input
that ends in anything but a result or the project's own error, or is slow, goes to ``outputs/fuzz``.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
import warnings
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

with atheris.instrument_imports(include=["dhbe.checkpoint"]):
    import dhbe.checkpoint.files  # noqa: F401

from benchmarks.fuzz import SLOW, checkpoint_seeds, keep, read_checkpoint
from dhbe.core.errors import DHBEError

ZIP, RAW, SAFETENSORS = b"\0", b"\1", b"\2"
"""An input is the pickle of a zip archive, a file as it is, or the header of a safetensors file."""
REPORT = 2_000
"""Inputs between two lines of progress."""


def archive(pickle: bytes) -> bytes:
    """A zip archive as torch writes it, with ten storages of 256 bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", pickle)
        file.writestr("archive/version", b"3\n")
        file.writestr("archive/byteorder", b"little")
        for i in range(10):
            file.writestr(f"archive/data/{i}", bytes(256))
    return buffer.getvalue()


def content(case: bytes) -> bytes:
    """The file that an input stands for."""
    kind, rest = case[:1], case[1:]
    if kind == ZIP:
        return archive(rest)
    if kind == SAFETENSORS:
        return len(rest).to_bytes(8, "little") + rest + bytes(1024)
    return rest


def seeds(folder: Path) -> None:
    """The good and the small hostile files of ``benchmarks.fuzz``, as inputs."""
    for i, raw in enumerate(checkpoint_seeds()):
        found = [RAW + raw]
        if zipfile.is_zipfile(io.BytesIO(raw)):
            with zipfile.ZipFile(io.BytesIO(raw)) as file:
                pickles = [n for n in file.namelist() if n.endswith("/data.pkl")]
                found = [ZIP + file.read(n) for n in pickles] or found
        elif raw[8:9] == b"{":
            found.append(SAFETENSORS + raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        for k, case in enumerate(found):
            (folder / f"{i}-{k}").write_bytes(case)


class Fuzzer:
    """Counts cases, refusals and findings, and says so now and then."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.start = folder, time.process_time()
        self.cases = self.refused = 0
        self.findings: dict[str, str] = {}

    def __call__(self, case: bytes) -> None:
        self.cases += 1
        began = time.process_time()
        try:
            read_checkpoint(self.folder, content(case))
        except DHBEError:
            self.refused += 1
        except Exception as error:
            where = f"{type(error).__name__}: {str(error)[:120]}"
            keep(self.findings, "coverage", where, content(case))
        if time.process_time() - began > SLOW:
            keep(self.findings, "coverage", "slow", content(case))
        if self.cases % REPORT == 0:
            minutes = (time.process_time() - self.start) / 60
            row = f"| {self.cases:,} | {self.refused:,} | {minutes:.1f} | {len(self.findings)} |"
            print(row, *self.findings.items(), flush=True)


def main() -> None:
    """Fuzz for so many minutes; each line is | cases | refused | CPU minutes | findings |."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage_fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="by the clock")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with TemporaryDirectory() as name:
        corpus, work = Path(name) / "corpus", Path(name) / "work"
        corpus.mkdir()
        work.mkdir()
        seeds(corpus)
        limits = [f"-max_total_time={int(60 * options.minutes)}", "-max_len=20000"]
        limits += ["-rss_limit_mb=4096", "-timeout=120", str(corpus)]
        atheris.Setup([sys.argv[0], *limits], Fuzzer(work))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
