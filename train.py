"""Train CBSwR: unsupervised deep metric learning by deep clustering (Nguyen et al., BMVC 2020).

images -> views -> backbone -> feature map -> embedding -> pseudo-labels -> centroids -> losses -> checkpoint
-> R@K and NMI
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

from utils.arguments import BACKBONE_NAMES, LARGEST_SEED, Parser, folder_name, name_of, path_name, real, whole
from utils.errors import UserError, run_script
from utils.process import keep_freed_memory, share_cores
from utils.progress import progress

REMOVED = {
    "--norm": "weighted a loss that the released code did not have; leave it out",
    "--cl": "weighted a loss that the released code did not have; leave it out",
    "--batch_m": "had no effect in the released code; leave it out (--neg_m weights the sums over other clusters)",
}
CHANGEABLE = {"resume", "n_epoch", "interval", "test_batch"}  # on --resume, as well as the next line
CHANGEABLE |= {"device", "data_on", "workers", "log_dir", "data_dir"}
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
        "--backbone", type=name_of(BACKBONE_NAMES), default="googlenet", help=f"one of {', '.join(BACKBONE_NAMES)}"
    )
    g.add_argument(
        "--weights", type=path_name, default="auto", help="auto (usual ImageNet weights), none (random), or a file"
    )
    g.add_argument("--low_dim", type=whole(2, 65536), default=128, help="size of the embedding")
    g.add_argument("--n_cluster", type=whole(2), default=32, help="K, the number of clusters")
    g = p.add_argument_group("method")
    g.add_argument("--positives", type=name_of(("auto", "self", "nn")), default="auto",
                   help="second view: of the image itself, or half the time of its nearest neighbour, mined each epoch "
                   "(auto: nn on cub200, self elsewhere)")  # fmt: skip
    g.add_argument("--pseudo_labels", type=name_of(("rim", "kmeans")), default="rim",
                   help="rim: argmax of the cluster head, as in the paper; kmeans: k-means over all training features "
                   "at the start of each epoch")  # fmt: skip
    g.add_argument("--kmeans_engine", type=name_of(("auto", "faiss", "torch")), default="auto",
                   help="of --pseudo_labels kmeans; auto: faiss where it is installed, else the project's "
                   "own")  # fmt: skip
    g.add_argument("--t", type=real(1e-6), default=0.1, help="temperature of the centre-based softmax")
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
    g.add_argument("--lr", type=real(0, above=True), default=0.001, help="learning rate of plain SGD, constant")
    g.add_argument("--batch_size", type=whole(1), default=64, help="m, images a batch; the network sees 2m views")
    g.add_argument("--n_epoch", type=whole(0), default=30, help="epochs; 0 scores and saves the untrained network")
    g.add_argument("--seed", type=whole(0, LARGEST_SEED), default=1024, help="of everything random")
    g = p.add_argument_group("evaluation")
    g.add_argument("--test_batch", type=whole(1), default=100, help="images a batch in evaluation and feature passes")
    g.add_argument("--interval", type=whole(1), default=1, help="evaluate every so many epochs (and after the last)")
    g = p.add_argument_group("run")
    g.add_argument("--model_name", type=folder_name, help="name of the run's folder (default: CBSwR_<DATASET>)")
    g.add_argument(
        "--checkpoint_dir", type=path_name, default="new_checkpoint", help="the folder that holds the runs' folders"
    )
    g.add_argument(
        "--log_dir", type=path_name, help="where <model_name>.log goes, all that is printed (default: the run's folder)"
    )
    g.add_argument("--config", type=path_name, metavar="FILE", help="JSON options; the command line stands above them")
    g.add_argument("--resume", type=path_name, metavar="RUN", help="continue a run: its folder or its last.pth")
    g.add_argument("--overwrite", action="store_true", help="start afresh where a finished or stopped run lies")
    g = p.add_argument_group("machine")
    g.add_argument("--device", type=name_of(("auto", "cpu", "cuda")), default="auto", help="auto: cuda if there is one")
    g.add_argument("--precision", type=name_of(("fp32", "bf16")), default="fp32",
                   help="bf16: the network in bfloat16; losses and distances stay float32")  # fmt: skip
    g.add_argument("--data_on", type=name_of(("auto", "device", "host")), default="auto",
                   help="device: the training images lie on the GPU and are cropped there; auto: if half of its free "
                   "memory holds them")  # fmt: skip
    return p


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Options from the command line, above those of --config or of the run that --resume continues."""
    parser = make_parser()
    args = parser.parse(argv)
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
        args = parser.parse(argv, parser.read_json(args.config), args.config)
        if args.resume:
            parser.error(f"{args.config}: resume belongs on the command line")
    if args.kmeans_engine != "auto" and args.pseudo_labels != "kmeans":
        parser.error(f"--kmeans_engine {args.kmeans_engine} goes with --pseudo_labels kmeans; leave it out")
    if args.model_name is None:
        args.model_name = f"CBSwR_{ {'cub200': 'CUB200', 'car196': 'Car196'}.get(args.dataset, args.dataset) }"
    return args


