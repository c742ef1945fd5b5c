"""Checkpoints: exact, atomic, and never worse off than before."""

import errno
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align import checkpoint
from lowrank_align.checkpoint import latest, save, sealed_steps
from lowrank_align.durable import write_atomic
from lowrank_align.errors import EnvironmentProblem, NumericError
from lowrank_align.training_state import State, flatten, unflatten


def state_of(number: float) -> State:
    return State({"weight": torch.full((2, 3), number)}, {"number": number})


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def newest(folder: Path) -> float:
    found = latest(folder)
    assert found is not None
    assert found[1].tensors["weight"].eq(found[1].values["number"]).all()
    return found[1].values["number"]


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, with equal types all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, dict):
        return list(a) == list(b) and all(type(x) is type(y) and same(a[x], b[y]) for x, y in zip(a, b, strict=True))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return a.hex() == b.hex()
    return a == b


def through_disk(folder: Path, state: State) -> State:
    save(folder, 1, state, keep=1)
    found = latest(folder)
    assert found is not None
    return found[1]


def trained(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], steps: int) -> tuple[Any, list[Any]]:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(3, 4), (5,)]]
    optimizer = make(parameters)
    for _ in range(steps):
        take_step(optimizer, parameters)
    return optimizer, parameters


def take_step(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = (parameter.detach() * 3).sin()
    optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.95)),
        lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], lr=torch.tensor(1e-2)),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ],
    ids=["adamw", "adamw with groups and a tensor rate", "sgd with momentum"],
)
def test_an_optimiser_goes_on_bitwise(tmp_path: Path, make: Callable[..., torch.optim.Optimizer]) -> None:
    """Three steps, through the disk into a fresh optimiser, two more: the same parameters as five at a stretch."""
    optimizer, parameters = trained(make, 3)
    restored = through_disk(tmp_path, flatten("optimizer", optimizer.state_dict()))
    assert same(unflatten("optimizer", restored), optimizer.state_dict())
    assert not any(tensor.requires_grad for tensor in restored.tensors.values())

    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    fresh = make(copies)
    fresh.load_state_dict(unflatten("optimizer", restored))
    for _ in range(2):
        take_step(fresh, copies)
    assert same([p.data for p in copies], [p.data for p in trained(make, 5)[1]])


def test_any_nested_value_comes_back_exactly(tmp_path: Path) -> None:
    """All that JSON and safetensors would bend: tuples, non-string keys, -0.0, infinities, shared memory."""
    shared = torch.arange(6.0)
    nested = {
        0: {"0": torch.tensor(1.5), 0: torch.tensor(2.5)},
        "bf16": torch.tensor([1.0, -0.0, 3.14], dtype=torch.bfloat16),
        "fp16": torch.tensor([6e-8], dtype=torch.float16),
        "whole and view": (shared, shared[2:4], shared.view(2, 3).T),
        "empty": [torch.zeros(0, 3), torch.zeros(0, 3), {}, [], ()],
        "ints": [torch.tensor(2**62), torch.tensor([True, False]), 2**80, torch.random.get_rng_state()],
        "floats": [0.1, -0.0, 5e-324, math.inf, -math.inf],
        "looks like a tag": {"!tuple": [1, 2]},
        "a/b": torch.tensor(1),
        "a": {"b": torch.tensor(2)},
        None: (None, True, (1, (2.0, "ü\ud800\x00"))),
        (1, "x"): False,
    }
    assert same(unflatten("all", through_disk(tmp_path, flatten("all", nested))), nested)
    assert math.isnan(through_disk(tmp_path, State({}, {"nan": math.nan})).values["nan"])


def test_random_generators_go_on(tmp_path: Path) -> None:
    """Python's state is a tuple of tuples; torch's is a tensor of bytes."""
    generator = torch.Generator().manual_seed(5)
    state = State({"torch": generator.get_state()}, {"python": random.getstate()})
    expected = (random.random(), torch.rand(3, generator=generator).tolist())
    restored = through_disk(tmp_path, state)
    random.setstate(restored.values["python"])
    assert (
        random.random(),
        torch.rand(3, generator=generator.set_state(restored.tensors["torch"])).tolist(),
    ) == expected


def test_flatten_shares_memory_and_saving_does_not_touch_it(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    state = flatten("p", [parameter])
    save(tmp_path, 1, state, keep=1)
    assert state.tensors["p/0"].data_ptr() == parameter.data_ptr()
    assert parameter.requires_grad


def test_update_refuses_a_name_twice() -> None:
    state = flatten("a", [torch.zeros(1)])
    state.update(flatten("b", [torch.zeros(1)]))
    assert sorted(state.tensors) == ["a/0", "b/0"]
    with pytest.raises(ValueError, match="a/0"):
        state.update(flatten("a", [torch.zeros(1)]))


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="set"):
        save(tmp_path, 1, State({}, {"seen": {1, 2}}), keep=1)
    assert names(tmp_path) == []


