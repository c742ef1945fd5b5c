"""The embedded base: its grammar and exact score, its simulated annotator, its tokenizer, and its cache."""

import math
import random
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.tiny import annotate, demonstrations, exact_score, grammar, prompts, simulated_pairs, tiny_path
from lowrank_align.tiny.cache import FILES, cached
from lowrank_align.tiny.pretrain import build_tokenizer, collate
from lowrank_align.tiny.recipe import Recipe

SMALL = Recipe(hidden_size=64, intermediate_size=64, layers=1, heads=2, steps=6, batch_size=4, warmup_steps=2)


def score(completion: str, prompt: str = "Review: The new film was") -> float:
    return exact_score([prompt], [completion])[0]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached(SMALL, tmp_path_factory.mktemp("cache"))


class TestExactScore:
    @pytest.mark.parametrize(
        ("completion", "expected"),
        [
            # very +3, truly +3, gladly +3
            (" very good, and the plot was truly superb. I would gladly see it again.", 3.0),
            # really -3, very -3, very -3, never -3
            (" really bad. The plot felt very dull, and the music was very weak. I would never see it again.", -3.0),
            # plain +2, plain -2, plain +2
            (" good, while the plot was dull. I would see it again.", 2 / 3),
            # somewhat +1, rather -1, might not -1
            (" somewhat good. The plot was rather dull. I might not see it again.", -1 / 3),
            # the module's own example: +3, -2, +2, +1
            (" very charming, while the plot felt dull. The music was good. I might see it again.", 1.0),
            # two and two: +2, +2, -2, -2, might +1
            (
                " good, and the plot was superb. The music was bad, and the ending was poor. I might see it again.",
                1 / 5,
            ),
        ],
    )
    def test_is_the_mean_of_the_judgements(self, completion: str, expected: float) -> None:
        assert score(completion) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("completion", "expected"),
        [
            # the plot a second time: +2, +3, 0, +2
            (" good, and the plot was truly superb. The plot was charming. I would see it again.", 7 / 4),
            # "good" and nothing but "good": +2, 0, 0, 0, +3
            (
                " good, and the plot was very good. The music was very good, and the ending was good. "
                "I would gladly see it again.",
                5 / 5,
            ),
        ],
    )
    def test_repetition_is_worth_nothing(self, completion: str, expected: float) -> None:
        assert score(completion) == pytest.approx(expected)

    @pytest.mark.parametrize(
        "completion",
        [
            "",
            " good",
            " good, and the plot was superb. I would",  # cut off
            " good, and the plot was superb. I would see it again. I would see it again.",  # goes on
            " good. I would see it again.",  # judges no part
            " good, and the wine was superb. I would see it again.",  # a restaurant's
            " good, and the plot was superb. I would eat there again.",
            " very very good, and the plot was superb. I would see it again.",
            " good, and The plot was superb. I would see it again.",
            "good, and the plot was superb. I would see it again.",  # "wasgood"
            " good good good good good good good.",
            " grand, and the plot was superb. I would see it again.",  # no word of the grammar
            " x Review: The film was good, and the plot was superb. I would see it again.",  # heading in the answer
        ],
    )
    def test_text_outside_the_grammar_scores_below_the_worst_review(self, completion: str) -> None:
        assert score(completion) == -4.0

    def test_answers_in_a_conversation_are_reviews_too(self) -> None:
        """-2, -2 and -1 of three judgements."""
        answer = " The film was dull, and the plot was poor. I might not see it again."
        assert score(answer, prompt="User: Review: what?\nAssistant:") == pytest.approx(-5 / 3)

    def test_wants_one_completion_a_prompt(self) -> None:
        with pytest.raises(ValueError, match="shorter"):
            exact_score(["Review: The film was"], [])


