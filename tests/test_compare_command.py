"`simpledeco compare`, as a user runs it, on a real model; its numbers are computed a second time, from the texts"
import json, re, sys

import numpy as np
import pytest, torch
from matplotlib.text import Text
from conftest import ROOT
from test_cli import check_one_line, simpledeco

from simpledeco import cli, helps
from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, load_model
from simpledeco.study.plots import COLOURS, look
from simpledeco.study.rungs import RUNGS

REAL, TINY = ROOT/'models/embedded', ROOT/'models/smoke'
CAPITALS = dict(France='Paris', Italy='Rome', Spain='Madrid', Japan='Tokyo', Egypt='Cairo', Peru='Lima', Norway='Oslo', Cuba='Havana',
                Kenya='Nairobi', Greece='Athens')
THINGS = ['a lighthouse', 'a lost dog', 'the last train', 'an old clock', 'a storm', 'two brothers', 'a baker',
          'the moon', 'a key', 'a map']


def line(text, **more): return dict(messages=[dict(role='user', content=text)], split='test') | more


def write(path, lines): path.write_text('\n'.join(map(json.dumps, lines)))


def make_head(model, folder, **config):
    "A head whose temperatures are about 1 and differ from token to token"
    torch.manual_seed(0)
    head = TemperatureHead(model.config.hidden_size, width=0, reads='hidden', base_model=fingerprint(model), **config)
    torch.nn.init.normal_(head.net[-1].weight, std=.02)
    head.save_pretrained(folder)


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "What `compare` prints and writes for ten questions and ten open prompts"
    work = tmp_path_factory.mktemp('compare')
    make_head(load_model(REAL)[0], work/'head', record=dict(corpora=['capitals', 'sums']))
    ask = [line(f'What is the capital of {c}?', answer=a, group='north' if c in ('Norway', 'Greece') else c) for c,a in CAPITALS.items()]
    ask += [line('What is the capital of Chad?', answer="N'Djamena", group='Chad')]
    tell = [line(f'Write the first line of a story about {x}.') for x in THINGS]
    write(work/'capitals.jsonl', ask + [line(f'Where is {c}?', answer=c, split='train') for c in ('Oslo', 'Rome', 'Lima')])
    write(work/'stories.jsonl', tell + [line('Write a poem.', split='calibration')])
    said = simpledeco('compare', 'head', REAL, '--data', 'capitals.jsonl', '--data', 'stories.jsonl', '--scale', '.8', '--samples', '2',
                      '--max-new-tokens', '9', '--out', 'out', cwd=work).stdout
    read = lambda name: json.loads((work/f'out/{name}.json').read_text())
    return dict(said=said, found=read('compare'), prompts=read('answers'), work=work)


def by_hand(prompts):
    "{decoder: (right [P], variety [Q])} from the texts and tokens alone, the switches too"
    answers = {m: [x['answers'][m] for x in prompts] for m in prompts[0]['answers']}
    asks = [x['messages'][-1]['content'][-1] == '?' for x in prompts]
    for t in ('0.5', '1', '1.5'):
        answers[f'switch, T = {t}'] = [x['answers']['greedy' if a else f'T = {t}'] for x,a in zip(prompts, asks)]
    measured = {}
    for m,groups in answers.items():
        right = [[re.search(rf'\b{x["answer"]}\b', a['text'], re.I) is not None for a in group]
                 for x,group in zip(prompts, groups) if x['answer']]
        pairs = [[(a['tokens'][i], a['tokens'][i + 1]) for a in group for i in range(len(a['tokens']) - 1)]
                 for x,group in zip(prompts, groups) if not x['answer']]
        measured[m] = np.mean(right, 1), np.array([len(set(p))/len(p) for p in pairs])
    return measured


def above(measured, m, line):
    "How far the mean of a decoder lies above straight lines through those of others"
    points = sorted((measured[s][1].mean(), measured[s][0].mean()) for s in line)
    x, y = measured[m][1].mean(), measured[m][0].mean()
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= x <= x1: return y - y0 - (y1 - y0)*(x - x0)/(x1 - x0)
    return y - (points[0] if x < points[0][0] else points[-1])[1]


