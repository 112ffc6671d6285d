"""Where a model holds harmful apart from benign prompts: PCA by depth (paper, section 7.1).

The state of the last input token after each loop, as the head reads it (top layer, final norm), of
two lists of prompts; the paper took 100 benign and 100 harmful "How to" questions of Zheng et al.
2024 and found that they separate more with depth. B prompts, L tokens, D width, T loops.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from ouro_jax.config import ModelConfig
from ouro_jax.errors import ConfigError, require
from ouro_jax.inference.text import encode_prompt
from ouro_jax.model.loop_lm import LoopLM, LoopOutput
from ouro_jax.training.lines import replace_file

LABELS = ("benign", "harmful")
BATCH, LENGTH_STEP = 16, 64


def load_questions(path: str | Path) -> list[str]:
    """The questions of a text file, one a line; ConfigError if there are fewer than two."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"questions {str(path)!r}: no such file; expected a text file with a question a line. "
            "The paper's are custom.txt of data and data_harmless in "
            "https://github.com/chujiezheng/LLM-Safeguard."
        )
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    questions = [line for line in lines if line]
    require(len(questions) >= 2, f"{path}: questions", len(questions), "at least 2")
    return questions


def run_prompt_states(
    config: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    benign: Sequence[str],
    harmful: Sequence[str],
    output: str | Path,
    *,
    model_name: str,
    chat: bool,
    depths: int = 8,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Writes the first two principal coordinates of every prompt after loops 1 … `depths`.

    JSONL records: `safety_state` (label, number, depth, x, y; no text) and, for each depth,
    `safety_separation` (the separation of `separation` and the variance that x and y explain).
    Returns a summary with the separations.
    """
    questions = [*benign, *harmful]
    is_harmful_B = np.arange(len(questions)) >= len(benign)
    prompts = [encode_prompt(tokenizer, question, chat) for question in questions]
    states_TBD = last_token_states(config, params, prompts, depths)
    say(f"states of {len(prompts)} prompts after loops 1 to {depths}")
    records = []
    for depth, states_BD in enumerate(states_TBD, start=1):
        xy_B2, explained = principal_coordinates(states_BD)
        records.append({
            "kind": "safety_separation", "model": model_name, "depth": depth,
            "separation": separation(states_BD, is_harmful_B), "explained": explained,
        })  # fmt: skip
        say(f"depth {depth}: separation {records[-1]['separation']:.2f}")
        records += [
            {"kind": "safety_state", "depth": depth, "label": LABELS[int(bad)], "number": number,
             "x": x, "y": y}
            for number, (bad, (x, y)) in enumerate(
                zip(is_harmful_B, xy_B2.tolist(), strict=True), start=1)
        ]  # fmt: skip
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, "".join(json.dumps(record) + "\n" for record in records).encode())
    separations = {r["depth"]: r["separation"] for r in records if "separation" in r}
    return {"output": str(output), "prompts": len(prompts), "separation": separations}


def last_token_states(
    config: ModelConfig, params: dict, prompts: Sequence[Sequence[int]], depths: int
) -> np.ndarray:
    """States [T, B, D] of each prompt's last token after loops 1 … `depths`, float32."""

    @jax.jit
    def run(params, tokens_BL, last_B):
        out = cast(LoopOutput, LoopLM(config, remat="none").apply(
            {"params": params}, tokens_BL, num_loops=depths
        ))  # fmt: skip
        at_last = jnp.take_along_axis(out.states_TBLD, last_B[None, :, None, None], axis=2)
        return at_last[:, :, 0].astype(jnp.float32)

    # Padded behind, where causal attention does not look, to few shapes.
    length = -(-max(map(len, prompts)) // LENGTH_STEP) * LENGTH_STEP
    states = []
    for start in range(0, len(prompts), BATCH):
        chunk = prompts[start : start + BATCH]
        tokens_BL, last_B = np.zeros((BATCH, length), np.int32), np.zeros(BATCH, np.int32)
        for row, prompt in enumerate(chunk):
            tokens_BL[row, : len(prompt)], last_B[row] = prompt, len(prompt) - 1
        states.append(np.asarray(run(params, tokens_BL, last_B))[:, : len(chunk)])
    return np.concatenate(states, axis=1)


def principal_coordinates(states_BD: np.ndarray) -> tuple[np.ndarray, float]:
    """Coordinates [B, 2] along the two directions of most variance, and the share they explain.

    The sign of a direction, which PCA leaves open, is such that its largest entry is positive.
    """
    centred_BD = np.asarray(states_BD, np.float64) - states_BD.mean(0)
    _, sizes, directions = np.linalg.svd(centred_BD, full_matrices=False)
    top_2D = directions[:2]
    largest_2 = top_2D[np.arange(2), np.abs(top_2D).argmax(1)]
    variance = float(np.sum(sizes**2))
    share = float(np.sum(sizes[:2] ** 2) / variance) if variance else 0.0
    return centred_BD @ (top_2D * np.sign(largest_2)[:, None]).T, share


def separation(states_BD: np.ndarray, is_harmful_B: np.ndarray) -> float:
    """Distance of the two means over the root mean square distance of a state from its mean.

    In all D dimensions; the paper only shows pictures. 0: not apart; 2: the means are as far apart
    as two clouds of that radius are wide.
    """
    groups = [np.asarray(states_BD[is_harmful_B == bad], np.float64) for bad in (False, True)]
    means = [group.mean(0) for group in groups]
    spread = [np.sum((g - m) ** 2) for g, m in zip(groups, means, strict=True)]
    radius = np.sqrt(sum(spread) / len(states_BD))
    return float(np.linalg.norm(means[1] - means[0]) / radius) if radius else 0.0
