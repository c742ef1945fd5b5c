"""YAML and JSON that are too much, or ask for code."""
# ruff: noqa: E501 -- messages and templates are long lines

import json
from collections.abc import Sequence

from tests.torture.attacks import BAD, DEEP, World, attack, logps, resumed

# ---- YAML

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
YAMLS = {
    "a billion laughs": (LAUGHS, "aliases (*name) are not taken"),
    "!!python/object/apply": ("seed: !!python/object/apply:os.system ['echo ran > CANARY']\n", "not valid YAML"),
    "!!python/object/new": ("seed: !!python/object/new:os.system ['echo ran > CANARY']\n", "not valid YAML"),
    "!!python/name": ("seed: !!python/name:os.system\n", "not valid YAML"),
    "!!python/module": ("? !!python/module:evil\n: 1\n", "not valid YAML"),
    "100 MB": ("#" * 100_000_000, "over 1 MB"),
    "100,000 deep": ("seed: " + "[" * 100_000, "nested too deep"),
    "control characters in a key": ('"' + BAD.encode("unicode_escape").decode() + '": 1\n', "unknown setting"),
    "control characters in a value": ('quantize: "\\e[2J"\n', "quantize: input should be"),
    "another document": ("seed: 1\n---\nseed: 2\n", "not valid YAML"),
    "a merge key": ("<<: {seed: 1}\nrank: x\n", "rank: input should be"),
}


def _yaml(name: str, text: str, says: str) -> None:
    @attack(f"--config: {name}", 2, says)
    def _(w: World) -> Sequence[object]:
        (w.here / "c.yaml").write_text(text.replace("CANARY", str(w.canary)))
        (w.here / "evil.py").write_text(w.code())
        return ["sft", "--model", w.model, "--data", "rows.jsonl", "--out", "new", "--config", "c.yaml"]

    @attack(f"preset: {name}", 2, "theirs.yaml")
    def _(w: World) -> Sequence[object]:
        (w.here / "theirs.yaml").write_text(
            "model: m\n" * (name != "100,000 deep") + text.replace("CANARY", str(w.canary))
        )
        return ["sft", "--preset", "theirs.yaml", "--data", "rows.jsonl", "--out", "new"]


for _name, (_text, _says) in YAMLS.items():
    _yaml(_name, _text, _says)


@attack("--config: a reward function", 2, "reward: evil:reward is Python code, which no file may name; give --reward")
def _(w: World) -> Sequence[object]:
    (w.here / "evil.py").write_text(w.code() + "def reward(prompts, completions): return [0.0] * len(prompts)\n")
    (w.here / "c.yaml").write_text("reward: [evil:reward]\n")
    return ["ppo", "--model", w.model, "--prompts", "rows.jsonl", "--out", "new", "--config", "c.yaml"]


@attack("--config: an exact score", 2, "score: evil:reward is Python code")
def _(w: World) -> Sequence[object]:
    (w.here / "evil.py").write_text(w.code())
    (w.here / "c.yaml").write_text("score: evil:reward\n")
    return ["frontier", "--model", w.model, "--out", "new", "--config", "c.yaml"]


@attack("--config: a judge that is code", 2, "judge: evil:reward is Python code")
def _(w: World) -> Sequence[object]:
    (w.here / "evil.py").write_text(w.code())
    (w.here / "c.yaml").write_text("judge: [evil:reward]\n")
    return ["eval", "--model", w.model, "--prompts", "rows.jsonl", "--config", "c.yaml"]


@attack("--config: a judge at an address", 2, "judge: http://127.0.0.1:9/v1 is an address")
def _(w: World) -> Sequence[object]:
    """It would get the prompts, and the key in LOWRANK_JUDGE_KEY."""
    (w.here / "c.yaml").write_text("judge: ['http://127.0.0.1:9/v1']\njudge_model: m\nagainst: base\n")
    return ["eval", "--model", w.model, "--prompts", "rows.jsonl", "--config", "c.yaml"]


