"""Valid sets again, with heads that have seen what is wanted: distinct valid answers in sixteen draws, exactly, as on the page of the
ladder of oracles. *Taught* heads learn from valid names of other families of sets, each name a reference answer; the others from the
model's own answers with nothing cut, some of them to other sets. Writes OUT.json, and beside it a CSV with the means of each set.
Run, after `make rungs-further`: make sets
"""
import argparse, json, random
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from simpledeco.conversations import prompt_ids
from simpledeco.decode import tempered
from simpledeco.model import load_model
from simpledeco.onpolicy import fit_answers
from simpledeco.scan import scan
from simpledeco.study.decoders import at_first
from simpledeco.study.ladder import BEGIN, best_by_place, by_temperature, distinct, GRID, grow, under_rule, word_ends
from simpledeco.study.models import model_folder
from simpledeco.study.profiles import task_prompts
from simpledeco.study.rungs import Asked, cross_entropy, RUNGS
from simpledeco.study.settings import load_params, load_profile, project_root
from simpledeco.study.strengths import cluster, oracle_ladder, paired, tree_of, tuned
from simpledeco.table import TokenTable

DRAWS, MOST = 16, 60 # of each prompt; names in a set
STATIC = {'static, min-p': (.4, .7, 1., 1.3, 1.6, 2., 2.5, 3., 4.), 'static, top-p': (.4, .7, 1., 1.3, 1.6, 2.),
          'p-less': (.7, 1., 1.3, 1.6, 2., 2.5, 3.), 'EDT': (.5, 1., 1.5, 2., 3., 4.5)}
OWN, TAUGHT = (.5, 1., 2., 4.5, 7., 11., 16., 25., 40.), (.1, .2, .35, .5, .7, 1., 1.5, 2., 3.)
BASE, ORACLES = 'static, min-p', [f'T = {t:g}' for t in GRID]


