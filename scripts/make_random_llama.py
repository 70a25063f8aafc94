"""Writes a Llama of 1.1 B shape with random weights, and an int8 and an int4 twin, to time servers with.

    python scripts/make_random_llama.py FOLDER [--layers 22] [--int8] [--int4]

FOLDER gets the bfloat16 model; with --int8 FOLDER-w8a8 is written too (compressed-tensors int-quantized), with --int4
FOLDER-w4a16 (compressed-tensors pack-quantized, groups of 128). The tokenizer has one token a byte or number, so any
text encodes. Weights are random: the text that comes out means nothing, the time it takes does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY, GROUP = 2048, 5632, 32, 4, 32000, 128
HEAD = HIDDEN // HEADS
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}  # name -> (outputs, inputs)


def config(layers: int, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """Return config.json of the model."""
    own: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "attention_bias": False,
    }  # fmt: skip
    return own | ({"quantization_config": quantization} if quantization else {})


def quantization(bits: int) -> dict[str, Any]:
    """Return compressed-tensors' description of W8A8 (8 bits) or W4A16 (4 bits)."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel" if bits == 8 else "group"}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": weights if bits == 8 else weights | {"group_size": GROUP},
        "input_activations": activations if bits == 8 else None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if bits == 8 else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def linear(name: str, n: int, k: int, bits: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the tensors of one linear layer whose outputs have about the size of its inputs."""
    size = k**-0.5
    if bits == 16:
        return {f"{name}.weight": (torch.randn(n, k, generator=generator) * size).bfloat16()}
    if bits == 8:
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
        return {f"{name}.weight": codes, f"{name}.weight_scale": torch.full((n, 1), size / 73, dtype=torch.bfloat16)}
    words = torch.randint(-(2**31), 2**31 - 1, (n, k // 8), dtype=torch.int32, generator=generator)
    return {
        f"{name}.weight_packed": words,
        f"{name}.weight_scale": torch.full((n, k // GROUP), size / 4.6, dtype=torch.bfloat16),  # codes' deviation
        f"{name}.weight_shape": torch.tensor([n, k], dtype=torch.int64),
    }


def tensors(layers: int, bits: int, seed: int) -> dict[str, Tensor]:
    """Return all tensors of the model; norms are ones, so activations keep their size through the layers."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(VOCABULARY, HIDDEN, generator=generator).bfloat16()
    found = {"model.embed_tokens.weight": table, "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}
    found |= linear("lm_head", VOCABULARY, HIDDEN, 16, generator)
    for i in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        for name, (n, k) in LINEAR.items():
            found |= linear(f"model.layers.{i}.{name}", n, k, bits, generator)
    return found


def tokenizer() -> Tokenizer:
    """Return a tokenizer of 32000 entries: two marks, 256 bytes, and words nobody writes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = ["<s>", "</s>", *letters]
    entries += [f"<{i}>" for i in range(VOCABULARY - len(entries))]
    own = Tokenizer(models.BPE(vocab={entry: i for i, entry in enumerate(entries)}, merges=[]))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.add_special_tokens(["<s>", "</s>"])
    return own


def write(folder: Path, layers: int, bits: int, seed: int) -> None:
    """Write one model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(layers, bits, seed), folder / "model.safetensors", metadata={"format": "pt"})
    own = config(layers, None if bits == 16 else quantization(bits))
    (folder / "config.json").write_text(json.dumps(own, indent=2))
    tokenizer().save(str(folder / "tokenizer.json"))
    marks = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(marks, indent=2))
    print(f"{folder}: {layers} layers, {bits}-bit weights")


def main() -> None:
    """Parse the command line and write the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--int8", action="store_true", help="also write FOLDER-w8a8")
    parser.add_argument("--int4", action="store_true", help="also write FOLDER-w4a16")
    own = parser.parse_args()
    write(own.folder, own.layers, 16, own.seed)
    if own.int8:
        write(own.folder.with_name(own.folder.name + "-w8a8"), own.layers, 8, own.seed)
    if own.int4:
        write(own.folder.with_name(own.folder.name + "-w4a16"), own.layers, 4, own.seed)


if __name__ == "__main__":
    main()
