"What a user sees when something is wrong"
import copy, json, multiprocessing, os, resource, shutil, signal, subprocess, sys, time, traceback
from collections import Counter
from pathlib import Path
from random import Random

import pytest, torch
from conftest import ROOT, run
from safetensors.torch import load_file, save, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from simpledeco import cli
from simpledeco.buckets import all_rows
from simpledeco.contract import calibrate, coverage
from simpledeco.study.data import load_examples
from simpledeco.head import TemperatureHead
from simpledeco.files import checksum, write_whole
from simpledeco.model import fingerprint, load_model
from simpledeco.study.models import build_model
from simpledeco.scan import scan
from simpledeco.table import _mark, TokenTable
from simpledeco.study.settings import load_profile
from simpledeco.train import fit


@pytest.fixture(scope='module')
def smoke():
    p = load_profile('smoke', ROOT)
    return load_model(build_model(p.model, ROOT/'models/smoke', p.sha256))


@pytest.mark.parametrize('key, value, message',
                         [('profiles', '[embeded]', 'unknown profile'), ('risk', '1.5', 'risk is 1.5'),
                          ('min_p', '0', 'min_p is 0'),
                          ('train_corpora', 'maths poems', "unknown corpus 'poems'"),
                          ('steps', 'many', "steps is 'many'")])
def test_bad_parameters_stop_before_any_work(tmp_path, key, value, message):
    for name in ('settings.ini', 'params.yaml', 'data.dvc'):
        (tmp_path/name).write_text((ROOT/name).read_text())
    lines = [f'{key}: {value}' if l.startswith(f'{key}:') else l
             for l in (ROOT/'params.yaml').read_text().splitlines()]
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
FED = int(os.environ.get('SIMPLEDECO_EXAMPLES', 30)) # bad inputs of each kind
COUNTS = {}


@pytest.fixture(scope='module', autouse=True)
def report():
    yield
    print('\nfaults by outcome:', json.dumps(COUNTS))
    if KILLS > 10: (ROOT/'benchmarks/faults.json').write_text(json.dumps(COUNTS, indent=1) + '\n')


BRIEF = ['arithmetic', 'facts', 'trivia', 'funfacts'] # corpora of short texts


def scanning(out):
    examples = load_examples(ROOT, 2, ['maths', 'chat', *BRIEF])
    scan(*load_model(ROOT/'models/smoke'), examples, out/'table', shard_examples=4, progress=False)


def training(out):
    fit(TokenTable(out.parent/'whole/table'), steps=60, width=16).save_pretrained(out/'head')


def evaluating(out):
    table = TokenTable(out.parent/'whole/table')
    head = TemperatureHead.from_pretrained(out.parent/'whole/head')
    result = dict(calibrated=coverage(calibrate(head, table, .3), table, bootstrap=300),
                  plain=coverage(head, table, bootstrap=300))
    (out/'coverage.json').write_text(json.dumps(result))


def answering(out):
    "Ask, judge and scan, as the command does; whatever a kill leaves is no table of reference text"
    if (out/'answers').exists(): trained(out)
    asked = out.parent/'asked.jsonl'
    questions = [dict(split='train', messages=[dict(role='user', content=f'Tell me about {i}.')]) for i in range(40)]
    if not asked.exists(): write_whole(asked, lambda tmp: tmp.write_text('\n'.join(map(json.dumps, questions))))
    cli.answer(str(ROOT/'models/smoke'), out/'answers', [str(asked)], samples=4, max_new_tokens=16)


def trained(out):
    "Train on what there is: a head of judged answers, or a refusal that says what to do"
    try: cli.train(out/'answers', out/'head', steps=2)
    except (ValueError, OSError) as e: assert 'scan' in str(e) or 'run `simpledeco answer` again' in str(e), e
    else: assert TemperatureHead.from_pretrained(out/'head').reads == 'hidden'


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


# a server that has imported everything already, models and all, starts each process, so that a kill
# costs what the work costs
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['simpledeco.contract', 'simpledeco.onpolicy', 'simpledeco.study.data', 'simpledeco.study.models'])


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


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob('*')) if p.is_file() and p.suffix not in ('.lock', '.txt')}


@pytest.fixture(scope='module')
def whole(tmp_path_factory, smoke):
    "What undisturbed runs give, and how long each takes"
    folder, seconds = tmp_path_factory.mktemp('faults'), {}
    for work in (scanning, training, evaluating, answering):
        begin = time.time()
        assert finish(work, folder/'whole') == 0
        seconds[work] = time.time() - begin
    return folder, seconds


