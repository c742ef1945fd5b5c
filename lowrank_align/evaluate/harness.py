"""EleutherAI's lm-evaluation-harness on a role of the base: what alignment cost elsewhere.

An optional extra (`pip install 'lowrank-align[lm-eval]'`): without it everything else works. Tasks, prompts and metrics
are the harness's (Gao et al. 2021, github.com/EleutherAI/lm-evaluation-harness); ours are the log-likelihoods and the
text. Prompts are plain text with the special tokens that the tokenizer adds; chat templates are left out.
"""

import logging
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from lowrank_align.base import Base
from lowrank_align.config import EvalSettings
from lowrank_align.data.chat import Renderer
from lowrank_align.errors import EnvironmentProblem, UserError, nearest
from lowrank_align.evaluate.answers import tree
from lowrank_align.evaluate.report import Report, Table
from lowrank_align.rollout import generator_for, sample

NEW_TOKENS = 256  # where a task does not say how long an answer may be
INSTALL = "pip install 'lowrank-align[lm-eval]'"


class Likelihood(NamedTuple):
    """Of a continuation: its log-probability in nats, and whether every token of it was the likeliest one."""

    logp: float
    is_greedy: bool


class RoleScorer:
    """What the harness asks of a model, answered by one role of a base. Knows nothing of the harness."""

    def __init__(self, base: Base, role: str, renderer: Renderer, batch_size: int = 16, seed: int = 0) -> None:
        """`renderer` has the prefix that the role answers behind; continuations and answers stand behind it too."""
        self.base, self.role, self.renderer = base, role, renderer
        self.plain = renderer.with_prefix("")  # of what stands before the prefix
        self.batch_size, self.seed = batch_size, seed
        tokenizer = renderer.tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.first_id: int = renderer.end_ids[0] if first is None else first  # what stands before an empty context

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Of each (context, continuation). Spaces at the context's end go to the continuation, as tokenizers have it;
        a context that is too long loses its beginning."""
        split = [self._split(context, continuation) for context, continuation in pairs]
        return self._score([([*before, *self.renderer.prefix_ids], after) for before, after in split])

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each whole text. A long one goes through in windows of the context's length; every
        token is predicted once, and those of later windows see at least half a window before them."""
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for owner, text in enumerate(texts):
            ids = self.renderer.plain_ids(text)
            for window in _windows(self.first_id, ids, self.base.context_tokens):
                windows.append(window)
                owners.append(owner)
        found = [0.0] * len(texts)
        for owner, likelihood in zip(owners, self._score(windows), strict=True):
            found[owner] += likelihood.logp
        return found

    def generate(self, context: str, stops: Sequence[str], new_tokens: int, temperature: float, top_p: float) -> str:
        """What the role says, up to the first of `stops`; temperature 0 takes the likeliest token."""
        ids = self._ids(context) or [self.first_id]
        room = self.base.context_tokens - new_tokens - len(self.renderer.prefix_ids)
        if room < 1:
            raise UserError(f"--tasks: {new_tokens} new tokens leave no room for a prompt in this model's context")
        with self.base.role(self.role):
            groups = sample(
                self.base,
                [[*ids[-room:], *self.renderer.prefix_ids]],
                end_ids=self.renderer.end_ids,
                max_new_tokens=new_tokens,
                generator=generator_for(self.base.device, self.seed, self.role, context),
                temperature=temperature,
                top_p=top_p,
            )
        text = self.renderer.decode(groups[0][0].ids)
        for stop in filter(None, stops):
            text = text.split(stop, 1)[0]
        return text

    @torch.no_grad()
    def _score(self, split: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        """Continuations behind their contexts, both as ids; rows of similar length go through together."""
        order = sorted(range(len(split)), key=lambda i: len(split[i][0]) + len(split[i][1]))
        found: dict[int, Likelihood] = {}
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            empty = [i for i in part if not split[i][1]]
            found |= dict.fromkeys(empty, Likelihood(0.0, True))
            part = [i for i in part if split[i][1]]
            if not part:
                continue
            rows = []
            for i in part:
                before, after = split[i]
                after = after[-(self.base.context_tokens - 1) :]
                rows.append(tree(before[-(self.base.context_tokens - len(after)) :], after))
            batch = self.base.collate(rows)
            with self.base.role(self.role):
                scores = self.base.token_scores(batch)
            top = (scores.is_top.bool() | ~batch.completion_mask).all(1).tolist()
            found |= {
                i: Likelihood(*of) for i, of in zip(part, zip(scores.logps.tolist(), top, strict=True), strict=True)
            }
        return [found[i] for i in range(len(split))]

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        bare = context.rstrip(" ")
        continuation = context[len(bare) :] + continuation
        before = self._ids(bare) if bare else []
        if not before:
            return [self.first_id], self.renderer.plain_ids(continuation)
        whole = self._ids(bare + continuation)
        return before, whole[len(before) :]

    def _ids(self, text: str) -> list[int]:
        """With the special tokens that the tokenizer puts first, and none at the end."""
        from lowrank_align.data.formats import Row, Shape

        return self.plain.prompt_ids(Row(Shape.prompts, text, [])) if text else []


def _windows(first_id: int, ids: list[int], context_tokens: int) -> Iterator[tuple[list[int], list[int]]]:
    """(what stands before, what is predicted) so that each token is predicted once."""
    whole, length, at = [first_id, *ids], context_tokens, 1
    while at < len(whole):
        new = length - 1 if at == 1 else max(1, length // 2)
        end = min(at + new, len(whole))
        yield whole[max(0, end - length) : at], whole[at:end]
        at = end


def check_installed() -> None:
    """EnvironmentProblem with the line that installs the harness, where it is not there."""
    if find_spec("lm_eval") is None:
        raise EnvironmentProblem(f"--tasks: lm-evaluation-harness is not installed: {INSTALL}")


def as_lm(scorer: RoleScorer) -> Any:
    """The scorer as an `lm_eval.api.model.LM`."""
    from lm_eval.api.model import LM

    class RoleLM(LM):  # type: ignore[misc]
        """Each request's `args` as the harness gives them."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return [(found.logp, found.is_greedy) for found in scorer.likelihoods([r.args for r in requests])]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return scorer.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [scorer.generate(request.args[0], **generation(request.args[1])) for request in requests]

    return RoleLM()


def generation(given: dict[str, Any]) -> dict[str, Any]:
    """The harness's generation arguments as `RoleScorer.generate` takes them; greedy unless they ask for sampling."""
    until = given.get("until") or []
    temperature = float(given.get("temperature") or 0.0)
    sampled = bool(given.get("do_sample", temperature > 0)) and temperature > 0
    length = given.get("max_gen_toks") or given.get("max_new_tokens") or given.get("max_tokens") or NEW_TOKENS
    return {
        "stops": [until] if isinstance(until, str) else list(until),
        "new_tokens": int(length),
        "temperature": temperature if sampled else 0.0,
        "top_p": float(given.get("top_p") or 1.0) if sampled else 1.0,
    }


def report_tasks(
    report: Report, base: Base, voices: Sequence[tuple[str, str, Renderer]], settings: EvalSettings
) -> None:
    """Run the tasks for every voice (name, role, renderer), and put the metrics beside each other."""
    found = {}
    for name, role, renderer in voices:
        scorer = RoleScorer(base, role, renderer, settings.batch_size, settings.seed)
        found[name] = _run(as_lm(scorer), settings)
    keys = list(dict.fromkeys((task, metric) for of in found.values() for task, m in of.items() for metric in m))
    rows = [
        (task, metric, *(_shown(found[name].get(task, {}), metric) for name, *_ in voices))
        for task, metric in keys
        if not metric.endswith("_stderr")
    ]
    columns = ("task", "metric", *(name for name, *_ in voices))
    notes = ("± is one standard error, by lm-evaluation-harness",)
    report.add("tasks", found, Table("Tasks of lm-evaluation-harness", columns, rows, notes))


def _run(model: Any, settings: EvalSettings) -> dict[str, dict[str, float]]:
    """Metrics by task. UserError for a task that is not there, or whose data cannot be had."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it notes every default that it takes
    manager = TaskManager(include_path=settings.task_folder)
    tasks = settings.tasks or []
    for task in tasks:
        if not manager.match_tasks([task]):
            raise UserError(f"--tasks: {task}: no such task{nearest(task, manager.all_tasks)}")
    try:
        results = simple_evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=settings.num_fewshot,
            limit=settings.task_limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed % 2**32,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    except (OSError, ValueError, KeyError) as error:  # data that is not there, a file that is wrong
        raise UserError(f"--tasks: {' '.join(str(error).split())[:200] or type(error).__name__}") from error
    return {task: _metrics(values) for task, values in (results or {"results": {}})["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """`acc,none` is `acc`, a filter's name stays."""
    numbers = {key: v for key, v in values.items() if isinstance(v, int | float) and "," in key}
    return {key.replace(",none", "").replace(",", " "): float(value) for key, value in numbers.items()}


def _shown(metrics: dict[str, float], metric: str) -> str:
    if metric not in metrics:
        return "-"
    name, _, kind = metric.partition(" ")
    error = metrics.get(f"{name}_stderr{f' {kind}' if kind else ''}")
    return f"{metrics[metric]:.4f}" + (f" ± {error:.4f}" if error is not None else "")
