"""Train CBSwR: unsupervised deep metric learning by deep clustering (Nguyen et al., BMVC 2020).

images -> views -> backbone -> feature map -> embedding -> pseudo-labels -> centroids -> losses -> checkpoint
-> R@K and NMI
"""

from __future__ import annotations

from utils.stopping import Stopped, StopRequest, interrupt_in_one_line

if __name__ == "__main__":
    interrupt_in_one_line()  # the imports below take a while

import argparse
import logging
import os
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.arguments import (
    BACKBONE_NAMES,
    LARGEST_MEMORY,
    LARGEST_SEED,
    METRIC_LOSS_NAMES,
    OTHER_LOSS_NAMES,
    SUPERVISED_LOSS_NAMES,
    Parser,
    add_flip,
    add_pooling,
    backbone_name,
    folder_name,
    name_of,
    numbers_in,
    path_name,
    real,
    whole,
    whole_numbers,
)
from utils.errors import DivergedError, UserError, one_line, run_script
from utils.presets import BASELINES, RECIPES, described, preset_of, take_preset
from utils.process import keep_freed_memory, share_cores
from utils.progress import progress
from utils.runs import BEST, LAST, REPORT, RunFolder, nmi_remark, recall_titles

if TYPE_CHECKING:  # --help does not wait for these
    from collections.abc import Callable, Iterator

    import torch
    from torch import Tensor

    from datasets import Split
    from models import CBSwR
    from models.teacher import Teacher
    from utils.distributed import Processes
    from utils.events import EventFile

REMOVED = {
    "--norm": "weighted a loss that the released code did not have; leave it out",
    "--cl": "weighted a loss that the released code did not have; leave it out",
    "--batch_m": "had no effect in the released code; leave it out (--neg_m weights the sums over other clusters)",
}
CHANGEABLE = {"resume", "n_epoch", "interval", "test_batch", "lr", "checkpoint_every_steps", "nmi"}  # on --resume:
CHANGEABLE |= {"deterministic", "device", "data_on", "workers", "log_dir", "data_dir", "eval_memory_mb", "compile"}
CHANGEABLE |= {"report", "tensorboard"}
MACHINE = {"checkpoint_dir", "data_dir", "log_dir", "workers", "data_on"}  # may differ between machines of one job
LOSSES = ("loss", "metric", "rim", "reconstruction")
KMEANS_ITERATIONS = 50  # of the pseudo-labels
log = logging.getLogger("train")


