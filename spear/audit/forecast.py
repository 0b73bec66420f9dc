"""When a simulated attack is given up: at the rate at which it finds samples, its time would not do."""

import math

from spear.published.algorithm import Sampling
from spear.reconstruction import Progress

EARLIEST, LEAST = 1 / 8, 0.5  # share of its time, and seconds, before which nothing is foretold
FEWEST, NOTHING = 3, 1 / 4  # rounds that foretell; of any number, the share of its time in which none found anything
RECENT = 1 / 3  # share of the time so far whose rate is taken for that of the rest
HOPE = 1.5  # times that rate: every sample found confines the others


class Forecast:
    """What an attack of `time_limit` seconds is told after each round: to go on, or why it may as well end.

    The rate is that of the last third of the time so far, as if one sample more had been found, and then half as much
    again: some attacks find their first samples slowly, some their last. Each method is judged by its own rounds.
    Sampling finds at a rate by the logarithm of time, as its columns' chances differ by orders of magnitude.
    """

    def __init__(self, time_limit: float | int | None) -> None:
        self.time_limit, self.method = time_limit, ""
        self.rounds: list[tuple[float, int]] = []  # when a round ended, and what was found until then
        self.hopeless = False

    def __call__(self, progress: Progress) -> str | None:
        """The words that end the search, `None` to go on."""
        if self.method != progress.method:
            begun = self.rounds[-1][0] if self.rounds else 0.0
            self.method, self.rounds = progress.method, [(begun, 0)]
        self.rounds.append((progress.seconds, progress.found))
        if self.time_limit is None or not self._out_of_reach(progress):
            return None
        self.hopeless = True
        return f"the time limit of {self.time_limit:g} s was out of reach after {progress.seconds:.1f} s"

    def _out_of_reach(self, progress: Progress) -> bool:
        begun = self.rounds[0][0]
        spent, limit = progress.seconds - begun, self.time_limit - begun
        if not max(EARLIEST * limit, LEAST) <= spent < limit:
            return False
        if len(self.rounds) <= FEWEST and (progress.found or spent < NOTHING * limit):
            return False
        when, before = [entry for entry in self.rounds if entry[0] <= begun + (1 - RECENT) * spent][-1]
        since = max(when - begun, EARLIEST * spent)
        if progress.method == Sampling.name:
            times = math.log(limit / spent) / math.log(spent / since)
        else:
            times = (limit - spent) / (spent - when + begun)
        return progress.rank - progress.found > HOPE * times * (progress.found - before + 1)
