"""Train an embedding of images without labels: CBSwR (Nguyen et al., BMVC 2020) or another method.

images -> views -> backbone -> feature map -> embedding -> pseudo-labels -> centroids -> losses
-> checkpoint -> R@K and NMI
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import utils.threads  # noqa: F401

import torch
from torch import Tensor

from datasets.arrays import Split
from datasets.halves import load_halves
from datasets.views import EpochPlan, center_crops, crop_size, two_view_batches
from methods import METHODS
from models import BACKBONES, Pooling, build_model, check_crop_size
from models.batch_norm import share_batch_norm
from models.closed_form import HEADS, closed_form_head
from recipes import add_method_options, fit_to_data, others_help, read_layers, settle_options
from recipes.start import fit_start, power_of_head
from utils import options
from utils.devices import choose_device, compute_deterministically, memory_faults
from utils.distributed import Processes, joined
from utils.errors import run_script
from utils.evaluation import score, why_no_nmi
from utils.events import EventFile
from utils.features import embeddings_of, pooled_features
from utils.logs import log, log_epoch, log_start, log_summary, start_log
from utils.options import Parser, folder_name, name_of, name_or, path_name, real, whole
from utils.progress import progress
from utils.runs import RunFolder, State, check_finite
from utils.schedules import SCHEDULES, learning_rate
from utils.signals import Stopped, StopRequest

CHECK_EVERY = 20  # steps between looks at the loss, for which a GPU has to wait
REFUSED = {
    "--norm": "weighted a loss that the released code did not have; leave it out",
    "--cl": "weighted a loss that the released code did not have; leave it out",
    "--batch_m": "had no effect in the released code; leave it out (--neg_m is another option)",
}
NAMES = {"cub200": "CUB200", "car196": "Car196"}  # of runs, as the released commands have them
NOT_SAVED = {"given", "resume", "config", "overwrite"}
MACHINE = {"checkpoint_dir", "data_dir", "log_dir", "workers", "data_on"}  # may differ by machine


def make_parser(method: str) -> Parser:
    """Make the parser of the options that all methods read, and of those of one method."""
    parser = Parser("Train an embedding of images, without labels.", REFUSED.copy())
    parser.format_help = lambda: argparse.ArgumentParser.format_help(parser) + others_help(method)
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("recipe").add_argument
    add("--recipe", type=path_name, metavar="NAME|FILE", default="paper", help="or its path")
    add("--config", type=path_name, metavar="FILE", help="JSON options that stand above the recipe")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", type=folder_name, default="cub200", help="cub200, car196, or another name")
    add("--data_dir", type=path_name, default="data", help="the folder that holds <dataset>/")
    add("--image_size", type=whole(8), help="which pre-processed size, if there are several")
    add("--n_images", type=whole(2), help="train on so many images, drawn by --seed (default: all)")
    text = "least share of an image's area in a training crop (default: crops of 7/8 of its side)"
    add("--crop_area", type=real(0, above=True, most=1), help=text)
    group = parser.add_argument_group("network")
    add = group.add_argument
    add("--backbone", type=name_of(BACKBONES, "timm:"), default="googlenet", help="or timm:NAME")
    add("--weights", type=path_name, default="auto", help="auto (ImageNet), none (random), or FILE")
    add("--low_dim", type=whole(2, 65536), default=128, help="D, size of the embedding")
    options.add_pooling(group)
    heads = name_of(("random", *HEADS, "auto"))
    add("--head_init", type=heads, default="random", help="auto: chosen by the images")
    add("--whiten_power", type=real(0), default=0.5, help="of the head: 0 is PCA, 1 whitening")
    text = "after each epoch: off, start (as it began), auto (more whitening), or a power of it"
    which = name_or(("off", "start", "auto"), real(0, above=True))
    add("--refit_head", type=which, metavar="WHICH", default="off", help=text)
    add = parser.add_argument_group("optimization").add_argument
    add("--n_epoch", type=whole(0), default=30, help="epochs; 0 scores the start and saves it")
    add("--min_images", type=whole(0), default=0, help="to train on; fewer need --n_epoch")
    add("--batch_size", type=whole(1), default=64, help="m, images a batch, of all processes")
    add("--optimizer", type=name_of(("sgd", "adamw")), default="sgd", help="sgd or adamw")
    add("--momentum", type=real(0, most=1), default=0.0, help="of sgd")
    add("--lr", type=real(0, above=True), default=0.001, help="learning rate")
    add("--schedule", type=name_of(SCHEDULES), default="constant", help="of the learning rate")
    add("--warmup_epochs", type=real(0), default=0.0, help="in which the rate rises from 0")
    add("--train_stages", type=whole(0), default=0, help="last stages that are trained; 0: all")
    add("--train_batch_norm", action=flag, default=False, help="batch statistics in the backbone")
    add("--seed", type=whole(0, options.LARGEST_SEED), default=1024, help="of everything random")
    group = parser.add_argument_group("evaluation")
    add = group.add_argument
    add("--interval", type=whole(1), default=1, help="every so many epochs, and at the end")
    options.add_flip_eval(group, False)
    add("--nmi", type=name_of(("auto", "on", "off")), default="auto", help="auto: to 1000 classes")
    add("--val_classes", type=whole(0), default=0, help="last classes, held out for best.pth")
    add = parser.add_argument_group("run").add_argument
    add("--model_name", type=folder_name, help="name of the run (default: CBSwR_<DATASET>)")
    add("--checkpoint_dir", type=path_name, default="new_checkpoint", help="where runs are")
    add("--log_dir", type=path_name, help="where <model_name>.log goes (default: with the run)")
    text = "save after so many steps, too; 0: after epochs alone"
    add("--checkpoint_every_steps", type=whole(0), default=0, help=text)
    add("--resume", type=path_name, metavar="RUN", help="the folder of a run to continue")
    add("--overwrite", action="store_true", help="start afresh where a run lies already")
    add("--tensorboard", action="store_true", help="write event files, too")
    group = options.add_machine(parser)
    options.add_precision(group)
    add = group.add_argument
    add("--deterministic", action="store_true", help="the same bits each time on a GPU, slower")
    places = name_of(("auto", "device", "host"))
    add("--data_on", type=places, default="auto", help="where images lie")
    add_method_options(parser, method)
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Return the options: the defaults, above them the recipe, above that the command line."""
    method, layers = read_layers(argv)
    parser = make_parser(method)
    args = parser.parse(argv, layers)
    args.method = method
    settle_options(parser, args, layers)
    args.model_name = args.model_name or f"CBSwR_{NAMES.get(args.dataset, args.dataset)}"
    return args