def make_parser() -> Parser:
    """The options; their old names are those of the released code."""
    p = Parser(description="Train CBSwR on a pre-processed data set, without labels.", removed=REMOVED)
    g = p.add_argument_group("data")
    g.add_argument(
        "--dataset", type=folder_name, default="cub200", help="cub200, car196, glyphs, or any name with arrays"
    )
    g.add_argument("--data_dir", type=path_name, default="data", help="the folder that holds <dataset>/")
    g.add_argument("--image_size", type=whole(8), help="which pre-processed size to take, if there are several")
    g.add_argument(
        "--workers", type=whole(0, 1024), default=2, help="threads that cut crops ahead; changes speed alone"
    )
    g = p.add_argument_group("network")
    g.add_argument(
        "--backbone", type=backbone_name, default="googlenet", help=f"one of {', '.join(BACKBONE_NAMES)}, or timm:NAME"
    )
    g.add_argument(
        "--weights", type=path_name, default="auto", help="auto (usual ImageNet weights), none (random), or a file"
    )
    g.add_argument("--low_dim", type=whole(2, 65536), default=128, help="size of the embedding")
    add_pooling(g, "default: the last")
    g.add_argument("--head_init", type=name_of(("random", "pca", "whiten")), default="random",
                   help="start of the embedding head: random, as in the paper, or in closed form from the pooled "
                   "features of the training images, without labels: their PCA, or that half-whitened; with --n_epoch "
                   "0 the embedding is ready without any training")  # fmt: skip
    g.add_argument("--whiten_power", type=real(0), default=0.5, help="of the singular values that --head_init whiten "
                   "divides by: 0 is PCA, 1 whitening")  # fmt: skip
    g.add_argument("--n_cluster", type=whole(2), default=32, help="K, the number of clusters")
    g = p.add_argument_group("method")
    g.add_argument("--recipe", type=name_of(tuple(RECIPES)), default="paper",
                   help="paper: the method as published, what the other defaults say; "
                   f"{described('best', RECIPES['best'])}. What else is given stands above it")  # fmt: skip
    g.add_argument("--baseline", type=name_of(tuple(BASELINES)),
                   help="a row of the paper's ablation table, or a method of others: "
                   f"{'; '.join(described(*one) for one in BASELINES.items())}. What else is given stands "
                   "above it")  # fmt: skip
    g.add_argument("--metric_loss", default="center",
                   type=name_of(METRIC_LOSS_NAMES + OTHER_LOSS_NAMES + SUPERVISED_LOSS_NAMES),
                   help="center: softmax over the centres of the batch's clusters, as in the paper; instance: over the "
                   "images of the batch (Ye et al. 2019); soft_centers: over the centroids of several k-means "
                   "partitions of all training images, towards soft assignments; contextual: by the neighbourhoods "
                   "that a teacher sees in the batch (Kim et al. 2022); classify: the cluster head by k-means labels "
                   "(Caron et al. 2018); proxy_anchor, multi_similarity: by the REAL labels, as a ceiling")  # fmt: skip
    g.add_argument("--positives", type=name_of(("auto", "self", "nn")), default="auto",
                   help="second view: of the image itself, or half the time of its nearest neighbour, mined each epoch "
                   "(auto: nn on cub200, self elsewhere)")  # fmt: skip
    g.add_argument("--group", type=whole(1), default=1, metavar="G",
                   help="fill batches with images drawn at random and the G - 1 nearest neighbours of each, mined each "
                   "epoch (with real labels: images of its class)")  # fmt: skip
    g.add_argument("--teacher_momentum", type=real(0, most=1), default=0.999,
                   help="of the moving average of the weights that is the teacher of --metric_loss "
                   "contextual")  # fmt: skip
    g.add_argument("--distill_dim", type=whole(0, 65536), default=0, metavar="D",
                   help="size of a second, larger embedding that --metric_loss contextual trains with: the teacher is "
                   "asked for that one, and the embedding learns from it, too (self-distillation, Kim et al. 2022); "
                   "0: none")  # fmt: skip
    g.add_argument(
        "--refit_head",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="after every epoch give the head the closed form of --head_init again",
    )
    g.add_argument("--refit_power", type=real(0), metavar="P", help="the --whiten_power of --refit_head (default: the "
                   "same as at the start)")  # fmt: skip
    g.add_argument("--pseudo_labels", type=name_of(("rim", "kmeans")), default="rim",
                   help="rim: argmax of the cluster head, as in the paper; kmeans: k-means over all training features "
                   "at the start of each epoch")  # fmt: skip
    g.add_argument("--kmeans_engine", type=name_of(("auto", "faiss", "torch")), default="auto",
                   help="of --pseudo_labels kmeans and soft_centers; auto: faiss where it is installed, else and with "
                   "--deterministic the project's own")  # fmt: skip
    g.add_argument("--t", type=real(1e-6), default=0.1, help="temperature of the centre-based softmax")
    g.add_argument("--cluster_sizes", type=whole_numbers(1, 10**6), default="6,12,24,48", metavar="N,N,...",
                   help="images a cluster, on average, in the partitions of --metric_loss soft_centers")  # fmt: skip
    g.add_argument("--target_t", type=real(1e-6), default=0.05, help="temperature of its soft assignments")
    g.add_argument("--target_neighbors", type=whole(0, 1000), default=4, metavar="N",
                   help="nearest neighbours of an image whose assignments are averaged with its own")  # fmt: skip
    g.add_argument(
        "--alpha", type=real(0), default=1.0, help="weight of the push from other centres in the metric loss"
    )
    g.add_argument("--mu", type=real(0), default=1.0, help="weight of the balance term in the clustering loss")
    g.add_argument(
        "--neg_m", type=whole(1, 10**6), default=1, help="factor on every sum over other clusters in the metric loss"
    )
    g.add_argument("--ml", type=real(0), default=0.9, help="weight of the metric loss")
    g.add_argument("--rim", type=real(0), default=0.3, help="weight of the clustering loss")
    g.add_argument("--recon", type=real(0), default=0.001, help="weight of the reconstruction loss")
    g.add_argument("--recon_target", type=name_of(("input", "image")), default="input",
                   help="input: the mean-subtracted image / 255, as released; image: the image in [0, 1]")  # fmt: skip
    g = p.add_argument_group("optimisation")
    g.add_argument("--optimizer", type=name_of(("sgd", "adamw")), default="sgd", help="plain SGD, or AdamW")
    g.add_argument("--lr", type=real(0, above=True), default=0.001, help="learning rate, constant")
    g.add_argument("--train_stages", type=whole(0), default=0, metavar="N",
                   help="train the last N stages of the backbone only, and keep the statistics of its batch norms; 0: "
                   "train all")  # fmt: skip
    g.add_argument("--batch_size", type=whole(1), default=64,
                   help="m, images a batch (of all processes of torchrun together); the network sees 2m "
                   "views")  # fmt: skip
    g.add_argument("--n_epoch", type=whole(0), default=30, help="epochs; 0 scores and saves the untrained network")
    g.add_argument("--seed", type=whole(0, LARGEST_SEED), default=1024, help="of everything random")
    g = p.add_argument_group("evaluation")
    g.add_argument("--test_batch", type=whole(1), default=100, help="images a batch in evaluation and feature passes")
    g.add_argument("--eval_memory_mb", type=whole(1, LARGEST_MEMORY), default=512,
                   help="MiB for searches for neighbours beside the features; changes speed alone")  # fmt: skip
    g.add_argument("--interval", type=whole(1), default=1, help="evaluate every so many epochs (and after the last)")
    add_flip(g)
    g.add_argument("--nmi", type=name_of(("auto", "on", "off")), default="auto",
                   help="whether to compute it; auto: up to 1000 test classes, with more it takes minutes an "
                   "epoch")  # fmt: skip
    g.add_argument("--val_classes", type=whole(0), default=0, metavar="N",
                   help="keep the last N classes of the training half, by number, out of training, and choose best.pth "
                   "on them instead of on the test half; 0: none")  # fmt: skip
    g = p.add_argument_group("run")
    g.add_argument("--model_name", type=folder_name, help="name of the run's folder (default: CBSwR_<DATASET>)")
    g.add_argument(
        "--checkpoint_dir", type=path_name, default="new_checkpoint", help="the folder that holds the runs' folders"
    )
    g.add_argument(
        "--log_dir", type=path_name, help="where <model_name>.log goes, all that is printed (default: the run's folder)"
    )
    g.add_argument("--config", type=path_name, metavar="FILE", help="JSON options; the command line stands above them")
    g.add_argument("--checkpoint_every_steps", type=whole(0), default=0, metavar="N",
                   help="save every N steps of an epoch, too; 0: after every epoch")  # fmt: skip
    g.add_argument("--resume", type=path_name, metavar="RUN",
                   help="continue a run to the same numbers: its folder or a checkpoint in it; --lr may change, "
                   "--n_epoch, --interval and what is about saving and the machine")  # fmt: skip
    g.add_argument("--overwrite", action="store_true", help="start afresh where a finished or stopped run lies")
    g.add_argument("--tensorboard", action="store_true",
                   help="also write the metrics into the run's folder for TensorBoard (pip install "
                   "tensorboard)")  # fmt: skip
    g.add_argument(
        "--report", action="store_true", help=f"end with {REPORT} in the run's folder, as report.py makes it"
    )
    g = p.add_argument_group("machine")
    g.add_argument("--device", type=name_of(("auto", "cpu", "cuda")), default="auto", help="auto: cuda if there is one")
    g.add_argument("--precision", type=name_of(("fp32", "bf16")), default="fp32",
                   help="bf16: the network in bfloat16; losses and distances stay float32")  # fmt: skip
    g.add_argument("--compile", action="store_true",
                   help="run the backbone through torch.compile: the first steps take minutes, later ones may be "
                   "quicker; the last digits differ")  # fmt: skip
    g.add_argument("--deterministic", action="store_true",
                   help="the same bits each time on one machine, at some cost in speed on a GPU (a CPU gives them "
                   "anyway)")  # fmt: skip
    g.add_argument("--data_on", type=name_of(("auto", "device", "host")), default="auto",
                   help="device: the training images lie on the GPU and are cropped there; auto: if half of its free "
                   "memory holds them")  # fmt: skip
    return p


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Options from the command line, above those of --config or of the run that --resume continues."""
    parser = make_parser()
    args, from_file = parser.parse(argv), set()
    if args.resume and args.config:
        parser.error("--resume takes the run's own settings; leave out --config")
    if args.resume:
        run = Path(args.resume)
        run = run.parent if run.suffix == ".pth" else run
        source = run / "config.json"
        if not source.is_file():
            parser.error(f"--resume {args.resume}: no run of train.py lies there (no {source})")
        base = parser.read_json(str(source))
        missing = {"dataset", "backbone", "checkpoint_dir"} - base.keys()
        if missing:
            parser.error(f"{source}: not the settings of a run: no {', '.join(sorted(missing))} in it")
        wanted = parser.parse(argv, base, str(source))
        for name in sorted(wanted.given - CHANGEABLE):
            if getattr(wanted, name) != base.get(name):
                parser.error(
                    f"--resume: --{name} was {base.get(name)} in {run} and cannot change; start a new run for it"
                )
        wanted.checkpoint_dir, wanted.model_name, args = str(run.parent), run.name, wanted
    elif args.config:
        base = parser.read_json(args.config)
        args, from_file = parser.parse(argv, base, args.config), {name for name in base if base[name] is not None}
        if args.resume:
            parser.error(f"{args.config}: resume belongs on the command line")
    if args.baseline and args.recipe != "paper":
        parser.error(f"--recipe {args.recipe} and --baseline {args.baseline} are two methods; leave one out")
    args.by_preset = set()
    if not args.resume:  # a run to resume has them in its settings
        for option in ("recipe", "baseline"):
            args.by_preset |= take_preset(args, option, from_file)
    if args.by_preset:
        parser.epilogue = f"; --{'recipe' if args.recipe != 'paper' else 'baseline'} sets what is not given"
    if args.compile and "," in (args.layers or ""):
        parser.error("--compile makes the whole backbone one piece, and --layers takes maps from inside; leave one out")
    if args.compile and args.train_stages:
        parser.error("--compile makes the whole backbone one piece, and --train_stages divides it; leave one out")
    if args.batch_size % args.group:
        near = args.batch_size // args.group * args.group or args.group
        parser.error(f"--batch_size {args.batch_size}: is no multiple of --group {args.group}; give {near}, say")
    if args.group > 1 and args.positives == "nn":
        parser.error("--positives nn: --group brings neighbours into the batch already; leave one out")
    if args.refit_head and args.head_init == "random":
        parser.error("--refit_head: --head_init random has no closed form to give; use pca or whiten")
    if "refit_power" in args.given and not (args.refit_head and args.head_init == "whiten"):
        parser.error(f"--refit_power {args.refit_power:g}: goes with --refit_head and --head_init whiten")
    if args.distill_dim and args.metric_loss != "contextual":
        parser.error(f"--distill_dim {args.distill_dim}: goes with --metric_loss contextual; leave it out")
    if args.metric_loss == "classify" and args.pseudo_labels != "kmeans":
        parser.error("--metric_loss classify: needs --pseudo_labels kmeans")
    if args.metric_loss not in METRIC_LOSS_NAMES and (args.rim or args.recon):
        parser.error(f"--metric_loss {args.metric_loss}: is the only loss then; give --rim 0 --recon 0 as well")
    if args.kmeans_engine != "auto" and args.pseudo_labels != "kmeans" and args.metric_loss != "soft_centers":
        parser.error(f"--kmeans_engine {args.kmeans_engine} goes with --pseudo_labels kmeans or --metric_loss "
                     "soft_centers; leave it out")  # fmt: skip
    if args.model_name is None:
        args.model_name = f"CBSwR_{ {'cub200': 'CUB200', 'car196': 'Car196'}.get(args.dataset, args.dataset) }"
    return args


@dataclass
class EpochUnderWay:
    """What an epoch has drawn from the network at its start, and how far it is."""

    positives: Tensor | None  # (N,) int64, or (N, g - 1) of --group
    clustering: dict  # what to log of the pseudo-labels
    losses: Tensor  # sums of LOSSES over the steps done, (4,) float64
    step: int = 0  # steps done
    seconds: dict[str, float] = field(default_factory=lambda: {"features": 0.0, "train": 0.0})


@dataclass
class State:
    """Where a run stands: all that decides what follows, beside the options, weights, optimiser and generators."""

    epoch: int = 0  # epochs done
    rows: list[dict] = field(default_factory=list)  # their metrics
    pseudo_labels: Tensor | None = None  # (N,) int64, of the last clustering
    current: EpochUnderWay | None = None
    whole: bool = True  # False inside a step and after a failed save: not to be saved when a fault ends the run

    def end_epoch(self, row: dict) -> None:
        """Count the epoch of these metrics as done."""
        self.epoch, self.current = row["epoch"], None
        self.rows.append(row)


@dataclass
class Job:
    """What the functions of this script work on."""

    args: argparse.Namespace
    config: dict  # the options as they are saved
    device: torch.device
    training: Split
    validation: Split
    held_out: Split | None  # classes of the training half, to choose the epoch on
    data: dict  # their fingerprints
    resident: Tensor | None  # the training images, where they lie on the GPU
    model: CBSwR
    losses: torch.nn.Module  # of a batch
    step: torch.nn.Module  # the same, with gradients averaged over the processes
    optimizer: torch.optim.Optimizer
    run: RunFolder
    state: State
    stop: StopRequest
    processes: Processes
    classes: Tensor | None  # (N,) int64, the real labels from 0, where the loss goes by them
    pooled: Tensor | None = None  # (N, C), features of the training images by the network as it is, if they are at hand
    events: EventFile | None = None  # of --tensorboard, in the first process

    @property
    def teacher(self) -> Teacher | None:
        """The network that the loss follows, if it follows one."""
        return getattr(self.losses, "teacher", None)


def main(argv: list[str] | None = None) -> int:
    """Wire the rooms together and train, until the last epoch or a request to stop."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    share_cores()
    import models  # noqa: F401  # and torch: slow, so before StopRequest takes over
    from utils.devices import memory_faults
    from utils.distributed import joined

    run = RunFolder(Path(args.checkpoint_dir) / args.model_name)
    with memory_faults(lambda: memory_advice(args, run.path)), StopRequest() as stop, ExitStack() as stack:
        with stop.at_once():
            processes = stack.enter_context(joined())
            stack.callback(run.close)
            job = set_up(args, run, stop, processes)
        stop.agree = processes.largest if processes.count > 1 else None
        try:
            train(job)
            if args.report and processes.first:
                draw_report(job)
        except Stopped as stopped:
            save(job)
            log.info("%s %s; all is saved, continue with: python train.py --resume %s", stopped, where(job), run.path)
            return stopped.status
        except DivergedError as fault:
            raise DivergedError(f"{fault}; the last good state stays in {run.path}: go on from it with a lower rate, "
                                f"python train.py --resume {run.path} --lr {args.lr / 10:g}") from None  # fmt: skip
        except Exception:
            if job.state.whole:
                with suppress(Exception):  # the first fault is the one to report
                    save(job)
            raise
    return 0


