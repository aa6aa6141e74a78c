"Real generation from SmolLM2 in stock vLLM: run by `make test-vllm`, in an environment of its own"
import math, os, subprocess, sys, urllib.error

import pytest, torch
from scipy.stats import chisquare
from conftest import beginnings, fits, post, ROOT, vllm_server

from simpledeco.decode import attach, min_p_filter
from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, load_model
from simpledeco.onpolicy import judge
from simpledeco.sample import constant, sample
from simpledeco.vllm import ends_of, PREFIX, serve_dir, write

vllm = pytest.importorskip('vllm', reason='run `make test-vllm`')
MODEL = ROOT/'models/embedded'
# blocks of 32 and steps of at most 64 tokens, so that prompts share blocks and are read in pieces
SETTINGS = dict(dtype='float32', max_model_len=512, max_num_seqs=64, max_num_batched_tokens=64, enforce_eager=True, block_size=32)
os.environ |= dict(HF_HUB_OFFLINE='1', VLLM_CPU_KVCACHE_SPACE='1', VLLM_NO_USAGE_STATS='1')
PROMPTS = ['What is the capital of France?', 'Write the first line of a poem.', 'What is 17 + 25?',
           'Tell me a surprising fact.']


@pytest.fixture(scope='module')
def reference(): return load_model(MODEL)


@pytest.fixture(scope='module')
def prompts(reference):
    return [reference[1].apply_chat_template([dict(role='user', content=p)], add_generation_prompt=True,
                                             tokenize=False) for p in PROMPTS]


@pytest.fixture(scope='module')
def served(reference, tmp_path_factory):
    "A folder for each kind of head; random ones, whose temperatures differ from token to token"
    folder, out = tmp_path_factory.mktemp('served'), {}
    for reads in ('logits', 'hidden'):
        torch.manual_seed(3)
        head = TemperatureHead(576, reads=reads, base_model=fingerprint(reference[0]))
        head.mean.fill_(1.); head.std.fill_(4.)
        head.save_pretrained(folder/f'head-{reads}')
        out[reads] = head.eval(), serve_dir(folder/f'head-{reads}', MODEL, folder/reads, scale=1.25)
        out[f'head-{reads}'] = folder/f'head-{reads}'
    return out


@pytest.fixture(scope='module')
def base(): return vllm.LLM(str(MODEL), **SETTINGS)


@pytest.fixture(scope='module')
def ours(served): return vllm.LLM(str(served['logits'][1]), **SETTINGS)


def expected(reference, head, prompt, ids):
    """What transformers makes of the same tokens: logits [n, V], temperatures [n],
    log-probabilities with the head attached [n, V]"""
    model, tokenizer = reference
    start = tokenizer(prompt, add_special_tokens=False).input_ids
    x, rows = torch.tensor([start + list(ids)]), slice(len(start) - 1, -1)
    with torch.no_grad():
        hidden, z = model.base_model(x).last_hidden_state[0, rows], model(x).logits[0, rows]
        with attach(model, head, scale=1.25): divided = model(x).logits[0, rows]
    return z, 1.25*head.temperature(head.live_inputs(hidden, z)).detach(), divided.log_softmax(-1)


def compare(reference, head, prompt, ids, logprobs):
    """Log-probabilities by token id against transformers; the temperature, recovered from two of
    them, against the head's"""
    z, T, wanted = expected(reference, head, prompt, ids)
    for i,found in enumerate(logprobs):
        best, other = sorted(found, key=found.get)[-1], sorted(found, key=found.get)[0]
        recovered = (z[i, best] - z[i, other]).item()/(found[best] - found[other])
        assert math.isclose(recovered, T[i].item(), rel_tol=2e-3), (recovered, T[i])
        for token,value in found.items():
            assert abs(value - wanted[i, token].item()) < .01*(1 + abs(value)), (i, token)
    return T


def test_there_is_a_class_with_a_head_for_every_class_of_vllm():
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.interfaces_base import is_text_generation_model
    vllm.plugins.load_general_plugins()
    names = vllm.ModelRegistry.get_supported_archs()
    own = {n for n in names if not n.startswith(PREFIX)}
    assert len(own) > 100 and own == {n.removeprefix(PREFIX) for n in names - own}
    for name in ('LlamaForCausalLM', 'Qwen3ForCausalLM', 'Gemma3ForCausalLM', 'MixtralForCausalLM',
                 'GPT2LMHeadModel'):
        base, made = (vllm.ModelRegistry.models[n].load_model_cls() for n in (name, PREFIX + name))
        assert issubclass(made, base) and made is not base and is_text_generation_model(made)
        assert vllm.ModelRegistry.models[PREFIX + name].load_model_cls() is made
    assert MODELS_CONFIG_MAP[PREFIX + 'GptOssForCausalLM'] is MODELS_CONFIG_MAP['GptOssForCausalLM']


