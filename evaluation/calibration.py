"""Calibration: what quantizers want to know of the unquantized model, one pass over a text.

Second moments E[x^T x] of each site's inputs (the Hessian of GPTQ up to a factor), and of gradients
of labels sampled from the model: their squares by each weight E[g^2] (the diagonal of the Fisher
matrix), and its factors by inputs and outputs (K-FAC, arXiv 1503.05671, section 3.1). The matrices
of a whole model can be larger than the model, so sites are taken in parts of bounded memory, each
a pass of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.tap import Tap
from quantization.checkpoints import Checkpoint, load_model
from quantization.memory import return_memory
from quantization.statistics import Statistic, Statistics, output_blocks
from quantization.units import Site

PART_BYTES = 4 * 2**30


class SecondMoments:
    """Sums of x^T x by site and expert; sites that read the same tensor share one matrix."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.tokens: dict[tuple[str, int], int] = {}
        self._latest: tuple[Tensor, tuple[str, int]] | None = None

    def add(self, site: Site, expert: int, inputs: Tensor, outputs: Tensor | None = None) -> None:
        """Add a product's inputs (... x columns); its outputs don't matter."""
        key = site.name, expert
        x = inputs.reshape(-1, inputs.shape[-1])
        self.tokens[key] = self.tokens.get(key, 0) + len(x)
        if self._latest is not None and self._latest[0] is inputs:
            self.sums[key] = self.sums[self._latest[1]]  # q, k and v: counted with the first
            return
        x = x.float()
        if key not in self.sums:
            self.sums[key] = x.new_zeros(x.shape[1], x.shape[1])
        self.sums[key].addmm_(x.T, x)
        self._latest = inputs, key


def passes(wanted: Mapping[Statistic, Sequence[Site]], chunks: NDArray[np.int64]) -> int:
    """How many times `calibrating` will yield."""
    return len(chunks) * sum(len(list(_parts(sites, kind))) for kind, sites in wanted.items())


