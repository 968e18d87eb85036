"""Recipes, JSON files of options, and how they meet the options of the chosen method."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from methods import METHODS
from utils.errors import UserError, nearest_hint
from utils.options import Parser, read_json_object
from utils.runs import CONFIG, run_to_resume

RECIPES = Path(__file__).resolve().parent
# options that may change when a run is resumed
CHANGEABLE = {"resume", "n_epoch", "interval", "test_batch", "lr", "device", "nmi", "workers"}
CHANGEABLE |= {"checkpoint_every_steps", "deterministic", "eval_memory_mb", "tensorboard"}
CHANGEABLE |= {"data_dir", "log_dir", "data_on"}


def add_method_options(parser: Parser, name: str) -> None:
    """Add the options of a method; those that only other methods read are refused from now on."""
    METHODS[name].add_options(parser.add_argument_group(f"method {name}"))
    taken = set(parser._option_string_actions) | set(parser.refused)
    readers = defaultdict(list)
    for method in METHODS:
        for option in _option_parser(method)._option_string_actions:
            readers[option].append(method)
    for option in readers.keys() - taken:
        parser.refused[option] = (
            f"is not read by the method {name} of this recipe, but by {', '.join(readers[option])}"
        )


def others_help(method: str) -> str:
    """Return the options of all other methods, as the help shows them."""
    names = [name for name in METHODS if name != method]
    return "\n" + "\n".join(_option_parser(name).format_help() for name in names)


def _option_parser(name: str) -> Parser:
    """Return a parser with the options of a method alone."""
    parser = Parser(add_help=False, usage=argparse.SUPPRESS)
    summary = (METHODS[name].__doc__ or "").partition("\n")[0]
    METHODS[name].add_options(parser.add_argument_group(f"method {name}", summary))
    return parser


def read_layers(argv: list[str]) -> tuple[str, list[tuple[str, dict]]]:
    """Return the method that a command line of train.py asks for, and the options below it.

    Those are the options of the recipe and of a configuration file above it, or those of the run
    to resume: pairs of a source and its options, the lowest first. Raises UserError if a source
    cannot be read, or names no method.
    """
    first = Parser(add_help=False)
    for name in ("--recipe", "--config", "--resume"):
        first.add_argument(name)
    sources = first.parse_known_args(argv)[0]
    if sources.resume:
        layers = [_read_run(run_to_resume(sources.resume) / CONFIG)]
    else:
        config = read_json_object(sources.config) if sources.config else {}
        recipe = str(sources.recipe or config.get("recipe", "paper"))
        layers = [(recipe, read_recipe(recipe)), (sources.config, config)]
    methods = {source: options.pop("method") for source, options in layers if "method" in options}
    source, method = list(methods.items())[-1]
    if method not in list(METHODS):
        raise UserError(f"{source}: the method is one of {', '.join(METHODS)}, not {method!r}")
    return method, layers


def read_recipe(name: str) -> dict:
    """Read the options of a recipe: a name of recipes/, or the path of a JSON file."""
    path = RECIPES / f"{name}.json"
    if not path.is_file() and not Path(name).is_file():
        names = sorted(file.stem for file in RECIPES.glob("*.json"))
        hint = nearest_hint(name, names)
        raise UserError(f"recipe {name}: no such recipe{hint} (choose from {', '.join(names)})")
    recipe = read_json_object(path if path.is_file() else name)
    recipe.pop("about", None)
    if "method" not in recipe:
        raise UserError(f"{name}: a recipe names its method, one of {', '.join(METHODS)}")
    return recipe


def _read_run(path: Path) -> tuple[str, dict]:
    config = read_json_object(path)
    if "method" not in config:
        raise UserError(f"resume {path.parent}: an earlier version made it; it can be tested only")
    return str(path), config


def settle_options(
    parser: Parser, args: argparse.Namespace, layers: list[tuple[str, dict]]
) -> None:
    """Refuse options that do not go together, and settle those that follow from others.

    layers: those of `read_layers`, above which the options were parsed.
    """
    if args.resume:
        _keep_saved(parser, args, layers[0][1])
    configured = {name for _, config in layers[1:] for name in config}
    if args.head_init == "random" and "refit_head" not in args.given | configured:
        args.refit_head = "off"
    if args.momentum and args.optimizer != "sgd":
        parser.error("--momentum goes with --optimizer sgd")
    is_power = isinstance(args.refit_head, float)
    if (is_power or "whiten_power" in args.given) and args.head_init != "whiten":
        parser.error("--whiten_power and a power of --refit_head go with --head_init whiten")
    # only now: a configuration may be that of another run, which has all options
    args.given |= configured
    if args.resume or args.head_init == "auto":
        return
    if "refit_head" not in args.given and args.refit_head == "auto":
        args.refit_head = "start"
    if args.head_init == "random" and args.refit_head != "off":
        parser.error("--refit_head: a random head has no closed form; give --head_init pca")
    if args.head_init in ("svd", "pca") and args.refit_head == "auto":
        parser.error("--refit_head auto whitens; it goes with --head_init whiten or auto")


def _keep_saved(parser: Parser, args: argparse.Namespace, saved: dict) -> None:
    """Take a run to resume with its own options; refuse others that would change it."""
    if args.given & {"config", "overwrite"}:
        parser.error("--config and --overwrite do not go with --resume")
    for name in sorted(args.given - CHANGEABLE):
        was = saved.get(name, parser.get_default(name))
        if getattr(args, name) != was:
            parser.error(f"--{name} was {was} in {args.resume} and cannot change")
    run = run_to_resume(args.resume)
    args.checkpoint_dir = str(run.parent)
    args.model_name = run.name


def fit_to_data(args: argparse.Namespace, n_images: int, n_processes: int) -> list[str]:
    """Fit numbers that stem from a default or a recipe to what the training images allow.

    Returns a sentence for each. Raises UserError for a batch size that does not fit.
    """
    fitting = {"n_cluster": min(n_images, getattr(args, "n_cluster", 0))}
    group = getattr(args, "group", 1) * n_processes
    fitting["batch_size"] = min(args.batch_size, max(group, n_images // group * group))
    if n_images < args.min_images:
        fitting["n_epoch"] = 0
    names = set() if args.resume else (fitting.keys() & vars(args).keys()) - args.given
    changes = []
    for name in names:
        value = getattr(args, name)
        fitted = fitting[name]
        if value == fitted:
            continue
        setattr(args, name, fitted)
        if name == "n_epoch":
            few = f"{n_images} images are too few to train on (min_images is {args.min_images})"
            changes.append(f"{few}: the start is the result")
        else:
            changes.append(f"{name} {value} becomes {fitted} for {n_images} images")
    if args.n_epoch and args.batch_size > n_images:
        raise UserError(f"batch_size {args.batch_size}: there are {n_images} training images")
    if args.batch_size % n_processes:
        raise UserError(f"{n_processes} processes cannot share a batch of {args.batch_size} evenly")
    return sorted(changes)
