"""How many of the intervals that exclude zero are more than chance: the comparisons of the table of the ladder, at each variety,
for both models, from the means of clusters that the long profiles have left. Writes benchmarks/many.json. Run: python benchmarks/many.py
"""
import json
from pathlib import Path

import numpy as np
import pandas as pd

from simpledeco.study.plan import AT, BASE, TASKS
from simpledeco.study.results import read_table, results_folder
from simpledeco.study.settings import project_root
from simpledeco.study.strengths import holm, p_value, resampled
from simpledeco.study.tables import LADDER, PAIRED

PAIRS = [*((d, BASE) for d in LADDER), *(('by token', d) for d in PAIRED)]
BOOTSTRAP = 20_000


def asked(root, model): # {task: rows}, as in the table
    of = lambda name: read_table(results_folder(root, name), 'rungs')
    both = pd.concat([of(f'{model}-elsewhere'), of(f'{model}-further')]).assign(task='all places')
    return dict([*of(model).groupby('task'), ('all places', both)])


def comparisons(tasks): # (task, decoder, rival, at): gains of resamples, of those that the table gives an interval for
    for name,(g, v) in TASKS.items():
        if not {g, v} <= tasks.keys(): continue
        there = set(tasks[g].decoder)
        pairs = [x for x in PAIRS if {*x} <= there]
        for (a, b, at),found in resampled(tasks[g], tasks[v], pairs, AT, BOOTSTRAP, 0).items():
            if np.isfinite(found[1:, 2]).mean() >= .95 and np.ptp(found[:, 2]): yield (name, a, b, at), found[:, 2]


def corrected(found): # a family, after Holm
    keys, p = list(found), np.array([p_value(x[1:]) for x in found.values()])
    together = holm(p)
    names = lambda of: [f'{t}, {at}: {a} over {b}' for (t, a, b, at),yes in zip(keys, of) if yes]
    return dict(comparisons=len(p), alone=int((p < .05).sum()), together=int((together < .05).sum()), least_p=float(p.min()),
                by_chance=len(p)/20, survivors=names(together < .05), excluded=names(p < .05))


if __name__ == '__main__':
    root, out = project_root(), Path(__file__).parent/'many.json'
    found = {}
    for model in ('rungs', 'gemma'):
        all_of = dict(comparisons(asked(root, model)))
        found[model] = {at: corrected({k: x for k,x in all_of.items() if k[-1] == at}) for at in AT}
    out.write_text(json.dumps(dict(bootstrap=BOOTSTRAP, models=found), indent=1) + '\n')
    for model,x in found.items():
        for at,f in x.items(): print(model, at, {k: f[k] for k in ('comparisons', 'alone', 'together', 'least_p')}, f['survivors'])
