"""The mix behind a sum of runs: every row that one of them trained on, and the held-out rows that none did.

joined([first, second], weights=[0.25, 0.75]).validation
"""

from collections.abc import Sequence

from toolkit.data.rows import Mix
from toolkit.records import Json, MixReport


def joined(mixes: Sequence[Mix], weights: Sequence[float]) -> Mix:
    """The mixes of several runs as one."""
    train = [row for mixed in mixes for row in mixed.train]
    # by the prompt: what one run held out another may have trained on, with a reply of its own
    seen = {row.prompt.tobytes() for row in train}
    held_out = [row for mixed in mixes for row in mixed.validation if row.prompt.tobytes() not in seen]
    held = {row.ids.tobytes(): row for row in held_out}
    report = joined_report([mixed.report for mixed in mixes], weights)
    quarantine = [entry for mixed in mixes for entry in mixed.quarantine]
    return Mix(train, list(held.values()), report, quarantine, mixes[0].folder)


def joined_report(reports: Sequence[MixReport], weights: Sequence[float]) -> MixReport:
    """mix.json of a sum: shares, rows and tokens are the runs' own, averaged by weight."""
    report = averaged(reports, weights)
    # of a mode that only one of them has, too, replies may be as long as there
    for one in reports:
        report["lengths"] |= one["lengths"]
    report |= {"limited_by": None, "warnings": []}
    return report


def averaged(values: Sequence[Json], weights: Sequence[float]) -> Json:
    """Numbers averaged by weight, also those inside dicts, where a missing one is 0; of anything else the first."""
    first = next((value for value in values if value is not None), None)
    if isinstance(first, dict):
        parts = [value or {} for value in values]
        return {key: averaged([part.get(key) for part in parts], weights) for part in parts for key in part}
    if not isinstance(first, int | float):
        return first
    mean = sum((value or 0) * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
    return round(mean) if isinstance(first, int) else mean
