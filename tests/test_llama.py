"A folded GGUF file in llama-cpp-python, which is no requirement of the project: pip install llama-cpp-python"
import json

import numpy as np, pytest, torch
from conftest import ROOT

llama_cpp = pytest.importorskip('llama_cpp')

from simpledeco.fold_gguf import fold_gguf, KEY, llama_sampling, llama_temperature, load_gguf
from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, read_output
from simpledeco.study.models import package_file
from simpledeco.study.settings import load_profile

TEXT = 'The capital of France is Paris. Once upon a time, there lived a lighthouse keeper who'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "SmolLM2: (model in transformers, head, its file, the folded file, ids); temperatures between .2 and 1.8 on the text"
    path = package_file(load_profile('embedded', ROOT).model.removeprefix('package:'))
    work, model = tmp_path_factory.mktemp('llama'), load_gguf(path)
    tokenizer = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    ids = torch.tensor([tokenizer.tokenize(TEXT.encode(), add_bos=False)])
    hidden = read_output(model, lambda h: h[0], input_ids=ids)[0]
    torch.manual_seed(0)
    head = TemperatureHead(hidden.shape[1], width=0, reads='hidden', base_model=fingerprint(model)).eval()
    head.mean, head.std = hidden.mean(0), hidden.std(0)
    head.save_pretrained(work/'head')
    return model, head, path, fold_gguf(work/'head', path, work/'folded.gguf'), ids


def opened(path): return llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, seed=1)


def logits(llm, ids):
    llm.reset(); llm.eval(ids)
    return np.array(llm.scores[:len(ids)])


def test_temperatures_are_those_of_transformers(made):
    "To what hidden states and weights of eight bits and fewer allow"
    model, head, path, folded, ids = made
    llm = opened(folded)
    z, s = logits(llm, ids[0].tolist()), json.loads(llm.metadata[KEY])
    row = z[:, s['row']] + s['b']
    with torch.no_grad(): T = head.temperature(read_output(model, lambda h: h[0], input_ids=ids)[0]).numpy()
    assert abs(row - T).max() < .05 and T.max() - T.min() > 1


def test_the_other_logits_and_greedy_text_are_the_models(made):
    model, head, path, folded, ids = made
    ours, plain = opened(folded), opened(path)
    assert np.array_equal(logits(ours, ids[0].tolist())[:, :-1], logits(plain, ids[0].tolist()))
    read = llama_cpp.LogitsProcessorList([llama_temperature(ours.metadata)])
    write = lambda llm, **kw: llm.create_completion(TEXT, temperature=0, max_tokens=24, **kw)['choices'][0]['text']
    text = write(plain)
    assert write(ours, logits_processor=read) == text and len(text) > 20


def test_sampled_tokens_are_candidates_of_min_p(made):
    "Every token that is drawn has a gap of at most T log(1/min_p), and they are not all the likeliest"
    model, head, path, folded, ids = made
    llm = opened(folded)
    options = llama_sampling(llm)
    options['logits_processor'] = llama_cpp.LogitsProcessorList(options['logits_processor'])
    out = llm.create_completion(TEXT, max_tokens=40, **options)['choices'][0]['text']
    tokens = llm.tokenize((TEXT + out).encode(), add_bos=False)
    z, s = logits(llm, tokens), json.loads(llm.metadata[KEY])
    first, T = ids.shape[1] - 1, np.clip(z[:, s['row']] + s['b'], s['t_min'], s['t_max'])
    gap = z[first:-1, :-1].max(1) - z[np.arange(first, len(tokens) - 1), tokens[first + 1:]]
    assert (gap <= T[first:-1]*np.log(10) + .05).all() and (gap > 0).any()
