"""An audit as one HTML page with its pictures inside, and as JSON for machines."""

import base64
import io
import json
import math
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from matplotlib import pyplot as plt

from spear import inversion, plots
from spear.audit import simulation
from spear.audit.assessment import Audit, Risk
from spear.metrics import evaluation

SCHEMA = "spear.Audit/1"
SHOWN, LISTED = 32, 8  # pictures, and layers that were not attacked
COLOURS = {
    "stops this attack": "good",
    "not in the time given": "open",
    "only rounding hides it": "open",
    "blurs": "open",
    "does not stop it": "bad",
    "not attacked": "open",
}


def html(audit: Audit) -> str:
    """The audit as a page that needs no other file; whatever comes from the model or the update is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("spear.audit") / "report.html").read_text(encoding="utf-8"))
    return template.render(
        audit=audit,
        version=version("spear"),
        verdict=verdict(audit),
        certificate=certificate(audit),
        caption=_caption(audit),
        picture=_picture(audit),
        expected=_expected(audit),
        widest=max([1, *(reach.largest for reach in audit.reaches)]),
        colours=COLOURS,
        recognised=f"{simulation.RECOGNISED:g}",
    )


def to_json(audit: Audit) -> str:
    """The audit as JSON: every figure and word of it, no tensor. `schema` is "spear.Audit/1"."""
    content = {
        "schema": SCHEMA,
        "status": audit.status,
        "verdict": verdict(audit),
        "model": {"name": audit.model, "parameters": audit.parameters, "layers": [_layer(x) for x in audit.layers]},
        "attack": {
            "source": audit.source,
            "layer": audit.layer,
            "not_attacked": list(audit.not_attacked),
            "differences": int(audit.result.differences.sum()),
            "rank": audit.result.rank,
            "recovered": len(audit.result.inputs),
            "certified": int(audit.result.certified.sum()),
            "complete": audit.result.complete,
            "reason": audit.result.reason,
            "in_time": audit.in_time,
            "labels": None if audit.result.labels is None else audit.result.labels.tolist(),
            "targets": None if audit.result.targets is None else audit.result.targets.tolist(),
            "against_truth": None if audit.outcome is None else asdict(audit.outcome),
        },
        "statistics": list(audit.statistics),
        "sample": audit.sample,
        "count": audit.count,
        "largest_batch": [asdict(reach) for reach in audit.reaches],
        "defences": [asdict(tested) | {"verdict": tested.verdict} for tested in audit.defences],
        "time_limit": audit.time_limit,
        "trial_limit": audit.trial_limit,
        "seconds": round(audit.seconds, 1),
        "peak_memory_bytes": audit.memory,
    }
    return json.dumps(_finite(content), indent=2, allow_nan=False)


def verdict(audit: Audit) -> str:
    """One sentence: what came back."""
    found, certified = len(audit.result.inputs), int(audit.result.certified.sum())
    if not found:
        time = "" if audit.in_time else f" in the {audit.time_limit:g} s given: more time may find more"
        return f"Nothing was recovered from {audit.source} of {audit.count} samples{time}.{_untried(audit)}"
    whole = "the whole batch" if audit.result.complete else f"a batch of {audit.result.rank}"
    known = int(audit.result.differences.sum())
    more = f", and of {known} the difference from their mean" if known > certified else ""
    return f"{found} samples were recovered from {audit.source}, {whole}; {certified} of them are certified{more}."


def _untried(audit: Audit) -> str:
    """What of the model was not attacked, for the end of a verdict that nothing was recovered."""
    if not audit.not_attacked:
        return ""
    more = len(audit.not_attacked) - LISTED
    return f" Not attacked: {', '.join(audit.not_attacked[:LISTED])}{f' and {more} more' if more > 0 else ''}."


def certificate(audit: Audit) -> str:
    """In words, what makes the recovered samples certain."""
    certified, expected = audit.result.certified, audit.result.expected_error
    if not certified.any() and expected is not None:
        return f"none; an expected relative error of {float(expected.median()):.0e} (median), from the update alone"
    if not certified.any():
        return f"none: {audit.result.reason}" if len(certified) else "none"
    bound = float(audit.result.error_bound[certified].max())
    only = "as many as were disclosed, and the only ones that give the update with their activation patterns"
    only += " (behind curved activations: near them)"
    return f"{int(certified.sum())} samples, {only}; relative errors under {bound:.0e}"


def _layer(risk: Risk) -> dict[str, Any]:
    return asdict(risk) | {"gives_away": risk.gives_away}


def _caption(audit: Audit) -> str:
    what = f"What came out of layer {audit.layer}" if audit.layer else "Recovered samples"
    return f"{what}: {len(audit.result.inputs)}."


def _expected(audit: Audit) -> str:
    layers = [risk for risk in audit.layers if risk.limit and audit.layer in (None, risk.name)]
    sampled = max(layers, key=lambda risk: risk.from_data)
    if sampled.jointly:
        return f"SPEAR's sampling reads one layer alone, which {sampled.name} does not allow; all layers together do."
    budget = f"{inversion.AFFORDABLE:.0e} proposals"
    return f"SPEAR's expectation for independent draws: {budget} reach a batch of {sampled.sampling} at {sampled.name}."


def _picture(audit: Audit) -> str | None:
    """The recovered samples, above them the true ones where they are known, as a PNG in base64; None for no images."""
    shape = audit.picture
    if not len(audit.result.inputs) or len(shape) != 3 or shape[0] not in (1, 3):
        return None
    content, found = io.BytesIO(), audit.result.inputs
    if audit.truth is None:
        figure = plots.grid(found[:SHOWN].reshape(-1, *shape))
    else:
        truth = audit.truth[:SHOWN].reshape(-1, *shape)
        match = evaluation.evaluate(audit.result, audit.truth).match[:SHOWN]
        beside = torch.full_like(truth, math.nan)
        beside[match >= 0] = found[match[match >= 0]].reshape(-1, *shape).to(truth)
        figure = plots.grid({"sent": truth, "recovered": beside})
    figure.savefig(content, format="png", metadata={"Software": None})
    plt.close(figure)
    return base64.b64encode(content.getvalue()).decode()


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null in their place."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
