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
    assert path.stem in (*KERNELS, 'rerun')


@pytest.mark.parametrize('size', base.SIZES)
@pytest.mark.parametrize('name', KERNELS)
def test_every_size_of_every_model_is_accepted(name, size):
    """Catches a size whose fields do not fit together; no data are read and nothing is trained."""
    config = load_config(name, f'cifar10,{size}')
    train.check(config)
    assert config != load_config(name, 'cifar10')


def test_a_config_comes_back_from_its_run(tmp_path):
    """The same fields, types included, on the data that were read; config.json is enough."""
    config = load_config('performer_exp', 'study')
    config.dataset.data_dir = '/nowhere/any/more'
    data = {'name': 'digits', 'training images': '9, of digest a'}
    workdir.claim(tmp_path, workdir.definition(config.to_dict(), data))
    again = load_config('rerun', str(tmp_path))
    config.dataset.update(name='digits', fallback='none', data_dir='')
    assert again == config
    train.check(again)


@pytest.mark.parametrize(
    'content, says',
    [
        (None, 'config.json does not exist'),
        ('{', 'not valid JSON'),
        ('{"seed": 0}', 'not the config of a training'),
        (
            '{"mode": "sweep", "dataset_read": "digits"}',
            'of several runs, of --mode=sweep.*best_config.py',
        ),
        ('[]', r'holds \[\] and not the fields'),
        ('[' * 10**5, 'cannot be read'),
        (
            '{"dataset_read": "", "dataset": {"data_dir": 3}, "model": {"stem_channels": []}}',
            'not the config of a training',
        ),
    ],
)
def test_what_is_no_config_of_a_run_is_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / 'config.json').write_text(content)
    with pytest.raises(ValueError, match=says):
        load_config('rerun', str(tmp_path))


def test_a_run_must_be_named():
    with pytest.raises(ValueError, match='name the run'):
        load_config('rerun')
