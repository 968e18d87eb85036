"""STML: self-taught metric learning (Kim et al., CVPR 2022), after its authors' published code."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses import contextual_similarity, relaxed_contrastive_loss, self_distillation_loss
from methods.base import Features, Method, add_group_option
from utils.options import real, whole


class STML(Method):
    """The relaxed contrastive loss of a student, by the contextual similarity of a teacher.

    The teacher is the moving average of the student: of its weights and of its batch norm
    statistics. With a large embedding beside the network's own (`distill_dim`), the teacher is
    asked for the large one, both are trained, and the network's own learns from the large one.
    """

    @staticmethod
    def add_options(group: argparse._ArgumentGroup) -> None:
        add_group_option(group, 5, "nearest neighbors")
        add = group.add_argument
        text = "of the teacher: 0 is the student itself, 1 what it was at first"
        add("--teacher_momentum", type=real(0, most=1), default=0.999, help=text)
        text = "size of the large embedding; 0: none"
        add("--distill_dim", type=whole(0, 65536), default=1024, metavar="D", help=text)
        text = "width of the pairwise similarity"
        add("--sigma", type=real(0, above=True), default=3.0, help=text)
        text = "nearest rows of a batch that are compared"
        add("--context", type=whole(1), default=10, help=text)

    def __init__(self, model: Any, options: argparse.Namespace, n_images: int, **kwargs) -> None:
        super().__init__(model, options, n_images, **kwargs)
        self.make_groups()
        self.large = None
        if options.distill_dim:
            self.large = nn.Linear(model.pooled_dim, options.distill_dim)
            self._begin(self.large)
            if options.head_init == "random":
                self._begin(model.feat_ext[0])
        self.teacher = copy.deepcopy(nn.ModuleDict(self._student())).requires_grad_(False)
        if self.large is not None:
            self._begin(self.teacher["large"])  # weights of its own

    @staticmethod
    def _begin(head: nn.Linear) -> None:
        nn.init.orthogonal_(head.weight)
        nn.init.zeros_(head.bias)

    def _student(self) -> dict[str, nn.Module]:
        parts = {"model": self.model}
        if self.large is not None:
            parts["large"] = self.large
        return parts

    def train(self, mode: bool = True) -> STML:
        """Set the mode of the student; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def begin_epoch(self, epoch: int, features: Features) -> dict:
        """Mine the neighbors of each image, by the student's large embedding if it has one."""
        if self.neighbors is not None:
            pooled, embeddings = features()
            if self.large is None:
                space = self.comparable(pooled, embeddings)
            else:
                with torch.no_grad():
                    space = self.large(pooled.to(self.device))
            self.neighbors.copy_(self.mine(space, self.neighbors.shape[1]))
        return {}

    def forward(self, views: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Compute the loss of a batch, then let the teacher follow.

        The teacher moves before the optimizer does, as in the authors' code.
        """
        with self.autocast():
            pooled = self._pool(self.model, views)
        images = self.processes.gather_views(index.repeat(2))
        with torch.no_grad():
            with self.autocast():
                seen = self._pool(self.teacher["model"], views)
            seen = self._embed(self.teacher, seen)
            similarity = contextual_similarity(
                seen, images, self.options.context, self.options.sigma
            )
            self._move_teacher(self.options.teacher_momentum)
        if self.large is None:
            return {"loss": relaxed_contrastive_loss(self.model.embed(pooled), similarity)}
        small = self.model.feat_ext(pooled)
        large = self.large(pooled)
        contrastive = relaxed_contrastive_loss(small, similarity)
        contrastive = (contrastive + relaxed_contrastive_loss(large, similarity)) / 2
        distillation = self_distillation_loss(small, large)
        loss = contrastive + distillation
        return {"loss": loss, "contrastive": contrastive, "distillation": distillation}

    def _pool(self, network: nn.Module, views: Tensor) -> Tensor:
        return self.processes.gather_views(network.pool(network.maps(views)))  # (2m, C)

    @staticmethod
    def _embed(parts: nn.ModuleDict, pooled: Tensor) -> Tensor:
        """Embed pooled features (B, C) by the large embedding, if there is one: unit length."""
        if "large" in parts:
            return F.normalize(parts["large"](pooled), dim=1)
        return parts["model"].embed(pooled)

    @torch.no_grad()
    def _move_teacher(self, momentum: float) -> None:
        """Move the teacher's weights and statistics towards the student's; copy the counters."""
        student = nn.ModuleDict(self._student()).state_dict()
        for name, value in self.teacher.state_dict().items():
            if value.is_floating_point():
                value.lerp_(student[name], 1 - momentum)
            else:
                value.copy_(student[name])

    def head_changed(self) -> None:
        """Take over the student's network as it is, unless the teacher has a head of its own."""
        if self.large is None:
            self.teacher["model"].load_state_dict(self.model.state_dict())
