r"""Hyper-parameter search: ``python -m dhbe.sweeping.search NAME [--trials N] OVERRIDE...``

Overrides are those of ``run.py``; what Hydra calls a sweep is searched instead:

    python -m dhbe.sweeping.search patch --trials 20 defense=dhbe \
        "defense.weights.patch=tag(log,interval(0.05,1))" "defense.patch_size=choice(3,5,7)"

The study NAME lies in ``outputs/results/search.db``; the same command continues a killed one, and
several processes may share one; each finishes its current trial when enough are complete.
Trials that were killed or diverged do not count. Every trial is an ordinary cell, computed once,
but it lies in ``outputs/search/NAME``, apart from the results: a search looks at many settings, and
one with ``--objective oracle`` at the test set, so that its cells are no table's.

``--objective validation`` (default) maximises DER on images of the defender's pool that the budget
does not grant. It knows the trigger, which a defender does not, but never reads the test set.
``--objective oracle`` looks for the Pareto front of ACC up and ASR down on the test set: a bound on
what tuning could achieve, not a result.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    RangeSweep,
)

from dhbe.checkpoint import CheckpointFile
from dhbe.config import identity
from dhbe.config.resolution import resolved
from dhbe.config.resolvers import name_of, register_resolvers
from dhbe.config.schema import plain
from dhbe.core.errors import ConfigError, DHBEError, DivergenceError, got
from dhbe.core.exit_status import guarded
from dhbe.core.paths import CONF
from dhbe.data import load
from dhbe.data.access import not_granted
from dhbe.evaluation.evaluator import Evaluator
from dhbe.evaluation.metrics import summarize
from dhbe.experiment.assembly import assemble
from dhbe.experiment.pipeline import run
from dhbe.training.runtime import Runtime
from dhbe.victim.source import VictimRequest, build_network

DIRECTIONS = {"validation": ["maximize"], "oracle": ["maximize", "minimize"]}
TRIES = 3
"""A search gives up when one process has tried so many times the number of trials wanted."""
WHAT = {"validation": "DER on pool images", "oracle": "ORACLE: ACC and ASR on the test set"}


def validation(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``summarize`` of a finished cell on the pool images that its budget does not grant.

    Raises:
        ConfigError: no such images, no data, or a defense that selects on the test set.
    """
    parts = assemble(tree)
    splits = load(parts.data, identity.fingerprint(tree["data"]))
    if splits is None or not parts.attack.active:
        raise ConfigError("the search needs images and a trigger; set data= and attack=")
    if parts.defense.selection == "oracle":
        raise got("defense.selection", "oracle", "fixed or validation", "or --objective oracle")
    seed, size = tree["seed"], len(splits.train) + len(splits.pool)
    rest = not_granted(parts.budget, splits.pool.labels, size, seed)
    runtime = Runtime(trainer_config=parts.trainer, seed=seed, workdir=folder)
    victim = parts.source.obtain(
        VictimRequest(
            config=tree, spec=parts.spec, attack=parts.attack, splits=splits, runtime=runtime
        )
    )
    purified = build_network(tree, parts.spec, seed)
    CheckpointFile(path=str(folder / "purified.safetensors")).load_into(purified)
    judge = Evaluator(splits.pool.subset(rest), victim.attack, device=runtime.device)
    before, after = (
        judge.predict(n.to(runtime.device, runtime.dtype).eval())
        for n in (victim.network, purified)
    )
    return summarize(before, after, judge.truth)


def suggest(trial: Any, override: Override) -> Any:
    """A value for one searched key.

    Raises:
        ConfigError: the sweep is not one that can be searched.
    """
    key, sweep = override.get_key_element(), override.value()
    log = "log" in getattr(sweep, "tags", ())
    if isinstance(sweep, ChoiceSweep):
        return trial.suggest_categorical(key, list(override.sweep_string_iterator()))
    if isinstance(sweep, IntervalSweep):
        return trial.suggest_float(key, sweep.start, sweep.end, log=log)
    if isinstance(sweep, RangeSweep) and isinstance(sweep.start, int):
        assert sweep.stop is not None
        return trial.suggest_int(key, sweep.start, int(sweep.stop) - 1, step=int(sweep.step))
    raise got(key, override.input_line, "choice(...), interval(a,b) or range(a,b) of integers")


