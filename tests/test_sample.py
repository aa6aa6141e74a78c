"""The sampler: the text of a seed depends on nothing that stands beside it, any kind of cache, and
the distribution of `generate`."""
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from scipy.stats import chi2_contingency, chisquare

from simpledeco.conversations import prompt_ids
from simpledeco.model import load_model
from simpledeco.sample import _draw, constant, sample
from simpledeco.study.decoders import at, Pool

ASKED = ('Hi!', 'What is the capital of Norway?',
         'Continue this story: it was a dark and stormy night, and', 'What is the capital of Poland?') # as long as another
TALKS = [[dict(role='user', content=t)] for t in ASKED]
RULES = dict(greedy=constant(0), warm=constant(1), hot=constant(1.5, min_p=None),
             nucleus=constant(1, top_p=.9))
TINY = dict(vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, bos_token_id=1, eos_token_id=2, pad_token_id=2)
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
              linear_value_head_dim=8, num_experts=4,
              num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
KINDS = {'every position': ('LlamaConfig', {}),
         'a wide window': ('MistralConfig', dict(sliding_window=4096)),
         'a narrow window': ('MistralConfig', dict(sliding_window=8)),
         'windows and full layers': ('Gemma3TextConfig', dict(sliding_window=8)),
         'linear and full layers': ('Qwen3NextConfig', LINEAR),
         'one state': ('MambaConfig', {}),
         'learned positions': ('GPT2Config', dict(n_embd=32, n_layer=2, n_head=4)),
         'positions in the attention': ('BloomConfig', dict(n_head=4))}


@pytest.fixture(scope='module')
def smoke(): return load_model(ROOT/'models/smoke')


def tokens(found):
    return {name: [[a.tokens for a in group] for group in groups] for name,groups in found.items()}


def tiny(name, **options):
    torch.manual_seed(0)
    config = getattr(transformers, name)(**TINY | options)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize('rows', [1, 5, 64])
def test_a_seed_gives_the_same_texts_in_any_batch(smoke, rows):
    "Up to the rounding of the logits: a draw changes only where two scores agree to about 1e-6"
    usual, other = (sample(*smoke, TALKS, RULES, 3, 12, rows=r, progress=False) for r in (192, rows))
    assert tokens(usual) == tokens(other)
    assert all(abs(a.nll - b.nll) < 1e-4 for name in RULES for x,y in zip(usual[name], other[name])
               for a,b in zip(x, y))


def test_a_rule_that_draws_draws_the_same_in_any_batch(smoke):
    pool = Pool(None, torch.linspace(0, 9, 9), [torch.tensor([.2, .7, 1.1, 1.6])]*10, ())
    rules = dict(RULES, drawn=at(pool.draw, .1))
    first, other = (tokens(sample(*smoke, TALKS, rules, 3, 12, rows=r, progress=False))['drawn'] for r in (64, 3))
    seen = []
    sample(*smoke, TALKS, dict(drawn=at(lambda step: seen.extend(pool.draw(step).tolist()) or torch.ones(len(step.rows)), .1)),
           3, 12, progress=False)
    assert first == other and {round(t, 1) for t in seen} == {.2, .7, 1.1, 1.6}


def test_the_logits_that_are_read_at_once_change_nothing(smoke, monkeypatch): # they are fewer where a vocabulary is large
    usual = tokens(sample(*smoke, TALKS, RULES, 3, 12, progress=False))
    monkeypatch.setitem(sample.__wrapped__.__globals__, 'BLOCK', 2)
    assert tokens(sample(*smoke, TALKS, RULES, 3, 12, progress=False)) == usual


def test_another_decoder_or_prompt_changes_nothing(smoke):
    every = tokens(sample(*smoke, TALKS, RULES, 3, 12, progress=False))
    alone = tokens(sample(*smoke, TALKS[:0:-1], dict(hot=RULES['hot']), 3, 12, progress=False))
    assert alone['hot'] == every['hot'][:0:-1]
    assert tokens(sample(*smoke, TALKS, dict(again=RULES['warm']), 2, 12,
                         progress=False))['again'] == [g[:2] for g in every['warm']]