def test_the_manifest_seals_the_files(tmp_path: Path) -> None:
    path = save(tmp_path, 7, state_of(1.0), keep=1)
    assert path == tmp_path / "step-7"
    assert names(path) == ["manifest.json", "state.json", "tensors.safetensors"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def test_the_last_k_stay_by_number(tmp_path: Path) -> None:
    """By number, not by name: step-9 is older than step-10."""
    for step in (8, 9, 10, 11):
        save(tmp_path, step, state_of(step), keep=2)
    assert names(tmp_path) == ["step-10", "step-11"]
    assert sealed_steps(tmp_path) == [11, 10]
    with pytest.raises(ValueError, match="keep=0"):
        save(tmp_path, 12, state_of(12), keep=0)


def truncate(path: Path) -> None:
    content = (path / "tensors.safetensors").read_bytes()
    (path / "tensors.safetensors").write_bytes(content[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "tensors.safetensors").write_bytes(content)


def change_values(path: Path) -> None:
    text = (path / "state.json").read_text()
    assert "2.0" in text
    (path / "state.json").write_text(text.replace("2.0", "3.0"))


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def lead_outside(path: Path) -> None:
    """A manifest that is right in every sum, but for a file beside the checkpoint."""
    secret = path.parent / "secret"
    secret.write_bytes(b"x")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}
    (path / "manifest.json").write_text(json.dumps(manifest))


def link_outside(path: Path) -> None:
    (path / "state.json").rename(path.parent / "state.json")
    (path / "state.json").symlink_to(path.parent / "state.json")


def edit_manifest(key: str, value: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {key: value}))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a truncated file": (truncate, "tensors.safetensors has"),
    "a flipped bit": (flip_a_bit, "tensors.safetensors is damaged"),
    "changed values": (change_values, "state.json is damaged"),
    "a missing file": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "an empty folder": (empty, "manifest.json is missing"),
    "a torn manifest": (
        lambda path: (path / "manifest.json").write_text('{"format": 1, "fil'),
        "manifest.json is damaged",
    ),
    "a manifest of nothing": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "a deep manifest": (lambda path: (path / "manifest.json").write_text("[" * 10**5), "manifest.json is damaged"),
    "a path that leads out": (lead_outside, r"manifest.json lists .*\.\./secret"),
    "a link that leads out": (link_outside, "state.json is missing"),
    "a renamed folder": (edit_manifest("step", 3), "manifest.json is that of step 3"),
    "another format": (edit_manifest("format", 2), "manifest.json has format 2"),
}


@pytest.mark.parametrize(("damage", "told"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_falls_back_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], Any], told: str
) -> None:
    save(tmp_path, 1, state_of(1.0), keep=3)
    damage(save(tmp_path, 2, state_of(2.0), keep=3))
    assert newest(tmp_path) == 1.0
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "step-2" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert re.search(told, record.getMessage())


def test_nothing_that_verifies_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "not there") is None
    assert latest(tmp_path) is None
    truncate(save(tmp_path, 1, state_of(1.0), keep=1))
    assert latest(tmp_path) is None


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    """What a kill leaves, a user's copy, and a file."""
    good = save(tmp_path, 1, state_of(1.0), keep=1)
    for name in (".tmp-step-9", "step-9-copy", "step-x"):
        shutil.copytree(good, tmp_path / name)
    (tmp_path / "step-8").write_text("")
    assert newest(tmp_path) == 1.0


def test_left_overs_of_a_kill_go_at_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-3").mkdir()
    (tmp_path / ".tmp-step-3" / "tensors.safetensors").write_bytes(b"half")
    save(tmp_path, 4, state_of(4.0), keep=1)
    assert names(tmp_path) == ["step-4"]


def test_a_save_after_a_fall_back_does_not_fall_to_the_rotation(tmp_path: Path) -> None:
    """step-9 is damaged, the run resumed from step-5 and saves step-6 with keep=1: 6 stays although 9 is larger."""
    save(tmp_path, 5, state_of(5.0), keep=1)
    truncate(save(tmp_path, 9, state_of(9.0), keep=2))
    save(tmp_path, 6, state_of(6.0), keep=1)
    assert names(tmp_path) == ["step-6"]
    assert newest(tmp_path) == 6.0


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3, state_of(1.0), keep=1)
    save(tmp_path, 3, state_of(2.0), keep=1)
    assert names(tmp_path) == ["step-3"]
    assert newest(tmp_path) == 2.0