class TestTexts:
    def test_prompts_are_distinct_and_decided_by_the_seed(self) -> None:
        assert len(set(prompts(500, seed=1))) == 500
        assert prompts(50, seed=1) == prompts(50, seed=1)
        assert len(set(prompts(50, seed=1)) & set(prompts(50, seed=2))) < 5

    def test_more_prompts_than_the_grammar_has(self) -> None:
        """6 domains x 2 determiners x 9 ages x 8 origins x 3 subjects x 3 verbs = 7776."""
        assert len(set(prompts(7776, seed=0))) == 7776
        with pytest.raises(UserError, match="7777 prompts asked for, the grammar has 7776"):
            prompts(7777, seed=0)

    def test_demonstrations_are_whole_reviews_that_never_repeat(self) -> None:
        rows = demonstrations(400, seed=3)
        assert rows == demonstrations(400, seed=3)
        assert rows != demonstrations(400, seed=4)
        for row in rows:
            values = grammar.judgements(row["prompt"].removeprefix("Review: ") + row["completion"])
            assert values is not None and 0 not in values, row
            assert 3 <= len(values) <= 5

    @pytest.mark.parametrize("positivity", [0.2, 0.6, 0.8])
    def test_positivity_is_the_share_of_positive_judgements(self, positivity: float) -> None:
        """1000 reviews, 4.0 judgements each, correlated within a review: one deviation is under 0.012."""
        rows = demonstrations(1000, seed=5, positivity=positivity)
        values = [grammar.judgements(row["prompt"][len("Review: ") :] + row["completion"]) or [] for row in rows]
        signs = [value > 0 for review in values for value in review]
        assert fmean(signs) == pytest.approx(positivity, abs=0.04)

    def test_pretraining_texts_are_balanced_and_grammatical(self) -> None:
        """The score's deviation is about 1.6, so the mean of 1500 has 0.04."""
        rng = random.Random(0)
        texts = [grammar.pretraining_text(rng, chat_share=0.5) for _ in range(1500)]
        reviews = [text.removeprefix("Review: ").strip() for _, text in texts]
        scores = exact_score([""] * 1500, reviews)
        assert min(scores) >= -3.0
        assert fmean(scores) == pytest.approx(0.0, abs=0.15)
        chats = [context for context, _ in texts if context]
        assert 650 < len(chats) < 850
        assert all(chat.startswith("User: ") and chat.endswith("\nAssistant:") for chat in chats)


class TestAnnotator:
    def test_probability_is_the_sigmoid_of_the_difference(self) -> None:
        """sigmoid((2 - 1) / 0.5) = 0.8808; of 5000 draws one deviation is 0.0046."""
        rng = random.Random(0)
        wins_of_a = sum(annotate(2.0, 1.0, 0.5, rng) == 0 for _ in range(5000))
        assert wins_of_a / 5000 == pytest.approx(0.8808, abs=0.015)

    def test_large_differences_neither_overflow_nor_waver(self) -> None:
        rng = random.Random(0)
        assert {annotate(1e6, -1e6, 1e-3, rng) for _ in range(50)} == {0}
        assert {annotate(-1e6, 1e6, 1e-3, rng) for _ in range(50)} == {1}

    def test_pairs_skip_identical_answers(self) -> None:
        rows = simulated_pairs(
            ["p", "q", "r"], ["a", "same", "c"], ["b", "same", "d"], [3, 0, -3], [-3, 0, 3], temperature=1e-3
        )
        assert rows == [
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            {"prompt": "r", "chosen": "d", "rejected": "c"},
        ]

    def test_pairs_are_decided_by_the_seed(self) -> None:
        def label(seed: int) -> list[dict[str, str]]:
            return simulated_pairs(["p"] * 40, ["a"] * 40, ["b"] * 40, [0.0] * 40, [0.0] * 40, seed=seed)

        assert label(1) == label(1)
        assert label(1) != label(2)
        assert {row["chosen"] for row in label(1)} == {"a", "b"}

    def test_bad_scores_and_temperatures_are_refused(self) -> None:
        with pytest.raises(UserError, match="answers to prompt 2: scores 0.0 and nan"):
            simulated_pairs(["p", "q"], ["a", "a"], ["b", "b"], [0.0, 0.0], [0.0, math.nan])
        with pytest.raises(UserError, match="temperature: 0 "):
            simulated_pairs(["p"], ["a"], ["b"], [0.0], [0.0], temperature=0)


