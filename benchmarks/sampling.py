"""How far `sample` is from the bare forward pass of its model, and where the rest of the time goes. Writes
benchmarks/sampling.json, from which the page of the sampler draws its figure. Run: python benchmarks/sampling.py

*Bare* is what no sampler can avoid. So many rows, each a prompt and the tokens after it, stand in one batch, padded on
the left; the prompts have been read before the clock starts. Then the model is called once for each of the new tokens,
one token a row, with the cache, the mask and the positions as `generate` would give them, and returns the logits of
every row. Nothing looks at the logits, no row ends, and every row writes the same token again.

*sample* is the whole call: reading the prompts, eight decoders with four samples of each prompt, the passes over the
vocabulary, the draws, the cache, and the last steps, where not all rows are taken. It writes at least twice as many
texts as there are rows; an answer that ends makes room for the next. Texts that agree so far are one row, so it can be
faster than the bare pass; *read* is how many rows the model read for each token that was written.

*One rule* is the call that `on_policy` makes: one rule, two answers to each prompt. There is less to share.

Both take turns, and what is compared is tokens a second. The parts are shares of the seconds of one call, as
torch.profiler sees them. In the end no text waits, and rows that end stay empty: *rows_a_step* is how many rows the
model read in a step, in the mean of all steps, *tail* the share of the seconds that came after the last prompt, and
*reading* that in which the model read prompts, by the clock. Of one rule the clock says enough: its many prompts are too
much for the profiler's memory.

All rules draw with the same noise, and a comparison of two is free of the luck that they share. How much that is: each of
two rules writes the answers twice, with two seeds. The difference of the two in one seed has the same noise on both sides,
that across the seeds has not, and what is compared is how wide the 95% intervals of their means are, over groups of prompts.
"""
import json, os, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from run import compared, ROOT
from torch.profiler import profile, ProfilerActivity, record_function
from transformers import DynamicCache

from simpledeco.conversations import prompt_ids
from simpledeco.head import TemperatureHead
from simpledeco.judge import is_right
from simpledeco.model import load_model
from simpledeco.sample import _Writer, constant, head_rule, sample
from simpledeco.study.models import model_folder
from simpledeco.study.profiles import profile_prompts
from simpledeco.study.settings import load_profile
from simpledeco.study.texts import test_prompts, text_of, usable, variety

NEW, SAMPLES, ROUNDS = 24, 4, {16: 8, 64: 6, 192: 4} # tokens of a text; texts of a rule; pairs for each number of rows
STAGES = {'sample: prompt': 'reading the prompts', 'sample: vocabulary': 'vocabulary', 'sample: cache': 'cache'}
OPERATIONS = {'aten::linear': 'matrix products', 'aten::scaled_dot_product_attention': 'attention'}
PAIRS = ('T = 0.7', 'T = 1'), ('T = 1', 'T = 1.5') # rules whose difference is taken
ALONE = {128: 3} # rows and pairs for one rule: `sample` takes so many rows where nothing is said
EACH = 20 # questions of each corpus for that, and half as many as the open prompts
PARTS = (*OPERATIONS.values(), 'rest of the model', 'vocabulary', 'cache', 'reading the prompts')


def decoders(model):
    "Eight rules: temperatures from greedy to hot, a nucleus, and heads that read either input"
    torch.manual_seed(0)
    heads = {reads: TemperatureHead(model.config.hidden_size, reads=reads).eval() for reads in ('logits', 'hidden')}
    static = {f'T = {t}': constant(t) for t in (0, .5, .7, 1, 1.5)}
    return static | dict(nucleus=constant(1, top_p=.9)) | {reads: head_rule(h) for reads,h in heads.items()}


def subject(name='embedded'):
    "The model of a profile, some of its prompts from every corpus, and the rules"
    p = load_profile(name, ROOT)
    model, tokenizer = load_model(model_folder(name))
    prompts = [x['messages'] for x in profile_prompts(p, 4, ['train'])]
    return SimpleNamespace(profile=p, model=model, tokenizer=tokenizer, prompts=prompts, rules=decoders(model), samples=SAMPLES)


