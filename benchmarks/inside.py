"""Facts inside fiction, taught: is a token worth a temperature where heads have seen the very task?
Prompts ask for a text of any kind that says one fact, of four families. Places are dealt into two
halves, and what is asked about one half is learned from the model's own judged answers about the other.
Beside the heads: constants, heads that never saw the task, a rule of one line (greedy where the
likeliest token begins a word with a capital letter), and an oracle that knows the key (greedy where the
likeliest token is one of it). Writes OUT.json, and beside it a CSV with the means of each place; goes
on with what an earlier run has left in learned/PROFILE/inside.
Run, after `make rungs-further`: make inside, and after `make gemma-further`: make inside-gemma
About every place, in another kind of text, after both: make inside-again
"""
import argparse, gzip, json, random, re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from run import commit

from simpledeco.decode import tempered
from simpledeco.files import read_json, write_whole
from simpledeco.judge import is_right
from simpledeco.model import load_model
from simpledeco.onpolicy import fit_answers, on_policy
from simpledeco.sample import constant, head_rule, sample
from simpledeco.scan import scan
from simpledeco.study.decoders import at, at_first
from simpledeco.study.plan import RESAMPLES
from simpledeco.study.profiles import task_prompts
from simpledeco.study.rungs import Asked, cross_entropy, fit_probe, floored, RUNGS, two_sided
from simpledeco.study.settings import load_params, load_profile, project_root
from simpledeco.study.strengths import holm, LEARN, p_value, points, resampled, said, tree_of, verdicts
from simpledeco.study.tasks import INSIDE
from simpledeco.study.texts import rejudged, text_of
from simpledeco.table import TokenTable

FAMILIES = dict(
    capital=(('capitals', 'states'), INSIDE),
    continent=(('continents',), dict(
        postcard='Write a short postcard from {} and say on which continent it lies.',
        diary='Write a diary entry of a traveller who has just arrived in {}. Name the continent.',
        opening='Begin a story that is set in {}. Mention the continent by its name in the first sentence.',
        advert='write an advert for holidays in {}, with the name of the continent in it')),
    country=(('cities',), dict(
        postcard='Write a short postcard from the city of {} and say in which country it is.',
        diary='Write a diary entry of a traveller who has just arrived in the city of {}. Name the country.',
        opening='Begin a story that is set in the city of {}. Mention the country by its name in the first sentence.',
        advert='write an advert for holidays in the city of {}, with the name of the country in it')),
    currency=(('currencies',), dict(
        postcard='Write a short postcard from a market in {} and say in which currency one pays.',
        diary='Write a diary entry of a traveller who changes money in {}. Name the currency.',
        opening='Begin a story of a thief in {}. Mention the currency of the country in the first sentence.',
        advert='write an advert for a shop in {}, with prices in the currency of the country')))
BASE, RULE, ORACLE = 'static, min-p', 'capital letter', 'oracle, cold on the key'
WARM, OWN = (.4, .7, 1., 1.3, 1.6, 2., 2.5, 3.), (.25, .5, 1., 1.5, 2., 3., 4.5, 7.)
TAUGHT = (.5, 1., 2., 3., 4.5, 7., 11., 18.)
PART = 24 # prompts that are kept together
LADDER = 'static, top-p', 'p-less', 'EDT', 'dynamic temperature', 'one in five' # with their strengths there
SWITCH, HEADS = 'taught switch', ('own by token', 'own by prompt, floor', *(
    f'taught {x}' for x in ('by token', 'by prompt, floor', 'first token', 'cross-entropy', 'both sides', 'no key',
                            'at risk .05')))
FREE = (BASE, RULE, ORACLE, *LADDER)
PAIRS = [*((d, BASE) for d in (*LADDER, RULE, ORACLE, SWITCH, *HEADS)), *((RULE, d) for d in LADDER[2:]),
         (RULE, ORACLE), (SWITCH, RULE), (SWITCH, ORACLE), (SWITCH, 'taught by prompt, floor'),
         *(('taught by token', d) for d in (*HEADS[:2], *HEADS[3:], SWITCH, RULE, ORACLE))]
AT = {f'T = {s:g}': (BASE, s) for s in (.7, 1., 1.6)}


def name_of(prompt): # what the question is about
    city = re.search(r'the city of (.+)\?', prompt['messages'][-1]['content'])
    kind, _, name = prompt['group'].partition(' ')
    return city[1] if city else f'the U.S. state {name}' if kind == 'state' else name


