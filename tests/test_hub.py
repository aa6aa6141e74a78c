"The corpora of the hub, read from folders with the hub's columns; real GSM8K where it is to be had"
import json, os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest, torch
from conftest import ROOT, run
from transformers import LlamaConfig, LlamaForSequenceClassification

from simpledeco.contract import calibrate, coverage
from simpledeco.judge import CHECKS
from simpledeco.study.hub import hub_corpus, SCHEMAS
from simpledeco.study.profiles import profile_examples
from simpledeco.study.rewards import load_reward_model, rewards, win_rate
from simpledeco.model import load_model
from simpledeco.study.models import build_model
from simpledeco.scan import scan
from simpledeco.model import split_source
from simpledeco.study.settings import corpus_sources, load_profile
from simpledeco.train import fit

PUBLIC = ROOT.parent/'shared/data'
GSM8K = Path(os.environ.get('SIMPLEDECO_GSM8K', ROOT.parent/'shared/data/gsm8k'))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "datasets waits five seconds for its threads whenever a stream of Parquet is closed"
    monkeypatch.setattr(datasets.config, 'SLEEP_TIME_ON_THREADS_SHUTDOWN', .05)


def talk(i, *roles):
    return [dict(role=r, content=f'{r} says {i}') for r in roles or ('user', 'assistant')]


# one row of each corpus with all columns that the hub's files have, in their types
ROWS = dict(
    deepmath=lambda i: dict(question=f'What is {i}+0?', final_answer=str(i), difficulty=5.0,
                            topic='Algebra', r1_solution_1=f'\\boxed{{{i}}}', r1_solution_2='-',
                            r1_solution_3='-'),
    ultrachat=lambda i: dict(prompt=f'p{i}', prompt_id=f'id{i}',
                             messages=talk(i, 'user', 'assistant', 'user', 'assistant')),
    tulu=lambda i: dict(dataset='flan_v2', id=f'flan_{i}',
                        messages=talk(i, 'system', 'user', 'assistant')),
    gsm8k=lambda i: dict(question=f'What is {i}+1?',
                         answer=f'{i}+1=<<{i}+1={i+1}>>{i+1}\n#### {i+1:,}'),
    ultrafeedback=lambda i: dict(prompt=f'p{i}', prompt_id=f'id{i}', chosen=talk(i), rejected=talk(-i),
                                 messages=talk(i), score_chosen=8.0, score_rejected=3.0),
    triviaqa=lambda i: dict(
        question=f'Who was king number {i}?', question_id=f'tc_{i}', question_source='x',
        entity_pages=[], search_results=[],
        answer=dict(aliases=[f'King {i}', f'The king {i}'], normalized_aliases=[f'king {i}'],
                    matched_wiki_entity_name='', normalized_matched_wiki_entity_name='',
                    normalized_value=f'king {i}', type='WikipediaEntity', value=f'King {i}')),
    history=lambda i: dict(question=f'When was war {i}?', subject=('prehistory', 'anatomy')[i % 2],
                           choices=['1', '2', '3', str(i)], answer=3),
    webquestions=lambda i: dict(url='x', question=f'who was king number {i}?', answers=[f'King {i}', f'The king {i}']),
    nq_open=lambda i: dict(question=f'who wrote book number {i}', answer=[f'Writer {i}', f'W. {i}']),
    instructions=lambda i: dict(id=f'user_oriented_task_{i}', motivation_app='x', instruction=f'Write line {i} of a poem.',
                                instances=[dict(input='', output=f'Line {i}')]))