@pytest.mark.parametrize('work, made', [(scanning, 'table'), (training, 'head'), (evaluating, 'coverage.json'),
                                        (answering, 'answers')])
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
            for file,data in contents(out).items():
                assert file.endswith('.tmp') or data == good[file], file
        if p.exitcode == 0: shutil.rmtree(out); window *= .8 # too late: again from nothing, and sooner
    assert finish(work, out) == 0
    mine, good = ({k: v for k,v in x.items() if k.split('/')[0] == made} for x in (contents(out), good))
    assert mine == good and mine, 'the same files with the same bytes'
    COUNTS[name] = dict(count, files=len(mine), bytes_equal=True)


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
    """No file may grow beyond a limit: the scan stops at a shard, names it, leaves no half of it,
    and goes on when there is room"""
    assert finish(small_files, tmp_path/'x') == 1
    said = (tmp_path/'x/error.txt').read_text()
    assert 'cannot write' in said and 'shard-00000.safetensors' in said and 'free some space' in said
    assert [x.name for x in (tmp_path/'x/table').iterdir()] == ['table.json']
    assert finish(scanning, tmp_path/'x') == 0


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which('mount'), reason='a small disk needs root')
def test_a_disk_that_fills_up(tmp_path, smoke):
    "A real file system of one megabyte"
    (disk := tmp_path/'disk').mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', disk]).returncode:
        pytest.skip('mounting is not allowed here')
    try:
        with pytest.raises(OSError, match=r'cannot write .*shard-0000\d.safetensors .*free some space'):
            scan(*smoke, load_examples(ROOT, 3), disk/'t', shard_examples=4, progress=False)
        assert not list((disk/'t').glob('*.tmp')) and len(list((disk/'t').glob('*.safetensors'))) >= 1
        kept = contents(disk/'t')
        subprocess.run(['mount', '-o', 'remount,size=64m', disk], check=True)
        scan(*smoke, load_examples(ROOT, 3), disk/'t', shard_examples=4, progress=False).verify()
        assert kept.items() <= contents(disk/'t').items(), 'what was finished was kept'
    finally: subprocess.run(['umount', disk])


