"""What is left of the attack behind defences, by simulation."""

import copy
from dataclasses import replace

import pytest
import torch
from audited import CLASSES, SHAPE
from torch import nn

from spear import federated, inversion, reconstruction
from spear.audit import assessment, protection, simulation
from spear.audit.sample import choose


def test_defences(simulated: assessment.Audit) -> None:
    tested = {entry.name: entry for entry in simulated.defences}
    assert tested["none"].verdict == "does not stop it"
    assert tested["none"].outcome.exact == 4
    assert tested["DP-SGD"].verdict in ("stops this attack", "not in the time given")
    for entry in simulated.defences:
        assert (entry.outcome is None) == (entry.verdict == "not attacked") == bool(entry.reason)
        assert entry.advice
        if entry.outcome:
            assert 0 <= entry.outcome.exact <= entry.outcome.recognised <= entry.outcome.sent == 4


def test_what_only_rounding_hides_is_no_protection(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = choose("digits", SHAPE, CLASSES, most=4)
    single = replace(sample, inputs=sample.inputs.float())

    def attack(now: nn.Module, update: federated.SharedUpdate, **options) -> reconstruction.Reconstruction:
        result = whole(now, update, **options)
        if next(now.parameters()).dtype == torch.float64:
            return result
        held = {name: value for name, value in vars(result).items() if isinstance(value, torch.Tensor)}
        nothing = {name: value[:0] for name, value in held.items()}
        return replace(result, **nothing, complete=False)

    whole = inversion.attack
    monkeypatch.setattr(inversion, "attack", attack)
    options = simulation.Options(time_limit=20)
    everyone = choose("digits", SHAPE, CLASSES, most=40)
    others = replace(everyone, inputs=everyone.inputs.float())
    trials = protection.trials(copy.deepcopy(model).float(), single, 4, others=others, options=options)
    tested = [trial() for trial in trials.values()]
    assert {t.name for t in tested if t.verdict == "only rounding hides it"} == {"local training"}