CONSTANTS = ['greedy', 'T = 0.5', 'T = 1', 'T = 1.5']


def test_the_numbers_are_those_of_the_texts(done):
    measured, rows = by_hand(done['prompts']), {r['decoder']: r for r in done['found']['decoders']}
    assert set(measured) == set(rows) and len(rows) == 9
    for m,r in rows.items():
        assert [r[k]['mean'] for k in ('right', 'variety')] == pytest.approx([x.mean() for x in measured[m]])
        if m in CONSTANTS: assert r['above'] is None
        else: assert r['above']['mean'] == pytest.approx(above(measured, m, CONSTANTS), abs=1e-9)
    assert len({r['right']['mean'] for r in rows.values()}) > 2 and max(r['right']['mean'] for r in rows.values()) > .5
    against = done['found']['against']
    switches = ['greedy', *(m for m in measured if m.startswith('switch'))]
    first = above(measured, 'the head', CONSTANTS) - above(measured, 'first T, kept', CONSTANTS)
    by_rival = dict(constants=above(measured, 'the head', CONSTANTS), switch=above(measured, 'the head', switches), first=first)
    assert {k: d['mean'] for k,d in against.items()} == pytest.approx(by_rival, abs=1e-9)


def test_the_intervals_resample_groups(done):
    "Norway and Greece are of one group, so eleven questions are of ten"
    right = by_hand(done['prompts'])['T = 1'][0]
    groups = [x['group'] for x in done['prompts'] if x['answer']]
    members = [[i for i,g in enumerate(groups) if g == name] for name in dict.fromkeys(groups)]
    assert len(groups) == 11 and len(members) == 10
    draw = np.random.default_rng(7)
    means = [right[np.concatenate([members[k] for k in draw.integers(0, 10, 10)]).astype(int)].mean() for _ in range(4000)]
    found = next(r for r in done['found']['decoders'] if r['decoder'] == 'T = 1')['right']
    assert [found['lo'], found['hi']] == pytest.approx(np.quantile(means, [.025, .975]), abs=.05)
    assert found['lo'] < found['mean'] < found['hi']


def test_the_head_writes_at_its_own_temperatures(done):
    texts = {m: [a['tokens'] for x in done['prompts'] for a in x['answers'][m]] for m in done['prompts'][0]['answers']}
    assert all(texts['the head'] != texts[m] for m in texts if m != 'the head')
    assert [t[0] for t in texts['the head']] == [t[0] for t in texts['first T, kept']]
    assert all(x['split'] == 'test' for x in done['prompts'])


def test_what_is_printed(done):
    said, against = ' '.join(done['said'].split()), done['found']['against']['constants']
    cut = [a for x in done['prompts'] if x['answer'] for group in x['answers'].values() for a in group if not a['ended']]
    for part in ('left out: 1 of the calibration split, 3 of the train split;', '11 questions, 10 open prompts, 2 answers to each',
                 f'{len(cut)} of 132 answers to questions were cut at 9 tokens',
                 f'{sum(a["right"] for a in cut)} of these count as right',
                 'the head was trained on capitals, sums; whether it saw the prompts of stories there'): assert part in said, said
    word = 'above' if against['lo'] > 0 else 'below' if against['hi'] < 0 else 'not told apart from'
    assert f'the head is {word} the constants ({100*against["mean"]:+.1f} points of right answers' in said
    for row in done['found']['decoders']:
        r = row['right']
        assert f'{row["decoder"]} {100*r["mean"]:.1f} [{100*r["lo"]:.1f}, {100*r["hi"]:.1f}] {row["variety"]["mean"]:.2f} [' in said
    assert max(map(len, done['said'].split('\n')[4:-2])) <= 80, 'the table fits a terminal'
    assert (done['work']/'out/compare.png').read_bytes()[:4] == b'\x89PNG'


