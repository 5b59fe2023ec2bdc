"""Summaries over seeds and victims, with intervals; comparisons that respect them."""

from __future__ import annotations

import itertools
import warnings
from textwrap import shorten

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, wilcoxon
from scipy.stats import t as student_t

from dhbe.report.collect import CASE, METHOD
from dhbe.report.folder import ROLES
from dhbe.report.texts import table_text

SHOWN = ("acc", "asr", "ra")
RESAMPLES = 2000
LEAST = 5
"""Victims that a bootstrap interval needs; with fewer it would be far too narrow."""
CAUSES = (("failed", "error"), ("skipped", "message"))
"""Outcomes without a result, and the column of ``failures`` that says why."""
REASON = 100
"""Characters of a cause in a cell; the table of failures has all."""


def half_width(values: pd.Series) -> float:
    """Half of Student's 95 % interval of the mean; NaN for one value."""
    if len(values) < 2:
        return float("nan")
    return float(student_t.ppf(0.975, len(values) - 1) * values.std() / len(values) ** 0.5)


def interval(values: pd.Series, digits: int = 1) -> str:
    """Mean with Student's 95 % interval, as text; the mean alone for one value."""
    values = values.dropna().astype(float)
    if values.empty:
        return "–"
    if len(values) == 1:
        return f"{values.iloc[0]:.{digits}f}"
    return f"{values.mean():.{digits}f} ± {half_width(values):.{digits}f}"


