"Real generation from a folded GGUF file in llama.cpp: run by `make test-llama`, in an environment of its own"
import json, socket, subprocess, sys, time, urllib.error, urllib.request

import numpy as np, pytest, torch
from conftest import ROOT, uneven_head
from scipy.stats import chisquare

from simpledeco.decode import min_p_filter
from simpledeco.fold_gguf import fold_gguf as fold, llama_sampling
from simpledeco.head import TemperatureHead
from simpledeco.model import read_output
from simpledeco.prepare import package_file, read_gguf
from simpledeco.request import request_temperature
from simpledeco.study.settings import load_profile
from simpledeco.vllm import read_row

llama_cpp = pytest.importorskip('llama_cpp', reason='run `make test-llama`')
SMOL = package_file(load_profile('embedded', ROOT).model.removeprefix('package:'))
PROMPTS = ['What is the capital of France?', 'Write the first line of a poem.', 'What is 17 + 25?', 'Tell me a surprising fact.']


@pytest.fixture(scope='module')
def reference(): return read_gguf(SMOL)


@pytest.fixture(scope='module')
def folded(reference, tmp_path_factory):
    "A head whose temperatures differ from token to token, and the file with its row"
    work = tmp_path_factory.mktemp('llama')
    return uneven_head(reference[0], work/'head'), fold(work/'head', SMOL, work/'folded.gguf', scale=1.25)


def engine(path): return llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, seed=1)


@pytest.fixture(scope='module')
def base(): return engine(SMOL)


@pytest.fixture(scope='module')
def ours(folded): return engine(folded[1])


@pytest.fixture(scope='module')
def prompts(reference):
    ask = lambda p: reference[1].apply_chat_template([dict(role='user', content=p)], add_generation_prompt=True, tokenize=False)
    return [reference[1](ask(p), add_special_tokens=False).input_ids for p in PROMPTS]


def write(llm, ids, n, **kw):
    "The ids of an answer"
    llm.reset()
    out = []
    for token in llm.generate(ids, **kw):
        out.append(token)
        if len(out) == n or token == llm.token_eos(): return out


def logits(llm, ids):
    "Of every token of a text [n, V], as the engine computes them"
    llm.reset(); llm.eval(ids)
    return torch.tensor(np.array(llm.scores[:len(ids)]))


def greedy(llm, ids, **kw): return write(llm, ids, 24, **kw | dict(temp=0.))


def settings(llm, **kw):
    "As for completions, whose `temperature` is the `temp` of `generate`"
    asked = llama_sampling(llm, **kw)
    return asked | dict(temp=asked.pop('temperature'))


def test_the_file_loads_with_a_vocabulary_as_long_as_its_matrix(base, ours, folded):
    assert ours.n_vocab() == base.n_vocab() + 1 == 49153
    assert json.loads(ours.metadata['simpledeco']) == read_row(folded[1])
    text = b'<|temperature|> is what nobody writes'
    assert ours.tokenize(text, add_bos=False, special=True) == base.tokenize(text, add_bos=False, special=True)


def test_greedy_is_that_of_the_model(base, ours, prompts):
    for ids in prompts: assert greedy(ours, ids, **settings(ours)) == greedy(base, ids)


def test_all_other_logits_are_the_models(base, ours, prompts):
    for ids in prompts: assert torch.equal(logits(ours, ids)[:, :-1], logits(base, ids))


def test_temperatures_are_those_of_transformers(reference, folded, ours, prompts):
    "llama.cpp multiplies in eight bits, so that hidden states, logits and T differ from those of float32"
    model, head, s, off, T = reference[0], folded[0], read_row(folded[1]), [], []
    for ids in prompts:
        ids = ids + greedy(ours, ids, **settings(ours))
        found = 1.25*(logits(ours, ids)[:, s['row']] + s['b']).clamp(s['t_min'], s['t_max'])
        hidden, _, _ = read_output(model, lambda h: h[0], input_ids=torch.tensor([ids]))
        T.append(1.25*head.temperature(hidden).detach())
        off.append((found - T[-1]).abs())
    off, T = torch.cat(off), torch.cat(T)
    print(f'{len(off)} tokens, T from {T.min():.2f} to {T.max():.2f}: largest error {off.max():.4f}, median {off.median():.4f}')
    assert T.std() > .1 and off.median() < .02 and off.max() < .2


