"""What every test starts from: no network, seeded generators, and the real models and data where they are present."""

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# conftest is imported before any test module, so before the libraries that read these, which they do once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores already
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see lowrank_align/__init__.py

# Same examples in every run, and no deadline: a slow machine is no defect.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data: `LOWRANK_ALIGN_SHARED`, or `../shared` beside the checkout."""
    folder = Path(os.environ.get("LOWRANK_ALIGN_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no real models and data: {folder} is not there (LOWRANK_ALIGN_SHARED names another folder)")
    return folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same state of the global generators."""
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):  # a test that needs no torch does not wait for it
        torch.manual_seed(0)


TURNS = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: a random Llama in fp32 (width 64, 2 layers) that reads ASCII, a token a character but for a few
    merges. Its weights are large enough for logits that differ by several nats."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "a"), ("e", "r")]
    letters = ["Ċ", "Ġ", *map(chr, range(33, 127)), *("".join(merge) for merge in merges)]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(letters)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TURNS
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny_llama"
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of the tests' own, for `LOWRANK_ALIGN_CACHE`."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base from the user's cache; pretrained first (about a minute) where it is not there.

    Of several processes one does it, and the others wait.
    """
    from filelock import FileLock

    from lowrank_align.tiny import tiny_path

    with FileLock(tmp_path_factory.getbasetemp().parent / "tiny.lock"):
        return tiny_path()


@pytest.fixture(scope="session")
def tiny_base(tiny_llama: Path) -> Any:
    """`tiny_llama` in memory, unquantised; every test that trains on it puts its own roles on it."""
    from lowrank_align.base import Base

    return Base.load(str(tiny_llama), quantize="none", device="cpu")


@pytest.fixture
def make_method(tiny_base: Any, tmp_path: Path) -> Callable[..., Any]:
    """`make_method("dpo", rows, **knobs)`: a method on the tiny base and the rows as its items, ready for `step`.

    Every LoRA B of the trained roles gets random numbers, unless `untouched`: as if some steps were behind it.
    """
    import torch

    from lowrank_align.config import METHODS, resolve
    from lowrank_align.data.chat import Renderer
    from lowrank_align.data.load import load_rows
    from lowrank_align.methods import method_class

    def make(method: str, rows: list[dict[str, Any]], *, untouched: bool = False, **knobs: Any) -> tuple[Any, Any]:
        field = METHODS[method].rows_field
        data = write_rows(tmp_path / "rows.jsonl", rows)
        given = {"model": tiny_base.name, field: str(data), "out": str(tmp_path / "run"), "rank": 4}
        settings = resolve(METHODS[method], {**given, "max_length": 256, **knobs})
        kind = method_class(method)
        renderer = Renderer(tiny_base.tokenizer, max_length=settings.max_length)
        renderer = renderer.with_prefix(kind.answer_prefix(settings))
        rendered = [kind.render(row, renderer, settings).tree for row in load_rows(data, expect=kind.shapes).rows]
        items = [tree for tree in rendered if tree is not None]
        tiny_base.enable_checkpointing(settings.gradient_checkpointing)
        made = kind(tiny_base, settings, renderer)
        made.add_roles()
        generator = torch.Generator().manual_seed(1)
        for role in made.trained if not untouched else ():
            for name, parameter in tiny_base.trainable_parameters(role).items():
                parameter.grad = None
                if "lora_B" in name:
                    parameter.data.normal_(0, 0.1, generator=generator)
        return made, items

    return make


@pytest.fixture
def run(tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`run("dpo", rows, "name", **knobs)`: a whole training run on the tiny base; its folder `tmp_path / name`.

    Without the plots, which would take half of the time; `test_plots.py` is about them.
    """
    from lowrank_align.config import METHODS
    from lowrank_align.progress import Progress
    from lowrank_align.train import train

    monkeypatch.setattr(sys.modules["lowrank_align.train"], "plot_metrics", lambda metrics, folder: [])

    def train_it(
        method: str, rows: list[dict[str, Any]], name: str, *, progress: Any = None, stop: Any = None, **knobs: Any
    ) -> Path:
        data = write_rows(tmp_path / "rows.jsonl", rows)
        given = {"rank": 4, "max_steps": 4, "batch_size": 4, "sample_steps": 0, **knobs}
        given |= {METHODS[method].rows_field: str(data), "out": str(tmp_path / name), "base": tiny_base}
        train(method, progress=progress or Progress(quiet=True), stop=stop, **given)
        return tmp_path / name

    return train_it


# ---- the command line


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """`command("sft", "--model", folder)`: a command as its user gives it, in this process, but for the plots."""
    from lowrank_align.cli import main

    monkeypatch.setenv("LOWRANK_ALIGN_CACHE", str(cache))
    monkeypatch.setattr(import_module("lowrank_align.plots"), "PLOTS", {})

    def run_it(*argv: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(word) for word in argv])
        except SystemExit as stopped:  # argparse
            code = int(stopped.code or 0)
        return Outcome(code, *capsys.readouterr())

    return run_it


FEW_STEPS = ("--max-steps", "2", "--batch-size", "2", "--rank", "2", "--quantize", "none", "--sample-steps", "0")
DEMONSTRATIONS = [{"prompt": f"{i}. Say: ", "completion": f"a good word {i}"} for i in range(6)]
PAIRS = [{"prompt": f"{i}. Say: ", "chosen": f"a good word {i}", "rejected": f"bad {i}"} for i in range(6)]


@pytest.fixture(scope="session")
def trained(tiny_llama: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `demonstrations.jsonl`, `pairs.jsonl`, and the runs `sft` and `reward` of two steps on them."""
    from lowrank_align.cli import main

    folder = tmp_path_factory.mktemp("trained")
    demonstrations = write_rows(folder / "demonstrations.jsonl", DEMONSTRATIONS)
    pairs = write_rows(folder / "pairs.jsonl", PAIRS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_ALIGN_CACHE", str(cache))
        patch.setattr(import_module("lowrank_align.plots"), "PLOTS", {})
        common = ["--model", str(tiny_llama), *FEW_STEPS, "--learning-rate", "0.01"]
        assert main(["sft", "--data", str(demonstrations), "--out", str(folder / "sft"), *common]) == 0
        assert main(["reward", "--data", str(pairs), "--out", str(folder / "reward"), *common]) == 0
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as JSON Lines; the same rows give the same bytes."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- small random models

LETTERS = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 127))]  # a token each; ids 0 to 98 of 128
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,  # far over the usual: with nearly equal logits, a wrong mask would hardly show
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 6,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": False,  # tied, so small a model says nothing but the token before
    },
    "phi3": {"sliding_window": 6},
    "smollm3": {"num_hidden_layers": 4},  # the fourth has no position encoding
    "gpt2": {},
    "qwen3_moe": {"head_dim": 16, "decoder_sparse_step": 1} | EXPERTS,
    # with a recurrent state
    "falcon_h1": {
        "head_dim": 16,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    },
    "qwen3_next": {
        "head_dim": 16,
        "num_hidden_layers": 4,
        "shared_expert_intermediate_size": 64,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    | EXPERTS,
    # that do something to their logits
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"head_dim": 16, "sliding_window": 6, "final_logit_softcapping": 2.0},
}
TREE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "smollm3", "gpt2", "qwen3_moe")


