"""Credit by token: does the drop of a value probe see which token of an answer did the harm, as drawing on from every token does, and
what does a head do that learns from it? Reads the answers that the profile has learned from; the head is compared with those of the stage
`rungs` on facts inside fiction, whose means of clusters that stage has left. Writes OUT.json. Run, after `make rungs-further`: make credit
"""
import argparse, json, random
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from simpledeco.loss import minimum_sufficient_hinge
from simpledeco.model import load_model
from simpledeco.onpolicy import fit_answers
from simpledeco.sample import head_rule, sample
from simpledeco.study.credit import continued, credited
from simpledeco.study.models import model_folder
from simpledeco.study.plan import AT, BASE, TASKS
from simpledeco.study.results import read_table, results_folder
from simpledeco.study.rungs import FAR, fit_probes, RUNGS
from simpledeco.study.settings import load_params, load_profile, project_root
from simpledeco.study.strengths import BUDGET, points, tasks_of, tree_of, verdicts
from simpledeco.table import TokenTable

ANSWERS, TIMES, SOME = 80, 8, (.1, .9) # answers that are drawn on, how often, and of corpora with such a share of right ones
NAME, PAIRS = 'credit', [('credit', x) for x in ('by token', 'by prompt', BASE)]


def between(examples): # some answers of corpora that the model is neither always right nor always wrong about
    right = pd.Series([x['right'] for x in examples]).groupby([x['corpus'] for x in examples]).mean()
    some = [i for i,x in enumerate(examples)
            if x['answer'] is not None and x['split'] == 'train' and SOME[0] < right[x['corpus']] < SOME[1]]
    return sorted(random.Random(0).sample(some, min(ANSWERS, len(some))))


def drops(values): # how much of the chance each token of an answer took away; what follows the last one is left out
    return values[:-1] - values[1:]


def seen(counted, probed, bootstrap=1000): # of answers: rank correlations of drops, of the probe's and of halves of the counted ones
    """What the probe sees of what counting sees. The halves say how much of that there is to see: two counts with half of the draws each"""
    first, second = ([drops(x[:, k::2].mean(1)) for x in counted] for k in (0, 1))
    whole, probe = [drops(x.mean(1)) for x in counted], [drops(x) for x in probed]
    def rank(a, b): return pd.Series(np.concatenate(a)).corr(pd.Series(np.concatenate(b)), method='spearman')
    rng, found = np.random.default_rng(0), {}
    for name,(a, b) in dict(probe=(whole, probe), halves=(first, second)).items():
        again = [rank(*([x[i] for i in drawn] for x in (a, b))) for drawn in rng.integers(0, len(a), (bootstrap, len(a)))]
        lo, hi = np.nanquantile(again, [.025, .975])
        found[name] = dict(mean=float(rank(a, b)), lo=float(lo), hi=float(hi))
    level = [pd.Series(np.concatenate(x)) for x in ([c.mean(1) for c in counted], probed)]
    return found | dict(values=float(level[0].corr(level[1], method='spearman')), answers=len(counted), draws=int(counted[0].shape[1]),
                        tokens=int(sum(map(len, counted))))


def fit_credit(table, examples, U, **how): # a TemperatureHead: the hinge, whose target is the credit times what is needed
    gap = table['gap']*U
    loss = lambda tau, table, rows: minimum_sufficient_hinge(tau, gap[rows], min_p=how['min_p'], risk=how['risk'])
    return fit_answers(table, examples, loss=loss, **how)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('learned', type=Path, help='learned/PROFILE, with answers to learn from')
    parser.add_argument('out', type=Path, help='the JSON file to write')
    args, root = parser.parse_args(), project_root()
    p, params = load_profile(args.learned.name, root), load_params(root)
    model, tokenizer = load_model(model_folder(p.name, root))
    examples, table = json.loads((args.learned/'examples.json').read_text(encoding='utf-8')), TokenTable(args.learned)
    example, right = table['example'].long(), torch.tensor([x['right'] for x in examples])
    value = fit_probes(table, examples)['value'](table.take('hidden', torch.arange(len(table))))
    some = between(examples)
    counted = continued(model, tokenizer, [examples[i] for i in some], p.answer_tokens, TIMES)
    credit = seen(counted, [value[example == i].numpy() for i in some])
    wrong, U = ~right[example], credited(example, right, value)
    write = dict(profile=p.name, seen=credit, credit_of_wrong=float(U[wrong].mean()))
    save = lambda: args.out.write_text(json.dumps(write, indent=1) + '\n')
    save() # the answers to come take much longer
    print(json.dumps(credit), flush=True)
    how = dict(min_p=params['min_p'], risk=params['answer_risk'], steps=params['steps'], lr=params['lr'])
    frames = [read_table(results_folder(root, p.name), 'rungs')]
    for s in range(params['seed'], params['seed'] + p.seeds):
        head = fit_credit(table, examples, U, seed=s, **how)
        rules = {(NAME, x): head_rule(head, x) for x in (*RUNGS['by token'].grid, *FAR['by token'])}
        for task,prompts in tasks_of(p, model, tokenizer, params['min_p']).items():
            answers = sample(model, tokenizer, [x['messages'] for x in prompts], rules, *BUDGET[task](p), params['seed'] + s)
            frames.append(points(tokenizer, task, prompts, answers, s))
    found = verdicts(pd.concat(frames), TASKS, PAIRS, AT, bootstrap=params['bootstrap'], seed=params['seed'])
    write |= dict(seeds=p.seeds, gains=tree_of(found, 'task', 'at', 'decoder', 'rival'))
    save()
    pd.concat(frames[1:]).groupby(['task', 'decoder', 'strength', 'seed', 'cluster'], sort=False)[['good', 'varied']].mean().to_csv(
        args.out.with_suffix('.csv'), float_format='%.5g')
    print(found.round(3).to_string(index=False))