def train(job: Job) -> None:
    """The epochs: pseudo-labels and positives, steps, evaluation, checkpoint."""
    args, state = job.args, job.state
    if args.head_init != "random" and not state.rows and state.current is None:
        state.whole = False  # a fault in this is not to leave a network without its head
        fit_head(job)
        state.whole = True
    if args.n_epoch == 0 and not state.rows:
        with job.stop.at_once():
            scores = evaluate(job) | evaluate_held_out(job)
        end_epoch(job, {"epoch": 0, **scores, "best": bool(scores)})
    while state.epoch < args.n_epoch:
        if state.current is None:
            state.current = begin_epoch(job)
        train_steps(job)
        if args.refit_head:
            fit_head(job, " again")
        row = {"epoch": state.epoch + 1, "lr": args.lr, **mean_losses(state.current), **state.current.clustering}
        started = time.perf_counter()
        if row["epoch"] % args.interval == 0 or row["epoch"] == args.n_epoch:
            with job.stop.at_once():
                row |= evaluate(job) | evaluate_held_out(job)
            chosen_by = "val_recall@1" if job.held_out else "recall@1"
            best = max((r[chosen_by] for r in state.rows if chosen_by in r), default=-1.0)
            row["best"] = row.get(chosen_by, -1.0) > best
        row["seconds"] = {**state.current.seconds, "evaluate": time.perf_counter() - started}
        row["seconds"]["epoch"] = sum(row["seconds"].values())
        row["images_per_second"] = 2 * state.current.step * args.batch_size / row["seconds"]["train"]
        end_epoch(job, row)
    print_summary(state.rows, job.run.path)


