"""Provenance: hashes that anyone can check, adapters that load on their own base only, cards without secrets."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowrank_align import provenance
from lowrank_align.errors import UserError
from lowrank_align.provenance import (
    check_same_base,
    file_sha256,
    folder_sha256,
    model_card,
    read_provenance,
    versions,
    weights_hash,
    write_provenance,
)

# printf a | sha256sum; printf b | sha256sum
SHA_A = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
SHA_B = "3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWRANK_ALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, content: str, seconds_old: float = 60) -> Path:
    """A file as a finished download leaves it: not touched for a while."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    then = path.stat().st_mtime - seconds_old
    os.utime(path, (then, then))
    return path


def record(run: Path, **fields: Any) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    write_provenance(run, **{"base": "org/base", "base_hash": "a" * 64, "method": "dpo"} | fields)
    return run


def plain_adapter(folder: Path, named: str | None) -> Path:
    write(folder / "adapter_config.json", json.dumps({"peft_type": "LORA", "base_model_name_or_path": named}))
    return folder


def test_hashes_are_those_of_sha256sum(tmp_path: Path) -> None:
    """A folder's: `sha256sum a.txt b.txt | sha256sum`, whatever the order they are given in."""
    a, b = write(tmp_path / "a.txt", "a"), write(tmp_path / "b.txt", "b")
    assert file_sha256(a) == SHA_A
    expected = hashlib.sha256(f"{SHA_A}  a.txt\n{SHA_B}  b.txt\n".encode()).hexdigest()
    assert folder_sha256([a, b]) == folder_sha256([b, a]) == expected


def test_a_models_hash_is_of_the_files_that_are_loaded(tmp_path: Path) -> None:
    """One file, or the shards of an index and the index; not a second copy in another layout, not an adapter."""
    one = write(tmp_path / "one" / "model.safetensors", "a").parent
    expected = hashlib.sha256(f"{SHA_A}  model.safetensors\n".encode()).hexdigest()
    assert weights_hash(one) == expected
    write(one / "adapter_model.safetensors", "x")
    write(one / "config.json", "{}")
    assert weights_hash(one) == expected

    many = tmp_path / "many"
    index = json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}})
    for name, content in {"a.safetensors": "a", "b.safetensors": "b", "consolidated.safetensors": "ab"}.items():
        write(many / name, content)
    write(many / "model.safetensors.index.json", index)
    index_sha = hashlib.sha256(index.encode()).hexdigest()
    listing = f"{SHA_A}  a.safetensors\n{SHA_B}  b.safetensors\n{index_sha}  model.safetensors.index.json\n"
    assert weights_hash(many) == hashlib.sha256(listing.encode()).hexdigest()


