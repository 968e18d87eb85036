"""Print the scores of two `test.py --json` files beside each other; exit status 1 unless the second is above."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python benchmarks/NAME.py` finds the rooms

from utils.runs import recall_titles


def main() -> int:
    """Read, print, compare R@1 and NMI (where it was not left out)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (args.before, args.after))
    titles = {title: key for title, key in (recall_titles(after) | {"NMI": "nmi"}).items() if key in before | after}
    for title, key in titles.items():
        if not (key in before and key in after):
            parser.error(f"{title} is in one of the files alone; make both with the same data set and options")
    print(f"\n{'':>12}" + "".join(f"{title:>8}" for title in titles))
    for title, scores in (("untrained", before), ("trained", after)):
        print(f"{title:>12}" + "".join(f"{100 * scores[key]:8.2f}" for key in titles.values()))
    compared = {title: titles[title] for title in ("R@1", "NMI") if title in titles}
    above = all(after[key] > before[key] for key in compared.values())
    changes = (f"{title} {100 * before[key]:.1f} -> {100 * after[key]:.1f}" for title, key in compared.items())
    print(f"trained on {after['dataset']} without labels, tested on {after['classes']} unseen classes: "
          f"{', '.join(changes)}: {'above' if above else 'NOT above'} the untrained network")  # fmt: skip
    return 0 if above else 1


if __name__ == "__main__":
    raise SystemExit(main())
