"""Command-line options: kinds of values, a parser that reads options from JSON as well, and shared
groups.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from utils.embeddings import paths_of
from utils.errors import UserError, nearest_hint, one_line
from utils.files import check_target

LARGEST_SEED = 2**32 - 1  # of numpy and scikit-learn
LARGEST_REAL = 1e30  # far below the largest float32
LARGEST_IMAGE = 300_000_000  # pixels; phones take 200 million
LONGEST_NAME = 200  # bytes; the name of a folder becomes a part of longer file names


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return an argparse type: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {value}")
        return value

    return parse


def whole_list(least: int, most: int) -> Callable[[str], list[int]]:
    """Return an argparse type: whole numbers from `least` to `most` with commas between them."""
    parse_number = whole(least, most)
    return lambda text: [parse_number(part) for part in text.split(",")]


def real(
    least: float, *, above: bool = False, most: float = LARGEST_REAL
) -> Callable[[str], float]:
    """Return an argparse type: a number of at least (with `above`: greater than) `least` and at
    most `most`.
    """

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not math.isfinite(value) or value < least or (above and value == least):
            bound = "greater than" if above else "at least"
            raise argparse.ArgumentTypeError(f"must be {bound} {least:g}, got {text}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most:g}, got {text}")
        return value

    return parse


def name_of(choices: Iterable[str], prefix: str | None = None) -> Callable[[str], str]:
    """Return an argparse type: one of `choices`, or any text that begins with `prefix`."""
    choices = tuple(choices)

    def parse(text: str) -> str:
        if text in choices or (prefix and text.startswith(prefix)):
            return text
        names = [*choices, f"{prefix}NAME"] if prefix else choices
        hint = nearest_hint(text, choices)
        raise argparse.ArgumentTypeError(
            f"unknown name {text!r}{hint} (choose from {', '.join(names)})"
        )

    parse.choices = choices
    return parse


def name_or(names: Sequence[str], kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return an argparse type: one of `names`, or what `kind` takes."""

    def parse(text: str) -> Any:
        if text in names:
            return text
        try:
            return kind(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}; or give {', '.join(names)}") from None

    return parse


def folder_name(text: str) -> str:
    """Argparse type: the plain name of one folder, without separators and not hidden."""
    if not text or text.startswith(".") or "/" in text or "\\" in text:
        raise argparse.ArgumentTypeError(
            f"expected a plain name without slashes or a leading dot, got {text!r}"
        )
    if not text.isprintable() or len(os.fsencode(text)) > LONGEST_NAME:
        raise argparse.ArgumentTypeError(
            f"expected a name of at most {LONGEST_NAME} printable bytes, got {text!r}"
        )
    return text


def path_name(text: str) -> str:
    """Argparse type: a path, not empty and without NUL."""
    try:
        usable = bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(f"expected a path, got {text!r}")
    return text


class TargetPath(str):
    """The path of a file that a script writes."""


def target_file(ending: str, is_alone: bool = True) -> Callable[[str], TargetPath]:
    """Return an argparse type: a file to write, whose name ends in `ending`.

    is_alone: whether a file is refused that belongs to others, which would not fit it then.
    """

    def parse(text: str) -> TargetPath:
        try:
            check_target(path_name(text), ending)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        owner = _belongs_to(Path(text)) if is_alone else ""
        if owner:
            raise argparse.ArgumentTypeError(f"{text} belongs to {owner}; choose another name")
        return TargetPath(text)

    return parse


def _belongs_to(path: Path) -> str:
    """Return what a file is a part of, "" if there is no such file or it stands alone."""
    run = (path.with_name(name) for name in ("last.pth", "best.pth"))
    if path.name in ("config.json", "metrics.jsonl") and any(file.exists() for file in run):
        return f"the run {path.absolute().parent}"
    embeddings = paths_of(path)
    if path in embeddings.values() and all(file.exists() for file in embeddings.values()):
        return f"the embeddings {embeddings['npy']}"
    return ""


