"""Identify files that are neither torch nor safetensors, and suggest a remedy."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable
from typing import Any

from dhbe.checkpoint.pickles import Global, Opaque, shown

SAVE = (
    "in the program that made it, save the weights alone: "
    "torch.save(model.state_dict(), 'weights.pt')"
)
KINDS = {
    rb"version https://git-lfs": "a git-lfs pointer, not the file itself: run `git lfs pull`",
    rb"\s*<(!doctype|html|\?xml|head|body)": "an HTML page, perhaps of a failed download: get the "
    "file itself (`curl -LO` its raw link)",
    rb"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes it: DHBE purifies PyTorch networks; "
    "convert it first, then torch.save(model.state_dict(), 'weights.pt')",
    rb"\x08[\x01-\x20][\x12\x1a\x22\x2a\x3a\x42]": f"an ONNX model: {SAVE}, before the export",
    rb"....TFL3": f"a TensorFlow Lite model: {SAVE}, if it came from PyTorch",
    rb"GGUF": f"a GGUF model: {SAVE}",
    rb"\x93NUMPY": "a numpy array: torch.save({name: torch.from_numpy(array)}, 'weights.pt')",
    rb"\x1f\x8b": "packed by gzip: unpack it first (`gunzip`, or `tar xzf`)",
    rb"BZh": "packed by bzip2: unpack it first (`bunzip2`)",
    rb"\xfd7zXZ": "packed by xz: unpack it first (`unxz`)",
    rb"7z\xbc\xaf": "packed by 7-zip: unpack it first (`7z x`)",
    rb"\x28\xb5\x2f\xfd": "packed by zstd: unpack it first (`unzstd`)",
    rb"Rar!": "packed by rar: unpack it first (`unrar x`)",
    rb"\x89PNG|\xff\xd8\xff|GIF8|BM....\0\0\0\0|RIFF....WEBP": "a picture: name the checkpoint",
    rb"%PDF": "a PDF document: name the checkpoint",
    rb"\x7fELF|MZ": "a program: name the checkpoint",
    rb"\s*[{\[]": "a JSON text: name the file of the weights beside it",
}
"""First bytes -> what it is, and the command that helps."""
MEMBERS = {
    r"config\.json|model\.weights\.h5": "a Keras model (.keras): DHBE purifies PyTorch networks; "
    "convert it first, then torch.save(model.state_dict(), 'weights.pt')",
    r".*\.npy": "numpy arrays (.npz): torch.save({k: torch.from_numpy(v) for k, v in "
    "numpy.load(FILE).items()}, 'weights.pt')",
    r"(.*/)?(saved_model\.pb|variables/.*)": "a TensorFlow model: DHBE purifies PyTorch networks",
    r"(.*/)?[^/]+\.(pt|pth|ckpt|bin|th|safetensors)": "an archive with weights inside: unpack it "
    "first (`unzip`) and name the file in it",
    r"(.*/)?MAR-INF/.*": "a TorchServe archive: unpack it first (`unzip`) and name the file in it",
}
"""Records of a zip -> the same."""


def named(head: bytes) -> str:
    """Description of a file of neither format, with the remedy; empty if unknown.

    Args:
        head: its first 512 bytes.
    """
    for pattern, kind in KINDS.items():
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            return kind
    if is_tar(head):
        return (
            "a tar archive: unpack it first (`tar xf`); if torch itself wrote it (before version "
            "0.1.10), load it where you trust it and save it again"
        )
    return ""


def is_tar(head: bytes) -> bool:
    """Whether a reader of tar archives would take the file for one."""
    try:
        tarfile.TarInfo.frombuf(head[:512].ljust(512, b"\1"), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def named_archive(names: Iterable[str]) -> str:
    """Description of a zip that torch did not write; empty if unknown."""
    names = list(names)
    for pattern, kind in MEMBERS.items():
        if any(re.fullmatch(pattern, n) for n in names):
            return kind
    return ""


def module_in(content: Any) -> str:
    """The class of a whole network that was pickled, on top or one key below; empty if none."""
    inner = list(content.values())[:100] if isinstance(content, dict) else []
    for value in [content, *inner]:
        state = value.state if isinstance(value, Opaque) else None
        if isinstance(value, Opaque) and isinstance(state, dict) and "_modules" in state:
            made = value.args[0] if value.args and isinstance(value.args[0], Global) else value
            return shown(made.name, 100)
    return ""
