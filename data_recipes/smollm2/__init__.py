"""SmolLM2-135M: a real pretrained model that a package carries."""
