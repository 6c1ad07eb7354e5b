from __future__ import annotations

import io
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from PIL import Image

from audiotext_dist.configuration import parse
from audiotext_dist.data.sample import Sample
from audiotext_dist.errors import UserError
from audiotext_dist.training.recipe import Recipe
from shards.statistics import StatisticsConfig, levels_dbfs, measure, recipe_yaml
from tests.clips import SAMPLE_RATE_HZ, make_sample, write_shards

REPOSITORY = Path(__file__).parents[2]
SECONDS = [1.0, 0.5, 2.5, 0.25, 1.75, 0.01, 3.0]


def samples() -> list[Sample]:
    """Clips shorter and longer than the two seconds that are taken of each; one is below an FBANK frame."""
    return [
        make_sample(number, seconds=seconds, captions=["ab"] * number, labels=["low"] if number < 3 else ["high"])
        for number, seconds in enumerate(SECONDS)
    ]


def config_for(folder: str, **options: object) -> StatisticsConfig:
    defaults = {"sample_rate_hz": SAMPLE_RATE_HZ, "clip_seconds": 2.0, "num_mel_bins": 32, "num_workers": 1}
    return StatisticsConfig(shards=folder, **{**defaults, **options})  # type: ignore[arg-type]


def kaldi_energies(sample: Sample) -> np.ndarray:
    pcm, rate_hz = soundfile.read(io.BytesIO(sample.flac), dtype="float32")
    if len(pcm) < 0.025 * rate_hz:
        return np.zeros(0)  # torchaudio takes no clip below one frame
    found = torchaudio.compliance.kaldi.fbank(
        torch.from_numpy(pcm[: 2 * rate_hz])[None],
        sample_frequency=rate_hz,
        htk_compat=True,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=32,
        dither=0.0,
    )
    return found.double().numpy().ravel()


def test_mean_and_std_are_those_of_kaldi_and_numpy(tmp_path: Path) -> None:
    facts = measure(config_for(write_shards(tmp_path, [samples()])))
    energies = np.concatenate([kaldi_energies(sample) for sample in samples()])
    assert facts.clips[:, 2].sum() == energies.size
    mean, std = facts.mean_and_std
    assert mean == pytest.approx(energies.mean(), abs=1e-4)
    assert std == pytest.approx(energies.std(), abs=1e-4)


def test_shards_and_workers_change_nothing(tmp_path: Path) -> None:
    clips = samples()
    one = measure(config_for(write_shards(tmp_path / "one", [clips])))
    split = [clips[5:], clips[:1], clips[1:5]]
    three = measure(config_for(write_shards(tmp_path / "three", split), num_workers=2))
    assert one.mean_and_std == three.mean_and_std
    assert one.labels == three.labels
    assert three.num_shards == 3


def test_what_a_person_wants_to_know(tmp_path: Path) -> None:
    facts = measure(config_for(write_shards(tmp_path, [samples()])))
    np.testing.assert_allclose(facts.clips[:, 3], SECONDS)
    assert facts.clips[:, 5].tolist() == list(range(7))
    assert facts.labels == {"low": 3, "high": 4}
    assert facts.sample_rates_hz == {SAMPLE_RATE_HZ: 7}
    assert facts.caption_characters == {2: 21}
    # A sine of amplitude 8000 of 32768.
    assert levels_dbfs(facts)[0] == pytest.approx(20 * math.log10(8000 / 32768 / math.sqrt(2)), abs=0.01)


def test_a_clip_that_cannot_be_read_is_counted_not_measured(tmp_path: Path) -> None:
    clips = samples()
    good = measure(config_for(write_shards(tmp_path / "good", [clips])))
    broken = replace(make_sample(9), flac=b"no flac")
    facts = measure(config_for(write_shards(tmp_path / "bad", [[*clips, broken]])))
    assert facts.mean_and_std == good.mean_and_std
    assert len(facts.unreadable) == 1
    assert "clip-0009" in facts.unreadable[0]


def test_wrong_rates_and_sizes_are_said(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [samples()])
    with pytest.raises(UserError, match="8000 Hz, not 16000"):
        measure(config_for(folder, sample_rate_hz=16000))
    with pytest.raises(UserError, match="num_workers"):
        config_for(folder, num_workers=0)
    with pytest.raises(UserError, match="clip_seconds"):
        config_for(folder, clip_seconds=0.001)


def test_the_command_writes_what_a_recipe_takes(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", [samples()])
    words = [f"shards={folder}", "sample_rate_hz=8000", "clip_seconds=2", "num_mel_bins=32", "num_workers=1"]
    outputs = [f"out={tmp_path / 'fbank.yaml'}", f"picture={tmp_path / 'set.png'}"]
    command = [sys.executable, "-m", "shards.statistics", *words, *outputs]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True)
    mean, std = measure(config_for(folder)).mean_and_std
    assert found.stdout.splitlines()[0].startswith("7 clips in 1 shards: 0.00 hours")
    assert found.stdout.splitlines()[-1] == f"model.audio.fbank.mean={mean:.4f} model.audio.fbank.std={std:.4f}"
    written = (tmp_path / "fbank.yaml").read_bytes()
    assert written == recipe_yaml(config_for(folder), mean, std)
    run = ["name=x", "data.train.a.shards=x", "data.clip_seconds=2"]
    for recipe in (
        parse(Recipe, run, str(tmp_path / "fbank.yaml")),
        parse(Recipe, [*run, *found.stdout.splitlines()[-1].split()]),
    ):
        fbank = recipe.model.audio.fbank
        assert (fbank.mean, fbank.std) == pytest.approx((mean, std), abs=1e-4)
    assert Image.open(tmp_path / "set.png").size[0] > 600
