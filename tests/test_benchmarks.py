"The arithmetic of the benchmarks, the table that they end in, and each of them once, small"
import json, math, sys, tempfile

import numpy as np, pytest, torch
from browser import CHROMIUM
from conftest import ROOT, run as command

sys.path.insert(0, str(ROOT/'benchmarks'))
import cost, growth, page, report, row, run, sampling, terminal, vocabulary


def figure(value, lo, hi, **more): return dict(ratio=value, lo=lo, hi=hi, **more)


def test_the_exponent_of_a_power_law():
    sizes, noise = (1, 2, 5, 10), np.random.default_rng(0).normal(0, .02, (9, 4))
    found = growth.exponent(sizes, 3*np.array(sizes)**.7*np.exp(noise), 0)
    assert abs(found['exponent'] - .7) < .02 and found['lo'] < .7 < found['hi'] < .75
    assert abs(found['last'] - .7) < .05 and found['at_most'] == growth.SLACK


def test_a_slow_machine_does_not_move_an_exponent():
    "Rounds that are slower as a whole have the same slope"
    speed = np.array([1, 5, 2])[:, None]
    found = growth.exponent((1, 4, 16), speed*np.array([1, 4, 16.])**.5, 1)
    assert [round(found[k], 12) for k in ('exponent', 'lo', 'hi', 'last')] == [.5]*4


def test_a_curve_that_is_no_power_tends_elsewhere():
    sizes = np.array([1, 10, 100, 1000.])
    found = growth.exponent(sizes, np.tile(100 + sizes, (3, 1)), 1)
    assert found['exponent'] < .5 < .7 < found['last'] < 1


def test_an_exponent_that_was_measured_once_has_the_range_without_one_size():
    found = growth.exponent_once((1, 2, 4, 8), np.array([1, 2, 4, 16]), 1)
    assert found['lo'] == pytest.approx(1) and found['last'] == pytest.approx(2) # without the last, and at the end
    assert (found['exponent'], found['hi']) == (pytest.approx(1.3), pytest.approx(1.5))


MEASURED = '''
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
import growth

def holds(corpus): # so many MiB for a moment, on top of what was there before
    there = torch.ones(2**22)
    return lambda: int(torch.ones(corpus*2**18).sum() + there[0] > 0)

def fails(corpus): raise ValueError(f'there is no corpus of {corpus}')

if __name__ == '__main__':
    growth.ready()
    s = growth.Series('holding', holds, 'corpus', (32, 64, 128), 1, 1)
    print(json.dumps(growth.figures(s, growth.measure(s, rounds=2))))
    growth.measure(s._replace(make=fails), rounds=1)
'''


def test_memory_is_that_of_the_work_in_a_process_of_its_own(tmp_path):
    "And a stage that fails ends the measurement"
    (tmp_path/'measured.py').write_text(MEASURED)
    done = command(sys.executable, tmp_path/'measured.py', ROOT/'benchmarks', cwd=ROOT, check=False)
    assert 'ValueError: there is no corpus of 32' in done.stderr and 'BrokenProcessPool' in done.stderr, done.stderr
    found = json.loads(done.stdout)
    assert np.allclose(found['megabytes'], found['sizes'], rtol=.05, atol=3), found
    assert abs(found['memory']['exponent'] - 1) < .05 and found['memory']['at_most'] == 1 + growth.SLACK
    assert all(x > 0 for x in found['seconds'] + found['tokens_per_second']) and found['rounds'] == 2


SMALL = {growth.prescan: (dict(corpus=64, vocabulary=300, rows=2, length=16), 64),
         growth.training: (dict(corpus=5000, vocabulary=300, rows=64, steps=2), 128),
         growth.from_table: (dict(corpus=5000, steps=2, rows=8), 16),
         growth.over_vocabulary: (dict(vocabulary=300, rows=8), 8),
         growth.calibration: (dict(corpus=5000, vocabulary=300), 2500),
         growth.sampling: (dict(corpus=1, vocabulary=300, rows=8, length=3), 24)}


def test_every_stage_works_and_counts_its_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    assert {s.make for s in growth.SERIES} == set(SMALL)
    for make,(sizes,tokens) in SMALL.items():
        work = make(**sizes)
        counted = [work() for _ in range(2)] # it can be done again
        assert all(.5*tokens <= n <= tokens for n in counted) if make is growth.sampling else counted == [tokens]*2, make


def test_random_models_are_as_sure_of_themselves_as_real_ones():
    model = growth.model_of(2000)
    with torch.no_grad(): z = model(torch.tensor([[5, 6, 7]])).logits[0, -1]
    assert 2 < z.std() < 5