def test_a_kill_while_a_step_is_replaced_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two renames, with keep=1: the old step-3 stands aside and is found; the next save tidies."""
    save(tmp_path, 3, state_of(1.0), keep=1)
    replace, calls = os.replace, []

    def killed_at_the_second(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 3, state_of(2.0), keep=1)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-3.old"]
    assert newest(tmp_path) == 1.0
    save(tmp_path, 3, state_of(2.0), keep=1)
    assert names(tmp_path) == ["step-3"]
    assert newest(tmp_path) == 2.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_non_finite_tensors_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    """float8_e4m3fn has no infinity: it becomes NaN, or its largest number in newer versions of torch."""
    save(tmp_path, 1, state_of(1.0), keep=1)
    bad = torch.tensor([1.0, math.nan if dtype == torch.float8_e4m3fn else value]).to(dtype)
    with pytest.raises(NumericError, match="step 2: optimizer/exp_avg") as caught:
        save(tmp_path, 2, State({"fine": torch.ones(1), "optimizer/exp_avg": bad}), keep=1)
    assert caught.value.exit_code == 4
    assert names(tmp_path) == ["step-1"]


def test_no_room_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 x 3 floats are 24 bytes; the margin alone is more than the 1 MB that is free."""
    save(tmp_path, 1, state_of(1.0), keep=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(
        EnvironmentProblem, match=r"no room for the checkpoint of step 2: 16\.8 MB needed, 1\.0 MB free"
    ):
        save(tmp_path, 2, state_of(2.0), keep=1)
    assert names(tmp_path) == ["step-1"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", range(1, 7))
def test_a_failing_disk_leaves_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: int
) -> None:
    """A save syncs six times: tensors, values, the folder, the manifest, the folder, the parent. Each of them may fail;
    at the last the new checkpoint is in place already, and both are good."""
    save(tmp_path, 1, state_of(1.0), keep=1)
    calls = []

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(EnvironmentProblem) as caught:
        save(tmp_path, 2, state_of(2.0), keep=1)
    assert os.strerror(code) in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert names(tmp_path) == (["step-1"] if call < 6 else ["step-1", "step-2"])
    assert newest(tmp_path) == (1.0 if call < 6 else 2.0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
@pytest.mark.parametrize("limit_bytes", [100, 6000], ids=["within the tensors", "within the values"])
def test_a_write_that_the_system_cuts_short(tmp_path: Path, limit_bytes: int) -> None:
    """The system's own refusal, through safetensors' writer and ours: no file may be larger than the limit."""
    import resource

    save(tmp_path, 1, state_of(1.0), keep=1)
    large = State({"weight": torch.zeros(1000)}, {"text": "x" * 10_000})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        with pytest.raises(EnvironmentProblem) as caught:
            save(tmp_path, 2, large, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-1"]
    assert newest(tmp_path) == 1.0


def test_what_reads_back_wrong_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, state_of(1.0), keep=1)
    write = checkpoint._write

    def lying_disk(temporary: Path, *rest: Any) -> None:
        write(temporary, *rest)
        flip_a_bit(temporary)

    monkeypatch.setattr(checkpoint, "_write", lying_disk)
    with pytest.raises(EnvironmentProblem, match="tensors.safetensors is damaged"):
        save(tmp_path, 2, state_of(2.0), keep=1)
    assert names(tmp_path) == ["step-1"]


def test_an_old_checkpoint_that_cannot_be_removed_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1, state_of(1.0), keep=1)
    remove = shutil.rmtree

    def stubborn(path: Path, **options: Any) -> None:
        if path.name == "step-1":
            raise PermissionError(errno.EACCES, "Permission denied")
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", stubborn)
    save(tmp_path, 2, state_of(2.0), keep=1)
    assert newest(tmp_path) == 2.0
    assert "could not remove old checkpoints" in caplog.text


def test_write_atomic_writes_bytes_and_text_as_they_are(tmp_path: Path) -> None:
    """U+00FC is C3 BC in UTF-8; line ends are not translated."""
    write_atomic(tmp_path / "a", "ü\r\n\n")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xbc\r\n\n"
    write_atomic(tmp_path / "a", b"\x00\xff")
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["a"]


def test_write_atomic_keeps_the_old_content_when_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic(tmp_path / "a", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentProblem, match="a: could not be written: No space left on device"):
        write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_write_atomic_syncs_the_file_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("sync"), sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    write_atomic(tmp_path / "a", "x")
    assert order == (["sync", "rename"] if sys.platform == "win32" else ["sync", "rename", "sync"])
