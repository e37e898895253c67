"""A random Qwen3 of two layers for tests: `tokenizer = tiny_qwen3.tokenizer(); model = tiny_qwen3.model(tokenizer)`."""

from importlib.resources import files

WORDS = ["user assistant system What is Who are you the sum of one two three four five six plus think answer hello\n"]


def tokenizer():
    """A byte-level tokenizer with Qwen3's control tokens and its official chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(WORDS, trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    raw.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    raw.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = (files("trl") / "chat_templates/qwen3.jinja").read_text()
    return made


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
