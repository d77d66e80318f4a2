"""Provenance of preference data: which model judged it, and whether that is the one in training.

A model's lineage is a list of hashes of its weights: its adapter, what that was initialised from,
and so on to the base model. Rows that a judge labelled carry its lineage. A run is circular if the
policy, as it is when training starts, is in the judge's lineage: then the judge is the policy, or
was trained from it, and the policy would learn its own preferences.

Weights are compared byte by byte, so a quantised or fused copy counts as another model. The judges
behind an endpoint have no lineage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mlx_align.errors import ConfigError
from mlx_align.types import PromptGroup

# Hashes of weights, newest first.
Lineage = tuple[str, ...]
# The column of a row with the judge's name, lineage and quality.
PROVENANCE = "provenance"


def judges_of(groups: Iterable[PromptGroup]) -> dict[str, Lineage]:
    """The judges that labelled these groups: lineage by name, () if unknown."""
    found: dict[str, Lineage] = {}
    for group in groups:
        given = group.columns.get(PROVENANCE)
        if not isinstance(given, Mapping) or not isinstance(given.get("judge"), str):
            continue
        lineage = given.get("judge_lineage") or ()
        if isinstance(lineage, list | tuple):
            found.setdefault(given["judge"], tuple(str(one) for one in lineage))
    return found


def check_circularity(policy: Lineage, judges: Mapping[str, Lineage], *, allow: bool) -> str:
    """What is circular about training a policy on labels of these judges; empty if nothing is.

    Args:
        policy: Lineage of the policy at the start of training; only its first hash matters.
        judges: Lineage of each judge, by name.
        allow: Whether the user allows circular runs.

    Raises:
        ConfigError: The run is circular, and that is not allowed.
    """
    for name, lineage in judges.items():
        if policy[0] not in lineage:
            continue
        relation = "is" if lineage[0] == policy[0] else "was trained from"
        found = f"the labels are by {name}, which {relation} the model to train"
        if not allow:
            raise ConfigError(
                f"{found}: it would learn its own preferences; use labels of another judge, or "
                "train all the same with --allow-circular"
            )
        return found
    return ""