def test_greedy_is_that_of_the_model(base, ours, prompts):
    greedy = vllm.SamplingParams(temperature=0, max_tokens=32)
    plain, divided = ([o.outputs[0].token_ids for o in engine.generate(prompts, greedy, use_tqdm=False)]
                      for engine in (base, ours))
    assert divided == plain and sum(map(len, plain)) > 60


def test_temperatures_are_those_of_transformers(reference, served, ours, prompts):
    seen = []
    params = vllm.SamplingParams(temperature=0, max_tokens=24, logprobs=8)
    for prompt,out in zip(prompts, ours.generate(prompts, params, use_tqdm=False)):
        o = out.outputs[0]
        seen.append(compare(reference, served['logits'][0], prompt, o.token_ids,
                            [{t: x.logprob for t,x in step.items()} for step in o.logprobs]))
    assert torch.cat(seen).std() > .1, 'temperatures that are all alike would prove nothing'


def test_long_prompts_are_read_in_pieces_and_share_their_beginning(reference, served, base, ours, prompts):
    "Each longer than a step, twice: the second time its blocks are there"
    long = ['You are a poet who answers in one line, in plain words, and never twice in the same way. '*4 + p for p in prompts]
    assert all(len(reference[1](p, add_special_tokens=False).input_ids) > SETTINGS['max_num_batched_tokens'] for p in long)
    params = vllm.SamplingParams(temperature=0, max_tokens=12, logprobs=8)
    plain, *twice = ([x.outputs[0] for x in llm.generate(long, params, use_tqdm=False)] for llm in (base, ours, ours))
    for outs in twice:
        assert [o.token_ids for o in outs] == [o.token_ids for o in plain]
        for p,o in zip(long, outs):
            compare(reference, served['logits'][0], p, o.token_ids, [{t: x.logprob for t,x in step.items()} for step in o.logprobs])


def test_prompts_are_scored_at_the_heads_temperature(reference, served, ours, prompts):
    "A limit of the class, which the row does not have: `compute_logits` is not told what its logits are for"
    model, head = reference[0], served['logits'][0]
    out, = ours.generate(prompts[:1], vllm.SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    ids = torch.tensor([out.prompt_token_ids])
    with torch.no_grad(), attach(model, head, scale=1.25): wanted = model(ids).logits[0].log_softmax(-1)
    found = torch.tensor([step[t].logprob for t,step in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:])])
    torch.testing.assert_close(found, wanted[:-1].gather(1, ids[0, 1:, None])[:, 0], rtol=.01, atol=.01)


UNEVEN = 'Monday, Tuesday, Wednesday, Thursday,' # after which the temperature of this head is far from 1

@pytest.mark.parametrize('how', ['structured output', 'allowed tokens'])
def test_structured_output(reference, served, ours, how):
    "One of the words, and its first token has the head's temperature"
    from vllm.sampling_params import StructuredOutputsParams
    words = ['In', 'The', 'As', 'Beneath']
    taken = beginnings(reference[1], words)
    asked = (dict(structured_outputs=StructuredOutputsParams(choice=words)) if how == 'structured output'
             else dict(allowed_token_ids=taken.tolist(), max_tokens=1))
    outs = [o for x in ours.generate([UNEVEN]*8, vllm.SamplingParams(n=64, min_p=.1, **asked), use_tqdm=False) for o in x.outputs]
    assert how == 'allowed tokens' or {o.text for o in outs} <= set(words)
    z, T, _ = expected(reference, served['logits'][0], UNEVEN, [0])
    drawn = torch.tensor([o.token_ids[0] for o in outs])
    only = torch.full_like(z[0], -torch.inf).index_copy(0, taken, z[0, taken])
    assert fits(drawn, min_p_filter(only/T[0], .1).softmax(-1)) > 1e-4
    assert fits(drawn, min_p_filter(only, .1).softmax(-1)) < 1e-4, 'a temperature of 1 would prove nothing'


def test_min_p_is_the_default_and_a_request_may_change_it(served, ours):
    assert ours.get_default_sampling_params().min_p == served['logits'][0].min_p
    assert ours.get_default_sampling_params().temperature == 1


