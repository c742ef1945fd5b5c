"""Rounds in small: each in its folder, nothing done twice, people's new judgements alone."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.config import RoundsSettings
from lowrank_align.data.formats import parse_row
from lowrank_align.errors import Stopped, UserError
from lowrank_align.rounds.collecting import annotators_of, as_unpaired, judged_since, of_round, read_lines, together
from lowrank_align.store import Completion, Judgement, Record, Store

Command = Callable[..., Any]
PROMPTS = [{"prompt": f"{i}. Say: "} for i in range(12)]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with prompts, a taste and the trainings' settings."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    vowels = "def vowels(prompts, completions):\n    return [sum(c in 'aeiou' for c in text) for text in completions]\n"
    Path("taste_of_rounds.py").write_text(vowels)
    Path("few.yaml").write_text("max_steps: 1\nbatch_size: 4\nrank: 2\nsample_steps: 0\nlearning_rate: 0.01\n")
    return tmp_path


@pytest.fixture
def rounds(command: Command, tiny_llama: Path, files: Path) -> Command:
    """`rounds("--method", "dpo", ...)`: two rounds of four prompts, four held out."""
    common = ("--model", tiny_llama, "--quantize", "none", "--max-length", 64, "--max-new-tokens", 6, "--rounds", 2,
              "--pairs", 4, "--held-out", 4, "--policy-config", "few.yaml", "--reward-config", "few.yaml",
              "--score", "taste_of_rounds:vowels", "--prompts", "prompts.jsonl")  # fmt: skip
    return lambda *flags: command("rounds", *common, *flags)


def test_two_rounds_stopped_and_gone_on_with(rounds: Command, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds with a reward model are four trainings. Stopped before the fourth, the same command does that one;
    again, none; with a third round, two more. The third round's data are the pairs of all three."""
    module = import_module("lowrank_align.rounds.rounds")
    trained: list[str] = []
    real, limit = module.train, 3

    def counted(settings: Any, **given: Any) -> Any:
        before = (Path(settings.out) / "run.json").is_file()
        if not before and len(trained) == limit:
            raise Stopped("as a signal would")
        trained.extend([settings.out] * (not before))
        return real(settings, **given)

    monkeypatch.setattr(module, "train", counted)
    flags = ("--out", "all", "--annotator", "exact", "--noise", 0.25, "--refit")
    assert rounds(*flags).code == 75
    limit = 99
    trained.clear()
    done = rounds(*flags)
    assert (done.code, done.err) == (0, "")
    assert trained == ["all/round-2/policy"]
    record = json.loads(Path("all/rounds.json").read_text())
    first, second = record["rounds"]
    assert (first["number"], second["number"]) == (1, 2)
    for one in (first, second):
        assert one["judge"] == "taste_of_rounds:vowels"
        assert 0 <= one["wins"] <= 1
        assert one["score"] >= 0
        assert one["kl"] is not None
    assert second["trained_on"] == first["pairs"] + second["pairs"]
    config = Path("all/round-2/policy/config.yaml").read_text()
    assert "adapter: all/round-1/policy" in config
    trained.clear()
    assert rounds(*flags, "--rounds", 3).code == 0
    assert trained == ["all/round-3/reward", "all/round-3/policy"]
    lines = [len(Path(f"all/round-{n}/pairs.jsonl").read_text().splitlines()) for n in (1, 2, 3)]
    assert len(Path("all/round-3/data.jsonl").read_text().splitlines()) == sum(lines)
    other = rounds(*flags, "--pairs", 5)
    assert (other.code, other.err) == (
        2, "error: all: pairs: the rounds in there have 4, not 5; choose another --out\n",
    )  # fmt: skip