def sets(p, split, wordings): # prompts: every set, in so many wordings
    by_set = {}
    for x in task_prompts(p, 10_000, split, ['sets']): by_set.setdefault(cluster(x), []).append(x)
    return [x for xs in by_set.values() for x in xs[::len(xs)//wordings][:wordings]]


def named(tokenizer, prompts, most): # examples for `scan`: valid names as answers, where the name alone counts
    "At most so many names of each set"
    found, rng = [], random.Random(0)
    for x in prompts:
        names = sorted(set(x['answer']))
        asked = prompt_ids(tokenizer, [x['messages']])[0] + tokenizer.encode(BEGIN, add_special_tokens=False)
        for k,name in enumerate(rng.sample(names, min(most, len(names)))):
            said = tokenizer.encode(f' {name}', add_special_tokens=False)
            found.append(dict(x, id=f"{x['id']}-{k}", corpus=x['group'], group=cluster(x), ids=[*asked, *said], right=True, ended=True,
                              messages=[*x['messages'], dict(role='assistant', content=f'{BEGIN} {name}')],
                              where=list(range(len(asked), len(asked) + len(said)))))
    return found


def heads_of(table, examples, **options): # {name: head}, of one seed
    fits = {'by token': {}, 'by prompt': dict(by='prompt'), 'cross-entropy': dict(loss=cross_entropy(table, examples))}
    return {name: fit_answers(table, examples, **(options | kw)) for name,kw in fits.items()}


def rules_of(heads, min_p): # {(decoder, strength): rule}
    c = Asked([], None, min_p, None, heads, {}, {}, None)
    found = {(d, s): RUNGS[d].live(c, s) for d,grid in STATIC.items() for s in grid}
    for name,head in heads.items():
        grid = TAUGHT if name.startswith('taught') else OWN
        found |= {(name, s): c.head(name, s) for s in grid}
        if name.endswith('by token'): found |= {(name.replace('by token', 'first token'), s): at_first(head, s, min_p) for s in grid}
    return found


def walked(model, tokenizer, prompts, learned, min_p): # rows: prompt, decoder, strength, seed, varied, valid; and a row of oracles each
    "The expected number of distinct valid answers, and the share that is valid"
    outside = word_ends(tokenizer, model.get_output_embeddings().weight.shape[0])
    filtered, rows, oracles = lambda z, t: tempered(z, torch.full((len(z),), t), min_p=min_p), [], []
    for i,x in enumerate(tqdm(prompts, unit='prompt')):
        tree = grow(model, tokenizer, x, outside)
        of = dict(family=x['group'].removeprefix('set '), cluster=cluster(x), prompt=i)
        names, both = by_temperature(tree, filtered)
        oracles.append(of | dict(token=best_by_place(tree, both, DRAWS), mask=min(DRAWS, len(tree.names)))
                       | dict(zip(ORACLES, distinct(names, DRAWS))))
        for seed,heads in learned.items():
            for (d, s),rule in rules_of(heads, min_p).items():
                if seed and d in STATIC: continue # drawn from no seed
                p = under_rule(tree, rule)
                rows.append(of | dict(decoder=d, strength=s, seed=seed, varied=distinct(p, DRAWS), valid=p.sum()))
    return pd.DataFrame(rows), pd.DataFrame(oracles)


def compared(frames, oracles, **how): # the test frame, each decoder at the strength that is best on the calibration frame
    best = tuned(frames['calibration'])
    test = frames['test']
    ours = [d for d in best.index if d != BASE]
    rivals = 'by prompt', 'first token', 'cross-entropy'
    pairs = [(d, BASE) for d in ours] + [(f'{k} by token', f'{k} {x}') for k in ('own', 'taught') for x in rivals]
    found = paired(test, best, pairs, **how)
    at = test[[s == best[d] for d,s in zip(test.decoder, test.strength)]].groupby('decoder')
    ceiling = oracle_ladder(oracles['test'].groupby('cluster')[[*ORACLES, 'token', 'mask']].mean(), ORACLES, **how)
    ceiling = {k: x for k,x in ceiling.items() if 'mask' not in k}
    gap = ceiling['token']['mean'] - found.rival_value[0]
    return dict(strengths=best.to_dict(), valid=at.valid.mean().to_dict(), oracles=ceiling, gains=tree_of(found, 'decoder', 'rival'),
                edges=[d for d,s in best.items() if s == max(test[test.decoder == d].strength)],
                share_of_gap={d: float(found[(found.decoder == d) & (found.rival == BASE)].gain.iloc[0]/gap) for d in ours})


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('learned', type=Path, help='learned/PROFILE, with the answers that heads learn from')
    parser.add_argument('out', type=Path, help='the JSON file to write')
    parser.add_argument('--names', type=int, default=60, help='names of a set that heads are taught, at most')
    parser.add_argument('--wordings', type=int, default=2, help='of each set that is tested, of six')
    parser.add_argument('--seeds', type=int, default=2, help='of the heads')
    args, root = parser.parse_args(), project_root()
    p, params = load_profile(args.learned.name, root), load_params(root)
    model, tokenizer = load_model(model_folder(p.name, root))
    names, folder = named(tokenizer, sets(p, 'train', 2), args.names), args.learned/'names'
    folder.mkdir(exist_ok=True)
    tables = dict(taught=(scan(model, tokenizer, names, folder, p.batch_tokens, p.shard_examples), names),
                  own=(TokenTable(args.learned), json.loads((args.learned/'examples.json').read_text(encoding='utf-8'))))
    how = dict(min_p=params['min_p'], risk=params['answer_risk'], steps=params['steps'], lr=params['lr'])
    learned = {seed: {f'{k} {name}': head for k,(table, examples) in tables.items()
                      for name,head in heads_of(table, examples, seed=seed, **how).items()} for seed in range(args.seeds)}
    few = lambda split: [x for x in sets(p, split, args.wordings) if len(x['answer']) <= MOST]
    walk = lambda split: walked(model, tokenizer, few(split), learned, params['min_p'])
    found = {split: walk(split) for split in ('calibration', 'test')}
    frames, oracles = ({split: x[k] for split,x in found.items()} for k in (0, 1))
    by = ['split', 'family', 'cluster', 'decoder', 'strength', 'seed']
    rows = pd.concat([x.assign(split=split) for split,x in frames.items()])
    rows.groupby(by, sort=False)[['varied', 'valid']].mean().to_csv(args.out.with_suffix('.csv'), float_format='%.4g')
    write = dict(profile=p.name, draws=DRAWS, sets={k: int(x.cluster.nunique()) for k,x in oracles.items()},
                 wordings=args.wordings, seeds=args.seeds, taught=len(names), own=len(tables['own'][1]),
                 **compared(frames, oracles, bootstrap=params['bootstrap'], seed=params['seed']))
    args.out.write_text(json.dumps(write, indent=1) + '\n')
    print(json.dumps(write, indent=1))
