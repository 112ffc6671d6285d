"""The published model in numpy float64, straight from its tensors: the tests' second opinion.

Shares no code with the package and knows nothing of jax. Tensors have the Hugging Face names and
torch's [out, in] layout; `fields` are those of `config.json`. B batch, L sequence, D model width,
H heads, G KV heads, K head width, V vocabulary, T loops.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

Tensors = Mapping[str, np.ndarray]
Fields = Mapping[str, Any]


class Reference(NamedTuple):
    """What the model computes, loop by loop, and the stream after every layer of every loop."""

    states_TBLD: np.ndarray
    gate_logits_TBL: np.ndarray
    logits_TBLV: np.ndarray
    layer_outputs: dict[tuple[int, int], np.ndarray]


def forward(
    fields: Fields,
    tensors: Tensors,
    tokens_BL: np.ndarray,
    positions_BL: np.ndarray | None = None,
    segment_ids_BL: np.ndarray | None = None,
    num_loops: int | None = None,
) -> Reference:
    """All loops over `tokens_BL`; a token attends to earlier ones with its segment id."""
    tensors = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    length = tokens_BL.shape[1]
    if positions_BL is None:
        positions_BL = np.broadcast_to(np.arange(length), tokens_BL.shape)
    if segment_ids_BL is None:
        segment_ids_BL = np.ones_like(tokens_BL)
    visible_BLL = np.tril(np.ones((length, length), bool))
    visible_BLL = visible_BLL & (segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :])
    eps = fields["rms_norm_eps"]

    x = tensors["model.embed_tokens.weight"][tokens_BL]
    states, gates, layer_outputs = [], [], {}
    for loop in range(num_loops or fields["total_ut_steps"]):
        for index in range(fields["num_hidden_layers"]):
            weights = _layer(tensors, index)
            x = _block(fields, weights, x, positions_BL, visible_BLL)
            layer_outputs[loop, index] = x
        x = _norm(x, tensors["model.norm.weight"], eps)
        states.append(x)
        gate = x @ tensors["model.early_exit_gate.weight"].T + tensors["model.early_exit_gate.bias"]
        gates.append(gate[..., 0])
    states_TBLD = np.stack(states)
    logits_TBLV = states_TBLD @ tensors["lm_head.weight"].T
    return Reference(states_TBLD, np.stack(gates), logits_TBLV, layer_outputs)


def exit_pdf(gate_logits_TBL: np.ndarray) -> np.ndarray:
    """p_t = λ_t ∏_{j<t} (1 - λ_j); the last loop takes what remains."""
    halt_TBL = 1 / (1 + np.exp(-np.asarray(gate_logits_TBL, np.float64)))
    remaining_BL = np.ones_like(halt_TBL[0])
    pdf = []
    for halt_BL in halt_TBL[:-1]:
        pdf.append(halt_BL * remaining_BL)
        remaining_BL = remaining_BL * (1 - halt_BL)
    return np.stack([*pdf, remaining_BL])


def exit_step(gate_logits_TBL: np.ndarray, threshold: float) -> np.ndarray:
    """First 0-based loop whose cumulative exit probability reaches the threshold, else the last."""
    pdf_TBL = exit_pdf(gate_logits_TBL)
    step_BL = np.full(pdf_TBL.shape[1:], len(pdf_TBL) - 1)
    for loop in reversed(range(len(pdf_TBL) - 1)):
        step_BL = np.where(pdf_TBL[: loop + 1].sum(0) >= threshold, loop, step_BL)
    return step_BL


def cross_entropy(logits_TBLV: np.ndarray, targets_BL: np.ndarray) -> np.ndarray:
    """-ln p(target), nats, per loop and token."""
    peak = logits_TBLV.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits_TBLV - peak).sum(-1)) + peak[..., 0]
    chosen = np.broadcast_to(targets_BL, log_sum.shape)[..., None]
    return log_sum - np.take_along_axis(logits_TBLV, chosen, -1)[..., 0]


def expected_loss(
    fields: Fields, tensors: Tensors, tokens_BL: np.ndarray, entropy_weight: float
) -> float:
    """Eq. 4, mean over all positions but the last: sum_t p_t CE_t - β H(p)."""
    out = forward(fields, tensors, tokens_BL)
    ce_TBL = cross_entropy(out.logits_TBLV[:, :, :-1], tokens_BL[:, 1:])
    pdf_TBL = exit_pdf(out.gate_logits_TBL[:, :, :-1])
    entropy_BL = -(pdf_TBL * np.log(pdf_TBL)).sum(0)
    return float(((pdf_TBL * ce_TBL).sum(0) - entropy_weight * entropy_BL).mean())


def random_checkpoint(
    rng: np.random.Generator,
    *,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 4,
    head_dim: int = 8,
    mlp: int = 48,
    vocab: int = 96,
    loops: int = 4,
    theta: float = 1e4,
    eps: float = 1e-6,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields and float32 tensors of a model whose gates and norms are far from trivial."""
    fields = {
        "architectures": ["OuroForCausalLM"],
        "model_type": "ouro",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "total_ut_steps": loops,
        "rope_theta": theta,
        "rms_norm_eps": eps,
        "max_position_embeddings": 4096,
        "torch_dtype": "float32",
    }

    def matrix(rows: int, columns: int, scale: float = 1.2) -> np.ndarray:
        return rng.normal(size=(rows, columns)) * scale / np.sqrt(columns)

    def norm() -> np.ndarray:
        return rng.uniform(0.5, 1.5, hidden)

    tensors = {
        "model.embed_tokens.weight": rng.normal(size=(vocab, hidden)),
        "model.norm.weight": norm(),
        "model.early_exit_gate.weight": matrix(1, hidden, 1.4),
        "model.early_exit_gate.bias": np.array([-0.4]),
        "lm_head.weight": matrix(vocab, hidden, 2.5),
    }
    for index in range(layers):
        layer = {
            "self_attn.q_proj": matrix(heads * head_dim, hidden),
            "self_attn.k_proj": matrix(kv_heads * head_dim, hidden),
            "self_attn.v_proj": matrix(kv_heads * head_dim, hidden),
            "self_attn.o_proj": matrix(hidden, heads * head_dim),
            "mlp.gate_proj": matrix(mlp, hidden),
            "mlp.up_proj": matrix(mlp, hidden),
            "mlp.down_proj": matrix(hidden, mlp),
            "input_layernorm": norm(),
            "input_layernorm_2": norm(),
            "post_attention_layernorm": norm(),
            "post_attention_layernorm_2": norm(),
        }
        tensors |= {f"model.layers.{index}.{name}.weight": value for name, value in layer.items()}
    return fields, {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def write_checkpoint(directory: Path, fields: Fields, tensors: Tensors) -> Path:
    """Writes `config.json` and `model.safetensors` with the safetensors library."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _layer(tensors: Tensors, index: int) -> dict[str, np.ndarray]:
    """The tensors of one layer by the short name between its prefix and `.weight`."""
    prefix = f"model.layers.{index}."
    return {
        name.removeprefix(prefix).removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _block(fields, weights, x, positions_BL, visible_BLL):
    """Sandwich layer: each branch is normed before and after, then added."""
    eps = fields["rms_norm_eps"]
    a = _norm(x, weights["input_layernorm"], eps)
    a = _attention(fields, weights, a, positions_BL, visible_BLL)
    x = x + _norm(a, weights["input_layernorm_2"], eps)
    m = _norm(x, weights["post_attention_layernorm"], eps)
    gate = m @ weights["mlp.gate_proj"].T
    m = gate / (1 + np.exp(-gate)) * (m @ weights["mlp.up_proj"].T)
    m = m @ weights["mlp.down_proj"].T
    return x + _norm(m, weights["post_attention_layernorm_2"], eps)


def _attention(fields, weights, a, positions_BL, visible_BLL):
    """Query head j reads KV head j // (H / G); one head at a time, as slow as it is plain."""
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    width = fields["head_dim"]
    q = a @ weights["self_attn.q_proj"].T
    k = a @ weights["self_attn.k_proj"].T
    v = a @ weights["self_attn.v_proj"].T
    outputs = []
    for head in range(heads):
        mine = slice(head * width, (head + 1) * width)
        shared = head // (heads // kv_heads)
        theirs = slice(shared * width, (shared + 1) * width)
        query = _rotate(q[..., mine], positions_BL, fields["rope_theta"])
        key = _rotate(k[..., theirs], positions_BL, fields["rope_theta"])
        scores = np.einsum("bik,bjk->bij", query, key) / np.sqrt(width)
        scores = np.where(visible_BLL, scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        outputs.append(scores / scores.sum(-1, keepdims=True) @ v[..., theirs])
    return np.concatenate(outputs, -1) @ weights["self_attn.o_proj"].T


def _rotate(x: np.ndarray, positions_BL: np.ndarray, theta: float) -> np.ndarray:
    """RoPE: dimension i turns with dimension i + K/2 by position * theta^(-2i/K)."""
    half = x.shape[-1] // 2
    angles = positions_BL[..., None] * theta ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