def inside(p, model, tokenizer, splits, most, kinds): # prompts: at most so many facts of a family, in these kinds of text
    "About what the model knows: what it says right when it is asked plainly and decoded greedily"
    found = []
    for family,(corpora, texts) in FAMILIES.items():
        ask = [x for split in splits for x in task_prompts(p, 1000, split, corpora)]
        greedy = sample(model, tokenizer, [x['messages'] for x in ask], dict(greedy=constant(0)), 1, p.answer_tokens,
                        progress=False)['greedy']
        knows = [x for x,g in zip(ask, greedy) if is_right(text_of(tokenizer, g[0]), x)]
        for i,x in enumerate(random.Random(0).sample(knows, min(most, len(knows)))):
            for k in kinds:
                text = [*texts.values()][(i + k) % len(texts)].format(name_of(x))
                found.append(dict(x, id=f"{family}-{i}-{k}", corpus='inside', family=family,
                                  messages=[dict(role='user', content=text)]))
    random.Random(0).shuffle(found) # so that a run which is cut off has asked about every family
    return found


def halves(prompts): # {place: 0 or 1}
    groups = sorted({x['group'] for x in prompts})
    random.Random(0).shuffle(groups)
    return {g: i % 2 for i,g in enumerate(groups)}


def by_half(prompts, half, first=None): # {0 or 1: prompts}
    return {h: [x for x in prompts if half[x['group']] == h][:first] for h in (0, 1)}


def key_tokens(tokenizer, prompt): # a set of token ids
    key = prompt['answer']
    ways = tokenizer([key, f' {key}', f' {key.lower()}'], add_special_tokens=False).input_ids
    return {i for ids in ways for i in ids}


def on_the_key(tokenizer, prompts, s, min_p): # a rule: greedy where the likeliest token is one of the key
    keys = [torch.tensor(sorted(key_tokens(tokenizer, x))) for x in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(keys, batch_first=True, padding_value=-1)
    cold = lambda step: (ids.to(step.logits.device)[step.asked] == step.logits.argmax(-1, keepdim=True)).any(-1)
    return at(lambda step: s*(~cold(step)).float(), min_p)


def answered(folder, model, tokenizer, p, asked, n): # asked: (prompts, length) pairs
    "The model's own answers with nothing cut, judged, in examples.json, and their scan beside it"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder/'examples.json').exists():
        examples = [x for prompts,length in asked
                    for x in on_policy(model, tokenizer, prompts, n, length, min_p=None, progress=False)]
        write_whole(folder/'examples.json', lambda f: f.write_text(json.dumps(examples), encoding='utf-8'))
    scan(model, tokenizer, read_json(folder/'examples.json'), folder, p.batch_tokens, p.shard_examples, progress=False)


def key_probe(tokenizer, table, examples, corpora): # hidden states -> how much they look like those before a key
    "A probe of the tokens of the key in right answers; both kinds count the same"
    keys = {x['answer']: key_tokens(tokenizer, x) for x in examples}
    y = torch.tensor([x['right'] and x['ids'][w] in keys[x['answer']] for x in examples for w in x['where']]).float()
    rows = table.rows(corpora, ['train'])
    share = y[rows].mean()
    return fit_probe(table.take('hidden', rows), y[rows], torch.where(y[rows] > 0, .5/share, .5/(1 - share)))


def fit_heads(folder, half, names, **how): # {name: head}, for the places of one half
    "Own heads have seen no such prompt, and taught ones those about the other half"
    read = lambda x: (TokenTable(x), read_json(x/'examples.json'))
    taught, other, by_prompt = read(folder/'inside'), [f'half {1 - half}'], dict(by='prompt')
    own = lambda **kw: fit_answers(*read(folder), **how | kw)
    teach = lambda of=taught, **kw: fit_answers(*of, other, **how | kw)
    fits = {'own by token': own, 'own by prompt, floor': lambda: own(**by_prompt),
            'taught by token': teach, 'taught at risk .05': lambda: teach(risk=.05),
            'taught by prompt, floor': lambda: teach(**by_prompt),
            'taught no key': lambda: teach((taught[0], rejudged(taught[1], lambda x, i: True))),
            'taught cross-entropy': lambda: teach(loss=cross_entropy(*taught)),
            'taught both sides': lambda: teach(loss=two_sided(*taught, how['min_p'], how['risk']))}
    of = {'taught first token': 'taught by token'} # the head of which it is the first word
    return {name: fits[name]() for name in dict.fromkeys(of.get(x, x) for x in names)}


