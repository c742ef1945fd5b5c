"""Log-probs, entropies and scalar scores from hidden states; what families do to logits; memory."""

import math
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from lowrank_align import scoring
from lowrank_align.base import Base
from lowrank_align.errors import UserError
from lowrank_align.loading import load_frozen
from lowrank_align.scoring import LogitsHead, OwnLogits, scalar_scores, scalar_values, token_scores
from lowrank_align.trees import Completion, TreeRow, collate


def head_of(projection: nn.Module, vocabulary: int, **settings: float) -> LogitsHead:
    """A head on a projection, with a configuration's `settings`, and no model around it."""
    config = SimpleNamespace(vocab_size=vocabulary, **settings)
    config.get_text_config = lambda: config
    return LogitsHead(SimpleNamespace(config=config, get_output_embeddings=lambda: projection))


def frozen_linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False).requires_grad_(False)


# ---- by hand


def test_token_scores_by_hand() -> None:
    """The hidden states are the logits: logs of (1/2, 1/4, 1/4) under token 0 and of (1/8, 1/8, 3/4) under token 1.

    The row is `0 | 1 2 1`. Token 1 is predicted from the prompt's 0: ln 1/4, not the likeliest; entropy
    1/2 ln 2 + 2 x 1/4 ln 4 = 1.5 ln 2. Token 2 from 1: ln 3/4, the likeliest; entropy 2/8 ln 8 + 3/4 ln 4/3. The last
    token does not count: 0 everywhere.
    """
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [1 / 3, 1 / 3, 1 / 3]]).log()
    batch = collate([TreeRow([0], [Completion([1, 2, 1], [True, True, False])])])
    hidden = logits[batch.input_ids]
    found = token_scores(hidden, batch, head_of(nn.Identity(), 3))
    torch.testing.assert_close(found.per_token_logps, torch.tensor([[math.log(0.25), math.log(0.75), 0.0]]))
    torch.testing.assert_close(found.logps, torch.tensor([math.log(3 / 16)]))
    second = 0.25 * math.log(8) + 0.75 * math.log(4 / 3)
    torch.testing.assert_close(found.entropy, torch.tensor([[1.5 * math.log(2), second, 0.0]]))
    assert found.is_top.tolist() == [[0.0, 1.0, 0.0]]


def test_temperature_divides_the_logits() -> None:
    """At T = 1/2, probabilities go with their squares: (1/2, 1/4, 1/4) -> (4, 1, 1) / 6."""
    hidden = torch.tensor([[[0.5, 0.25, 0.25], [0.0, 0.0, 0.0]]]).log()
    batch = collate([TreeRow([0], [Completion([1], [True])])])
    found = token_scores(hidden, batch, head_of(nn.Identity(), 3), temperature=0.5)
    torch.testing.assert_close(found.per_token_logps, torch.tensor([[-math.log(6)]]))


def test_nothing_counts() -> None:
    hidden = torch.zeros(1, 2, 3, requires_grad=True)
    batch = collate([TreeRow([0], [Completion([1], [False])])])
    found = token_scores(hidden, batch, head_of(nn.Identity(), 3))
    assert [column.tolist() for column in found] == [[[0.0]]] * 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [4.0, -2.0]),
        ({"logit_scale": 0.5}, [2.0, -1.0]),  # Cohere multiplies
        ({"logits_scaling": 4.0}, [1.0, -0.5]),  # Granite divides
        ({"final_logit_softcapping": 2.0}, [2 * math.tanh(2.0), 2 * math.tanh(-1.0)]),  # Gemma caps
        ({"final_logit_softcapping": None, "logit_scale": None}, [4.0, -2.0]),
    ],
)
def test_what_families_do_to_logits(settings: dict[str, float], expected: list[float]) -> None:
    logits = head_of(nn.Identity(), 2, **settings)(torch.tensor([[4.0, -2.0]]))
    torch.testing.assert_close(logits, torch.tensor([expected]))