def read_json_object(path: str | os.PathLike) -> dict:
    """Read a JSON object of options. Raises UserError if the file is missing or holds anything
    else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_object_without_doubles)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a JSON file of options") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); mend it or leave it out") from None
    if not isinstance(content, dict):
        raise UserError(f'{path}: expected a JSON object of options such as {{"lr": 0.001}}')
    return content


def _object_without_doubles(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name is there twice")
    return content


def _is_among(target: str, path: str) -> bool:
    """Return whether a file to write is what a path names, or belongs to it.

    An image belongs to its folder, a .csv and a .json to embeddings of the same name.
    """
    real_target, real_path = os.path.realpath(target), os.path.realpath(path)
    if target.endswith(".png") and os.path.exists(target):
        return Path(real_path) in (Path(real_target), *Path(real_target).parents)
    stem, suffix = os.path.splitext(real_path)
    if suffix == ".npy" and not isinstance(path, TargetPath):
        return real_target in (real_path, f"{stem}.csv", f"{stem}.json")
    return real_target == real_path


class _HelpFormatter(argparse.HelpFormatter):
    """Adds the choices that the help text does not name, and the default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        choices = getattr(action.type, "choices", ())
        text = action.help
        if any(name not in text for name in choices):
            text += f"; one of {', '.join(choices)}"
        if action.default in (None, argparse.SUPPRESS) or action.nargs == 0:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Argument parser without abbreviations; it suggests the nearest option and reads options from
    JSON.
    """

    def __init__(
        self, description: str = "", refused: dict[str, str] | None = None, **kwargs
    ) -> None:
        """refused: options that are known but not taken, with the sentence that says why."""
        kwargs = {"usage": "%(prog)s [options]"} | kwargs
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs
        )
        self.refused = refused or {}
        self._source = ""  # the file whose options are being parsed

    def parse(
        self, argv: Sequence[str] | None, layers: Sequence[tuple[str, dict]] = ()
    ) -> argparse.Namespace:
        """Parse `argv` (None: the words of the command line) above layers of JSON options.

        layers: source and options of each, the lowest first.

        Any mistake exits with status 2 and one line. The namespace's `given` is the set of the
        options in `argv`.
        """
        argv = sys.argv[1:] if argv is None else list(argv)
        self._check_names(argv)
        nullable = {action.dest for action in self._actions if action.default is None}
        for source, options in layers:
            for key, value in options.items():
                self._set_default(source, key, value, key in nullable)
            self._source = source
            self.parse_args([])  # so that an error names the file
            self._source = ""
        args = self.parse_args(argv)
        actions = self._options()
        names = [word.partition("=")[0] for word in argv]
        args.given = {actions[name].dest for name in names if name in actions}
        self._check_targets(args)
        return args

    def _check_targets(self, args: argparse.Namespace) -> None:
        """Refuse to write over what is read, or over what is written, too."""
        paths: list[tuple[str, str]] = []
        for action in self._actions:
            value = getattr(args, action.dest, None)
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, TargetPath) or (path and action.type is path_name):
                    paths.append((path, (action.option_strings or [action.metavar])[0]))
        for target, target_option in paths:
            for path, option in paths:
                is_target = isinstance(target, TargetPath) and option != target_option
                if is_target and _is_among(target, path):
                    self.error(
                        f"{target_option} {target}: would overwrite what {option} names; choose "
                        "another name"
                    )

    def error(self, message: str) -> None:
        """Exit with status 2 and one line; only the first process of a machine prints it."""
        source = f"{self._source}: " if self._source else ""
        line = f"{self.prog}: error: {one_line(source + message)} (see {self.prog} --help)\n"
        self.exit(2, line if os.environ.get("LOCAL_RANK", "0") == "0" else None)

    def _options(self) -> dict[str, argparse.Action]:
        return {
            name: action
            for action in self._actions
            for name in action.option_strings
            if name.startswith("--")
        }

    def _check_names(self, argv: Sequence[str]) -> None:
        options = self._options()
        for word in argv:
            name = word.partition("=")[0]
            if name in self.refused:
                self.error(f"{name}: {self.refused[name]}")
            if name.startswith("--") and len(name) > 2 and name not in options:
                self.error(f"unknown option {name}{nearest_hint(name, options)}")

    def _set_default(self, source: str, key: str, value: Any, is_nullable: bool) -> None:
        """Make a JSON option the default of its option, as the text that argparse reads."""
        if f"--{key}" in self.refused:
            self.error(f"{source}: {key}: {self.refused[f'--{key}']}")
        known = {action.dest: action for action in self._actions if action.dest != "help"}
        if key not in known:
            self.error(f"{source}: unknown option {key!r}{nearest_hint(key, known)}")
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if known[key].nargs == 0:
            if not isinstance(value, bool):
                self.error(f"{source}: {key} is true or false, got {json.dumps(value)}")
        elif value is not None or not is_nullable:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                self.error(f"{source}: {key} takes a number or a text, got {json.dumps(value)}")
            value = str(value)
        self.set_defaults(**{key: value})


def add_pooling(group: argparse._ArgumentGroup) -> None:
    """Add --layers, --pool and --stripes, see `models.pooling.Pooling`."""
    add = group.add_argument
    add("--layers", metavar="NAME,..", help="stages that are pooled: layer3,layer4, or last2, ...")
    add("--pool", metavar="KIND,..", default="avg", help="of all layers or each: avg, max or gem")
    add("--stripes", metavar="N,..", default="1", help="horizontal stripes, of all layers or each")


def add_flip_eval(group: argparse._ArgumentGroup, default: bool | None) -> None:
    """Add --flip_eval; a default of None means: as the checkpoint was trained."""
    text = "average image and mirror image, at twice the work"
    text += "" if default is not None else " (default: as in training)"
    flag = argparse.BooleanOptionalAction
    group.add_argument("--flip_eval", action=flag, default=default, help=text)


def add_max_pixels(group: argparse._ArgumentGroup) -> None:
    """Add --max_pixels, see `datasets.images.allow_pixels`."""
    text = "larger images are taken for damaged"
    group.add_argument("--max_pixels", type=whole(1), default=LARGEST_IMAGE, help=text)


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def add_machine(
    parser: Parser, neighbors: bool = True, workers: int = 2
) -> argparse._ArgumentGroup:
    """Add the options about the machine that scripts share; returns their group.

    Args:
        neighbors: whether the script searches for neighbors by torch.
        workers: default number of threads.
    """
    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--device", type=name_of(("auto", "cpu", "cuda")), default="auto", help="auto: GPU if any")
    add("--test_batch", type=whole(1), default=100, help="images a batch where nothing is trained")
    add("--workers", type=whole(0, 1024), default=workers, help="threads that prepare batches")
    if neighbors:
        memory = whole(1, 2**24)
        add("--eval_memory_mb", type=memory, default=512, help="MiB for the search for neighbors")
    return group


def add_precision(group: argparse._ArgumentGroup) -> None:
    """Add --precision."""
    names = name_of(("fp32", "bf16"))
    group.add_argument("--precision", type=names, default="fp32", help="of the network alone")
