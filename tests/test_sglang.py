"""The row as a logits processor of SGLang, up to its interface: no engine is run. `make test-sglang` has SGLang's own file of
processors, elsewhere a class with the same signature stands for it"""
import importlib.util, json, math, sys
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType

import pytest, torch

import simpledeco.sglang as ours
from simpledeco.fold import RowTemperature as Reference
from simpledeco.sglang import PROCESSOR, sglang_sampling
from simpledeco.vllm import SETTINGS

dill = pytest.importorskip('dill', reason='SGLang writes processors with dill')
NAME = 'sglang.srt.sampling.custom_logit_processor'
ROW = dict(row=7, b=.8, t_min=.01, t_max=10., scale=2.)


class StandIn(ABC):
    "CustomLogitProcessor of SGLang 0.5.23 (python/sglang/srt/sampling/custom_logit_processor.py, also at 065927d): its signatures"
    @abstractmethod
    def __call__(self, logits, custom_param_list=None): raise NotImplementedError
    @classmethod
    def to_str(cls): return json.dumps(dict(callable=dill.dumps(cls).hex()))
    @classmethod
    def from_str(cls, text): return dill.loads(bytes.fromhex(json.loads(text)['callable']))()


def real(monkeypatch):
    "SGLang's own file, without the rest of SGLang, which wants a GPU"
    found = importlib.util.find_spec('sglang') # finds the package and does not run it
    if found is None or not found.submodule_search_locations: pytest.skip('run `make test-sglang`')
    path = Path(found.submodule_search_locations[0])/'srt/sampling/custom_logit_processor.py'
    spec = importlib.util.spec_from_file_location(NAME, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, NAME, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=['stand-in', 'real'])
def base(request, monkeypatch):
    "The class that SGLang's processors come from, where `import sglang...` finds it"
    parents = [NAME.rsplit('.', n)[0] for n in (3, 2, 1)]
    module = ModuleType(NAME)
    module.CustomLogitProcessor = StandIn
    if request.param == 'real': module = real(monkeypatch)
    for name in parents: monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, NAME, module)
    ours._row_temperature.cache_clear()
    yield module.CustomLogitProcessor
    ours._row_temperature.cache_clear()


@pytest.fixture
def folded(tmp_path):
    (tmp_path/SETTINGS).write_text(json.dumps(ROW | dict(min_p=.1, model=None)))
    return tmp_path


def test_the_class_is_one_of_sglangs_and_is_found_by_its_name(base):
    made = ours.RowTemperature
    assert issubclass(made, base) and made is ours.RowTemperature and isinstance(made(), base)
    with pytest.raises(AttributeError, match='no attribute Other'): ours.Other


def test_it_comes_back_from_the_text_of_a_request(base):
    "From the text that a client without SGLang sends, and from SGLang's own; both hold a name and no code"
    for text in (PROCESSOR, ours.RowTemperature.to_str()):
        assert type(base.from_str(text)) is ours.RowTemperature
        assert len(bytes.fromhex(json.loads(text)['callable'])) < 100
    assert type(ours.RowTemperature.from_str(PROCESSOR)) is ours.RowTemperature


def sampled(logits, requests, processors, repeat=1):
    """What SGLang's sampler makes of logits [R*repeat, V]: each processor gets the rows of the requests that name it, with their
    parameters, `repeat` times under speculation; its result is copied back in the type of the logits"""
    logits = logits.clone()
    for text in {p for p in processors if p}:
        named = [i for i,p in enumerate(processors) if p == text]
        rows = torch.tensor([i*repeat + k for i in named for k in range(repeat)])
        given = [requests[i] for i in named for _ in range(repeat)]
        result = ours.RowTemperature.from_str(text)(logits.index_select(0, rows), given)
        assert result.shape == (len(rows), logits.shape[1])
        logits.index_copy_(0, rows, result.to(logits.dtype))
    return logits


@pytest.mark.parametrize('repeat', [1, 3])
def test_rows_of_a_batch_are_read_with_the_scale_of_their_request(base, folded, repeat):
    torch.manual_seed(0)
    z = 3*torch.randn(4*repeat, 300)
    asked = [sglang_sampling(folded), sglang_sampling(folded, .5), None, sglang_sampling(folded, 0)]
    out = sampled(z, [a and a['custom_params'] for a in asked], [a and a['custom_logit_processor'] for a in asked], repeat).split(repeat)
    for found,rows,scale in zip(out, z.split(repeat), (1., .5, None, 0)):
        if scale is None: assert torch.equal(found, rows); continue # another request, which named no processor
        wanted = rows.index_fill(1, torch.tensor([7]), -math.inf)
        if scale: wanted = Reference(**ROW | dict(scale=2.*scale))(rows, rows)
        torch.testing.assert_close(found, wanted)


def test_half_precision_stays_what_it_is(base, folded):
    z = torch.randn(2, 300).bfloat16()
    out = ours.RowTemperature()(z, [sglang_sampling(folded)['custom_params']]*2)
    assert out.dtype == torch.bfloat16 and (out[:, 7] == -math.inf).all()
    torch.testing.assert_close(out, Reference(**ROW)(z, z).bfloat16())


@pytest.mark.parametrize('given', [None, [], [None, None], [{}, dict(thinking_budget=3)]])
def test_a_request_without_our_parameters_ends_no_engine(base, given):
    z = torch.randn(2, 300)
    assert torch.equal(ours.RowTemperature()(z, given), z)


def test_a_request_is_json_that_survives_the_way_to_the_engine(folded):
    "Values of `custom_params` are plain numbers, as SGLang wants them"
    asked = sglang_sampling(folded, scale=2)
    assert json.loads(json.dumps(asked)) == asked
    assert {k: asked[k] for k in ('temperature', 'min_p', 'top_p', 'top_k')} == dict(temperature=1., min_p=.1, top_p=1., top_k=-1)
    assert asked['custom_params'] == dict(row=7, b=.8, t_min=.01, t_max=10., scale=4.)


@pytest.mark.parametrize('bad', [-1, 'hot', True, math.nan, 1e7])
def test_a_scale_that_is_none(bad, folded):
    with pytest.raises(ValueError, match='scale is'): sglang_sampling(folded, bad)


def test_a_folder_without_a_row(tmp_path):
    with pytest.raises(ValueError, match='has no row of a head'): sglang_sampling(tmp_path)