@pytest.mark.parametrize('said, x', [
    ('met', figure(.98, .92, .99, at_least=.9)), ('missed', figure(.8, .7, .89, at_least=.9)), ('open', figure(.9, .8, .95, at_least=.9)),
    ('met', figure(1, .9, 1.1, at_most=1.1)), ('missed', figure(2, 1.2, 3, at_most=1.1)), ('open', figure(1, .9, 1.2, at_most=1.1)),
    ('', figure(1, .9, 1.2))])
def test_met_and_missed_are_said_of_the_whole_interval(said, x): assert report.verdict(x) == said


def test_the_table_shows_every_figure_beside_its_limit():
    found = dict(results={'threads': 2, 'a / b': figure(5062.3, 4900.2, 5100, at_least=1000), 'c': dict(why='no time')},
                 growth={'scan over rows': dict(sizes=[1, 2], time=dict(exponent=-.25, lo=-.3, hi=-.2, at_most=.1),
                                                memory=dict(exponent=1.3, lo=1.2, hi=1.4, at_most=1.1))})
    squeezed = [' '.join(line.split()) for line in report.table(found).split('\n')]
    assert squeezed == ['Speed of the first over that of the second', 'a / b 5,062 [4,900, 5,100] >= 1,000 met', 'c not measured: no time',
                        '', 'Growth: exponents of time and memory', 'scan over rows, time -0.250 [-0.300, -0.200] <= 0.1 met',
                        'scan over rows, memory 1.300 [1.200, 1.400] <= 1.1 missed']


def test_files_that_are_not_there_have_no_rows(tmp_path):
    (tmp_path/'decode.json').write_text(json.dumps({'135M, vllm': figure(.97, .96, .98, at_least=.985)}))
    found = report.read(tmp_path)
    assert list(found) == ['decode'] and report.table(found).endswith('>= 0.985 missed')


def test_every_figure_that_is_committed_has_its_limit():
    found = {k: v for k,v in report.read(ROOT/'benchmarks').items() if k != 'gpu'}
    shown = [x for v in found.values() for x in report.figures(v)]
    assert len(shown) > 5
    for name,x in shown: assert 'why' in x or report.verdict(x), name


def test_no_measurement_that_is_committed_is_left_out_of_the_table():
    "A figure without an interval would have no row"
    for file,found in report.read(ROOT/'benchmarks').items():
        for name,x in found.items(): assert not isinstance(x, dict) or list(report.figures({name: x})), f'{file}: {name}'


def test_turns_are_taken_and_compared():
    order, now = [], iter(range(100))
    pairs = run.turns(lambda i: order.append(f'a{i}'), lambda i: order.append(f'b{i}'), 3, clock=lambda: next(now))
    assert order == ['a0', 'b0', 'b0', 'a0', 'a1', 'b1', 'b2', 'a2'] and (pairs == 1).all()
    found, first, second = run.compared(np.array([[2, 1], [3, 1], [8, 2.]]))
    assert (found['ratio'], found['lo'], found['hi'], found['pairs'], first, second) == (3, 2, 4, 3, 13, 4)


def test_training_is_compared_by_tokens():
    found = run.training(300, rounds=2, steps=2)
    assert 0 < found['lo'] <= found['ratio'] <= found['hi'] and found['at_least'] == 1000
    assert found['ours_tokens_per_second'] > 0 < found['theirs_tokens_per_second']


def test_a_model_is_measured_at_its_own_vocabulary_and_width(monkeypatch):
    monkeypatch.setattr(cost, 'HIDDEN', cost.HIDDEN) # it is put back at the end
    found = dict(vocabulary.parts('smoke', 1, 1))
    assert (found['vocabulary'], found['hidden_size'], cost.HIDDEN) == (49152, 32, 32)
    assert found['training']['vocabulary'] == 49152 and len(list(report.figures(found))) == 4
    assert all(0 < x['lo'] <= x['ratio'] <= x['hi'] for _,x in report.figures(found))


def test_the_recorded_commands_are_those_of_the_script():
    found = json.loads((ROOT/'benchmarks/terminal.json').read_text())
    assert [x['command'] for x in found['commands']] == [f'simpledeco {x}' for x in terminal.COMMANDS]
    assert all(x['output'] for x in found['commands'])


@pytest.fixture(scope='module')
def subject(): return sampling.subject('smoke')


def test_decoding_is_measured_without_vllm(subject):
    found = run.decoding(subject.model, subject.tokenizer, 'logits', calls=1)
    assert found['pairs'] == 30 and 0 < found['lo'] <= found['ratio'] <= found['hi'] and found['at_least'] == .985