def main(argv: list[str] | None = None) -> int:
    """Wire the rooms together and run the epochs."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    share_cores()
    import torch

    from datasets import EpochPlan, ResidentLoader, TwoViewLoader, load_split
    from models import build_model
    from utils import runs
    from utils.devices import choose_device

    device = choose_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    training = load_split(args.data_dir, args.dataset, "training", args.image_size)
    validation = load_split(args.data_dir, args.dataset, "validation", training.image_size)
    check_sizes(args, training, validation)
    run = Path(args.checkpoint_dir) / args.model_name
    saved = load_run(run, device, len(training)) if args.resume else None
    held = [] if saved else files_to_overwrite(run, args.overwrite)
    check_folders(args, run)

    resident = to_device(training.images, device, args.data_on)
    torch.manual_seed(args.seed)
    weights = "none" if saved else args.weights
    model = build_model(args.backbone, args.n_cluster, args.low_dim, weights)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    rows, state = begin_or_continue(saved, model, optimizer)  # before anything is written: it may refuse

    run.mkdir(parents=True, exist_ok=True)
    for path in held:  # not before the new run is sure to start
        path.unlink()
    start_log(args, run)
    config = {key: value for key, value in vars(args).items() if key not in {"given", "resume", "config", "overwrite"}}
    runs.save_config(run, config)
    runs.save_metrics(run, rows)
    log.info("%s: %d training images, %d test images of %d classes, %d px; %s on %s in %s; run folder %s",
             args.dataset, len(training), len(validation), len(set(validation.labels.tolist())), training.image_size,
             args.backbone, device, args.precision, run)  # fmt: skip

    def save(epoch: int) -> None:
        content = {"model": model.state_dict(), "epoch": epoch, "optimizer": optimizer.state_dict(), "config": config,
                   "metrics": rows, **state, "rng": random_state(device)}  # fmt: skip
        if rows[-1].get("best"):  # first, so that a run stopped in between makes it again when it is resumed
            runs.save_checkpoint(run / runs.BEST, content)
            runs.link_checkpoint(run / runs.BEST, run / runs.LAST)
        else:
            runs.save_checkpoint(run / runs.LAST, content)
        runs.save_metrics(run, rows)

    if saved and state["epoch"] >= args.n_epoch:
        log.info("%s has its %d epochs already; give a larger --n_epoch to go on", run, state["epoch"])
    if args.n_epoch == 0 and not saved:
        rows.append({"epoch": 0, **evaluate(model, validation, args), "best": True})
        print_epoch(rows[-1])
        save(0)
    for epoch in range(state["epoch"] + 1, args.n_epoch + 1):
        started = time.perf_counter()
        positives, pseudo_labels, clustering = pseudo_label_images(model, training, args, epoch, state)
        features_done = time.perf_counter()
        plan = EpochPlan(len(training), args.batch_size, training.image_size, args.seed, epoch, positives)
        if resident is None:
            loader = TwoViewLoader(training.images, plan, args.workers)
        else:
            loader = ResidentLoader(resident, plan)
        losses = train_epoch(model, optimizer, loader, pseudo_labels, args, epoch)
        train_done = time.perf_counter()
        row = {"epoch": epoch, **losses, **clustering}
        if epoch % args.interval == 0 or epoch == args.n_epoch:
            row |= evaluate(model, validation, args)
            row["best"] = row["recall@1"] > max((r["recall@1"] for r in rows if "recall@1" in r), default=-1.0)
        done = time.perf_counter()
        row["seconds"] = {"features": features_done - started, "train": train_done - features_done,
                          "evaluate": done - train_done, "epoch": done - started}  # fmt: skip
        row["images_per_second"] = 2 * len(plan) * args.batch_size / row["seconds"]["train"]
        rows.append(row)
        state["epoch"] = epoch
        print_epoch(row)
        save(epoch)
    print_summary(rows, run)
    return 0


def check_sizes(args: argparse.Namespace, training, validation) -> None:
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
    if len(set(validation.labels.tolist())) < 2:
        raise UserError(f"{validation.path}: holds images of one class only; scores need at least two test classes")
    if args.batch_size > count:
        raise UserError(
            f"--batch_size {args.batch_size}: the training half of {args.dataset} holds {count} images only"
        )
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


def files_to_overwrite(run: Path, overwrite: bool) -> list[Path]:
    """The files of a run that lies in the folder `run` already. UserError if it has checkpoints, unless `overwrite`."""
    from utils import runs

    held = [run / name for name in (runs.LAST, runs.BEST, runs.METRICS, runs.CONFIG) if (run / name).exists()]
    for path in held:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, not the file of a run; choose another --model_name")
    if {run / runs.LAST, run / runs.BEST} & set(held) and not overwrite:
        raise UserError(f"{run}: holds a run already; continue it with --resume {run}, choose another --model_name, "
                        f"or start afresh with --overwrite")  # fmt: skip
    return held


def check_folders(args: argparse.Namespace, run: Path) -> None:
    """The places that a run writes to, before it makes any of them."""
    from utils.files import check_writable

    check_writable(run, "choose another --checkpoint_dir")
    if args.log_dir:
        check_writable(Path(args.log_dir), "choose another --log_dir")
    log_file = Path(args.log_dir or run) / f"{args.model_name}.log"
    if log_file.is_dir():
        raise UserError(f"{log_file}: is a folder, where the log is to be written; choose another --log_dir")


def load_run(run: Path, device, images: int) -> dict:
    """The content of a run's last.pth, of a training set of `images`. Raises UserError when there is none."""
    from models.weights import check_tensors, read_torch_file
    from utils import runs

    if not (run / runs.LAST).is_file():
        raise UserError(f"{run}: the run was stopped before its first epoch was done; start it again without --resume")
    saved = read_torch_file(run / runs.LAST, device)
    fault = runs.fault_in(saved, images)
    if fault:
        raise UserError(f"{run / runs.LAST}: not a checkpoint that training can continue from ({fault}); "
                        f"start the run again without --resume")  # fmt: skip
    check_tensors(saved["model"], run / runs.LAST)
    return saved