def folder(tmp_path, name, n=60, row=None):
    """A folder as `hf download` leaves it: Parquet files, and a README that names configuration and
    splits"""
    row = row or ROWS[name]
    s, at = SCHEMAS[name], tmp_path/name
    (at/s.config).mkdir(parents=True)
    splits = [s.train] + [s.test]*bool(s.test)
    for k,split in enumerate(splits):
        pq.write_table(pa.Table.from_pylist([row(i) for i in range(k*n, (k+1)*n)]),
                       at/s.config/f'{split}-00000-of-00001.parquet')
    files = ''.join(f'  - split: {x}\n    path: {s.config}/{x}-*\n' for x in splits)
    ((at/'README.md').write_text(f'---\nconfigs:\n- config_name: {s.config}\n  '
                                 f'data_files:\n{files}---\n'))
    return at


@pytest.mark.parametrize('name', SCHEMAS)
def test_every_schema_becomes_examples(tmp_path, name):
    examples = hub_corpus(name, str(folder(tmp_path, name)), 20)
    assert examples == hub_corpus(name, name, 20, tmp_path), 'the same rows in the same order'
    splits = {s: [x for x in examples if x['split'] == s] for s in ('train', 'calibration', 'test')}
    assert all(0 < len(xs) <= 20 for xs in splits.values())
    assert len({x['group'] for x in examples}) == len({x['id'] for x in examples}) == len(examples)
    for x in examples:
        assert x['messages'][-1]['role'] == 'assistant' and all(m['content'] for m in x['messages'])
        if SCHEMAS[name].check:
            said = x['messages'][-1]['content']
            assert CHECKS[SCHEMAS[name].check](said, x['answers']), 'the reference passes its own check'
        else: assert x['answers'] == []
        if name == 'gsm8k':
            assert '<<' not in x['messages'][1]['content'] and '####' not in x['messages'][1]['content']
    if SCHEMAS[name].test: # the publisher's test split stays the test split
        digits = lambda x: ''.join(c for c in str(x['group']) if c.isdigit() or c == '+')
        number = lambda x: int(digits(x).split('+')[0])
        assert min(number(x) for x in splits['test']) >= 60 > max(number(x) for x in splits['train'])


@pytest.mark.skipif(not (PUBLIC/'webquestions').exists(), reason=f'no public rows in {PUBLIC}')
def test_real_questions_and_instructions_as_people_wrote_them(tmp_path):
    """Rows of WebQuestions under the hub's names of its columns; the other two as they are. Each row is read once, none that has an
    address for an answer or an input of its own"""
    (tmp_path/'webquestions').mkdir()
    for split in ('train', 'validation'):
        rows = [dict(question=x['qText'], answers=x['answers']) for x in json.loads((PUBLIC/f'webquestions/{split}.json').read_text())]
        (tmp_path/f'webquestions/{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    found = {name: hub_corpus(name, str(at/name), 10_000) for name,at in
             dict(webquestions=tmp_path, nq_open=PUBLIC, instructions=PUBLIC).items()}
    said = {k: {x['messages'][0]['content'] for x in xs} for k,xs in found.items()}
    lines = lambda *at: [json.loads(x) for x in (PUBLIC.joinpath(*at)).read_text().splitlines()]
    assert said['nq_open'] == {x['question'] for x in lines('nq_open', 'validation.jsonl')}
    own = lambda x: not any(i['input'] for i in x['instances'])
    assert said['instructions'] == {x['instruction'] for x in lines('instructions', 'user_oriented.jsonl') if own(x)}
    assert 1000 < len(said['webquestions']) and not any('://' in a for x in found['webquestions'] for a in x['answers'])
    for name,xs in found.items():
        assert len(xs) == len(said[name]) and {x['split'] for x in xs} == {'train', 'calibration', 'test'}


def test_sources_are_pinned_to_whole_commits():
    for name,source in corpus_sources(ROOT).items():
        assert name in SCHEMAS and len(split_source(source)[1]) == 40
    for p in ('hub', 'hub-7b', 'hub-8b'): assert len(split_source(load_profile(p, ROOT).model)[1]) == 40


