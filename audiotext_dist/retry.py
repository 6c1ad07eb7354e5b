"""How long to go on asking a server that refuses, stalls or hangs up."""

from __future__ import annotations

import random
from dataclasses import dataclass

MAX_PAUSE_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class RetryConfig:
    """What is done about a server in trouble.

    retries: attempts after the first one, counted anew whenever a body gets further than before. stall_seconds: a
    server that sends no byte for so long is given up, and asked again. first_pause_seconds: before the first retry.
    """

    retries: int = 8
    stall_seconds: float = 20.0
    first_pause_seconds: float = 0.5

    def pause_seconds(self, num_failures: int) -> float:
        """The pause after so many failures in a row, 1 or more: doubled each time, cut at random by up to a half.

        Without the random part all workers of a cluster would come back at the same moment.
        """
        longest = min(self.first_pause_seconds * 2.0 ** min(num_failures - 1, 60), MAX_PAUSE_SECONDS)
        return longest * random.uniform(0.5, 1.0)