def without_empty(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The table less those of ``columns`` that hold nothing."""
    return table.drop(columns=[c for c in columns if (table[c] == "").all()])


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """One row per case and method: means over seeds with n and 95 % intervals; rates in percent."""
    rows = []
    for key, group in table.groupby([*CASE, *METHOD], sort=True):
        row = dict(zip([*CASE, *METHOD], key, strict=True)) | {"scale": scales(group)}
        row["n"] = len(group)
        for role in ROLES:
            for name in SHOWN:
                row[f"{role} {name.upper()}"] = interval(group[f"{role}_{name}"] * 100)
        row["DER"] = interval(group["der"] * 100)
        row["seconds"] = interval(group["seconds_defense"])
        rows.append(row)
    return without_empty(pd.DataFrame(rows), ["attack_variant", "defense_variant"])


def scales(runs: pd.DataFrame) -> str:
    """The scales of runs; several where they change none of the options."""
    return ", ".join(sorted(runs["scale"].unique()))


def labels(table: pd.DataFrame) -> pd.DataFrame:
    """The table with ``attacked`` and ``method_name``: names that tell rows and columns apart."""
    table = table.copy()
    several = [c for c in ("data", "model") if table[c].nunique() > 1]
    table["attacked"] = [
        " ".join(str(v) for v in row if v) for row in table[[*several, *CASE[2:]]].to_numpy()
    ]
    table["method_name"] = [
        f"{name} ({', '.join(v for v in (budget, selection) if v)}) {variant}".rstrip()
        for name, budget, selection, variant in table[METHOD].to_numpy()
    ]
    return table


def matrix(
    table: pd.DataFrame,
    rates: tuple[str, ...] = ("acc", "asr"),
    failed: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Defenses down, attacks across; cells hold means over seeds of ``rates`` in percent, and n.

    Args:
        failed: ``failures``; counted beside n, and where nothing finished told with the cause:
            ``failed (error)``, ``skipped (reason)``. Without any of these it says ``not run``.
    """
    runs = table.assign(outcome="finished")
    if failed is not None and len(failed):
        runs = (
            pd.concat([runs, failed], ignore_index=True) if len(runs) else failed.assign(der=None)
        )
    runs = labels(runs.assign(der=runs["der"].astype(float)))
    columns = ["der" if r == "der" else f"purified_{r}" for r in rates]
    groups = runs.groupby(["method_name", "attacked"], sort=False)
    cells = {key: _cell(group, columns) for key, group in groups}
    wide = pd.Series(cells).unstack(fill_value="not run")
    wide = wide.reindex(index=order(runs), columns=sorted(wide.columns))
    return wide.rename_axis(index="defense", columns=None).reset_index()


def _cell(runs: pd.DataFrame, columns: list[str]) -> str:
    """Text of a cell: means, how many values they are of, and what did not finish."""
    finished = runs[runs["outcome"] == "finished"]
    if finished.empty:
        return "; ".join(_without_result(runs, *p) for p in CAUSES if p[0] in set(runs["outcome"]))
    counts = [int(finished[c].notna().sum()) for c in columns]
    known = {n for n in counts if n} or {0}
    number = "/".join(map(str, counts if len(known) > 1 else known))
    lost = runs["outcome"].value_counts().drop("finished")
    others = "".join(f", {n} {outcome}" for outcome, n in sorted(lost.items()))
    return f"{' / '.join(interval(100 * finished[c]) for c in columns)} (n={number}{others})"


def _without_result(runs: pd.DataFrame, outcome: str, cause: str) -> str:
    causes = runs.loc[runs["outcome"] == outcome, cause]
    reasons = ", ".join(shorten(c, REASON, placeholder=" …") for c in causes.unique())
    return f"{len(causes)} {outcome} ({reasons})" if len(causes) > 1 else f"{outcome} ({reasons})"


def order(table: pd.DataFrame) -> list[str]:
    """Method names, best mean DER first."""
    means = table.groupby("method_name")["der"].mean().sort_values(ascending=False, kind="stable")
    return [str(name) for name in means.index]


def victims(table: pd.DataFrame) -> pd.DataFrame:
    """DER in percent: a row per victim (case and seed), a column per method."""
    table = labels(table)
    table = table[table["der"].notna()]
    wide = table.pivot_table(index=["case", "seed"], columns="method_name", values="der") * 100
    return wide[[name for name in order(table) if name in wide]]


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """Each two methods on the victims they share: difference of DER in points.

    Bootstrap 95 % interval of the mean (percentile, over victims) from ``LEAST`` victims on;
    Wilcoxon's signed-rank p from six on. The p values are not corrected for the number of pairs.
    """
    wide = victims(table)
    rows = []
    for a, b in itertools.combinations(wide.columns, 2):
        gap = (wide[a] - wide[b]).dropna().to_numpy()
        if not len(gap):
            continue
        low = high = p = float("nan")
        if len(gap) >= LEAST:
            drawn = bootstrap(
                (gap,),
                np.mean,
                n_resamples=RESAMPLES,
                method="percentile",
                rng=np.random.default_rng(0),
            )
            low, high = drawn.confidence_interval
        if len(gap) >= 6 and np.any(gap != 0):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                p = float(wilcoxon(gap).pvalue)
        rows.append(
            {"better": a, "worse": b, "victims": len(gap), "DER difference": gap.mean()}
            | {"low": low, "high": high, "p": p}
        )
    columns = ["better", "worse", "victims", "DER difference", "low", "high", "p"]
    return pd.DataFrame(rows, columns=columns)


def ranking(table: pd.DataFrame) -> pd.DataFrame:
    """Ranks by DER that stay open where intervals overlap.

    A method stands before another only if the bootstrap interval of their paired difference
    excludes 0, which takes ``LEAST`` shared victims; the rank is a range, from 1 + those before it
    to all - those after it.
    """
    wide, pairs = victims(table), compare(table)
    before, after = (dict.fromkeys(wide.columns, 0) for _ in range(2))
    for pair in pairs.to_dict("records"):
        if pair["low"] > 0:
            first, second = pair["better"], pair["worse"]
        elif pair["high"] < 0:
            first, second = pair["worse"], pair["better"]
        else:
            continue
        before[second] += 1
        after[first] += 1
    rows = []
    for name in wide.columns:
        best, worst = 1 + before[name], len(wide.columns) - after[name]
        rank = str(best) if best == worst else f"{best}–{worst}"
        values = wide[name].dropna()
        rows.append(
            {"rank": rank, "defense": name, "mean DER": interval(values), "victims": len(values)}
        )
    return pd.DataFrame(rows, columns=["rank", "defense", "mean DER", "victims"])


def beside_published(table: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Measured means beside published figures of the same data, attack, rate and defense.

    The network may be another: both are named. ``band`` says whether ACC is within 1.5 points and
    ASR within 5 points, or within twice the published ASR where that is below 10 %; there is no
    band for a published ASR between 20 and 80 %, which differs from seed to seed.

    Args:
        published: columns source, data, model, attack, poison_rate, defense, acc, asr (percent).
    """
    keys = ["data", "attack", "poison_rate", "defense"]
    ours = ["data", "attack", "attack_variant", "poison_rate", *METHOD]
    rows = []
    for key, group in table.groupby([*ours, "model"]):
        named = dict(zip(ours, key[:-1], strict=True))
        sought = [named[k] for k in keys]
        there = (published[keys] == sought).all(axis=1)
        for figure in published[there].to_dict("records"):
            acc, asr = (100 * group[f"purified_{r}"].mean() for r in ("acc", "asr"))
            reach = 2 * figure["asr"] if figure["asr"] < 10 else 5.0
            close = abs(acc - figure["acc"]) <= 1.5 and abs(asr - figure["asr"]) <= max(5.0, reach)
            band = "no band" if 20 <= figure["asr"] <= 80 else "inside" if close else "outside"
            rows.append(
                named
                | {
                    "measured on": key[-1],
                    "scale": scales(group),
                    "n": int(group["purified_asr"].count()),
                }
                | {r.upper(): interval(100 * group[f"purified_{r}"]) for r in ("acc", "asr")}
                | {"published on": figure["model"]}
                | {f"published {r.upper()}": figure[r] for r in ("acc", "asr")}
                | {"band": band, "source": figure["source"]}
            )
    found = pd.DataFrame(rows)
    return without_empty(found, ["attack_variant", "defense_variant"]) if rows else found


def markdown(table: pd.DataFrame) -> str:
    """Pipe table."""
    rule = ["---"] * table.shape[1]
    rows = [list(table.columns), rule, *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(table_text(_text(v)) for v in r) + " |" for r in rows) + "\n"


def latex(table: pd.DataFrame) -> str:
    """Booktabs table."""
    text = table.map(_text).to_latex(index=False, escape=True)
    return text.replace("±", r"$\pm$").replace("–", "--")


def _text(value: object) -> str:
    if isinstance(value, float):
        return "–" if np.isnan(value) else f"{value:.3g}"
    return str(value)
