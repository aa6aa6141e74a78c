"Facts inside fiction, taught"
import json, sys
from types import SimpleNamespace

import pandas as pd, pytest, torch
from conftest import ROOT

from simpledeco.judge import is_right
from simpledeco.model import load_model
from simpledeco.sample import Step
from simpledeco.study.models import model_folder
from simpledeco.study.profiles import task_prompts
from simpledeco.study.settings import load_params, load_profile

sys.path.insert(0, str(ROOT/'benchmarks'))
import inside


@pytest.fixture(scope='module')
def smoke(): return load_model(model_folder('smoke', ROOT))


def step(tokenizer, likeliest, asked=None): # one row each, whose likeliest token and runner-up are a nat apart
    z = torch.zeros(len(likeliest), len(tokenizer))
    for row,text in enumerate(likeliest): z[row, tokenizer.encode(text, add_special_tokens=False)[0]] = 5.
    z[:, 7] = 4.
    return Step(torch.zeros(len(z), 2), z, torch.arange(len(z)), None, None, {}, None if asked is None else torch.tensor(asked))


def kept(x): return x.isfinite().sum(-1).tolist() # how many tokens may be drawn


def test_greedy_where_a_token_of_the_own_key_is_likeliest(smoke):
    rule = inside.on_the_key(smoke[1], [dict(answer='Lima'), dict(answer='New Delhi')], 1., .1)
    assert kept(rule(step(smoke[1], [' Lima', ' Lima', ' New', ' New', ' lima'], [0, 1, 0, 1, 0]))) == [1, 2, 2, 1, 1]


def test_a_probe_finds_the_key_in_right_answers_alone(smoke):
    lima, the = (smoke[1].encode(x, add_special_tokens=False)[0] for x in (' Lima', ' the'))
    torch.manual_seed(0)
    examples = [dict(answer='Lima', right=i < 60, ids=[1, the, lima, the], where=[1, 2, 3]) for i in range(80)]
    where = torch.tensor([x['ids'][w] == lima for x in examples for w in x['where']])
    hidden = torch.randn(240, 4) + 4*where[:, None]*torch.tensor([1., 0, 0, 0])
    hidden[180:, 1] += 8 # wrong answers look another way, and their city is no key
    table = SimpleNamespace(rows=lambda corpora, splits: torch.arange(240), take=lambda name, rows: hidden[rows])
    p = inside.key_probe(smoke[1], table, examples, None)(hidden) > .5
    assert p[:180][where[:180]].float().mean() > .95 and p[:180][~where[:180]].float().mean() < .1
    assert p[180:].float().mean() < .1


def test_what_a_question_is_about():
    of = lambda group, text: inside.name_of(dict(group=group, messages=[dict(role='user', content=text)]))
    assert of('country Peru', 'What is the capital of Peru?') == 'Peru'
    assert of('state Iowa', 'What is the capital of the U.S. state of Iowa?') == 'the U.S. state Iowa'
    assert of('country China', 'In which country is the city of Shanghai?') == 'Shanghai'


def test_only_the_rules_that_are_wanted(smoke):
    ask = [dict(answer='Lima', messages=[dict(role='user', content='Write a postcard.')])]
    assert {*inside.free_rules(smoke[1], ask, .1, [inside.RULE, 'one in five'], [1., 2.5])} == {
        (inside.RULE, 1.), (inside.RULE, 2.5), *(('one in five', s) for s in inside.RUNGS['one in five'].grid)}
    assert {d for d,_ in inside.free_rules(smoke[1], ask, .1)} == {*inside.FREE}


def test_halves_share_no_place_and_are_equal():
    half = inside.halves([dict(group=f'country {i//3}') for i in range(30)])
    assert len(half) == 10 and sum(half.values()) == 5 and half != inside.halves([dict(group=f'state {i}') for i in range(10)])


