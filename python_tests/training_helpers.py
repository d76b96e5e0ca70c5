"""A small cohort in memory, a model for it and a short training."""

import motet
import numpy as np
import pandas as pd
import torch
from motet.fusion.objectives import DiscreteSurvival
from motet.fusion.patients import Patients, modalities_of
from motet.fusion.preprocessing import fit_scaling
from motet.fusion.training import History, Training, train

IDS = [f"p{i}" for i in range(130)]
TRAIN, VALIDATION = IDS[:90], IDS[90:]


class Labs:
    """Bags of 1 to 6 tokens for most patients."""

    features, coords, extent, names = 3, 1, 48.0, None

    def __init__(self) -> None:
        generator = np.random.default_rng(1)
        self.bags = {
            patient: generator.normal(size=(generator.integers(1, 7), 3)).astype(np.float32)
            for patient in IDS[::2] + IDS[1::4]
        }
        self.reads = 0

    def __contains__(self, patient: object) -> bool:
        return patient in self.bags

    def __getitem__(self, patient: str) -> tuple[np.ndarray, np.ndarray]:
        self.reads += 1
        x = self.bags[patient]
        return x, np.arange(len(x), dtype=np.float32)[:, None]


def omic() -> pd.DataFrame:
    table = pd.DataFrame(
        np.random.default_rng(0).normal(size=(len(IDS), 6)), index=IDS, columns=list("abcdef")
    )
    table.iloc[3] = np.nan
    return table


MODALITIES = {"omic": omic(), "labs": Labs()}
TIMES = np.random.default_rng(2).exponential(np.exp(-omic()["a"].fillna(0))) + 0.01
EVENTS = np.random.default_rng(3).random(len(IDS)) < 0.7
SCALING = fit_scaling(MODALITIES, TRAIN)
NLL = DiscreteSurvival.fit(TIMES[:90], EVENTS[:90], bins=4, alpha=0.4, weighted=True)


def parts(objective=NLL, *outcome: np.ndarray) -> tuple[Patients, Patients]:
    outcome = outcome or (TIMES, EVENTS)
    every = Patients.of(MODALITIES, SCALING, IDS, objective.target(*outcome))
    return every.select(torch.arange(90)), every.select(torch.arange(90, 130))


def model_of(out_features: int = 4, seed: int = 0) -> motet.HEALNet:
    torch.manual_seed(seed)
    return motet.HEALNet(
        modalities_of(SCALING), out_features=out_features, num_latents=4, latent_dim=8, heads=1,
        head_dim=8, ff_dropout=0.2,
    )  # fmt: skip


def run(model, objective=NLL, data=None, **options) -> History:
    where = {k: options.pop(k) for k in ("resume", "each_epoch") if k in options}
    settings = Training(**{"epochs": 8, "max_lr": 0.01, "batch_size": 32, **options})
    return train(model, objective, *(data or parts()), settings, **where)