def fit_head(job: Job, again: str = "") -> None:
    """Give the embedding head its closed form, from one feature pass over the training images."""
    from models.closed_form import closed_form_head, start_head

    args = job.args
    power = args.refit_power if again and args.refit_power is not None else args.whiten_power
    with job.stop.at_once():
        log.info("head by %s%s: a feature pass over %d images", args.head_init, again, len(job.training))
        pooled, _ = features(job, job.training, f"head by {args.head_init}")
        head = by_first(job, lambda: closed_form_head(pooled, args.low_dim, args.head_init, power, bool(again)))
        start_head(job.model, *head)
        empty = int((head[0] == 0).all(1).sum())
        if empty:
            log.info("the trained features have %d directions only: the last %d of the %d numbers of the embedding are "
                     "0", args.low_dim - empty, empty, args.low_dim)  # fmt: skip
        job.pooled = pooled
        if job.teacher:
            job.teacher.become(job.model)


def begin_epoch(job: Job) -> EpochUnderWay:
    """Find the epoch's positives and pseudo-labels."""
    import torch

    started = time.perf_counter()
    with job.stop.at_once():
        positives, pseudo_labels, clustering = pseudo_label_images(job)
    if pseudo_labels is not None:
        job.state.pseudo_labels = pseudo_labels
    if job.args.metric_loss == "classify":
        job.losses.begin_epoch()
    epoch = EpochUnderWay(positives, clustering, torch.zeros(len(LOSSES), dtype=torch.float64))
    epoch.seconds["features"] = time.perf_counter() - started
    return epoch


def train_steps(job: Job) -> None:
    """The steps that the epoch under way still needs; a request to stop is met after each."""
    from datasets import EpochPlan, ResidentLoader, TwoViewLoader
    from utils.finite import LossWatch, check_weights

    args, state, epoch = job.args, job.state, job.state.current
    found = None if epoch.positives is None else epoch.positives.numpy()
    positives, neighbors = (found, None) if args.group == 1 else (None, found)
    plan = EpochPlan(len(job.training), args.batch_size, job.training.image_size, args.seed, state.epoch + 1, positives,
                     job.processes.share, job.training.rows, neighbors)  # fmt: skip
    if job.resident is None:
        loader = TwoViewLoader(job.training.images, plan, args.workers, epoch.step, job.training.check_unchanged)
    else:
        loader = ResidentLoader(job.resident, plan, epoch.step)
    watch = LossWatch(LOSSES)
    job.model.train()
    before, started = epoch.seconds["train"], time.perf_counter()
    for views, images in progress(loader, len(loader), f"epoch {state.epoch + 1}: train"):
        state.whole = False
        losses = train_step(job, views, images)
        epoch.losses = epoch.losses.to(job.device) + losses
        epoch.step += 1
        state.whole = True
        epoch.seconds["train"] = before + time.perf_counter() - started
        watch.add(f"epoch {state.epoch + 1}, step {epoch.step} of {len(plan)}", losses)
        if args.checkpoint_every_steps and epoch.step % args.checkpoint_every_steps == 0 and epoch.step < len(plan):
            watch.finish()
            save(job)
        job.stop.check()
    watch.finish()
    check_weights(job.model, where(job))


def train_step(job: Job, views: Tensor, images: Tensor) -> Tensor:
    """One step on a batch of views (2m, crop, crop, 3); its LOSSES, float64 on the device.

    Of many processes each has its share of the views, and all have the losses of the whole batch.
    """
    import torch

    from utils.features import network_autocast

    labels = None
    inputs = job.model.normalization(views.to(job.device, non_blocking=True))  # (2m, 3, H, W)
    if job.args.pseudo_labels == "kmeans":
        labels = job.state.pseudo_labels[images].to(job.device)
    if job.classes is not None:
        labels = job.classes[images].to(job.device)
    if job.args.metric_loss == "soft_centers":
        labels = torch.as_tensor(images).to(job.device)
    with network_autocast(job.device, job.args.precision):
        losses = job.step(inputs, labels)
    job.optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    job.optimizer.step()
    if job.teacher:
        job.teacher.follow(job.model, job.losses.large)
    return torch.stack([losses[name].detach().double() for name in LOSSES])