def test_texts_that_agree_so_far_are_read_once(smoke, monkeypatch):
    "The rows that the model reads are the different beginnings of the answers to a prompt"
    model, tokenizer = smoke
    read, forward = [], model.base_model.forward
    def counted(*args, **kw):
        read.append(kw['input_ids'].shape)
        return forward(*args, **kw)
    monkeypatch.setattr(model.base_model, 'forward', counted)
    rules = RULES | dict(cold=constant(.05), warm_too=constant(1.))
    found = tokens(sample(model, tokenizer, TALKS, rules, 3, 12, progress=False))
    begun = [{tuple(t[:k]) for groups in found.values() for t in groups[i] for k in range(1, len(t))} for i in range(len(TALKS))]
    later = sum(rows for rows,width in read if width == 1)
    every = sum(len(t) - 1 for groups in found.values() for group in groups for t in group)
    assert later == sum(map(len, begun)) < .7*every


def test_prompts_of_one_length_are_read_together_and_what_all_begin_with_once(smoke, monkeypatch):
    model, tokenizer = smoke
    read, forward = [], model.base_model.forward
    def counted(*args, **kw):
        read.append(tuple(kw['input_ids'].shape))
        return forward(*args, **kw)
    monkeypatch.setattr(model.base_model, 'forward', counted)
    sample(model, tokenizer, TALKS, RULES, 1, 1, progress=False)
    asked = prompt_ids(tokenizer, TALKS)
    same = next(i for i in range(100) if len({ids[i] for ids in asked}) > 1)
    lengths = Counter(len(ids) - same for ids in asked)
    assert same > 5 and read == [(1, same), *sorted(((n, length) for length,n in lengths.items()), key=lambda x: -x[1])]
    assert max(lengths.values()) == 2
    read.clear()
    assert tokens(sample(model, tokenizer, TALKS[:1]*20, RULES, 2, 1, progress=False)) # all of it is the same but for the last token
    assert read == [(1, len(asked[0]) - 1), (16, 1), (4, 1)]
    read.clear()
    sample(model, tokenizer, TALKS[:1], RULES, 1, 1, progress=False)
    assert read == [(1, len(asked[0]))]
    read.clear()
    long = [dict(role='user', content=f'{i} ' + 'word '*400) for i in range(5)]
    sample(model, tokenizer, [[x] for x in long], dict(greedy=constant(0)), 1, 1, progress=False)
    assert [n for n,_ in read] == [1, 2, 2, 1]


def test_samples_seeds_and_repeated_prompts_differ(smoke):
    first, again = tokens(sample(*smoke, [TALKS[0]]*2, dict(hot=RULES['hot']), 2, 12,
                                 progress=False))['hot']
    other = tokens(sample(*smoke, [TALKS[0]], dict(hot=RULES['hot']), 2, 12, seed=1,
                          progress=False))['hot'][0]
    assert len({tuple(t) for t in (*first, *again, *other)}) == 6


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_cache_is_what_generate_does(smoke, kind):
    model, tokenizer = tiny(KINDS[kind][0], **KINDS[kind][1]), smoke[1]
    got = tokens(sample(model, tokenizer, TALKS, RULES, 2, 12, rows=7, progress=False))
    for talk,answers in zip(TALKS, got['greedy']):
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors='pt',
                                            return_dict=True).input_ids
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                  max_new_tokens=12)[0, ids.shape[1]:].tolist()
        assert answers == [expected]*2
    assert got == tokens(sample(model, tokenizer, TALKS, RULES, 2, 12, progress=False))


def test_a_model_without_such_a_cache_is_refused(smoke):
    config = transformers.RwkvConfig(vocab_size=49152, hidden_size=32, num_hidden_layers=2)
    model = transformers.RwkvForCausalLM(config).eval()
    with pytest.raises(ValueError, match='RwkvForCausalLM takes no cache'):
        sample(model, smoke[1], TALKS, RULES, 1, 2, progress=False)


def test_an_answer_ends_at_any_end_token(smoke, monkeypatch):
    model, tokenizer = smoke
    whole = sample(model, tokenizer, TALKS[:1], dict(greedy=constant(0)), 1, 12,
                   progress=False)['greedy'][0][0].tokens
    monkeypatch.setattr(model.generation_config, 'eos_token_id', [tokenizer.eos_token_id, whole[1]])
    cut = sample(model, tokenizer, TALKS[:1], dict(greedy=constant(0)), 1, 12,
                 progress=False)['greedy'][0][0].tokens
    assert cut == whole[:whole.index(whole[1]) + 1]


@pytest.fixture
def reserved(monkeypatch): # the rows of each piece of memory for keys or values; all of it is filled with NaN
    empty, sizes = torch.Tensor.new_empty, []
    def dirty(self, *size, **kw):
        found = empty(self, *size, **kw)
        if found.ndim == 4: sizes.append(len(found))
        return found.fill_(torch.nan) if found.is_floating_point() else found
    monkeypatch.setattr(torch.Tensor, 'new_empty', dirty)
    return sizes


