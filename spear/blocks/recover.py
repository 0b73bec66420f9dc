"""The attack on a block: from the server's view to its tokens, certified or not."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from spear.blocks.check import certificate
from spear.blocks.lengths import measured
from spear.blocks.search import Tokens, TokenSearch
from spear.blocks.view import BlockView
from spear.certificate import Certificate
from spear.reconstruction import Reconstruction, Terms

IDLE = 6  # rounds in a row that found nothing, after which there is no hope


@dataclass(frozen=True)
class FeedForward:
    """Two linear layers with an activation between, whatever is around them; it has no options."""

    name: ClassVar[str] = "block"


def recover(view: BlockView, terms: Terms) -> tuple[Reconstruction, Tokens]:
    """The tokens that enter a block, in no particular order, and what is known of each."""
    run = TokenSearch(view, terms.generator())
    run.until = terms.budget.until
    while run.missing and run.idle < IDLE and not terms.budget.spent(run.starts):
        run.round()
        terms.report(FeedForward.name, len(run.known), view.rank, run.starts)
    if run.missing:
        spent = terms.budget.spent(run.starts) or f"{run.idle} rounds in a row found nothing new"
        said = f"found {len(run.known)} of {view.rank} tokens that enter {view.name}; {spent}"
        return _result(view, run, terms, said), run.known
    run.known, lengths = measured(view, run.known)
    evidence = certificate(view, run.known, lengths, "")
    if evidence.holds:
        evidence = certificate(view, run.known, lengths, _others(view, run, terms))
    reason = f"all {view.rank} tokens that enter {view.name}: both gradients reproduced to {evidence.residual:.0e}"
    if not view.is_scaled and not lengths.doubt:
        reason = f"{reason}; their lengths by the normalisation before it, to {float(lengths.own.max()):.0e}"
    if not evidence.holds:
        reason = f"{reason}; not certified: {_why_not(view, evidence)}"
    return _result(view, run, terms, reason, evidence), run.known


def _others(view: BlockView, run: TokenSearch, terms: Terms) -> str:
    """What a round of starts from the whole gradients finds beside these tokens, in words."""
    probe = TokenSearch(view, run.generator)
    probe.until = terms.budget.latest
    others = probe.strangers(run.known)
    return f"{others} other tokens would fit the gradients as well" if others else ""


def _why_not(view: BlockView, evidence: Certificate) -> str:
    if view.disclosed is None and not evidence.doubt and bool(evidence.explained.all()):
        return "the number of tokens is not known"
    return evidence.why_not().replace("samples", "tokens")


def _result(
    view: BlockView, run: TokenSearch, terms: Terms, reason: str, evidence: Certificate | None = None
) -> Reconstruction:
    found = run.known
    inputs = view.tokens(found.extended)
    unknown = torch.full_like(found.sine, math.inf)
    return Reconstruction(
        inputs=inputs,
        labels=None,
        rank=view.rank,
        residuals=found.sine,
        certified=torch.zeros_like(found.sine).bool() if evidence is None else evidence.certified,
        complete=evidence is not None and evidence.holds,
        reason=reason,
        stats=terms.stats(run.starts, run.rounds),
        method=FeedForward.name,
        error_bound=unknown if evidence is None else evidence.error_bound,
        limit=view.accuracy.recovered,
        features_of="" if view.from_data else view.name,
    )