@pytest.mark.parametrize("method", ["expert", "kto"])
def test_methods_that_take_no_pairs(rounds: Command, files: Path, method: str) -> None:
    """Expert iteration samples by itself, so a reward model is refitted without being asked for; KTO gets two rows a
    pair."""
    flags = ("--out", "all", "--annotator", "pool", "--rounds", 1, "--held-out", 0, "--method", method)
    done = rounds(*flags)
    assert (done.code, done.err) == (0, "")
    pairs = len(Path("all/round-1/pairs.jsonl").read_text().splitlines())
    if method == "expert":
        assert Path("all/round-1/reward/reward.json").is_file()
        assert len(Path("all/round-1/prompts.jsonl").read_text().splitlines()) == 4
    else:
        assert not Path("all/round-1/reward").exists()
        assert len(Path("all/round-1/unpaired.jsonl").read_text().splitlines()) == 2 * pairs


def test_prompts_of_a_round() -> None:
    """Five prompts, two a round: rounds 1 and 2 have four different ones, round 3 the fifth and the first again."""
    rows = [parse_row({"prompt": str(i)}, "", i) for i in range(5)]
    drawn = [[row.prompt for row in of_round(rows, 2, number, seed=3)] for number in (1, 2, 3)]
    assert len({*drawn[0], *drawn[1], drawn[2][0]}) == 5
    assert drawn[2][1] == drawn[0][0]
    assert [row.prompt for row in of_round(rows, 9, 1, seed=3)] == [*drawn[0], *drawn[1], drawn[2][0]]


def test_pairs_as_single_answers() -> None:
    """The better one is good, whichever stands first; a tie gives nothing."""
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert as_unpaired([pair, pair | {"preference": 0.2}, pair | {"preference": 0.5}]) == [
        {"prompt": "p", "completion": "a", "label": True},
        {"prompt": "p", "completion": "b", "label": False},
        {"prompt": "p", "completion": "b", "label": True},
        {"prompt": "p", "completion": "a", "label": False},
    ]


# ---- people


def people(store: str, **knobs: Any) -> RoundsSettings:
    return RoundsSettings(model="m", out="o", store=store, **{"min_judgements": 2} | knobs)


def test_only_what_people_judged_since_the_last_round(tmp_path: Path) -> None:
    """Two judgements make round 1; nothing new, and one alone, are too few for another; a changed one counts as new,
    and then its old row goes from what is trained on."""
    file = str(tmp_path / "s.db")
    first, second, third = (
        Record("pair", f"p{i}", (Completion(f"a{i}"), Completion(f"b{i}"))) for i in range(3)
    )  # fmt: skip
    left, right = Judgement("preferred", ranks=(1, 2)), Judgement("preferred", ranks=(2, 1))
    with Store(file) as store:
        for record in (first, second, third):
            store.add(record)
        store.judge(first.id, "me", left)
        with pytest.raises(Stopped, match="1 new judgements since the last round, 2 wanted; judge more with `studio`"):
            judged_since(people(file), [], "studio")
        store.judge(second.id, "me", left)
    round_1 = judged_since(people(file), [], "studio").lines
    assert [line["chosen"] for line in round_1] == ["a0", "a1"]
    with pytest.raises(Stopped, match="0 new judgements"):
        judged_since(people(file), [round_1], "studio")
    with Store(file) as store:
        store.judge(first.id, "me", right, expected_version=1)
        store.judge(third.id, "me", right)
    found = judged_since(people(file), [round_1], "studio")
    assert [line["chosen"] for line in found.lines] == ["b0", "b2"]
    assert "2 new judgements, 2 pairs" in found.told
    assert [line["chosen"] for line in together([round_1, found.lines])] == ["a1", "b0", "b2"]