def calibrating(
    checkpoint: Checkpoint,
    wanted: Mapping[Statistic, Sequence[Site]],
    chunks: NDArray[np.int64],
    statistics: Statistics,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[None]:
    """Write the wanted statistics of some sites, from a text of chunks x tokens of ids.

    The passes compute in `dtype`; sums are float32. Yields after each pass of a chunk.
    """
    for kind, sites in wanted.items():
        model = load_model(checkpoint, dtype).to(device)
        for part in _parts(sites, kind):
            yield from COLLECT[kind](model, part, chunks, statistics)
        del model
        return_memory()


def _second_moments(
    model: Any, sites: Sequence[Site], chunks: NDArray[np.int64], statistics: Statistics
) -> Iterator[None]:
    moments = SecondMoments()
    within = {name for name, _ in model.base_model.named_parameters(model.base_model_prefix)}
    body = all(site.parameter in within for site in sites)
    forward = model.base_model if body else model  # a head's product costs the whole vocabulary
    with Tap(model, sites, moments.add):
        for ids in chunks:
            with torch.inference_mode():  # the caller isn't in it
                forward(input_ids=torch.from_numpy(ids)[None].to(model.device), use_cache=False)
            yield
    written: dict[int, Site] = {}
    for site in sites:
        shared = moments.sums.get((site.name, 0))
        if len(site.shape) == 2 and shared is not None:
            first = written.setdefault(id(shared), site)
            if first is not site:  # q, k and v: one file under three names
                statistics.share(site, first, "second-moment")
                continue
        experts = site.shape[0] if len(site.shape) == 3 else 1
        means = [
            moments.sums[site.name, e].cpu() / moments.tokens[site.name, e]
            if (site.name, e) in moments.sums
            else torch.zeros(site.shape[-1], site.shape[-1])  # no token came here
            for e in range(experts)
        ]
        second = torch.stack(means) if len(site.shape) == 3 else means[0]
        importance = second.diagonal(dim1=-2, dim2=-1).contiguous()
        tensors = {"second_moment": second, "importance": importance}
        statistics.save(site, "second-moment", tensors)


def _fisher(
    model: Any, sites: Sequence[Site], chunks: NDArray[np.int64], statistics: Statistics
) -> Iterator[None]:
    parameters = dict(model.named_parameters())
    sums = {site.parameter: torch.zeros(parameters[site.parameter].shape) for site in sites}
    for parameter in parameters.values():
        parameter.requires_grad_(False)

    def add(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.cpu(), None
        for total, part in zip(sums[name], gradient, strict=True):  # rows: no large temporaries
            total.addcmul_(part.float(), part.float())

    for name in sums:
        parameters[name].requires_grad_(True)
        parameters[name].register_post_accumulate_grad_hook(lambda p, name=name: add(name, p))
    for seed, ids in enumerate(chunks):
        backward_of_samples(model, ids, seed)
        yield
    for site in sites:
        fisher = sums[site.parameter] / chunks.size
        fisher = fisher.mT.contiguous() if site.transposed else fisher
        statistics.save(site, "fisher", {"fisher": fisher})
        parameters[site.parameter].requires_grad_(False)


class Curvature:
    """Sums of |g|^2 x^T x and g^T g by site and expert, g the gradient by a product's outputs.

    |g|^2 is the mean over the outputs; of g^T g blocks along the diagonal are kept.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.tokens: dict[tuple[str, int], int] = {}

    def watch(self, site: Site, expert: int, inputs: Tensor, outputs: Tensor) -> None:
        """Add a product once its outputs' gradient is known."""
        if outputs.requires_grad:
            x_TC = inputs.detach().reshape(-1, inputs.shape[-1])
            outputs.register_hook(lambda g: self._add((site.name, expert), x_TC, g))

    def _add(self, key: tuple[str, int], x_TC: Tensor, gradient: Tensor) -> None:
        g_TR = gradient.reshape(-1, gradient.shape[-1]).float()
        x_TC = x_TC.float()
        blocks, height = output_blocks(g_TR.shape[1])
        if key not in self.sums:
            columns = x_TC.shape[1]
            zeros = x_TC.new_zeros(columns, columns), x_TC.new_zeros(blocks, height, height)
            self.sums[key], self.tokens[key] = zeros, 0
        by_inputs, by_outputs = self.sums[key]
        self.tokens[key] += len(x_TC)
        by_inputs.addmm_((x_TC * g_TR.square().mean(1, keepdim=True)).T, x_TC)
        padded = torch.nn.functional.pad(g_TR, (0, blocks * height - g_TR.shape[1]))
        g_KTB = padded.unflatten(1, (blocks, height)).transpose(0, 1)
        by_outputs.baddbmm_(g_KTB.mT, g_KTB)


def _curvature(
    model: Any, sites: Sequence[Site], chunks: NDArray[np.int64], statistics: Statistics
) -> Iterator[None]:
    curvature = Curvature()
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()  # where the graph begins
    handle = embedding.register_forward_hook(lambda _m, _i, output: output.requires_grad_())
    try:
        with Tap(model, sites, curvature.watch):
            for seed, ids in enumerate(chunks):
                backward_of_samples(model, ids, seed)
                yield
    finally:
        handle.remove()
    for site in sites:
        experts = site.shape[0] if len(site.shape) == 3 else 1
        found = [_mean(curvature, site, e) for e in range(experts)]
        stacked = [
            torch.stack(of) if len(site.shape) == 3 else of[0] for of in zip(*found, strict=True)
        ]
        names = "input_curvature", "output_curvature"
        statistics.save(site, "curvature", dict(zip(names, stacked, strict=True)))


def _mean(curvature: Curvature, site: Site, expert: int) -> tuple[Tensor, Tensor]:
    """Of the tokens that came to an expert; zeros where none did."""
    key = site.name, expert
    if key in curvature.sums:
        by_inputs, by_outputs = (total.cpu() for total in curvature.sums.pop(key))
        return by_inputs.div_(curvature.tokens[key]), by_outputs.div_(curvature.tokens[key])
    rows, columns = site.shape[-2:]
    blocks, height = output_blocks(rows)
    return torch.zeros(columns, columns), torch.zeros(blocks, height, height)


COLLECT = {"second-moment": _second_moments, "fisher": _fisher, "curvature": _curvature}


def backward_of_samples(model: Any, ids: NDArray[np.int64], seed: int) -> None:
    """Back-propagate the summed log-likelihood of labels sampled from the model."""
    batch = torch.from_numpy(ids)[None].to(model.device)
    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.enable_grad():
        logits = model(input_ids=batch, use_cache=False).logits[0]
        with torch.no_grad():
            labels = sample_labels(logits.float().softmax(-1), generator)
        torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum").backward()


def sample_labels(p_TV: Tensor, generator: torch.Generator) -> Tensor:
    """A label for each of T distributions over V words, by the inverse of their sums.

    `torch.multinomial` draws a random number for each word: on a CPU half a forward pass's time.
    """
    sums_TV = p_TV.cumsum(-1)
    drawn_T1 = torch.rand(len(p_TV), 1, generator=generator, device=p_TV.device) * sums_TV[:, -1:]
    return torch.searchsorted(sums_TV, drawn_T1)[:, 0].clamp_(max=p_TV.shape[1] - 1)


def _parts(sites: Sequence[Site], kind: Statistic) -> Iterator[list[Site]]:
    """Runs of sites whose sums fit into `PART_BYTES`, one site at least."""
    part: list[Site] = []
    used = 0
    for site in sites:
        needed = 4 * _numbers(site, kind)
        if part and used + needed > PART_BYTES:
            yield part
            part, used = [], 0
        part.append(site)
        used += needed
    if part:
        yield part


def _numbers(site: Site, kind: Statistic) -> int:
    """What a site's sums hold."""
    if kind == "fisher":
        return site.numel
    *experts, rows, columns = site.shape
    inside = columns**2
    if kind == "curvature":
        blocks, height = output_blocks(rows)
        inside += blocks * height**2
    return inside * prod(experts)
