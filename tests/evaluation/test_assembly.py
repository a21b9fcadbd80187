"""What an assembled model keeps on its device."""

import torch

from evaluation.assembly import AssembledModel


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