def free_rules(tokenizer, prompts, min_p, names=FREE, warm=WARM): # {(decoder, strength): rule}
    "Of those that learn nothing"
    c = Asked(prompts, tokenizer, min_p, None, {}, {}, {}, None)
    found = {(d, s): RUNGS[d].live(c, s) for d in LADDER for s in RUNGS[d].grid}
    for s in warm:
        found |= {(BASE, s): constant(s, min_p=min_p), (RULE, s): RUNGS[RULE].live(c, s),
                  (ORACLE, s): on_the_key(tokenizer, prompts, s, min_p)}
    return {k: rule for k,rule in found.items() if k[0] in names}


def switch_rules(probe, min_p): # greedy where the probe sees the key coming
    return {(SWITCH, s): at(lambda step, s=s: s*(probe(step.hidden) <= .5).float(), min_p) for s in WARM}


def head_rules(heads, min_p, names=HEADS): # of those that are wanted
    found = {}
    for name,head in heads.items():
        grid = OWN if name.startswith('own') or 'entropy' in name else TAUGHT
        found |= {(name, s): floored(head, s, .1, min_p) if head.by == 'prompt' else head_rule(head, s) for s in grid}
    if 'taught first token' in names:
        found |= {('taught first token', s): at_first(heads['taught by token'], s, min_p) for s in TAUGHT}
    return {k: rule for k,rule in found.items() if k[0] in names}


def write_about(unit): # files of points, and of texts beside them
    "About one half of the places, by what learns nothing (free), by the switch, or by the heads of one seed"
    args, prompts, kind, half, threads = unit
    p, params, folder = settings(args)
    parts = {folder/'inside'/f'{kind}-{half}-{i}.csv': prompts[i:i+PART] for i in range(0, len(prompts), PART)}
    torch.set_num_threads(threads)
    (model, tokenizer), min_p = load_model(p.root/'models'/p.name, p.dtype, p.device), params['min_p']
    seed = int(kind) if kind.isdigit() else 0
    learned = None
    if kind == 'switch':
        taught = TokenTable(folder/'inside'), read_json(folder/'inside'/'examples.json')
        learned = switch_rules(key_probe(tokenizer, *taught, [f'half {1 - half}']), min_p)
    elif kind != 'free':
        how = dict(min_p=min_p, risk=params['answer_risk'], steps=params['steps'], lr=params['lr'], seed=seed)
        heads = {k: h.to(model.device) for k,h in fit_heads(folder, half, args.heads, **how).items()}
        learned = head_rules(heads, min_p, args.heads)
    for file,some in parts.items():
        have = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=['decoder', 'strength'])
        asked, there = [x['messages'] for x in some], {*zip(have.decoder, have.strength)}
        rules = learned or free_rules(tokenizer, some, min_p, args.rules, args.warm)
        if not (rules := {k: rule for k,rule in rules.items() if k not in there}): continue
        answers = sample(model, tokenizer, asked, rules, args.draws, args.length, seed, args.rows, progress=False)
        with gzip.open(file.with_suffix('.jsonl.gz'), 'at' if there else 'wt', encoding='utf-8') as f:
            f.writelines(json.dumps(x) + '\n' for x in said(tokenizer, answers))
        frame = points(tokenizer, 'inside', some, answers, seed)
        frame = frame.assign(task=[some[i]['family'] for i in frame.prompt], card=card_of(model))
        write_whole(file, lambda f: pd.concat([have, frame]).to_csv(f, index=False))
        print(file.name, flush=True)


