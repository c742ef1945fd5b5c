"""Bring one causal language model and its tokenizer into memory: quantised, frozen, dropout off, checked."""

import logging
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers import __version__ as transformers_version
from transformers import logging as transformers_logging

from lowrank_align import hub
from lowrank_align.devices import Attention, Quantize, check_device, pick_dtype
from lowrank_align.errors import EnvironmentProblem, UserError, is_out_of_memory, is_panic
from lowrank_align.progress import Progress
from lowrank_align.provenance import weight_files, weights_hash
from lowrank_align.remote_code import NEEDED, asks_for_code, is_trusted
from lowrank_align.terminal import make_console

log = logging.getLogger(__name__)

MOST = {"num_hidden_layers": 1000, "num_experts": 10_000, "num_local_experts": 10_000, "n_routed_experts": 10_000}


@dataclass(frozen=True)
class Loaded:
    """A frozen base as it came from disk."""

    model: Any
    tokenizer: Any
    name: str  # as the user gave it
    path: Path  # the folder it was read from
    weights_hash: str  # of the weight files: the same however it is quantised
    compute_dtype: torch.dtype
    quantize: Quantize = "none"


def load_frozen(
    name: str,
    *,
    quantize: Quantize = "nf4",
    device: str = "auto",
    dtype: str = "auto",
    attention: Attention = "auto",
    float_storage: bool = False,
) -> Loaded:
    """Load `name` (a folder, a hub id, or `tiny`) with every weight frozen and every dropout at 0.

    With `float_storage` packed 4-bit weights lie in tensors of the computing precision, which FSDP can shard. Raises
    UserError where the model is not to be found or is no causal language model, EnvironmentProblem where the machine
    lacks what was asked for.
    """
    where = check_device(device, quantize, attention)
    compute = pick_dtype(dtype, where)
    path = model_folder(name)
    config, tokenizer = read_config(name), _read_tokenizer(path, name)
    weight_files(path)  # that its index leads nowhere else is known before anything is read
    try:
        storage = compute if float_storage else torch.uint8
        model = _from_pretrained(path, name, config, quantize, where, compute, attention, storage)
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise EnvironmentProblem(f"{name}: does not fit on {where}; try --quantize nf4 or a smaller model") from error
    if where.type == "cpu" and quantize != "none":
        _leave_file(model)
    model.requires_grad_(False)
    _switch_dropout_off(model)
    _keep_4bit_layout(model)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return Loaded(model, tokenizer, name, path, weights_hash(path), compute, quantize)


def model_folder(name: str, *, weights: bool = True) -> Path:
    """The local folder of a model: `tiny` is built when missing, a hub id comes from the hub's cache or is fetched.

    Without `weights`, those of a hub model are not fetched: config and tokenizer are there, that is all.
    """
    if name == "tiny":
        return _tiny()
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"{name}: no config.json in this folder; --model takes a transformers model folder, a hub id or tiny"
            )
        for file in path.iterdir():
            if file.exists() and not file.is_file() and not file.is_dir():
                raise UserError(f"{file}: a pipe or device, which may never end; a model's folder holds files")
        return path.resolve()
    if path.exists():
        raise UserError(f"{name}: is a file; --model takes a model folder, a hub id or tiny")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise UserError(f"{name}: no such model folder{_neighbour(path)}")
    return hub.fetch(name, weights=weights, hint=_neighbour(path))


def read_tokenizer(name: str) -> tuple[Any, int]:
    """A model's tokenizer and its context in tokens, without its weights, so that rows are checked before it loads."""
    config = read_config(name)
    return _read_tokenizer(model_folder(name, weights=False), name), context_tokens(config.get_text_config())


def read_config(name: str) -> Any:
    """A model's `config.json`, as transformers reads it. UserError where it is no causal language model's."""
    path = model_folder(name, weights=False)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=is_trusted(path))
    except Exception as error:  # what a damaged file raises in the library is anything
        raise UserError(f"{name}: config.json cannot be used: {_why(error)}") from error
    _refuse_unloadable(path, name, config)
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UserError(
            f"{name}: its weights are already quantised ({method}); "
            "give the 16-bit model, it is quantised while loading"
        )
    has_own = is_trusted(path) and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not has_own and not _is_causal(config):
        raise UserError(f"{name}: a {config.model_type} is no causal language model; give one as --model")
    return config


def _refuse_unloadable(path: Path, name: str, config: Any) -> None:
    """What a config may ask of transformers without a word to the user: an adapter, code from the hub, no end."""
    if (path / "adapter_config.json").exists():
        what = "an adapter lies beside it (adapter_config.json), which transformers would put on it in silence"
        raise UserError(f"{name}: {what}; move it to a folder of its own and name that with --adapter")
    parts = [config, *(getattr(config, key, None) for key in config.sub_configs)]
    if found := next((a for part in parts if "/" in str(a := getattr(part, "_attn_implementation", ""))), None):
        raise UserError(f"{name}: config.json asks for {found}, attention code from the hub, which is not loaded")
    text = config.get_text_config()
    for key, most in MOST.items():
        count = getattr(text, key, None)
        if isinstance(count, int) and count > most:
            raise UserError(f"{name}: config.json: {key}: {count}, more than any model has ({most} are taken)")


