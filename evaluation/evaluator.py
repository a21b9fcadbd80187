"""The evaluator: one candidate on one chunk of text, against the unquantized model."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from evaluation.assembly import AssembledModel
from evaluation.divergence import Head, Loss, divergence, divergence_with_gradient
from evaluation.passes import Passes
from quantization.bank import Bank
from quantization.cache import cache_dir, write_whole
from quantization.errors import MeasurementError
from quantization.originals import Originals
from quantization.schemes import Scheme

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Measurement:
    """What measuring a candidate on a chunk gives: sums in nats, and the seconds it took."""

    kl_sum: float
    nll_sum: float
    tokens: int
    seconds: float


class Evaluator:
    """Measures candidates on one model replica.

    The reference's final hidden states are kept in the cache, one small file a chunk (tokens x
    width, not tokens x vocabulary); logits are rebuilt from them block by block.
    """

    def __init__(self, bank: Bank, device: torch.device) -> None:
        self.bank = bank
        self.model = AssembledModel(bank, device)
        self.model.assign(None)
        self.head = Head(self.model.module)
        identity = f"{bank.checkpoint.weights_hash}|{bank.dtype}|{device.type}"
        name = hashlib.sha256(identity.encode()).hexdigest()[:32]
        self._folder = cache_dir() / "references" / name
        self._states: dict[str, Tensor] = {}

    def measure(self, schemes: Sequence[Scheme | None] | None, ids: Ids) -> Measurement:
        """KL from the reference and negative log-likelihood of a candidate on a chunk.

        Args:
            schemes: one for each unit of the layout; None for the reference, of a unit or of all.
            ids: token ids of the chunk; every token after the first is predicted.

        Raises:
            MeasurementError: NaN or infinity in the logits, of the candidate or the reference.
        """
        p_TH = self.reference(ids)
        start = time.perf_counter()
        self.model.assign(schemes)
        q_TH = p_TH if schemes is None else self.hidden(self.model.module, ids)
        found = self.loss(p_TH, q_TH, ids, "the unquantized model" if schemes is None else None)
        return replace(found, seconds=time.perf_counter() - start)

    def loss(self, p_TH: Tensor, q_TH: Tensor, ids: Ids, whose: str | None = None) -> Measurement:
        """What final hidden states `q_TH` of the assigned map make; without seconds.

        Raises:
            MeasurementError: NaN or infinity in the logits (of `whose`, a candidate's by default).
        """
        return self._checked(self.compare(p_TH, q_TH, ids, self.head.assigned_weight), whose)

    def loss_with_gradient(
        self, p_TH: Tensor, q_TH: Tensor, ids: Ids
    ) -> tuple[Measurement, Tensor | None]:
        """`loss`, and its KL's gradient by `q_TH`; None where the head is not linear.

        Raises:
            MeasurementError: NaN or infinity in the logits.
        """
        head = self.head
        if head.scale is None:
            return self.loss(p_TH, q_TH, ids), None
        targets = torch.from_numpy(ids[1:]).to(self.model.device)
        loss, gradient = divergence_with_gradient(
            head, p_TH[:-1], q_TH[:-1], targets, head.assigned_weight
        )
        nothing = torch.zeros_like(gradient[:1])  # the last token predicts nothing
        return self._checked(loss), torch.cat([gradient, nothing])

    def _checked(self, loss: Loss, whose: str | None = None) -> Measurement:
        if not np.isfinite([loss.kl_sum, loss.nll_sum]).all():
            raise MeasurementError(
                f"NaN or infinity in the logits of {whose or 'a candidate'} in "
                f"{_name(self.bank.dtype)}; try --dtype float32"
            )
        return Measurement(loss.kl_sum, loss.nll_sum, loss.tokens, 0.0)

    def compare(self, p_TH: Tensor, q_TH: Tensor, ids: Ids, q_weight: Tensor) -> Loss:
        """The loss of final hidden states `q_TH` (and a head) on a chunk."""
        targets = torch.from_numpy(ids[1:]).to(self.model.device)
        return divergence(self.head, p_TH[:-1], q_TH[:-1], targets, q_weight)

    def reference(self, ids: Ids) -> Tensor:
        """Final hidden states of the unquantized model on a chunk (tokens x width)."""
        key = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
        if key not in self._states:
            path = self._folder / f"{key}.safetensors"
            if not path.exists():
                self.model.assign(None)
                states = self.hidden(self.model.module, ids)
                if not bool(states.isfinite().all()):
                    raise MeasurementError(
                        "NaN or infinity in the unquantized model's hidden states in "
                        f"{_name(self.bank.dtype)}; try --dtype float32, or check the checkpoint"
                    )
                write_whole(path, partial(save_file, {"hidden": states.cpu().contiguous()}))
            self._states[key] = load_file(path)["hidden"].to(self.model.device)
        return self._states[key]

    @torch.inference_mode()
    def reference_logits(self, ids: Ids) -> Tensor:
        """Logits of the unquantized model on a chunk, tokens x vocabulary in float32 on the CPU."""
        return self.head.logits(self.reference(ids), self.head.weight).float().cpu()

    @torch.inference_mode()
    def logits(self, schemes: Sequence[Scheme | None], ids: Ids) -> Tensor:
        """Logits of a candidate, tokens x vocabulary in float32 on the CPU."""
        self.model.assign(schemes)
        q_TH = self.hidden(self.model.module, ids)
        return self.head.logits(q_TH, self.head.assigned_weight).float().cpu()

    def noise_floor(self, ids: Ids) -> float | None:
        """KL in nats per token between float32 and this arithmetic type on a chunk.

        Differences between candidates below it are not differences of the candidates. None in
        float32, whose own floor is far below anything that is shown.
        """
        if self.bank.dtype == torch.float32:
            return None
        exact = AssembledModel(Originals(self.bank), self.model.device)
        p_TH, q_TH = self._exact_hidden(exact, ids), self.reference(ids).float()
        targets = torch.from_numpy(ids[1:]).to(self.model.device)
        loss = divergence(Head(exact.module), p_TH[:-1], q_TH[:-1], targets)
        return loss.kl_sum / loss.tokens

    def _exact_hidden(self, exact: AssembledModel, ids: Ids) -> Tensor:
        """Final hidden states in float32, a block at a time.

        The whole model at once where it can't be cut, or isn't stored as it is computed with
        (`open_weights`).
        """
        exact.block_outputs = self.model.block_outputs
        try:
            passes = Passes(exact, ids[None])
        except MeasurementError:
            exact.assign(None)
            return self.hidden(exact.module, ids)
        passes.forward(keep=False)
        with torch.inference_mode():
            return passes.blocks.finish(passes.ids[0], passes.states[-1][0])

    def hidden(self, module: Any, ids: Ids) -> Tensor:
        """Final hidden states (tokens x width) of any model of this architecture on a chunk."""
        with torch.inference_mode():
            batch = torch.from_numpy(ids)[None].to(self.model.device)
            states: Tensor = module.base_model(input_ids=batch, use_cache=False).last_hidden_state
            return states[0]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
