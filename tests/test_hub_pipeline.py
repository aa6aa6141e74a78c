"""The profile of the hub through every stage but the paper, with a tiny model on a CPU: the corpora
are folders with the hub's columns, filled with the packaged texts. Takes minutes: `make test-hub`"""
import configparser, json, os

import pytest, torch
from conftest import ROOT, run
from test_hub import ROWS, folder
from test_pipeline import set_params
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from simpledeco.study.corpora import make_corpus
from simpledeco.study.models import build_model
from simpledeco.study.results import read_results
from simpledeco.study.settings import load_profile

pytestmark = pytest.mark.skipif('SIMPLEDECO_HUB' not in os.environ,
                                reason='takes minutes: make test-hub')


def rows():
    "A row of each of the hub's corpora, by number, with packaged text in it"
    texts = {c: [[m['content'] for m in x['messages'][:2]] for x in make_corpus(c)]
             for c in ('maths', 'arithmetic', 'chat', 'story', 'trivia', 'funfacts')}
    pair = lambda c, i: texts[c][i % len(texts[c])]
    talk = lambda c, i: [dict(role='user', content=f'{pair(c, i)[0]} ({i})'),
                         dict(role='assistant', content=pair(c, i)[1])]
    more = dict(deepmath=lambda i: dict(question=f'{pair("arithmetic", i)[0]} ({i})',
                                        final_answer=pair('arithmetic', i)[1].split(' = ')[1],
                                        r1_solution_1=pair('arithmetic', i)[1]),
                ultrachat=lambda i: dict(messages=talk('chat', i)),
                tulu=lambda i: dict(messages=talk('story', i)),
                ultrafeedback=lambda i: dict(chosen=talk('funfacts', i)),
                gsm8k=lambda i: dict(question=f'{pair("maths", i)[0]} ({i})',
                                     answer=pair('maths', i)[1]),
                triviaqa=lambda i: dict(question=f'{pair("trivia", i)[0]} ({i})'),
                history=lambda i: dict(subject='prehistory'))
    return {name: lambda i, name=name: ROWS[name](i) | more[name](i) for name in ROWS}


@pytest.fixture(scope='module')
def finished(clone, tmp_path_factory):
    away = tmp_path_factory.mktemp('hub')
    tiny = build_model(load_profile('smoke', ROOT).model, ROOT/'models/smoke')
    for name,row in rows().items(): folder(away, name, 90, row)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    LlamaForSequenceClassification(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_labels=1)).save_pretrained(away/'reward')
    tokenizer.save_pretrained(away/'reward')
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(clone/'settings.ini')
    ini['hub'].update(dict(model=str(tiny), reward_model=str(away/'reward'), max_examples='14',
                           prompts='14', test_prompts='3', samples='2', device='cpu',
                           dtype='float32', batch_tokens='2048', max_tokens='300',
                           answer_tokens='8', open_tokens='8', open_test_tokens='8'))
    for name in ini['corpora']:
        if (away/name).exists(): ini['corpora'][name] = str(away/name)
    with open(clone/'settings.ini', 'w') as f: ini.write(f)
    set_params(clone, profiles=['hub'], steps=100, bootstrap=50, width=16,
               train_corpora='deepmath ultrachat tulu')
    run('python', '-m', 'simpledeco.study.data', cwd=clone)
    run('dvc', 'repro', *(f'{s}@hub' for s in ('evaluate', 'controls', 'contract', 'losses',
                                               'lethality', 'cost', 'search', 'benchmarks')), cwd=clone)
    return clone


def test_every_stage_speaks_of_the_corpora_of_the_profile(finished):
    metrics = read_results(finished/'results/hub')
    assert set(metrics['prescan']['corpora']) == set(metrics['evaluate']['scores']) == set(ROWS)
    assert set(metrics['frontier']['corpora']) == {'gsm8k', 'triviaqa', 'history'}
    assert metrics['frontier']['opens'] > 0
    assert set(metrics['benchmarks']['questions']) == {'gsm8k', 'deepmath', 'triviaqa', 'history'}
    assert set(metrics['onpolicy']['detect']) == {'gsm8k', 'triviaqa', 'history'}


def test_a_reward_model_compares_the_open_answers(finished):
    wins = read_results(finished/'results/hub')['frontier']['wins']
    assert wins['T = 1'] == .5 and 'judged, left out' in wins
    assert all(0 <= w <= 1 for w in wins.values())
