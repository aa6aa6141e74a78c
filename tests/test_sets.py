"Heads taught names of other sets, credit by token, and Holm's correction for the table of the ladder"
import itertools, json, sys

import numpy as np, pandas as pd, pytest, torch
from conftest import ROOT

from simpledeco.model import load_model
from simpledeco.onpolicy import fit_answers
from simpledeco.scan import scan
from simpledeco.study.models import model_folder
from simpledeco.study.settings import load_profile
from simpledeco.study.strengths import holm

sys.path.insert(0, str(ROOT/'benchmarks'))
import credit, many, sets

p = load_profile('rungs-further', ROOT)
RIVALS = 'by prompt', 'first token', 'cross-entropy'


@pytest.fixture(scope='module')
def smoke(): return load_model(model_folder('smoke', ROOT))


def test_names_are_taught_as_answers_of_which_the_name_alone_counts(smoke):
    tokenizer = smoke[1]
    prompts = sets.sets(p, 'train', 2)
    assert len(prompts) == 2*len({sets.cluster(x) for x in prompts})
    found = sets.named(tokenizer, prompts[:4], 5)
    assert len(found) == 20
    for x in found:
        name = tokenizer.decode([x['ids'][i] for i in x['where']]).strip()
        assert name in x['answer'] and tokenizer.decode(x['ids']).endswith(f'The answer is {name}') and x['split'] == 'train'
    tested = {x['group'] for split in ('calibration', 'test') for x in sets.sets(p, split, 1)}
    assert not tested & {x['corpus'] for x in found}, 'no family is both taught and tested'


def test_sets_are_compared_at_the_strengths_of_other_sets():
    "The best strength of the calibration sets is the worst of the test sets, and is kept"
    def frame(best):
        return pd.DataFrame([dict(decoder=d, strength=s, seed=0, cluster=str(c), prompt=c, varied=g + (s == best)*1., valid=.5)
                             for d,g in {sets.BASE: 0., 'own by token': .5, 'taught by token': 1.,
                                         **{f'{k} {x}': .25 for k in ('own', 'taught') for x in RIVALS}}.items()
                             for s in (1., 2.) for c in range(6)])
    oracles = pd.DataFrame([dict(cluster=str(c), token=3., mask=5.) | {k: 1. for k in sets.ORACLES} for c in range(6)])
    found = sets.compared(dict(calibration=frame(1.), test=frame(2.)), dict(test=oracles), bootstrap=20, seed=0)
    assert set(found['strengths'].values()) == {1.} and not found['edges']
    gain = found['gains']['taught by token']
    assert gain[sets.BASE]['gain'] == 1 and gain['taught by prompt']['gain'] == .75
    assert np.isclose(found['share_of_gap']['taught by token'], 1/3) # the oracle has 3, the constant 0 at that strength


def test_with_the_verdict_as_credit_the_head_is_that_of_judged_answers(smoke, tmp_path):
    "And another credit is another head"
    model, tokenizer = smoke
    texts = ['Lima', 'a city', 'the moon', 'Peru is far', 'one two', 'no']
    examples = [dict(id=str(i), corpus='made', split='train', group=f'group {i}', answer='x', right=i % 2 == 0, ended=True,
                     messages=[dict(role='user', content=f'Question {i}?'), dict(role='assistant', content=t*8)])
                for i,t in enumerate(texts*4)]
    table = scan(model, tokenizer, examples, tmp_path, progress=False)
    right = torch.tensor([x['right'] for x in examples])[table['example'].long()]
    how = dict(min_p=.1, risk=.2, steps=20, lr=1e-3, seed=0)
    judged, same = fit_answers(table, examples, **how), credit.fit_credit(table, examples, right.float(), **how)
    other = credit.fit_credit(table, examples, torch.ones(len(table)), **how)
    states = [h.state_dict() for h in (judged, same, other)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_a_probe_that_sees_everything_agrees_as_well_as_counts_can():
    rng = np.random.default_rng(0)
    values = [rng.uniform(0, 1, 12) for _ in range(60)]
    counted = [rng.uniform(size=(12, 8)) < v[:, None] for v in values]
    full, blind = (credit.seen(counted, probed, 50) for probed in (values, [rng.permutation(v) for v in values]))
    assert full['probe']['lo'] > full['halves']['hi'] > .3 and blind['probe']['lo'] < 0 < blind['probe']['hi']
    assert full['tokens'] == 720 and full['draws'] == 8


def test_holm_is_the_closed_test_of_bonferroni():
    "A hypothesis is rejected when every set of hypotheses that holds it is rejected by the smallest of its p-values times their number"
    p = np.array([.004, .03, .011, .2, .02])
    families = [s for n in range(1, 6) for s in itertools.combinations(range(5), n)]
    closed = [max(min(1, min(p[list(s)])*len(s)) for s in families if i in s) for i in range(5)]
    assert np.allclose(holm(p), closed)


def test_of_many_comparisons_without_a_difference_none_survives():
    "Nor does a real difference become smaller by it"
    rng = np.random.default_rng(1)
    null = {('task', f'd{i}', 'base', 'T = 1'): rng.normal(rng.normal(), 1, 4001) for i in range(40)}
    found = many.corrected(null)
    assert found['comparisons'] == 40 and found['alone'] > 2 and found['together'] == 0
    real = many.corrected(null | {('task', 'ours', 'base', 'T = 1'): rng.normal(6, 1, 4001)})
    assert real['survivors'] == ['task, T = 1: ours over base']


def test_the_family_is_all_of_the_ladder():
    "Each comparison of the committed gains that has an interval, and no other; places that were read together are not read again"
    written = json.loads((ROOT/'benchmarks/many.json').read_text())['models']
    for model,places in (('rungs', 'rungs-further'), ('gemma', 'gemma-further')):
        rows = pd.concat([pd.read_csv(ROOT/f'results/{x}/rungs_gains.csv') for x in (model, places)])
        pair = rows.decoder + ', ' + rows.rival
        rows = rows[(rows.task != 'further') | ~pair.isin(pair[rows.task == 'all places'])]
        for at,found in written[model].items():
            there = rows[(rows['at'] == at) & rows.lo.notna() & ~((rows.lo == rows.hi) & (rows.gain == 0))]
            assert len(there) == found['comparisons'] > 15
            assert abs((there.lo*there.hi > 0).sum() - found['alone']) <= 1, 'a p-value of .05 is the edge of the interval'
            assert found['together'] <= found['alone'] <= found['comparisons']