def test_damaged_tables_are_named_and_repaired(tmp_path, smoke):
    """Every kind of damage to a shard is found, said with the name of the file, and cured by what
    the message says"""
    examples = load_examples(ROOT, 1, BRIEF)
    again = lambda: scan(*smoke, examples, tmp_path/'t', shard_examples=4, progress=False)
    again(); good, shard = contents(tmp_path/'t'), tmp_path/'t/shard-00001.safetensors'
    data, random = good[shard.name], Random(0)
    flipped = bytearray(data); flipped[len(data)//2] ^= 1
    damaged = [data[:random.randrange(len(data))]
               for _ in range(20)] + [b'', bytes(len(data)), bytes(flipped)]
    for bad in damaged:
        shard.write_bytes(bad)
        with pytest.raises(ValueError, match='shard-00001.safetensors is .*delete it and scan again'):
            again().verify()
        shard.unlink(); again().verify()
        assert contents(tmp_path/'t') == good
    shard.unlink()
    with pytest.raises(ValueError, match='shard-00001.safetensors is missing'): TokenTable(tmp_path/'t')
    (tmp_path/'t/table.json').write_text(good['table.json'].decode()[:100])
    with pytest.raises(ValueError, match='table.json is corrupt'): TokenTable(tmp_path/'t')


@pytest.mark.parametrize('change', [dict(shard_examples=9), dict(batch_tokens=100),
                                    dict(max_tokens=50)], ids=str)
def test_other_settings_never_mix(tmp_path, smoke, change):
    examples = load_examples(ROOT, 1, ['arithmetic', 'facts'])
    scan(*smoke, examples, tmp_path/'t', progress=False)
    before = contents(tmp_path/'t')
    with pytest.raises(ValueError, match='holds a scan with another .*nothing was overwritten'):
        scan(*smoke, examples, tmp_path/'t', progress=False, **change)
    with pytest.raises(ValueError, match='another tokens, text, examples'):
        scan(*smoke, examples[:-1], tmp_path/'t', progress=False)
    assert contents(tmp_path/'t') == before


@pytest.mark.parametrize('gaps, words', [(float('nan'), 'not finite'), (float('inf'), 'not finite'),
                                         (1., 'all gaps are equal')])
def test_a_head_is_not_trained_on_nonsense(tmp_path, smoke, gaps, words):
    table = scan(*smoke, load_examples(ROOT, 3, ['arithmetic']), tmp_path/'t', progress=False)
    table._columns.update(z_max=torch.full_like(table['z_max'], gaps),
                          z_true=torch.zeros_like(table['z_true']))
    with pytest.raises(ValueError, match=words): fit(table, steps=1)


def test_nothing_is_left_when_a_scan_fails(tmp_path, smoke):
    model, tokenizer = smoke
    long = [dict(id='long', corpus='x', split='train', group='g',
                 messages=[dict(role='user', content='hi'),
                           dict(role='assistant', content='word '*3000)])]
    with pytest.raises(ValueError, match="example long has .* tokens but the model's context is 2048"):
        scan(model, tokenizer, long, tmp_path/'t')
    assert not (tmp_path/'t').exists()


def test_a_head_needs_conversations_to_learn_from(tmp_path, smoke):
    table = scan(*smoke, load_examples(ROOT, 1, ['arithmetic']), tmp_path/'t', progress=False)
    with pytest.raises(ValueError, match='too few conversations'): fit(table, steps=1)


def test_a_model_without_chat_template(tmp_path, smoke):
    model, tokenizer = smoke
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(ValueError, match='no chat template'):
            scan(model, tokenizer, load_examples(ROOT, 1), tmp_path/'t')
    finally: tokenizer.chat_template = template


def test_import_is_quick_and_light():
    code = ('import sys, time; t = time.time(); import simpledeco; assert '
            'time.time() - t < 1; assert "torch" not in sys.modules')
    run(sys.executable, '-c', code, cwd=ROOT)


# what strangers give: each bad input ends in the right result or in a message of ours; none is
# silent, none comes from the depths

def outcome(work, good):
    "right, named, silent (another result without a word) or deep (an error that is not ours)"
    try: return 'right' if work() == good else 'silent'
    except (ValueError, OSError) as e:
        last = Path(traceback.extract_tb(e.__traceback__)[-1].filename)
        return 'named' if ROOT/'simpledeco' in last.parents and len(str(e)) > 15 else f'deep: {type(e).__name__} {e}'
    except Exception as e: return f'deep: {type(e).__name__} {e}'


def damage(path, random):
    "Something that may have happened to a file"
    data, at = bytearray(path.read_bytes()), random.randrange(max(1, path.stat().st_size))
    kind = random.choice(['flip', 'flip', 'flip', 'cut', 'zeros', 'longer', 'gap', 'empty', 'pipe',
                          'folder', 'gone'])
    if kind == 'flip': data[at] ^= 1 << random.randrange(8)
    if kind == 'zeros': data[at:at+64] = bytes(len(data[at:at+64]))
    if kind == 'gap': del data[at:at+8]
    changed = dict(cut=data[:at], longer=data + b'xyz', empty=b'').get(kind, data)
    path.unlink()
    if kind == 'pipe': os.mkfifo(path)
    elif kind == 'folder': path.mkdir()
    elif kind != 'gone': path.write_bytes(changed)


def remove(path): shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def count(name, outcomes):
    COUNTS[name] = dict(Counter(x.split(':')[0] for x in outcomes), inputs=len(outcomes))
    wrong = [x for x in outcomes if x not in ('right', 'named')]
    assert not wrong, wrong[:5]


def feed(name, folder, files, work, change=damage):
    "Damage one of the files again and again, do the work, and count what came of it"
    good, kept, found = work(), {f: (folder/f).read_bytes() for f in files}, []
    for i in range(FED):
        random = Random(i)
        file = folder/random.choice(files)
        change(file, random)
        found.append(outcome(work, good))
        remove(file); file.write_bytes(kept[file.name])
    count(name, found)


def state(head): return {k: v.tolist() for k,v in head.state_dict().items()}


JUNK = (None, True, -1, 0, 1, 2**70, .5, -3., float('nan'), float('inf'), '', 'x', [], [1], {},
        dict(a=1))

def change_json(path, random):
    "Another value somewhere, or a key less, or one more, or another kind of file"
    tree = json.loads(path.read_text())
    at = (tree['examples'][random.randrange(len(tree['examples']))] if 'examples' in tree
          and random.random() < .3 else tree)
    key = random.choice(list(at))
    if random.random() < .2: del at[key]
    else: at[key if random.random() < .9 else 'new'] = random.choice(JUNK)
    path.write_text(json.dumps(random.choice([tree]*8 + [[tree], None])))


@pytest.fixture(scope='module')
def tabled(tmp_path_factory, smoke):
    "A small table of four shards"
    folder = tmp_path_factory.mktemp('fed')/'t'
    scan(*smoke, load_examples(ROOT, 3, ['arithmetic', 'facts']), folder, shard_examples=5,
         progress=False)
    return folder


def work_on(folder):
    "What train and calibrate do with a table"
    head = fit(TokenTable(folder), steps=2, width=0, reads='both', select=all_rows)
    return state(head) | dict(calibrated=calibrate(head, TokenTable(folder), .5).offset.item())


def test_fed_with_damaged_tables(tabled):
    feed('fed: files of a table', tabled, [p.name for p in sorted(tabled.iterdir())],
         lambda: work_on(tabled))


def test_fed_with_another_table_json(tabled):
    feed('fed: table.json', tabled, ['table.json'], lambda: work_on(tabled), change_json)


def test_fed_with_damaged_heads(tmp_path):
    TemperatureHead(8, width=4, reads='both', record=dict(model='x')).save_pretrained(tmp_path/'h')
    load = lambda: state(TemperatureHead.from_pretrained(tmp_path/'h'))
    feed('fed: weights of a head', tmp_path/'h', ['model.safetensors'], load)


def test_fed_with_other_configurations_of_a_head(tmp_path):
    "A configuration may be another one; it may not be an impossible one"
    TemperatureHead(8, width=4, reads='both', base_model='x').save_pretrained(tmp_path/'h')
    def load():
        head = TemperatureHead.from_pretrained(tmp_path/'h')
        T = head.temperature(torch.randn(50, 21))
        assert (0 < head.t_min < head.t_max < float('inf') and 0 < head.min_p < 1
                and 0 < head.risk < 1), 'silent'
        return bool(torch.isfinite(T).all() and (T > 0).all())
    feed('fed: config.json of a head', tmp_path/'h', ['config.json'], load, change_json)


def forge(path, change):
    "A shard with other values and the checksums that belong to them"
    columns, info = load_file(path), json.loads((path.parent/'table.json').read_text())
    columns = {k: v.clone() for k,v in columns.items()}
    change(columns)
    said = json.dumps(dict(table=_mark(info), part=int(path.stem[-5:]),
                           crc32={k: checksum(v) for k,v in columns.items()}))
    save_file(columns, path, metadata=dict(shard=said))


FORGED = {
    'NaN log-partition': (lambda c: c['log_z'].__setitem__((0, 0), torch.nan),
                          'log_z has NaN or infinite'),
    'infinite top logit': (lambda c: c['top_logits'].__setitem__((0, 0), torch.inf),
                           'top_logits has NaN or infinite'),
    'NaN hidden state': (lambda c: c['hidden'].__setitem__((3, 1), torch.nan),
                         'hidden has NaN or infinite'),
    'unsorted': (lambda c: c.update(top_logits=c['top_logits'].flip(1).contiguous()),
                 'top_logits is not sorted'),
    'rank 0': (lambda c: c['rank'].__setitem__(0, 0), 'rank has values below 1'),
    'examples of another shard': (lambda c: c['example'].add_(5), 'example is not in the order'),
    'rows shuffled': (lambda c: c.update(example=c['example'].flip(0).contiguous()),
                      'example is not in the order'),
    'above the top': (lambda c: c['z_true'].add_(100), 'likelier than the likeliest'),
    'a column less': (lambda c: c.pop('rank'), 'other columns than table.json'),
    'another type': (lambda c: c.update(hidden=c['hidden'].half()), 'other columns than table.json'),
    'narrower': (lambda c: c.update(top_logits=c['top_logits'][:, :64].contiguous()),
                 'other columns than table.json'), }

@pytest.mark.parametrize('name', FORGED)
def test_a_right_checksum_on_wrong_values(tabled, tmp_path, name):
    folder = shutil.copytree(tabled, tmp_path/'t')
    change, words = FORGED[name]
    forge(folder/'shard-00001.safetensors', change)
    def everything():
        table = TokenTable(folder)
        table.verify(); table['gap']
    with pytest.raises(ValueError, match=words): everything()
    with pytest.raises(ValueError, match=words): work_on(folder); everything()


def test_shards_and_table_json_belong_together(tabled, tmp_path):
    "Two shards change places; the conversations are in another order; a shard is from another table"
    swapped, file = shutil.copytree(tabled, tmp_path/'a'), 'shard-0000{}.safetensors'
    for old,new in ((0, 'x'), (1, 0), ('x', 1)):
        (swapped/file.format(old)).rename(swapped/file.format(new))
    with pytest.raises(ValueError,
                       match='shard-00000.safetensors is number 1 under the name of number 0'):
        TokenTable(swapped)
    turned = shutil.copytree(tabled, tmp_path/'b')
    info = json.loads((turned/'table.json').read_text())
    (turned/'table.json').write_text(json.dumps(dict(info, examples=info['examples'][::-1])))
    with pytest.raises(ValueError, match='is not of this table.json, or table.json was changed'):
        TokenTable(turned)


def test_a_table_of_another_version_is_refused_by_name(tabled, tmp_path, smoke):
    for i,change in enumerate((lambda x: x.pop('schema'), lambda x: x['schema'].update(version=0),
                               lambda x: x['schema']['columns'].pop('rank'))):
        old = shutil.copytree(tabled, tmp_path/str(i))
        info = json.loads((old/'table.json').read_text())
        change(info)
        (old/'table.json').write_text(json.dumps(info))
        with pytest.raises(ValueError, match='another version of simpledeco.*scan again'):
            TokenTable(old)
        with pytest.raises(ValueError, match='another version of simpledeco.*scan again'):
            scan(*smoke, load_examples(ROOT, 3, ['arithmetic', 'facts']), old, shard_examples=5,
                 progress=False)


KINDS = ('llama', 'qwen3', 'gpt2', 'gpt_neox', 'mistral', 'phi', 'gemma2')

@pytest.mark.parametrize('kind', KINDS)
def test_a_fingerprint_sees_every_weight_and_no_number_type(kind):
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=16, vocab_size=300, pad_token_id=0)
    if kind == 'gpt2': small = dict(n_embd=32, n_layer=2, n_head=2, vocab_size=300)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small))
    model.init_weights()
    for p in model.parameters(): p.data.add_(torch.randn_like(p)*.02)
    mark = fingerprint(model)
    for dtype in (torch.bfloat16, torch.float16):
        assert fingerprint(copy.deepcopy(model).to(dtype)) == mark
    for name,p in model.named_parameters():
        kept = p.data.clone()
        for change in (lambda: p.data.neg_(), lambda: p.data.mul_(2),
                       lambda: p.data.copy_(torch.randn_like(p))):
            change()
            assert fingerprint(model) != mark, name
            p.data.copy_(kept)
    assert fingerprint(model) == mark


