"""The log-likelihoods and answers that lm-evaluation-harness gets, against plain transformers; the harness where it is
installed."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_align.config import EvalSettings
from lowrank_align.data.chat import Renderer
from lowrank_align.evaluate.harness import RoleScorer, _metrics, _run, _shown, _windows, as_lm, generation

PAIRS = [("Say: ", "the end"), ("What is it?", " a thing"), ("", "there"), ("x", "")]


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture
def scorer(tiny_base: Any) -> RoleScorer:
    return RoleScorer(tiny_base, "base", Renderer(tiny_base.tokenizer, max_length=256), batch_size=2)


@torch.no_grad()
def plain_likelihood(plain: Any, before: list[int], after: list[int]) -> tuple[float, bool]:
    logps = plain(torch.tensor([before + after])).logits[0].float().log_softmax(-1)[len(before) - 1 : -1]
    if not after:
        return 0.0, True
    targets = torch.tensor(after)
    return logps.gather(-1, targets[:, None]).sum().item(), bool((logps.argmax(-1) == targets).all())


def ids(scorer: RoleScorer, text: str) -> list[int]:
    return list(scorer.renderer.tokenizer(text, add_special_tokens=False).input_ids)


def test_likelihoods_are_those_of_plain_transformers(scorer: RoleScorer, plain: Any) -> None:
    """Spaces at a context's end belong to the continuation; <s> stands first, also before an empty context."""
    expected = []
    for before, after in (("Say:", " the end"), ("What is it?", " a thing"), ("", "there"), ("x", "")):
        expected.append(plain_likelihood(plain, [scorer.first_id, *ids(scorer, before)], ids(scorer, after)))
    found = scorer.likelihoods(PAIRS)
    assert [f.logp for f in found] == pytest.approx([logp for logp, _ in expected], abs=1e-4)
    assert [f.is_greedy for f in found] == [greedy for _, greedy in expected]


def test_the_likeliest_continuation_is_greedy(scorer: RoleScorer) -> None:
    text = scorer.generate("Say: ", [], 4, 0.0, 1.0)
    split = scorer._ids("Say: ")
    after = [*ids(scorer, "Say: " + text)][len(split) - 1 :]
    (found,) = scorer._score([(split, after)])
    assert found.is_greedy
    assert not scorer.likelihoods([("Say: ", "the end")])[0].is_greedy


def test_a_prefix_stands_before_what_is_scored(tiny_base: Any, scorer: RoleScorer, plain: Any) -> None:
    prefixed = RoleScorer(tiny_base, "base", scorer.renderer.with_prefix("good: "))
    before = [scorer.first_id, *ids(scorer, "Say:"), *scorer.renderer.with_prefix("good: ").prefix_ids]
    (found,) = prefixed.likelihoods([("Say:", " yes")])
    assert found.logp == pytest.approx(plain_likelihood(plain, before, ids(scorer, " yes"))[0], abs=1e-4)


def test_a_long_text_is_predicted_once_token_by_token(scorer: RoleScorer, plain: Any) -> None:
    """Windows of 4 over <s> and tokens 1 to 9: the first predicts 1 to 3, later ones two each with two before them."""
    windows = list(_windows(0, list(range(1, 10)), 4))
    assert windows == [([0], [1, 2, 3]), ([2, 3], [4, 5]), ([4, 5], [6, 7]), ([6, 7], [8, 9])]
    short = "a short text"
    expected = plain_likelihood(plain, [scorer.first_id], ids(scorer, short))[0]
    long = "abc " * 100  # 300 tokens or more, in a context of 256
    found = scorer.rolling([short, long, ""])
    assert found[0] == pytest.approx(expected, abs=1e-4)
    assert found[2] == 0
    assert found[1] < -256


def test_an_answer_ends_where_the_task_says(scorer: RoleScorer) -> None:
    whole = scorer.generate("Say: ", [], 8, 0.0, 1.0)
    assert len(whole) > 3
    assert scorer.generate("Say: ", [whole[2]], 8, 0.0, 1.0) == whole.split(whole[2])[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"stops": [], "new_tokens": 256, "temperature": 0.0, "top_p": 1.0}),
        (
            {"until": ".", "max_gen_toks": 9, "temperature": 0.7, "top_p": 0.9},
            {"stops": ["."], "new_tokens": 9, "temperature": 0.7, "top_p": 0.9},
        ),
        (
            {"until": ["a", "b"], "do_sample": False, "temperature": 0.7},
            {"stops": ["a", "b"], "new_tokens": 256, "temperature": 0.0, "top_p": 1.0},
        ),
    ],
)
def test_generation_arguments(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert generation(given) == expected


def test_the_harness_sees_what_the_scorer_says(scorer: RoleScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the harness's base class, whose requests carry their texts in `args`."""
    module = ModuleType("lm_eval.api.model")
    module.LM = type("LM", (), {})  # type: ignore[attr-defined]
    for name, value in {"lm_eval": ModuleType("lm_eval"), "lm_eval.api": ModuleType("lm_eval.api")}.items():
        monkeypatch.setitem(sys.modules, name, value)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", module)
    model = as_lm(scorer)
    requests = [SimpleNamespace(args=pair) for pair in PAIRS]
    assert model.loglikelihood(requests) == [tuple(found) for found in scorer.likelihoods(PAIRS)]
    assert model.loglikelihood_rolling([SimpleNamespace(args=("abc",))]) == scorer.rolling(["abc"])
    asked = SimpleNamespace(args=("Say: ", {"until": ["a"], "max_gen_toks": 5}))
    assert model.generate_until([asked]) == [scorer.generate("Say: ", ["a"], 5, 0.0, 1.0)]


def test_metrics_lose_the_filter_that_is_none() -> None:
    metrics = _metrics({"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1})
    assert metrics == {"acc": 0.5, "acc_stderr": 0.1, "em strict": 1.0}
    assert (_shown(metrics, "acc"), _shown(metrics, "em strict"), _shown({}, "acc")) == (
        "0.5000 ± 0.1000",
        "1.0000",
        "-",
    )


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed (the extra lm-eval)")
def test_a_task_of_ones_own(scorer: RoleScorer, tmp_path: Path) -> None:
    """Of two choices each, the likelier by plain log-likelihood is the answer of the first and not of the second."""
    choices = ["the", " xq#"]
    best = max(choices, key=lambda choice: scorer.likelihoods([("Say:", choice)])[0].logp)
    right = choices.index(best)
    rows = [{"q": "Say:", "choices": choices, "answer": right}, {"q": "Say:", "choices": choices, "answer": 1 - right}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path / 'own.jsonl'}\n"
        "test_split: train\noutput_type: multiple_choice\ntarget_delimiter: ''\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\nmetric_list:\n  - metric: acc\n"
    )
    settings = EvalSettings(model="tiny", tasks=["own"], task_folder=str(tmp_path))
    assert _run(as_lm(scorer), settings)["own"]["acc"] == 0.5
