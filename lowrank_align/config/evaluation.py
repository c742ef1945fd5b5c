"""The knobs of `eval`: what is given decides what is measured."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lowrank_align.config.knobs import Coefficient, ModelSettings, NotNegative, Positive, Rate
from lowrank_align.config.online import is_function
from lowrank_align.servers import check_address

JUDGE_KEY = "LOWRANK_JUDGE_KEY"


def is_address(judge: str) -> bool:
    """An http address, as against a reward run or a function."""
    return judge.lower().startswith(("http://", "https://"))


class EvalSettings(ModelSettings):
    """Measure a run: win rate, score, KL, perplexity, a reward model's accuracy, how far people agree."""

    model: str | None = None  # type: ignore[assignment]
    """The base: a model folder, a hub id, or `tiny`. A preset names one. What people said (--store) needs none."""
    prompts: str | None = None
    """Prompts to answer: any rows that have one. With --adapter (or without: the bare base), and a --judge."""
    against: str | None = None
    """Whose answers to compare with: a run, `base`, or `reference` (the data's own: a completion, a pair's chosen)."""
    judge: list[str] | None = None
    """Who compares: reward runs, module:function(prompts, completions) -> scores, or http(s) addresses of
    OpenAI-compatible servers. Each judges for itself."""
    judge_model: str | None = None
    """The model to ask for at the address."""
    judge_prompt: Literal["simple", "concise"] = "simple"
    """What the address is asked: which answer is better, or which is better and says nothing beside the point."""
    criteria: list[str] | None = None
    """Ask the address about each of these too (`helpful`, `harmless`, ...), one by one."""
    judge_timeout: Rate = 60.0
    """Seconds to wait for the address."""
    temperature: Coefficient = 1.0
    """At which answers are drawn; 0 takes the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    max_new_tokens: Positive = 128
    """The longest answer in tokens."""
    batch_size: Positive = 16
    """Answers, or rows, at once."""
    kl_to: str | None = None
    """How far --adapter went in nats from this: `start` (what its run began with), `base`, or a run."""
    reward: str | None = None
    """A reward run to measure on --data, or beside what people said in --store."""
    data: str | None = None
    """Pairs or rankings that --reward did not train on."""
    by: str | None = None
    """A column of the data (source, tags, ...): accuracy for each of its values too."""
    perplexity_data: str | None = None
    """Demonstrations or texts: the perplexity of --adapter and of --against on them."""
    store: str | None = None
    """A store of judgements: how far people agree, with each other and with --reward."""
    tasks: list[str] | None = None
    """Tasks of lm-evaluation-harness, which is an extra: pip install 'lowrank-align[lm-eval]'."""
    task_folder: str | None = None
    """A folder with task files of your own."""
    task_limit: Positive | None = None
    """So many examples of each task."""
    num_fewshot: NotNegative | None = None
    """Examples before each question; without it, as the task says."""
    skip_bad: bool = False
    """Leave bad rows out and count them, instead of stopping at the first."""
    out: str | None = None
    """The folder for report.json, report.md, plots and answers.jsonl. It must not exist, unless with --overwrite."""
    overwrite: bool = False
    """Replace the report in OUT."""

    @field_validator("judge")
    @classmethod
    def _addresses_without_key(cls, value: list[str] | None) -> list[str] | None:
        """They are written into the report and its answers."""
        for judge in value or []:
            if is_address(judge):
                check_address(judge, f"the environment variable {JUDGE_KEY}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "EvalSettings":
        addresses = [judge for judge in self.judge or [] if is_address(judge)]
        if not (self.prompts or self.data or self.perplexity_data or self.store or self.tasks):
            raise ValueError(
                "nothing to measure: give --prompts (with --judge or --kl-to), --reward with --data, "
                "--perplexity-data, --store or --tasks"
            )
        self._check_prompts(addresses)
        if self.data and not self.reward:
            raise ValueError("data: pairs to measure a reward run on; give --reward too")
        if self.reward and not (self.data or self.store):
            raise ValueError("reward: give --data with pairs (or --store with votes) to measure it on")
        if self.by and not self.data:
            raise ValueError("by: a column of --data, which is not given")
        if self.needs_model and self.model is None:
            raise ValueError("model: missing; give --model or --preset (only --store alone needs none)")
        return self

    def _check_prompts(self, addresses: list[str]) -> None:
        if self.prompts and not (self.judge or self.kl_to):
            raise ValueError("prompts: give --judge to compare or score the answers, or --kl-to")
        if self.kl_to and not self.prompts:
            raise ValueError("kl_to: answers are drawn for it; give --prompts")
        if self.judge and not (self.prompts or self.store):
            raise ValueError("judge: give --prompts to have answers judged, or --store to hold it against people")
        if self.kl_to and not self.adapter:
            raise ValueError("kl_to: how far --adapter went, which is not given")
        if self.against and not (self.judge or self.perplexity_data or self.tasks):
            raise ValueError("against: give --judge to say who is better")
        if addresses and self.prompts and not self.against:
            raise ValueError(f"judge: {addresses[0]} compares two answers; give --against")
        if addresses and not self.judge_model:
            raise ValueError("judge_model: the name of the model to ask for at the address is missing")
        if self.criteria and not addresses:
            raise ValueError("criteria: are asked of an http address; a function is a criterion by itself")

    @property
    def needs_model(self) -> bool:
        """Whether a base has to be loaded."""
        return bool(self.prompts or self.data or self.perplexity_data or self.tasks or self.reward_runs)

    @property
    def scorers(self) -> list[str]:
        """The judges that give each answer a score: reward runs and functions."""
        return [judge for judge in self.judge or [] if not is_address(judge)]

    @property
    def reward_runs(self) -> list[str]:
        """Every reward run that is named."""
        runs = [judge for judge in self.scorers if not is_function(judge)]
        return list(dict.fromkeys([*runs, *([self.reward] if self.reward else [])]))