def test_rounds_wait_for_people(command: Command, files: Path, tiny_llama: Path) -> None:
    """Too few judgements: resumable, and the line opens the studio. With enough, one round, and the next waits again,
    the studio then on the new policy. Without prompts nothing is compared, and that is said."""
    common = ("--model", tiny_llama, "--quantize", "none", "--max-length", 64, "--max-new-tokens", 6, "--out", "all",
              "--store", "s.db", "--min-judgements", 2, "--policy-config", "few.yaml")  # fmt: skip
    with Store("s.db") as store:
        for i in range(2):
            record = Record("pair", f"Say {i}: ", (Completion(f"good {i}"), Completion(f"bad {i}")))
            store.add(record)
            if i == 0:
                store.judge(record.id, "me", Judgement("preferred", ranks=(1, 2)))
    waiting = command("rounds", *common)
    assert waiting.code == 75
    assert "1 new judgements since the last round, 2 wanted; judge more with" in waiting.err
    assert f"`lowrank-align studio --model {tiny_llama} --store s.db`" in waiting.err
    with Store("s.db") as store:
        store.judge(record.id, "me", Judgement("preferred", ranks=(1, 2)))
    after = command("rounds", *common)
    assert after.code == 75
    assert "no --prompts: the rounds are not compared" in after.out
    assert "--adapter all/round-1/policy --store s.db" in after.err
    assert json.loads(Path("all/rounds.json").read_text())["rounds"][0]["score"] is None


# ---- mistakes


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[1]\n", "\udcff"])
def test_lines_that_no_round_wrote(content: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=r"pairs.jsonl: damaged \(.*\); restore it, or choose another --out$"):
        read_lines(tmp_path / "pairs.jsonl")


def test_a_kill_while_the_pairs_are_written(rounds: Command, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of the round was there by then, the same command goes on."""
    module = import_module("lowrank_align.rounds.rounds")
    flags = ("--out", "all", "--annotator", "pool", "--rounds", 1, "--held-out", 0, "--method", "dpo")
    whole = module.write_lines

    def killed(path: Path, lines: Any) -> None:
        whole(path, lines)
        if path.name == "pairs.jsonl":
            raise Stopped("killed")

    monkeypatch.setattr(module, "write_lines", killed)
    assert rounds(*flags).code == 75
    monkeypatch.setattr(module, "write_lines", whole)
    assert rounds(*flags).code == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "annotator: give --annotator (simulated) or --store (people), one of the two"),
        (("--annotator", "pool", "--store", "s.db"), "one of the two"),
        (("--annotator", "me"), "annotator: me, must be pool or exact"),
        (("--annotator", "pool", "--noise", 0.1), "noise: is for --annotator exact"),
        (("--annotator", "pool", "--method", "dop"), "method: dop: not one for rounds (did you mean dpo?)"),
        (("--annotator", "pool", "--method", "sft"), "method: sft: not one for rounds"),
        (("--annotator", "pool", "--held-out", 12), "held_out: 12 of 12 prompts"),
        (("--annotator", "pool", "--policy-config", "nowhere.yaml"), "nowhere.yaml: "),
        (("--annotator", "pool", "--score", "taste_of_rounds:consonants"), "no function consonants"),
        (("--store", "nowhere.db"), "nowhere.db"),
    ],
)
def test_a_users_mistakes(rounds: Command, flags: tuple[object, ...], message: str) -> None:
    outcome = rounds("--out", "all", *flags)
    assert outcome.code in (2, 3)
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_simulated_needs_a_score(command: Command, files: Path) -> None:
    outcome = command("rounds", "--model", "m", "--out", "all", "--annotator", "pool", "--prompts", "prompts.jsonl")
    assert (outcome.code, outcome.err) == (
        2, "error: annotator: pool needs --score module:function and --prompts\n",
    )  # fmt: skip


def test_who_judges() -> None:
    """`exact` is one annotator without habits; what is not of a round's making is refused."""
    settings = RoundsSettings(model="m", out="o", annotator="exact", noise=0.1, score="a:b", prompts="p")
    (exact,) = annotators_of(settings)
    assert (exact.flipped, exact.points_a_word, exact.points_first) == (0.1, 0.0, 0.0)
    assert len(annotators_of(settings.model_copy(update={"annotator": "pool"}))) == 5


def test_a_folder_that_is_not_theirs(rounds: Command, files: Path) -> None:
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    outcome = rounds("--out", "mine", "--annotator", "pool")
    assert (outcome.code, outcome.err) == (2, "error: mine: holds files that no rounds wrote; choose another --out\n")
