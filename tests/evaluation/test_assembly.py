"""What an assembled model keeps on its device."""

import torch

from evaluation.assembly import AssembledModel
from quantization.adapter import describe
from quantization.bank import Bank
from quantization.quantizers import QUANTIZERS
from tests.conftest import choices_of


def test_a_bank_read_in_a_measurement_can_be_differentiated_through_later(llama):
    """A worker that goes on with a job may measure first and take gradients then."""
    layout = describe(llama)
    bank = Bank(llama, layout, QUANTIZERS["rtn"], torch.float32)
    bank.build(choices_of(layout))
    model = AssembledModel(bank, torch.device("cpu"))
    with torch.inference_mode():
        model.assign(None)
    hidden = torch.ones((1, 3), dtype=torch.long)
    embedded = model.module.get_input_embeddings()(hidden).detach().requires_grad_()
    model.module(inputs_embeds=embedded).logits.sum().backward()
    assert float(embedded.grad.abs().sum()) > 0


def test_weights_loaded_for_a_measurement_can_be_differentiated_through_later(make_bank):
    bank = make_bank("llama")
    elsewhere = torch.device("meta")  # a device that isn't the bank's, as an accelerator is
    model = AssembledModel(bank, elsewhere)
    with torch.inference_mode():
        model.assign(None)
    names = [site.parameter for unit in bank.layout.units for site in unit.stored]
    assert names
    for name in names:
        assert model.parameter(name).device == elsewhere
        assert not model.parameter(name).data.is_inference()