class Job:
    """Everything that a training works on: data, network, method, optimizer, state, files."""

    def __init__(
        self, args: argparse.Namespace, run: RunFolder, stop: StopRequest, processes: Processes
    ) -> None:
        """Load the data, make the network, restore the run to resume, open the run's folder."""
        self.args = args
        self.run = run
        self.stop = stop
        self.processes = processes
        self.device = choose_device(args.device, processes)
        run.check_free(args.overwrite or bool(args.resume))
        halves = load_halves(
            args.data_dir, args.dataset, args.image_size, args.val_classes, args.n_images, args.seed
        )
        args.image_size = halves.training.image_size  # when resumed, there may be other sizes, too
        check_crop_size(args.backbone, crop_size(args.image_size))
        labels = None
        if METHODS[args.method].uses_labels:
            labels = torch.from_numpy(halves.training.class_numbers())
        data = halves.fingerprints
        shared = {k: v for k, v in vars(args).items() if k not in NOT_SAVED | MACHINE}
        processes.check_same(shared | data)
        remarks = halves.describe() + fit_to_data(args, len(halves.training), processes.world_size)
        self.pooled, measured = fit_start(args, halves.training, self.device, processes)
        remarks += measured
        self.config = {name: v for name, v in vars(args).items() if name not in NOT_SAVED}
        saved = processes.by_first(lambda: run.load(data)) if args.resume else {}
        self.make_network(len(halves.training), labels, "none" if saved else args.weights)
        self.halves = halves.on(self.device, args.data_on)
        self.state = run.restore(saved, self.parts, self.device) if saved else State()
        if saved and self.state.epoch >= args.n_epoch:
            self.config = saved["config"]  # the options it was trained with
            remarks.append(f"{self.state.epoch} epochs are done; a larger --n_epoch trains on")
        elif saved:
            remarks.append(f"goes on after epoch {self.state.epoch}, step {self.state.step}")
        self.events = None
        if processes.is_first:
            self.open_run(remarks)

    def make_network(self, n_images: int, labels: Tensor | None, weights: str) -> None:
        """Make the network, the method that trains it on so many images, and the optimizer."""
        args = self.args
        pooling = Pooling.parse(args.layers, args.pool, args.head_init != "random", args.stripes)
        torch.manual_seed(args.seed)
        n_cluster = getattr(args, "n_cluster", 32)  # of a cluster head that the method may not use
        model = build_model(args.backbone, n_cluster, args.low_dim, weights, pooling)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        if args.train_batch_norm:  # frozen statistics need no sharing
            self.model.base_model = share_batch_norm(model.base_model, self.processes, self.device)
        self.model.train_parts(args.train_stages, args.train_batch_norm)
        self.method = METHODS[args.method](
            self.model, args, n_images, labels=labels, processes=self.processes
        ).to(self.device)
        self.training_step = self.processes.parallel(self.method, self.device, self.method.uses_all)
        groups = self.method.parameter_groups(args.lr)
        if args.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=args.lr)
        self.parts = {"model": self.model, "method": self.method, "optimizer": self.optimizer}

    def open_run(self, remarks: list[str]) -> None:
        """Open the run's folder and its log, and log what is trained."""
        args = self.args
        self.run.open(self.config, self.state.rows, args.overwrite, bool(args.resume))
        start_log(Path(args.log_dir or self.run.path), args.model_name)
        log_start(args, self.device, self.model.has_batch_norm, remarks)
        if args.tensorboard:
            self.events = EventFile(self.run.path, self.state.epoch)

    def save(self, best: bool = False) -> None:
        """Write the checkpoint, unless weights are not finite."""
        check_finite(self.model.state_dict(), f"epoch {self.state.epoch}, step {self.state.step}")
        if self.processes.is_first:
            facts = {"config": self.config, "data": self.halves.fingerprints}
            self.run.save(self.parts, self.state, facts, best)

    def features(self) -> tuple[Tensor, Tensor]:
        """Return pooled features (N, C) and embeddings (N, D) of all training images (CPU)."""
        if self.pooled is None:
            self.pooled = self.pool(self.halves.training, "features of the training images")
        return self.pooled, embeddings_of(self.model, self.pooled)

    def pool(self, split: Split, title: str) -> Tensor:
        """Compute the pooled features (N, C) of the center crops of a split."""
        args = self.args
        crops = center_crops(split, args.test_batch, args.workers, self.processes.share)
        batches = progress(crops, title)
        (pooled,) = pooled_features(
            self.model, batches, args.precision, self.processes, args.flip_eval
        )
        return pooled

    def fit_head(self, at_end: bool = False) -> None:
        """Give the embedding head a closed form, unless it is random, by the training images.

        at_end: that of the end of an epoch (--refit_head); else that of its beginning.
        """
        args = self.args
        if args.head_init == "random":
            return
        pooled, _ = self.features()
        kind = args.head_init
        power = power_of_head(args, at_end)
        head = closed_form_head(pooled, args.low_dim, kind, power)
        self.model.set_head(*self.processes.from_first(head))
        self.method.head_changed()
        for parameter in self.model.feat_ext.parameters():
            self.optimizer.state.pop(parameter, None)  # moments of the head that was
        name = f"{kind} {power:g}" if kind == "whiten" else kind
        log.info("head by %s of the features of %d images", name, len(pooled))

    def evaluate(self) -> dict:
        """Score the test half, and the held-out classes as val_...; {} without labels."""
        args = self.args
        scores = {}
        for prefix, split in (("", self.halves.test), ("val_", self.halves.held_out)):
            if split is None or not split.labeled:
                continue
            embeddings = embeddings_of(self.model, self.pool(split, f"{prefix}features"))
            protocol = {
                "is_query": split.is_query,
                "no_nmi": why_no_nmi(args.nmi, len(split.classes)),
                "memory_mb": args.eval_memory_mb,
            }
            embeddings = embeddings.to(self.device)
            scoring = partial(score, embeddings, split.labels, args.dataset, **protocol)
            results = self.processes.by_first(scoring)
            scores |= {f"{prefix}{name}": value for name, value in results.items()}
        return scores

    def end_epoch(self, row: dict) -> None:
        """Count an epoch as done, with these metrics: save, then print."""
        logged = self.state.logged
        self.state.end_epoch(row)
        self.save(row.get("best", False))
        if self.processes.is_first:
            log_epoch(row, logged)
        if self.events:
            self.events.add(row)


