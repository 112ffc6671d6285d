"""The server under many clients that misbehave, and its latency at rising load.

    python -m benchmarks.serve [--minutes=10] [--streams=200] [--picture=serve.png]
    python -m benchmarks.serve --checkpoint=runs/tiny --minutes=0      # only the load sweep

Starts `ouro serve` in a child process, on a small random model unless --checkpoint names one. So
many streams at once ask for answers that were computed alone before; some leave in the middle,
some send bodies that are too large or are no requests at all. Every answer that ends is compared,
text and depths, and at the end no slot may be held. Resident memory is compared with what it was a
quarter of the way. Then the sweep: 1, 2, 4 … clients that ask without pause; time to the first
token and time per token, at the 50th and 95th percentile. The clients run in this process, beside
the server: on few cores they slow it down.
"""

import asyncio
import itertools
import json
import logging
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from absl import app, flags
from matplotlib.figure import Figure

_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "What to serve; unset: a small random model.")
_KV = flags.DEFINE_list("kv", ["exited", "full"], "KV policies, asked in turn.")
_MINUTES = flags.DEFINE_float("minutes", 10.0, "Of the storm; 0: none.", 0)
_STREAMS = flags.DEFINE_integer("streams", 200, "Clients at once in the storm.", 1)
_SLOTS = flags.DEFINE_integer("slots", 8, "Slots of each policy.", 1)
_LOADS = flags.DEFINE_list("loads", ["1", "2", "4", "8", "16", "32"], "Clients in the sweep.")
_SWEEP_SECONDS = flags.DEFINE_float("sweep_seconds", 10.0, "For each load; 0: no sweep.", 0)
_PICTURE = flags.DEFINE_string("picture", "", "Where to save the sweep's picture; unset: nowhere.")
_SEED = flags.DEFINE_integer("seed", 0, "Of what the clients do.")

URL = "/v1/completions"
MOST_BYTES = 20_000
SWEEP_TOKENS = 32
WINDOW = 128
SOONEST, LATEST = 1, 12  # chunks after which a client that leaves does so


class Answer(NamedTuple):
    """What a finished answer was: text and the depth of each token."""

    text: str
    depths: tuple[int, ...]


