"""What a preset says of a model, held against the model itself, whenever one is loaded with a preset.

The model is always right: where the two differ, its own figures and tokens are used, and a line says so. A preset whose
figures are those of another model makes a plan wrong, one with another end of turn a model that never stops.
"""

from typing import Any

from lowrank_align.architecture import Architecture, UnknownFigures
from lowrank_align.config import ExportSettings, ModelSettings, ReadingSettings
from lowrank_align.data.chat import Renderer
from lowrank_align.presets import Preset, read_preset
from lowrank_align.skeleton import stated_figures

# What memory depends on; a context that grew or a norm more is no other model.
FIGURES = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "sliding_layers",
    "recurrent_layers",
    "num_experts",
)
SHOWN = 3  # differences a line names


def preset_lines(settings: ModelSettings | ReadingSettings, renderer: Renderer, config: Any) -> list[str]:
    """A line for everything in which the model differs from the preset that `settings` names; none without a preset.

    `renderer` has the model's tokenizer and template, `config` is its transformers config.
    """
    if settings.preset is None:
        return []
    preset = read_preset(settings.preset)
    found = [other_figures(preset, settings.model, config), _other_pad(preset, renderer)]
    if renderer.template_source == "the model's own":
        found += [_other_end(preset, renderer), _other_template(preset, renderer)]
    found.append(_no_switch(preset, settings, renderer))
    return [f"preset {settings.preset}: {line}" for line in found if line]


def from_preset(settings: ModelSettings | ReadingSettings | ExportSettings, setting: str) -> bool:
    """Whether the preset says what `settings` has, so that nobody needs to be told that it is without effect."""
    if settings.preset is None:
        return False
    said = read_preset(settings.preset).knobs(str(getattr(settings, "method", "")))
    return setting in said and bool(said[setting] == getattr(settings, setting))


def other_figures(preset: Preset, model: str, config: Any) -> str | None:
    """In which figures a model is another than the preset's, as part of a line; None where in none."""
    expected = preset.architecture
    if expected is None:
        return None
    try:
        found = stated_figures(config, model)
    except UnknownFigures:  # a family with other figures than a decoder's
        return None
    differing = [name for name in FIGURES if _differ(name, expected, found)]
    if not differing:
        return None
    shown = [f"{name} {getattr(expected, name)}, not {getattr(found, name)}" for name in differing[:SHOWN]]
    more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    figures = f"({'; '.join(shown)}{more})"
    if model == preset.model:
        return f"its figures are not those of {model} {figures}; `lowrank-align plan` goes by the preset's"
    return f"is for another model than {model} {figures}; its settings are taken all the same"


def _differ(name: str, expected: Architecture, found: Architecture) -> bool:
    if name == "sliding_layers" and (found.sliding_window or 0) >= found.max_position_embeddings:
        return expected.sliding_layers != 0  # a window as long as the context is none
    return bool(getattr(expected, name) != getattr(found, name))


def _other_pad(preset: Preset, renderer: Renderer) -> str | None:
    expected, found = preset.tokens.pad, renderer.tokenizer.pad_token
    if expected is None or found == expected:
        return None
    if found is None:
        return f"pads with {expected}, but the model's tokenizer has no pad token; another is taken (and masked)"
    return f"pads with {expected}, but the model's tokenizer with {found}; that is taken (and masked)"


def _other_end(preset: Preset, renderer: Renderer) -> str | None:
    expected = preset.tokens.end_of_turn
    if expected is None:
        return None
    if renderer.turn_end_id is None:
        return f"ends turns with {expected}, but the model's template with no token of its own; the model's is used"
    found = renderer.tokenizer.convert_ids_to_tokens(renderer.turn_end_id)
    if found == expected:
        return None
    return f"ends turns with {expected}, but the model's template with {found}; the model's is used"


def _other_template(preset: Preset, renderer: Renderer) -> str | None:
    if preset.template_hash is None or renderer.template_hash() == preset.template_hash:
        return None
    return (
        f"was written for another chat template (SHA-256 {preset.template_hash[:12]}, the model's "
        f"{renderer.template_hash()[:12]}); the model's is used: look at a few rows with `lowrank-align show`"
    )


def _no_switch(preset: Preset, settings: ModelSettings | ReadingSettings, renderer: Renderer) -> str | None:
    if settings.thinking is None or renderer.thinking_switch is not None:
        return None
    return (
        f"turns thinking {'on' if settings.thinking else 'off'}, but the chat template has no switch for it; left out"
    )
