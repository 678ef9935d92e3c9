"""A frozen model that images are inverted from.

Legend: B images, K classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import nn

from ..errors import DmmError, capped
from ..examples import Inputs, answer
from ..layout import place
from ..metadata import without_statistics
from ..norms import layers_that_run
from ..runtime import generator as random_stream
from ..runtime import mixed_precision
from ..spaces import Spec, example, noise, space_of
from .average import PoolStatistics
from .losses import Observation
from .soft import soften
from .statistics import LayerStatistics, NormLayer, StatisticsRecorder
from .thinconv import fold_stems


@dataclass(frozen=True)
class Witness:
    """The network of another teacher, and what was recorded there of this teacher's data.

    Attributes:
        model: on its device, frozen and in eval mode. layers: its normalisation layers, with the recorded statistics.
        statistics: the file.
    """

    model: nn.Module
    layers: list[NormLayer]
    statistics: str


@dataclass(frozen=True)
class Teacher:
    """One teacher, on its device, frozen and in eval mode.

    Attributes:
        layers: its normalisation layers whose statistics are known.
        statistics: the file they were recorded in; empty where they are running statistics.
        precision: that its forward and backward passes run in.
        witnesses: they see its images in turn.
        pool: the images of many steps, whose statistics are to match; None for those of each batch.
        prior: class prior (K,), zero outside its support; None until it is known.
        classes: names of the K classes, empty where its file does not tell them.
    """

    label: str
    sha256: str
    model: nn.Module
    layers: list[NormLayer]
    num_classes: int
    prior: torch.Tensor | None = None
    prior_from: str = ""
    statistics: str = ""
    precision: str = "float32"
    witnesses: tuple[Witness, ...] = ()
    pool: PoolStatistics | None = None
    classes: tuple[str, ...] = ()

    def observe(
        self, images: Inputs, targets: torch.Tensor, student: nn.Module | None = None, turn: int = 0
    ) -> Observation:
        """Forward images (B, C, H, W), or all inputs, and collect what the losses need; a witness for every turn."""
        with mixed_precision(images.device, self.precision):
            logits, layers = _measured(self.model, self.layers, images)
            answers = None if student is None else answer(student, images)
            elsewhere = None
            if self.witnesses:
                witness = self.witnesses[turn % len(self.witnesses)]
                _, elsewhere = _measured(witness.model, witness.layers, images)
        return Observation(images, logits, targets, self.pool(layers) if self.pool else layers, answers, elsewhere)

    def view(self, copies: dict[nn.Module, nn.Module] | None = None) -> Teacher:
        """The same weights in modules of their own, so that two threads can record statistics at once.

        Where its passes run in bfloat16, weights of products are converted once, not in every step.

        Args:
            copies: of models that are there already; new ones are added.
        """
        copies = {} if copies is None else copies
        model, layers = self._copied(self.model, self.layers, copies)
        witnesses = [Witness(*self._copied(w.model, w.layers, copies), w.statistics) for w in self.witnesses]
        return replace(self, model=model, layers=layers, witnesses=tuple(witnesses))

    def _copied(
        self, model: nn.Module, layers: list[NormLayer], copies: dict[nn.Module, nn.Module]
    ) -> tuple[nn.Module, list[NormLayer]]:
        names = {module: name for name, module in model.named_modules()}
        if model not in copies:
            tensors = [*model.parameters(), *model.buffers()]
            copies[model] = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
            if self.precision == "bfloat16":
                _convert(copies[model])
        return copies[model], [
            replace(layer, module=copies[model].get_submodule(names[layer.module])) for layer in layers
        ]

    @torch.no_grad()
    def logits(self, images: Inputs, batch: int = 512) -> torch.Tensor:
        """Logits, float32 (B, K)."""
        return torch.cat([answer(self.model, part).float() for part in images.split(batch)])


def freeze(model: nn.Module, spec: Spec, device: torch.device) -> nn.Module:
    """Eval mode, no gradients for weights (a third of the cost of a step), on its device, embeddings of soft tokens.

    On a GPU its BatchNorm layers measure their input as they normalise it.
    """
    model = soften(model).eval().requires_grad_(False)
    layout = place(model, device, example(spec, device))
    if device.type == "cpu":
        return fold_stems(model)
    if layout == torch.channels_last and find_spec("triton"):  # comes with torch for CUDA where it runs
        from .fusednorm import fuse_norms

        return fuse_norms(model, device)
    return model


def _measured(model: nn.Module, layers: list[NormLayer], images: Inputs) -> tuple[torch.Tensor, list[LayerStatistics]]:
    """Logits of images (B, C, H, W), or all inputs, and what the layers see of them."""
    with StatisticsRecorder(layers) as recorder:
        return answer(model, images), recorder.take()


def _convert(model: nn.Module) -> None:
    """Weights of plain products and convolutions in bfloat16; whoever shares them keeps them as they are.

    A layer whose weight is computed from other parameters, as by ``torch.nn.utils.weight_norm``, is not plain.
    """
    for module in model.modules():
        held = dict(module.named_parameters(recurse=False))
        if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) and held.keys() <= {"weight", "bias"}:
            for name, value in held.items():
                setattr(module, name, nn.Parameter(value.bfloat16(), requires_grad=False))


def random_example(spec: Spec, device: torch.device) -> Inputs:
    """Two examples of noise, as a teacher is shown them, (2, ...)."""
    return space_of(spec, device).draw(noise(spec, 2, random_stream(0, "answers")).to(device))


def require_use(label: str, teacher: Teacher, spec: Spec, device: torch.device) -> None:
    """Raise DmmError for a network that calls none of the layers with statistics, so that images could not be compared.

    It is asked as it will be seen, in a copy: a forward that is bound to the network copied calls that one's layers.
    """
    own = teacher.view()
    known = {layer.module for layer in own.layers}
    if known.isdisjoint(layers_that_run(own.model, random_example(spec, device)).values()):
        raise DmmError(
            f"{label} does not call the layers that its statistics belong to",
            evidence=capped(name for name, module in own.model.named_modules() if module in known),
            hint="let the forward of its class call them as modules, self.norm(x), not as functions",
        )


def require_statistics(label: str, layers: list[NormLayer], file: str = "") -> None:
    """Raise DmmError for a model without known statistics, or with ones that were never updated.

    Args:
        file: that some were recorded in.
    """
    if not layers:
        raise without_statistics(label)
    fresh = all(bool((layer.mean == 0).all() and (layer.variance == 1).all()) for layer in layers)
    if fresh:
        raise DmmError(
            f"the statistics of normalisation layers in {file or label} were never updated (all means 0, variances 1)",
            hint="record them again, with dmm record"
            if file
            else "save the checkpoint with its buffers: model.state_dict(), not model.parameters()",
        )