def test_a_scan_is_not_resumed_with_another_body(tmp_path, smoke):
    model, tokenizer = smoke
    examples = load_examples(ROOT, 1, ['arithmetic'])
    scan(model, tokenizer, examples, tmp_path/'t', progress=False)
    other = copy.deepcopy(model)
    other.model.layers[1].mlp.up_proj.weight.data.mul_(-1) # the embeddings stay
    with pytest.raises(ValueError, match='another model'):
        scan(other, tokenizer, examples, tmp_path/'t', progress=False)


BROKEN = [dict(t_min=-3.), dict(t_min=0.), dict(t_min=2., t_max=1.), dict(t_min=1., t_max=1.),
          dict(t_max=float('nan')), dict(t_max=float('inf')), dict(t_max='10'), dict(width=-1),
          dict(width=60_000_000), dict(width=5), dict(width=1.5), dict(width='4'), dict(hidden_size=0),
          dict(hidden_size=9), dict(hidden_size=True), dict(min_p=0), dict(min_p='x'), dict(risk=2),
          dict(reads='all'), dict(reads=['both']), dict(base_model=3), dict(record=[])]

@pytest.mark.parametrize('change', BROKEN, ids=str)
def test_a_head_of_an_impossible_configuration(tmp_path, change):
    TemperatureHead(8, width=4, reads='both').save_pretrained(tmp_path/'h')
    config = json.loads((tmp_path/'h/config.json').read_text())
    (tmp_path/'h/config.json').write_text(json.dumps(config | change))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError): TemperatureHead.from_pretrained(tmp_path/'h')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, 'memory in kB'


