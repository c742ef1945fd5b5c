"""Rollouts from a server, against a small one of the tests' own that really samples: what is asked, what is made of the
replies, what is told when they are wrong. Never against vLLM itself."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align.config import METHODS, resolve
from lowrank_align.errors import EnvironmentProblem, Stopped, UserError
from lowrank_align.progress import Progress
from lowrank_align.rollout import Rollout, sample
from lowrank_align.rollout_server import RolloutServer
from lowrank_align.stopping import StopSignals
from tests.serving import SLOW, SmallServer, Trouble, cut, ready, status

PROMPTS = [{"prompt": prompt} for prompt in ("Say a: ", "Write of the sea, please: ", "b ", "And then? ")]
SMALL: dict[str, Any] = {"max_new_tokens": 8, "batch_size": 4, "reward": "served_reward:es"}
SECRET = "k" * 24


@pytest.fixture(scope="module")
def started(tiny_llama: Path) -> Iterator[SmallServer]:
    server = SmallServer(tiny_llama)
    yield server
    server.close()


@pytest.fixture
def server(started: SmallServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallServer:
    body = "[10 * c.count('e') / (len(c) + 1) for c in completions]"
    ready(started, tmp_path, monkeypatch, SMALL["reward"], body, attempts=3)
    return started


@pytest.fixture
def served(server: SmallServer, make_method: Callable[..., Any]) -> Callable[..., Any]:
    """`served(**knobs)`: a GRPO method whose rollouts come from the server, and its prompts."""
    return lambda **knobs: make_method("grpo", PROMPTS, rollout_server=server.address, **SMALL, group_size=3, **knobs)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [{**json.loads(line), "seconds": 0} for line in (folder / "metrics.jsonl").read_text().splitlines()]


def outcome(folder: Path) -> Any:
    """What must be the same of two runs."""
    return [path.read_bytes() for path in sorted(folder.glob("*/adapter_model.safetensors"))], lines_of(folder)


def no_retry(function: Callable[[int], Any], knob: str) -> Any:
    return function(4)


def plain(groups: Any) -> list[list[Rollout]]:
    return [[one.rollout for one in group] for group in groups]


# ---- the same answers


def test_greedy_answers_are_the_local_ones_and_plain_peft_s(served: Callable[..., Any], tiny_llama: Path) -> None:
    """The adapter as it lies there for the server, under PEFT alone, says the same: it is what others can load."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GenerationConfig

    method, rows = served()
    sampler = RolloutServer(method.settings.model_copy(update={"temperature": 0.0}))
    prompts, ends = [row.prompt_ids for row in rows], method.renderer.end_ids
    found = plain(sampler.sample(method.base, prompts, [0] * 4, end_ids=ends, completions_per_prompt=1))
    options = {"end_ids": ends, "max_new_tokens": 8, "generator": torch.Generator(), "temperature": 0.0}
    with method.base.role("policy"):
        assert found == sample(method.base, prompts, **options)
    assert found != sample(method.base, prompts, **options), "the adapter changes nothing"
    (folder,) = sampler.folder.iterdir()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), folder)
    config = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=ends, pad_token_id=0)
    for prompt, (rollout,) in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert said[0, len(prompt) :].tolist() == rollout.ids


def test_the_same_noise_gives_the_same_answers(served: Callable[..., Any], server: SmallServer) -> None:
    """Each request's seed is the noise; the server's choices come back to front and are put in order."""
    method, rows = served(temperature=0.8)
    groups = method.roll_out(rows, 3, no_retry)
    seeds = {tuple(body["prompt"]): body["seed"] for body in server.paths("/v1/completions")}
    assert len(set(seeds.values())) == 4
    for row, group in zip(rows, groups, strict=True):
        with method.base.role("policy"):
            (expected,) = sample(
                method.base, [row.prompt_ids], end_ids=method.renderer.end_ids, max_new_tokens=8, temperature=0.8,
                generator=torch.Generator().manual_seed(seeds[tuple(row.prompt_ids)]), completions_per_prompt=3,
            )  # fmt: skip
        assert group == expected
    assert method.roll_out(rows, 3, no_retry) == groups
    assert method.roll_out(rows, 4, no_retry) != groups
    assert method.served.figures["objective/sampler_gap"] < 1e-4  # the server's are those before the temperature


