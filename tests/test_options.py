"""Options of train.py and test.py: recipes, layers, what each changes, and any command line."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scripts import failed, module_of, run_in_process
from synthetic import write_dataset
from training import Run, execute, options, resumed, same_weights, trained

import train
from methods import METHODS
from recipes import RECIPES, fit_to_data
from utils import options as kinds
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE_OF = {
    "cbswr": "paper",
    "soft_centers": "best",
    "stml": "stml",
    "deepcluster": "deepcluster",
    "proxy_anchor": "proxy_anchor",
    "multi_similarity": "multi_similarity",
}


def write(path: Path, content: object) -> str:
    """Write JSON, or a text as it is, and return the path."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def options_of(method: str) -> dict[str, argparse.Action]:
    """Return the options that a method declares, by name."""
    parser = argparse.ArgumentParser(add_help=False)
    METHODS[method].add_options(parser)
    return {action.dest: action for action in parser._actions}


# ---------------------------------------------------------------- recipes and layers


WHITEN = ("--head_init=whiten",)


def test_the_command_line_stands_above_a_file_above_the_recipe_above_the_defaults(tmp_path):
    file = write(tmp_path / "options.json", {"lr": 0.5, "t": 0.2, "refit_head": "off"})
    args = train.parse_args(["--recipe=best", f"--config={file}", "--t=0.3"])
    assert (args.method, args.recipe) == ("soft_centers", "best")
    assert (args.t, args.lr, args.low_dim, args.target_t) == (0.3, 0.5, 512, 0.05)
    assert args.refit_head == "off"
    assert train.parse_args(["--recipe=best", "--refit_head=0.8", *WHITEN]).refit_head == 0.8
    assert (
        train.parse_args(["--recipe=best", *WHITEN]).refit_head == "start"
    )  # it stays of its kind
    file = write(tmp_path / "options.json", {"head_init": "whiten", "refit_head": 0.8})
    assert train.parse_args(["--recipe=best", f"--config={file}"]).refit_head == 0.8
    assert train.parse_args([]).method == "cbswr"


def test_a_recipe_is_a_file_of_any_place(tmp_path):
    content = {"about": "mine", "method": "deepcluster", "n_cluster": 7}
    args = train.parse_args(["--recipe", write(tmp_path / "mine.json", content)])
    assert (args.method, args.n_cluster) == ("deepcluster", 7)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.json")), ids=lambda path: path.stem)
def test_the_recipes_of_the_project_hold_what_their_methods_read(path):
    content = json.loads(path.read_text())
    args = train.parse_args(["--recipe", path.stem])
    assert content.pop("about")
    assert all(getattr(args, name) == value for name, value in content.items())


@pytest.mark.parametrize(
    "content, words",
    [
        ({"lr": 0.1}, "a recipe names its method, one of cbswr, "),
        ({"method": "cbs"}, "the method is one of cbswr, "),
        ({"method": ["stml"]}, "the method is one of cbswr, "),
        ({"method": "stml", "t": 0.1}, "t: is not read by the method stml of this recipe"),
        ({"method": "cbswr", "n_clusters": 3}, "option 'n_clusters'; did you mean n_cluster?"),
        ({"method": "cbswr", "help": True}, "unknown option 'help'"),
        ({"method": "cbswr", "batch_m": 4}, "batch_m: had no effect in the released code"),
        ({"method": "cbswr", "lr": -1}, "argument --lr: must be greater than 0, got -1"),
        ({"method": "cbswr", "lr": None}, "lr takes a number or a text, got null"),
        ({"method": "cbswr", "lr": [{}]}, "argument --lr: expected a number"),
        ({"method": "cbswr", "n_epoch": True}, "n_epoch takes a number or a text, got true"),
        ({"method": "cbswr", "overwrite": "yes"}, 'overwrite is true or false, got "yes"'),
        ('{"method": "cbswr"', "not valid JSON"),
        ('{"lr": 1, "lr": 2}', "a name is there twice"),
        ("[1]", "expected a JSON object"),
        ("[" * 50_000, "not valid JSON"),
    ],
)
def test_a_fault_in_a_file_names_it(tmp_path, content, words):
    path = write(tmp_path / "mine.json", content)
    failed(execute("--recipe", path, "--lr=0.5"), words, path)


def test_the_file_that_names_no_method_is_named(tmp_path):
    path = write(tmp_path / "more.json", {"method": "cbs"})
    failed(execute("--config", path), "more.json: the method is one of cbswr, ")