def alone(m):
    "The same with one rule and two answers to a prompt, as `on_policy` samples"
    return SimpleNamespace(**vars(m) | dict(rules={'T = 1': m.rules['T = 1']}, samples=2))


def asked(m, rows, i):
    "The prompts of round i: enough for twice as many texts as there are rows"
    n = -(-2*rows//(m.samples*len(m.rules)))
    return [m.prompts[(i*n + k) % len(m.prompts)] for k in range(n)]


@torch.inference_mode()
def bare(m, rows, i):
    "Seconds a token of the bare pass"
    encoded = prompt_ids(m.tokenizer, asked(m, rows, i))
    width, per = max(map(len, encoded)), -(-rows//len(encoded)) # rows of a prompt
    ids, mask = torch.zeros(2, len(encoded), width, dtype=torch.long)
    for row,p in enumerate(encoded): ids[row, width-len(p):] = torch.tensor(p); mask[row, width-len(p):] = 1
    past, options = DynamicCache(config=m.model.config), dict(use_cache=True)
    m.model.base_model(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), past, **options)
    past.batch_repeat_interleave(per); past.batch_select_indices(torch.arange(rows))
    ids, mask = (x.repeat_interleave(per, 0)[:rows] for x in (ids, mask))
    start = time.perf_counter()
    for _ in range(NEW):
        mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
        m.model(ids[:, -1:], mask, mask.sum(1, keepdim=True) - 1, past, **options)
    return (time.perf_counter() - start)/(NEW*rows)


def ours(m, rows, i):
    "Seconds a token of `sample`"
    start = time.perf_counter()
    found = sample(m.model, m.tokenizer, asked(m, rows, i), m.rules, m.samples, NEW, i, rows, progress=False)
    return (time.perf_counter() - start)/sum(len(a.tokens) for x in found.values() for group in x for a in group)


def read(m, rows):
    "Rows that the model reads for each token that is written"
    found = sample(m.model, m.tokenizer, asked(m, rows, 0), m.rules, m.samples, NEW, 0, rows, progress=False)
    written = [[a.tokens for x in found.values() for a in x[i]] for i in range(len(asked(m, rows, 0)))]
    begun = sum(len({tuple(t[:k]) for t in texts for k in range(1, len(t))}) for texts in written)
    return (begun + len(written))/sum(len(t) for texts in written for t in texts)


def occupied(m, rows):
    "Of one call: steps, mean number of rows that the model reads in a step, share of the seconds after the last prompt and in prompts"
    seen, begun, begin = [], [], time.perf_counter()
    note = lambda module, args, inputs, *_: seen.append((*inputs['input_ids'].shape, time.perf_counter()))
    hooks = m.model.register_forward_pre_hook(note, with_kwargs=True), m.model.register_forward_hook(note, with_kwargs=True)
    def noted(writer, *args): begun.append(time.perf_counter()); return starts(writer, *args)
    starts, _Writer.begin = _Writer.begin, noted
    try: ours(m, rows, 0)
    finally:
        _Writer.begin = starts
        for hook in hooks: hook.remove()
    passes, whole = list(zip(seen[::2], seen[1::2])), time.perf_counter() - begin # each begins and ends
    steps, last = [n for (n,length,_),_ in passes if length == 1], begun[-1]
    reading = sum(end - start for (_,length,start),(_,_,end) in passes if length > 1)
    return dict(steps=len(steps), rows_a_step=np.mean(steps), tail=(begin + whole - last)/whole, reading=reading/whole)


def speed(m, rows, rounds, methods=(bare, ours)):
    "Seconds a token of each method [rounds, methods], in turns, each round in the other order; the first round warms up"
    found = np.zeros((rounds, len(methods)))
    for i in range(-1, rounds):
        for k in range(len(methods))[::1 if i % 2 else -1]: found[i, k] = methods[k](m, rows, i) # the last is overwritten
    return found


def part_of(event):
    "Which of PARTS an event of the profiler belongs to: that of the outermost part around it"
    found = 'rest of the model'
    while event is not None:
        found = STAGES.get(event.name) or (OPERATIONS.get(event.name, found) if found not in STAGES.values() else found)
        event = event.cpu_parent
    return found


def parts(m, rows):
    "Share of the seconds of one call in each of PARTS"
    with profile(activities=[ProfilerActivity.CPU]) as seen, record_function('call'): ours(m, rows, 0)
    found = dict.fromkeys(PARTS, 0.)
    for event in seen.events(): found[part_of(event)] += event.self_cpu_time_total
    return {k: x/sum(found.values()) for k,x in found.items()}


def scored(m, prompts, length, score):
    "What the answers to each prompt are worth, of the rules in PAIRS and two seeds: {rule: [2, P]}"
    rules = {name: m.rules[name] for pair in PAIRS for name in pair}
    found = [sample(m.model, m.tokenizer, [x['messages'] for x in prompts], rules, m.samples, length, seed, progress=False)
             for seed in (0, 1)]
    return {name: np.array([[score(x, answers) for x,answers in zip(prompts, f[name])] for f in found]) for name in rules}


def widths(differences, group, counts):
    "Width of the 95% interval of the mean of differences [D, P], the mean of D, where groups are drawn `counts` [B, G] times: [B]"
    _, at, n = np.unique(group, return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(at, d) for d in differences])
    total = counts @ n
    mean = counts @ sums.T/total[:, None]
    error = (counts[:, None]*(sums - n*mean[..., None])**2).sum(2)/total[:, None]**2
    return 2*1.96*np.sqrt(error.mean(1))