def set_up(args: argparse.Namespace, run: RunFolder, stop: StopRequest, processes: Processes) -> Job:
    """Load the data, make the network or load the run to continue, and open the run's folder."""
    import torch

    from datasets import load_split
    from models import Pooling, build_model, pooled_width
    from models.batch_norm import share_batch_norm
    from models.closed_form import check_directions
    from utils.devices import bf16_is_slow, choose_device, compile_backbone, compute_deterministically
    from utils.events import EventFile, check_tensorboard

    if args.tensorboard:
        check_tensorboard()
    if args.deterministic:
        compute_deterministically()
    device = choose_device(args.device, processes)
    if device.type == "cpu":
        keep_freed_memory()
    training = load_split(args.data_dir, args.dataset, "training", args.image_size)
    validation = load_split(args.data_dir, args.dataset, "validation", training.image_size)
    halves, held_out = (training, validation), None
    if args.val_classes:
        training, held_out = training.hold_out(args.val_classes)
    check_sizes(args, training, validation, processes.count)
    pooling = Pooling.parse(args.layers, args.pool, args.head_init != "random", args.stripes)
    if args.by_preset & {"low_dim"} and not args.resume:
        args.low_dim = min(args.low_dim, len(training) - 1, pooled_width(args.backbone, pooling))
    kept_out = {"given", "by_preset", "resume", "config", "overwrite"}
    config = {key: value for key, value in vars(args).items() if key not in kept_out}
    data = {name: half.fingerprint() for name, half in zip(("training", "validation"), halves, strict=True)}
    processes.check_same({f"--{name}": config[name] for name in sorted(config.keys() - MACHINE)} | data)
    stale, saved = [], None
    if processes.first:
        check_folders(args, run.path)
        stale = [] if args.resume else run.files_to_overwrite(args.overwrite)
        saved = load_run(args, run, len(training)) if args.resume else None
    saved = processes.from_first(saved)
    if saved:
        check_data(saved, data, training, validation)

    resident = to_device(training.images, device, args.data_on)
    torch.manual_seed(args.seed)
    weights = "none" if saved else args.weights
    model = build_model(args.backbone, args.n_cluster, args.low_dim, weights, pooling)
    if args.head_init != "random":
        check_directions(args.low_dim, min(len(training) - 1, model.pooled_dim), len(training), model.pooled_dim)
    model = model.to(device, memory_format=torch.channels_last)
    model.base_model = share_batch_norm(model.base_model, processes, device)
    if args.train_stages:
        model.train_last(args.train_stages)
    if args.compile:
        compile_backbone(model, device)
    classes = real_classes(training) if args.metric_loss in SUPERVISED_LOSS_NAMES else None
    losses = make_losses(args, model, len(training), classes, processes).to(device)
    step = processes.parallel(losses, device, every_weight=all((args.ml, args.rim, args.recon)))
    job = Job(args, config, device, training, validation, held_out, data, resident, model, losses, step,
              make_optimizer(args, losses), run, State(), stop, processes, classes)  # fmt: skip
    if saved:
        restore(job, saved)
    if processes.first:
        run.begin(config, job.state.rows, stale)  # not before the new run is sure to start
        start_log(args, run.path)
        job.events = EventFile(run.path, job.state.rows) if args.tensorboard else None
    scored = f"of {len(set(validation.labels.tolist()))} classes" if validation.labelled else "without labels"
    log.info("%s: %d training images, %d test images %s, %d px; %s on %s in %s%s; run folder %s",
             args.dataset, len(training), len(validation), scored, training.image_size, args.backbone, device,
             args.precision, f", {processes.count} processes" if processes.count > 1 else "", run.path)  # fmt: skip
    if held_out:
        log.info("%d images of %d classes of the training half held out, to choose the epoch on",
                 len(held_out), args.val_classes)  # fmt: skip
    for option in ("recipe", "baseline"):
        preset = preset_of(args, option)
        if preset:
            used = {name: getattr(args, name) for name in preset}
            changed = [f"--{name}" for name in preset if used[name] != preset[name]]
            words = described(getattr(args, option), used)
            log.info("%s %s%s", option, words, f"; not as it has it: {', '.join(changed)}" if changed else "")
    if classes is not None:
        log.info("--metric_loss %s: trains by the REAL labels of the %d training classes",
                 args.metric_loss, int(classes.max()) + 1)  # fmt: skip
    if args.precision == "bf16" and bf16_is_slow(device):
        log.info("this processor has no bfloat16 instructions: --precision bf16 is slower here than fp32")
    if args.resume:
        log.info("continuing %s", where(job))
    if saved and job.state.epoch >= args.n_epoch:
        log.info("%s has its %d epochs already; give a larger --n_epoch to go on", run.path, job.state.epoch)
    return job


def make_losses(
    args: argparse.Namespace, model: CBSwR, count: int, classes: Tensor | None, processes: Processes
) -> torch.nn.Module:
    """The module that gives the losses of a batch; of many processes each takes its share of the batch."""
    import losses

    if args.metric_loss == "contextual":
        from models.teacher import Teacher

        large = losses.large_embedding(model.pooled_dim, args.distill_dim) if args.distill_dim else None
        return losses.ContextualStep(model, Teacher(model, args.teacher_momentum, large), args.ml, processes, large)
    if args.metric_loss == "soft_centers":
        return losses.SoftCentersStep(model, count, numbers_in(args.cluster_sizes), temperature=args.t,
                                      target_temperature=args.target_t, neighbors=args.target_neighbors,
                                      weight=args.ml, processes=processes)  # fmt: skip
    if args.metric_loss == "classify":
        return losses.ClassificationStep(model, args.ml, processes)
    if classes is not None:
        return losses.SupervisedStep(model, args.metric_loss, int(classes.max()) + 1, args.ml, processes)
    return losses.TrainingStep(model, (args.ml, args.rim, args.recon), temperature=args.t, alpha=args.alpha, mu=args.mu,
                               neg_m=args.neg_m, recon_target=args.recon_target, metric_loss=args.metric_loss,
                               processes=processes)  # fmt: skip


