"""Audits that several tests look at."""

from dataclasses import replace

import pytest
import torch
from audited import CLASSES, QUICK, SHAPE, WIDTH
from torch import nn

from spear import federated, models
from spear.audit import assessment
from spear.audit.sample import choose


@pytest.fixture(scope="session")
def model() -> nn.Sequential:
    return models.fcnn(SHAPE, WIDTH, 3, CLASSES, seed=0)


@pytest.fixture(scope="session")
def simulated(model: nn.Module) -> assessment.Audit:
    return assessment.audit(model, count=4, **QUICK)


@pytest.fixture(scope="session")
def attacked(model: nn.Module) -> tuple[assessment.Audit, torch.Tensor, torch.Tensor]:
    inputs, labels = choose("digits", SHAPE, CLASSES, most=5, seed=7).take(5)
    update = replace(federated.gradient(model, inputs, labels), count=None)
    return assessment.audit(model, update, name="<b>mine</b>", **QUICK), inputs, labels
