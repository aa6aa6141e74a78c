"""Two processes write one table; it is the table of a single process, byte for byte.

`accelerate launch` starts torchrun on GPUs, but a single process on a CPU; so torchrun is called
here."""
import sys

import pytest
from conftest import ROOT, run

from simpledeco.study.data import load_examples
from simpledeco.model import load_model
from simpledeco.study.models import build_model
from simpledeco.scan import scan
from simpledeco.table import TokenTable
from simpledeco.study.settings import load_profile

BRIEF = ['arithmetic', 'chat', 'facts', 'trivia'] # corpora of short texts
SCAN = '''
import sys, torch
from pathlib import Path
from simpledeco.study.data import load_examples
from simpledeco.model import load_model
from simpledeco.scan import scan
root, out = map(Path, sys.argv[1:3])
torch.set_num_threads(1)
model, tokenizer = load_model(root/'models/smoke')
again = lambda n: scan(model, tokenizer, load_examples(root, 2, sys.argv[3:]), out, shard_examples=n, progress=False)
sys.stdout.write(f'rows {len(again(4))}\\n') # in one piece: the two processes share one pipe
try: again(5) # a mistake that only the first process can see
except ValueError as e: sys.exit(f'simpledeco: {e}')
'''


def contents(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_two_processes_make_the_table_of_one(tmp_path):
    smoke = load_profile('smoke', ROOT)
    folder = build_model(smoke.model, ROOT/'models/smoke', smoke.sha256)
    table = scan(*load_model(folder), load_examples(ROOT, 2, BRIEF), tmp_path/'one', shard_examples=4, progress=False)
    (tmp_path/'run.py').write_text(SCAN)
    done = run('torchrun', '--standalone', '--nproc_per_node', '2', tmp_path/'run.py', ROOT, tmp_path/'two', *BRIEF,
               cwd=ROOT, check=False, timeout=300)
    assert contents(tmp_path/'one') == contents(tmp_path/'two') and len(contents(tmp_path/'one')) > 6, done.stderr
    assert done.stdout.count(f'rows {len(table)}') == 2, 'both processes got the whole table'
    assert done.returncode and done.stderr.count('holds a scan with another shard_examples') >= 2, 'a mistake stops both'


def test_a_model_spread_by_a_device_map_gives_the_same_table(tmp_path):
    """device = auto goes through accelerate's hooks; on a machine without a GPU they put everything
    on the CPU"""
    smoke = load_profile('smoke', ROOT)
    folder = build_model(smoke.model, ROOT/'models/smoke', smoke.sha256)
    examples = load_examples(ROOT, 1, BRIEF)
    for device in ('cpu', 'auto'):
        scan(*load_model(folder, device=device), examples, tmp_path/device, progress=False)
    a, b = TokenTable(tmp_path/'cpu'), TokenTable(tmp_path/'auto')
    assert a.info == b.info and (a['rank'] == b['rank']).all()
    assert (a['z_true'] - b['z_true']).abs().max() < 1e-3


RANKS = dict(RANK='0', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT='29577')

@pytest.mark.parametrize('left', [[], ['RANK'], ['RANK', 'LOCAL_RANK', 'MASTER_ADDR']], ids=str)
def test_a_world_size_that_was_left_behind(left):
    "Refused at once, and not after days of waiting for processes that nobody started"
    code = 'from simpledeco.scan import processes; processes()'
    done = run('env', 'WORLD_SIZE=2', *(f'{k}={RANKS[k]}' for k in left), sys.executable, '-c',
               code, cwd=ROOT, check=False, timeout=120)
    assert done.returncode == 1 and 'ValueError: WORLD_SIZE is 2 but' in done.stderr
    assert 'unset WORLD_SIZE' in done.stderr


def test_processes_that_never_come_are_not_waited_for():
    code = ('from datetime import timedelta; from simpledeco import scan; '
            'scan.COME = timedelta(seconds=3); scan.processes()')
    done = run('env', 'WORLD_SIZE=2', *(f'{k}={v}' for k,v in RANKS.items()), sys.executable, '-c',
               code, cwd=ROOT, check=False, timeout=120)
    assert done.returncode == 1 and 'OSError: process 0 of 2 does not find the others' in done.stderr
