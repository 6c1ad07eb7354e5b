"""Package metadata. Exact, proven-together versions stand in constraints.txt, nowhere else."""

from pathlib import Path

from setuptools import find_packages, setup

RUNTIME = [
    "torch>=2.8",
    "torchvision",
    "torchaudio",
    "deepspeed>=0.18",
    "ninja",  # DeepSpeed compiles its own kernels where a recipe asks for one,
    "setuptools",  # and torch's extension builder imports setuptools to do it
    "open_clip_torch>=3.2",
    "transformers>=5",
    "timm>=1.0",
    "webdataset>=1.0",
    "omegaconf>=2.4",
    "pyyaml",
    "braceexpand",
    "numpy",
    "soundfile",
    "soxr",
    "av>=14",
    "pillow",
    "simplejpeg",
    "fsspec",
    "s3fs",
    "filelock",
    "safetensors",
    "pyarrow",
    "tqdm",
    "matplotlib",
    "psutil",
    "wandb",
]
DEVELOPMENT = [
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "moto[server]",
    "trustme",
    "ruff",
    "mypy",
    "import-linter",
    "ray",
    "pytrec-eval-terrier",
    "pytorch-metric-learning",
    "wandb-workspaces",
]

setup(
    name="audiotext-dist",
    version="0.1.0",
    description="Distributed contrastive training of audio-image and audio-text dual encoders",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["audiotext_dist*", "shards*", "launch*"]),
    package_data={
        "audiotext_dist.models": ["configs/*.json"],
        "launch": ["dashboard.yaml", "recipes/**/*.yaml", "tables/*.yaml"],
    },
    install_requires=RUNTIME,
    extras_require={"dev": DEVELOPMENT, "ray": ["ray>=2.40"], "dashboard": ["wandb-workspaces"]},
)
