"""What `spear audit` found, as words and tables on the screen."""

from rich.markup import escape
from rich.table import Table

from spear.audit import report
from spear.audit.assessment import Audit
from spear.audit.protection import Tested
from spear.cli.shared import console, printable


def show(audit: Audit) -> None:
    """Print the verdict, and a table each of layers, methods and defences."""
    print(printable(report.verdict(audit)))
    print(printable(f"certificate: {report.certificate(audit)}"))
    print(printable(f"the attack ended: {audit.result.reason}"))
    print(f"{audit.seconds:.0f} s, at most {audit.memory / 2**30:.1f} GiB; attacks below: {audit.trial_limit:g} s each")
    layers = [(x.name, f"{x.width}", x.gives_away, f"{x.limit or '-'}") for x in audit.layers]
    _table(("linear layer", "width", "its gradient gives away", "batches up to"), layers)
    for words in audit.statistics:
        print(printable(f"buffers of batch normalisation, where clients send them: {words}"))
    reaches = [(r.method, f"{r.largest}", f"{r.failed}: {r.reason}" if r.failed else "-") for r in audit.reaches]
    _table(("method", "largest batch", "what ended it"), reaches)
    defences = [(t.name, _counts(t), t.verdict) for t in audit.defences]
    _table(("defence", "exact, recognisable", "verdict"), defences)


def _counts(tested: Tested) -> str:
    found = tested.outcome
    return "-" if found is None else f"{found.exact}, {found.recognised} of {found.sent}"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(*columns)
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    console.print(table)