def make_optimizer(args: argparse.Namespace, losses: torch.nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW of the network's weights and, at their own rate, of those that the losses have beside it."""
    import torch

    groups: list[dict] = [{"params": [weight for weight in losses.model.parameters() if weight.requires_grad]}]
    network = {id(weight) for weight in losses.model.parameters()}
    own = [weight for weight in losses.parameters() if weight.requires_grad and id(weight) not in network]
    if own:
        groups.append({"params": own, "lr": args.lr * losses.own_rate, "scale": losses.own_rate})
    make = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.SGD
    return make(groups, lr=args.lr)


def real_classes(training: Split) -> Tensor:
    """The real labels of the training images, as classes from 0: (N,) int64."""
    import numpy as np
    import torch

    if not training.labelled:
        raise UserError(f"{training.path}: has no labels, which a supervised --metric_loss goes by")
    return torch.from_numpy(np.unique(np.asarray(training.labels), return_inverse=True)[1].astype(np.int64))


def check_sizes(args: argparse.Namespace, training, validation, processes: int) -> None:
    """Options that the data set and the machine limit, and a test half that cannot be scored."""
    from datasets import crop_size
    from models import check_crop_size
    from utils.clustering import has_faiss

    count = len(training)
    check_crop_size(args.backbone, crop_size(training.image_size))
    if args.kmeans_engine == "faiss" and not has_faiss():
        raise UserError(
            "--kmeans_engine faiss: faiss cannot be imported here; install it, or use --kmeans_engine torch"
        )
    if validation.labelled and len(set(validation.labels.tolist())) < 2:
        raise UserError(f"{validation.path}: holds images of one class only; scores need at least two test classes")
    if args.batch_size > count:
        raise UserError(
            f"--batch_size {args.batch_size}: the training half of {args.dataset} holds {count} images only"
        )
    if args.metric_loss == "instance" and args.batch_size < 2:
        raise UserError("--metric_loss instance: pushes images of a batch apart; give a --batch_size of at least 2")
    if args.batch_size % processes:
        raise UserError(f"--batch_size {args.batch_size}: {processes} processes cannot share a batch evenly; give a "
                        f"multiple of {processes}, or start another number of processes")  # fmt: skip
    if args.n_cluster > count:
        raise UserError(f"--n_cluster {args.n_cluster}: more clusters than the {count} training images")


def to_device(images, device, data_on: str):
    """The training images as a tensor on the GPU, or None: they stay in their file and crops are copied over."""
    import torch

    if device.type == "cpu" and data_on == "device":
        raise UserError("--data_on device: there is no GPU to hold the images; use --data_on host")
    if device.type == "cpu" or data_on == "host":
        return None
    if data_on == "auto" and images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return None
    resident = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), 1024):
        resident[start : start + 1024] = torch.from_numpy(images[start : start + 1024].copy())
    return resident


def check_folders(args: argparse.Namespace, run: Path) -> None:
    """The places that a run writes to, before it makes any of them."""
    from utils.files import check_writable

    check_writable(run, "make it writable, or move the run" if args.resume else "choose another --checkpoint_dir")
    if args.log_dir:
        check_writable(Path(args.log_dir), "choose another --log_dir")
    log_file = Path(args.log_dir or run) / f"{args.model_name}.log"
    if log_file.is_dir():
        raise UserError(f"{log_file}: is a folder, where the log is to be written; choose another --log_dir")


def load_run(args: argparse.Namespace, run: RunFolder, images: int) -> dict | None:
    """The content of the checkpoint that --resume names, None for a run that was stopped before its first.

    Raises UserError when there is none to continue from with `images` training images.
    """
    from models.weights import check_tensors, read_torch_file
    from utils.runs import fault_in

    run.lock()
    last, best = run.path / LAST, run.path / BEST
    path = Path(args.resume) if Path(args.resume).suffix == ".pth" else last
    if path.name != LAST and last.exists():
        raise UserError(f"--resume {path}: {last} is there, and would be lost; continue from that, or move it away")
    if not path.is_file():
        if best.is_file():
            raise UserError(f"{path}: no such file; continue from the best epoch with --resume {best}")
        if path != last or run.has_metrics():
            raise UserError(f"{path}: no such file; put it back, or start again without --resume")
        return None
    saved = read_torch_file(path)
    fault = fault_in(saved, images, args)
    if fault:
        raise UserError(f"{path}: not a checkpoint that training can continue from ({fault}); "
                        f"start the run again without --resume")  # fmt: skip
    check_tensors(saved["model"], path)
    return saved


def check_data(saved: dict, data: dict, training: Split, validation: Split) -> None:
    """Raise UserError naming the array that is not the one which the run of a checkpoint began with."""
    for name, split in (("training", training), ("validation", validation)):
        for part, path in (("images", split.path), ("labels", split.label_path), ("roles", split.role_path)):
            both = saved.get("data") or data, data
            then, now = (found[name].get(part, "no such file").partition(" sha256 ") for found in both)
            if then != now:
                changed = f"{now[0]}, it was {then[0]}" if now[0] != then[0] else "its content has changed"
                raise UserError(f"{path}: not the file that the run began with: {changed}; put that back, or start "
                                f"a new run")  # fmt: skip