def test_a_profile_reads_folders(tmp_path):
    for name in ('gsm8k', 'history'): folder(tmp_path, name)
    ini = (ROOT/'settings.ini').read_text()
    ini = ini[:ini.rindex('[corpora]')].replace('corpora = deepmath ultrachat tulu gsm8k ultrafeedback '
                                                'triviaqa history', 'corpora = gsm8k history')
    (tmp_path/'settings.ini').write_text(ini + '[corpora]\ngsm8k = gsm8k\nhistory = history\n')
    examples = profile_examples(load_profile('hub', tmp_path))
    assert {x['corpus'] for x in examples} == {'gsm8k', 'history'}


def test_an_unreachable_hub_is_one_sentence_and_a_cure():
    "Without a network the real repositories cannot be opened, and the message says what to do"
    code = ('from simpledeco.study.profiles import profile_examples; from '
            'simpledeco.study.settings import load_profile; p = load_profile("hub")\n'
            'try: profile_examples(p)\nexcept OSError as e: print(e)')
    said = run('python', '-c', code, cwd=ROOT).stdout
    assert 'cannot open corpus deepmath = zwhe99/DeepMath-103K@' in said
    assert '--local-dir' in said and 'hf auth login' in said


def test_no_gpu_and_no_such_device():
    wrong = {'gpu': 'is not known'}
    if not torch.cuda.is_available(): wrong['cuda'] = 'finds no GPU'
    for device,words in wrong.items():
        with pytest.raises(ValueError, match=words): load_model(ROOT/'models/smoke', device=device)


def test_a_reward_model_decides(tmp_path):
    smoke = load_profile('smoke', ROOT)
    _, tokenizer = load_model(build_model(smoke.model, ROOT/'models/smoke', smoke.sha256))
    config = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16,
                  num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(0)
    for labels in (1, 2):
        model = LlamaForSequenceClassification(LlamaConfig(**config, num_labels=labels))
        model.save_pretrained(tmp_path/str(labels))
        tokenizer.save_pretrained(tmp_path/str(labels))
    model, tokenizer = load_reward_model(str(tmp_path/'1'))
    ours = [talk(i) for i in range(6)]
    theirs = [talk(i, 'user', 'assistant')[:1] + [dict(role='assistant', content='no ' * (i + 1))]
              for i in range(6)]
    a, b = rewards(model, tokenizer, ours), rewards(model, tokenizer, theirs)
    ids = torch.tensor([tokenizer(tokenizer.apply_chat_template(ours[2], tokenize=False),
                                  add_special_tokens=False).input_ids])
    last = model.score(model.model(ids).last_hidden_state[0, -1])
    torch.testing.assert_close(a[2], last[0].float()) # the head of the class, applied by hand
    assert win_rate(a, b) + win_rate(b, a) == 1 and win_rate(a, a) == .5
    with pytest.raises(ValueError, match='has 2 outputs'): load_reward_model(str(tmp_path/'2'))
    with pytest.raises(OSError, match='cannot load reward model'): load_reward_model(str(tmp_path/'3'))


@pytest.mark.skipif(not (GSM8K/'train.jsonl').exists(),
                    reason=f'no GSM8K in {GSM8K}; name a folder in SIMPLEDECO_GSM8K')
def test_real_gsm8k_from_a_folder_to_coverage(tmp_path):
    "The whole way: read, scan, train, calibrate, coverage"
    smoke = load_profile('smoke', ROOT)
    model, tokenizer = load_model(build_model(smoke.model, ROOT/'models/smoke', smoke.sha256))
    examples = hub_corpus('gsm8k', str(GSM8K), 60)
    assert all(CHECKS['number'](x['messages'][1]['content'], x['answers']) for x in examples)
    table = scan(model, tokenizer, examples, tmp_path/'t', batch_tokens=8192, max_tokens=200,
                 progress=False)
    head = fit(table, risk=.1, steps=200)
    calibrated = calibrate(head, table, .1)
    kept = coverage(calibrated, table)['gsm8k']['groups']
    assert kept['groups'] == 60 and kept['hi'] > .9 and kept['mean'] < .99, json.dumps(kept)
