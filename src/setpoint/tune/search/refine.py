"""The next setting to race, from a tree-structured Parzen estimator (Bergstra et al. 2011) over what the race saw.

Optuna does it, where it is installed (`pip install setpoint[tune]`); without it the race alone decides.
"""

from __future__ import annotations

from collections.abc import Sequence

from setpoint.tune.search.space import Dimension, Setting, setting_of


def propose(dimensions: Sequence[Dimension], known: Sequence[tuple[Setting, float]]) -> Setting | None:
    """None without Optuna, or with too little to learn from. The same scores give the same setting."""
    try:
        import optuna
    except ImportError:
        return None
    if len(known) < 3:
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ranks = {d.knob: optuna.distributions.IntDistribution(0, len(d.values) - 1) for d in dimensions}
    sampler = optuna.samplers.TPESampler(seed=len(known), n_startup_trials=3, multivariate=False)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for setting, score in known:
        chosen = dict(setting)
        params = {d.knob: d.values.index(chosen.get(d.knob, d.default)) for d in dimensions}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=dict(ranks), value=score))
    asked = study.ask(dict(ranks)).params
    return setting_of(dimensions, [d.values[asked[d.knob]] for d in dimensions])