def test_a_config_takes_back_what_the_recipe_says(tmp_path):
    recipe = {"method": "cbswr", "layers": "last2", "deterministic": True, "flip_eval": True}
    config = {"layers": None, "deterministic": False, "flip_eval": False}
    words = [f"--recipe={write(tmp_path / 'mine.json', recipe)}"]
    args = train.parse_args(words)
    assert (args.layers, args.deterministic, args.flip_eval) == ("last2", True, True)
    args = train.parse_args([*words, f"--config={write(tmp_path / 'more.json', config)}"])
    assert (args.layers, args.deterministic, args.flip_eval) == (None, False, False)


def test_a_recipe_that_is_not_there():
    failed(execute("--recipe=bets"), "recipe bets: no such recipe; did you mean best?")
    failed(execute("--config=none.json"), "none.json: No such file or directory")
    failed(execute("--recipe="), "expected a path")


def test_a_random_head_is_not_fitted_again():
    assert train.parse_args(["--recipe=best", "--head_init=random"]).refit_head == "off"
    words = ("--recipe=best", "--head_init=random", "--refit_head=auto")
    failed(execute(*words), "--refit_head: a random head has no closed form")


def test_a_resumed_run_keeps_its_options(data, tmp_path):
    run = trained(data, tmp_path, "--recipe=kmeans", n_cluster=4, positives="self").run
    saved = json.loads((run / "config.json").read_text())
    args = train.parse_args(["--resume", str(run), "--n_epoch=5"])
    assert {**vars(args), "n_epoch": 1} == {
        **saved,
        "given": {"resume", "n_epoch"},
        "resume": str(run),
        "config": None,
        "overwrite": False,
    }
    again = execute("--config", run / "config.json", f"--checkpoint_dir={tmp_path / 'again'}")
    assert again.code == 0
    for word in ("--t=0.2", "--seed=5", "--recipe=paper", "--backbone=resnet18"):
        failed(execute("--resume", run, word), word.partition("=")[0], "cannot change")
    failed(execute("--resume", run, "--overwrite"), "--overwrite do not go with --resume")
    failed(execute("--resume", run, "--config=other.json"), "do not go with --resume")


# ---------------------------------------------------------------- options of other methods


@pytest.mark.parametrize("method", METHODS)
def test_an_option_that_the_method_does_not_read_is_refused(method):
    for name in set().union(*map(options_of, METHODS)) - options_of(method).keys():
        result = execute(f"--recipe={RECIPE_OF[method]}", f"--{name}=1")
        failed(result, f"--{name}: is not read by the method {method}", "but by ")


def test_the_help_shows_the_options_of_all_methods():
    text = execute("--recipe=stml", "--help").out
    for method in METHODS:
        assert f"method {method}" in text
        for name, action in options_of(method).items():
            assert f"--{name}" in text
            assert action.help.split()[0] in text


def test_every_option_has_help_and_one_name():
    for parser in [*map(train.make_parser, METHODS), module_of("test.py").make_parser()]:
        names = [action.dest for action in parser._actions]
        assert len(names) == len(set(names))
        assert all(action.help and len(action.help) > 5 for action in parser._actions)


# ---------------------------------------------------------------- what options change

# each option of all methods, beside those that other tests show to work, with another value
CHANGED = """lr=0.01 low_dim=8 seed=4 batch_size=6 precision=bf16 pool=gem layers=layer2,layer3
    stripes=2 head_init=pca optimizer=adamw train_stages=1 schedule=cosine warmup_epochs=0.5
    train_batch_norm momentum=0.9 crop_area=0.2"""
ELSEWHERE = """help recipe config dataset data_dir image_size n_images min_images backbone
    weights whiten_power refit_head n_epoch interval flip_eval nmi val_classes
    model_name checkpoint_dir log_dir checkpoint_every_steps resume overwrite tensorboard device
    test_batch workers eval_memory_mb deterministic data_on"""
CHANGED_OF = {
    "cbswr": """n_cluster=6 ml=0.1 rim=1.0 recon=1.0 t=0.3 alpha=0.2 mu=2.0 neg_m=3
        softmax_over=images pseudo_labels=kmeans positives=nn recon_target=image""",
    "soft_centers": "t=0.3 target_t=0.5 cluster_sizes=3,6 target_neighbors=0",
    "stml": "group=2 teacher_momentum=0.1 distill_dim=0 sigma=1.0 context=2",
    "deepcluster": "n_cluster=6 t=0.3",
    "proxy_anchor": "group=2",
    "multi_similarity": "group=2",
}


