"What a user sees when something is wrong"
import json, multiprocessing, os, resource, shutil, signal, subprocess, sys, time
from random import Random

import pytest, torch
from conftest import ROOT, run

from simpledeco.contract import calibrate, coverage
from simpledeco.study.data import load_examples
from simpledeco.head import TemperatureHead
from simpledeco.model import load_model
from simpledeco.study.models import build_model
from simpledeco.scan import scan
from simpledeco.table import TokenTable
from simpledeco.study.settings import load_profile
from simpledeco.train import fit


@pytest.fixture(scope='module')
def smoke():
    p = load_profile('smoke', ROOT)
    return load_model(build_model(p.model, ROOT/'models/smoke', p.sha256))


@pytest.mark.parametrize('key, value, message', [('profile', 'embeded', 'unknown profile'), ('risk', '1.5', 'risk is 1.5'), ('min_p', '0', 'min_p is 0'),
                                                 ('train_corpora', 'maths poems', "unknown corpus 'poems'"), ('steps', 'many', "steps is 'many'")])
def test_bad_parameters_stop_before_any_work(tmp_path, key, value, message):
    for name in ('settings.ini', 'params.yaml', 'data.dvc'): (tmp_path/name).write_text((ROOT/name).read_text())
    lines = [f'{key}: {value}' if l.startswith(f'{key}:') else l for l in (ROOT/'params.yaml').read_text().splitlines()]
    (tmp_path/'params.yaml').write_text('\n'.join(lines))
    done = run(sys.executable, '-m', 'simpledeco.study.data', cwd=tmp_path, check=False)
    assert done.returncode == 1 and message in done.stderr and 'Traceback' not in done.stderr
    assert not (tmp_path/'data').exists()


def test_an_unknown_parameter_is_named(tmp_path):
    for name in ('settings.ini', 'data.dvc'): (tmp_path/name).write_text((ROOT/name).read_text())
    (tmp_path/'params.yaml').write_text((ROOT/'params.yaml').read_text() + 'temprature: 1\n')
    done = run(sys.executable, '-m', 'simpledeco.study.data', cwd=tmp_path, check=False)
    assert done.returncode == 1 and 'temprature' in done.stderr


KILLS = int(os.environ.get('SIMPLEDECO_KILLS', 2)) # of each kind; `make faults` asks for many
COUNTS = {}

def scanning(out): scan(*load_model(ROOT/'models/smoke'), load_examples(ROOT, 2), out/'table', shard_examples=4, progress=False)


def training(out): fit(TokenTable(out.parent/'whole/table'), steps=60, width=16).save_pretrained(out/'head')


def evaluating(out):
    table, head = TokenTable(out.parent/'whole/table'), TemperatureHead.from_pretrained(out.parent/'whole/head')
    result = dict(calibrated=coverage(calibrate(head, table, .3), table, bootstrap=300), plain=coverage(head, table, bootstrap=300))
    (out/'coverage.json').write_text(json.dumps(result))


def small_files(out):
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    scanning(out)


def job(work, out, ready):
    "What a started process does; an error goes into a file"
    torch.set_num_threads(1)
    out.mkdir(exist_ok=True)
    ready.set()
    try: work(out)
    except (OSError, ValueError) as e:
        (out/'error.txt').write_text(str(e))
        sys.exit(1)


# a server that has imported everything already starts each process, so that a kill costs what the work costs
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['simpledeco.contract', 'simpledeco.scan', 'simpledeco.train'])


def start(work, out):
    "A process that is about to do the work"
    ready = SERVER.Event()
    p = SERVER.Process(target=job, args=(work, out, ready))
    p.start()
    assert ready.wait(120)
    return p


def finish(work, out):
    "The exit code of a run that is left alone"
    p = start(work, out)
    p.join(300)
    return p.exitcode


def contents(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file() and p.suffix not in ('.lock', '.txt')}