@pytest.mark.parametrize('scale', [1., 1.2])
def test_first_tokens_have_the_frequencies_that_they_should(folded, ours, prompts, scale):
    "The head's temperature first, min-p after it: the opposite of llama.cpp's usual order"
    s, n = read_row(folded[1]), 512
    z = logits(ours, prompts[1])[-1]
    T = scale*s['scale']*(z[s['row']] + s['b']).clamp(s['t_min'], s['t_max'])
    z[s['row']] = -torch.inf
    p = min_p_filter(z/T, s['min_p']).softmax(-1)
    def draw(seed): ours.set_seed(seed); return next(ours.generate(prompts[1], **settings(ours, scale=scale))) # a sampler of its own
    drawn = torch.tensor([draw(i) for i in range(n)])
    assert (p[drawn] > 0).all(), 'a token that min-p cuts was drawn'
    untempered = min_p_filter(z, s['min_p'])
    assert torch.isfinite(untempered).sum() != (p > 0).sum(), 'the order must matter here'
    counts, common = drawn.bincount(minlength=len(p)), p*n >= 5
    seen, wanted = counts[common].tolist(), (p[common]*n).tolist()
    seen[-1] += n - sum(seen); wanted[-1] += n - sum(wanted)
    assert len(seen) > 3 and chisquare(seen, wanted).pvalue > 1e-4


def test_chat_completions(base, ours):
    talk = [dict(role='user', content=PROMPTS[0])]
    said = lambda llm, **kw: llm.create_chat_completion(talk, max_tokens=16, **kw)['choices'][0]['message']['content']
    plain = said(base, temperature=0, repeat_penalty=1.0)
    assert len(plain) > 10 and said(ours, **llama_sampling(ours) | dict(temperature=0)) == plain
    hot = [ours.create_chat_completion(talk, max_tokens=8, seed=i, **llama_sampling(ours, scale=3.)) for i in range(6)]
    assert len({x['choices'][0]['message']['content'] for x in hot}) > 1


@pytest.fixture(scope='module')
def asked(reference):
    "A prompt, and the fields of a request that have the number of the ready head by prompt; llama.cpp cuts before it divides"
    head = TemperatureHead.from_pretrained('smollm2-by-prompt')
    T = request_temperature(*reference, head, PROMPTS[1], scale=3.) # so hot that min-p keeps more tokens than before the temperature
    return T, head.min_p, dict(temperature=T, min_p=head.min_p**T, top_k=0, top_p=1.0, repeat_penalty=1.0)


def check_frequencies(drawn, z, T, min_p):
    "First tokens are those of min-p at this temperature, temperature first; the texts of tokens are compared, as a server sends text"
    p = min_p_filter(z/T, min_p).softmax(-1)
    common = (p*len(drawn) >= 5).nonzero()[:, 0].tolist()
    seen, wanted = [drawn.count(i) for i in common], [p[i].item()*len(drawn) for i in common]
    assert all(p[i] > 0 for i in drawn), 'a token that min-p cuts was drawn'
    assert torch.isfinite(min_p_filter(z, min_p)).sum() != (p > 0).sum(), 'the order must matter here'
    seen[-1] += len(drawn) - sum(seen); wanted[-1] += len(drawn) - sum(wanted)
    assert len(seen) > 3 and chisquare(seen, wanted).pvalue > 1e-4


def test_a_request_with_the_number_of_a_head_by_prompt(base, prompts, asked):
    T, min_p, fields = asked
    z = logits(base, prompts[1])[-1]
    others = {k: v for k,v in fields.items() if k != 'temperature'} # which is the `temp` of `generate`
    def draw(seed): base.set_seed(seed); return next(base.generate(prompts[1], temp=T, **others))
    check_frequencies([draw(i) for i in range(512)], z, T, min_p)


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    "A server on llama.cpp that speaks OpenAI's protocol: its address"
    log = tmp_path_factory.mktemp('server')/'log' # of thousands of lines: a pipe that nobody reads would be full, and the server wait
    pytest.importorskip('fastapi', reason='pip install "llama-cpp-python[server]"')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    command = [sys.executable, '-m', 'llama_cpp.server', '--model', SMOL, '--host', '127.0.0.1', '--port', port, '--n_ctx', 512,
               '--n_threads', 1, '--n_threads_batch', 1]
    with open(log, 'w') as f: process = subprocess.Popen([str(c) for c in command], stdout=f, stderr=subprocess.STDOUT)
    address = f'http://127.0.0.1:{port}/v1'
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-2000:]
        try: urllib.request.urlopen(f'{address}/models').read(); break
        except (urllib.error.URLError, OSError): time.sleep(.5)
    yield address
    process.terminate(); process.wait()


def test_a_server_answers_with_the_number_of_a_head_by_prompt(server, base, prompts, asked):
    "Over HTTP: first tokens of many requests"
    T, min_p, fields = asked
    z = logits(base, prompts[1])[-1]
    texts = {base.detokenize([i]).decode(errors='replace'): i for i in z.topk(64).indices.tolist()}
    def draw(seed):
        body = dict(model='smollm2', messages=[dict(role='user', content=PROMPTS[1])], max_tokens=1, seed=seed, **fields)
        request = urllib.request.Request(f'{server}/chat/completions', json.dumps(body).encode(), {'Content-Type': 'application/json'})
        return json.load(urllib.request.urlopen(request))['choices'][0]['message']['content']
    check_frequencies([texts[draw(i)] for i in range(256)], z, T, min_p)


def test_a_file_without_a_row(base):
    with pytest.raises(ValueError, match='has no row of a head'): llama_sampling(base)