@pytest.mark.parametrize("shard", ["missing.safetensors", "../one.safetensors"])
def test_an_index_that_names_what_is_not_in_the_folder_is_told(tmp_path: Path, shard: str) -> None:
    write(tmp_path / "one.safetensors", "a")
    write(tmp_path / "model" / "model.safetensors.index.json", json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(UserError, match=f"names {shard}"):
        weights_hash(tmp_path / "model")


def test_a_folder_without_safetensors_is_told(tmp_path: Path) -> None:
    write(tmp_path / "pytorch_model.bin", "a")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        weights_hash(tmp_path)


def test_weights_are_read_once_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the first call, again after the size or the time changed; as long as it took to change back, too."""
    model = write(tmp_path / "model" / "model.safetensors", "a").parent
    reads: list[str] = []
    read = provenance.file_sha256
    monkeypatch.setattr(provenance, "file_sha256", lambda path: (reads.append(path.name), read(path))[1])
    first = weights_hash(model)
    assert weights_hash(model) == first
    assert len(reads) == 1
    write(model / "model.safetensors", "b", seconds_old=30)
    second = weights_hash(model)
    assert len(reads) == 2
    assert second == hashlib.sha256(f"{SHA_B}  model.safetensors\n".encode()).hexdigest() != first


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path, own_cache: Path) -> None:
    """A second write of the same size may fall into the same tick of the file system's clock."""
    file = write(tmp_path / "model" / "model.safetensors", "a", seconds_old=0)
    status = file.stat()
    first = weights_hash(file.parent)
    file.write_text("b")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights_hash(file.parent) != first
    assert not own_cache.exists()


def test_links_of_the_hubs_cache_share_one_entry(tmp_path: Path, own_cache: Path) -> None:
    """Two snapshots link to one blob: the hash is by the link's name, the cache by the blob."""
    blob = write(tmp_path / "blobs" / "123", "a")
    hashes = set()
    for snapshot in ("s1", "s2"):
        folder = tmp_path / snapshot
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(blob)
        hashes.add(weights_hash(folder))
    assert hashes == {hashlib.sha256(f"{SHA_A}  model.safetensors\n".encode()).hexdigest()}
    assert list(json.loads((own_cache / "weights_hash.json").read_text())) == [str(blob.resolve())]


@pytest.mark.parametrize("content", ["", "[1]", "not json", '{"%s": 5}', '{"%s": {"stamp": [1, 1], "sha256": "x"}}'])
def test_a_damaged_cache_costs_time_only(tmp_path: Path, own_cache: Path, content: str) -> None:
    file = write(tmp_path / "model" / "model.safetensors", "a")
    write(own_cache / "weights_hash.json", content.replace("%s", str(file)))
    expected = hashlib.sha256(f"{SHA_A}  model.safetensors\n".encode()).hexdigest()
    assert weights_hash(file.parent) == expected


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path, own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    weights_hash(write(tmp_path / "model" / "model.safetensors", "a").parent)
    assert own_cache.is_file()


def test_the_record_reads_back(tmp_path: Path) -> None:
    """From the run's folder, and from its adapter's."""
    run = record(tmp_path, data_hash=SHA_A, parent={"run": "runs/sft", "adapter_hash": SHA_B}, config={"rank": 8})
    (run / "adapter").mkdir()
    plain_adapter(run / "adapter", "org/base")
    for place in (run, run / "adapter"):
        found = read_provenance(place)
        assert found is not None
        assert (found["base"], found["method"], found["data_hash"]) == ("org/base", "dpo", SHA_A)
        assert found["parent"] == {"run": "runs/sft", "adapter_hash": SHA_B}
        assert (found["config"], found["tokenizer_hash"]) == ({"rank": 8}, None)
        assert set(found["versions"]) == {"python", "lowrank_align", "torch", "transformers", "peft", "bitsandbytes"}
        assert found["created"].endswith("+00:00")
    assert read_provenance(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_record_is_told(tmp_path: Path, content: str) -> None:
    write(tmp_path / "provenance.json", content)
    with pytest.raises(UserError, match="provenance.json: not "):
        read_provenance(tmp_path)


def test_versions_are_those_of_the_installed_packages() -> None:
    import torch

    assert versions()["torch"] == torch.__version__ or torch.__version__.startswith(str(versions()["torch"]))


def test_a_package_that_is_missing_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package-here",))
    assert versions()["no-such-package-here"] is None


def test_the_same_base_under_any_name_is_accepted(tmp_path: Path) -> None:
    check_same_base(record(tmp_path), "another/name", "a" * 64)


def test_another_base_of_the_same_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_same_base(record(tmp_path), "org/base", "b" * 64)
    message = str(caught.value)
    assert "org/base (weights aaaaaaaaaaaa), not for org/base (weights bbbbbbbbbbbb)" in message
    assert "\n" not in message


def test_a_plain_adapter_is_checked_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In its own folder or in `adapter/`; a local copy of a hub model has its name as the folder's."""
    caplog.set_level(logging.INFO)
    check_same_base(plain_adapter(tmp_path / "same", "Qwen/Qwen3-4B"), "Qwen/Qwen3-4B", "a" * 64)
    assert caplog.text == ""
    check_same_base(plain_adapter(tmp_path / "copy", "/models/qwen3-4b/"), "Qwen/Qwen3-4B", "a" * 64)
    assert "taken to be the same weights as Qwen/Qwen3-4B" in caplog.text
    plain_adapter(tmp_path / "run" / "adapter", "org/base")
    with pytest.raises(UserError, match="made for org/base, not for Qwen/Qwen3-4B; .*adapter_config.json$"):
        check_same_base(tmp_path / "run", "Qwen/Qwen3-4B", "a" * 64)


@pytest.mark.parametrize("named", [None, ""])
def test_a_plain_adapter_that_names_no_base_is_accepted_with_a_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, named: str | None
) -> None:
    caplog.set_level(logging.INFO)
    check_same_base(plain_adapter(tmp_path, named), "org/base", "a" * 64)
    (line,) = caplog.messages
    assert "does not say which base" in line


def test_tokens_never_reach_the_disk(tmp_path: Path) -> None:
    """By the key's name or by the value's look; `max_new_tokens` is no secret."""
    token = "hf_" + "a1B2" * 8
    config = {"hub_token": "x1y2z3", "note": f"use {token} here", "nested": [{"password": "p4ss"}], "max_new_tokens": 5}
    text = (record(tmp_path, config=config) / "provenance.json").read_text()
    for secret in ("x1y2z3", token, "p4ss"):
        assert secret not in text
    assert json.loads(text)["config"] == {"note": "use [removed] here", "nested": [{}], "max_new_tokens": 5}


def card(method: str = "dpo", **fields: Any) -> tuple[dict[str, Any], str]:
    """The front matter, and the whole text."""
    made = provenance.Provenance(
        **{"base": "Qwen/Qwen3-4B", "base_hash": "ab" * 32, "method": method, "created": "2025-03-01T00:00:00+00:00"}
        | fields
    )
    text = model_card(made, {"loss": 0.51234567, "rewards/accuracies": 0.75}, "my-run")
    return yaml.safe_load(text.split("---\n")[1]), text


def test_the_card(tmp_path: Path) -> None:
    front, text = card(
        parent={"run": "/srv/work/runs/sft", "adapter_hash": "cd"}, config={"rank": 8, "eval_data": None}
    )
    assert front == {
        "base_model": "Qwen/Qwen3-4B",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:Qwen/Qwen3-4B", "lora", "lowrank_align", "dpo"],
    }
    assert "trained with lowrank_align by `dpo`, starting from the adapter of `sft`. 2025-03-01" in text
    assert 'model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-4B")' in text
    assert 'model = PeftModel.from_pretrained(model, "my-run/adapter")' in text
    assert "lowrank-align generate --prompts prompts.jsonl --model Qwen/Qwen3-4B --adapter my-run" in text
    for row in ("| loss | 0.512346 |", "| rewards/accuracies | 0.75 |", "| rank | 8 |"):
        assert row in text
    assert "eval_data" not in text
    assert "ab" * 32 in text


def test_a_reward_models_card_loads_a_classifier() -> None:
    front, text = card("reward")
    assert front["pipeline_tag"] == "text-classification"
    assert 'AutoModelForSequenceClassification.from_pretrained("Qwen/Qwen3-4B", num_labels=1)' in text
    assert "lowrank-align score --data rows.jsonl" in text


def test_the_cards_code_is_code() -> None:
    for method in ("dpo", "reward"):
        code = card(method)[1].split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")


def test_the_card_shows_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("USERPROFILE", "/home/ada")
    config = {
        "model": "/home/ada/models/base",
        "data": "~/secret/pairs.jsonl",
        "out": r"C:\Users\ada\run",
        "eval_data": "../ada/held_out.jsonl",
        "prompts": "data/prompts.jsonl",
        "reward": "/home/ada/x.py:score",
        "note": "see /home/ada/readme",
        "target_modules": ["/home/ada/q_proj"],
    }
    front, text = card(base="/home/ada/models/base", config=config)
    assert front["base_model"] == "base"
    assert "ada" not in text.replace("AutoModel", "").replace("adapter", "")
    for shown in ("| model | base |", "| data | pairs.jsonl |", "| out | run |", "| prompts | data/prompts.jsonl |"):
        assert shown in text


def test_a_base_name_cannot_break_out_of_the_front_matter() -> None:
    """YAML quotes what would be read as something else."""
    front, _ = card(base="odd: name #1")
    assert front["base_model"] == "odd: name #1"
