"""One folded Gemma, as a checkpoint and as a GGUF file: transformers here, llama.cpp by `make test-llama`, vLLM by `make test-vllm`.
Where `make gemma` was never run there is no model, and nothing is tested"""
import gc, os

import numpy as np, pytest, torch
from conftest import ROOT, uneven_head

from simpledeco.decode import attach
from simpledeco.fold import fold, RowTemperature
from simpledeco.model import load_model, read_output
from simpledeco.vllm import read_row

MODEL = ROOT/'models/gemma'
pytestmark = pytest.mark.skipif(not (MODEL/'config.json').exists(), reason='no models/gemma: run `make gemma`')
PROMPTS = ['What is the capital of France?', 'Write a short text about a lighthouse.']
SCALE, NEW = 1.25, 12


@pytest.fixture(scope='module')
def work(tmp_path_factory): return tmp_path_factory.mktemp('gemma')


@pytest.fixture(scope='module')
def head(work): return uneven_head(load_model(MODEL)[0], work/'head')


@pytest.fixture(scope='module')
def folded(head, work):
    made = fold(work/'head', MODEL, work/'folded', scale=SCALE)
    gc.collect() # three copies of the weights
    return made


@pytest.fixture(scope='module')
def reference(head): return load_model(MODEL)


@pytest.fixture(scope='module')
def texts(reference):
    "Prompts and greedy answers of the model itself: [(ids of the prompt, ids of the answer)]"
    model, tokenizer = reference
    def answered(prompt):
        ids = torch.tensor([tokenizer.apply_chat_template([dict(role='user', content=prompt)], add_generation_prompt=True,
                                                          return_dict=True).input_ids])
        kw = dict(attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
        return ids[0].tolist(), model.generate(ids, **kw)[0, ids.shape[1]:].tolist()
    return [answered(p) for p in PROMPTS]


def attached(model, head, ids):
    "The temperatures by which `attach` divides, from logits with and without it [n]"
    x = torch.tensor([ids])
    with torch.no_grad():
        z = model(x).logits[0]
        with attach(model, head, scale=SCALE): divided = model(x).logits[0]
    at = z.abs().argmax(-1, keepdim=True)
    return (z.gather(1, at)/divided.gather(1, at))[:, 0]


def say(engine, found, T):
    off = (found - T).abs()
    print(f'{engine}: {len(T)} tokens, T from {T.min():.2f} to {T.max():.2f}: largest error {off.max():.2g}, median {off.median():.2g}')
    assert T.std() > .1, 'temperatures that are all alike would prove nothing'
    return off


def test_the_row_is_one_that_the_tokenizer_keeps_free(folded):
    "No row is appended, and the matrix stays tied"
    names = {i: name for name,i in load_model(MODEL)[1].get_vocab().items()}
    assert 'unused' in names[read_row(folded)['row']] and read_row(folded)['error'] < 1e-4
    assert (folded/'model.safetensors').stat().st_size == (MODEL/'model.safetensors').stat().st_size


def test_transformers(reference, head, folded, texts):
    ours, _ = load_model(folded)
    read = RowTemperature(**ours.generation_config.simpledeco)
    T, found = [], []
    for prompt,answer in texts:
        ids = torch.tensor([prompt])
        kw = dict(attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
        out = ours.generate(ids, **kw, custom_generate=str(folded), trust_remote_code=True)
        assert out[0, len(prompt):].tolist() == answer
        with torch.no_grad(): found.append(read.temperature(ours(out).logits[0]))
        T.append(attached(reference[0], head, out[0].tolist()))
    assert say('transformers', torch.cat(found), torch.cat(T)).max() < 1e-4


def gguf():
    "The file that the pipeline's model was made of, for as long as a block lasts"
    from simpledeco.prepare import joined, package_file
    from simpledeco.study.settings import load_profile
    p = load_profile('gemma', ROOT)
    try: return joined([package_file(x) for x in p.model.removeprefix('package:').split()], p.sha256)
    except FileNotFoundError as e: pytest.skip(str(e))


def test_llama_cpp(reference, head, texts, work):
    "Its logits come from eight bits, so that T differs from that of float32"
    llama_cpp = pytest.importorskip('llama_cpp', reason='run `make test-llama`')
    from simpledeco.fold_gguf import fold_gguf, llama_sampling
    open_file = lambda path: llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    model, T, found, plain = reference[0], [], [], []
    with gguf() as path:
        made = fold_gguf(work/'head', path, work/'folded.gguf', scale=SCALE)
        base = open_file(path)
        for prompt,_ in texts: plain.append(greedy(base, prompt, temp=0.))
        z = logits(base, texts[0][0])
        del base
    ours, s = open_file(made), read_row(made)
    others = [i for i in range(z.shape[1]) if i != s['row']]
    asked = llama_sampling(ours)
    asked |= dict(temp=0.); del asked['temperature']
    moved = (logits(ours, texts[0][0])[:, others] - z[:, others]).abs().max().item()
    print(f'the output matrix is in {s["dtype"]}; other logits move by up to {moved:.2g}')
    assert moved == 0 or s['others'] > 0
    for (prompt,_),base_answer in zip(texts, plain):
        answer = greedy(ours, prompt, **asked)
        assert answer == base_answer
        ids = prompt + answer
        found.append(SCALE*(logits(ours, ids)[:, s['row']] + s['b']).clamp(s['t_min'], s['t_max']))
        hidden, _, _ = read_output(model, lambda h: h[0], input_ids=torch.tensor([ids]))
        T.append(SCALE*head.temperature(hidden).detach())
    off = say('llama.cpp', torch.cat(found), torch.cat(T))
    assert off.median() < .05 and off.max() < .5


def logits(llm, ids):
    llm.reset(); llm.eval(ids)
    return torch.tensor(np.array(llm.scores[:len(ids)]))


def greedy(llm, ids, **kw):
    llm.reset()
    return [token for _,token in zip(range(NEW), llm.generate(ids, **kw))]


def test_vllm(reference, head, folded, texts):
    "Temperatures from the log-probabilities of what was sampled"
    vllm = pytest.importorskip('vllm', reason='run `make test-vllm`')
    os.environ |= dict(HF_HUB_OFFLINE='1', VLLM_CPU_KVCACHE_SPACE='1', VLLM_NO_USAGE_STATS='1', VLLM_USE_V2_MODEL_RUNNER='0')
    llm = vllm.LLM(str(folded), dtype='float32', max_model_len=256, max_num_seqs=8, enforce_eager=True,
                   logits_processors=['simpledeco.vllm:RowTemperature'], logprobs_mode='processed_logprobs')
    prompts = [dict(prompt_token_ids=ids) for ids,_ in texts]
    def write(**kw):
        found = llm.generate(prompts, vllm.SamplingParams(max_tokens=NEW, ignore_eos=True, **kw), use_tqdm=False)
        return [o.outputs[0] for o in found]
    for out,(_,answer) in zip(write(temperature=0), texts): assert list(out.token_ids) == answer
    T, found = [], []
    for out,(prompt,_) in zip(write(logprobs=8, min_p=1e-9, seed=0), texts):
        ids = prompt + list(out.token_ids)
        with torch.no_grad(): z = reference[0](torch.tensor([ids])).logits[0, len(prompt) - 1:-1]
        for z_,step in zip(z, out.logprobs):
            a, *_, b = sorted(step, key=lambda t: step[t].logprob)
            found.append((z_[b] - z_[a]).item()/(step[b].logprob - step[a].logprob))
        T.append(attached(reference[0], head, ids)[len(prompt) - 1:-1])
    assert say('vLLM', torch.tensor(found), torch.cat(T)).div(torch.cat(T)).max() < 5e-3