@pytest.fixture(scope='module')
def whole(tmp_path_factory, smoke):
    "What undisturbed runs give, and how long each takes"
    folder, seconds = tmp_path_factory.mktemp('faults'), {}
    for work in (scanning, training, evaluating):
        begin = time.time()
        assert finish(work, folder/'whole') == 0
        seconds[work] = time.time() - begin
    return folder, seconds


@pytest.mark.parametrize('work, made', [(scanning, 'table'), (training, 'head'), (evaluating, 'coverage.json')])
def test_killed_at_random_moments_it_ends_in_the_same_bytes(whole, work, made):
    "kill -9 at random moments, again and again; then one run to the end"
    folder, seconds = whole
    random, name, window = Random(0), work.__name__, seconds[work]
    out, good, count = folder/f'killed-{name}', contents(folder/'whole'), dict(kills=0, too_late=0)
    while count['kills'] < KILLS:
        p = start(work, out)
        p.join(random.uniform(0, window))
        p.kill(); p.join()
        count['kills' if p.exitcode else 'too_late'] += 1
        if work is scanning: # a shard that has its name is whole
            for file,data in contents(out).items(): assert file.endswith('.tmp') or data == good[file], file
        if p.exitcode == 0: shutil.rmtree(out); window *= .8 # too late: again from nothing, and sooner
    assert finish(work, out) == 0
    mine, good = ({k: v for k,v in x.items() if k.split('/')[0] == made} for x in (contents(out), good))
    assert mine == good and mine, 'the same files with the same bytes'
    COUNTS[name] = dict(count, files=len(mine), bytes_equal=True)
    if KILLS > 10: (ROOT/'benchmarks/faults.json').write_text(json.dumps(COUNTS, indent=1) + '\n')


def test_two_runs_in_one_folder(tmp_path, smoke):
    "The second is refused while the first runs, and may go on when that was killed"
    first = start(scanning, tmp_path/'x')
    while not (tmp_path/'x/table/table.json').exists(): time.sleep(.01)
    os.kill(first.pid, signal.SIGSTOP) # alive, and holding the folder
    before = contents(tmp_path/'x')
    assert finish(scanning, tmp_path/'x') == 1
    assert 'another run is writing' in (tmp_path/'x/error.txt').read_text()
    assert contents(tmp_path/'x') == before
    first.kill(); first.join()
    assert finish(scanning, tmp_path/'x') == 0
    TokenTable(tmp_path/'x/table').verify()


def test_a_full_disk_is_named_and_loses_nothing(tmp_path, smoke):
    "No file may grow beyond a limit: the scan stops at a shard, names it, leaves no half of it, and goes on when there is room"
    assert finish(small_files, tmp_path/'x') == 1
    said = (tmp_path/'x/error.txt').read_text()
    assert 'cannot write' in said and 'shard-00000.safetensors' in said and 'free some space' in said
    assert [x.name for x in (tmp_path/'x/table').iterdir()] == ['table.json']
    assert finish(scanning, tmp_path/'x') == 0


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which('mount'), reason='a small disk needs root')
def test_a_disk_that_fills_up(tmp_path, smoke):
    "A real file system of one megabyte"
    (disk := tmp_path/'disk').mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', disk]).returncode: pytest.skip('mounting is not allowed here')
    try:
        with pytest.raises(OSError, match=r'cannot write .*shard-0000\d.safetensors .*free some space'): scan(*smoke, load_examples(ROOT, 3), disk/'t', shard_examples=4, progress=False)
        assert not list((disk/'t').glob('*.tmp')) and len(list((disk/'t').glob('*.safetensors'))) >= 1
        kept = contents(disk/'t')
        subprocess.run(['mount', '-o', 'remount,size=64m', disk], check=True)
        scan(*smoke, load_examples(ROOT, 3), disk/'t', shard_examples=4, progress=False).verify()
        assert kept.items() <= contents(disk/'t').items(), 'what was finished was kept'
    finally: subprocess.run(['umount', disk])