def test_from_prompts_to_intervals(tmp_path, monkeypatch, smoke):
    p = load_profile('smoke', ROOT)
    p.prompts, p.samples, p.seeds = 1, 1, 1
    monkeypatch.setattr(inside, 'settings', lambda args: (p, load_params(ROOT) | dict(steps=3), tmp_path))
    # a tiny model knows nothing; no prompt says its key
    knows = lambda text, x: not any(k in text for k in ('Write a', 'write a', 'Begin'))
    monkeypatch.setattr(inside, 'is_right', knows)
    families = {k: inside.FAMILIES[k] for k in ('capital', 'currency')}
    few = dict(RESAMPLES=20, WARM=(.7, 1., 1.6), OWN=(1., 3.), TAUGHT=(1., 3.), PART=2, FAMILIES=families)
    for k,x in few.items(): monkeypatch.setattr(inside, k, x)
    args = SimpleNamespace(splits=['train'], facts=4, texts=[0], draws=1, length=6, rows=None, out=tmp_path/'x.json', profile='smoke',
                           commit='abc', rules=inside.FREE, warm=(.7, 1., 1.6), heads=inside.HEADS, after=2, before=None, first=None)
    asked = inside.kept(tmp_path/'inside'/'asked.json', lambda: inside.ask(args))
    assert {x['family'] for x in asked['prompts']} == inside.FAMILIES.keys() and len(asked['prompts']) == 8
    run = inside.learn(args, **asked)
    taught = json.loads((tmp_path/'inside'/'examples.json').read_text())
    for x in taught: x['right'] = x['id'].endswith('0') # half of the answers, so that there is something to learn
    (tmp_path/'inside'/'examples.json').write_text(json.dumps(taught))
    of = lambda half: [x for x in asked['prompts'] if asked['half'][x['group']] == half]
    for kind in ('free', 'switch', '0'):
        for h in (0, 1):
            if kind == 'free': inside.write_about((SimpleNamespace(**vars(args) | dict(rules=[inside.BASE])), of(h), kind, h, 1))
            inside.write_about((args, of(h), kind, h, 1)) # a later run asks what an earlier one has not
    rows = inside.written(tmp_path, ['free', 'switch', '0'])[1]
    assert {*rows.decoder} == {d for pair in inside.PAIRS for d in pair}
    assert rows.groupby('decoder').cluster.nunique().eq(len(asked['half'])).all()
    assert len(rows) == len(asked['prompts'])*len(rows[['decoder', 'strength', 'seed']].drop_duplicates()) # each once
    gains = inside.compared(args, run)
    assert {*gains.task} == {'all', *inside.FAMILIES}
    found = json.loads(args.out.read_text())
    assert found['heads']['places'] == len(asked['half']) and found['taught'] == 16
    assert found['free']['prompts'] == dict.fromkeys(sorted(inside.FAMILIES), 4)
    assert found['free']['places'] == found['heads']['places']
    assert found['later']['prompts'].keys() <= found['free']['prompts'].keys() and sum(found['later']['prompts'].values()) == 8 - 2*2
    assert {*found['heads']['gains']['all']['T = 1']['taught by token']} >= {inside.BASE, inside.RULE}
    assert found['free']['gains']['all']['T = 1'].keys() & {inside.SWITCH, *inside.HEADS} == set()
    p = found['heads']['holm']['T = 1']
    assert {*p} == {d for d,r in inside.PAIRS if r == inside.BASE} and all(2/21 <= x <= 1 for x in p.values())
    kept = pd.read_csv(args.out.with_suffix('.csv'))
    assert {*kept['where']} == {'free', 'later', 'switch', 'heads'}
    one = inside.head_rules(dict.fromkeys(inside.HEADS[:3], SimpleNamespace(by='token')), .1, ['taught by token'])
    assert {*one} == {('taught by token', 1.), ('taught by token', 3.)}
    some = next((tmp_path/'inside').glob('free-1-*.csv'))
    pd.read_csv(some).query("decoder != 'EDT'").to_csv(some, index=False) # asked about some of the prompts alone
    assert {*inside.written(tmp_path, ['free'])[1].decoder} == {*inside.FREE} - {'EDT'}
    before = len(inside.written(tmp_path, ['free'])[1])
    for f in (tmp_path/'inside').glob('0-1-*.csv'): f.unlink() # ended before its time: what is left is what all have answered
    assert {*inside.written(tmp_path, ['free', 'switch', '0'])[1].cluster} == {x['group'] for x in of(0)}
    assert {*inside.written(tmp_path, ['free'])[1].cluster} == {*asked['half']}
    asked['prompts'][0]['messages'][0]['content'] += f" It is {asked['prompts'][0]['answer']}." # a prompt that says its key
    (tmp_path/'inside'/'asked.json').write_text(json.dumps(asked))
    monkeypatch.setattr(inside, 'is_right', is_right)
    assert len(inside.written(tmp_path, ['free'])[1]) == before*7/8
    (tmp_path/'before.json').write_text(json.dumps(dict(prompts=asked['prompts'][:3]))) # the first of them says its key, too
    assert len(inside.written(tmp_path, ['free'], before=tmp_path/'before.json')[1]) == before*5/8