def objective(
    searched: list[Override], fixed: list[str], kind: str
) -> Callable[[Any], float | tuple[float, float]]:
    """Function of a trial: run its cell, or read it, and give what is to be optimised."""

    def evaluate(trial: Any) -> float | tuple[float, float]:
        drawn = [f"{o.get_key_element()}={suggest(trial, o)}" for o in searched]
        cfg = compose("config", overrides=[*fixed, *drawn], return_hydra_config=True)
        tree, _ = resolved(plain(cfg), {})
        folder = Path(tree["paths"]["results"]) / name_of(cfg)
        trial.set_user_attr("cell", folder.name)
        test = run(cfg, folder, cfg.hydra.runtime.choices)
        if kind == "oracle":
            return test["purified"]["acc"], test["purified"]["asr"]
        found = validation(tree, folder)
        trial.set_user_attr("purified", found["purified"])
        return float(found["der"])

    return evaluate


def study(name: str, storage: str, kind: str, overrides: list[str], seed: int) -> Any:
    """The study of this name, new or continued.

    Raises:
        ConfigError: optuna is not installed, or the study is about something else.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            'dhbe.sweeping.search: optuna is not installed; pip install "dhbe[optuna]"'
        ) from error
    with warnings.catch_warnings():  # optuna calls its heartbeat experimental, since 2021
        warnings.simplefilter("ignore")
        kept = optuna.storages.RDBStorage(
            storage,
            heartbeat_interval=60,  # a trial whose process is gone is tried again
            failed_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
        )
    found = optuna.create_study(
        storage=kept, study_name=name, directions=DIRECTIONS[kind], load_if_exists=True
    )
    about = {"objective": kind, "overrides": overrides}
    known = found.user_attrs or about
    if known != about:
        raise got(name, about, f"{known}, as the study began", "choose another name")
    for key, value in about.items():
        found.set_user_attr(key, value)
    # a continued study must not draw again what it drew before
    found.sampler = optuna.samplers.TPESampler(seed=seed + len(found.trials))
    return found


def finished(found: Any) -> int:
    """Number of the study's complete trials."""
    return sum(t.state.name == "COMPLETE" for t in found.trials)


def enough(trials: int) -> Callable[[Any, Any], None]:
    """Callback that ends the search once all its processes together completed so many trials."""
    from optuna.study import MaxTrialsCallback
    from optuna.trial import TrialState

    stop: Callable[[Any, Any], None] = MaxTrialsCallback(trials, states=(TrialState.COMPLETE,))
    return stop


def search(options: argparse.Namespace) -> None:
    """Run what is missing of ``options.trials`` trials, then show the best.

    Raises:
        ConfigError: nothing to search, or see ``study``.
        DHBEError: too many trials diverged.
    """
    register_resolvers()
    parsed = OverridesParser.create().parse_overrides(options.overrides)
    searched = [o for o in parsed if o.is_sweep_override()]
    if not searched:
        raise ConfigError("nothing to search; give a key several values, as in key=choice(1,2)")
    fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        results_folder = Path(compose("config", overrides=fixed).paths.results)
        results_folder.mkdir(parents=True, exist_ok=True)
        storage = options.storage or f"sqlite:///{results_folder}/search.db"
        found = study(options.name, storage, options.objective, options.overrides, options.seed)
        trials = results_folder.absolute().parent / "search" / options.name
        cells = objective(searched, [*fixed, f"paths.results='{trials}'"], options.objective)
        if finished(found) < options.trials:
            found.optimize(
                cells,
                n_trials=TRIES * options.trials,
                catch=(DivergenceError,),
                callbacks=[enough(options.trials)],
            )
    if (count := finished(found)) < options.trials:
        raise DHBEError(f"{options.name}: {count} of {options.trials} trials; the others diverged")
    print(f"{options.name}: {WHAT[options.objective]}")
    for trial in found.best_trials:
        values = ", ".join(f"{v:.4f}" for v in trial.values)
        print(f"  {values}: " + " ".join(f"{k}={v}" for k, v in trial.params.items()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dhbe.sweeping.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="of the study")
    parser.add_argument("overrides", nargs="+", help="as for run.py")
    parser.add_argument("--trials", type=int, default=20, help="complete trials wanted in all")
    parser.add_argument("--objective", choices=sorted(DIRECTIONS), default="validation")
    parser.add_argument("--storage", help="URL; default: search.db in the results folder")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler")
    options = parser.parse_intermixed_args()
    guarded(lambda: search(options))


if __name__ == "__main__":
    main()
