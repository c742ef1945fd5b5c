"""One frozen base, many roles.

The (quantised) weights are in memory once. Policy, reference, reward model and value model are LoRA adapters on it, and
a role is nothing but which adapter is active:

    base = Base.load("Qwen/Qwen3-4B", quantize="nf4")
    base.add_role("policy", start_from="runs/sft")
    base.add_role("reference", frozen_copy_of="policy")
    with base.role("reference"):
        ...
"""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank_align import adapters, lora, memory
from lowrank_align.attention import TreeAttention
from lowrank_align.config import ModelSettings
from lowrank_align.devices import Attention, Quantize
from lowrank_align.errors import UserError, nearest
from lowrank_align.loading import Loaded, context_tokens, load_frozen
from lowrank_align.probe import choose_layout, choose_logits
from lowrank_align.roles import BARE, BackwardInsideRole, Role, Visit
from lowrank_align.scoring import LogitsHead, TokenScores, scalar_scores, scalar_values, token_logps, token_scores
from lowrank_align.trees import Layout, TreeBatch, TreeRow, collate
from lowrank_align.trunk import Trunk, top_layers
from lowrank_align.turns import Turns

log = logging.getLogger(__name__)

MAMBAS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")  # PEFT refuses some of their layers


class Base:
    """A frozen causal language model and the roles on it."""

    def __init__(self, loaded: Loaded) -> None:
        self.model: Any = loaded.model
        self.tokenizer: Any = loaded.tokenizer
        self.name, self.path, self.weights_hash = loaded.name, loaded.path, loaded.weights_hash
        self.compute_dtype, self.quantize = loaded.compute_dtype, loaded.quantize
        self.config: Any = self.model.config.get_text_config()
        self.device: torch.device = next(self.model.parameters()).device
        self.roles: dict[str, Role] = {BARE: Role(BARE)}
        self.turns = Turns()
        self._frozen = list(self.model.parameters())
        self._lora_layers: list[LoraLayer] = []
        self._stack: list[Visit] = [Visit(self.roles[BARE])]
        self._backbone: Any = self.model.get_decoder()
        self._backbone.register_forward_hook(self._guard_output)
        self.trunk = Trunk(self._backbone, self.config.num_hidden_layers)
        self.attention = TreeAttention(self.config, self.compute_dtype, self.device)
        self.linear_names = _linear_names(self._backbone)
        self.logits_head = LogitsHead(self.model)
        self.layout: Layout = choose_layout(self)
        self.logits_head = choose_logits(self)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        quantize: Quantize = "nf4",
        device: str = "auto",
        dtype: str = "auto",
        attention: Attention = "auto",
        float_storage: bool = False,
    ) -> "Base":
        """Load a folder, a hub id or `tiny`; see `loading.load_frozen` for the errors."""
        return cls(
            load_frozen(
                name,
                quantize=quantize,
                device=device,
                dtype=dtype,
                attention=attention,
                float_storage=float_storage,
            )
        )

    @classmethod
    def of(cls, settings: ModelSettings) -> "Base":
        """The base that a command's settings name."""
        s = settings
        return cls.load(s.model, quantize=s.quantize, device=s.device, dtype=s.dtype, attention=s.attention)

    # ---- roles

    def add_role(
        self,
        name: str,
        *,
        start_from: str | Path | None = None,
        frozen_copy_of: str | None = None,
        rank: int | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: list[str] | None = None,
        lora_layers: int | None = None,
        trainable: bool = True,
        head: bool = False,
        seed: int = 0,
    ) -> Role:
        """Put a role on the base. An older one of that name is replaced, but stays where the new one cannot be added.

        `start_from` continues a saved adapter (a run's folder or a PEFT folder; rank and targets are the adapter's);
        `frozen_copy_of` is the reference that DPO and PPO need; `rank` makes a new adapter that begins as the bare
        base, on the top `lora_layers` layers alone where that is given; with none of the three the role *is* the bare
        base. `head` adds a scalar head, read from `start_from` where that is a reward run, else drawn with std
        1/sqrt(d+1) from `seed`.
        """
        if name == BARE or not name.isidentifier():
            raise UserError(f"role {name!r}: use a plain name (letters, digits, _) other than {BARE!r}")
        self._check_inactive(name)
        if frozen_copy_of is not None:
            role = self._copy_frozen(name, self._find(frozen_copy_of))
        elif start_from is not None:
            role = self._from_saved(name, adapters.read(start_from, self.name, self.weights_hash), trainable, dropout)
        elif rank is not None:
            config = LoraConfig(
                r=rank,
                lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
                lora_dropout=dropout,
                target_modules=sorted(target_modules or self.linear_names),
                layers_to_transform=self._top_layers(lora_layers),
            )
            role = self._inject(name, config, trainable, seed)
        else:
            role = Role(name, trainable=trainable and head)
        if head and role.head is None:
            role.head = self._new_head(seed)
        if role.head is not None:
            role.head.requires_grad_(role.trainable)
            role.parameters[adapters.HEAD] = role.head.weight
        self.remove_role(name)
        self.roles[name] = role
        self._restore_flags()
        return role

    def remove_role(self, name: str) -> None:
        """Take a role and its adapter's weights off the base. A role that is not there is no error."""
        role = self.roles.get(name)
        if role is None or name == BARE:
            return
        self._check_inactive(name)
        del self.roles[name]
        if role.adapter is not None:
            self._discard(role.adapter)
        self.trunk.settle(list(self.roles.values()))

    @contextmanager
    def role(self, name: str) -> Iterator[Role]:
        """Make a role active; on the way out, also on error, everything is as it was.

        Gradient checkpointing recomputes under whatever role is active at backward, so backward belongs inside: leaving
        with a graph that still waits for it is a RuntimeError, and so is a backward under another role.
        """
        role = self._find(name)
        visit = Visit(role)
        self._stack.append(visit)
        self._activate(role)
        try:
            yield role
            if visit.pending():
                raise RuntimeError(
                    f"role {name!r} was left with a graph that still waits for backward; call backward inside the role"
                )
        finally:
            self._stack.remove(visit)
            self._activate(self._stack[-1].role)

    @property
    def active_role(self) -> Role:
        return self._stack[-1].role

    def trainable_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The role's LoRA weights (and head) by PEFT's names, fp32."""
        return self._find(role).parameters

    def save_role(self, name: str, folder: Path, *, as_reward: bool = False) -> str:
        """Write the role in PEFT's own layout (a reward as SEQ_CLS with its head); the SHA-256 of the weights."""
        role = self._find(name)
        if role.adapter is None:
            raise UserError(f"role {name!r} is the bare base; there is no adapter to save")
        config = self.model.peft_config[role.adapter]
        return adapters.write(folder, config, role.parameters, base_name=self.name, as_reward=as_reward)

    # ---- what a role says

    def collate(self, rows: list[TreeRow]) -> TreeBatch:
        """Tree rows -> a batch on the base's device, in the layout that the model can take."""
        return collate(rows, self.layout, self.tokenizer.pad_token_id or 0).to(self.device)

    def hidden_states(self, batch: TreeBatch) -> Tensor:
        """(R, T, H) the last hidden states under the active role."""
        inputs = self.attention.inputs(batch)

        def forward() -> Tensor:
            with self.autocast():
                found: Tensor = self._backbone(input_ids=batch.input_ids, use_cache=False, **inputs).last_hidden_state
            return found

        return self.trunk.run(batch, forward) if self.trunk.serves(self.active_role) else forward()

    def token_scores(self, batch: TreeBatch, *, temperature: float = 1.0) -> TokenScores:
        """Per-token log-probabilities (N, C) of the completions under the active role."""
        hidden = self.hidden_states(batch)
        with self.autocast():
            return token_scores(hidden, batch, self.logits_head, temperature=temperature)

    def token_logps(self, batch: TreeBatch, *, temperature: float = 1.0) -> Tensor:
        """(N, C) the log-probabilities alone, without gradient: what is asked of a frozen role."""
        with torch.no_grad(), self.autocast():
            return token_logps(self.hidden_states(batch), batch, self.logits_head, temperature=temperature)

    def scores(self, batch: TreeBatch, *, shifted: bool = False) -> Tensor:
        """(N,) the active role's scalar head at each completion's last token, raw or `shifted` (`reward.json`)."""
        head, shift = self._head(), self.active_role.shift
        return scalar_scores(self.hidden_states(batch), batch, head) - (shift if shifted else 0.0)

    def values(self, batch: TreeBatch) -> Tensor:
        """(N, C) V(s_t), the active role's scalar head before each token, shifted like the scores it predicts."""
        head = self._head()
        return (scalar_values(self.hidden_states(batch), batch, head) - self.active_role.shift) * batch.token_mask

    def dense_copies(self) -> AbstractContextManager[None]:
        """Small quantised weights unpacked once for many passes, on a CPU; see `lora.dense_copies`."""
        return lora.dense_copies(self._lora_layers if self.compute_dtype == torch.float32 else ())

    def autocast(self) -> AbstractContextManager[Any]:
        """16-bit arithmetic with fp32 LoRA weights on GPUs; nothing on CPU."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    # ---- facts about the base

    def frozen_bytes(self) -> int:
        """Bytes of the base's own weights, with what quantisation keeps beside them."""
        return memory.bytes_of(self.model, self._frozen)

    def copies_in_memory(self) -> int:
        """How many tensors of this process hold the content of the base's largest layer: 1 where all roles share it."""
        embeddings = {id(self.model.get_input_embeddings().weight), id(self.model.get_output_embeddings().weight)}
        return memory.copies_of(max((p for p in self._frozen if id(p) not in embeddings), key=Tensor.numel))

    @property
    def context_tokens(self) -> int:
        """The longest sequence the model has positions for."""
        return context_tokens(self.config)

    def enable_checkpointing(self, on: bool) -> None:
        """Recompute activations in the backward pass: less memory, about a third more time."""
        model = self.model
        if on and not model.supports_gradient_checkpointing:
            raise UserError(f"--gradient-checkpointing: {self.name} cannot recompute its activations; leave it off")
        # transformers renamed these two; the old names warn.
        if on:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            model.disable_input_require_grads()  # for reentrant ones only; the bare base would keep a graph
        else:
            disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
            disable()
        model.train(on)  # transformers checkpoints only in train mode; every dropout of the base itself is 0

    # ---- inside

    def _find(self, name: str) -> Role:
        if name not in self.roles:
            raise UserError(f"no role {name!r}{nearest(name, self.roles)} (there are: {', '.join(self.roles)})")
        return self.roles[name]

    def _head(self) -> nn.Linear:
        head = self.active_role.head
        if head is None:
            raise UserError(f"role {self.active_role.name!r} has no scalar head; it speaks, it does not score")
        return head

    def _check_inactive(self, name: str) -> None:
        if any(visit.role.name == name for visit in self._stack):
            raise RuntimeError(f"role {name!r} is active; leave it before removing it")

    def _activate(self, role: Role) -> None:
        # PEFT's set_adapter would also freeze every other adapter and take 30 times as long.
        active = [role.adapter] if role.adapter is not None else []
        for layer in self._lora_layers:
            layer._active_adapter = active  # type: ignore[assignment]

    def _inject(self, name: str, config: LoraConfig, trainable: bool, seed: int) -> Role:
        """A new adapter that begins as the bare base (B = 0), in fp32 whatever the base computes in."""
        adapter = name if name not in getattr(self.model, "peft_config", {}) else f"{name}_new"
        with (
            torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # "already found a peft_config": several adapters are the point
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(config, self.model, adapter_name=adapter)
            except ValueError as error:
                self._discard(adapter)
                self._restore_flags()
                raise UserError(f"--target-modules: {str(error).splitlines()[0]}") from error
        self._lora_layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        for layer in self._lora_layers:
            lora.speed_up(layer)
        self.model.train(self.model.training)  # the new layers' dropout too
        parameters: dict[str, nn.Parameter] = {}
        marker = f".{adapter}.weight"
        for key, parameter in self.model.named_parameters():
            if key.endswith(marker) and ".lora_" in key:
                parameter.data = parameter.data.float()
                parameters[key.removesuffix(marker) + ".weight"] = parameter
        self._activate(self._stack[-1].role)
        return Role(name, adapter, trainable, parameters=parameters)

    def _discard(self, adapter: str) -> None:
        """Take an adapter, or what there is of it, off every layer."""
        self._lora_layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        for layer in self._lora_layers:
            layer.delete_adapter(adapter)
        getattr(self.model, "peft_config", {}).pop(adapter, None)  # the model's first has left none where it failed
        self._activate(self._stack[-1].role)

    def _from_saved(self, name: str, saved: adapters.Saved, trainable: bool, dropout: float) -> Role:
        saved.config.lora_dropout = dropout
        role = self._inject(name, saved.config, trainable, seed=0)
        if adapters.HEAD in saved.tensors:
            role.head = self._new_head(seed=0)
            role.parameters[adapters.HEAD] = role.head.weight
        try:
            adapters.copy_into(saved, role.parameters)
        except UserError:
            self._discard(str(role.adapter))
            self._restore_flags()
            raise
        role.shift, role.parent = saved.shift, saved.folder
        return role

    def _copy_frozen(self, name: str, source: Role) -> Role:
        if source.adapter is None or _is_untouched(source):
            role = Role(name)  # an adapter that changes nothing is the bare base
        else:
            config = LoraConfig(**self.model.peft_config[source.adapter].to_dict())
            config.lora_dropout = 0.0
            role = self._inject(name, config, trainable=False, seed=0)
            for key, parameter in role.parameters.items():
                parameter.data.copy_(source.parameters[key].data)
        role.head = copy.deepcopy(source.head)
        role.parent, role.shift = source.parent, source.shift
        return role

    def _new_head(self, seed: int) -> nn.Linear:
        width = self.config.hidden_size
        # skip_init: a Linear's own initialisation would draw from the global generator
        head: nn.Linear = nn.utils.skip_init(nn.Linear, width, 1, bias=False, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        head.weight.data.normal_(0.0, (width + 1) ** -0.5, generator=generator)
        return head.to(self.device)

    def _restore_flags(self) -> None:
        for role in self.roles.values():
            for parameter in role.parameters.values():
                parameter.requires_grad_(role.trainable)
        self.trunk.settle(list(self.roles.values()))

    def _top_layers(self, count: int | None) -> list[int] | None:
        there = self.config.num_hidden_layers
        if count is not None and count > there:
            raise UserError(f"--lora-layers {count}: {self.name} has {there} layers")
        return None if count is None else top_layers(count, there)

    def _guard_output(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        if hidden.requires_grad:
            output.last_hidden_state = BackwardInsideRole.apply(hidden, self._stack[-1], lambda: self.active_role)
        return output


def _linear_names(backbone: Any) -> list[str]:
    """What LoRA adapts by default: the decoder's linear layers by name, without the routers of expert models, and
    without what a mamba's kernels read past any adapter."""
    names = {name.rsplit(".", 1)[-1] for name, m in backbone.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    names -= {"gate", "router", "shared_expert_gate"}
    return sorted(names - ({"out_proj", "conv1d"} if backbone.config.model_type in MAMBAS else set()))


def _is_untouched(role: Role) -> bool:
    return not any(p.any() for key, p in role.parameters.items() if key.endswith("lora_B.weight"))
