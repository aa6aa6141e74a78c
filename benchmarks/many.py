"""The intervals of the ladder, from the means of clusters that the long profiles have left: results/<profile>/rungs_gains.csv again,
as the stage `rungs` writes it, and benchmarks/many.json: how many of the intervals that exclude zero are more than chance, with all
comparisons of the plan for a model at one variety as a family. Run: python benchmarks/many.py
"""
import json
from pathlib import Path

import numpy as np
import pandas as pd

from simpledeco.files import read_json
from simpledeco.study.pipeline import LONG
from simpledeco.study.plan import AT, ladder_gains, PAIRS, RESAMPLES, TASKS
from simpledeco.study.results import read_table, results_folder, save_results, stamp
from simpledeco.study.settings import load_profile, project_root
from simpledeco.study.strengths import holm, p_value, resampled, tree_of


def again(root, name): # the gains of a profile, from what it sampled
    folder, of = results_folder(root, name), lambda name: read_table(results_folder(root, name), 'rungs')
    clusters, before = of(name), of(name.replace('further', 'elsewhere')) if name.endswith('further') else None
    gains, metrics = ladder_gains(clusters, before), read_json(folder/'rungs.json')
    metrics['gains'] = tree_of(gains, 'task', 'at', 'decoder', 'rival')
    save_results(load_profile(name, root), 'rungs', metrics, rungs=clusters, rungs_gains=gains)
    was = read_json(folder/'run.json')
    stamp(folder, was['commit'], was['date']) # of the answers


def asked(root, model): # {task: rows}: of the ladder, and of the places by what answered about all of them, or about the last alone
    of = lambda name: read_table(results_folder(root, name), 'rungs')
    before, last = of(f'{model}-elsewhere'), of(f'{model}-further')
    both = pd.concat([before, last[last.decoder.isin(before.decoder)]]).assign(task='all places')
    return dict([*of(model).groupby('task'), ('all places', both), ('further', last)])


def comparisons(tasks): # (task, decoder, rival, at): gains of resamples, of those that have an interval
    for name,(g, v) in TASKS.items():
        if not {g, v} <= tasks.keys(): continue
        there, again = set(tasks[g].decoder), set(tasks['all places'].decoder) if name == 'further' else set()
        pairs = [x for x in PAIRS if {*x} <= there and not {*x} <= again]
        for (a, b, at),found in resampled(tasks[g], tasks[v], pairs, AT, RESAMPLES, 0).items():
            if np.isfinite(found[1:, 2]).mean() >= .95 and np.ptp(found[:, 2]): yield (name, a, b, at), found[:, 2]


def corrected(found): # a family, after Holm
    keys, p = list(found), np.array([p_value(x[1:]) for x in found.values()])
    together = holm(p)
    names = lambda of: [f'{t}, {at}: {a} over {b}' for (t, a, b, at),yes in zip(keys, of) if yes]
    lo, hi = np.array([np.nanquantile(x[1:], (.025, .975)) for x in found.values()]).T
    return dict(comparisons=len(p), alone=int((p < .05).sum()), together=int((together < .05).sum()), least_p=float(p.min()),
                by_chance=len(p)/20, half_width=float(np.median(hi - lo)/2), survivors=names(together < .05), excluded=names(p < .05))


if __name__ == '__main__':
    root, found = project_root(), {}
    for name in LONG:
        if (results_folder(root, name)/'rungs.json').exists(): again(root, name)
    for model in ('rungs', 'gemma'):
        all_of = dict(comparisons(asked(root, model)))
        found[model] = {at: corrected({k: x for k,x in all_of.items() if k[-1] == at}) for at in AT}
    (Path(__file__).parent/'many.json').write_text(json.dumps(dict(bootstrap=RESAMPLES, models=found), indent=1) + '\n')
    for model,x in found.items():
        for at,f in x.items(): print(model, at, {k: f[k] for k in ('comparisons', 'alone', 'together', 'least_p')}, f['survivors'])
