"""A frozen reference's log-probabilities, kept on disk: computed once for a row, not once a round and run.

For runs of several rounds through the data, and for several runs from the same start (another beta, another loss). A
row is always scored by itself, so that what is found does not depend on the rows beside it, and a resumed run finds
the same.
"""

import hashlib
import logging
import secrets
from array import array
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lowrank_align.base import Base
from lowrank_align.durable import write_atomic
from lowrank_align.provenance import cache_folder
from lowrank_align.trees import TreeRow

log = logging.getLogger(__name__)

ROWS_OF_A_FILE = 64


class ReferenceCache:
    """`role`'s log-probabilities, in a folder that belongs to its weights, the base and what it computes in."""

    def __init__(self, base: Base, role: str) -> None:
        self.base, self.role = base, role
        self.folder = cache_folder() / "reference" / _key(base, role)
        self.known: dict[str, Tensor] = {}  # by a row's content: its completions' tokens one after the other, fp32
        self.unsaved: dict[str, Tensor] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                self.known |= load_file(file)
            except (SafetensorError, OSError) as error:  # computed again
                log.warning("%s: left out, it cannot be read (%s)", file, error)

    def token_logps(self, rows: Sequence[TreeRow]) -> Tensor:
        """(N, C) of all completions of the rows in their order, as `Base.token_logps` has them; 0 on padding."""
        found: list[Tensor] = []
        for row in rows:
            name = _content(row)
            if name not in self.known:
                self._compute(row, name)
            found += self.known[name].to(self.base.device).split([len(c.ids) for c in row.completions])
        return pad_sequence(found, batch_first=True)

    def save(self) -> None:
        """Write down what is not on disk yet; a file of its own, so that several runs can share a folder."""
        if self.unsaved:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / f"{secrets.token_hex(8)}.safetensors", to_safetensors(self.unsaved))
            self.unsaved = {}

    def _compute(self, row: TreeRow, name: str) -> None:
        batch = self.base.collate([row])
        with self.base.role(self.role):
            logps = self.base.token_logps(batch).float().cpu()
        said = torch.cat([line[: len(c.ids)] for line, c in zip(logps, row.completions, strict=True)])
        self.known[name] = said
        if torch.isfinite(said).all():
            self.unsaved[name] = said
        if len(self.unsaved) >= ROWS_OF_A_FILE:
            self.save()


def _key(base: Base, role: str) -> str:
    digest = hashlib.sha256(f"{base.weights_hash} {base.quantize} {base.compute_dtype}".encode())
    for name, parameter in sorted(base.roles[role].parameters.items()):
        digest.update(name.encode() + parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _content(row: TreeRow) -> str:
    digest = hashlib.sha256(array("l", row.prompt_ids).tobytes())
    for completion in row.completions:
        digest.update(b"|" + array("l", completion.ids).tobytes() + bytes(completion.mask))
    return digest.hexdigest()
