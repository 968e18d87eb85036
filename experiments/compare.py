"""Print the scores of two `test.py --json` files; exit status 1 unless the second is above."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from utils.errors import run_script
from utils.evaluation import recall_titles
from utils.options import Parser, path_name


def main() -> int:
    """Read, print, compare R@1 and NMI (unless it was left out)."""
    parser = Parser(__doc__)
    parser.add_argument("before", type=path_name, help="FILE.json")
    parser.add_argument("after", type=path_name, help="FILE.json")
    args = parser.parse(sys.argv[1:])
    files = (Path(args.before), Path(args.after))
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    titles = recall_titles(before | after) | {"NMI": "nmi"}
    titles = {title: name for title, name in titles.items() if name in before | after}
    if not all(name in before and name in after for name in titles.values()):
        parser.error("the files have different scores; make both with the same data and options")
    print(f"\n{'':>12}" + "".join(f"{title:>8}" for title in titles))
    for name, scores in (("untrained", before), ("trained", after)):
        print(f"{name:>12}" + "".join(f"{100 * scores[key]:8.2f}" for key in titles.values()))
    changes = {}
    for title in {"R@1", "NMI"} & titles.keys():
        old, new = (100 * scores[titles[title]] for scores in (before, after))
        changes[f"{title} {old:.1f} -> {new:.1f}"] = new > old
    verdict = "above" if all(changes.values()) else "NOT above"
    print(f"trained on {after['dataset']} without labels, tested on {after['classes']} unseen")
    print(f"classes: {', '.join(sorted(changes))}: {verdict} the untrained network")
    return int(verdict != "above")


if __name__ == "__main__":
    run_script(main)
