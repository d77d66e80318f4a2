"""Make `tests/oracle/raters.json` again: agreement and truth as three known packages give them.

    python3 -m venv raters-env
    raters-env/bin/pip install krippendorff==0.9.0 statsmodels==0.15.0 crowd-kit==1.4.2
    raters-env/bin/python scripts/make_raters.py [--output tests/oracle/raters.json]

It needs a separate environment, because the packages are not dependencies of mlx-align
(krippendorff's licence is the GPL). Five raters with 3 labels rate about 70% of 60 units; a second
table is complete, as Fleiss' kappa needs it. What the file has:

    ratings           (5, 60) labels from a seed; −1 is missing
    complete          (4, 30) the same without missing labels
    nominal, ordinal  Krippendorff's alpha of `ratings` (krippendorff)
    fleiss            Fleiss' kappa of `complete` (statsmodels)
    cohen             Cohen's kappa of its first two raters (statsmodels)
    probabilities     (60, 3) of each true label, by 3,000 steps of DawidSkene (crowd-kit)
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import krippendorff
import numpy as np
import pandas as pd
from crowdkit.aggregation import DawidSkene
from statsmodels.stats.inter_rater import aggregate_raters, cohens_kappa, fleiss_kappa, to_table

SEED, LABELS = 0, 3
PACKAGES = ("krippendorff", "statsmodels", "crowd-kit")
DEFAULT = Path(__file__).resolve().parent.parent / "tests" / "oracle" / "raters.json"


def simulate(right: list[float], units: int, rated: float) -> np.ndarray:
    """(raters, units) labels of raters who are right with these probabilities; −1 is missing."""
    draw = np.random.default_rng(SEED)
    shape = (len(right), units)
    truth = draw.integers(0, LABELS, units)
    other = (truth + draw.integers(1, LABELS, shape)) % LABELS
    labels = np.where(draw.random(shape) < np.array(right)[:, None], truth, other)
    given = draw.random(shape) < rated
    given[0] |= ~given.any(0)  # every unit has a rating
    return np.where(given, labels, -1)


def alpha(ratings: np.ndarray, level: str) -> float:
    """Krippendorff's alpha."""
    given = np.where(ratings < 0, np.nan, ratings)
    return float(krippendorff.alpha(reliability_data=given, level_of_measurement=level))


def truth_probabilities(ratings: np.ndarray) -> np.ndarray:
    """(units, labels) posterior of crowd-kit's Dawid-Skene."""
    rows = [(unit, rater, label) for (rater, unit), label in np.ndenumerate(ratings) if label >= 0]
    table = pd.DataFrame(rows, columns=["task", "worker", "label"])
    found = DawidSkene(n_iter=3000, tol=0).fit_predict_proba(table)
    return found.reindex(range(ratings.shape[1]))[list(range(LABELS))].to_numpy()


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=DEFAULT)
    output = parser.parse_args().output
    ratings = simulate([0.9, 0.8, 0.7, 0.6, 0.5], 60, 0.7)
    complete = simulate([0.9, 0.8, 0.7, 0.6], 30, 1.1)
    counts, _ = aggregate_raters(complete.T)
    content = {
        **{name: version(name) for name in PACKAGES},
        "ratings": ratings.tolist(),
        "complete": complete.tolist(),
        "nominal": alpha(ratings, "nominal"),
        "ordinal": alpha(ratings, "ordinal"),
        "fleiss": float(fleiss_kappa(counts)),
        "cohen": float(cohens_kappa(to_table(complete[:2].T)[0], return_results=False)),
        "probabilities": np.round(truth_probabilities(ratings), 12).tolist(),
    }
    output.write_text(json.dumps(content) + "\n", encoding="utf-8")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
