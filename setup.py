"""Installs performer_vit: `pip install -e .`."""

import pathlib
import re

from setuptools import setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
    r"__version__ = '(.+)'", (HERE / 'performer_vit' / '__init__.py').read_text()
).group(1)

setup(
    name='performer-vit',
    version=VERSION,
    description='Vision Transformers and Performers (FAVOR+ attention) in JAX and Flax',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=['performer_vit'],
    python_requires='>=3.11',
    # The lower bounds are the versions that the tests were run with.
    install_requires=[
        'absl-py>=2.3',
        'clu>=0.0.12',
        'flax>=0.12.8',
        # tensorflow-datasets imports it and does not require it.
        'importlib_resources>=6.5',
        'jax>=0.10.2',
        'matplotlib>=3.11',
        'ml-collections>=1.1',
        'numpy>=2.4',
        'optax>=0.2.8',
        'optuna>=5.0',
        'orbax-checkpoint>=0.12.8',
        'pillow>=12',
        'requests>=2.32',
        'scikit-learn>=1.9',
        'scipy>=1.16',
        'sqlalchemy>=2.1',
        'tabulate>=0.10',
        # clu.metric_writers imports it, and TensorFlow no longer brings it.
        'tensorboard>=2.21',
        # Reads the prepared data sets and writes TensorBoard's files; it never computes anything
        # here. The CPU build is smaller, and has wheels for Linux on x86-64 alone.
        'tensorflow-cpu>=2.21; sys_platform == "linux" and platform_machine == "x86_64"',
        'tensorflow>=2.21; sys_platform != "linux" or platform_machine != "x86_64"',
        'tensorflow-datasets>=4.9.10',
        'tqdm>=4.70',
    ],
    extras_require={
        'test': [
            'hypothesis>=6.170',
            # The notebooks are executed: by nbclient, in a kernel.
            'ipykernel>=7.4',
            'ipywidgets>=8.1',
            'nbclient>=0.11',
            'nbformat>=5.11',
            'pytest>=9.2',
            'pytest-xdist>=3.8',
            'ruff>=0.17',
        ],
        # Peers to measure against; nothing in the package imports them otherwise.
        'bench': ['performer-pytorch>=1.1.4', 'torch>=2.13'],
        # For the notebooks on a machine of one's own; Colab has these in versions of its own, and
        # must keep them.
        'colab': ['ipykernel>=7.4', 'ipywidgets>=8.1', 'notebook>=7.5'],
        'cuda': ['jax[cuda13]>=0.10.2'],
    },
)