def context_tokens(config: Any) -> int:
    """The longest sequence a model has positions for."""
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def _from_pretrained(
    path: Path,
    name: str,
    config: Any,
    quantize: Quantize,
    device: torch.device,
    compute: torch.dtype,
    attention: Attention,
    storage: torch.dtype,
) -> Any:
    options: dict[str, Any] = {"dtype": compute, "device_map": {"": device}, "use_safetensors": True}
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # what does not fit is told below
    config, renamed = language_model(config)
    options |= {"key_mapping": renamed} if renamed else {}
    if attention != "auto":
        options["attn_implementation"] = attention
    if quantize == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_quant_storage=storage,
        )
    elif quantize == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # says so at every product
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if config.model_type in ("gemma2", "gpt_oss") and attention == "auto":
        options["attn_implementation"] = "eager"  # these two refuse SDPA
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, config=config, trust_remote_code=is_trusted(path), **options
        )
    except Exception as error:
        known = isinstance(error, ValueError | OSError | KeyError | RuntimeError | SafetensorError)
        if is_out_of_memory(error) or not (known or is_trusted(path)):
            raise
        raise UserError(f"{name}: cannot be loaded as a causal language model: {_first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{name}: {len(missing)} weights are missing from its files (first: {missing[0]}); not a whole causal model"
        )
    misshapen = sorted(key for key, *_ in info["mismatched_keys"])
    if misshapen:
        raise UserError(
            f"{name}: {len(misshapen)} weights are not of the shape that its config.json says (first: {misshapen[0]})"
        )
    return model


def language_model(config: Any) -> tuple[Any, dict[str, str]]:
    """Of a model that also sees or hears, the part that reads and writes, and how its weights are called in the files.

    Adapters on a vision tower would only take memory, and some of these models have no causal class as a whole.
    """
    text = config.get_text_config()
    if text is config or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config, {}
    text.tie_word_embeddings = config.tie_word_embeddings
    return text, {
        r"^(?:model\.)?language_model\.(?!lm_head)(?:model\.)?": "model.",
        r"^language_model\.lm_head": "lm_head",
    }


def _is_causal(config: Any) -> bool:
    try:
        return type(language_model(config)[0]) in MODEL_FOR_CAUSAL_LM_MAPPING
    except ValueError:  # several models in one, none of them the language model
        return False


def _read_tokenizer(path: Path, name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=is_trusted(path))
    except BaseException as error:  # as above; the tokenizers library raises bare Exceptions, and panics
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise UserError(
            f"{name}: its tokenizer cannot be loaded (is tokenizer.json there and whole?): {_why(error)}"
        ) from error


def _switch_dropout_off(model: nn.Module) -> None:
    """A base with dropout (GPT-2's 0.1) would make policy and reference differ at step 0. LoRA has its own, later."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute in ("attention_dropout", "dropout", "hidden_dropout", "jitter_noise"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)


def _leave_file(model: nn.Module) -> None:
    """What stays unquantised may still lie in the mapped weight file, all of which then stays in memory."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def _keep_4bit_layout(model: nn.Module) -> None:
    """On CPUs with AVX-512-BF16, bitsandbytes repacks 4-bit weights in a no-grad forward, and training then breaks.

    A weight that FSDP puts together again is a plain parameter: its layer keeps the scales too.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            module.quant_state = getattr(module.weight, "quant_state", None)  # type: ignore[assignment]


def _tiny() -> Path:
    """The embedded base; its first making is shown, as it takes a minute."""
    from lowrank_align.tiny import tiny_path

    progress, begun = Progress(make_console(stderr=True)), False

    def tell(step: int, steps: int, loss: float) -> None:
        nonlocal begun
        if not begun:
            progress.note("tiny is not in the cache yet: pretraining it, once")
            progress.start("pretraining tiny", steps, 0)
            begun = True
        progress.step(step, {"loss": loss})

    try:
        return tiny_path(progress=tell)
    finally:
        progress.close()


def _neighbour(path: Path) -> str:
    parent = path.parent
    names = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    close = get_close_matches(path.name, names, n=1)
    return f" (did you mean {parent / close[0]}?)" if close else ""


def _why(error: BaseException) -> str:
    """Transformers answers an unknown family with two paragraphs on upgrading, and one with code by its own option."""
    if asks_for_code(error):
        return NEEDED
    unknown = re.search(r"has model type `([^`\s]+)` but", str(error))
    return (
        f"model_type {unknown[1]} is not known to transformers {transformers_version}"
        if unknown
        else _first_line(error)
    )


def _first_line(error: BaseException) -> str:
    """With the next one where it ends with a colon and says nothing by itself."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[:2]) if lines[0].endswith(":") else lines[0]
