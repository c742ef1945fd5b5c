"""Pickles in the place of weights, state and rows; safetensors that lie about themselves."""

import json
import struct
from collections.abc import Sequence

from tests.torture.attacks import World, attack, logps

# ---- pickles


@attack("adapter_model.bin", 2, "only safetensors are read, never .bin")
def _(w: World) -> Sequence[object]:
    run = w.a_run()
    (run / "adapter" / "adapter_model.safetensors").unlink()
    (run / "adapter" / "adapter_model.bin").write_bytes(w.pickled())
    return logps(w, None, run)


@attack("adapter_model.bin beside the safetensors", 0, "")
def _(w: World) -> Sequence[object]:
    run = w.a_run()
    for name in ("adapter_model.bin", "adapter_model.pt", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        (run / "adapter" / name).write_bytes(w.pickled())
        (run / name).write_bytes(w.pickled())
    return logps(w, None, run)


@attack("adapter .safetensors that is a pickle", 2, "cannot be read (Error while deserializing header")
def _(w: World) -> Sequence[object]:
    run = w.a_run()
    (run / "adapter" / "adapter_model.safetensors").write_bytes(w.pickled())
    return logps(w, None, run)


@attack("pytorch_model.bin", 2, "no *.safetensors; other weight formats are not read")
def _(w: World) -> Sequence[object]:
    model = w.a_model()
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(w.pickled())
    return logps(w, model)


@attack("model.safetensors that is a pickle", 2, "cannot be loaded as a causal language model")
def _(w: World) -> Sequence[object]:
    model = w.a_model()
    (model / "model.safetensors").write_bytes(w.pickled())
    return logps(w, model)


@attack("a checkpoint's state as a pickle", 0, "")
def _(w: World) -> Sequence[object]:
    """The checkpoint does not verify, so the run starts anew."""
    run = w.a_run()
    step = run / "checkpoints" / "step-2"
    (step / "tensors.safetensors").write_bytes(w.pickled())
    (run / "adapter" / "adapter_model.safetensors").unlink()
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(state | {"state": "stopped"}))
    config = ["--max-steps", "2", "--batch-size", "2", "--rank", "2", "--sample-steps", "0", "--learning-rate", "0.01"]
    data = w.runs / "demonstrations.jsonl"
    return ["sft", "--model", w.model, "--data", data, "--out", run, "--quantize", "none", *config, "--resume"]


@attack("rows as a pickle", 2, "rows.jsonl:1: not UTF-8")
def _(w: World) -> Sequence[object]:
    (w.here / "rows.jsonl").write_bytes(w.pickled())
    return ["show", "--model", w.model, "--data", "rows.jsonl"]


# ---- safetensors


def header(entries: str, data: bytes = b"", size: int | None = None) -> bytes:
    text = entries.encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


LYING = {
    "a header of 2**63 bytes": header("{}", size=2**63),
    "a header longer than the file": header("{}", size=10**6),
    "a header of 200 MB that is not there": header("{}", size=200_000_000),
    "offsets beyond the file": header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}', bytes(8)),
    "offsets that overlap": header(
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        '"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
        bytes(12),
    ),
    "a shape that its bytes do not fill": header(
        '{"a": {"dtype": "F32", "shape": [99999999, 9], "data_offsets": [0, 8]}}', bytes(8)
    ),
    "a shape whose size overflows": header(
        '{"a": {"dtype": "F32", "shape": [4611686018427387904, 8], "data_offsets": [0, 8]}}', bytes(8)
    ),
    "a negative offset": header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}', bytes(8)),
    "one name twice": header(
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        '"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        bytes(8),
    ),
    "100,000 deep": header("[" * 100_000),
    "no UTF-8": struct.pack("<Q", 2) + b"\xff\xfe",
}


def _lying(name: str, content: bytes) -> None:
    @attack(f"adapter: {name}", 2, "theirs")
    def _(w: World) -> Sequence[object]:
        run = w.a_run()
        (run / "adapter" / "adapter_model.safetensors").write_bytes(content)
        return logps(w, None, run)

    @attack(f"model: {name}", 2, "cannot be loaded as a causal language model" if name != "one name twice" else "model")
    def _(w: World) -> Sequence[object]:
        model = w.a_model()
        (model / "model.safetensors").write_bytes(content)
        return logps(w, model)


for _name, _content in LYING.items():
    _lying(_name, _content)
