"""Modality dropout: in training, patients lack some of their modalities now and then.

A model that has seen all modalities of nearly every patient does not predict well without one.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler

from .patients import PatientBatch, Patients

Draw = tuple[int, tuple[str, ...]]
"""Row of a patient, and the names of the modalities that are dropped."""


class ModalityDropout(DistributedSampler):
    """Yields the rows of an epoch in random order, each with the modalities that are dropped.

    Every modality of a patient is dropped with the same probability; if that would leave none, one
    of them stays. The draws depend on the seed and the epoch only.

    Args:
        patients: the training part.
        rate: the probability.
        processes: number of processes, which share the rows.
        rank: of this process.
        seed: of the order and of the draws.
    """

    def __init__(
        self, patients: Patients, rate: float, processes: int, rank: int, *, seed: int
    ) -> None:
        super().__init__(patients, processes, rank, shuffle=True, seed=seed)
        self._names, self._held, self._rate = patients.modalities, patients.held(), rate

    def __iter__(self) -> Iterator[Any]:
        dropped = self._draw()
        for row in super().__iter__():
            yield (
                row,
                tuple(
                    name
                    for name, drop in zip(self._names, dropped[row].tolist(), strict=True)
                    if drop
                ),
            )

    def _draw(self) -> torch.Tensor:
        """Return bool [n, M], the modalities that are dropped in this epoch."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        chance = torch.rand(self._held.shape, generator=generator)
        # The modality with the largest number stays, so that one is left.
        stays = chance.masked_fill(~self._held, -1).argmax(1)
        dropped = self._held & (chance < self._rate)
        dropped[torch.arange(len(dropped)), stays] = False
        return dropped


class WithDroppedModalities(Dataset):
    """Patients, batches of which are asked for by the draws of `ModalityDropout`."""

    def __init__(self, patients: Patients) -> None:
        self.patients = patients

    def __len__(self) -> int:
        return len(self.patients)

    def __getitems__(self, draws: Sequence[Draw]) -> PatientBatch:
        rows, dropped = zip(*draws, strict=True)
        return self.patients.batch(rows, dropped)
