"""Counters of the server in Prometheus' text format, version 0.0.4."""

import bisect
from collections import Counter, defaultdict
from collections.abc import Mapping

# Upper bounds in seconds: from a fast chip's token to a long prompt on a slow machine.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
HELP = {
    "ouro_http_requests_total": "HTTP requests answered, by route and status.",
    "ouro_prompt_tokens_total": "Tokens of accepted prompts.",
    "ouro_generated_tokens_total": "New tokens, by the depth that gave them.",
    "ouro_answers_total": "Answers ended, by reason: stop, length, cancelled, failed.",
    "ouro_first_token_seconds": "From a request to the first token of each answer.",
    "ouro_token_seconds": "Between two tokens of an answer.",
    "ouro_slots": "Slots there are, by KV policy.",
    "ouro_slots_live": "Slots in use, by KV policy.",
    "ouro_answers_open": "Answers accepted and not ended, by KV policy.",
}
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counts and histograms; used from the event loop's thread alone."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[Labels]] = defaultdict(Counter)
        self._times: dict[str, list[int]] = {}
        self._sums: dict[str, float] = defaultdict(float)

    def count(self, name: str, amount: int = 1, **labels: object) -> None:
        """Adds to the counter `name` with these labels."""
        self._counts[name][tuple((key, str(value)) for key, value in labels.items())] += amount

    def observe(self, name: str, seconds: float) -> None:
        """Adds a duration to the histogram `name`."""
        buckets = self._times.setdefault(name, [0] * (len(BOUNDS) + 1))
        buckets[bisect.bisect_left(BOUNDS, seconds)] += 1
        self._sums[name] += seconds

    def text(self, gauges: Mapping[str, Mapping[str, float]]) -> str:
        """The page; `gauges` are the values of now, by name and KV policy."""
        lines = []
        for name, counter in sorted(self._counts.items()):
            lines += [f"# HELP {name} {HELP[name]}", f"# TYPE {name} counter"]
            lines += [f"{name}{_labels(labels)} {value}" for labels, value in counter.items()]
        for name, buckets in sorted(self._times.items()):
            lines += [f"# HELP {name} {HELP[name]}", f"# TYPE {name} histogram"]
            total = 0
            for bound, number in zip((*BOUNDS, "+Inf"), buckets, strict=True):
                total += number
                lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
            lines += [f"{name}_sum {self._sums[name]:.6f}", f"{name}_count {total}"]
        for name, values in gauges.items():
            lines += [f"# HELP {name} {HELP[name]}", f"# TYPE {name} gauge"]
            lines += [f'{name}{{kv="{kv}"}} {value}' for kv, value in values.items()]
        return "\n".join(lines) + "\n"


def _labels(labels: Labels) -> str:
    inside = ",".join(f'{key}="{value}"' for key, value in labels)
    return f"{{{inside}}}" if inside else ""