def narrower(first, second, group, bootstrap=1000):
    "The interval of the difference of two rules' scores [2 seeds, P] with the noise of one seed, as a share of that with two seeds'"
    shared, own = first - second, first - second[::-1]
    groups = len(set(group))
    drawn = np.random.default_rng(0).multinomial(groups, np.full(groups, 1/groups), bootstrap)
    of = lambda counts: widths(shared, group, counts)/widths(own, group, counts)
    lo, hi = np.quantile(of(drawn), (.025, .975))
    one = np.ones((1, groups))
    return dict(ratio=of(one)[0], lo=lo, hi=hi, at_most=1, width_shared=widths(shared, group, one)[0],
                width_own=widths(own, group, one)[0], prompts=len(group), groups=groups)


def intervals(m):
    "(name, how much narrower) for accuracy on questions and variety on open prompts, of each pair of rules"
    p = m.profile
    p.test_prompts = EACH
    questions, opens = test_prompts(p, 'train', p.primary.split())
    right = lambda x, answers: np.mean([is_right(text_of(m.tokenizer, a), x) for a in answers])
    varied = lambda x, answers: variety([[answers]])[0]
    for what,prompts,length,score in (('accuracy', sum(questions.values(), []), p.answer_tokens, right),
                                      ('variety', opens, p.open_test_tokens, varied)):
        found = scored(m, prompts, length, score)
        kept = usable({name: x.sum(0) for name,x in found.items()})
        group = np.array([x['group'] for x in prompts])[kept]
        for a,b in PAIRS: yield f'{what}, {a} and {b}', narrower(found[a][:, kept], found[b][:, kept], group)


def measurements(m):
    "(name, result) for each number of rows, for one rule alone, and for each pair of rules"
    for what,call,wanted in (('', m, ROUNDS), ('one rule, ', alone(m), ALONE)):
        for rows,rounds in wanted.items():
            pairs = speed(call, rows, rounds)
            speeds = dict(zip(('bare_tokens_per_second', 'tokens_per_second'), 1/np.median(pairs, 0)))
            found = compared(pairs)[0] | dict(at_least=.8, **speeds, read=read(call, rows), **occupied(call, rows))
            yield f'sampling / bare, {what}{rows} rows', found | (dict(parts=parts(call, rows)) if call is m else {})
    for name,found in intervals(m): yield f'interval with shared / own noise, {name}', found


if __name__ == '__main__':
    m = subject()
    results = dict(threads=torch.get_num_threads(), load_before=os.getloadavg()[0], new_tokens=NEW, rules=len(m.rules), samples=SAMPLES)
    for name,found in measurements(m):
        results[name] = found
        print(name, found, file=sys.stderr, flush=True)
        (Path(__file__).parent/'sampling.json').write_text(json.dumps(results, indent=1) + '\n')