def test_a_row_that_comes_twice_in_a_step_is_answered_anew(served: Callable[..., Any]) -> None:
    method, rows = served()
    first, second = method.roll_out([rows[0], rows[0]], 1, no_retry)
    assert first != second


def test_what_is_asked(served: Callable[..., Any], server: SmallServer) -> None:
    """Nothing but the temperature may change the distribution, whatever the model's own generation settings say."""
    method, rows = served(temperature=0.5)
    method.roll_out(rows[:1], 1, no_retry)
    (body,) = server.paths("/v1/completions")
    (load,) = server.paths("/v1/load_lora_adapter")
    assert body["prompt"] == rows[0].prompt_ids
    assert body["model"] == load["lora_name"]
    assert Path(load["lora_path"]).is_absolute()
    assert (body["n"], body["max_tokens"], body["temperature"]) == (3, 8, 0.5)
    neutral = {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}
    assert {name: body[name] for name in neutral} == neutral
    assert body["stop_token_ids"] == method.renderer.end_ids and body["ignore_eos"]
    assert 0 <= body["seed"] < 2**52


def test_a_new_name_for_new_weights_and_the_old_one_goes(served: Callable[..., Any], server: SmallServer) -> None:
    method, rows = served()
    left_by_a_kill = method.served.server.folder / "lowrank-dead"
    left_by_a_kill.mkdir(parents=True)
    method.roll_out(rows, 1, no_retry)
    method.roll_out(rows, 2, no_retry)
    (first,) = server.loaded
    assert len(server.paths("/v1/load_lora_adapter")) == 1, "the same weights were loaded twice"
    for parameter in method.base.trainable_parameters("policy").values():
        parameter.data.add_(0.01)
    method.roll_out(rows, 3, no_retry)
    (second,) = server.loaded
    assert first != second
    assert [path.name for path in method.served.server.folder.iterdir()] == [second]
    assert [body["lora_name"] for body in server.paths("/v1/unload_lora_adapter")] == ["lowrank-dead", first]
    method.close()
    assert not server.loaded
    assert not method.served.server.folder.exists()


# ---- what servers give


@pytest.mark.parametrize("gives", ["token_id:", "text"])
def test_answers_of_other_servers(gives: str, served: Callable[..., Any], server: SmallServer) -> None:
    """`token_id:17` is as good as ids; a text is tokenised again, and a word says so, once."""
    method, rows = served()
    told: list[str] = []
    method.tell = told.append
    expected = method.roll_out(rows, 1, no_retry)
    server.gives = gives
    found = method.roll_out(rows, 1, no_retry)
    method.roll_out(rows, 2, no_retry)
    if gives == "token_id:":
        assert found == expected and not told
        assert method.served.figures
    else:
        decode = method.renderer.decode
        for one, other in zip(sum(found, []), sum(expected, []), strict=True):
            assert decode(other.ids).startswith(decode(one.ids)) and one.finished == other.finished
        assert len(told) == 1 and "texts without token ids" in told[0]
        assert not method.served.figures


def test_prompts_as_text(served: Callable[..., Any], server: SmallServer) -> None:
    """The text is one of which the server's tokenizer, which puts <s> before it, makes the prompt's own ids."""
    method, rows = served(rollout_server_prompts="text")
    method.roll_out(rows, 1, no_retry)
    for body in server.paths("/v1/completions"):
        assert isinstance(body["prompt"], str) and "top_k" not in body
    said = {body["prompt"] for body in server.paths("/v1/completions")}
    assert {tuple(method.base.tokenizer(text).input_ids) for text in said} == {tuple(row.prompt_ids) for row in rows}


def test_a_prompt_that_no_text_gives(served: Callable[..., Any]) -> None:
    method, rows = served(rollout_server_prompts="text")
    from dataclasses import replace

    t_h = [*method.base.tokenizer("t").input_ids, *method.base.tokenizer("h", add_special_tokens=False).input_ids]
    with pytest.raises(UserError, match="a prompt has no text that gives its own tokens again"):
        method.roll_out([replace(rows[0], prompt_ids=t_h)], 1, no_retry)  # "th" is one token


def test_a_server_that_leaves_the_end_token_out(served: Callable[..., Any], server: SmallServer) -> None:
    method, rows = served()
    end = method.renderer.end_ids[0]

    def without(handler: Any, reply: Any) -> None:
        for choice in reply[1]["choices"]:
            choice.update(token_ids=[9, 10], finish_reason="stop", stop_reason=None)
        handler.send(reply)

    server.trouble = lambda path, body: without if path == "/v1/completions" else None
    assert method.roll_out(rows[:1], 1, no_retry)[0][0] == Rollout(rows[0].prompt_ids, [9, 10, end], True)


