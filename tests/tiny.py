"""Tiny random networks of many architectures, made in memory from transformers' own configs.

Hidden size 64, feed-forward width 160 (five times 32, so that rounding to a multiple shows), 4 heads (2 key-value
heads where the architecture shares them), 3 blocks, a vocabulary of 320: all bytes and some pairs of letters.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

HIDDEN, UNITS, HEADS, KV_HEADS, BLOCKS, VOCABULARY, CONTEXT = 64, 160, 4, 2, 3, 320, 256
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
PAIRS = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro "
    "ic ne ea ra ce li ch ll be ma si om ur ca el ta la ns di fo ho pe ec pr"
)

_BASE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": UNITS,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
}
_SHARED = {**_BASE, "num_key_value_heads": KV_HEADS}
_HEAD = {"head_dim": HIDDEN // HEADS}
_OLD = {"n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": HEADS, "n_positions": CONTEXT, "n_inner": UNITS}


def _config(kind: str, **settings: Any) -> Callable[[], PreTrainedConfig]:
    def make_config() -> PreTrainedConfig:
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return getattr(transformers, f"{kind}Config")(**{"vocab_size": VOCABULARY, **special, **settings})

    return make_config


ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _config("Llama", **_SHARED),
    "llama_mha": _config("Llama", **_BASE),
    "llama_mqa": _config("Llama", **_BASE, num_key_value_heads=1, mlp_bias=True, attention_bias=True),
    "llama_tied": _config("Llama", **_SHARED, tie_word_embeddings=True),
    "mistral": _config("Mistral", **_SHARED, sliding_window=None, **_HEAD),
    "qwen2": _config("Qwen2", **_SHARED),
    "qwen3": _config("Qwen3", **_SHARED, **_HEAD),
    "gemma": _config("Gemma", **_SHARED, **_HEAD),
    "gemma2": _config("Gemma2", **_SHARED, **_HEAD, query_pre_attn_scalar=HIDDEN // HEADS),
    "gemma3": _config(
        "Gemma3Text",
        **_SHARED,
        **_HEAD,
        query_pre_attn_scalar=HIDDEN // HEADS,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "phi3": _config("Phi3", **_SHARED),
    "opt": _config("OPT", **(_BASE | {"ffn_dim": UNITS}), word_embed_proj_dim=HIDDEN),
    "gpt2": _config("GPT2", **_OLD),
    "gpt_neox": _config("GPTNeoX", **_BASE),
    "gpt_neox_sequential": _config("GPTNeoX", **_BASE, use_parallel_residual=False),
    "gptj": _config("GPTJ", **_OLD, rotary_dim=8),
    "falcon": _config("Falcon", **_BASE, ffn_hidden_size=UNITS, bias=True),
    "falcon_new": _config(
        "Falcon", **_BASE, ffn_hidden_size=UNITS, new_decoder_architecture=True, num_kv_heads=KV_HEADS
    ),
    "phi": _config("Phi", **_BASE),
    "bloom": _config("Bloom", hidden_size=HIDDEN, n_layer=BLOCKS, n_head=HEADS),  # its width is always 4 x hidden
    "mixtral": _config("Mixtral", **_SHARED, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": _config(
        "Qwen2Moe",
        **_SHARED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=128,
    ),
    "qwen3_moe": _config(
        "Qwen3Moe", **_SHARED, **_HEAD, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96
    ),
    "qwen3_moe_mixed": _config(
        "Qwen3Moe",
        **_SHARED,
        **_HEAD,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        mlp_only_layers=[1],
    ),
    "olmoe": _config("Olmoe", **_SHARED, num_experts=4, num_experts_per_tok=2),
    "mamba": _config("Mamba", hidden_size=HIDDEN, num_hidden_layers=BLOCKS, state_size=8),
}


def make(name: str, seed: int = 0) -> Any:
    """The architecture `name` with random float32 weights, in evaluation mode.

    Every vector is moved away from its usual 0 or 1, so that a bias or scale that was cut wrongly shows.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[name](), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens, so that any text is encoded without loss."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*SPECIAL.values(), *letters, *PAIRS.split()]
    assert len(entries) == len(set(entries)) == VOCABULARY
    core = Tokenizer(
        models.BPE(
            vocab={entry: i for i, entry in enumerate(entries)}, merges=[(pair[0], pair[1]) for pair in PAIRS.split()]
        )
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=CONTEXT, **SPECIAL)


def save(
    name: str,
    directory: str | Path,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: str | int | None = None,
) -> nn.Module:
    """Writes architecture `name` as a model directory with its tokenizer; returns the model as written.

    shard_size: largest size of one file, such as "100KB"; None for a single file.
    """
    model = make(name, seed).to(dtype)
    model.save_pretrained(directory, **({} if shard_size is None else {"max_shard_size": shard_size}))
    tokenizer().save_pretrained(directory)
    return model
