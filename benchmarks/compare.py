"""Print the scores of two `test.py --json` files beside each other; exit status 1 unless the second is above."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

KEYS = ("recall@1", "recall@2", "recall@4", "recall@8", "nmi")


def main() -> int:
    """Read, print, compare R@1 and NMI."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (args.before, args.after))
    print(f"\n{'':>12}" + "".join(f"{key.replace('recall@', 'R@').upper():>8}" for key in KEYS))
    for title, scores in (("untrained", before), ("trained", after)):
        print(f"{title:>12}" + "".join(f"{100 * scores[key]:8.2f}" for key in KEYS))
    above = all(after[key] > before[key] for key in ("recall@1", "nmi"))
    print(f"trained on {after['dataset']} without labels, tested on {after['classes']} unseen classes: "
          f"R@1 {100 * before['recall@1']:.1f} -> {100 * after['recall@1']:.1f}, "
          f"NMI {100 * before['nmi']:.1f} -> {100 * after['nmi']:.1f}: "
          f"{'above' if above else 'NOT above'} the untrained network")  # fmt: skip
    return 0 if above else 1


if __name__ == "__main__":
    raise SystemExit(main())