def test_damaged_tables_are_named_and_repaired(tmp_path, smoke):
    "Every kind of damage to a shard is found, said with the name of the file, and cured by what the message says"
    examples = load_examples(ROOT, 1)
    again = lambda: scan(*smoke, examples, tmp_path/'t', shard_examples=8, progress=False)
    again(); good, shard = contents(tmp_path/'t'), tmp_path/'t/shard-00001.safetensors'
    data, random = good[shard.name], Random(0)
    flipped = bytearray(data); flipped[len(data)//2] ^= 1
    damaged = [data[:random.randrange(len(data))] for _ in range(20)] + [b'', bytes(len(data)), bytes(flipped)]
    for bad in damaged:
        shard.write_bytes(bad)
        with pytest.raises(ValueError, match='shard-00001.safetensors is .*delete it and scan again'): again().verify()
        shard.unlink(); again().verify()
        assert contents(tmp_path/'t') == good
    shard.unlink()
    with pytest.raises(ValueError, match='shard-00001.safetensors is missing'): TokenTable(tmp_path/'t')
    (tmp_path/'t/table.json').write_text(good['table.json'].decode()[:100])
    with pytest.raises(ValueError, match='table.json is corrupt'): TokenTable(tmp_path/'t')


@pytest.mark.parametrize('change', [dict(shard_examples=9), dict(batch_tokens=100), dict(max_tokens=50)], ids=str)
def test_other_settings_never_mix(tmp_path, smoke, change):
    examples = load_examples(ROOT, 1, ['arithmetic', 'facts'])
    scan(*smoke, examples, tmp_path/'t', progress=False)
    before = contents(tmp_path/'t')
    with pytest.raises(ValueError, match='holds a scan with another .*nothing was overwritten'): scan(*smoke, examples, tmp_path/'t', progress=False, **change)
    with pytest.raises(ValueError, match='another tokens, text, examples'): scan(*smoke, examples[:-1], tmp_path/'t', progress=False)
    assert contents(tmp_path/'t') == before


@pytest.mark.parametrize('gaps, words', [(float('nan'), 'not finite'), (float('inf'), 'not finite'), (1., 'all gaps are equal')])
def test_a_head_is_not_trained_on_nonsense(tmp_path, smoke, gaps, words):
    table = scan(*smoke, load_examples(ROOT, 3, ['arithmetic']), tmp_path/'t', progress=False)
    table._columns.update(z_max=torch.full_like(table['z_max'], gaps), z_true=torch.zeros_like(table['z_true']))
    with pytest.raises(ValueError, match=words): fit(table, steps=1)


def test_nothing_is_left_when_a_scan_fails(tmp_path, smoke):
    model, tokenizer = smoke
    long = [dict(id='long', corpus='x', split='train', group='g', messages=[dict(role='user', content='hi'), dict(role='assistant', content='word '*3000)])]
    with pytest.raises(ValueError, match="example long has .* tokens but the model's context is 2048"): scan(model, tokenizer, long, tmp_path/'t')
    assert not (tmp_path/'t').exists()


def test_a_head_needs_conversations_to_learn_from(tmp_path, smoke):
    table = scan(*smoke, load_examples(ROOT, 1, ['arithmetic']), tmp_path/'t', progress=False)
    with pytest.raises(ValueError, match='too few conversations'): fit(table, steps=1)


def test_a_model_without_chat_template(tmp_path, smoke):
    model, tokenizer = smoke
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(ValueError, match='no chat template'): scan(model, tokenizer, load_examples(ROOT, 1), tmp_path/'t')
    finally: tokenizer.chat_template = template


def test_import_is_quick_and_light():
    code = 'import sys, time; t = time.time(); import simpledeco; assert time.time() - t < 1; assert "torch" not in sys.modules'
    run(sys.executable, '-c', code, cwd=ROOT)
