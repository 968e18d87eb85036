"""Kinds of command-line values, and options given in a file. Nothing here is slow to import."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
from collections.abc import Callable

from utils.errors import one_line
from utils.process import place

LARGEST_SEED = 2**32 - 1  # the largest that numpy and scikit-learn take
LARGEST_REAL = 1e30  # far from where float32 ends
LARGEST_MEMORY = 2**24  # MiB
LONGEST_NAME = 200  # bytes of a folder's name, which is part of longer file names; file systems take 255
LARGEST_CONFIG = 2**20  # bytes
POOLS = ("avg", "gem", "max")
# the names of models.BACKBONES, which takes seconds to import
BACKBONE_NAMES = (
    "googlenet",
    "googlenet_caffe",
    "googlenet_bn",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet_small",
)
METRIC_LOSS_NAMES = ("center", "instance")  # the names of losses.METRIC_LOSSES
OTHER_LOSS_NAMES = ("soft_centers", "contextual", "classify")  # with a step of their own
SUPERVISED_LOSS_NAMES = ("proxy_anchor", "multi_similarity")


def whole_numbers(least: int, most: int) -> Callable[[str], str]:
    """An argparse type: whole numbers with commas between them, kept as text; `numbers_in` gives them."""
    one = whole(least, most)

    def parse(text: str) -> str:
        return ",".join(str(one(part)) for part in text.split(","))

    return parse


def numbers_in(text: str) -> list[int]:
    """The numbers of a text that `whole_numbers` has passed."""
    return [int(part) for part in text.split(",")]


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `least` and, if given, at most `most`."""

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


def real(least: float, *, above: bool = False, most: float = LARGEST_REAL) -> Callable[[str], float]:
    """An argparse type: a number of at least (or, with `above`, greater than) `least` and at most `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not math.isfinite(value) or value < least or (above and value == least):
            raise argparse.ArgumentTypeError(f"must be {'greater than' if above else 'at least'} {least:g}, got {text}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most:g}, got {text}")
        return value

    return parse


def name_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    """An argparse type: one of `choices`; the error suggests the nearest."""

    def parse(text: str) -> str:
        if text not in choices:
            close = difflib.get_close_matches(text, choices, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise argparse.ArgumentTypeError(f"unknown name {text!r}{hint} (choose from {', '.join(choices)})")
        return text

    parse.choices = choices
    return parse


def backbone_name(text: str) -> str:
    """An argparse type: one of BACKBONE_NAMES, or timm:NAME; whether timm knows it is seen when it is made."""
    return text if re.fullmatch(r"timm:\w+(\.\w+)?", text) else name_of((*BACKBONE_NAMES, "timm:NAME"))(text)


def folder_name(text: str) -> str:
    """An argparse type: a plain name that makes one folder: not empty, no separators, not a hidden or parent folder."""
    if not text or text.startswith(".") or "/" in text or "\\" in text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a plain name without slashes or a leading dot, got {text!r}")
    if not text.isprintable() or len(os.fsencode(text)) > LONGEST_NAME:
        raise argparse.ArgumentTypeError(f"expected a name of at most {LONGEST_NAME} printable bytes, got {text!r}")
    return text


def path_name(text: str) -> str:
    """An argparse type: a path that a system can have: not empty, no NUL, no half of a character."""
    try:
        usable = bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(f"expected a path, got {text!r}")
    return text


def _without_doubles(pairs: list[tuple[str, object]]) -> dict:
    """The JSON object of these pairs; ValueError for a key that comes twice, of which one would silently be lost."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return content


def add_pooling(group: argparse._ArgumentGroup, default: str) -> None:
    """Add --layers, --pool and --stripes (see `models.pooling.Pooling`); `default` says what no --layers means."""
    group.add_argument("--layers", metavar="NAME[,NAME]", help="stages of the backbone whose pooled features are "
                       f"joined, such as layer3,layer4 ({default})")  # fmt: skip
    group.add_argument("--pool", metavar="KIND[,KIND]", default="avg", help="how maps are pooled, for all "
                       f"layers or each: one of {', '.join(POOLS)}; gem: the generalised mean of power 3")  # fmt: skip
    group.add_argument("--stripes", metavar="N[,N]", default="1", help="horizontal stripes that maps are pooled in, "
                       "for all layers or each: they keep what is above and what below, for upright objects that fill "
                       "the image")  # fmt: skip


def refuse_network_options(parser: Parser, args: argparse.Namespace) -> None:
    """Exit with an error where options of a frozen backbone are given beside a checkpoint."""
    for option in ("weights", "layers", "pool", "stripes"):
        if args.checkpoint_path and option in args.given:
            parser.error(f"--{option} goes with --backbone; a checkpoint brings its own {option}")
    if args.dim is not None and not args.checkpoint_path:
        parser.error("--dim goes with --checkpoint_path; the features of a frozen backbone have no order")