def test_a_head_of_nan_is_neither_written_nor_read(tmp_path):
    head = TemperatureHead(8)
    head.net[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match='net.0.weight of the head is NaN or infinite'):
        head.save_pretrained(tmp_path/'h')
    head.net[0].weight.data[0, 0] = 0
    head.save_pretrained(tmp_path/'h')
    for k,v in (('offset', torch.inf), ('std', 0.), ('std', torch.nan)):
        bad = dict(load_file(tmp_path/'h/model.safetensors'))
        bad[k] = torch.full_like(bad[k], v)
        shutil.copytree(tmp_path/'h', tmp_path/'bad', dirs_exist_ok=True)
        (tmp_path/'bad/model.safetensors').write_bytes(save(bad))
        with pytest.raises(ValueError, match=k): TemperatureHead.from_pretrained(tmp_path/'bad')


def test_a_named_pipe_does_not_hang(tmp_path, tabled):
    TemperatureHead(8).save_pretrained(tmp_path/'h')
    table = shutil.copytree(tabled, tmp_path/'t')
    for file,work in ((tmp_path/'h/model.safetensors',
                       lambda: TemperatureHead.from_pretrained(tmp_path/'h')),
                      (tmp_path/'h/config.json', lambda: TemperatureHead.from_pretrained(tmp_path/'h')),
                      (table/'shard-00000.safetensors', lambda: TokenTable(table)),
                      (table/'table.json', lambda: TokenTable(table))):
        kept = file.read_bytes()
        file.unlink(); os.mkfifo(file)
        with pytest.raises(ValueError, match='named pipe'): work()
        file.unlink(); file.write_bytes(kept)


