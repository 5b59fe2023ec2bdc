"""Many result folders -> one tidy table, a summary over seeds, and one self-contained page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import jinja2
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import t as student_t

from dhbe.report.folder import ROLES, read_metrics
from dhbe.report.page import BLUE, ORANGE

KEYS = ["data", "model", "attack", "defense", "budget", "selection"]
"""What a row of the summary is about; everything else is averaged over seeds."""
RATES = ("acc", "asr", "ra")


def collect(folders: list[Path]) -> pd.DataFrame:
    """One row per finished result folder at or below the given ones.

    Rates are fractions; columns ``victim_acc``, ``purified_asr`` and so on.
    """
    found = sorted({m.parent for f in folders for m in f.rglob("metrics.json")})
    rows = []
    for folder in found:
        m = read_metrics(folder)
        row = {k: m[k] for k in (*KEYS, "seed", "poison_rate", "der")}
        row |= {f"{r}_{k}": m[r][k] for r in ROLES for k in (*RATES, "asr_conditional")}
        row["floor_asr"] = m.get("floor", {}).get("asr")
        row |= {f"seconds_{k}": v for k, v in m["seconds"].items()}
        rows.append(row | {"commit": m["commit"], "folder": str(folder)})
    return pd.DataFrame(rows)


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds with n; intervals are Student's 95 % ones, as text, rates in percent."""
    rows = []
    for key, group in table.groupby(KEYS, sort=False):
        row = dict(zip(KEYS, key, strict=True)) | {"n": len(group)}
        for role in ROLES:
            for name in RATES:
                row[f"{role} {name.upper()}"] = _mean(group[f"{role}_{name}"] * 100)
        row["DER"] = _mean(group["der"] * 100)
        row["seconds"] = _mean(group["seconds_defense"])
        rows.append(row)
    return pd.DataFrame(rows)


def _mean(values: pd.Series) -> str:
    values = values.dropna()
    if values.empty:
        return "–"
    if len(values) == 1:
        return f"{values.iloc[0]:.1f}"
    half = student_t.ppf(0.975, len(values) - 1) * values.std() / len(values) ** 0.5
    return f"{values.mean():.1f} ± {half:.1f}"


def markdown(table: pd.DataFrame) -> str:
    """Pipe table."""
    rule = ["---"] * table.shape[1]
    rows = [list(table.columns), rule, *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, r)) + " |" for r in rows) + "\n"


def scatter(table: pd.DataFrame) -> Figure:
    """ACC over ASR of victims and purified networks, one marker per defense."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.scatter(100 * table["victim_asr"], 100 * table["victim_acc"], c=ORANGE, label="victim")
    for marker, (defense, group) in zip("osv^Dpx*", table.groupby("defense"), strict=False):
        x, y = 100 * group["purified_asr"], 100 * group["purified_acc"]
        axes.scatter(x, y, marker=marker, c=BLUE, label=str(defense))
    axes.set(xlabel="ASR (%)", ylabel="ACC (%)", xlim=(-2, 102))
    axes.grid(color="#eeeeee")
    axes.legend(fontsize=8)
    return figure


def write_report(folders: list[Path], out: Path) -> pd.DataFrame:
    """Write ``results.csv``, ``summary.md``, ``summary.png`` and ``index.html`` into ``out``.

    Raises:
        FileNotFoundError: there is no finished result.
    """
    table = collect(folders)
    if table.empty:
        raise FileNotFoundError(f"no metrics.json below {', '.join(map(str, folders))}")
    out.mkdir(parents=True, exist_ok=True)
    summary = summarize(table)
    table.to_csv(out / "results.csv", index=False)
    (out / "summary.md").write_text(markdown(summary))
    figure, buffer = scatter(table), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    (out / "summary.png").write_bytes(buffer.getvalue())
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dhbe.report", "templates"), autoescape=True
    )
    page = environment.get_template("collection.html").render(
        summary=summary,
        cells=table.drop(columns="folder"),
        picture="data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(),
    )
    (out / "index.html").write_text(page, encoding="utf-8")
    return summary
