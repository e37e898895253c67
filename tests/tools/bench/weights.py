"""Random weights in a real Qwen3's shape, 4-bit as Unsloth's `*-bnb-4bit` checkpoints, written a layer at a time.

from pathlib import Path; from tests.tools.bench import weights; weights.write(Path("/tmp/4B"), weights.CONFIGS["4B"])     # model_name: /tmp/4B; no download
"""

import itertools
import json
from pathlib import Path

from toolkit.files import POCKET, ROOT

SEED, SCALE = 3407, 0.02
CONFIGS = json.loads((ROOT / "tests/support/files/qwen3_configs.json").read_text(encoding="utf-8"))["configs"]
SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "tie_word_embeddings",
)  # fmt: skip


def write(folder: Path, shape: dict) -> Path:
    """config.json, the pocket model's tokenizer, and one safetensors file a layer; the vocabulary is the shape's own."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    tokenizer.save_pretrained(folder)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = Qwen3Config(
        **{name: shape[name] for name in SIZES if name in shape},
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        quantization_config=BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype="bfloat16").to_dict(),
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        empty = Qwen3ForCausalLM(config).state_dict()
    torch.manual_seed(SEED)
    index = {}
    if shape["tie_word_embeddings"]:
        del empty["lm_head.weight"]
    layers = itertools.groupby(empty, lambda name: name.partition(".layers.")[2].partition(".")[0])
    for number, (_, names) in enumerate(layers):
        file = f"model-{number:05}.safetensors"
        tensors = {part: tensor for name in names for part, tensor in _tensor(name, empty[name].shape).items()}
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def _tensor(name: str, size) -> dict:
    """A norm of ones, a random table, or a random matrix as bitsandbytes stores it: packed, and its state's tensors."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    if "norm" in name:
        return {name: torch.ones(size, dtype=torch.bfloat16)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = (torch.randn(size, device=device) * SCALE).to(torch.bfloat16)
    if "_proj" not in name:
        return {name: weight.cpu()}
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    parts = {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return {key: tensor.cpu() for key, tensor in ({name: packed} | parts).items()}
