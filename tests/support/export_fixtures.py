"""Small seeded models, tokenizers and runs for the tests of the export: `folder = base_model(tmp_path)`."""

import hashlib
import json
from pathlib import Path

import numpy as np

from tests.support import models

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # Qwen2's pre-tokenizer
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def qwen_template() -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()


def tokenizer(vocabulary: int = 500):
    """A byte-level BPE with Qwen3's pre-tokenizer, special tokens and chat template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(BPE())
    bpe.normalizer = normalizers.NFC()
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"), bytes_only])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=bytes_only.alphabet(), show_progress=False)
    bpe.train_from_iterator([qwen_template()], trainer)
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    bpe.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = qwen_template()
    return fast


def base_model(folder: Path, tied: bool = True, dtype: str = "bfloat16") -> Path:
    """A 4-layer Qwen3 with random weights, wide enough for K-quants."""
    import torch

    tok = tokenizer()
    ids = {"eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id, "bos_token_id": None}
    model = models.qwen3(models.WIDE, 3407, vocab_size=512, num_hidden_layers=4, tie_word_embeddings=tied, **ids)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def dynamic_4bit(base: Path, kept: str) -> Path:
    """`base` laid out like unsloth/Qwen3-0.6B-unsloth-bnb-4bit, beside it: NF4 tensors, one module left in 16 bits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    settings = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head", kept])
    folder = base.with_name(f"{base.name}-unsloth-bnb-4bit")
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def run_folder(folder: Path, base: Path, **lora) -> Path:
    """What training leaves behind, with an adapter that really changes the model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": PROJECTIONS} | lora))
    for name, weight in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            weight.data += torch.randn_like(weight) * 0.02
    model.save_pretrained(folder / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "adapter")
    manifest = {"model": {"name": str(base), "revision": None, "load_in_4bit": True}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def random_checkpoint(
    folder: Path, layers: int, tied: bool, hidden: int = 256, vocabulary: int = 512, scale: float = 0.05
) -> Path:
    """A Qwen3 of any depth, without torch: the same bits on every machine."""
    heads, kv, size, inner = 4, 1, 64, hidden
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {layer + f"{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        shapes |= {layer + f"self_attn.{n}_norm.weight": (size,) for n in "qk"}
        shapes |= {
            layer + "self_attn.q_proj.weight": (heads * size, hidden),
            layer + "self_attn.k_proj.weight": (kv * size, hidden),
            layer + "self_attn.v_proj.weight": (kv * size, hidden),
            layer + "self_attn.o_proj.weight": (hidden, heads * size),
        }
        shapes |= {layer + f"mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        shapes |= {layer + "mlp.down_proj.weight": (hidden, inner)}
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "model.safetensors", shapes, scale)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": size,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": tied,
        "model_type": "qwen3",
        "attention_bias": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer().save_pretrained(folder)
    return folder


def _write(file: Path, shapes: dict, scale: float) -> None:
    """Normal numbers cut to bf16, in the safetensors layout."""
    random = np.random.Generator(np.random.PCG64(3407))
    table, data, end = {}, [], 0
    for name, shape in shapes.items():
        values = random.standard_normal(int(np.prod(shape)), dtype=np.float32) * np.float32(scale)
        data.append((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end := end + len(data[-1])]}
    header = json.dumps(table).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"".join(data))


def read_gguf(path: Path):
    """A GGUF by gguf's own reader, on a plain view of the file: a slice of a memmap takes 13 µs, of an array 0.1."""
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            self.data = np.asarray(self.data)
            return super()._get(offset, dtype, count, override_order)

    return Reader(path)


def header_value(path: Path, key: str):
    """A value of a GGUF's header, None where it has no such key."""
    field = read_gguf(path).fields.get(key)
    return field and field.contents()


def gguf_tensor(path: Path, name: str):
    """A tensor of a GGUF: its `data`, and `data_offset` in the file."""
    return next(tensor for tensor in read_gguf(path).tensors if tensor.name == name)


def gguf_tensors(path: Path) -> dict[str, tuple[str, str]]:
    """{tensor: (type, sha256 of its bytes)} of a GGUF file."""
    tensors = read_gguf(path).tensors
    return {t.name: (t.tensor_type.name, hashlib.sha256(t.data.tobytes()).hexdigest()) for t in tensors}


def killed_export(run: Path, at: str) -> int:
    """Exports in a process that kills itself (SIGKILL) when a half-written file `at` appears; its exit status."""
    import subprocess
    import sys

    code = f"""
import os, pathlib, signal, threading, time
def watch():
    while not list(pathlib.Path({str(run)!r}).glob({at!r})):
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)
from toolkit.export import export
threading.Thread(target=watch, daemon=True).start()
export({str(run)!r}, quants=("f16", "q4_k_m"))
"""
    root = Path(__file__).resolve().parents[2]
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True).returncode