def test_memory_that_was_not_written_is_never_read(smoke, reserved, monkeypatch):
    "Rows are reserved without being cleared, again and again as texts part"
    dirty = tokens(sample(*smoke, TALKS, RULES, 9, 12, rows=2, progress=False))
    sizes = sorted(set(reserved))
    assert len(sizes) > 2 and all(b >= 2*a for a,b in zip(sizes, sizes[1:]))
    monkeypatch.undo()
    assert tokens(sample(*smoke, TALKS, RULES, 9, 12, rows=2, progress=False)) == dirty


def test_no_more_memory_than_there_are_texts(smoke, reserved):
    sample(*smoke, TALKS, RULES, 2, 12, rows=1000, progress=False)
    assert set(reserved) == {2*len(TALKS)*len(RULES)}


def test_answers_of_one_token(smoke):
    longer, one = (tokens(sample(*smoke, TALKS, RULES, 2, most, progress=False)) for most in (3, 1))
    assert one == {name: [[t[:1] for t in group] for group in groups] for name,groups in longer.items()}


def test_logits_that_are_not_numbers_are_an_error(smoke):
    model = tiny('LlamaConfig')
    model.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(ValueError, match='LlamaForCausalLM gives logits that are not numbers'):
        sample(model, smoke[1], TALKS, RULES, 1, 2, progress=False)
    for broken in (-torch.inf, torch.nan, torch.inf):
        rules = dict(broken=lambda step: torch.full_like(step.logits, broken)) # called at once
        with pytest.raises(ValueError, match="the rule 'broken' leaves no token"):
            sample(*smoke, TALKS, rules, 1, 2, progress=False)


def test_a_later_token_is_distributed_as_in_generate(smoke):
    model, tokenizer = smoke
    ids = tokenizer.apply_chat_template(TALKS[1], add_generation_prompt=True, return_tensors='pt',
                                        return_dict=True).input_ids
    third = lambda texts: Counter(t[2] if len(t) > 2 else -1 for t in texts)
    ours = third(a.tokens for a in sample(model, tokenizer, TALKS[1:2], dict(warm=constant(.7)),
                                          1000, 3, progress=False)['warm'][0])
    torch.manual_seed(1)
    options = dict(do_sample=True, temperature=.7, min_p=.1, top_k=0, top_p=1.,
                   pad_token_id=tokenizer.eos_token_id, max_new_tokens=3)
    ids = ids.expand(1000, -1)
    rows = model.generate(ids, attention_mask=torch.ones_like(ids),
                          **options)[:, ids.shape[1]:].tolist()
    theirs = third(t[:t.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in t else t
                   for t in rows)
    common = [t for t in ours | theirs if ours[t] + theirs[t] >= 20]
    table = np.array([[c[t] for t in common] + [1000 - sum(c[t] for t in common)]
                      for c in (ours, theirs)])
    assert len(common) > 1 and chi2_contingency(table[:, table.sum(0) > 0]).pvalue > .001


@pytest.mark.parametrize('size', [6, 60]) # of the vocabulary: most of it is kept, or a tenth
def test_a_draw_is_from_the_softmax_of_what_is_kept(size):
    torch.manual_seed(0)
    n, kept = 20000, 5
    x = torch.full((size,), -torch.inf)
    x[torch.randperm(size)[:kept]] = torch.randn(kept)
    keys = torch.randint(2**32, (n,))
    drawn = _draw(x.expand(n, -1), keys, torch.full((n,), 3))
    count, p = drawn.bincount(minlength=size), x.double().softmax(0)
    assert count[p == 0].sum() == 0 and chisquare(count[p > 0], n*p[p > 0]).pvalue > .001
    wide = torch.cat([x, torch.full((200,), -torch.inf)]).expand(n, -1) # the same where most is cut, so that only what is kept gets noise
    assert torch.equal(_draw(wide, keys, torch.full((n,), 3)), drawn)
    assert not torch.equal(_draw(wide, keys, torch.full((n,), 4)), drawn)


@pytest.mark.parametrize('kept', [1, 40]) # of 40
def test_a_row_without_a_token_is_an_error(kept):
    x = torch.zeros(3, 40)
    x[:, kept:] = -torch.inf
    assert (_draw(x, torch.arange(3), torch.zeros(3, dtype=torch.long)) < kept).all()
    for row in range(3):
        broken = x.clone()
        broken[row] = -torch.inf
        with pytest.raises(ValueError, match='leaves no token'):
            _draw(broken, torch.arange(3), torch.zeros(3, dtype=torch.long))
