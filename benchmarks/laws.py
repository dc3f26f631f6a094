"""Largest error of the exact laws, for each verification rule and case. Prints a table."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch

from ssd.testing.laws.cases import cases, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write every error here")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    errors: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    found = []
    for case in cases():
        error, _ = case.run()
        errors[case.rule, case.shape][case.name].append(error)
        found.append({"rule": case.rule, "shape": case.shape, "case": case.name, "detail": case.detail, "error": error})
    if wanted.json is not None:
        wanted.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(errors))


if __name__ == "__main__":
    main()