def main(_: Sequence[str]) -> None:
    """Runs storm and sweep, prints their figures and the same as one JSON line last.

    Exits with 1 if an answer was another one, a slot is held, or anything failed.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for each request
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = _CHECKPOINT.value or str(random_checkpoint(Path(folder)))
        with server(checkpoint, Path(folder) / "server.log") as (url, process):
            report = asyncio.run(measure(url, process.pid))
    for name, value in report.items():
        print(f"{name:24s} {json.dumps(value)}")
    print(json.dumps(report))
    storm = report.get("storm", {})
    bad = [storm.get(name) for name in ("wrong", "unexpected", "slots_held", "answers_open")]
    sys.exit(1 if any(bad) else 0)


def random_checkpoint(folder: Path) -> Path:
    """A model of 0.9 M random parameters and a tokenizer of the library's own prose."""
    import jax
    import jax.numpy as jnp
    from flax.core import meta

    from ouro_jax.config import ModelConfig
    from ouro_jax.data.stdlib_text import prose
    from ouro_jax.data.tokenizer import train_tokenizer
    from ouro_jax.interop.huggingface import save_huggingface
    from ouro_jax.model.loop_lm import LoopLM

    config = ModelConfig(
        1024, 128, 384, 4, 4, 4, 32, embedding_initializer_range=1.0, initializer_range=0.1,
        max_position_embeddings=WINDOW, dtype="float32",
    )  # fmt: skip
    init = jax.jit(LoopLM(config).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    (folder / "model").mkdir()
    save_huggingface(config, meta.unbox(init)["params"], folder / "model")
    texts = itertools.chain.from_iterable(itertools.islice(prose("train"), 200))
    train_tokenizer(texts, 1024).save(str(folder / "model" / "tokenizer.json"))
    return folder / "model"


@contextmanager
def server(checkpoint: str, log: Path):
    """`ouro serve` in a child process: its address and the process; stopped at the end."""
    command = [
        sys.executable, "-m", "ouro_jax.cli.serve", f"--checkpoint={checkpoint}", "--port=0",
        f"--kv={','.join(_KV.value)}", f"--slots={_SLOTS.value}", f"--window={WINDOW}",
        f"--max_body_bytes={MOST_BYTES}",
    ]  # fmt: skip
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise SystemExit(f"the server did not start:\n{log.read_text()}")
        yield found[0], process
        process.terminate()
        process.wait(30)
        if process.returncode:
            raise SystemExit(f"the server left with {process.returncode}:\n{log.read_text()}")
    finally:
        process.kill()


async def measure(url: str, pid: int) -> dict[str, Any]:
    """Storm and sweep against the server at `url`."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=_STREAMS.value)
    report: dict[str, Any] = {}
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        if _MINUTES.value:
            report["storm"] = await Storm(client, pid).run()
        if _SWEEP_SECONDS.value:
            report["sweep"] = [await at_load(client, int(load)) for load in _LOADS.value]
            if _PICTURE.value:
                draw(report["sweep"], Path(_PICTURE.value))
    return report


def questions() -> list[dict[str, Any]]:
    """Bodies of requests that differ in all that can differ."""
    prompts = ("def main(", "The loop", "import", "What is the answer to a question that")
    rules = (None, "q:0.3", "q:0.7", "static:2", "confidence:0.2")
    return [
        {
            "prompt": prompts[number % len(prompts)], "seed": number, "kv": kv,
            "max_tokens": 8 + 7 * (number % 8), "temperature": number % 3 / 2,
            "exit": rules[number % len(rules)], "depths": True, "stream": True,
        }
        for kv in _KV.value
        for number in range(20)
    ]  # fmt: skip


async def stream(client: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None = None):
    """Asks, and returns the answer with the moments at which its chunks came.

    None for a client that left after so many chunks; HTTPStatusError for a refusal.
    """
    text, depths, moments = [], [], []
    async with client.stream("POST", URL, json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                return Answer("".join(text), tuple(depths)), moments
            (choice,) = json.loads(line[6:])["choices"]
            text.append(choice["text"])
            if choice["text"]:
                moments.append(time.perf_counter())
            if "ouro" in choice:
                depths += [token["depth"] for token in choice["ouro"]["tokens"]]
            if leave_after is not None and len(text) >= leave_after:
                return None, moments
    raise RuntimeError("a stream ended without [DONE]")


class Storm:
    """Clients that ask, leave and send nonsense, and what came of it."""

    def __init__(self, client: httpx.AsyncClient, pid: int):
        self._client, self._pid = client, pid
        self._counts: Counter[str] = Counter()
        self._expected: list[Answer] = []
        self._questions = questions()
        self._memory: list[int] = []

    async def run(self) -> dict[str, Any]:
        """All of it: answers alone, the storm, and what is left after it."""
        for question in self._questions:
            answer, _ = await stream(self._client, question)
            assert answer is not None
            self._expected.append(answer)
        end = time.monotonic() + 60 * _MINUTES.value
        watch = asyncio.ensure_future(self._watch_memory())
        await asyncio.gather(
            *(self._client_of(random.Random(f"{_SEED.value} {n}"), end)
              for n in range(_STREAMS.value))
        )  # fmt: skip
        watch.cancel()
        held, opened = await self._held()
        quarter = self._memory[len(self._memory) // 4]
        return {
            **{name: self._counts[name] for name in (
                "finished", "wrong", "left", "refused_429", "refused_413", "refused_400",
                "unexpected",
            )},
            "slots_held": held, "answers_open": opened,
            "memory_mb": [round(quarter / 2**20, 1), round(self._memory[-1] / 2**20, 1)],
        }  # fmt: skip

    async def _client_of(self, rng: random.Random, end: float) -> None:
        while time.monotonic() < end:
            chance = rng.random()
            try:
                if chance < 0.05:
                    await self._refused(413, {"prompt": "x" * 2 * MOST_BYTES})
                elif chance < 0.10:
                    bad = rng.choice([{"prompt": ""}, {"promt": "x"}, {"prompt": "x", "n": 0}, []])
                    await self._refused(400, bad)
                else:
                    leaves = rng.randint(SOONEST, LATEST) if chance < 0.3 else None
                    await self._ask(rng.randrange(len(self._questions)), leaves)
            except httpx.HTTPStatusError as error:
                if error.response.status_code != 429:
                    self._unexpected(error)
                self._counts["refused_429"] += 1
                wait = float(error.response.headers.get("retry-after", 1))
                await asyncio.sleep(wait * rng.uniform(0.5, 1.5))
            except Exception as error:
                self._unexpected(error)
                await asyncio.sleep(1)

    async def _ask(self, number: int, leaves: int | None) -> None:
        answer, _ = await stream(self._client, self._questions[number], leaves)
        if answer is None:
            self._counts["left"] += 1
            return
        self._counts["finished"] += 1
        if answer != self._expected[number]:
            self._counts["wrong"] += 1
            print(f"question {number}: {answer}\nalone: {self._expected[number]}")

    async def _refused(self, status: int, body: Any) -> None:
        response = await self._client.post(URL, json=body)
        if response.status_code != status or set(response.json()) != {"error"}:
            raise RuntimeError(f"{response.status_code} instead of {status}: {response.text[:200]}")
        self._counts[f"refused_{status}"] += 1

    def _unexpected(self, error: Exception) -> None:
        self._counts["unexpected"] += 1
        print(f"unexpected: {type(error).__name__}: {error}")

    async def _watch_memory(self) -> None:
        while True:
            self._memory.append(resident_bytes(self._pid))
            await asyncio.sleep(min(5.0, 60 * _MINUTES.value / 20))

    async def _held(self) -> tuple[float, float]:
        """Slots in use and answers open, once those who left had ten seconds to be heard of."""
        for _ in range(100):
            text = (await self._client.get("/metrics")).text
            held, opened = (
                sum(map(float, re.findall(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE)))
                for name in ("ouro_slots_live", "ouro_answers_open")
            )
            if held == opened == 0:
                break
            await asyncio.sleep(0.1)
        return held, opened


def resident_bytes(pid: int) -> int:
    """Memory of a process that lies in RAM."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) << 10 if found else 0


async def at_load(client: httpx.AsyncClient, load: int) -> dict[str, float]:
    """Latencies in milliseconds with `load` clients that ask without pause, and tokens/s."""
    first, gaps, tokens = [], [], 0
    began = time.perf_counter()
    end = began + _SWEEP_SECONDS.value

    async def ask(number: int) -> None:
        nonlocal tokens
        for turn in itertools.count():
            asked = time.perf_counter()
            if asked >= end:
                return
            body = {
                "prompt": "def main(", "max_tokens": SWEEP_TOKENS, "exit": "q:0.7", "stream": True,
                "seed": 1000 * number + turn,
            }  # fmt: skip
            _, moments = await stream(client, body)
            first.append(1e3 * (moments[0] - asked))
            gaps.extend(1e3 * np.diff(moments))
            tokens += len(moments)

    await asyncio.gather(*(ask(number) for number in range(load)))
    report = {"clients": load, "tokens_per_second": tokens / (time.perf_counter() - began)}
    for name, values in (("first_ms", first), ("token_ms", gaps)):
        report |= {f"{name}_p{p}": float(np.percentile(values, p)) for p in (50, 95)}
    return {name: round(value, 2) for name, value in report.items()}


def draw(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Saves two panels over the number of clients: time to the first token, time per token."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loads = [row["clients"] for row in rows]
    panels = (("first_ms", "ms to the first token"), ("token_ms", "ms per token"))
    for axes, (name, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for percentile, style in ((50, "-"), (95, "--")):
            values = [row[f"{name}_p{percentile}"] for row in rows]
            axes.plot(loads, values, style, marker="o", color="#2f5fb3", label=f"p{percentile}")
        axes.axvline(_SLOTS.value, color="#8a8f98", linewidth=0.8)
        axes.annotate(" slots", (_SLOTS.value, 0.97), xycoords=("data", "axes fraction"),
                      va="top", color="#686d76", fontsize=9)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(loads, [f"{load:.0f}" for load in loads])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("clients that ask without pause")
        axes.set_title(label, loc="left", fontsize=12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddbd4", linewidth=0.6)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    app.run(main)