def test_a_row_is_measured_without_vllm(tmp_path):
    source = ROOT/'models/smoke'
    made, head = row.folded(source, tmp_path)
    found = row.in_transformers(source, made, head, 2, calls=1)
    assert found['pairs'] == 30 and 0 < found['lo'] <= found['ratio'] <= found['hi']


def test_every_part_of_sampling_has_its_share(subject, monkeypatch):
    monkeypatch.setattr(sampling, 'NEW', 4)
    shares = sampling.parts(subject, 16)
    assert list(shares) == list(sampling.PARTS) and abs(sum(shares.values()) - 1) < 1e-9
    assert all(0 < x < 1 for x in shares.values()), shares
    seconds = sampling.speed(subject, 16, 2)
    assert seconds.shape == (2, 2) and (seconds > 0).all()
    assert 0 < sampling.read(subject, 16) < 2


def test_the_rows_of_all_steps_are_those_that_the_texts_need(subject, monkeypatch):
    "Counted at the model, against the beginnings of the texts; and so for one rule, where there is less to share"
    monkeypatch.setattr(sampling, 'NEW', 4)
    for call,texts,prompts in ((subject, 32, 1), (sampling.alone(subject), 32, 16)):
        found = sampling.occupied(call, 16)
        assert found['steps']*found['rows_a_step'] == pytest.approx(sampling.read(call, 16)*4*texts - prompts)
        assert found['steps'] >= 3 and 0 < found['tail'] and 0 < found['reading'] < 1 - found['tail']


def test_widths_are_those_of_the_mean():
    d, group = np.random.default_rng(0).normal(size=(2, 50)), np.arange(50)
    alone = [sampling.widths(x[None], group, np.ones((1, 50)))[0] for x in d]
    assert np.allclose(alone, 2*1.96*d.std(1)/math.sqrt(50))
    assert np.allclose(sampling.widths(d, group, np.ones((1, 50))), math.sqrt(np.mean(np.square(alone))))
    # what all prompts of a group share does not get less with their number
    assert np.allclose(sampling.widths(np.repeat(d, 3, 1), np.repeat(group, 3), np.ones((1, 50)))[0],
                       sampling.widths(d, group, np.ones((1, 50))))


def test_how_much_narrower_shared_noise_makes_an_interval():
    r = np.random.default_rng(0)
    luck, own = r.normal(size=(2, 3000)), r.normal(size=(2, 2, 3000)) # of a seed; of a rule and a seed
    found = sampling.narrower(3*luck + own[0], 3*luck + own[1] + .2, np.arange(3000)//3)
    assert found['lo'] < math.sqrt(1/10) < found['hi'] and abs(found['ratio'] - math.sqrt(1/10)) < .02
    assert (found['prompts'], found['groups']) == (3000, 1000)
    none = sampling.narrower(own[0], own[1], np.arange(3000))
    assert none['lo'] < 1 < none['hi']


def test_intervals_are_compared_on_questions_and_on_open_prompts(subject, monkeypatch):
    monkeypatch.setattr(sampling, 'EACH', 3)
    found = dict(sampling.intervals(subject))
    assert list(found) == [f'{what}, {a} and {b}' for what in ('accuracy', 'variety') for a,b in sampling.PAIRS]
    assert found['accuracy, T = 0.7 and T = 1']['prompts'] == 15
    assert 0 < found['variety, T = 0.7 and T = 1']['ratio'] < 1.5


def test_the_work_on_a_token_page_is_measured_in_a_browser(monkeypatch):
    if CHROMIUM is None: pytest.skip('there is no Chromium here')
    monkeypatch.setattr(page, 'WHOLE', 80)
    found = page.measure(sizes=(60, 1100), rounds=2)
    assert {k: v.shape for k,v in found.items()} == {'report': (2, 1), **{k: (2, 2) for k in ('page', 'opened', 'slider', 'key', 'bytes')}}
    assert all((v > 0).all() for v in found.values()) and (found['bytes'][:, 1] > 5*found['bytes'][:, 0]).all()
    shown = page.figures((60, 1100), found['page'])
    assert shown['times'][0] == 1 < shown['times'][1] and shown['growth']['at_most'] == 1 + growth.SLACK
    known = page.figures((60, 1100), np.array([[1., 4], [1.1, 4.4], [.9, 3.6]])) # what was measured has noise
    assert known['times'] == [1, 4] and known['growth']['exponent'] == pytest.approx(np.log(4)/np.log(1100/60))