class TestTokenizer:
    def test_a_word_is_a_token(self, small_base: Path) -> None:
        """`<bos>`, Review, `:`, The, film, was, good, `.`: eight, and no end token."""
        tokenizer = AutoTokenizer.from_pretrained(small_base)
        ids = tokenizer("Review: The film was good.")["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == [
            *("<bos>", "Review", ":", "ĠThe", "Ġfilm", "Ġwas", "Ġgood", "."),
        ]
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)

    @pytest.mark.parametrize(
        "text",
        [
            "Review: The new film was good, and the plot was dull. I would see it again.",
            "User: How was the film?\nAssistant: The",
            "Grüße, 世界 ☃\n\t  two  spaces, filmmaker\x00 <b>",
            " ",
            "",
        ],
    )
    def test_any_text_comes_back(self, small_base: Path, text: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(small_base)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text

    def test_a_prompts_tokens_begin_the_whole_texts_tokens(self) -> None:
        tokenizer = build_tokenizer(SMALL)
        for row in demonstrations(30, seed=0):
            prompt = tokenizer(row["prompt"])["input_ids"]
            whole = tokenizer(row["prompt"] + row["completion"])["input_ids"]
            assert whole[: len(prompt)] == prompt
            assert tokenizer.decode(whole[len(prompt) :]) == row["completion"]
            assert 12 <= len(whole) - len(prompt) + 1 <= 36

    def test_only_the_text_and_its_end_are_learnt(self) -> None:
        """Row 0: `<bos>` User : | The film `<eos>`; row 1: `<bos>` | The `<eos>`, then three of padding."""
        tokenizer = build_tokenizer(SMALL)
        user, colon, the, film = tokenizer.convert_tokens_to_ids(["User", ":", "ĠThe", "Ġfilm"])
        ids, targets = collate(tokenizer, [("User:", " The film"), ("", " The")])
        assert ids.tolist() == [[1, user, colon, the, film, 2], [1, the, 2, 0, 0, 0]]
        assert targets.tolist() == [[-100, -100, -100, the, film, 2], [-100, the, 2, -100, -100, -100]]


class TestCache:
    def test_same_recipe_same_bytes(self, small_base: Path, tmp_path: Path) -> None:
        """Whatever the caller's generator, threads and gradient mode are, which stay as they were."""
        before, threads = torch.get_rng_state(), torch.get_num_threads()
        with torch.no_grad():
            again = cached(SMALL, tmp_path)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.get_num_threads() == threads
        assert again.name == small_base.name
        assert bytes_of(again) == bytes_of(small_base)
        assert set(bytes_of(again)) == set(FILES)

    def test_another_seed_is_another_model(self, small_base: Path, tmp_path: Path) -> None:
        other = cached(Recipe(**{**vars(SMALL), "seed": 1}), tmp_path)
        assert other.name != small_base.name
        assert bytes_of(other)["model.safetensors"] != bytes_of(small_base)["model.safetensors"]
        assert bytes_of(other)["tokenizer.json"] == bytes_of(small_base)["tokenizer.json"]

    def test_loads_as_any_transformers_model(self, small_base: Path) -> None:
        """4 x 64 x 64 attention, 3 x 64 x 64 MLP, 3 norms of 64, and one tied embedding of V x 64."""
        model = AutoModelForCausalLM.from_pretrained(small_base)
        tokens = len(AutoTokenizer.from_pretrained(small_base))
        assert sum(p.numel() for p in model.parameters()) == 7 * 64 * 64 + 3 * 64 + tokens * 64
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.generation_config.eos_token_id == 2

    def test_progress_counts_the_steps_and_the_loss_falls(self, tmp_path: Path) -> None:
        seen: list[tuple[int, int, float]] = []
        cached(SMALL, tmp_path, lambda *step: seen.append(step))
        assert [step[:2] for step in seen] == [(step, 6) for step in range(1, 7)]
        assert seen[-1][2] < seen[0][2]

    def test_a_built_model_is_not_built_again(self, small_base: Path) -> None:
        def never(*_: object) -> None:
            raise AssertionError("built again")

        assert cached(SMALL, small_base.parent, never) == small_base

    def test_an_incomplete_folder_is_replaced(self, small_base: Path, tmp_path: Path) -> None:
        (tmp_path / SMALL.name).mkdir()
        (tmp_path / SMALL.name / "config.json").write_text("{}")
        assert bytes_of(cached(SMALL, tmp_path)) == bytes_of(small_base)

    def test_the_second_of_two_builders_takes_the_firsts(self, tmp_path: Path) -> None:
        """A second builder runs from start to end while the first is at its last step."""

        def overtake(step: int, steps: int, _: float) -> None:
            if step == steps:
                (cached(SMALL, tmp_path) / "winner").touch()

        built = cached(SMALL, tmp_path, overtake)
        assert (built / "winner").exists()
        assert [folder.name for folder in tmp_path.iterdir()] == [SMALL.name]

    def test_an_interrupted_build_leaves_nothing(self, tmp_path: Path) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cached(SMALL, tmp_path, interrupt)
        assert list(tmp_path.iterdir()) == []

    def test_a_failed_save_is_one_line_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("lowrank_align.tiny.cache.os.fsync", full)
        with pytest.raises(EnvironmentProblem, match="No space left on device .set LOWRANK_ALIGN_CACHE"):
            cached(SMALL, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_cache_folder_that_cannot_be_is_told_before_training(self, tmp_path: Path) -> None:
        def never(*_: object) -> None:
            raise AssertionError("trained first")

        (tmp_path / "file").touch()
        with pytest.raises(EnvironmentProblem, match="file: cannot cache the model tiny"):
            cached(SMALL, tmp_path / "file", never)

    def test_the_environment_names_the_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOWRANK_ALIGN_CACHE", str(tmp_path))
        folder = tmp_path / Recipe(seed=7).name
        folder.mkdir()
        for name in FILES:
            (folder / name).touch()
        assert tiny_path(seed=7) == folder

    def test_importing_and_finding_it_needs_no_torch(self) -> None:
        program = (
            "import sys; from lowrank_align.tiny.recipe import Recipe; Recipe().name; print('torch' in sys.modules)"
        )
        answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert answer.stdout.strip() == "False"
