"A row of the output matrix in stock vLLM, read by a logits processor: run by `make test-vllm`"
import math, os, subprocess, sys, urllib.error

import pytest, torch
from conftest import beginnings, fits, post, ROOT, uneven_head, vllm_server

from simpledeco.decode import min_p_filter
from simpledeco.fold import fold
from simpledeco.head import TemperatureHead
from simpledeco.model import load_model
from simpledeco.request import request_temperature
from simpledeco.vllm import read_row

vllm = pytest.importorskip('vllm', reason='run `make test-vllm`')
MODEL = ROOT/'models/embedded'
# blocks of 32 and steps of at most 64 tokens, so that prompts share blocks and are read in pieces
SETTINGS = dict(dtype='float32', max_model_len=512, max_num_seqs=64, max_num_batched_tokens=64, enforce_eager=True, block_size=32,
                enable_prefix_caching=True, logits_processors=['simpledeco.vllm:RowTemperature'])
SPECULATION = dict(method='ngram', num_speculative_tokens=3, prompt_lookup_max=3)
os.environ |= dict(HF_HUB_OFFLINE='1', VLLM_CPU_KVCACHE_SPACE='1', VLLM_NO_USAGE_STATS='1')
SHARED = 'You are a poet who answers in one line, in plain words, and never twice in the same way. ' * 3
PROMPTS = [SHARED + p for p in ('What is the capital of France?', 'Write the first line of a poem.', 'What is 17 + 25?')]
PROMPTS.append('red red blue red red blue red red blue red red') # an n-gram speculates well here


@pytest.fixture(scope='module')
def reference(): return load_model(MODEL)


@pytest.fixture(scope='module')
def prompts(reference):
    ask = lambda p: reference[1].apply_chat_template([dict(role='user', content=p)], add_generation_prompt=True, tokenize=False)
    return [ask(p) for p in PROMPTS]


@pytest.fixture(scope='module')
def folded(reference, tmp_path_factory):
    "A head whose temperatures differ from token to token, and the folder with its row"
    work = tmp_path_factory.mktemp('row')
    return uneven_head(reference[0], work/'head'), fold(work/'head', MODEL, work/'folded', scale=1.25)


def engine(folded, runner, **kw):
    os.environ['VLLM_USE_V2_MODEL_RUNNER'] = str(int(runner == 'V2'))
    return vllm.LLM(str(folded[1]), **SETTINGS, **kw)


def runners():
    "The older runner loads no processor when it speculates; Model Runner V2 does, and runs where there is Triton"
    from vllm.triton_utils import HAS_TRITON
    without = pytest.mark.skipif(not HAS_TRITON, reason='Model Runner V2 needs Triton, which is not made for this machine')
    return ['older', *(pytest.param(x, marks=without) for x in ('V2', 'V2, speculating'))]


@pytest.fixture(scope='module', params=runners())
def ours(request, folded):
    speculates = dict(speculative_config=SPECULATION) if 'speculating' in request.param else {}
    yield engine(folded, request.param.split(',')[0], logprobs_mode='processed_logprobs', **speculates)


def expected(reference, head, prompt, ids, scale=1.25):
    "What transformers makes of the same tokens: logits [n, V], temperatures [n]"
    model, tokenizer = reference
    start = tokenizer(prompt, add_special_tokens=False).input_ids
    x, rows = torch.tensor([start + list(ids)]), slice(len(start) - 1, -1)
    with torch.no_grad(): hidden, z = model.base_model(x).last_hidden_state[0, rows], model(x).logits[0, rows]
    return z, scale*head.temperature(hidden).detach()


def write(llm, prompts, **kw):
    "The answers to each prompt: [outputs]"
    params = vllm.SamplingParams(**dict(max_tokens=24) | kw)
    return [o.outputs for o in llm.generate(prompts, params, use_tqdm=False)]


def recovered(z, steps):
    "The temperature of each step, of the most and the least likely of its log-probabilities {id: value}"
    T = []
    for z_,found in zip(z, steps):
        a, *_, b = sorted((t for t in found if math.isfinite(found[t])), key=found.get)
        T.append((z_[b] - z_[a]).item()/(found[b] - found[a]))
    return torch.tensor(T)


