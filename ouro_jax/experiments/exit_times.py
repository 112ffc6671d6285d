"""What early exit saves in time: the engine decodes held-out prompts under a few rules."""

import dataclasses
import os
import statistics
import time
from collections.abc import Sequence

from ouro_jax.config import ModelConfig
from ouro_jax.errors import require
from ouro_jax.experiments.exits import flops_share
from ouro_jax.experiments.study import Progress, Prompts, Record, Records, Subject, prompts_key
from ouro_jax.inference.engine import Engine
from ouro_jax.inference.requests import Request

Turn = tuple[float, float]
"""Seconds per token, and the mean depth of the tokens."""
LEAST_SAVED = 0.02  # FLOPs; below, the share realised is noise


def run_exit_times(
    subject: Subject,
    prompts: Prompts,
    path: str | os.PathLike | None,
    rules: Sequence[str] = ("static:2", "q:0.5", "q:0.8", "lookahead:0.8"),
    tokens: int = 32,
    repeats: int = 3,
    progress: Progress | None = None,
) -> list[Record]:
    """A record `exit_time` that holds a row for all loops and for each rule.

    Every prompt has a slot of the engine, with the KV policy `exited`, under which a token that
    leaves is computed no further. Rows hold `mean_depth`, `ms_per_token`, `saved` (the share of
    the time of all loops), `flops_saved` (of its arithmetic), and `realised`, the one by the
    other (null where too little is saved). Rules take turns; figures are medians over `repeats`
    turns after one that is not counted.
    """
    require(len(prompts) > 0, "prompts", [], "at least one prompt")
    config = subject.config
    names = [f"static:{config.num_loops}", *(r for r in rules if r != f"static:{config.num_loops}")]
    key = {
        "kind": "exit_time", **subject.key, "rules": names, "tokens": tokens,
        "prompts": prompts_key(prompts),
    }  # fmt: skip

    def measure() -> Record:
        window = max(map(len, prompts)) + 3 * tokens
        engine = Engine(config, subject.params, kv="exited", slots=len(prompts), window=window)
        turns: dict[str, list[Turn]] = {name: [] for name in names}
        for _ in range(repeats + 1):
            for name in names:
                turns[name].append(timed_turn(engine, prompts, [name], tokens))
        counted = {name: turns[name][1:] for name in names}
        # A token attends to all before it, where the formula halves a row.
        length = 2 * (round(statistics.mean(map(len, prompts))) + tokens // 2)
        rows = [_row(config, length, name, counted[name], counted[names[0]]) for name in names]
        return {"slots": len(prompts), "rows": rows}

    return [Records(path, progress).once(key, measure)]


def timed_turn(engine: Engine, prompts: Prompts, rules: Sequence[str], tokens: int) -> Turn:
    """Seconds per token of an engine whose slots are all taken, and the mean depth of its tokens.

    Prompts have the rules in turns; `tokens` of each are timed, once all prompts have been read.
    The window has to hold three times as many.
    """
    requests = [
        Request(prompt, 3 * tokens, exit=rules[index % len(rules)])
        for index, prompt in enumerate(prompts)
    ]
    # One slot cannot be half of each: it takes them one after the other.
    groups = [requests] if len(requests) > 1 else [
        [dataclasses.replace(requests[0], exit=rule)] for rule in rules
    ]  # fmt: skip
    spans, depths = [], []
    for group in groups:
        ids = [engine.submit(request) for request in group]
        first: set[int] = set()
        while len(first) < len(ids):
            first |= {update.request_id for update in engine.step()}
        start, seen = time.perf_counter(), []
        while len(seen) < tokens * len(ids):
            seen += [update.token.depth for update in engine.step() if update.token]
        spans.append((time.perf_counter() - start) / len(seen))
        depths.append(statistics.mean(seen))
        for request_id in ids:
            engine.cancel(request_id)
    return statistics.mean(spans), statistics.mean(depths)


def _row(
    config: ModelConfig, length: int, rule: str, turns: Sequence[Turn], whole: Sequence[Turn]
) -> Record:
    """Medians over turns; what is saved is compared with the turn of all loops beside it."""
    depth = statistics.median(depth for _, depth in turns)
    saved = statistics.median(
        1 - seconds / base for (seconds, _), (base, _) in zip(turns, whole, strict=True)
    )
    heads = depth if rule.startswith("confidence") else 1.0
    flops_saved = 1 - flops_share(config, length, depth, heads)
    return {
        "rule": rule,
        "mean_depth": depth,
        "ms_per_token": 1e3 * statistics.median(seconds for seconds, _ in turns),
        "saved": saved,
        "flops_saved": flops_saved,
        "realised": saved / flops_saved if flops_saved >= LEAST_SAVED else None,
    }