@pytest.mark.parametrize('umask', [0o022, 0o002, 0o077])
def test_files_are_for_whom_the_umask_says(tmp_path, smoke, umask):
    old = os.umask(umask)
    try:
        scan(*smoke, load_examples(ROOT, 1, ['arithmetic']), tmp_path/'t', progress=False)
        TemperatureHead(8).save_pretrained(tmp_path/'h')
    finally: os.umask(old)
    for p in [*(tmp_path/'t').iterdir(), *(tmp_path/'h').iterdir()]:
        assert p.stat().st_mode & 0o777 == 0o666 & ~umask, p


def test_what_a_kill_left_is_swept_away(tmp_path, smoke):
    examples = load_examples(ROOT, 1, ['arithmetic'])
    scan(*smoke, examples, tmp_path/'t', progress=False)
    TemperatureHead(8).save_pretrained(tmp_path/'h')
    before = contents(tmp_path)
    for name in ('t/.tmpAb12Cd', 't/shard-00000.safetensors.77.tmp', 'h/.tmpAb12Cd',
                 'h/model.safetensors.77.tmp'):
        (tmp_path/name).write_bytes(b'x')
    scan(*smoke, examples, tmp_path/'t', progress=False)
    torch.manual_seed(0)
    TemperatureHead(8).save_pretrained(tmp_path/'h')
    assert set(contents(tmp_path)) == set(before)


def test_a_clone_that_translates_line_ends_has_the_same_bytes(clone, tmp_path):
    "git on Windows sets core.autocrlf"
    run('git', '-c', 'core.autocrlf=true', 'clone', '-q', clone, tmp_path/'c', cwd=tmp_path)
    names = run('git', 'ls-files', cwd=clone).stdout.splitlines()
    assert len(names) > 100
    assert not [n for n in names if (tmp_path/'c'/n).read_bytes() != (clone/n).read_bytes()]
    assert not run('git', 'status', '--porcelain', cwd=tmp_path/'c').stdout


def test_an_ascii_locale_reads_and_writes_the_same(tmp_path):
    "Notebooks, metrics and sections have letters beyond ASCII"
    shutil.copy(ROOT/'nbs/01_loss.ipynb', tmp_path/'a.ipynb')
    cell = dict(cell_type='markdown', id='a', metadata={}, source='ρ é 漢')
    (tmp_path/'b.ipynb').write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4,
                                                    nbformat_minor=5), ensure_ascii=False),
                                    encoding='utf-8')
    plain = ('env', 'LC_ALL=C', 'PYTHONUTF8=0', 'PYTHONCOERCECLOCALE=0')
    run(*plain, sys.executable, '-m', 'simpledeco.study.paper', tmp_path/'a.ipynb',
        tmp_path/'b.ipynb', '--readme', tmp_path/'b.ipynb', tmp_path/'R.md', cwd=ROOT)
    assert 'ρ é 漢' in (tmp_path/'b.ipynb').read_text(encoding='utf-8')
    assert 'ρ é 漢' in (tmp_path/'R.md').read_text(encoding='utf-8')
    assert (tmp_path/'a.ipynb').read_bytes() == (ROOT/'nbs/01_loss.ipynb').read_bytes()