def test_scalar_scores_and_values_by_hand() -> None:
    """The head is (2, -1); `0 | 1 2 | 3` and padding, with states (t, 1) at column t, so the head gives 2 t - 1.

    Last tokens stand at columns 2 and 3: scores 3 and 5. Values are read *before* each token: 0 and 1 for the first
    completion (-1, 1), 0 again for the second one's only token (-1), and 0 on padding.
    """
    head = nn.Linear(2, 1, bias=False)
    head.weight.data = torch.tensor([[2.0, -1.0]])
    row = TreeRow([0], [Completion([1, 2], [True, True]), Completion([3], [True])])
    batch = collate([row])
    hidden = torch.tensor([[[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]])
    assert scalar_scores(hidden, batch, head).tolist() == [3.0, 5.0]
    assert scalar_values(hidden, batch, head).tolist() == [[-1.0, 1.0], [-1.0, 0.0]]


# ---- the model's own logits


@pytest.mark.parametrize("family", ["granite", "cohere", "gemma2"])
@torch.no_grad()
def test_scaled_and_capped_logits_are_the_models_own(
    load_base: Callable[..., Any], random_row: Callable[..., TreeRow], family: str
) -> None:
    base = load_base(family)
    assert type(base.logits_head) is LogitsHead
    assert base.layout == "tree"
    rows = [random_row(9, 3, 8, seed=1)]
    plain = AutoModelForCausalLM.from_pretrained(base.path, attn_implementation="eager", dtype=torch.float32).eval()
    found = base.token_scores(base.collate(rows)).per_token_logps
    for mine, completion in zip(found, rows[0].completions, strict=True):
        ids = torch.tensor([rows[0].prompt_ids + completion.ids])
        logps = plain(input_ids=ids).logits[0].log_softmax(-1)[8:-1]
        expected = logps.gather(1, torch.tensor(completion.ids)[:, None]).squeeze(1)
        torch.testing.assert_close(mine[: len(expected)], expected, atol=1e-5, rtol=0)


def load_changed(folder: Path, change: Callable[[Tensor, Tensor], Tensor]) -> Base:
    """A Llama that ends its forward with `change(logits, input_ids)`, which no configuration tells of."""
    loaded = load_frozen(str(folder), quantize="none", device="cpu")
    original = loaded.model.forward

    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        output = original(input_ids=input_ids, **kwargs)
        output.logits = change(output.logits, input_ids)
        return output

    loaded.model.forward = forward
    return Base(loaded)


def test_unknown_logits_take_the_models_own_path(
    model_folder: Callable[..., Path],
    random_row: Callable[..., TreeRow],
    speak: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every logit is multiplied by a number of its own, which `LogitsHead` does not know; gradients follow it."""
    factors = torch.linspace(0.5, 2.0, 128)
    base = load_changed(model_folder("llama"), lambda logits, _: logits * factors)
    assert type(base.logits_head) is OwnLogits
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("lowrank_align")]
    assert lines == [f"{base.name}: changes its logits in a way of its own; scoring takes the model's own path"]

    base.add_role("policy", rank=4)
    speak(base, "policy")
    row = random_row(5, 4)
    gradients = []
    with base.role("policy") as role:
        scores = base.token_scores(base.collate([row]))
        scores.logps.sum().backward()
        gradients.append({name: p.grad.clone() for name, p in role.parameters.items()})
        base.model.zero_grad()
        logps = base.model(torch.tensor([row.prompt_ids + row.completions[0].ids])).logits[0].log_softmax(-1)
        expected = logps[4:-1].gather(1, torch.tensor(row.completions[0].ids)[:, None]).squeeze(1)
        torch.testing.assert_close(scores.per_token_logps[0], expected, atol=1e-5, rtol=0)
        expected.sum().backward()
        gradients.append({name: p.grad.clone() for name, p in role.parameters.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-3, msg=name)
    assert "forward" not in vars(base.model.get_decoder())


def test_the_backbone_is_put_back_after_an_error(model_folder: Callable[..., Path]) -> None:
    base = load_changed(model_folder("llama"), lambda logits, _: logits * torch.linspace(0.5, 2.0, 128))
    with pytest.raises(RuntimeError):
        base.logits_head(torch.zeros(2, 63))  # not the hidden size
    assert "forward" not in vars(base.model.get_decoder())


def test_logits_that_do_not_come_from_hidden_states_are_refused(model_folder: Callable[..., Path]) -> None:
    """These depend on the input ids, which a head does not see."""
    with pytest.raises(UserError, match="its logits cannot be computed from its last hidden states") as error:
        load_changed(model_folder("llama"), lambda logits, ids: logits * (1 + ids[..., None] / 128))
    assert "\n" not in str(error.value)


# ---- memory


class Allocations(TorchDispatchMode):
    """The storages that operations create: the largest, and the most bytes that are alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = self.alive_bytes = self.peak_bytes = 0
        self.shapes: set[tuple[int, ...]] = set()
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in (x for x in tree_leaves(result) if isinstance(x, Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata in before | self._known:
                continue  # a view, or written in place
            self.shapes.add(tuple(tensor.shape))
            self._known.add(storage._cdata)
            self.alive_bytes += storage.nbytes()
            self.largest_bytes = max(self.largest_bytes, storage.nbytes())
            self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
            weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.alive_bytes -= nbytes


WIDTH, VOCABULARY = 8, 4096


def allocations(rows: int, tokens: int, train: bool, projection: nn.Module | None = None) -> Allocations:
    """Scoring `rows` completions of `tokens` tokens (and its backward pass) on a frozen head of 8 x 4096."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (rows, tokens), generator=generator).tolist()
    batch = collate([TreeRow([1], [Completion(row, [True] * tokens)]) for row in ids])
    hidden = torch.randn(rows, tokens + 1, WIDTH, generator=generator, requires_grad=train)
    head = head_of(projection or frozen_linear(WIDTH, VOCABULARY), VOCABULARY)
    with Allocations() as found:
        scores = token_scores(hidden, batch, head)
        if train:
            scores.logps.sum().backward()
    return found


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_memory_does_not_grow_with_batch_x_length_x_vocabulary(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk is 32 tokens x 4096 logits x 4 bytes = 512 KiB; the batch has 128 or 1024 tokens (16 MiB of logits).

    No tensor is larger than one chunk's logits, and what is alive at a time grows only by the tokens' own numbers: of
    each, a few states of 8 floats and a few scalars, here under 1 KiB where the logits are 16 KiB.
    """
    chunk_bytes = 32 * VOCABULARY * 4
    monkeypatch.setattr(scoring, "CHUNK_BYTES", chunk_bytes)
    small, wide, long = (allocations(*size, train) for size in [(2, 64), (16, 64), (2, 512)])
    assert small.largest_bytes == wide.largest_bytes == long.largest_bytes == chunk_bytes
    assert max(wide.peak_bytes, long.peak_bytes) - small.peak_bytes < 1024 * (1024 - 128)
    assert small.peak_bytes < 8 * chunk_bytes


def test_the_measure_sees_what_is_kept() -> None:
    """Two tensors of 4 KiB; the first is freed before the third, of 8 KiB, is made beside the second: 12 KiB."""
    with Allocations() as found:
        first, second = torch.ones(1024), torch.ones(1024)
        del first
        second = torch.cat([second, second])
    assert (found.largest_bytes, found.peak_bytes, found.alive_bytes) == (8192, 12288, 8192)
    assert found.shapes == {(1024,), (2048,)}
    del second


def test_no_gradient_is_computed_for_the_frozen_head() -> None:
    """A backward pass makes nothing of the head's shape, 4096 x 8 or 8 x 4096; it would for a head that is trained."""
    of_head = {(WIDTH, VOCABULARY), (VOCABULARY, WIDTH)}
    projection = frozen_linear(WIDTH, VOCABULARY)
    assert not allocations(2, 64, True, projection).shapes & of_head
    assert projection.weight.grad is None
    assert allocations(2, 64, True, projection.requires_grad_(True)).shapes & of_head


def test_chunks_change_nothing(
    load_base: Callable[..., Any],
    random_row: Callable[..., TreeRow],
    speak: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """37 tokens in chunks of 16 (the least), against one chunk: values and gradients."""
    base = load_base("llama")
    base.add_role("policy", rank=4)
    speak(base, "policy")
    batch = base.collate([random_row(5, 17, 20)])
    calls: list[int] = []
    original = LogitsHead.__call__

    def counting(head: LogitsHead, hidden: Tensor) -> Tensor:
        calls.append(len(hidden))
        return original(head, hidden)

    monkeypatch.setattr(LogitsHead, "__call__", counting)
    results = []
    for chunk_bytes in (64 * 2**20, 1):
        monkeypatch.setattr(scoring, "CHUNK_BYTES", chunk_bytes)
        with base.role("policy") as role:
            scores = base.token_scores(batch)
            scores.logps.sum().backward()
        results.append((*scores, {name: p.grad.clone() for name, p in role.parameters.items()}))
        for parameter in role.parameters.values():
            parameter.grad = None
    assert calls == [37, 16, 16, 5]  # once: the backward pass needs no logits
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)