def add_dim(group: argparse._ArgumentGroup) -> None:
    """Add --dim (see `models.cbswr.CBSwR.shorten`)."""
    group.add_argument("--dim", type=whole(1), metavar="D", help="the first D numbers of a checkpoint's embedding: for "
                       "heads in closed form, whose numbers stand in order")  # fmt: skip


FLIP_HINT = "the checkpoint was scored with --flip_eval in training: give it here, too, for the same embeddings"


def add_flip(group: argparse._ArgumentGroup) -> None:
    """Add --flip_eval."""
    group.add_argument("--flip_eval", action=argparse.BooleanOptionalAction, default=False, help="average the features "
                       "of image and mirror image: better, and twice the work; say so beside the "
                       "scores")  # fmt: skip


class _HelpFormatter(argparse.HelpFormatter):
    """Adds the names to choose from, where the text does not tell them, and "(default: ...)" where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        names = getattr(action.type, "choices", ())
        told = "" if all(name in action.help for name in names) else f"; one of {', '.join(names)}"
        default = "" if action.default in (None, argparse.SUPPRESS) or action.nargs == 0 else " (default: %(default)s)"
        return f"{action.help}{told}{default}"


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations, suggests the nearest option, and can read options from JSON."""

    def __init__(self, *, removed: dict[str, str] | None = None, **kwargs) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.removed = removed or {}
        self._source = ""  # the file whose options are being read; errors name it
        self.epilogue = ""  # what every error ends with

    def parse(self, argv: list[str], base: dict | None = None, source: str = "") -> argparse.Namespace:
        """Parse `argv`; `base` (option -> value, from the file `source`) stands below it and above the defaults.

        Exits with status 2 and one line for any mistake in either. The namespace's `given` names the options of `argv`.
        """
        self._check_names(argv)
        self._source = source
        self.parse_args(self._as_argv(base or {}, source))  # faults of the file are reported as such
        self._source = ""
        args = self.parse_args(self._as_argv(base or {}, source) + argv)
        args.given = self._given(argv)
        return args

    def read_json(self, path: str) -> dict:
        """Options from a JSON object; exits with status 2 when it is none."""
        try:
            with open(path, "rb") as file:
                text = file.read(LARGEST_CONFIG + 1)
            if len(text) > LARGEST_CONFIG:
                self.error(f"{path}: larger than {LARGEST_CONFIG} bytes; give a JSON file of options")
            content = json.loads(text.decode("utf-8"), object_pairs_hook=_without_doubles)
        except OSError as error:
            self.error(f"{path}: {error.strerror}; give a JSON file of options")
        except (ValueError, RecursionError) as error:
            self.error(f"{path}: not valid JSON ({error}); mend it or leave it out")
        if not isinstance(content, dict):
            self.error(f'{path}: expected a JSON object of options such as {{"lr": 0.001}}')
        return content

    def error(self, message: str) -> None:
        """One line and exit status 2; argparse's usage text would bury it. One line on a machine of many processes."""
        source = f"{self._source}: " if self._source and self._source not in message else ""
        here = place()
        line = f"{self.prog}: error: {one_line(f'{source}{message}')}{self.epilogue} (see {self.prog} --help)\n"
        self.exit(2, line if here is None or here.local_rank == 0 else None)

    def _options(self) -> dict[str, argparse.Action]:
        return {s: action for action in self._actions for s in action.option_strings if s.startswith("--")}

    def _check_names(self, argv: list[str]) -> None:
        known = self._options()
        for word in argv:
            name = word.partition("=")[0]
            if name in self.removed:
                self.error(f"{name}: {self.removed[name]}")
            if name.startswith("--") and len(name) > 2 and name not in known:
                close = difflib.get_close_matches(name, known, 1)
                self.error(f"unknown option {name}" + (f"; did you mean {close[0]}?" if close else ""))

    def _given(self, argv: list[str]) -> set[str]:
        known = self._options()
        return {known[n].dest for n in (word.partition("=")[0] for word in argv) if n in known}

    def _as_argv(self, values: dict, source: str) -> list[str]:
        known = {action.dest: (s, action) for s, action in reversed(self._options().items())}  # not --no-...
        known = {dest: option for dest, option in known.items() if dest not in {"help", "config"}}
        argv = []
        for key, value in values.items():
            if f"--{key}" in self.removed:
                self.error(f"{source}: {key}: {self.removed[f'--{key}']}")
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                self.error(f"{source}: unknown option {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
            option, action = known[key]
            if value is None:
                continue
            if action.nargs == 0:  # a flag
                if not isinstance(value, bool):
                    self.error(f"{source}: {key} is true or false, got {value!r}")
                argv += [option] if value else []
            elif isinstance(value, bool) or not isinstance(value, (str, int, float)):
                self.error(f"{source}: {key} takes a number or a text, got {json.dumps(value)}")
            else:
                argv.append(f"{option}={value}")
        return argv
