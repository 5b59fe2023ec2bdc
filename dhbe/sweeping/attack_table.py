"""Victims of many attacks -> one table and one picture sheet.

``python -m dhbe.sweeping.attack_table DIR... --out docs/results/attacks_cpu [--sheet FILE]``
reads finished results, adds them to OUT.csv (a newer row replaces an older one of the same data,
model, budget, attack, options and seed, so the table grows over several machines) and writes
OUT.md, where everything above a line ``<!-- table -->`` stays as it is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from dhbe.report.collect import collect
from dhbe.report.folder import read_metrics
from dhbe.report.tables import markdown
from dhbe.report.texts import neutral, original

SETTING = ["data", "model", "epochs", "seed"]
KEYS = [*SETTING, "attack", "attack_variant"]
RUN = ["case", "seed"]
MARK = "<!-- table -->\n\n"
SHOWN = 3
"""Test images per attack on the sheet."""
GAIN = 4
"""Amplification of the residual on the sheet."""


def stealth(clean: np.ndarray, triggered: np.ndarray) -> dict[str, float]:
    """PSNR in dB, SSIM, largest change in levels of 255; images (N, C, H, W) uint8."""
    a, b = (torch.from_numpy(v).double() / 255 for v in (clean, triggered))
    ssim = structural_similarity_index_measure(b, a, data_range=1.0)
    assert isinstance(ssim, torch.Tensor)
    psnr = peak_signal_noise_ratio(b, a, data_range=1.0)
    return {"psnr": float(psnr), "ssim": float(ssim), "linf": float((a - b).abs().max() * 255)}


def examples(folder: str) -> dict[str, np.ndarray]:
    """Clean and triggered test images of a result."""
    return dict(np.load(Path(folder) / "examples.npz"))


def victims(folders: list[Path]) -> pd.DataFrame:
    """One row per finished result without a defense; newest last."""
    table = collect(folders)
    if table.empty:
        return table
    table = table[table["defense"] == "none"]
    return table.drop_duplicates(RUN, keep="last").reset_index(drop=True)


def rows(table: pd.DataFrame) -> pd.DataFrame:
    """What the table shows, rates in percent."""
    found = []
    for row in table.to_dict("records"):
        shown = examples(row["folder"])
        baseline = row["clean_baseline_asr"]
        pictures = stealth(shown["clean"], shown["triggered"]) if "triggered" in shown else {}
        found.append(
            {k: row[k] for k in (*KEYS, "case")}
            | {"poison_rate": poisoned(row), "augmentation": augmentation(row)}
            | {
                k: 100 * row[f"victim_{k}"]
                for k in ("acc", "asr", "ra")
                if _known(row[f"victim_{k}"])
            }
            | ({"floor": 100 * baseline} if _known(baseline) else {})
            | pictures
            | {"seconds": row["seconds_victim"], "commit": row["commit"]}
        )
    return pd.DataFrame(found)


def poisoned(row: dict[Any, Any]) -> float:
    """Share of the training images that are poison; a class may be too small for the rate."""
    share = read_metrics(Path(row["folder"])).get("poisoned")
    return float(row["poison_rate"]) if share is None else round(share, 4)


def augmentation(row: dict[Any, Any]) -> str:
    """Of the victim's training; older results do not say, and cropped and mirrored."""
    return str(row["case_options"].get("attack.augmentation", "crop_flip"))


def _known(value: Any) -> bool:
    return value is not None and not pd.isna(value)


def merged(old: Path, new: pd.DataFrame) -> pd.DataFrame:
    """Rows of a former table, replaced where there are newer ones."""
    if old.exists():
        former = original(pd.read_csv(old, keep_default_na=False, na_values=[""]))
        former["attack_variant"] = former["attack_variant"].fillna("")
        if "augmentation" not in former:
            former["augmentation"] = "crop_flip"
        new = pd.concat([former, new], ignore_index=True)
    return new.drop_duplicates(RUN, keep="last").sort_values(KEYS, ignore_index=True)