@attack(
    "--config: a server to draw rollouts, and a key to send it",
    2,
    "rollout_server: http://127.0.0.1:9/v1 is an address",
)
def _(w: World) -> Sequence[object]:
    (w.here / "c.yaml").write_text("rollout_server: http://127.0.0.1:9/v1\nrollout_server_key_env: HF_TOKEN\n")
    return ["ppo", "--model", w.model, "--prompts", "rows.jsonl", "--reward", w.runs / "reward", "--out", "new",
            "--config", "c.yaml"]  # fmt: skip


@attack("preset: a reward function", 2, "is said on the command line, not in a preset")
def _(w: World) -> Sequence[object]:
    (w.here / "evil.py").write_text(w.code())
    (w.here / "theirs.yaml").write_text("model: m\nmethods:\n  ppo:\n    reward: [evil:reward]\n")
    return ["ppo", "--preset", "theirs.yaml", "--prompts", "rows.jsonl", "--out", "new"]


# ---- JSON beside a run

HUGE = '{"state": "finished", "steps": 1, "x": "' + "a" * 70_000_000 + '"}'


def _listed(file: str, how: str) -> None:
    @attack(f"runs: {file} {how}", 0, "")
    def _(w: World) -> Sequence[object]:
        (w.here / "runs").mkdir()
        run = w.a_run().rename(w.here / "runs" / "theirs")
        (run / file).write_text(DEEP if how == "100,000 deep" else HUGE)
        return ["runs", "runs"]


for _name in ("run.json", "metrics.jsonl", "provenance.json"):
    for _says in ("100,000 deep", "of 70 MB"):
        _listed(_name, _says)


def _read(file: str, how: str, content: str, says: str) -> None:
    @attack(f"reward run: {file} {how}", 2, says)
    def _(w: World) -> Sequence[object]:
        run = w.a_run("reward")
        (run / file).write_text(content)
        return ["score", "--model", w.model, "--adapter", run, "--data", "rows.jsonl", "--out", "new.jsonl", "--quantize",
                "none", "--shifted"]  # fmt: skip


_read("reward.json", "100,000 deep", DEEP, "holds no number under shift")
_read("reward.json", "of 70 MB", HUGE, "holds no number under shift")
_read("reward.json", "with a shift of 400 digits", '{"shift": 1' + "0" * 400 + "}", "holds no number under shift")
_read("provenance.json", "100,000 deep", DEEP, "not valid JSON (nested too deep)")
_read("provenance.json", "of wrong types", '{"base_hash": {"a": 1}}', "base_hash: not a text")


@attack("run: prompting.json 100,000 deep", 2, "holds no text under answer_prefix")
def _(w: World) -> Sequence[object]:
    run = w.a_run()
    (run / "prompting.json").write_text(DEEP)
    return logps(w, None, run)


@attack("run: a text before every answer of control characters", 0, "")
def _(w: World) -> Sequence[object]:
    run = w.a_run()
    (run / "prompting.json").write_text(json.dumps({"answer_prefix": f"x{BAD}"}))
    return logps(w, None, run)


@attack("run: a checkpoint's state 100,000 deep", 0, "")
def _(w: World) -> Sequence[object]:
    return resumed(w, lambda step: (step / "state.json").write_text(DEEP) and None)


@attack("run: a checkpoint's manifest 100,000 deep", 0, "")
def _(w: World) -> Sequence[object]:
    return resumed(w, lambda step: (step / "manifest.json").write_text(DEEP) and None)


@attack("run: a checkpoint's manifest that lists files outside", 0, "")
def _(w: World) -> Sequence[object]:
    listed = {"format": 1, "step": 2, "files": {"../../../outside/secret.txt": {"sha256": "0" * 64, "bytes": 1}}}
    return resumed(w, lambda step: (step / "manifest.json").write_text(json.dumps(listed)) and None)
