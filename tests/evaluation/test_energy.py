"""Energy is what the driver's counter rose by."""

import torch

from paredown.evaluation import energy
from paredown.evaluation.decoding import Decoding
from paredown.evaluation.energy import EnergyMeter, joules_per_token


def test_energy_is_what_the_counter_rose_by_for_each_token(llama, monkeypatch):
    class Counter:
        spent = 0

        def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # millijoules
            self.spent += 48_000
            return self.spent

    monkeypatch.setattr(energy, "ENERGY_SECONDS", 1e-9)  # one pass
    run = Decoding(llama, torch.zeros(2, 24, dtype=torch.long), 16)
    assert joules_per_token(run, EnergyMeter(Counter(), None)) == 48 / (8 * 2)
    assert joules_per_token(run, None) is None
    assert EnergyMeter.of(torch.device("cpu")) is None