def written(folder, kinds, after=0, before=None): # (means of places, points); None where not all of these have written
    "Left out are prompts that say their own key, those that were asked `before`, and the first so many of each half"
    text = lambda x: x['messages'][0]['content']
    known = {text(x) for x in read_json(before)['prompts']} if before else set()
    asked, half = read_json(folder/'inside'/'asked.json').values()
    of = by_half(asked, half)
    told = {h: [i for i,x in enumerate(xs) if is_right(text(x), x) or text(x) in known] for h,xs in of.items()}
    def points_of(stem):
        _, h, first = stem.split('-')
        rows = pd.read_csv(files[stem])
        return rows[~(rows.prompt + int(first)).isin(told[int(h)])]
    every = (folder/'inside').glob('*-*-*.csv')
    files = {f.stem: f for f in every if int(f.stem.split('-')[2]) >= after}
    places = sorted({stem.partition('-')[2] for stem in files})
    whole = [f'{k}-{x}' for x in places for k in kinds if all(f'{y}-{x}' in files for y in kinds)]
    if not whole: return None
    frame = pd.concat(map(points_of, whole))
    asked = frame.groupby(['decoder', 'strength', 'seed']).prompt.transform('size')
    frame = frame[asked == asked.max()] # not the rules that have written about some of these prompts alone
    by = ['task', 'decoder', 'strength', 'seed', 'cluster']
    clusters = frame.groupby(by, sort=False, as_index=False)[['good', 'varied', 'length']].mean()
    every = clusters.assign(task='all').groupby(by, sort=False, as_index=False).mean() # families of a place in the mean
    return pd.concat([every, clusters]), frame


def about(frame, draws): # prompts of each family, places, the tokens of all texts, and how many were written where
    one = frame[(frame[['decoder', 'strength', 'seed']] == frame[['decoder', 'strength', 'seed']].iloc[0]).all(axis=1)]
    return dict(prompts=one.task.value_counts().sort_index().to_dict(), places=int(one.cluster.nunique()),
                tokens=round((frame.length*draws).sum()), texts=(frame.groupby('card').size()*draws).to_dict())


def settings(args): # the profile, the parameters, and the folder of what is learned
    root = project_root()
    p = load_profile(args.profile, root)
    for k in ('device', 'dtype', 'batch_tokens'): setattr(p, k, getattr(args, k) or getattr(p, k))
    return p, load_params(root), args.learned or root/'learned'/p.name


def ask(args): # {'prompts': prompts, 'half': {place: 0 or 1}}
    "What is asked, about what the model knows"
    p = settings(args)[0]
    asked = inside(p, *load_model(p.root/'models'/p.name, p.dtype, p.device), args.splits, args.facts, args.texts)
    return dict(prompts=asked, half=halves(asked))


def card_of(model): # and the numbers that it computes with
    kind = torch.cuda.get_device_name() if 'cuda' in str(model.device) else 'no card'
    return f"{kind}, {str(model.dtype).removeprefix('torch.')}"


def learn(args, prompts, half): # with what, and where
    "The answers that heads learn from"
    p, params, folder = settings(args)
    model, tokenizer = load_model(p.root/'models'/p.name, p.dtype, p.device)
    if any(x.startswith('own') for x in args.heads):
        plain = task_prompts(p, p.prompts, 'train', LEARN)
        answered(folder, model, tokenizer, p, [([x for x in plain if bool(x['answer']) == closed], length)
                                               for closed,length in ((True, p.answer_tokens), (False, p.open_tokens))], p.samples)
    if args.heads:
        some = [x for xs in by_half(prompts, half, args.first and 4*args.first).values() for x in xs]
        teach = [dict(x, split='train', corpus=f"half {half[x['group']]}") for x in some]
        answered(folder/'inside', model, tokenizer, p, [(teach, args.length)], 2*args.draws)
    return dict(commit=args.commit or commit(), card=card_of(model))


def kept(file, make): # what is in a JSON file, made where it is not there
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        made = make()
        write_whole(file, lambda f: f.write_text(json.dumps(made), encoding='utf-8'))
    return read_json(file)


def corrected(every, pairs, seed): # {at: {decoder: p}}: of no gain over the constant, with Holm's correction
    found = resampled(every, every, [x for x in pairs if x[1] == BASE], AT, bootstrap=RESAMPLES, seed=seed)
    p = holm(np.array([p_value(x[1:, 2]) for x in found.values()]))
    return {name: {d: float(x) for (d, _, k),x in zip(found, p) if k == name} for name in AT}


