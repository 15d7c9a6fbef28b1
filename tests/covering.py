"""Half of the conformance kit's grid, for backends whose whole grid `-m slow` walks through."""

from __future__ import annotations

from collections.abc import Collection

from dilated_attention.registry.conformance import Kit, Report


def covering(kit: Kit, no_few: Collection[str] = ()) -> Report:
    """Every check, pattern and dtype, with and without causality in turn, as the squares of a chessboard.

    Checks of few cases, which take most of the time, are not made on the patterns that `no_few` names.
    """
    trials = list(kit.trials())
    cases = [trial.case for trial in trials if trial.case is not None]
    colours = {name: number for number, name in enumerate(dict.fromkeys(case.pattern_name for case in cases))}
    colours |= {dtype: number for number, dtype in enumerate(dict.fromkeys(case.dtype for case in cases))}
    chosen = [
        trial
        for trial in trials
        if (case := trial.case) is None
        or (
            (colours[case.pattern_name] + colours[case.dtype]) % 2 == case.is_causal
            and (trial.check.where != "few cases" or case.pattern_name not in no_few)
        )
    ]
    left_out = {trial.check.name: trial for trial in trials}
    for trial in chosen:
        left_out.pop(trial.check.name, None)
    return Report.of(kit, [trial.run() for trial in (*chosen, *left_out.values())])
