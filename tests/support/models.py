"""Random toy models in two sizes: SMALL is computed with in memory, WIDE is quantized too.

model = models.tuned(export_fixtures.tokenizer()); config = Qwen3Config(vocab_size=512, **models.WIDE)
"""

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
WIDE = SMALL | {
    "hidden_size": 256,
    "intermediate_size": 768,
    "max_position_embeddings": 4096,
    "initializer_range": 0.06,
}
"""Rows of 256 numbers, as K-quants need them."""


def qwen3(sizes: dict, seed: int, **config):
    """A random Qwen3 of a size; `config` holds vocabulary, token ids and what differs."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    return Qwen3ForCausalLM(Qwen3Config(**sizes | {"head_dim": head} | config))


def tuned(tokenizer, adapter_works: bool = True):
    """A SMALL Qwen3 with an adapter: a random one, or a fresh one that changes nothing."""
    from peft import LoraConfig, get_peft_model

    base = qwen3(SMALL, 0, vocab_size=len(tokenizer))
    base.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    return get_peft_model(
        base, LoraConfig(r=4, init_lora_weights=not adapter_works, target_modules=["q_proj", "v_proj"])
    )