def values(output): return [{t: x.logprob for t,x in step.items()} for step in output.logprobs]


def test_greedy_is_that_of_the_model(reference, ours, prompts):
    model, tokenizer = reference
    for prompt,(out,) in zip(prompts, write(ours, prompts, temperature=0, max_tokens=32)):
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors='pt')
        plain = model.generate(**ids, max_new_tokens=32, do_sample=False)[0, ids.input_ids.shape[1]:].tolist()
        assert list(out.token_ids) == plain


def test_temperatures_are_the_heads(reference, folded, ours, prompts):
    "From the log-probabilities of what was sampled, several answers to each prompt"
    seen = []
    for prompt,group in zip(prompts, write(ours, prompts, n=3, logprobs=8, min_p=1e-9)):
        for out in group:
            z, T = expected(reference, folded[0], prompt, out.token_ids)
            torch.testing.assert_close(recovered(z, values(out)), T, rtol=3e-3, atol=0)
            seen.append(T)
    assert torch.cat(seen).std() > .1, 'temperatures that are all alike would prove nothing'


def drawn_first(llm, prompt, n=512, **kw):
    return torch.tensor([o.token_ids[0] for g in write(llm, [prompt]*(n//64), n=64, max_tokens=1, **kw) for o in g])


@pytest.mark.parametrize('temperature, scale', [(1., 1.), (1.6, 1.), (1., .5), (1.6, 0)])
def test_first_tokens_have_the_frequencies_that_they_should(reference, folded, ours, prompts, temperature, scale):
    "The temperature of a request and its `head_scale` multiply, min-p is the head's and comes after both; 0 turns all of it off"
    z, T = expected(reference, folded[0], prompts[1], [0])
    p = min_p_filter(z[0]/(T[0]*scale*temperature), .1).softmax(-1) if scale else (z[0]/temperature).softmax(-1)
    drawn = drawn_first(ours, prompts[1], temperature=temperature, extra_args=dict(head_scale=scale))
    assert fits(drawn, torch.cat([p, torch.zeros(1)])) > 1e-4


def test_the_second_token_has_its_own_temperature(reference, folded, ours, prompts):
    "Under speculation it may be one of several rows of a step; its frequencies are over what followed one and the same first token"
    prompt = prompts[3]
    groups = write(ours, [prompt]*48, n=64, max_tokens=2)
    pairs = torch.tensor([list(o.token_ids) for g in groups for o in g if len(o.token_ids) == 2])
    first = pairs[:, 0].mode().values
    second = pairs[pairs[:, 0] == first, 1]
    z, T = expected(reference, folded[0], prompt, [first.item(), 0])
    p = min_p_filter(z[1]/T[1], .1).softmax(-1)
    assert len(second) > 100 and fits(second, torch.cat([p, torch.zeros(1)])) > 1e-4


def test_a_request_may_name_its_min_p(reference, folded, ours, prompts, request):
    if 'speculating' in request.node.name:
        from vllm.exceptions import VLLMValidationError # no ValueError, since 0.32
        with pytest.raises(VLLMValidationError, match='min_p.*not yet supported with speculative'): write(ours, prompts[:1], min_p=.5)
        return
    z, T = expected(reference, folded[0], prompts[1], [0])
    for min_p in (.4, .01):
        p = min_p_filter(z[0]/T[0], min_p).softmax(-1)
        assert fits(drawn_first(ours, prompts[1], min_p=min_p), torch.cat([p, torch.zeros(1)])) > 1e-4


def test_a_request_with_the_number_of_a_head_by_prompt(reference, ours, prompts, request):
    "As for any model; of a folded one the head by token has to be off"
    if 'speculating' in request.node.name: pytest.skip('vLLM has no min-p when it speculates')
    head = TemperatureHead.from_pretrained('smollm2-by-prompt')
    T = request_temperature(*reference, head, PROMPTS[1], scale=1.5)
    z, _ = expected(reference, TemperatureHead(576, width=0, reads='hidden'), prompts[1], [0])
    p = torch.cat([min_p_filter(z[0]/T, head.min_p).softmax(-1), torch.zeros(1)])
    for top_k in (0, -1): # both mean all
        asked = dict(temperature=T, min_p=head.min_p, top_k=top_k, top_p=1.0, extra_args=dict(head_scale=0))
        assert fits(drawn_first(ours, prompts[1], **asked), p) > 1e-4


def test_default_requests_name_none(ours):
    "So that they may speculate"
    assert not ours.get_default_sampling_params().min_p and ours.get_default_sampling_params().temperature == 1


def test_prompts_are_scored_as_by_the_model(reference, ours, prompts):
    model, tokenizer = reference
    out, = ours.generate(prompts[:1], vllm.SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    ids = torch.tensor([out.prompt_token_ids])
    with torch.no_grad(): wanted = model(ids).logits[0].log_softmax(-1)
    found = torch.tensor([step[t].logprob for t,step in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:])])
    torch.testing.assert_close(found, wanted[:-1].gather(1, ids[0, 1:, None])[:, 0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize('how', ['structured output', 'allowed tokens'])
@pytest.mark.parametrize('temperature', [1., 1.6])
def test_where_the_row_is_masked_before_it_is_read_there_is_no_head(reference, folded, ours, prompts, how, temperature):
    """A grammar masks all that it does not take, and so does a list of allowed tokens, before any processor sees the logits: the first
    token is the model's own, at the temperature of the request, with the head's min-p"""
    from vllm.sampling_params import StructuredOutputsParams
    words = ['In', 'The', 'As', 'Beneath']
    taken = beginnings(reference[1], words)
    asked = (dict(structured_outputs=StructuredOutputsParams(choice=words)) if how == 'structured output'
             else dict(allowed_token_ids=taken.tolist()))
    z, T = expected(reference, folded[0], prompts[1], [0])
    only = torch.full((z.shape[1] + 1,), -torch.inf).index_copy(0, taken, z[0, taken])
    drawn = drawn_first(ours, prompts[1], temperature=temperature, **asked)
    assert fits(drawn, min_p_filter(only/temperature, .1).softmax(-1)) > 1e-4
    assert fits(drawn, min_p_filter(only/(T[0]*temperature), .1).softmax(-1)) < 1e-4, 'a temperature of 1 would prove nothing'


def test_raw_logprobs_are_those_of_the_model_and_its_row(reference, folded, prompts):
    "vLLM's default. The row has a share of the probability there, which is next to nothing; a request's temperature has none"
    raw, model = engine(folded, 'older'), load_model(folded[1])[0]
    for prompt,(out,) in zip(prompts, write(raw, prompts, logprobs=8, temperature=1.5, min_p=1e-9)):
        ids = torch.tensor([reference[1](prompt, add_special_tokens=False).input_ids + list(out.token_ids)])
        with torch.no_grad(): z = model(ids).logits[0, -len(out.token_ids) - 1:-1]
        wanted, without = z.log_softmax(-1), z[:, :-1].log_softmax(-1)
        assert (wanted[:, :-1] - without).abs().max() < 1e-4
        for row,found in zip(wanted, values(out)):
            torch.testing.assert_close(torch.tensor(list(found.values())), row[list(found)], rtol=2e-3, atol=2e-3)


@pytest.fixture(scope='module')
def server(folded, tmp_path_factory):
    os.environ['VLLM_USE_V2_MODEL_RUNNER'] = '0'
    with vllm_server(tmp_path_factory.mktemp('server')/'log', folded[1], '--logits-processors', *SETTINGS['logits_processors']) as address:
        yield address


def asked_first(server, prompt, n=512, **body):
    "First tokens, over HTTP"
    ask = lambda: post(server, '/v1/completions', prompt=prompt, n=64, max_tokens=1, logprobs=0, return_tokens_as_token_ids=True, **body)
    return torch.tensor([int(c['logprobs']['tokens'][0].removeprefix('token_id:')) for _ in range(n//64) for c in ask()['choices']])


@pytest.mark.parametrize('said, scale', [({}, 1.), (dict(vllm_xargs=dict(head_scale=.5)), .5), (dict(vllm_xargs=dict(head_scale=0)), 0)])
def test_a_server_takes_the_scale_of_a_request(reference, folded, server, prompts, said, scale):
    "`vllm serve` on the folded folder: by default the head's temperature, and a request scales it or turns it off"
    z, T = expected(reference, folded[0], prompts[1], [0])
    p = min_p_filter(z[0]/(T[0]*scale), .1).softmax(-1) if scale else z[0].softmax(-1)
    assert fits(asked_first(server, prompts[1], **said), torch.cat([p, torch.zeros(1)])) > 1e-4


def test_a_server_is_greedy_as_the_model_and_refuses_a_scale_that_is_none(reference, server, prompts):
    model, tokenizer = reference
    for prompt in prompts:
        out = post(server, '/v1/completions', prompt=prompt, temperature=0, max_tokens=16)['choices'][0]['text']
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors='pt')
        plain = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids.input_ids.shape[1]:]
        assert out == tokenizer.decode(plain, skip_special_tokens=True)
    with pytest.raises(urllib.error.HTTPError, match='400'): asked_first(server, prompts[1], vllm_xargs=dict(head_scale=-1))


def test_one_class_serves_both_interfaces(folded):
    "As vLLM's own loaders find it by its name, in the process that takes requests and in the one that runs the model"
    from types import SimpleNamespace
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns
    from vllm.v1.worker.gpu.sample.logits_processor.loader import (build_custom_logits_processors_params_validator,
                                                                   _load_v2_logitsprocs_by_fqcns)
    names = SETTINGS['logits_processors']
    (made,), (older,) = _load_v2_logitsprocs_by_fqcns(names), _load_logitsprocs_by_fqcns(names)
    assert made is older
    check = build_custom_logits_processors_params_validator(names)
    check(vllm.SamplingParams(extra_args=dict(head_scale=.5)))
    with pytest.raises(VLLMValidationError, match='head_scale is'): check(vllm.SamplingParams(extra_args=dict(head_scale=-1)))
    config = SimpleNamespace(model_config=SimpleNamespace(model=str(folded[1])))
    new = made(config, SimpleNamespace(max_num_reqs=4, device=torch.device('cpu')))
    assert new.add_request(2, vllm.SamplingParams(temperature=2., extra_args=dict(head_scale=.5)))
    new.apply_staged_writes()
    s, z = read_row(folded[1]), torch.randn(2, 49153)
    found = new.apply(z.clone(), SimpleNamespace(expanded_idx_mapping=torch.tensor([2, 2]))) # as when a token is speculated
    x = z/(.5*s['scale']*(z[:, s['row'], None] + s['b']).clamp(s['t_min'], s['t_max']))
    x[:, s['row']] = -torch.inf
    torch.testing.assert_close(found/2., min_p_filter(x/2., s['min_p']))


@pytest.mark.parametrize('bad', [-1, 'hot', True])
def test_a_scale_that_is_none(bad, ours, prompts):
    from vllm.exceptions import VLLMValidationError
    with pytest.raises(VLLMValidationError, match='head_scale is'): write(ours, prompts[:1], extra_args=dict(head_scale=bad))


@pytest.mark.parametrize('runner, model, kw, message', [
    ('older', 'folded', dict(speculative_config=SPECULATION), 'not supported when speculative decoding is enabled'),
    ('older', MODEL, {}, 'has no row of a head')])
def test_what_is_refused_when_the_engine_starts(folded, runner, model, kw, message):
    where = str(folded[1] if model == 'folded' else model)
    code = f'import vllm\nif __name__ == "__main__": vllm.LLM({where!r}, **{SETTINGS!r}, **{kw!r})'
    env = os.environ | dict(VLLM_USE_V2_MODEL_RUNNER='0', VLLM_ENABLE_V1_MULTIPROCESSING='0')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert done.returncode and message in done.stderr
