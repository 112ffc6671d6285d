"""Decoding with shared keys and values, one token, loop, layer and head at a time, in float64.

The tests' second opinion on KV policies and exit rules: numpy only, no batch, no compiled program,
lists in place of a cache. Definitions, not code, are what it shares with the package:

- a prompt is read with all loops, each attending to its own loop's keys and values;
- `full`: so is every new token, and the exit rule only chooses what is read out;
- `exited`: a new token ends at its exit loop, whose keys and values deeper loops find instead;
- `last`, `first`, `mean`: one set; of a prompt that of its last loop, first loop, or their mean; of
  a new token that of the newest loop so far, of its first, or the mean of its loops so far, for
  itself too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import reference

ExitStep = Callable[[np.ndarray, np.ndarray, np.ndarray], bool]
"""(gate logits, states, logits of the loops so far) → whether the token leaves now."""


def rule(kind: str, value: float) -> ExitStep:
    """An exit rule as a question asked after each loop."""

    def leaves(gates_T, states_TD, logits_TV):
        halt_T = 1 / (1 + np.exp(-gates_T))
        remaining = np.prod(1 - halt_T)
        if kind == "static":
            return len(gates_T) >= value
        if kind == "q":
            return value < 1 and 1 - remaining >= value
        if kind == "hidden":
            return len(states_TD) > 1 and np.linalg.norm(states_TD[-1] - states_TD[-2]) < value
        if kind == "confidence":
            p_V = np.exp(logits_TV[-1] - logits_TV[-1].max())
            return p_V.max() / p_V.sum() >= value
        assert kind == "lookahead"
        foretold = np.prod(1 - halt_T[:-1]) * (1 - halt_T[-2]) if len(gates_T) > 1 else 1.0
        return value < 1 and 1 - foretold >= value

    return leaves


def decode(
    fields: reference.Fields,
    tensors: reference.Tensors,
    prompt: Sequence[int],
    steps: int,
    policy: str,
    leaves: ExitStep,
    loops: int,
) -> tuple[list[int], list[int]]:
    """Greedy tokens and their depths (1-based)."""
    model = _Model(fields, tensors, policy, loops)
    states, gates = model.read(prompt)
    tokens, depths = [], []
    for _ in range(steps):
        logits = [model.logits(state) for state in states]
        depth = next(
            (
                t
                for t in range(1, len(states) + 1)
                if t == loops
                or leaves(np.array(gates[:t]), np.array(states[:t]), np.array(logits[:t]))
            ),
        )
        tokens.append(int(logits[depth - 1].argmax()))
        depths.append(depth)
        states, gates = model.extend(tokens[-1], len(prompt) + len(tokens) - 1, leaves)
    return tokens, depths


class _Model:
    def __init__(self, fields, tensors, policy, loops):
        self.fields, self.policy, self.loops = fields, policy, loops
        self.tensors = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
        self.layers = [
            reference._layer(self.tensors, index) for index in range(fields["num_hidden_layers"])
        ]
        # kept[loop][layer] is a list with (keys, values) of every position so far.
        sets = loops if policy in ("full", "exited") else 1
        self.kept: list[list[list[Any]]] = [[[] for _ in self.layers] for _ in range(sets)]

    def logits(self, state):
        return self.tensors["lm_head.weight"] @ state

    def _norm(self, x, name):
        return reference._norm(x, name, self.fields["rms_norm_eps"])

    def read(self, prompt):
        """The prompt with all loops; returns its last token's states and gates."""
        full: list[list[list[Any]]] = [[[] for _ in self.layers] for _ in range(self.loops)]
        for position, token in enumerate(prompt):
            x = self.tensors["model.embed_tokens.weight"][token]
            states, gates = [], []
            for loop in range(self.loops):
                x = self._loop(x, position, lambda layer, kv, loop=loop: (
                    full[loop][layer].append(kv) or full[loop][layer]))  # fmt: skip
                states.append(x)
                gates.append(self._gate(x))
        for layer in range(len(self.layers)):
            for position in range(len(prompt)):
                per_loop = [full[loop][layer][position] for loop in range(self.loops)]
                for index, kept in enumerate(self.kept):
                    kept[layer].append(self._condensed(per_loop, index))
        return states, gates

    def _condensed(self, per_loop, index):
        if self.policy in ("full", "exited"):
            return per_loop[index]
        if self.policy == "mean":
            return tuple(np.mean([kv[part] for kv in per_loop], axis=0) for part in (0, 1))
        return per_loop[-1 if self.policy == "last" else 0]

    def extend(self, token, position, leaves):
        """A new token at its position: the states and gates of the loops that ran for it."""
        x = self.tensors["model.embed_tokens.weight"][token]
        for kept in self.kept:
            for layer in kept:
                layer.append(None)
        mine: list[list[Any]] = [[] for _ in self.layers]  # its keys and values, loop by loop
        states, gates = [], []
        for loop in range(self.loops):

            def see(layer, kv, loop=loop):
                mine[layer].append(kv)
                kept = self.kept[loop if len(self.kept) > 1 else 0][layer]
                kept[-1] = {
                    "mean": lambda: self._condensed(mine[layer], 0),
                    "first": lambda: mine[layer][0],
                }.get(self.policy, lambda: kv)()
                return kept

            x = self._loop(x, position, see)
            states.append(x)
            gates.append(self._gate(x))
            logits = np.array([self.logits(state) for state in states])
            if self.policy != "full" and leaves(np.array(gates), np.array(states), logits):
                break
        if self.policy == "exited":
            for deeper in self.kept[len(states) :]:
                for layer, kept in enumerate(deeper):
                    kept[-1] = mine[layer][-1]
        return states, gates

    def _gate(self, x):
        weight = self.tensors["model.early_exit_gate.weight"][0]
        return float(weight @ x + self.tensors["model.early_exit_gate.bias"][0])

    def _loop(self, x, position, see):
        for index, weights in enumerate(self.layers):
            a = self._norm(x, weights["input_layernorm"])
            a = self._attend(weights, a, position, lambda kv, index=index: see(index, kv))
            x = x + self._norm(a, weights["input_layernorm_2"])
            m = self._norm(x, weights["post_attention_layernorm"])
            gate = weights["mlp.gate_proj"] @ m
            m = gate / (1 + np.exp(-gate)) * (weights["mlp.up_proj"] @ m)
            m = weights["mlp.down_proj"] @ m
            x = x + self._norm(m, weights["post_attention_layernorm_2"])
        return self._norm(x, self.tensors["model.norm.weight"])

    def _attend(self, weights, a, position, see):
        fields = self.fields
        heads, groups = fields["num_attention_heads"], fields["num_key_value_heads"]
        width = fields["head_dim"]

        def turned(x):
            at = np.array([[position]])
            return reference._rotate(x[None, None], at, fields["rope_theta"])[0, 0]

        q_HK, k_GK, v_GK = (
            (weights[f"self_attn.{name}_proj"] @ a).reshape(-1, width) for name in "qkv"
        )
        seen = see((np.stack([turned(k) for k in k_GK]), v_GK))
        outputs = []
        for head in range(heads):
            group = head // (heads // groups)
            query = turned(q_HK[head])
            scores = np.array([keys[group] @ query for keys, _ in seen]) / np.sqrt(width)
            p = np.exp(scores - scores.max())
            p /= p.sum()
            outputs.append(sum(w * values[group] for w, (_, values) in zip(p, seen, strict=True)))
        return weights["self_attn.o_proj"] @ np.concatenate(outputs)
