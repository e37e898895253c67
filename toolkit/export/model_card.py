"""Model cards from what a run folder knows: mix, scores, certificate, licence and data sets.

text = model_card(Path("outputs/hybrid"), "me/hybrid"); adapter = adapter_card(Path("outputs/hybrid"))
"""

import re
from pathlib import Path

from toolkit.export.merge import find_base
from toolkit.family import UNKNOWN, family_of
from toolkit.files import ToolkitError, read_json
from toolkit.recipe import load

NOTICES = {
    "OpenMathReasoning": "NVIDIA's OpenMathReasoning, CC BY 4.0 (https://huggingface.co/datasets/nvidia/OpenMathReasoning)",
    "FineTome": "Maxime Labonne's FineTome-100k, a selection of arcee-ai/The-Tome "
    "(https://huggingface.co/datasets/mlabonne/FineTome-100k)",
}
"""Attributions that data sets ask for; any other Hub source is named with its page."""

TEMPLATE = """---
library_name: {{ 'transformers' if certificate else 'peft' }}
pipeline_tag: text-generation
tags: [qlora, lora, unsloth, trl]
{%- if base and '/' in base %}
base_model: {{ base }}
{%- endif %}
{%- if 'Apache-2.0' in licence %}
license: apache-2.0
{%- endif %}
---

# {{ name }}

{{ 'A QLoRA fine-tune' if certificate else 'A LoRA adapter' }} of {{ base }}{{ ' at ' + revision if revision }}.
{%- if certificate %} The adapter was merged onto the {{ certificate.inputs.onto }} base.{% endif %}
{% if mix %}
## What it was trained on

Shares were planned in {{ mix.unit }} and measured on the compiled rows in every unit.

| source | mode | rows | planned | {{ mix.achieved | join(' | ') }} |
|---|---|--:|--:|{{ '--:|' * mix.achieved | length }}
{%- for source, of in mix.sources.items() %}
| {{ source }} | {{ of.mode }} | {{ '{:,}'.format(of.rows_kept) }} | {{ '{:.1%}'.format(mix.planned[source]) }} |
{%- for share in mix.achieved.values() %} {{ '{:.1%}'.format(share[source]) }} |{% endfor %}
{%- endfor %}
{% endif %}{% if scores %}
## Scores

| mode | metric | base | tuned | n |
|---|---|--:|--:|--:|
{%- for mode, metrics in scores.tuned.items() %}{% for metric, score in metrics.items() %}
| {{ mode }} | {{ metric }} | {{ interval((scores.base[mode] or {})[metric]) }} | {{ interval(score) }} | {{ score.n }} |
{%- endfor %}{% endfor %}
{% endif %}{% if certificate %}
## Parity certificate

{{ certificate.checks | length }} checks passed: these files give the same tokens, template and probabilities as the run
that was evaluated (certificate.md). {{ certificate.kl }}

| measured | value | |
|---|--:|---|
{%- for check in certificate.checks if 'KL' in check.name %}
| {{ check.name }} | {{ '{:.3g}'.format(check.value) }} | {{ check.rule }} {{ '{:.3g}'.format(check.limit) }} |
{%- endfor %}{% for report in certificate.reports %}
| {{ report.name }} | {{ '{:.3g}'.format(report.value) if report.value is not none }} | {{ report.note }} |
{%- endfor %}
{% endif %}
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{{ repo if certificate else base }}", device_map="auto")
{%- if not certificate %}
from peft import PeftModel
model = PeftModel.from_pretrained(model, "{{ repo }}")
{%- endif %}
tokenizer = AutoTokenizer.from_pretrained("{{ repo }}")
messages = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs.to(model.device), max_new_tokens=1024)[0]))
```
{% if certificate and 'gguf/Modelfile' in certificate.files %}
For Ollama: download the folder gguf/ and `ollama create NAME -f Modelfile` in it.
{% endif %}
## Licence and attributions

- Base model: {{ base }}: {{ licence }}.
{%- for notice in notices %}
- Data: {{ notice }}.
{%- endfor %}
"""


def model_card(run: Path, repo: str) -> str:
    """README.md of the Hub repository `repo` with an exported and certified run, front matter included."""
    certificate = read_json(run / "certificate.json")
    inputs, config = certificate["inputs"], read_json(run / "merged" / "config.json")
    family = family_of(config["model_type"])
    return _render(run, repo, inputs["base"], inputs["revision"], family, certificate)


def adapter_card(run: Path) -> str:
    """README.md of a run's adapter/, instead of PEFT's empty template. Names no path of this machine."""
    model = read_json(run / "manifest.json")["model"]
    try:
        base = find_base(model, "4bit", local_only=True)
        family = family_of(read_json(base.folder / "config.json")["model_type"])
        return _render(run, run.resolve().name, base.label, base.revision, family, None)
    except ToolkitError:  # the base has been removed from this machine since
        return _render(run, run.resolve().name, Path(model["name"]).name, None, UNKNOWN, None)


def _render(run: Path, repo: str, base: str, revision: str | None, family, certificate: dict | None) -> str:
    import jinja2

    told = {n: read_json(run / f"{n}.json") if (run / f"{n}.json").is_file() else None for n in ("mix", "eval")}
    sources = load(run / "recipe.yaml").data.sources if (run / "recipe.yaml").is_file() else ()
    notices = [_notice(path) for path in dict.fromkeys(source.path for source in sources)]
    template = jinja2.Environment(keep_trailing_newline=True).from_string(TEMPLATE)
    facts = {"repo": repo, "name": repo.split("/")[-1], "base": base, "revision": revision, "licence": family.licence}
    return template.render(
        facts, mix=told["mix"], scores=told["eval"], certificate=certificate, notices=notices, interval=_interval
    )


def _interval(score: dict | None) -> str:
    if not score or score.get("value") is None:
        return ""
    known = score.get("low") is not None and score.get("high") is not None
    return f"{score['value']:.3g}" + (f" ({score['low']:.3g} to {score['high']:.3g})" if known else "")


def _notice(path: str) -> str:
    known = next((text for word, text in NOTICES.items() if word in path), None)
    if known is None and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists():
        return f"{path} (https://huggingface.co/datasets/{path}; its licence applies)"
    return known or f"{Path(path).name}, a local file"