def restore(job: Job, saved: dict) -> None:
    """Put back a saved run's weights, optimiser, generators and state."""
    import torch

    try:
        job.model.load_state_dict(saved["model"])
        missing, unknown = job.losses.load_state_dict(saved.get("step") or {}, strict=False)
        if unknown or beside_network(missing):
            raise KeyError(f"step: {', '.join([*unknown, *beside_network(missing)])}")
        job.optimizer.load_state_dict(saved["optimizer"])
        current = EpochUnderWay(**saved["current"]) if saved.get("current") else None
        job.state = State(saved["epoch"], saved["metrics"], saved["pseudo_labels"], current)
        torch.set_rng_state(saved["rng"]["cpu"])
        if "cuda" in saved["rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["rng"]["cuda"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])  # torch's second line says which
        raise UserError(f"--resume {job.args.resume}: the checkpoint does not fit the run's config.json ({reason}); "
                        f"start the run again without --resume") from None  # fmt: skip
    for group in job.optimizer.param_groups:
        group["lr"] = job.args.lr * group.get("scale", 1)  # the one option of the method that may change


def beside_network(state):
    """What of the losses' state_dict, or of its names, is not the network's."""
    if isinstance(state, dict):
        return {name: state[name] for name in beside_network(list(state))}
    return [name for name in state if not name.startswith("model.")]


def save(job: Job, best: bool = False) -> None:
    """Write the checkpoint; all that a run leaves behind is written here, by `RunFolder.begin` and by the log.

    Raises DivergedError instead of saving weights that are not finite, UserError when the disk is at fault.
    """
    from utils.finite import check_weights

    state = job.state
    check_weights(job.model, where(job))
    if not job.processes.first:
        return
    state.whole = False
    job.run.save(
        {
            "model": job.model.state_dict(),
            "step": beside_network(job.losses.state_dict()),
            "epoch": state.epoch,
            "optimizer": job.optimizer.state_dict(),
            "config": job.config,
            "metrics": state.rows,
            "data": job.data,
            "pseudo_labels": state.pseudo_labels,
            "current": vars(state.current) if state.current else None,
            "rng": random_state(job.device),
        },
        best,
    )
    state.whole = True


def end_epoch(job: Job, row: dict) -> None:
    """Count the epoch as done, save, then print: what is printed is on the disk."""
    job.state.end_epoch(row)
    save(job, row.get("best", False))
    if job.events:
        job.events.add(row)
    print_epoch(row)


def draw_report(job: Job) -> None:
    """Make the page about the run; what fails is said on one line, the run is whole without it."""
    args, out = job.args, job.run.path / REPORT
    try:
        from reports import Options, write_report

        options = Options(data_dir=args.data_dir, device=args.device, test_batch=args.test_batch, workers=args.workers,
                          memory_mb=args.eval_memory_mb)  # fmt: skip
        with job.stop.at_once():
            missing = write_report([job.run.path], out, options)
    except Exception as error:
        log.warning("warning: %s could not be made (%s: %s); the run is whole, try again with: python report.py %s",
                    out, type(error).__name__, one_line(str(error)), job.run.path)  # fmt: skip
        return
    for sentence in missing:
        log.info(sentence)
    log.info("report, to be opened in a browser: %s", out)


def memory_advice(args: argparse.Namespace, run: Path) -> str:
    """Which options need less memory."""
    return (f"lower --batch_size ({args.batch_size}) for the steps, --test_batch ({args.test_batch}) for evaluation, "
            f"or use --precision bf16 or --data_on host; --test_batch and --data_on may change on --resume {run}, "
            f"the others need a new run")  # fmt: skip


def where(job: Job) -> str:
    """How far the run is, in words."""
    state = job.state
    step = f", step {state.current.step} of epoch {state.epoch + 1}" if state.current else ""
    return f"after epoch {state.epoch}{step}"


def random_state(device) -> dict:
    """The state of torch's generators (dropout draws from them); the rest is drawn from (seed, epoch)."""
    import torch

    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else state


def pseudo_label_images(job: Job) -> tuple[Tensor | None, Tensor | None, dict]:
    """One feature pass for mining and clustering: positives (N,) or (N, g - 1), pseudo-labels (N,), what to log."""
    import torch

    args, training, epoch = job.args, job.training, job.state.epoch + 1
    if job.classes is not None:
        return same_class(job.classes, args.group - 1, (args.seed, epoch)) if args.group > 1 else None, None, {}
    count = args.group - 1
    if args.positives == "nn" or (args.positives == "auto" and args.dataset == "cub200" and not count):
        count = 1
    soft = args.metric_loss == "soft_centers"
    if not count and args.pseudo_labels == "rim" and not soft:
        return None, None, {}
    network = job.teacher.network if job.teacher else job.model
    embeddings = None
    if job.pooled is None:
        job.pooled, embeddings = features(job, training, f"epoch {epoch}: features", network)
    space, job.pooled = job.pooled, None
    if args.head_init != "random":  # a head in closed form knows better who is near
        with torch.no_grad():
            space = embeddings = network.embed(space.to(job.device))
    logged = {}
    if soft:
        job.losses.begin_epoch(*by_first(job, lambda: soft_clusters(job, embeddings)))
        logged = {"partitions": job.losses.partitions, "kmeans_engine": kmeans_engine(args)}
    positives, labels, found = by_first(job, lambda: mine_and_cluster(job, space.to(job.device), count))
    return positives, labels, logged | found


def same_class(classes: Tensor, count: int, seed: tuple[int, int]) -> Tensor:
    """For each image `count` others of its class, drawn at random, or in turns where there are fewer: (N, count)."""
    import numpy as np
    import torch

    rng, found = np.random.default_rng(seed), np.empty((len(classes), count), np.int64)
    for label in range(int(classes.max()) + 1):
        images = rng.permutation(np.flatnonzero(classes.numpy() == label))
        found[images] = np.stack([np.roll(images, -turn) for turn in range(1, count + 1)], 1)
    return torch.from_numpy(found)


def mine_and_cluster(job: Job, space: Tensor, count: int) -> tuple[Tensor | None, Tensor | None, dict]:
    """`pseudo_label_images` from features (N, C): the `count` nearest neighbours of each image, and the clusters."""
    from utils import clustering, metrics, search

    args, epoch = job.args, job.state.epoch + 1
    positives = None
    if count:
        positives = search.nearest_neighbors(space, count, memory_mb=args.eval_memory_mb)[1].cpu()
        positives = positives if args.group > 1 else positives[:, 0]
    if args.pseudo_labels == "rim":
        return positives, None, {}
    engine = kmeans_engine(args)
    with cluster_faults(epoch, "lower --n_cluster"):
        labels, _, _ = clustering.kmeans(
            space, args.n_cluster, max_iter=KMEANS_ITERATIONS, seed=args.seed + epoch, engine=engine
        )
    labels = labels.cpu()
    sizes = clustering.cluster_sizes(labels, args.n_cluster)
    logged = {"cluster_sizes": sizes.tolist(), "kmeans_engine": engine}
    if job.state.pseudo_labels is not None:
        logged["nmi_to_previous_clusters"] = metrics.nmi(labels, job.state.pseudo_labels)
    return positives, labels, logged


def soft_clusters(job: Job, space: Tensor) -> tuple[Tensor, ...]:
    """What --metric_loss soft_centers remembers of embeddings (N, D) of the training images."""
    args, epoch = job.args, job.state.epoch + 1
    with cluster_faults(epoch, "raise --cluster_sizes"):
        return job.losses.find(space.to(job.device), args.seed + epoch, kmeans_engine(args), KMEANS_ITERATIONS,
                               args.eval_memory_mb)  # fmt: skip


@contextmanager
def cluster_faults(epoch: int, advice: str) -> Iterator[None]:
    """A clustering that cannot be made, as a mistake in one line, with what to do about too many clusters."""
    try:
        yield
    except (ValueError, ImportError) as error:
        advice = f"; {advice}" if isinstance(error, ValueError) else ""
        raise UserError(f"epoch {epoch}: cannot cluster the training images: {error}{advice}") from None


def kmeans_engine(args: argparse.Namespace) -> str:
    """That of --kmeans_engine, or what auto stands for."""
    from utils import clustering

    if args.kmeans_engine != "auto":
        return args.kmeans_engine
    return "faiss" if clustering.has_faiss() and not args.deterministic else "torch"


def mean_losses(epoch: EpochUnderWay) -> dict[str, float]:
    """The mean of each loss over the steps of an epoch."""
    means = (epoch.losses / epoch.step).tolist()
    return {name if name == "loss" else f"{name}_loss": mean for name, mean in zip(LOSSES, means, strict=True)}


def evaluate(job: Job) -> dict:
    """R@K and NMI of the test half, by its embeddings (paper section 4); nothing where it has no labels."""
    return scores_of(job, job.validation, "test features") if job.validation.labelled else {}


def evaluate_held_out(job: Job) -> dict:
    """The same of the classes held out, under the names val_recall@1, ..., val_nmi; nothing where there are none."""
    found = scores_of(job, job.held_out, "held-out features") if job.held_out else {}
    return {f"val_{name}": value for name, value in found.items()}


def scores_of(job: Job, split: Split, title: str) -> dict:
    """R@K and NMI of the embeddings of labelled images."""
    from utils.evaluation import recall_ranks, score, why_no_nmi

    args = job.args
    _, embeddings = features(job, split, title)
    ks, no_nmi = recall_ranks(args.dataset), why_no_nmi(args.nmi, len(set(split.labels.tolist())))
    return by_first(
        job,
        lambda: score(embeddings.to(job.device), split.labels, memory_mb=args.eval_memory_mb, ks=ks,
                      is_query=split.is_query, no_nmi=no_nmi),
    )  # fmt: skip


def features(job: Job, split: Split, title: str, network: CBSwR | None = None) -> tuple[Tensor, Tensor]:
    """Pooled features (N, C) and embeddings (N, D) of a half, by the model or by another network.

    Of many processes each computes some batches.
    """
    from datasets import center_crops
    from utils.features import extract_features

    args, processes = job.args, job.processes
    rounds = len(split) / (args.test_batch * processes.count)

    def stoppable(crops: Iterator[Tensor]) -> Iterator[Tensor]:
        for number, batch in enumerate(crops):
            if number < int(rounds):  # in these every process has a batch
                job.stop.check()
            yield batch

    crops = center_crops(split.images, args.test_batch, args.workers, split.check_unchanged, processes.share,
                         split.rows)  # fmt: skip
    return extract_features(network or job.model, progress(stoppable(crops), rounds, title), args.precision, processes,
                            flip=args.flip_eval)  # fmt: skip


def by_first(job: Job, work: Callable[[], Any]) -> Any:
    """What `work` gives in the first process, for all of them; a request to stop ends it for all."""
    if job.processes.count == 1:
        return work()
    found, signal = job.processes.from_first(job.stop.caught(work) if job.processes.first else None)
    if signal:
        raise Stopped(signal)
    return found


class LogFile(logging.FileHandler):
    """A log file whose disk may be full: UserError instead of logging's traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise UserError for the error under way."""
        raise UserError(f"{self.baseFilename}: cannot be written ({sys.exc_info()[1]}); make room there")


def start_log(args: argparse.Namespace, run: Path) -> None:
    """Print to the terminal and append to the log file."""
    folder = Path(args.log_dir) if args.log_dir else run
    folder.mkdir(parents=True, exist_ok=True)
    log.setLevel(logging.INFO)
    log_file = LogFile(folder / f"{args.model_name}.log", encoding="utf-8", errors="backslashreplace")
    log.handlers = [logging.StreamHandler(sys.stdout), log_file]


def print_epoch(row: dict) -> None:
    """One line an epoch."""
    parts = [f"epoch {row['epoch']:>3}"]
    if "loss" in row:
        parts.append(
            "loss {loss:.4f} (metric {metric_loss:.4f}, rim {rim_loss:.4f}, recon {reconstruction_loss:.4f})".format(
                **row
            )
        )
    if "cluster_sizes" in row:
        sizes = row["cluster_sizes"]
        parts.append(f"{len(sizes)} clusters of {min(sizes)} to {max(sizes)} images ({row['kmeans_engine']})")
    if "partitions" in row:
        parts.append(f"partitions of {', '.join(map(str, row['partitions']))} clusters ({row['kmeans_engine']})")
    if "nmi_to_previous_clusters" in row:
        parts.append(f"NMI to the last clusters {100 * row['nmi_to_previous_clusters']:.1f}")
    if "recall@1" in row:
        parts.append(" ".join(f"{title} {100 * row[name]:.2f}" for title, name in recall_titles(row).items()))
        nmi = f"{100 * row['nmi']:.2f}" if "nmi" in row else "left out"
        parts.append(f"NMI {nmi}{' *' if row.get('best') and 'val_recall@1' not in row else ''}")
    elif "best" in row:
        parts.append("no scores: they need labels")
    if "val_recall@1" in row:
        parts.append(f"{figures_of(row, 'val_', ' ')}{' *' if row.get('best') else ''}")
    if "seconds" in row:
        parts.append(f"{row['seconds']['epoch']:.1f} s, {row['images_per_second']:.1f} images/s")
    log.info("  ".join(parts))


def print_summary(rows: list[dict], run: Path) -> None:
    """The last epoch and the best one, with what the latter was chosen on."""
    chosen_by, how = "recall@1", "CHOSEN ON TEST"
    if any("val_recall@1" in row for row in rows):
        chosen_by, how = "val_recall@1", "chosen on held-out training classes"
    scored = [row for row in rows if chosen_by in row]
    if not scored:
        if rows and "best" in rows[-1]:
            log.info("last epoch (%d), not scored for want of labels: %s", rows[-1]["epoch"], run / LAST)
        return
    best = max(scored, key=lambda row: row[chosen_by])  # the first of equals
    half = "" if "recall@1" in scored[-1] else "val_"
    log.info("NMI %s", nmi_remark({name.removeprefix(half): value for name, value in scored[-1].items()}))
    for title, row, name in (("last epoch", scored[-1], "last.pth"), (f"best epoch, {how}", best, "best.pth")):
        figures = [figures_of(row, half) for half in ("", "val_") if f"{half}recall@1" in row]
        log.info("%s (%d): %s  %s", title, row["epoch"], "  ".join(figures), os.path.join(run, name))


def figures_of(row: dict, half: str, gap: str = "  ") -> str:
    """R@1 and, if it was computed, NMI of the test half ("") or the classes held out ("val_")."""
    nmi = f"{gap}NMI {100 * row[f'{half}nmi']:.2f}" if f"{half}nmi" in row else ""
    return f"{'held-out ' if half else ''}R@1 {100 * row[f'{half}recall@1']:.2f}{nmi}"


if __name__ == "__main__":
    run_script(main)