def compared(args, run): # what is written
    "Where what learns nothing has written, where the switch has too, and where all heads have"
    p, params, folder = settings(args)
    seeds = sorted({f.stem.partition('-')[0] for f in (folder/'inside').glob('[0-9]*-*-*.csv')})
    rows, what = [], {}
    kinds = dict(free=['free'], later=['free'], switch=['free', 'switch'], heads=['free', 'switch', *seeds])
    for name,of in kinds.items():
        if name == 'heads' and not seeds or name == 'later' and not args.after: continue
        if not (found := written(folder, of, args.after if name == 'later' else 0, args.before)): continue
        clusters, frame = found
        pairs = [x for x in PAIRS if {*x} <= {*frame.decoder}]
        tasks, how = {k: (k, k) for k in ('all', *FAMILIES)}, dict(bootstrap=RESAMPLES, seed=params['seed'])
        gains = verdicts(clusters, tasks, pairs, AT, **how)
        every = clusters[clusters['task'] == 'all']
        constant = every[every.decoder == BASE].groupby('strength').good.mean()
        what[name] = about(frame, args.draws) | dict(
            constant={f'T = {k:g}': x for k,x in constant.items()}, holm=corrected(every, pairs, params['seed']),
            gains=tree_of(gains, 'task', 'at', 'decoder', 'rival'))
        rows.append(clusters.assign(where=name))
    pd.concat(rows).to_csv(args.out.with_suffix('.csv'), index=False, float_format='%.5g')
    taught = pd.DataFrame(read_json(folder/'inside'/'examples.json')) if 'switch' in what else None
    write = dict(profile=args.profile, commit=run['commit'], splits=args.splits, draws=args.draws, length=args.length,
                 seeds=len(seeds), **what)
    if taught is not None: write |= dict(taught=len(taught), right=taught.groupby('family').right.mean().to_dict())
    args.out.write_text(json.dumps(write, indent=1) + '\n')
    return gains


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('profile', help='a section of settings.ini, whose model is there')
    parser.add_argument('out', type=Path, help='the JSON file to write')
    parser.add_argument('--splits', nargs='+', default=['train', 'test'], help='whose places')
    parser.add_argument('--facts', type=int, default=100, help='of each family, at most')
    parser.add_argument('--texts', nargs='+', type=int, default=[0],
                        help='in which of four kinds each is asked for, counted from its own')
    parser.add_argument('--first', type=int,
                        help='so many prompts of each half are asked, if not all, and four times as many are learned from')
    parser.add_argument('--rules', nargs='+', choices=FREE, default=FREE, help='of those that learn nothing')
    parser.add_argument('--warm', nargs='+', type=float, default=WARM,
                        help='strengths of the constant, the capital letter and the oracle')
    parser.add_argument('--heads', nargs='*', choices=HEADS, default=HEADS,
                        help='likewise; none: nothing is learned, and no switch')
    parser.add_argument('--seeds', type=int, help='of heads, if not as the profile says')
    parser.add_argument('--after', type=int, default=0,
                        help='read the prompts after the first so many of each half alone, too')
    parser.add_argument('--before', type=Path, help='asked.json of another run, whose prompts are left out')
    parser.add_argument('--draws', type=int, default=4, help='texts for each prompt; twice as many are learned from')
    parser.add_argument('--length', type=int, default=64, help='of a text, in tokens')
    parser.add_argument('--device', help='if not as the profile says; --dtype and --batch-tokens likewise')
    parser.add_argument('--dtype')
    parser.add_argument('--batch-tokens', type=int)
    parser.add_argument('--rows', type=int, help='of a batch, if not as `sample` chooses')
    parser.add_argument('--learned', type=Path, help='where answers and texts are kept, if not in learned/PROFILE')
    parser.add_argument('--processes', type=int, default=1, help='that write at the same time')
    parser.add_argument('--commit', help='the commit that is measured, where git cannot say it')
    parser.add_argument('--compare', action='store_true', help='what an earlier run has left, and write no more texts')
    args = parser.parse_args()
    p, params, folder = settings(args)
    asked = kept(folder/'inside'/'asked.json', lambda: ask(args))
    threads = max(1, torch.get_num_threads()//args.processes)
    of, run = by_half(**asked, first=args.first), folder/'inside'/'run.json'
    units = lambda kinds: [(args, of[h], kind, h, threads) for kind in kinds for h in (0, 1)]
    later = ['switch', *map(str, range(args.seeds or p.seeds))] if args.heads else []
    if not args.compare: # what learns nothing writes while answers are learned from
        with ProcessPoolExecutor(args.processes, get_context('spawn')) as pool:
            work = [pool.submit(write_about, u) for u in units(['free'])]
            made = learn(args, **asked)
            write_whole(run, lambda f: f.write_text(json.dumps(made), encoding='utf-8'))
            torch.cuda.empty_cache() # for those who write
            work += [pool.submit(write_about, u) for u in units(later)]
            for x in work: x.result()
    print(compared(args, read_json(run)).round(3).to_string(index=False))
