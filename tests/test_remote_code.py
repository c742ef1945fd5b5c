"""Which folders' Python files may run; `tests/torture/test_strangers_code.py` tries it with models."""

from pathlib import Path

import pytest

from lowrank_align import remote_code
from lowrank_align.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(remote_code, "_trusted", set())
    (tmp_path / "code.py").touch()
    return tmp_path


def test_a_folder_is_trusted_under_all_its_names_and_no_other_is(folder: Path) -> None:
    assert not remote_code.is_trusted(folder)
    remote_code.trust(folder / ".." / folder.name)
    assert remote_code.is_trusted(folder) and remote_code.is_trusted(str(folder / "x" / ".."))
    assert not remote_code.is_trusted(folder.parent) and not remote_code.is_trusted(folder / "x")


@pytest.mark.parametrize("text", ["{", '{"auto_map": ["a/b--c.D"]}', '{"auto_map": {"A": [null, "a/b--c.D"]}}'])
def test_settings_that_lead_elsewhere_or_nowhere_are_refused(text: str, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer_config\.json") as caught:
        remote_code.trust(folder)
    assert "\n" not in str(caught.value)
    assert not remote_code.is_trusted(folder)
