"""A judge behind an address: an OpenAI-compatible chat completions server that the user names.

Prompts and answers are sent there, with the key in the environment variable LOWRANK_JUDGE_KEY (see `servers`).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lowrank_align.config.evaluation import JUDGE_KEY
from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.evaluate.outcomes import Outcome
from lowrank_align.servers import NoReply, Refused, Server

AT_ONCE = 4
ATTEMPTS = 2
REPLY_TOKENS = 1024
REPLY_BYTES = 2**20

# After the GPT-4 prompts "(S)" and "(C)" of Rafailov et al. 2023 (arXiv 2305.18290, appendix C.2), which are about
# summaries; the words about summaries are ours about answers.
_FORM = """{question}{criterion}

Prompt:
{prompt}

Answer A:
{a}

Answer B:
{b}

FIRST provide a one-sentence comparison of the two answers, explaining which you prefer and why. SECOND, on a new \
line, state only "A" or "B" to indicate your choice. Your response should use the format:
Comparison: <one-sentence comparison and explanation>
Preferred: <"A" or "B">"""
_QUESTIONS = {
    "simple": "Which of the following two answers to the prompt is better?",
    "concise": "Which of the following two answers to the prompt does a better job of answering what is asked, without "
    "including unimportant or irrelevant details? A good answer is both precise and concise.",
}
_PREFERRED = re.compile(r"^\W*preferred\W+(?:answer\W+)?([AB])\b", re.IGNORECASE | re.MULTILINE)


class Question(NamedTuple):
    """What is compared: a prompt, our answer, theirs."""

    prompt: str
    ours: str
    theirs: str


@dataclass
class ChatJudge:
    """Asks `address` for the model `model`; `words` is `simple` or `concise`."""

    address: str
    model: str
    words: str = "simple"
    timeout_seconds: float = 60.0
    troubles: Counter[str] = field(default_factory=Counter)  # questions without a verdict, by why

    def __post_init__(self) -> None:
        self._server = Server(
            self.address, named_by="--judge", key_variable=JUDGE_KEY, timeout_seconds=self.timeout_seconds
        )
        path = self._server.parts.path.rstrip("/")
        self._path = path if path.endswith("/completions") else f"{path}/chat/completions"

    def compare(
        self, questions: Sequence[Question], criterion: str = "", tell: Callable[[], None] = lambda: None
    ) -> list[Outcome]:
        """1, 0.5 or 0 for each question, None where a verdict is missing.

        Each is asked twice, our answer once as A and once as B: judges favour a place (Zheng et al. 2023, arXiv
        2306.05685). Won is what both orders agree on, a tie where they disagree. `tell` is called after each question.
        EnvironmentProblem where the first question gets no reply, UserError where the server refuses.
        """

        def ask(question: Question) -> Outcome:
            first = self._prefers(question.prompt, question.ours, question.theirs, criterion)
            second = self._prefers(question.prompt, question.theirs, question.ours, criterion)
            tell()
            if first is None or second is None:
                return None
            return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((first, second), 0.5)

        if not questions:
            return []
        begun = ask(questions[0])  # alone: an address that is wrong is not asked a thousand times
        if begun is None and (problem := next((t for t in self.troubles if t.startswith("no reply")), None)):
            raise EnvironmentProblem(f"--judge: {self.address}: {problem}")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return [begun, *pool.map(ask, questions[1:])]

    def _prefers(self, prompt: str, a: str, b: str, criterion: str) -> str | None:
        """A or B; None, counted, where no verdict could be had in two attempts."""
        only = f" Judge only by this: how {criterion} it is." if criterion else ""
        text = _FORM.format(question=_QUESTIONS[self.words], criterion=only, prompt=prompt, a=a, b=b)
        trouble = ""
        for _ in range(ATTEMPTS):
            try:
                verdict = read_verdict(self._reply(text))
            except NoReply as problem:
                trouble = str(problem)
                continue
            if verdict is not None:
                return verdict
            trouble = "a reply without a verdict"
        self.troubles[trouble] += 1
        return None

    def _reply(self, text: str) -> str:
        """What the model says; NoReply for what may pass, UserError for what will not."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        try:
            reply = self._server.ask(self._path, {**body, "max_tokens": REPLY_TOKENS}, REPLY_BYTES)
            found: Any = json.loads(reply)
            return str(found["choices"][0]["message"]["content"] or "")
        except Refused as refused:
            hint = f"; is the variable {JUDGE_KEY} set and right?" if refused.code in (401, 403) else ""
            raise UserError(f"--judge: {self.address}: refused with HTTP {refused.code}{hint}") from None
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise NoReply("no reply (not the JSON of a chat completion)") from None


def read_verdict(reply: str) -> str | None:
    """A or B, as it stands behind the last `Preferred:`, else as the last line where that is all it says; or None."""
    found = _PREFERRED.findall(reply)
    if found:
        return str(found[-1]).upper()
    lines = [line.strip(" \"'*.()[]") for line in reply.splitlines() if line.strip()]
    return lines[-1] if lines and lines[-1] in ("A", "B") else None
