"""The shipped configs: one idea, and a docstring with the command."""

import pathlib

import pytest

from configs import base
from performer_vit import train, workdir
from tests.conftest import ROOT, load_config

KERNELS = {
    'vit': 'exact',
    'performer_relu': 'relu',
    'performer_exp': 'softmax',
    'performer_gelu': 'gelu',
    'performer_elu': 'elu',
    'performer_ftheta': 'ftheta',
}


@pytest.mark.parametrize('name', KERNELS)
@pytest.mark.parametrize('arguments', ['', 'digits', 'cifar100', *base.SIZES])
def test_configs_differ_in_the_kernel_alone(name, arguments):
    """A comparison changes one thing: catches a config with a recipe of its own."""
    config = workdir.flatten(load_config(name, arguments).to_dict())
    base = workdir.flatten(load_config('vit', arguments).to_dict())
    differing = {field for field in base if base[field] != config[field]}
    assert config.keys() == base.keys()
    assert differing <= {'model.attention.kernel'}
    assert config['model.attention.kernel'] == KERNELS[name]


def test_naming_a_data_set_forbids_another_one():
    assert load_config('vit').dataset.to_dict() | {'name': 'cifar10', 'fallback': 'digits'} == (
        load_config('vit').dataset.to_dict()
    )
    for name in ('cifar10', 'cifar100', 'digits'):
        dataset = load_config('vit', name).dataset
        assert (dataset.name, dataset.fallback) == (name, 'none')


@pytest.mark.parametrize('arguments', ['mnist', 'cifar10,cifar100', 'study,study', 'study;digits'])
def test_an_unknown_argument_is_refused(arguments):
    with pytest.raises(ValueError, match=r"at most one data set of \('cifar10'.*'large'"):
        load_config('vit', arguments)


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('[!_b]*.py')), ids=lambda p: p.stem)
def test_docstrings_hold_the_command(path: pathlib.Path):
    assert f'python run.py --config=configs/{path.name}' in path.read_text()
    assert path.stem in KERNELS


@pytest.mark.parametrize('size', base.SIZES)
@pytest.mark.parametrize('name', KERNELS)
def test_every_size_of_every_model_is_accepted(name, size):
    """Catches a size whose fields do not fit together; no data are read and nothing is trained."""
    config = load_config(name, f'cifar10,{size}')
    train.check(config)
    assert config != load_config(name, 'cifar10')