def begin_or_continue(saved: dict | None, model, optimizer) -> tuple[list[dict], dict]:
    """Rows of metrics so far and the loop's state; a saved run's weights, optimiser and generators are put back."""
    if saved is None:
        return [], {"epoch": 0, "pseudo_labels": None}
    import torch

    try:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"]["cpu"].cpu())
        if "cuda" in saved["rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["rng"]["cuda"].cpu())
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--resume: last.pth does not fit the run's config.json ({str(error).splitlines()[0]}); "
            f"start the run again without --resume"
        ) from None
    return saved["metrics"], {"epoch": saved["epoch"], "pseudo_labels": saved["pseudo_labels"]}


def random_state(device) -> dict:
    """The state of torch's generators (dropout draws from them); the rest is drawn from (seed, epoch)."""
    import torch

    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else state


def pseudo_label_images(model, training, args: argparse.Namespace, epoch: int, state: dict):
    """One feature pass for mining and clustering: positives (N,) or None, pseudo-labels (N,) or None, what to log."""
    mine = args.positives == "nn" or (args.positives == "auto" and args.dataset == "cub200")
    if not mine and args.pseudo_labels == "rim":
        return None, None, {}
    from datasets import center_crops
    from utils import clustering, metrics, search
    from utils.features import extract_features

    batches = progress(center_crops(training.images, args.test_batch, args.workers), len(training) / args.test_batch,
                       f"epoch {epoch}: features")  # fmt: skip
    pooled, _ = extract_features(model, batches, args.precision)
    pooled = pooled.to(next(model.parameters()).device)
    positives = search.nearest_neighbors(pooled, 1)[1][:, 0].cpu().numpy() if mine else None
    if args.pseudo_labels == "rim":
        return positives, None, {}
    engine = args.kmeans_engine
    if engine == "auto":
        engine = "faiss" if clustering.has_faiss() else "torch"
    try:
        labels, _, _ = clustering.kmeans(
            pooled, args.n_cluster, max_iter=KMEANS_ITERATIONS, seed=args.seed + epoch, engine=engine
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"epoch {epoch}: cannot cluster the training images: {error}") from None
    labels = labels.cpu()
    sizes = clustering.cluster_sizes(labels, args.n_cluster)
    logged = {"cluster_sizes": sizes.tolist(), "kmeans_engine": engine}
    if state["pseudo_labels"] is not None:
        logged["nmi_to_previous_clusters"] = metrics.nmi(labels, state["pseudo_labels"].cpu())
    state["pseudo_labels"] = labels
    return positives, labels, logged


