"""Published weights: files like the authors', with their classifiers and wrappings, from a server or a disk."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from audiotext_dist import storage
from audiotext_dist.errors import UserError
from audiotext_dist.models import weights
from audiotext_dist.models.audio import AudioTowerConfig
from audiotext_dist.models.towers import build_audio_tower
from tests.models.test_published_towers import SMALL_ATST, SMALL_MOBILENET, SMALL_PASST, atst, mobilenet, passt
from tests.web import web_server

CONFIG = AudioTowerConfig(passt=SMALL_PASST, mobilenet=SMALL_MOBILENET, atst=SMALL_ATST)
MAKERS = {"passt": passt, "mobilenet": mobilenet, "atst": atst}


def config(kind: str, pretrained: str | Path, sha256: str | None = None) -> AudioTowerConfig:
    groups = {"passt": SMALL_PASST, "mobilenet": SMALL_MOBILENET, "atst": SMALL_ATST}
    return AudioTowerConfig(kind=kind, pretrained=str(pretrained), sha256=sha256, **groups)  # type: ignore[arg-type]


def published(kind: str) -> dict[str, object]:
    """What the authors' file of this kind holds."""
    tower = MAKERS[kind]()
    match kind:
        case "passt":
            own = tower.transformer.state_dict()
            return {**own, "head.1.weight": torch.zeros(5, 24), "head_dist.bias": torch.zeros(5)}
        case "mobilenet":
            own = {f"features.{name}": value for name, value in tower.features.state_dict().items()}
            return {**own, "classifier.5.bias": torch.zeros(5)}
        case _:
            own = {f"model.teacher.encoder.{name}": value for name, value in tower.transformer.state_dict().items()}
            others = {
                "model.student.encoder.pos_embed": torch.zeros(3),
                "model.teacher.projector.0.bias": torch.ones(2),
            }
            mask = {"model.teacher.encoder.mask_embed": torch.zeros(1, 1, 24)}
            return {"state_dict": {**own, **others, **mask}, "epoch": 3, "hyper_parameters": {"arch": "base"}}


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, others = one.state_dict(), other.state_dict()
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_authors_file_fills_the_tower(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "published.pt"
    torch.save(published(kind), file)
    tower = build_audio_tower(config(kind, file, storage.sha256_of(file)), 32000)
    assert same(tower, MAKERS[kind]())


def test_a_finetuned_atst_with_other_names_fills_the_tower(tmp_path: Path) -> None:
    own = {f"encoder.encoder.{name}": value for name, value in atst().transformer.state_dict().items()}
    own = {name.replace(".norm_frame.", ".norm."): value for name, value in own.items()}
    torch.save({"state_dict": {**own, "head.weight": torch.zeros(2)}}, tmp_path / "as2M.ckpt")
    assert same(build_audio_tower(config("atst", tmp_path / "as2M.ckpt"), 16000), atst())


def test_a_published_name_is_fetched_once_into_torch_hubs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "server").mkdir()
    torch.save(published("passt"), tmp_path / "server" / "passt.pt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with web_server(tmp_path / "server") as url:
        monkeypatch.setitem(weights.PUBLISHED, "small", weights.Published("passt", f"{url}/passt.pt"))
        assert same(build_audio_tower(config("passt", "small"), 32000), passt())
    # The server is gone.
    assert same(build_audio_tower(config("passt", "small"), 32000), passt())
    assert [file.name for file in (tmp_path / "torch" / "hub" / "checkpoints").iterdir()] == ["passt.pt"]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"cannot fetch http.*passt\.pt .*put it at .*other") as raised:
        build_audio_tower(config("passt", "small"), 32000)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "pretrained", "message"),
    [
        ("passt", "nowhere.pt", r"pretrained=nowhere.pt is no file: give one, a URL, or one of passt_s_p16"),
        ("passt", "mn10_as", r"mn10_as are of model.audio.kind=mobilenet, not passt"),
        ("atst", "atstframe_base", r"by hand, from https://github.com/Audio-WestlakeU/audiossl"),
    ],
)
def test_a_name_that_leads_nowhere_is_told(kind: str, pretrained: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_audio_tower(config(kind, pretrained), 32000)


def test_weights_of_another_size_or_digest_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "published.pt"
    found: dict[str, object] = published("passt")
    torch.save(found, file)
    with pytest.raises(UserError, match=r"has not the SHA-256 00"):
        build_audio_tower(config("passt", file, "00"), 32000)
    with pytest.raises(UserError, match=r"no mobilenet of the size .*missing"):
        build_audio_tower(config("mobilenet", file), 32000)
    torch.save({**found, "time_new_pos_embed": torch.zeros(1, 24, 1, 99)}, file)
    with pytest.raises(UserError, match=r"no passt of the size .*1 of other shapes, time_new_pos_embed"):
        build_audio_tower(config("passt", file), 32000)


class Attack:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("content", ["attack", "nothing", "tensor"])
def test_what_is_more_or_less_than_weights_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "broken.pt"
    match content:
        case "attack":
            torch.save({"cls_token": Attack(tmp_path / "ran")}, file, pickle_module=pickle)
        case "nothing":
            file.write_bytes(b"")
        case _:
            torch.save(Tensor([1.0]), file)
    with pytest.raises(UserError, match=r"broken.pt holds no weights, or more than weights"):
        build_audio_tower(config("passt", file), 32000)
    assert not (tmp_path / "ran").exists()
