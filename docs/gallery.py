"""The gallery of attacks: ``python docs/gallery.py [RESULTS...]``.

Writes ``docs/gallery.md`` and a picture per attack: test images of the embedded subset, the same
triggered, and their difference. Triggers that their options determine are applied here; those that
are made with a victim are read from results (``python run.py attack=NAME defense=none``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dhbe.api import composed
from dhbe.data.loader import to_float
from dhbe.experiment.assembly import assemble
from dhbe.report.folder import read_metrics
from dhbe.sweeping.attack_table import GAIN, stealth

DOCS = Path(__file__).parent
PICTURES = DOCS / "pictures" / "attacks"
LEFT_OUT = ("none", "picture")
SHOWN, FACTOR, GAP = 5, 3, 2
"""Test images per attack, enlargement, and pixels between them."""
HEAD = f"""# Gallery of attacks

Test images of the embedded CIFAR-10 subset: clean (top), triggered (middle), and {GAIN} times the
difference around grey (bottom). PSNR and SSIM compare the first two rows. Triggers that are made
together with a victim come from a short training on these data (8 epochs; 4 and `scale=cpu` for
Input-aware and ISSBA), which shows their look and is no victim to measure; those of
`trojannn`, `advdoor` and `narcissus` were made with the zoo's clean network. Options, recipes and
what each attack reaches: [the zoo](attacks.md).
"""

Pair = tuple[np.ndarray, np.ndarray]
"""Clean and triggered images (N, C, H, W) uint8."""


def stored(folders: list[Path]) -> dict[str, Pair]:
    """Examples of finished results, by attack."""
    found = {}
    for file in sorted(f for folder in folders for f in folder.rglob("examples.npz")):
        examples = dict(np.load(file))
        if "triggered" in examples:
            name = read_metrics(file.parent)["attack"]
            found[name] = (examples["clean"][:SHOWN], examples["triggered"][:SHOWN])
    return found


def drawn(name: str) -> tuple[Pair | None, str]:
    """Images under the attack's trigger (None: it is made with a victim), and its class."""
    tree = composed([f"attack={name}", "scale=paper", "defense=none", "data.limit=1000"])
    parts = assemble(tree)
    target = str(tree["attack"]["_target_"])
    if not parts.attack.portable:
        return None, target
    splits = parts.data.load()
    assert splits is not None
    eligible = parts.attack.rule.eligible(splits.test.labels).nonzero().flatten()
    images, index = next(iter(splits.test.batches(eligible[:SHOWN], SHOWN)))
    with torch.no_grad():
        made = parts.attack.eval().apply(to_float(images), y=splits.test.labels[index], index=index)
    return (images.numpy(), made.mul(255).round().byte().numpy()), target


def sheet(pair: Pair) -> Image.Image:
    """Three rows of enlarged images on a transparent ground, which suits light and dark pages."""
    clean, triggered = (x.astype(np.int16) for x in pair)
    rows = (clean, triggered, np.clip(128 + GAIN * (triggered - clean), 0, 255))
    tiles = np.stack(rows).astype(np.uint8).transpose(0, 1, 3, 4, 2)  # (3, N, H, W, C)
    tiles = tiles.repeat(FACTOR, axis=2).repeat(FACTOR, axis=3)
    opaque = np.full((*tiles.shape[:-1], 1), 255, dtype=np.uint8)
    tiles = np.concatenate([tiles, opaque], axis=-1)
    tiles = np.pad(tiles, [(0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)])
    whole = tiles.transpose(0, 2, 1, 3, 4).reshape(3 * tiles.shape[2], -1, 4)
    return Image.fromarray(np.ascontiguousarray(whole))


def section(name: str, target: str, pair: Pair) -> Iterator[str]:
    """Heading, paper, formula, picture."""
    module, _, owner = target.rpartition(".")
    loaded = import_module(module)
    title = (loaded.__doc__ or "").splitlines()[0].rstrip(".")
    formula = (getattr(loaded, owner).__doc__ or "").split("\n\n")[0]
    figures = stealth(*pair)
    yield f"## {name}\n"
    yield f"{title}.\n"
    yield f"`{' '.join(formula.replace('`', '').split()).rstrip('.')}`\n"
    yield f"![{name}: clean, triggered, difference](pictures/attacks/{name}.png)\n"
    yield (
        f"PSNR {figures['psnr']:.1f} dB, SSIM {figures['ssim']:.3f}, "
        f"largest change {figures['linf']:.0f} of 255 levels.\n"
    )


def main(folders: list[Path]) -> None:
    """Write page and pictures, if all attacks have something to show."""
    results, found = stored(folders), {}
    for name in sorted(p.stem for p in (DOCS.parent / "conf" / "attack").glob("*.yaml")):
        if name not in LEFT_OUT:
            pair, target = drawn(name)
            found[name] = results.get(name, pair), target
    if missing := [name for name, (pair, _) in found.items() if pair is None]:
        sys.exit(f"no result with a trigger of {', '.join(missing)}; nothing was written")
    lines = [HEAD]
    for name, (pair, target) in found.items():
        assert pair is not None
        picture = sheet(pair).quantize(255, dither=Image.Dither.NONE)
        picture.save(PICTURES / f"{name}.png", optimize=True)
        lines += section(name, target, pair)
    (DOCS / "gallery.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