def names_of(words: str) -> set[str]:
    """Return the names among words such as NAME=VALUE."""
    return {word.partition("=")[0] for word in words.split()}


def test_no_option_is_missing_here():
    for method in METHODS:
        declared = names_of(CHANGED_OF[method])
        assert options_of(method).keys() == declared
        everything = {action.dest for action in train.make_parser(method)._actions}
        assert everything == names_of(CHANGED) | names_of(ELSEWHERE) | declared


@pytest.fixture(scope="module")
def unchanged(data, tmp_path_factory) -> dict[str, Run]:
    """One epoch of each method, of several steps."""
    folder = tmp_path_factory.mktemp("unchanged")
    return {name: trained(data, folder / name, **base(name)) for name in METHODS}


def base(method: str) -> dict:
    """Return options of a method's recipe for the tiny data set."""
    sizes = {"n_cluster": 4, "group": 4} if method != "proxy_anchor" else {}
    read = {name: value for name, value in sizes.items() if name in options_of(method)}
    return {"recipe": RECIPE_OF[method], "batch_size": 4} | read


@pytest.mark.parametrize(
    "method, word",
    [
        *(("cbswr", word) for word in CHANGED.split()),
        *((method, word) for method, words in CHANGED_OF.items() for word in words.split()),
    ],
)
def test_an_option_changes_the_training(data, tmp_path, unchanged, method, word):
    run = trained(data, tmp_path, f"--{word}", **base(method))
    assert not same_weights(run, unchanged[method])
    assert math.isfinite(run.rows[0]["loss"])


# ---------------------------------------------------------------- rates


