"""A random Qwen3 of two layers for tests: `model = tiny_qwen3.model(export_fixtures.tokenizer())`."""


def model(tokenizer, adapter_works: bool = True):
    """A random two-layer Qwen3 with an adapter: a random one, or a fresh one that changes nothing."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    base = Qwen3ForCausalLM(config)
    base.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    return get_peft_model(
        base, LoraConfig(r=4, init_lora_weights=not adapter_works, target_modules=["q_proj", "v_proj"])
    )