# ---- training


@pytest.mark.parametrize("method", ["grpo", "rloo", "ppo", "online-dpo", "expert", "quark"])
def test_every_method_that_samples(
    method: str, run: Callable[..., Path], server: SmallServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps with an evaluation: nothing is drawn here, each step has an adapter of its own, nothing is left."""
    monkeypatch.setattr("lowrank_align.methods.online.sample", None)
    monkeypatch.setattr("lowrank_align.methods.online.fill_cache", None)
    group = {"group_size": 2} if "group_size" in METHODS[method].model_fields else {}
    knobs = {**SMALL, **group, "max_steps": 2, "batch_size": 2, "eval_rows": 1, "learning_rate": 1e-2}
    folder = run(method, PROMPTS, "run", rollout_server=server.address, **knobs)
    lines = lines_of(folder)
    assert all(line["objective/sampler_gap"] < 1e-4 for line in lines)
    assert lines[-1]["eval_objective/sampler_gap"] < 1e-4
    assert len(server.paths("/v1/completions")) == 2 + 2 + 1
    names = [body["lora_name"] for body in server.paths("/v1/load_lora_adapter")]
    assert len(names) == len(set(names)) == 3
    assert not server.loaded and not (folder / "rollout_adapters").exists()


def test_training_through_it_moves_the_score(run: Callable[..., Path], server: SmallServer) -> None:
    """As `test_group_methods.py` has it of local rollouts."""
    knobs = {**SMALL, "max_new_tokens": 10, "batch_size": 8, "micro_batch_size": 8, "max_steps": 10, "group_size": 8}
    knobs |= {"missing_eos_penalty": 0.0, "lr_schedule": "constant", "learning_rate": 1e-2, "beta": 0.01}
    scores = [
        line["objective/scores"]
        for line in lines_of(run("grpo", PROMPTS, "run", rollout_server=server.address, **knobs))
    ]
    assert sum(scores[-3:]) > 2 * sum(scores[:3])


class StopAt2(Progress):
    def __init__(self, stop: StopSignals) -> None:
        super().__init__(quiet=True)
        self.stop = stop

    def step(self, step: int, figures: Any) -> None:
        self.stop.asked = step == 2


def test_stopped_and_resumed_elsewhere(run: Callable[..., Path], server: SmallServer, tiny_llama: Path) -> None:
    """Another server, at another address, with the same generator: the same bytes."""
    knobs = {**SMALL, "group_size": 2, "max_steps": 4, "batch_size": 2, "eval_rows": 1, "eval_steps": 3}
    whole = outcome(run("grpo", PROMPTS, "whole", rollout_server=server.address, **knobs))
    stop = StopSignals()
    with pytest.raises(Stopped, match="stopped at step 2 of 4 and saved"):
        run("grpo", PROMPTS, "run", rollout_server=server.address, progress=StopAt2(stop), stop=stop, **knobs)
    assert not server.loaded
    other = SmallServer(tiny_llama)
    try:
        found = outcome(run("grpo", PROMPTS, "run", rollout_server=other.address, resume=True, **knobs))
        assert len(other.paths("/v1/completions")) == 2 + 2 + 1 + 1
    finally:
        other.close()
    assert found == whole


# ---- what looks wrong


def test_a_server_that_samples_from_something_else(served: Callable[..., Any], server: SmallServer) -> None:
    method, rows = served()
    told: list[str] = []
    method.tell = told.append
    server.ignores_adapters = True
    method.roll_out(rows, 1, no_retry)
    method.roll_out(rows, 2, no_retry)
    gap = method.served.figures["objective/sampler_gap"]
    assert gap > 0.2
    (line,) = told
    assert "nats a token from the policy's (objective/sampler_gap); does it serve the same weights?" in line


def test_a_server_that_draws_one_answer_again_and_again(served: Callable[..., Any], server: SmallServer) -> None:
    method, rows = served()
    told: list[str] = []
    method.tell = told.append
    server.one_seed = True
    method.roll_out(rows, 1, no_retry)
    assert [line for line in told if "one answer again and again" in line]


# ---- what is refused


def at(path: str, trouble: Trouble) -> Callable[[str, dict[str, Any]], Trouble | None]:
    return lambda asked, body: trouble if asked == path else None


def test_a_server_without_adapters(served: Callable[..., Any], server: SmallServer) -> None:
    method, rows = served()
    server.takes_adapters = False
    with pytest.raises(UserError, match=r"refused with HTTP 404 \(Not Found\); it must see .*--enable-lora"):
        method.roll_out(rows, 1, no_retry)


def test_what_the_server_says_of_an_adapter_is_told(served: Callable[..., Any], server: SmallServer) -> None:
    """In one line of plain characters; the rank is too high for vLLM's default, say."""
    method, rows = served()
    server.trouble = at("/v1/load_lora_adapter", status(500, "LoRA rank 32\nis greater\x1b[31m than 16" + "." * 300))
    with pytest.raises(EnvironmentProblem) as raised:
        method.roll_out(rows, 1, no_retry)
    assert str(raised.value).startswith(
        f"--rollout-server: {server.address}: no reply (HTTP 500): LoRA rank 32 is greater [31m than 16"
    )
    assert str(raised.value).endswith("..., 3 times") and len(str(raised.value)) < 350
    assert len(server.paths("/v1/load_lora_adapter")) == 3


def test_a_server_that_was_started_anew_gets_the_adapter_again(served: Callable[..., Any], server: SmallServer) -> None:
    method, rows = served()
    expected = method.roll_out(rows, 1, no_retry)
    server.restart()
    assert method.roll_out(rows, 1, no_retry) == expected
    assert len(set(body["lora_name"] for body in server.paths("/v1/load_lora_adapter"))) == 1


def test_one_that_fails_for_good_ends_the_others(served: Callable[..., Any], server: SmallServer) -> None:
    """The first prompt is refused, the rest would be asked three times each: they are given up."""
    method, rows = served()
    first = rows[0].prompt_ids
    refused, no_reply = status(400, "no"), status(503)
    server.trouble = lambda path, body: (
        (refused if body["prompt"] == first else no_reply) if path == "/v1/completions" else None
    )
    with pytest.raises((UserError, EnvironmentProblem), match="refused with HTTP 400|no reply"):
        method.roll_out(rows, 1, no_retry)


def test_nobody_there_is_known_before_a_model_is_loaded(run: Callable[..., Path], server: SmallServer) -> None:
    with pytest.raises(EnvironmentProblem, match=r"no reply \(Connection refused\); is it running\?$"):
        run("grpo", PROMPTS, "run", rollout_server="http://127.0.0.1:1/v1", **SMALL)
    assert not Path("run").exists()


def test_a_full_disk(served: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    method, rows = served()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(EnvironmentProblem, match="could not write the server's adapter: No space left"):
        method.roll_out(rows, 1, no_retry)


def test_in_the_middle_the_steps_before_are_kept(run: Callable[..., Path], server: SmallServer) -> None:
    """At the third step the server is gone: the first two are saved, and once it is back nothing is lost."""
    knobs = {**SMALL, "group_size": 2, "max_steps": 4, "batch_size": 2, "rollout_server": server.address}
    whole = outcome(run("grpo", PROMPTS, "whole", **knobs))
    server.reset()
    server.trouble = lambda path, body: cut if len(server.paths("/v1/completions")) > 4 and body.get("prompt") else None
    with pytest.raises(EnvironmentProblem) as raised:
        run("grpo", PROMPTS, "run", **knobs)
    assert str(raised.value).startswith(f"--rollout-server: {server.address}: no reply (not ")
    assert str(raised.value).endswith(", 3 times; step 2 of 4 is saved, the same command with --resume goes on")
    server.reset()
    assert outcome(run("grpo", PROMPTS, "run", resume=True, **knobs)) == whole


@pytest.mark.parametrize("kind", SLOW)
def test_too_slow(kind: str, served: Callable[..., Any], server: SmallServer) -> None:
    """The limit is for the whole reply, whatever comes in the meantime."""
    method, rows = served(rollout_server_seconds=0.3)
    server.trouble = at("/v1/completions", SLOW[kind])
    with pytest.raises(EnvironmentProblem, match=r"no reply within 0.3 s, 3 times$"):
        method.roll_out(rows[:1], 1, no_retry)
    server.over.set()
    server.over.clear()


# ---- the key


def test_the_key_is_sent_and_written_nowhere(
    run: Callable[..., Path], server: SmallServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not even where the server repeats it in its refusal."""
    monkeypatch.setenv("ROLLOUT_KEY", SECRET)
    knobs = {**SMALL, "group_size": 2, "max_steps": 3, "batch_size": 2}
    knobs |= {"rollout_server": server.address, "rollout_server_key_env": "ROLLOUT_KEY"}
    refused = status(401, f"the key {SECRET} is unknown")
    server.trouble = lambda path, body: (
        refused if len(server.paths("/v1/completions")) > 2 and body.get("prompt") else None
    )
    with pytest.raises(UserError) as raised:
        run("grpo", PROMPTS, "run", **knobs)
    assert "refused with HTTP 401; is the variable ROLLOUT_KEY right?; step 1 of 3 is saved" in str(raised.value)
    server.trouble = lambda path, body: None
    run("grpo", PROMPTS, "run", resume=True, **knobs)
    assert set(server.keys) == {f"Bearer {SECRET}"}
    written = [path.read_bytes() for path in Path("run").rglob("*") if path.is_file()]
    assert len(written) > 5 and not any(SECRET.encode() in content for content in written)
    assert SECRET not in "".join([*capfd.readouterr(), str(raised.value), repr(raised.value.__cause__)])


GIVEN = {"model": "x", "prompts": "x", "out": "x", "reward": "m:f"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rollout_server": f"https://me:{SECRET}@host/v1"}, "a key does not belong into the address"),
        ({"rollout_server": f"https://host/v1?key={SECRET}"}, "a key does not belong into the address"),
        ({"rollout_server": SECRET}, "no address; it looks like http://127.0.0.1:8000/v1"),
        ({"rollout_server": "http://[::1"}, "no address"),
        ({"rollout_server": "file:///etc/passwd"}, "no address"),
        ({"rollout_server": "http://h:99999/v1"}, "no address"),
        (
            {"rollout_server": "http://h/v1", "rollout_server_key_env": SECRET},
            "not the name of an environment variable",
        ),
        ({"rollout_server_key_env": "KEY"}, "without rollout_server there is nobody to send a key to"),
    ],
)
def test_settings_that_are_refused_and_not_repeated(given: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as raised:
        resolve(METHODS["grpo"], GIVEN | given)
    assert said in str(raised.value)
    assert SECRET not in str(raised.value)


def test_a_file_that_names_an_address_is_refused_without_the_key_in_it(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"rollout_server: http://me:{SECRET}@host:9/v1?key={SECRET}\n")
    with pytest.raises(
        UserError, match="rollout_server: http://host:9 is an address, which no file may name"
    ) as raised:
        resolve(METHODS["grpo"], GIVEN, tmp_path / "c.yaml")
    assert SECRET not in str(raised.value)


def test_a_key_that_is_not_there_or_would_go_unencrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = GIVEN | {"rollout_server": "http://elsewhere.example/v1", "rollout_server_key_env": "ROLLOUT_KEY"}
    monkeypatch.delenv("ROLLOUT_KEY", raising=False)
    with pytest.raises(UserError, match="^--rollout-server-key-env: the variable ROLLOUT_KEY is not set$"):
        RolloutServer(resolve(METHODS["grpo"], given))
    monkeypatch.setenv("ROLLOUT_KEY", SECRET)
    with pytest.raises(UserError, match="ROLLOUT_KEY is sent over https only, or to this machine; use https://$"):
        RolloutServer(resolve(METHODS["grpo"], given))


# ---- memory


def test_the_plan_has_no_rollouts(server: SmallServer, tiny_llama: Path) -> None:
    from lowrank_align.architecture import Architecture
    from lowrank_align.loading import read_config
    from lowrank_align.plan import predict, work_of
    from lowrank_align.skeleton import measure

    architecture: Architecture = measure(read_config(str(tiny_llama)), str(tiny_llama))
    sizes = {"device": "cpu", "dtype": "fp32", "prompt_tokens": 8, "completion_tokens": 8}
    here = work_of(resolve(METHODS["grpo"], GIVEN), **sizes)  # type: ignore[arg-type]
    there = work_of(resolve(METHODS["grpo"], GIVEN | {"rollout_server": server.address}), **sizes)  # type: ignore[arg-type]
    assert set(predict(architecture, here).phases) == {"training", "rollouts"}
    assert set(predict(architecture, there).phases) == {"training"}