@pytest.mark.parametrize("schedule, warmup", [("constant", 1.5), ("cosine", 0), ("cosine", 1.5)])
def test_the_rate_is_the_formula(data, tmp_path, schedule, warmup):
    args = {"n_epoch": 4, "interval": 4, "schedule": schedule, "warmup_epochs": warmup, "lr": 0.01}
    run = trained(data, tmp_path, "--recipe=proxy_anchor", **args)  # three steps an epoch
    n_warmup = round(3 * warmup)
    for row in run.rows:
        step = 3 * row["epoch"] - 1  # the last of the epoch
        rate = 0.01
        if step < n_warmup:
            rate = 0.01 * (step + 1) / n_warmup
        elif schedule == "cosine":
            share = (step - n_warmup) / (12 - n_warmup)
            rate = 0.005 * (1 + math.cos(math.pi * share))
        assert row["lr"] == pytest.approx(rate, rel=1e-12)
    groups = run.saved["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([rate, 100 * rate])


def test_the_rate_may_change_where_a_run_is_resumed(data, tmp_path):
    run = trained(data, tmp_path).run
    rows = resumed(run, "--n_epoch=2", "--lr=0.01").rows
    assert [row["lr"] for row in rows] == [0.05, 0.01]


# ---------------------------------------------------------------- numbers that fit the data


def test_numbers_that_nobody_gave_shrink_to_the_data(data, tmp_path):
    sizes = {"batch_size": None, "low_dim": None}
    config = trained(data, tmp_path / "paper", **sizes).saved["config"]
    assert (config["batch_size"], config["n_cluster"], config["low_dim"]) == (24, 24, 128)
    config = trained(data, tmp_path / "best", "--recipe=best", **sizes).saved["config"]
    assert config["batch_size"] == 24
    assert config["low_dim"] == 192  # all that the two layers have
    config = trained(data, tmp_path / "stml", "--recipe=stml", **sizes).saved["config"]
    assert config["batch_size"] == 20  # in groups of five
    result = execute(*options(data, tmp_path, recipe="best", low_dim=400))
    failed(result, "fewer than the 400 dimensions", "give fewer dimensions")


def test_batches_are_shared_evenly():
    args = train.parse_args(["--batch_size=9"])
    with pytest.raises(UserError, match="2 processes cannot share a batch of 9 evenly"):
        fit_to_data(args, 24, n_processes=2)


# ---------------------------------------------------------------- kinds of values


@pytest.mark.parametrize(
    "parse, good, bad",
    [
        (kinds.whole(2, 9), {"2": 2, "9": 9}, ["1", "10", "2.0", "x", "", "9" * 5000]),
        (kinds.whole_list(1, 9), {"3": [3], "3,9": [3, 9]}, ["", "3,", "0,1", "3;4", "10"]),
        (kinds.real(0), {"0": 0.0, "1e-3": 0.001}, ["-1", "nan", "inf", "1e39", "0,9", ""]),
        (kinds.real(0, above=True, most=1), {"1": 1.0}, ["0", "1e-400", "1.1"]),
        (kinds.name_of(["a", "b"], "timm:"), {"a": "a", "timm:x": "timm:x"}, ["", "A", "c"]),
        (kinds.folder_name, {"a b": "a b"}, ["", ".", ".a", "a/b", "a\\b", "a\n", "ü" * 101]),
        (kinds.path_name, {"a/b": "a/b", ".": "."}, ["", "a\0", "\ud800"]),
    ],
)
def test_kinds_of_values(parse, good, bad):
    assert {text: parse(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


# ---------------------------------------------------------------- any command line at all

NUMBERS = ("0", "1", "2", "4", "24", "25", "-1", "0.5", "1e-3", "nan", "1e39", "", "x", "9" * 400)
PATHS = ("data", "runs/done", "runs/done/last.pth", "file", "file/x", "none", "auto", "", "\udcff")
VALUES = {  # by the kind of an option
    "whole": NUMBERS,
    "name_or": (*NUMBERS, "off", "start", "auto"),
    "real": NUMBERS,
    "whole_list": ("4", "3,6", "0", "4,x", "", "24,25"),
    "folder_name": ("tiny", "done", "new", "", "..", "a/b", "two\nlines", "résumé", "-x"),
    "path_name": PATHS,
    "target_file": (*PATHS, "a.json", "data/a.npy", "none/a.json"),
    "str": ("last2", "layer2,layer3", "layer9", "gem", "avg,max", "3,1", "0", "x", ""),
}
NARROW = {  # what else would take long
    "n_epoch": ("0", "1", "-1", "x"),
    "backbone": ("resnet_small", "googlenet", "resnet18", "Resnet18", "timm:none", ""),
    "recipe": (*RECIPE_OF.values(), "kmeans", "isif", "bets", "file", ""),
}
FROZEN = ["--backbone=resnet_small", "--weights=none"]


def values_of(action: argparse.Action) -> tuple[str | None, ...]:
    """Return values for an option: of its kind, and garbage; None: the option alone."""
    if action.nargs == 0:
        return None, "1"
    if action.dest in NARROW:
        return NARROW[action.dest]
    choices = getattr(action.type, "choices", None)
    if choices:
        return *choices, "x", ""
    kind = "str" if action.type is None else action.type.__qualname__.partition(".")[0]
    return VALUES[kind]


@st.composite
def command_lines(draw) -> tuple[str, list[str]]:
    """Draw a script and a few of its options with values."""
    script = draw(st.sampled_from(["train.py", "train.py", "test.py"]))
    argv = []
    if script == "train.py":
        method = draw(st.sampled_from(list(METHODS)))
        argv = [f"--recipe={RECIPE_OF[method]}"]
        parser = train.make_parser(method)
    else:
        parser = module_of(script).make_parser()
    actions = st.lists(st.sampled_from(parser._actions), min_size=1, max_size=4)
    for action in draw(actions):
        value = draw(st.sampled_from(values_of(action)))
        name = draw(st.sampled_from(action.option_strings))
        argv.append(name if value is None else f"{name}={value}")
    return script, argv


def refuse(name: str) -> None:
    """Stand for a download."""
    raise UserError(f"no weights of {name} are fetched by tests")


@pytest.fixture(scope="module")
def place(data, tmp_path_factory) -> Path:
    """A folder with data, a run and a file that is none of these."""
    folder = tmp_path_factory.mktemp("place")
    write_dataset(folder / "data")
    (folder / "file").write_text("in the way")
    run = trained(folder / "data", folder / "runs").run
    run.rename(run.with_name("done"))
    return folder


@settings(
    max_examples=50,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(line=command_lines())
def test_any_command_line_works_or_ends_in_one_line(line, place, monkeypatch):
    script, argv = line
    monkeypatch.chdir(place)
    monkeypatch.setattr("models.weights._download", refuse)
    at = ["--data_dir=data", "--dataset=tiny", "--device=cpu"]
    if script == "train.py":
        sizes = ["--n_epoch=1", "--batch_size=20", "--low_dim=8", "--overwrite"]
        at += [*FROZEN, *sizes, "--checkpoint_dir=runs", "--model_name=new"]
    elif not any("checkpoint_path" in word for word in argv):
        at += FROZEN
    assume("--deterministic" not in argv)  # it would stay on
    if any(word.startswith("--resume") for word in argv):
        at = []
    result = run_in_process(script, *at, *argv, seconds=20)
    if result.code:
        failed(result, script=script, code=3 if result.code == 3 else 2)
    else:
        assert result.err == ""
