"""Workdirs of runs that never were: one short and calm, one of weeks with all that may happen."""

import json
import random
from pathlib import Path

from ouro_jax.training.timing import PARTS

STAGES = ("stable_1a", "stable_1b", "anneal", "long", "mid")
MODEL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_layers": 2,
    "num_heads": 2, "num_kv_heads": 2, "head_dim": 32, "num_loops": 2, "rope_theta": 10_000.0,
}  # fmt: skip
LONG_STAGES = (70_000, 55_000, 16_000, 1_500, 4_000)
BROKEN = "array params/head does not match its checksum"
BATCH = 1024
BEGAN = 1_767_225_600.0  # 2026-01-01


class SyntheticRun:
    """Trains in no time. `lasts` is the number of steps of each stage, `save` those between saves.

    `counts` says how often each kind of event was written, "kill" the attempts without a farewell.
    """

    def __init__(self, lasts: tuple[int, ...], seconds: float, window: int, save: int):
        self.ends = [sum(lasts[: place + 1]) for place in range(len(lasts))]
        self.seconds, self.window, self.save = seconds, window, save
        self.now, self.step, self.saved, self.stage = BEGAN, 0, 0, ""
        self.files = {"metrics": [], "times": [], "events": []}
        self.counts = {}

    def event(self, kind, **fields):
        """Writes an event, as of now."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.files["events"].append({"kind": kind, **self.where(), **fields})

    def where(self):
        """Fields of every line."""
        tokens = self.step * BATCH * 4096
        return {"time": self.now, "stage": self.stage, "step": self.step, "tokens": tokens}

    def begin(self, scale=1.0):
        """A process starts, restores and compiles."""
        self.step = self.saved
        self._enter()
        seconds = {"data": 20 * scale, "verify": 9 * scale, "restore": 75 * scale}
        self.now += sum(seconds.values())
        self.event("start", processes=4, devices=16, device_kind="TPU v5e", versions={},
                   seconds=seconds)  # fmt: skip
        self.files["times"].append({"kind": "attempt", **self.where()})
        self._enter(say=True)
        self._spend(compile=95 * scale, step=self.seconds)
        seconds = seconds | {"join": 4 * scale, "compile": 95 * scale, "step": self.seconds}
        self.event("first_step", seconds=seconds)

    def train(self, steps):
        """Goes on for so many steps, less where the run ends."""
        for _ in range(steps // self.window):
            if self.step >= self.ends[-1]:
                return
            self.step += self.window
            stalled = self.step % self.save == 0
            self._spend(step=self.window * self.seconds, data=0.02 * self.window * self.seconds,
                        checkpoint=2.5 * stalled)  # fmt: skip
            if stalled:
                self.saved = self.step
                permanent = self.step % (12 * self.save) == 0
                self.event("checkpoint", permanent=permanent, stall_seconds=2.5)
            self._enter(say=True)

    def write(self, workdir: Path) -> Path:
        """Writes the files of the workdir, and returns it."""
        for name, lines in self.files.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (workdir / f"{name}.jsonl").write_text(text)
        return workdir

    def _enter(self, say=False):
        number = next((n for n, end in enumerate(self.ends) if self.step < end), len(self.ends) - 1)
        if say and STAGES[number] not in {line["stage"] for line in self.files["metrics"]}:
            self.stage = STAGES[number]
            self.event("stage_start")
            self.files["metrics"].append(
                {"kind": "event", "event": "stage_start", "model": MODEL, **self.where()}
            )
        self.stage = STAGES[number]

    def _spend(self, **seconds):
        self.now += sum(seconds.values())
        parts = dict.fromkeys(PARTS, 0.0) | seconds
        self.files["times"].append(
            {"kind": "window", **self.where(), "steps": self.window, "seconds": parts}
        )


def short_run() -> SyntheticRun:
    """One attempt of two minutes, without trouble."""
    run = SyntheticRun((400, 200), seconds=0.15, window=10, save=100)
    run.begin(scale=0.1)
    run.train(600)
    run.event("stage_end")
    run.event("finished")
    return run


def long_run(num_attempts: int = 40) -> SyntheticRun:
    """Two months, with every kind of event."""
    run, chance = (
        SyntheticRun((70_000, 55_000, 16_000, 1_500, 4_000), 30.0, 100, 200),
        random.Random(1),
    )
    for attempt in range(num_attempts):
        if attempt % 13 == 12:
            path = f"{run.stage}/{run.saved}.broken"
            run.event("set_aside", path=path, reason=BROKEN)
            run.saved -= run.save
        if attempt % 11 == 5:
            changes = {"guard.spike_factor": [6.0, 8.0], "logging.every_steps": [50, 100]}
            run.event("config_change", changes=changes)
        run.begin()
        for _ in range(chance.randrange(1, 5)):
            run.train(chance.randrange(300, 2_600))
            trouble(run, chance)
        if attempt < num_attempts - 1:
            stop(run, chance)
    return run


def trouble(run: SyntheticRun, chance: random.Random):
    """Something happens, or nothing."""
    draw, rows = chance.random(), [[run.step * BATCH, (run.step + 1) * BATCH]]
    if draw < 0.25:
        nan = draw < 0.08
        run.event("skip", reason="not finite" if nan else "spike", skip_rows=rows,
                  loss=None if nan else 6.21, grad_norm=None if nan else 48.2)  # fmt: skip
    elif draw < 0.3:
        back = max(run.saved - 3 * run.save, 0)
        run.event("rollback", to_step=back, reason="8 of the last 10 steps were refused",
                  skip_rows=rows)  # fmt: skip
        run.step = back
    elif draw < 0.4:
        run.event("alarm", text="the loss has not fallen for 5,000 steps: 2.41 against 2.40")
    elif draw < 0.6:
        run.event("bad_row", source="web", shard="rows-00012.array_record", record=77,
                  reason="checksum")  # fmt: skip


def stop(run: SyntheticRun, chance: random.Random):
    """The attempt ends: by a kill, a fault or because it was asked to; then nothing runs."""
    draw = chance.random()
    if draw < 0.5:
        run.counts["kill"] = run.counts.get("kill", 0) + 1
    elif draw < 0.8:
        run.event("stop", reason="asked to stop by SIGTERM", code=75)
        run.saved = run.step
    elif draw < 0.9:
        run.event("stop", reason="no step for 600 s: process 3 waits in an all-reduce", code=124)
    else:
        run.event("stop", reason="OSError: [Errno 5] Input/output error", code=1)
    run.now += chance.choice((60, 300, 900, 7_200, 86_400))