@pytest.fixture(params=TREE_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each architecture that takes tree rows."""
    return str(request.param)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model_folder(family, **changes)`: a small random model with a tokenizer of a token a character."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def make(family: str, **changes: Any) -> Path:
        key = (family, tuple(sorted((k, str(v)) for k, v in changes.items())))
        if key not in made:
            made[key] = root / f"{family}-{len(made)}"
            _write_model(made[key], family, FAMILIES[family] | changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def _loaded() -> dict[tuple[Path, str], Any]:
    return {}


@pytest.fixture
def load_base(
    model_folder: Callable[..., Path], _loaded: dict[Any, Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """`load_base(family, quantize="none", **changes)`: its `Base` on CPU in fp32, loaded once for all tests; its roles
    are taken off after each. With `fresh=True` one of the test's own."""
    monkeypatch.setenv("LOWRANK_ALIGN_CACHE", str(cache))
    lent = []

    def load(family: str, quantize: str = "none", *, fresh: bool = False, **changes: Any) -> Any:
        from lowrank_align.base import Base

        folder = model_folder(family, **changes)
        if fresh:
            return Base.load(str(folder), quantize=quantize, device="cpu")
        if (folder, quantize) not in _loaded:
            _loaded[folder, quantize] = Base.load(str(folder), quantize=quantize, device="cpu")
        base = _loaded[folder, quantize]
        lent.append(base)
        return base

    yield load
    for base in lent:
        for name in [name for name in base.roles if name != "base"]:
            base.remove_role(name)
        base.enable_checkpointing(False)


@pytest.fixture
def speak() -> Callable[..., None]:
    """`speak(base, role, seed=0)` gives the role's adapter random B, so that it is no longer the bare base."""

    def shake(base: Any, role: str, seed: int = 0) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed)
        for name, parameter in base.roles[role].parameters.items():
            if name.endswith("lora_B.weight"):
                parameter.data.normal_(0.0, 0.1, generator=generator)

    return shake


@pytest.fixture
def random_row() -> Callable[..., Any]:
    """`random_row(prompt_tokens, *completion_tokens, seed=0)`: a tree row of random ids, none of them special."""

    def make(prompt_tokens: int, *completion_tokens: int, seed: int = 0) -> Any:
        from lowrank_align.trees import Completion, TreeRow

        draw = random.Random(seed)
        lengths = (prompt_tokens, *completion_tokens)
        prompt, *rest = ([draw.randrange(4, len(LETTERS)) for _ in range(length)] for length in lengths)
        return TreeRow(prompt, [Completion(ids, [True] * len(ids)) for ids in rest])

    return make


def _write_model(folder: Path, family: str, changes: dict[str, Any]) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | changes)).save_pretrained(folder)