def train_epoch(model, optimizer, loader, pseudo_labels, args: argparse.Namespace, epoch: int) -> dict[str, float]:
    """One epoch of SGD; the mean of each loss over its steps."""
    import torch

    from losses import cbswr_losses, total_loss
    from utils.features import network_autocast

    device = next(model.parameters()).device
    model.train()
    names = ("loss", "metric", "rim", "reconstruction")
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    bar = progress(loader, len(loader), f"epoch {epoch}: train")
    for views, images in bar:
        inputs = model.normalization(views.to(device, non_blocking=True))  # (2m, 3, H, W)
        labels = None if pseudo_labels is None else pseudo_labels[images].to(device)
        with network_autocast(device, args.precision):
            losses = cbswr_losses(model, inputs, labels, temperature=args.t, alpha=args.alpha, mu=args.mu,
                                  neg_m=args.neg_m, recon_target=args.recon_target)  # fmt: skip
        losses["loss"] = total_loss(losses, args.ml, args.rim, args.recon)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        optimizer.step()
        sums += torch.stack([losses[name].detach().double() for name in names])
    if not sums[0].isfinite():
        raise UserError(
            f"epoch {epoch}: the loss is no longer finite; start again with a lower --lr (it was {args.lr:g})"
        )
    means = (sums / max(len(loader), 1)).tolist()
    return {name if name == "loss" else f"{name}_loss": mean for name, mean in zip(names, means, strict=True)}


def evaluate(model, validation, args: argparse.Namespace) -> dict:
    """R@1/2/4/8 and NMI of the test half, by its embeddings (paper section 4)."""
    from datasets import center_crops
    from utils.evaluation import score
    from utils.features import extract_features

    batches = progress(center_crops(validation.images, args.test_batch, args.workers),
                       len(validation) / args.test_batch, "test features")  # fmt: skip
    _, embeddings = extract_features(model, batches, args.precision)
    return score(embeddings.to(next(model.parameters()).device), validation.labels)


def start_log(args: argparse.Namespace, run: Path) -> None:
    """Print to the terminal and append to the log file."""
    folder = Path(args.log_dir) if args.log_dir else run
    folder.mkdir(parents=True, exist_ok=True)
    log.setLevel(logging.INFO)
    log_file = logging.FileHandler(folder / f"{args.model_name}.log", encoding="utf-8", errors="backslashreplace")
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
    if "nmi_to_previous_clusters" in row:
        parts.append(f"NMI to the last clusters {100 * row['nmi_to_previous_clusters']:.1f}")
    if "recall@1" in row:
        parts.append(" ".join(f"R@{k} {100 * row[f'recall@{k}']:.2f}" for k in (1, 2, 4, 8)))
        parts.append(f"NMI {100 * row['nmi']:.2f}{' *' if row.get('best') else ''}")
    if "seconds" in row:
        parts.append(f"{row['seconds']['epoch']:.1f} s, {row['images_per_second']:.1f} images/s")
    log.info("  ".join(parts))


def print_summary(rows: list[dict], run: Path) -> None:
    """The last epoch and the best one, the latter marked as chosen on test."""
    scored = [row for row in rows if "recall@1" in row]
    if not scored:
        return
    best = max(scored, key=lambda row: row["recall@1"])  # the first of equals
    log.info("NMI by %s", scored[-1]["nmi_protocol"])
    for title, row, name in (("last epoch", scored[-1], "last.pth"), ("best epoch, CHOSEN ON TEST", best, "best.pth")):
        log.info("%s (%d): R@1 %.2f  NMI %.2f  %s", title, row["epoch"], 100 * row["recall@1"], 100 * row["nmi"],
                 os.path.join(run, name))  # fmt: skip


if __name__ == "__main__":
    run_script(main)
