"""Every preset's architecture, as transformers builds it: at full size without weights, and small, to train it.

Presets of one family become the same small model, so each small model is trained once: SFT, reward, DPO and PPO.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lowrank_align.architecture import Architecture
from lowrank_align.preset_check import other_figures
from lowrank_align.presets import project_files, read_preset_file

PRESETS = {name: read_preset_file(file) for name, file in project_files().items()}
NAMES = sorted(PRESETS)
KINDS = {"recurrent_layers": "linear_attention", "sliding_layers": "sliding_attention"}


def figures(name: str) -> Architecture:
    found = PRESETS[name].architecture
    assert found is not None
    return found


def experts(a: Architecture, count: int, each: int) -> dict[str, int]:
    if not a.num_experts:
        return {}
    key = "num_local_experts" if a.model_type == "gpt_oss" else "num_experts"
    return {key: count, "num_experts_per_tok": each}


# ---- at full size


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_those_of_the_model(name: str) -> None:
    """Weights and linear layers counted on the meta device; the kinds of layers as transformers lays them out. With
    that model, the check at load has nothing to say."""
    a = figures(name)
    own = {"linears", "other_parameters", "config", "sliding_layers", "recurrent_layers", "num_experts"}
    if not a.num_experts:
        own |= {"num_experts_per_tok", "moe_intermediate_size"}
    values = a.model_dump(exclude=own) | experts(a, a.num_experts, a.num_experts_per_tok) | a.config
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert a.parameters == sum(parameter.numel() for parameter in model.parameters())
    counted: Counter[tuple[str, int, int]] = Counter()
    for path, module in model.get_decoder().named_modules():
        if isinstance(module, nn.Linear):
            counted[path.rsplit(".", 1)[-1], module.in_features, module.out_features] += 1
    stated: Counter[tuple[str, int, int]] = Counter()
    for layer in a.linear_layers():
        stated[layer.name, layer.inputs, layer.outputs] += layer.layers
    assert stated == counted
    kinds = Counter(getattr(config, "layer_types", None) or [])
    assert other_figures(PRESETS[name], name, config) is None
    assert {field: kinds[kind] for field, kind in KINDS.items()} == {field: getattr(a, field) for field in KINDS}


# ---- small


def small(name: str) -> str:
    """The preset's architecture with a width of 64 and a layer of each kind (two where layers share their keys)."""
    a = figures(name)
    kinds = [kind for field, kind in KINDS.items() if getattr(a, field)] + ["full_attention"]
    values: dict[str, Any] = {
        "model_type": a.model_type,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if a.num_key_value_heads == a.num_attention_heads else 2,
        "head_dim": 16,
        "vocab_size": 128,
        "tie_word_embeddings": a.tie_word_embeddings,
        "max_position_embeddings": 256,
        "sliding_window": 8 if a.sliding_layers else None,
        "initializer_range": 0.1,
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        **experts(a, 4, 2),
    }
    if len(kinds) > 1:
        values["layer_types"] = kinds
    if a.num_experts:
        values["moe_intermediate_size"] = 48
    if a.recurrent_layers:
        values |= {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
        values["linear_num_value_heads"] = 4
    if a.model_type == "gemma4_text":
        values |= {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": kinds * 2, "global_head_dim": 32}
        values |= {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128}
        values |= {key: a.config[key] for key in ("use_double_wide_mlp", "final_logit_softcapping")}
    return json.dumps(values, sort_keys=True)


SMALL: dict[str, list[str]] = {}
for _name in NAMES:
    SMALL.setdefault(small(_name), []).append(_name)


def test_every_preset_has_its_small_model() -> None:
    """Those that share one have the same adapters and layout; each family is there."""
    assert sorted(name for names in SMALL.values() for name in names) == NAMES
    for names in SMALL.values():
        assert len({PRESETS[name].layout for name in names}) == 1
        assert len({str(PRESETS[name].settings.get("target_modules")) for name in names if name != "tiny"}) == 1
    families = {json.loads(values)["model_type"] for values in SMALL}
    assert families == {figures(name).model_type for name in NAMES}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`load(values, quantize="none")`: the `Base` of a random model of these figures, on the CPU in fp32."""
    from lowrank_align.base import Base

    root = tmp_path_factory.mktemp("small")

    def make(values: str, quantize: str = "none") -> Any:
        folder = root / f"{SMALL[values][0]}-{quantize}"
        tokenizer().save_pretrained(folder)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(values))).save_pretrained(folder)
        return Base.load(str(folder), quantize=quantize, device="cpu")  # type: ignore[arg-type]

    return make


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a character."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


ROWS = [{"prompt": f"{i}. Say: ", "chosen": f"a good word {i}", "rejected": f"bad {i}"} for i in range(4)]
DEMONSTRATIONS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
NF4 = ("qwen3-4b", "qwen3.5-4b")


@pytest.mark.parametrize(
    ("values", "quantize"),
    [(values, "none") for values in SMALL] + [(small(name), "nf4") for name in NF4],
    ids=[names[0] for names in SMALL.values()] + [f"{name}-nf4" for name in NF4],
)
def test_training(values: str, quantize: str, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of each method, all on one base. Each moves its adapter, which lies on the preset's layers alone; DPO
    begins where policy and reference agree, at ln 2."""
    from safetensors.torch import load_file

    from lowrank_align.progress import Progress
    from lowrank_align.train import train

    monkeypatch.setattr(sys.modules["lowrank_align.train"], "plot_metrics", lambda metrics, folder: [])
    monkeypatch.setenv("LOWRANK_ALIGN_CACHE", str(tmp_path / "cache"))
    preset = PRESETS[next(name for name in SMALL[values] if name != "tiny")]
    base = load(values, quantize)
    assert base.layout == preset.layout
    pairs, demonstrations = tmp_path / "pairs.jsonl", tmp_path / "demonstrations.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    demonstrations.write_text("".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS))
    knobs = {"max_steps": 2, "batch_size": 2, "rank": 2, "sample_steps": 0, "learning_rate": 1e-3, "max_length": 64}
    own: dict[str, dict[str, Any]] = {
        "sft": {"data": str(demonstrations)},
        "reward": {"data": str(pairs), "shift_rows": 2},
        "dpo": {"data": str(pairs)},
        "ppo": {"prompts": str(pairs), "reward": str(tmp_path / "reward"), "max_new_tokens": 3},
    }
    own["ppo"] |= {"minibatches": 1, "ppo_epochs": 1}
    targets = preset.settings["target_modules"]
    for method, more in own.items():
        run = tmp_path / method
        train(method, base=base, out=str(run), progress=Progress(quiet=True), target_modules=targets, **knobs, **more)
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [step for step in metrics if "loss" in step or "objective/kl" in step]
        assert len(steps) == 2
        assert all(math.isfinite(value) for step in steps for value in step.values() if isinstance(value, float))
        if method == "dpo":
            assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        weights = load_file(run / "adapter" / "adapter_model.safetensors")
        assert {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in weights if ".lora_" in key} == set(targets)
        assert any(tensor.any() for key, tensor in weights.items() if key.endswith("lora_B.weight"))


# ---- models that also see

SEEING: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": {"model_type": "gemma3_text"}, "vision_config": {"model_type": "siglip_vision_model"}},
    "mistral3": {"text_config": {"model_type": "ministral3"}, "vision_config": {"model_type": "pixtral"}},
    "gemma4": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 128,
            "global_head_dim": 32,
        },
        "vision_config": None,
        "audio_config": None,
    },
}
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
TEXT |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 16}


@pytest.mark.parametrize("family", SEEING)
def test_of_a_model_that_sees_the_language_model_is_taken(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits are those of the whole model in plain transformers; there is nothing else to put adapters on."""
    from transformers import AutoModelForImageTextToText

    from lowrank_align.base import Base

    monkeypatch.setenv("LOWRANK_ALIGN_CACHE", str(tmp_path / "cache"))
    given = SEEING[family]
    vision = given["vision_config"] and given["vision_config"] | VISION
    parts = given | {"text_config": given["text_config"] | TEXT, "vision_config": vision}
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **parts)).eval()
    folder = tmp_path / family
    whole.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    base = Base.load(str(folder), quantize="none", device="cpu")
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert base.config.model_type == given["text_config"]["model_type"]
    assert not [name for name, _ in base.model.named_modules() if "vision" in name or "visual" in name]
