"""The paper's data as data: what the corpora hold (Table 3) and each stage's shares of rows
(Tables 4 and 5; section 4.2).

Names are folders of prepared rows: `DATA_ROOT/<source>/train-<sequence length>/`.
"""

# Table 3: tokens in the corpus and tokens used, in billions. The high-quality part of Nemotron-CC
# that stage 2 takes is not listed there.
TABLE_3 = {
    "nemotron_cc": (6386, 4404),
    "map_cc": (800, 780),
    "ultra_fineweb_zh": (120, 120),
    "opencoder_pretrain": (450, 450),
    "megamath_web": (247, 246),
    "megamath_high_quality": (64, 64),
    "nemotron_cc_math_v1": (210, 210),
    "nemotron_code_synthetic": (53, 53),
    "nemotron_sft_code": (48, 48),
    "nemotron_sft_general": (87, 87),
    "opencoder_annealing": (7, 7),
    "prolong_64k": (20, 20),
    "instruction_mix": (182, 90),
}
SOURCE_TOKENS = {source: held * 10**9 for source, (held, _) in TABLE_3.items()}

# Table 4: stages 1a and 1b, 6T tokens.
STABLE = {
    "nemotron_cc": 0.734,
    "map_cc": 0.130,
    "ultra_fineweb_zh": 0.020,
    "opencoder_pretrain": 0.075,
    "megamath_web": 0.041,
}

# Table 5: continual-training annealing, 1.4T tokens; no Chinese from here on.
ANNEAL = {
    "nemotron_cc_high_quality": 0.665,
    "nemotron_cc_math_v1": 0.150,
    "megamath_high_quality": 0.046,
    "opencoder_annealing": 0.005,
    "nemotron_code_synthetic": 0.038,
    "nemotron_sft_code": 0.034,
    "nemotron_sft_general": 0.062,
}

# The 64K subset of ProLong, 20B tokens.
LONG_CONTEXT = {"prolong_64k": 1.0}

# 300B tokens: 90B of a mix of instruction sets in ChatML, 30B of stage 1 and 180B of stage 2
# again. Stage 1 without its Chinese sources, which the paper drops from stage 2 on.
_STAGE_1 = {name: STABLE[name] for name in ("nemotron_cc", "opencoder_pretrain", "megamath_web")}
_REPLAY_1 = {name: 0.1 * share / sum(_STAGE_1.values()) for name, share in _STAGE_1.items()}
_REPLAY_2 = {name: 0.6 * share for name, share in ANNEAL.items()}
MID_TRAINING = {"instruction_mix": 0.3} | _REPLAY_1 | _REPLAY_2

# Table 6, 8.3M examples: 3.5M mathematics, 3.2M code, 808K science, 767K chat.
_EXAMPLES = {
    "sft_math": 3_500_000,
    "sft_code": 3_200_000,
    "sft_science": 808_000,
    "sft_chat": 767_000,
}
SFT = {name: count / sum(_EXAMPLES.values()) for name, count in _EXAMPLES.items()}
