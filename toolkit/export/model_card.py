"""A model card from what a run folder knows: mix, scores, certificate, licence and data sets.

text = model_card(Path("outputs/hybrid"), "me/hybrid")
"""

import json
import re
from pathlib import Path

from toolkit.files import read_json
from toolkit.recipe import load

NOTICES = {
    "OpenMathReasoning": "NVIDIA's OpenMathReasoning, CC BY 4.0 (https://huggingface.co/datasets/nvidia/OpenMathReasoning)",
    "FineTome": "Maxime Labonne's FineTome-100k, a selection of arcee-ai/The-Tome "
    "(https://huggingface.co/datasets/mlabonne/FineTome-100k)",
}
"""Attributions that data sets ask for; any other Hub source is named with its page."""


def model_card(run: Path, repo: str) -> str:
    """README.md of the repository, front matter included."""
    certificate = read_json(run / "certificate.json")
    base = certificate["inputs"]["base"]
    parts = [
        _front_matter(base),
        f"# {repo.split('/')[-1]}",
        _introduction(base, certificate),
        _mix(run),
        _scores(run),
        _certificate(certificate),
        _use(repo, certificate),
        _licence(base, run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(base: str) -> str:
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [qwen3, qlora, unsloth, trl, gguf]",
    ]
    if "/" in base:
        lines.append(f"base_model: {base}")
    if _is_qwen3(base):
        lines.append("license: apache-2.0")
    return "\n".join([*lines, "---"])


def _is_qwen3(base: str) -> bool:
    return re.match(r"(Qwen|unsloth)/Qwen3-", base) is not None


def _introduction(base: str, certificate: dict) -> str:
    inputs = certificate["inputs"]
    revision = f" at {inputs['revision']}" if inputs["revision"] else ""
    return (
        f"A QLoRA fine-tune of {base}{revision}, trained for both of Qwen3's modes, thinking and non-thinking. "
        f"The adapter was merged onto the {inputs['onto']} base."
    )


def _mix(run: Path) -> str:
    """Planned and achieved shares of every source."""
    if not (run / "mix.json").is_file():
        return ""
    mix = read_json(run / "mix.json")
    units = list(mix["achieved"])
    lines = [
        "## What it was trained on",
        "",
        f"Shares were planned in {mix['unit']} and measured on the compiled rows in every unit.",
        "",
        f"| source | mode | rows | planned | {' | '.join(units)} |",
        "|---|---|--:|--:|" + "--:|" * len(units),
    ]
    for name, source in mix["sources"].items():
        shares = " | ".join(f"{mix['achieved'][unit][name]:.1%}" for unit in units)
        lines.append(f"| {name} | {source['mode']} | {source['rows_kept']:,} | {mix['planned'][name]:.1%} | {shares} |")
    return "\n".join(lines)


def _scores(run: Path) -> str:
    """Base beside tuned, with intervals."""
    if not (run / "eval.json").is_file():
        return ""
    scores = read_json(run / "eval.json")
    lines = ["## Scores", "", "| mode | metric | base | tuned | n |", "|---|---|--:|--:|--:|"]
    for mode, metrics in scores["tuned"].items():
        for metric, value in metrics.items():
            before = scores["base"].get(mode, {}).get(metric)
            lines.append(f"| {mode} | {metric} | {_interval(before)} | {_interval(value)} | {value.get('n', '')} |")
    return "\n".join(lines)


def _interval(score: dict | None) -> str:
    if score is None or score.get("value") is None:
        return ""
    known = score.get("low") is not None and score.get("high") is not None
    return f"{score['value']:.3g}" + (f" ({score['low']:.3g} to {score['high']:.3g})" if known else "")


def _certificate(certificate: dict) -> str:
    lines = [
        "## Parity certificate",
        "",
        f"{len(certificate['checks'])} checks passed: these files give the same tokens, template and "
        "probabilities as the run that was evaluated (certificate.md).",
        "",
        "| measured | value | |",
        "|---|--:|---|",
    ]
    lines += [f"| {c['name']} | {c['value']:.3g} | |" for c in certificate["checks"] if "KL" in c["name"]]
    lines += [f"| {r['name']} | {r['value']:.3g} | {r['note']} |" for r in certificate["reports"]]
    return "\n".join(lines)


def _use(repo: str, certificate: dict) -> str:
    lines = [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(repo)}, device_map='auto')",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(repo)})",
        "messages = [{'role': 'user', 'content': 'Hello'}]",
        "inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=True,",
        "                                       return_dict=True, return_tensors='pt').to(model.device)",
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=1024)[0]))",
        "```",
    ]
    if any(name.endswith("Modelfile") for name in certificate["files"]):
        lines += ["", "For Ollama: download the folder gguf/ and `ollama create NAME -f Modelfile` in it."]
    return "\n".join(lines)


def _licence(base: str, run: Path) -> str:
    lines = ["## Licence and attributions", ""]
    licence = ", by the Qwen team, Apache-2.0" if _is_qwen3(base) else "; its licence applies"
    lines.append(f"- Base model: {base}{licence}.")
    sources = load(run / "recipe.yaml").data.sources if (run / "recipe.yaml").is_file() else ()
    for path in dict.fromkeys(s.path for s in sources):
        notice = next((text for word, text in NOTICES.items() if word in path), None)
        lines.append(f"- Data: {notice or _page_of(path)}.")
    return "\n".join(lines)


def _page_of(path: str) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists():
        return f"{path} (https://huggingface.co/datasets/{path}; its licence applies)"
    return f"{Path(path).name}, a local file"
