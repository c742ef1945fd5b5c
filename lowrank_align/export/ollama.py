"""A Modelfile, with which `ollama create NAME` takes a folder of safetensors (or a GGUF file) as it is.

Ollama reads chat templates only as Go templates; without one it guesses from a list of known Jinja texts, and a guess
that fails answers badly without a word. So the template and the texts that end a turn are always given.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_align.export.companions import GENERATION, adds_bos
from lowrank_align.export.gotemplate import go_template
from lowrank_align.export.source import Source

MODELFILE = "Modelfile"
TEMPERATURE, TOP_P = 0.7, 0.95  # as `lowrank-align chat` has them
DEFAULT_CONTEXT = 4096  # Ollama's own
NAMES = {"ollama": "Ollama", "gguf": "llama.cpp"}
# What any of `import_warnings` comes to, for the last line.
IN_SHORT = {"ollama": "Ollama may not import it", "gguf": "llama.cpp may cut prompts otherwise"}
# What its importer is documented to take as safetensors (docs.ollama.com/import); newer versions take more.
IMPORTED = {
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Ministral3ForCausalLM", "GemmaForCausalLM",
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Phi3ForCausalLM", "Qwen2ForCausalLM",
    "Qwen3ForCausalLM", "Olmo3ForCausalLM", "CohereForCausalLM", "GptOssForCausalLM",
}  # fmt: skip


@dataclass(frozen=True)
class Modelfile:
    """Its text, and what a user should know of it, a line each."""

    text: str
    warnings: list[str]


def modelfile(source: Source, start: str = ".") -> Modelfile:
    """The Modelfile for the weights at `start`."""
    renderer = source.renderer
    tokenizer = renderer.tokenizer
    bos = tokenizer.bos_token if adds_bos(tokenizer) else None  # Ollama adds it then, as the settings tell it
    found = go_template(renderer.template, bos, renderer.answer_prefix)
    stops = dict.fromkeys([renderer.template.turn_end.strip(), *map(tokenizer.convert_ids_to_tokens, renderer.end_ids)])
    parameters: list[tuple[str, Any]] = [("stop", text) for text in stops if text]
    parameters += list(_sampling(source.base).items())
    if source.context < DEFAULT_CONTEXT:
        parameters.append(("num_ctx", source.context))
    departures = [f"TEMPLATE is only close to the chat template ({text})" for text in found.departures[:1]]
    lines = [
        "# ollama create NAME -f Modelfile   (in this folder)",
        *(f"# {text}" for text in departures),
        f"FROM {start}",
        f'TEMPLATE """{found.text}"""',
        *(f"PARAMETER {name} {_quoted(value)}" for name, value in parameters),
    ]
    return Modelfile("\n".join(lines) + "\n", departures)


def import_warnings(folder: Path, to: str) -> list[str]:
    """What may keep Ollama from importing a model folder, or it and llama.cpp from reading its prompts as trained."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = []
    if to == "ollama" and not set(config.get("architectures") or []) & IMPORTED:
        names = ", ".join(config.get("architectures") or ["this architecture"])
        found.append(f"Ollama is not known to import {names} from safetensors; if it refuses, use --to gguf")
    if not (folder / "tokenizer.model").is_file() and _is_sentencepiece(folder / "tokenizer.json"):
        what = "cannot read its vocabulary" if to == "ollama" else "may cut prompts into other tokens than in training"
        found.append(f"the base has a SentencePiece tokenizer without its tokenizer.model: {NAMES[to]} {what}")
    return found


def _sampling(base: Path) -> dict[str, Any]:
    """How the base's makers want it sampled, else as `chat` does."""
    file = base / GENERATION
    own = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = {"temperature": own.get("temperature") or TEMPERATURE, "top_p": own.get("top_p") or TOP_P}
    if own.get("top_k"):
        found["top_k"] = own["top_k"]
    return found


def _is_sentencepiece(file: Path) -> bool:
    if not file.is_file():
        return False
    model = json.loads(file.read_text(encoding="utf-8")).get("model") or {}
    return bool(model.get("byte_fallback")) or model.get("type") == "Unigram"


def _quoted(value: Any) -> str:
    """A parameter's value. In quotes nothing is escaped; in three pairs of them, quotes and line breaks are text."""
    if not isinstance(value, str):
        return str(value)
    return f'"""{value}"""' if '"' in value or "\n" in value else f'"{value}"'
