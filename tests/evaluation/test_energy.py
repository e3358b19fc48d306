"""Energy is what the driver's counter rose by."""

import torch

from paredown.evaluation.decoding import Decoding
from paredown.evaluation.energy import EnergyMeter, joules_per_token


def test_energy_is_what_the_counter_rose_by_for_each_token(llama):
    class Counter:
        spent = 0

        def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # millijoules
            self.spent += 48_000
            return self.spent

    run = Decoding(llama, torch.zeros(2, 24, dtype=torch.long), 16)
    assert joules_per_token(run, EnergyMeter(Counter(), None), least_seconds=0) == 48 / (8 * 2)
    assert joules_per_token(run, None) is None
    assert EnergyMeter.of(torch.device("cpu")) is None
