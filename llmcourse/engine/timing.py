"""The three numbers of a request: time to first token, time per output token, throughput."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Timing:
    """When the tokens of one batch came, on the host's clock (seconds).

    prompt_tokens   tokens read before the first answer token, all sequences together
    batch           sequences decoded together
    stamps          the moment each step's tokens were known to the host
    """

    prompt_tokens: int
    batch: int = 1
    started: float = field(default_factory=time.perf_counter)
    stamps: list[float] = field(default_factory=list)
    tokens: int = 0

    def tick(self, tokens: int = 1) -> None:
        """One step gave `tokens` new tokens."""
        self.stamps.append(time.perf_counter())
        self.tokens += tokens

    @property
    def ttft(self) -> float:
        """Time to first token: from the request to the first token, seconds (prefill)."""
        return self.stamps[0] - self.started if self.stamps else float("nan")

    @property
    def tpot(self) -> float:
        """Time per output token after the first, seconds (decode); NaN for a single token."""
        steps = len(self.stamps) - 1
        return (self.stamps[-1] - self.stamps[0]) / steps if steps > 0 else float("nan")

    @property
    def seconds(self) -> float:
        """From the request to its last token."""
        return self.stamps[-1] - self.started if self.stamps else float("nan")

    @property
    def throughput(self) -> float:
        """Answer tokens per second of the whole batch, prefill included."""
        return self.tokens / self.seconds if self.stamps else float("nan")

    def __str__(self) -> str:
        return (
            f"{self.prompt_tokens} prompt tokens, {self.tokens} new: first after {self.ttft * 1e3:.0f} ms, "
            f"then {self.tpot * 1e3:.1f} ms a token; {self.throughput:.1f} tokens/s"
        )


def dollars_per_million_tokens(tokens_per_second: float, dollars_per_hour: float) -> float:
    """What a million tokens cost on a machine of that price that is kept busy at that rate."""
    return dollars_per_hour / 3600 / tokens_per_second * 1e6