STUDY = {helps.HEAD: 'judged, left out', f'{helps.HEAD}, by prompt': 'judged, by prompt', helps.FIRST: 'judged, left out: first token',
         'switch, T = 1': 'question mark, T = 1', 'switch, T = 1.5': 'question mark, T = 1.5'}

def test_a_decoder_looks_as_in_the_figures_of_the_study():
    for name,row in STUDY.items(): assert helps.mark(name) == look(row), name
    assert helps.mark(helps.HEAD, by_prompt=True) == look('judged, by prompt')
    general = RUNGS['question mark'] # the study has no switch at .5
    assert helps.mark('switch, T = 0.5') == dict(marker=general.mark, color=COLOURS[general.family], mfc='w')
    assert helps.mark('greedy')['color'] == COLOURS['static']


def test_every_name_stands_beside_the_picture_without_a_legend(done):
    fig = helps.drawn(done['found'])
    (ax,), rows = fig.axes, {r['decoder']: r for r in done['found']['decoders']}
    assert sorted(t.get_text() for t in ax.texts) == sorted(rows) and ax.get_legend() is None
    for t in ax.texts:
        assert t.xy == (rows[t.get_text()]['variety']['mean'], 100*rows[t.get_text()]['right']['mean'])
    fig.draw_without_rendering()
    boxes = [Text.get_window_extent(t) for t in ax.texts] # without their lines
    edges = sorted((b.y0, b.y1) for b in boxes)
    assert all(a[1] <= b[0] for a,b in zip(edges, edges[1:])), 'two names lie on each other'
    assert all(b.x0 > ax.get_window_extent().x1 and b.x1 <= fig.bbox.x1 for b in boxes)


def test_without_matplotlib_there_is_no_picture_and_one_line_says_so(done, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.delitem(sys.modules, 'matplotlib.figure', raising=False)
    found = {k: v for k,v in done['found'].items() if k != 'made'}
    with cli.console.capture() as said: cli._write_compared(tmp_path/'out', found, {}, done['prompts'], {})
    assert said.get().count('\n') == 1 and 'no picture, matplotlib is missing: pip install matplotlib' in said.get()
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['answers.json', 'compare.json']


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "Prompts and heads for what must be refused"
    work = tmp_path_factory.mktemp('refused')
    model = load_model(TINY)[0]
    make_head(model, work/'head')
    TemperatureHead(model.config.hidden_size, base_model='another').save_pretrained(work/'foreign')
    for n in (9, 10):
        write(work/f'ask{n}.jsonl', [line(f'Who is {i}?', answer='xyz') for i in range(n)])
        write(work/f'tell{n}.jsonl', [line(f'Write about {i}.') for i in range(n)])
    write(work/'one.jsonl', [line(f'Write about {i}.', group='one') for i in range(12)])
    write(work/'seen.jsonl', [line(f'Who is {i}?', answer='xyz', split='train') for i in range(12)])
    return work


@pytest.mark.parametrize('head, data, message', [
    ('head', ['ask10'], 'there are no open prompts'), ('head', ['tell10'], 'there are no questions'),
    ('head', ['ask9', 'tell10'], 'the 9 questions that the head has not seen are of 9 groups, and an interval needs 10'),
    ('head', ['ask10', 'one'], 'the 12 open prompts that the head has not seen are of 1 group, and'),
    ('head', ['seen', 'tell10'], 'there are no questions that the head has not seen'),
    ('head', ['seen'], 'no conversation of the test split'),
    ('head', ['ask10', 'tell10'], '120 of 120 answers to questions were cut at 4 tokens, so that none was finished: pass a larger'),
    ('foreign', ['ask10', 'tell10'], 'trained for base model another'), ('nowhere', ['ask10', 'tell10'], 'no head')])
def test_errors_are_one_line(tiny, head, data, message):
    files = [x for name in data for x in ('--data', f'{name}.jsonl')]
    asked = ['compare', head, TINY, *files, '--samples', '2', '--max-new-tokens', '4', '--out', 'out']
    check_one_line(simpledeco(*asked, cwd=tiny, check=False), message)
    assert not (tiny/'out').exists()