def text(table: pd.DataFrame) -> str:
    """The table as Markdown, accuracy also as difference to the clean-trained network."""
    table = table.copy()
    untouched = table[table["attack"] == "none"].drop_duplicates(SETTING, keep="last")
    clean = untouched.set_index(SETTING)["acc"]
    base = [clean.get(tuple(k)) for k in table[SETTING].to_numpy().tolist()]
    gap = [f"{a - b:+.1f}" if _known(b) else "–" for a, b in zip(table["acc"], base, strict=True)]
    table["vs clean"] = gap
    table["commit"] = [c[:7] if _known(c) else "–" for c in table["commit"]]
    columns = {"acc": 1, "vs clean": None, "asr": 1, "ra": 1, "floor": 1}
    columns |= {"psnr": 1, "ssim": 3, "linf": 0, "seconds": 0, "commit": None}
    for name, digits in columns.items():
        if digits is not None:
            values = table.get(name, [None] * len(table))
            table[name] = [f"{v:.{digits}f}" if _known(v) else "–" for v in values]
    titles = {
        "attack_variant": "options",
        "acc": "ACC",
        "asr": "ASR",
        "ra": "RA",
        "psnr": "PSNR",
        "ssim": "SSIM",
    }
    chosen = table[[*KEYS, "poison_rate", "augmentation", *columns]]
    return markdown(chosen.rename(columns=titles | {"linf": "max change"}))


def sheet(table: pd.DataFrame) -> Figure:
    """Clean, triggered, amplified difference (grey: none) of a few test images per attack."""
    table = table[[("triggered" in examples(f)) for f in table["folder"]]]
    names = [
        "\n".join(
            [
                r["attack"],
                *([r["data"]] * (r["data"] != "cifar10")),
                *r["attack_variant"].split(", "),
            ]
        )
        for r in table.fillna("").to_dict("records")
    ]
    figure = Figure(figsize=(3 * SHOWN * 0.8 + 2, 0.8 * len(names) + 0.4), layout="constrained")
    axes = figure.subplots(len(names), 3 * SHOWN, squeeze=False)
    for line, name, folder in zip(axes, names, table["folder"], strict=True):
        shown = examples(folder)
        figures = stealth(shown["clean"], shown["triggered"])
        clean, triggered = (shown[k][:SHOWN].astype(np.int16) for k in ("clean", "triggered"))
        residual = np.clip(128 + GAIN * (triggered - clean), 0, 255)
        pictures = [p for trio in zip(clean, triggered, residual, strict=True) for p in trio]
        for a, pixels in zip(line, pictures, strict=False):
            a.imshow(pixels.transpose(1, 2, 0).squeeze().astype(np.uint8), cmap="gray")
            a.set(xticks=[], yticks=[])
            a.spines[:].set_visible(False)
        line[0].set_ylabel(
            f"{name}\n{figures['psnr']:.0f} dB, SSIM {figures['ssim']:.2f}\n"
            f"max {figures['linf']:.0f}",
            rotation=0,
            ha="right",
            va="center",
            fontsize=7,
        )
    for a, title in zip(
        axes[0], ("clean", "triggered", f"{GAIN} x difference") * SHOWN, strict=True
    ):
        a.set_title(title, fontsize=7)
    return figure


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dhbe.sweeping.attack_table", description=__doc__
    )
    parser.add_argument("folders", nargs="+", type=Path, help="result folders, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="table, without suffix")
    parser.add_argument("--sheet", type=Path, help="picture to write")
    options = parser.parse_args()
    found = victims(options.folders)
    if found.empty:
        sys.exit("error: no finished result with defense=none in these folders")
    table = merged(options.out.with_suffix(".csv"), rows(found))
    shown, page = text(table), options.out.with_suffix(".md")
    head = page.read_text().partition(MARK)[0] + MARK if page.exists() else ""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(head + shown)
    neutral(table.round(6)).to_csv(options.out.with_suffix(".csv"), index=False)
    print(shown)
    if options.sheet:
        sheet(found).savefig(options.sheet, dpi=110)


if __name__ == "__main__":
    main()
