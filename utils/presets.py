"""What --baseline and --recipe of train.py stand for, option by option."""

from __future__ import annotations

from argparse import Namespace

_CLUSTERS = {"metric_loss": "center", "ml": 0.9, "rim": 0.3, "recon": 0.001, "pseudo_labels": "rim"}
_INSTANCES = {"metric_loss": "instance", "ml": 1.0, "rim": 0.0, "recon": 0.0, "pseudo_labels": "rim"}
BASELINES = {  # the rows of the paper's ablation table
    "isif": _INSTANCES | {"positives": "self"},
    "cbs": _CLUSTERS | {"recon": 0.0},
    "cbswr": _CLUSTERS,
    "kmeans": _CLUSTERS | {"pseudo_labels": "kmeans"},
}
_ALONE = {"ml": 1.0, "rim": 0.0, "recon": 0.0}
BASELINES |= {  # methods of others
    "stml": _ALONE | {
        "metric_loss": "contextual", "positives": "self", "distill_dim": 1024, "group": 5, "batch_size": 120,
        "optimizer": "adamw", "lr": 1e-4,
    },
    "deepcluster": _ALONE | {"metric_loss": "classify", "positives": "self", "pseudo_labels": "kmeans"},
}  # fmt: skip
RECIPES = {
    "paper": {},
    "best": _ALONE | {  # chosen on held-out training classes of Cars196 and of a subset of CUB-200-2011
        "metric_loss": "soft_centers", "positives": "self", "t": 0.05, "optimizer": "adamw", "lr": 1e-4,
        "layers": "last2", "pool": "gem", "stripes": "3,1", "head_init": "whiten", "whiten_power": 0.6,
        "low_dim": 512, "refit_head": True, "refit_power": 0.7, "train_stages": 1,
        "batch_size": 48, "n_epoch": 1, "flip_eval": True,
    },
}  # fmt: skip


def preset_of(args: Namespace, option: str) -> dict:
    """What --recipe or --baseline stands for, with this backbone."""
    known, name = (RECIPES, args.recipe) if option == "recipe" else (BASELINES, args.baseline)
    preset = known[name] if name else {}
    if args.backbone.startswith("timm:"):  # their stages have no names
        return {key: value for key, value in preset.items() if key not in {"layers", "stripes", "train_stages"}}
    return preset


def described(name: str, preset: dict) -> str:
    """A preset in words: its name and the options that it sets."""
    flags = {True: "--{}", False: "--no-{}"}
    options = (flags[v].format(o) if isinstance(v, bool) else f"--{o} {v}" for o, v in preset.items())
    return f"{name}: {' '.join(options)}"


def take_preset(args: Namespace, option: str, from_file: set[str]) -> set[str]:
    """Set what `option` stands for, but for the options given and, unless it is given itself, those `from_file`.

    Returns the names of those that it set.
    """
    kept = args.given if option in args.given else args.given | from_file
    taken = {name: value for name, value in preset_of(args, option).items() if name not in kept}
    vars(args).update(taken)
    return set(taken)