def train_epoch(job: Job, epoch: int) -> dict:
    """Train an epoch, or the rest of it, and return its metrics."""
    args = job.args
    method = job.method
    state = job.state
    if not state.is_begun:
        with job.stop.at_once(), state.timed("features"):
            if epoch == 1 or args.refit_head not in ("off", "start"):  # the end had another head
                job.fit_head()
            state.logged = method.begin_epoch(epoch, job.features)
            state.is_begun = True

    plan = EpochPlan(
        job.halves.training,
        args.batch_size,
        args.seed,
        epoch,
        crop_area=args.crop_area,
        share=job.processes.share,
        **method.neighbors_and_positives(),
    )
    batches = two_view_batches(job.halves.training.images, plan, args.workers, state.step)
    method.train()
    started = time.perf_counter()
    job.pooled = None  # the network changes from here on
    for views, index in progress(batches, f"epoch {epoch}"):
        step = (epoch - 1) * len(plan) + state.step
        for group in job.optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(args, step, len(plan))
        inputs = job.model.normalization(views.to(job.device, non_blocking=True))
        index = index.to(job.device, non_blocking=True)
        losses = job.training_step(inputs, index)  # the method's, see methods/
        job.optimizer.zero_grad()
        losses["loss"].backward()
        job.optimizer.step()
        method.end_step()
        state.end_step(losses)
        if state.step % CHECK_EVERY == 0 or state.step == len(plan):
            check_finite(state.sums, f"epoch {epoch}, step {state.step} or before")
        started = state.count_time("train", started)
        if args.checkpoint_every_steps and state.step % args.checkpoint_every_steps == 0:
            job.save()
        job.stop.check()
    row = {"epoch": epoch, "lr": job.optimizer.param_groups[0]["lr"]}
    return row | state.means() | state.logged