@pytest.mark.parametrize('temperature, min_p', [(1., .1), (2., .1), (1.5, .02)])
def test_first_tokens_have_the_frequencies_that_they_should(reference, served, ours, prompts,
                                                            temperature, min_p):
    """Request-level temperature multiplies, and min-p comes after it: a chi-square test of sampled
    first tokens"""
    head, prompt, n = served['logits'][0], prompts[1], 1024
    z, T, _ = expected(reference, head, prompt, [0])
    p = min_p_filter(z[0]/(T[0]*temperature), min_p).softmax(-1)
    params = vllm.SamplingParams(temperature=temperature, min_p=min_p, top_k=0, max_tokens=1, n=64,
                                 seed=None)
    drawn = torch.tensor([o.token_ids[0]
                          for out in ours.generate([prompt]*(n//64), params, use_tqdm=False)
                          for o in out.outputs])
    counts = drawn.bincount(minlength=len(p))
    assert (p[drawn] > 0).all(), 'a token that min-p cuts was drawn'
    common = p*n >= 5
    seen = counts[common].tolist() + [int(counts[~common].sum())]
    wanted = (p[common]*n).tolist() + [float(p[~common].sum()*n)]
    if wanted[-1] < 5:
        seen, wanted = seen[:-2] + [seen[-2] + seen[-1]], wanted[:-2] + [wanted[-2] + wanted[-1]]
    assert len(seen) > 3 and chisquare(seen, [w*n/sum(wanted) for w in wanted]).pvalue > 1e-4


def test_answers_are_those_of_the_sampler(reference, base):
    """Greedy answers and their likelihoods are those of `sample`; random ones are of their prompt,
    end as they say, and repeat with the seed"""
    model, tokenizer = reference
    talks = [[dict(role='user', content=p)] for p in PROMPTS]
    greedy = sample(model, tokenizer, talks, dict(greedy=constant(0)), 1, 24, progress=False)['greedy']
    for ours,theirs in zip(greedy, write(base, tokenizer, talks, 1, 24, temperature=0)):
        assert theirs[0].tokens == ours[0].tokens and abs(theirs[0].nll - ours[0].nll) < 1e-3
    drawn, again = (write(base, tokenizer, talks, 3, 24, seed=5) for _ in range(2))
    assert drawn == again and len({tuple(a.tokens) for group in drawn for a in group}) > len(PROMPTS)
    prompts = [dict(id=str(i), corpus='x', split='train', group=str(i), messages=t, answer=a)
               for i,(t,a) in enumerate(zip(talks, ('Paris', None, '42', None)))]
    examples = judge(tokenizer, prompts, drawn, ends_of(base, tokenizer))
    assert len(examples) == 12 and all(x['right'] for x in examples[3:6])
    assert {x['ended'] for x in examples} <= {True, False}


@pytest.fixture(scope='module')
def speculating(served, reference, tmp_path_factory):
    "A folder whose class applies min-p itself, served with n-gram speculation"
    out = serve_dir(served['head-logits'], MODEL, tmp_path_factory.mktemp('own')/'served', scale=1.25, own_min_p=True)
    return vllm.LLM(str(out), **SETTINGS, speculative_config=dict(method='ngram', num_speculative_tokens=3, prompt_lookup_max=3))


RED = 'red red blue red red blue red red blue red red blue red red' # the next words can be looked up

def test_speculation_with_min_p_of_our_own(reference, served, base, speculating):
    "Greedy text is the model's, no token is drawn that min-p cuts, and a request that names min_p is refused by vLLM"
    from vllm.exceptions import VLLMValidationError
    greedy = vllm.SamplingParams(temperature=0, max_tokens=32)
    plain, ours = (llm.generate([RED], greedy, use_tqdm=False)[0].outputs[0].token_ids for llm in (base, speculating))
    assert ours == plain
    with pytest.raises(VLLMValidationError, match='min_p.*not yet supported with speculative'):
        speculating.generate([RED], vllm.SamplingParams(min_p=.1), use_tqdm=False)
    first, second = second_tokens(speculating, vllm.SamplingParams(max_tokens=2, n=64))
    z, T, _ = expected(reference, served['logits'][0], RED, [first, 0])
    assert len(second) > 100 and (min_p_filter(z[1]/T[1], .1)[second] > -math.inf).all(), 'a token that min-p cuts was drawn'


def second_tokens(llm, params): # what follows the most frequent first token
    drawn = torch.tensor([list(o.token_ids) for out in llm.generate([RED]*8, params, use_tqdm=False)
                          for o in out.outputs if len(o.token_ids) == 2])
    first = drawn[:, 0].mode().values
    return first.item(), drawn[drawn[:, 0] == first, 1]


@pytest.mark.parametrize('speculate', [False, pytest.param(True, marks=pytest.mark.xfail(strict=True, reason=(
    'this build of vLLM for the CPU draws speculated tokens from another distribution, without a head too')))])
def test_what_the_engine_draws_of_the_model_itself(reference, base, speculate):
    "Whether sampled text can be tested under speculation: the second token of the model, no head and no filter"
    how = dict(method='ngram', num_speculative_tokens=3, prompt_lookup_max=3)
    llm = vllm.LLM(str(MODEL), **SETTINGS, speculative_config=how) if speculate else base
    first, second = second_tokens(llm, vllm.SamplingParams(max_tokens=2, n=64, temperature=1, top_p=1, top_k=0, min_p=0))
    model, tokenizer = reference
    ids = [*tokenizer(RED, add_special_tokens=False).input_ids, first]
    with torch.no_grad(): p = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    common = p*len(second) >= 5
    seen, wanted = (second.bincount(minlength=len(p))[common]).tolist(), (p[common]*len(second)).tolist()
    seen, wanted = [*seen, len(second) - sum(seen)], [*wanted, len(second) - sum(wanted)]
    assert len(seen) > 2 and chisquare(seen, wanted).pvalue > 1e-4


def test_without_the_plugin_the_folder_is_refused(served):
    code = f'from vllm.config import ModelConfig; ModelConfig({str(served["logits"][1])!r})'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          env=os.environ | dict(VLLM_PLUGINS='lora_filesystem_resolver'))
    assert done.returncode and f'{PREFIX}LlamaForCausalLM' in done.stderr
    assert 'not supported' in done.stderr


@pytest.fixture(scope='module')
def server(served, tmp_path_factory):
    "A server of the head that reads hidden states"
    with vllm_server(tmp_path_factory.mktemp('server')/'log', served['hidden'][1]) as address: yield address


def test_server_greedy_and_temperatures(reference, served, server, base, prompts):
    "The head of this server reads hidden states"
    tokenizer, seen = reference[1], []
    for prompt in prompts:
        choice = post(server, '/v1/completions', prompt=prompt, temperature=0, max_tokens=24,
                      logprobs=5, return_tokens_as_token_ids=True)['choices'][0]
        ids = [int(t.removeprefix('token_id:')) for t in choice['logprobs']['tokens']]
        assert ids == list(base.generate([prompt], vllm.SamplingParams(temperature=0, max_tokens=24),
                                         use_tqdm=False)[0].outputs[0].token_ids)
        found = [{int(t.removeprefix('token_id:')): v for t,v in step.items()}
                 for step in choice['logprobs']['top_logprobs']]
        seen.append(compare(reference, served['hidden'][0], prompt, ids, found))
    assert torch.cat(seen).std() > .1


def test_server_takes_the_min_p_of_the_head_unless_told(reference, served, server, prompts):
    z, T, _ = expected(reference, served['hidden'][0], prompts[1], [0])
    drawn = lambda **kw: {int(c['logprobs']['tokens'][0].removeprefix('token_id:'))
                          for c in post(server, '/v1/completions', prompt=prompts[1], n=64,
                                        max_tokens=1, logprobs=0,
                                        return_tokens_as_token_ids=True, **kw)['choices']}
    inside = lambda ids, temperature, min_p: bool(
        torch.isfinite(min_p_filter(z[0]/(T[0]*temperature), min_p))[sorted(ids)].all())
    default, wide, hot = drawn(), drawn(min_p=1e-9), drawn(temperature=2.)
    assert inside(default, 1, .1) and len(default) > 1
    assert not inside(wide, 1, .1)
    assert inside(hot, 2, .1) and not inside(hot, 1, .1)
    with pytest.raises(urllib.error.HTTPError, match='400'):
        drawn(temperature=2.1) # vLLM's own limit: more heat is for serve_dir's scale


def test_server_chat(server):
    out = post(server, '/v1/chat/completions', messages=[dict(role='user', content=PROMPTS[0])],
               temperature=0, max_tokens=16)
    assert 'Paris' in out['choices'][0]['message']['content']
