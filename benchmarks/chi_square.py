"""p-values of sampled sequences against the target's law, for each rule and fallback. Prints a table."""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path

import torch

from ssd.testing.laws.chi_square import CASES, FALLBACKS, measure, save_pair, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=10**6, help="of the first sample")
    parser.add_argument("--json", type=Path, help="write all p-values here")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        pair = save_pair(Path(folder))
        for fallback, case in product(FALLBACKS, CASES):
            results.append(measure(pair, case, fallback, wanted.samples, wanted.seed))
            if wanted.json is not None:  # after each case, so that a run that is stopped keeps its results
                wanted.json.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
