"""Do two models want heat at the same prompts? A head by prompt and a head by token learn from each model's own answers, as in the
stage `rungs`, and say a temperature where the answer to each of the same prompts begins; no answer is read. Writes
benchmarks/transfer.json, and what each head says of each prompt beside it, as CSV. Run: make transfer, after `make rungs-further` and
`make gemma-further`, whose heads learn from the same texts as those of `make rungs` and `make gemma`
"""
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from run import commit
from scipy.stats import spearmanr

from simpledeco.conversations import prompt_ids
from simpledeco.evaluate import auroc
from simpledeco.model import load_model, read_output
from simpledeco.onpolicy import fit_answers
from simpledeco.study.models import model_folder
from simpledeco.study.profiles import task_prompts
from simpledeco.study.settings import load_params, load_profile, project_root
from simpledeco.table import TokenTable

PROFILES, MOST = {'rungs-further': 'SmolLM2', 'gemma-further': 'Gemma'}, 40
CORPORA = ('capitals', 'states', 'continents', 'currencies', 'cities', 'plain', 'creative', 'openly', 'inside')


def heads(p, params):
    "A head of each kind, from what the stage `rungs` has kept"
    folder = p.root/'learned'/p.name
    examples = json.loads((folder/'examples.json').read_text(encoding='utf-8'))
    how = dict(min_p=params['min_p'], risk=params['answer_risk'], steps=params['steps'], lr=params['lr'], seed=params['seed'])
    return {by: fit_answers(TokenTable(folder), examples, by=by, **how) for by in ('prompt', 'token')}


@torch.inference_mode()
def temperatures(p, prompts, heads): # {kind of head: [P]}
    "What each head says where the answer to a prompt begins"
    model, tokenizer = load_model(model_folder(p.name, p.root))
    first = [read_output(model, lambda x: x[:, -1], input_ids=torch.tensor([ids]), use_cache=False)[:2]
             for ids in prompt_ids(tokenizer, [x['messages'] for x in prompts])]
    hidden, logits = map(torch.cat, zip(*first))
    return {by: head.temperature(head.live_inputs(hidden, logits)).numpy() for by,head in heads.items()}


def agree(a, b, groups, bootstrap=1000): # rank correlation with an interval that resamples groups
    rng, names = np.random.default_rng(0), np.unique(groups)
    places = [np.flatnonzero(groups == g) for g in names]
    again = [np.concatenate([places[i] for i in rng.integers(0, len(names), len(names))]) for _ in range(bootstrap)]
    lo, hi = np.nanquantile([spearmanr(a[i], b[i]).statistic for i in again], [.025, .975])
    return dict(mean=float(spearmanr(a, b).statistic), lo=float(lo), hi=float(hi), n=len(a), groups=len(names))


if __name__ == '__main__':
    root = project_root()
    params, ps = load_params(root), [load_profile(x, root) for x in PROFILES]
    prompts = [x for x in task_prompts(ps[0], MOST, 'test', CORPORA)]
    T = {p.name: temperatures(p, prompts, heads(p, params)) for p in ps}
    asked, groups = np.array([x['answer'] is not None for x in prompts]), np.array([x['group'] for x in prompts])
    fiction = np.array([x['corpus'] == 'inside' for x in prompts])
    kinds = dict(all=asked | True, questions=asked & ~fiction, **{'open prompts': ~asked, 'facts inside fiction': fiction})
    found = {by: {k: agree(*(T[x][by][m] for x in PROFILES), groups[m]) for k,m in kinds.items()} for by in ('prompt', 'token')}
    opened = {x: {by: auroc(torch.tensor(t[~fiction]), torch.tensor(~asked[~fiction])) for by,t in of.items()} for x,of in T.items()}
    kind = np.where(fiction, 'facts inside fiction', np.where(asked, 'questions', 'open prompts'))
    said = [pd.DataFrame({'by': by, 'kind': kind, **{PROFILES[x]: T[x][by] for x in PROFILES}}) for by in found]
    pd.concat(said).to_csv(root/'benchmarks/transfer.csv', index=False, float_format='%.4g')
    write = dict(commit=commit(), profiles=list(PROFILES), agreement=found, open=opened)
    (root/'benchmarks/transfer.json').write_text(json.dumps(write, indent=1) + '\n')
    print(json.dumps(write, indent=1))