def train(job: Job) -> None:
    """Train the epochs that are left, and score them."""
    args = job.args
    state = job.state
    if args.n_epoch == 0 and not state.rows:
        with job.stop.at_once():
            job.fit_head()
            scores = job.evaluate()
        job.end_epoch({"epoch": 0} | scores)
    for epoch in range(state.epoch + 1, args.n_epoch + 1):
        row = train_epoch(job, epoch)
        with job.stop.at_once(), state.timed("evaluate"):
            if args.refit_head != "off":
                job.fit_head(at_end=True)
            if epoch % args.interval == 0 or epoch == args.n_epoch:
                row |= job.evaluate()
        n_views = 2 * state.step * args.batch_size
        row |= {"seconds": state.seconds, "views_per_second": n_views / state.seconds["train"]}
        job.end_epoch(row)
    log_summary(state.rows, job.run.path)


def main(argv: list[str] | None = None) -> int:
    """Wire the rooms together and train, until the last epoch or a request to stop."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    if args.deterministic:
        compute_deterministically()
    run = RunFolder(Path(args.checkpoint_dir) / args.model_name)
    advice = "lower --batch_size or --test_batch, or use --precision bf16 or --data_on host"
    with memory_faults(advice), StopRequest() as stop, joined() as processes, run:
        with stop.at_once():
            job = Job(args, run, stop, processes)
        stop.agree = processes.largest if processes.world_size > 1 else None
        try:
            train(job)
        except Stopped as stopped:
            job.save()
            log.info("%s; continue with: python %s --resume %s", stopped, sys.argv[0], run.path)
            return stopped.status
    return 0


if __name__ == "__main__":
    run_script(main)
