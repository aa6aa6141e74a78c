"What a user sees when something is wrong"
import os, signal, subprocess, sys

import pytest
from conftest import ROOT, run

from simpledeco.data import load_examples
from simpledeco.model import build_model, load_model
from simpledeco.prescan import scan
from simpledeco.settings import load_profile
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
    done = run(sys.executable, '-m', 'simpledeco.data', cwd=tmp_path, check=False)
    assert done.returncode == 1 and message in done.stderr and 'Traceback' not in done.stderr
    assert not (tmp_path/'data').exists()


def test_an_unknown_parameter_is_named(tmp_path):
    for name in ('settings.ini', 'data.dvc'): (tmp_path/name).write_text((ROOT/name).read_text())
    (tmp_path/'params.yaml').write_text((ROOT/'params.yaml').read_text() + 'temprature: 1\n')
    done = run(sys.executable, '-m', 'simpledeco.data', cwd=tmp_path, check=False)
    assert done.returncode == 1 and 'temprature' in done.stderr


def test_killed_scan_resumes_to_the_same_bytes(tmp_path, smoke):
    "kill -9 in the middle of a scan, again and again, until it is through"
    model, tokenizer = smoke
    examples = load_examples(ROOT, 3)
    whole = scan(model, tokenizer, examples, tmp_path/'whole', shard_examples=4, progress=False)
    script = (f'from simpledeco.model import load_model; from simpledeco.data import load_examples; from simpledeco.prescan import scan; from pathlib import Path\n'
              f'm, t = load_model({str(ROOT/"models/smoke")!r}); print("go", flush=True)\n'
              f'scan(m, t, load_examples(Path({str(ROOT)!r}), 3), {str(tmp_path/"killed")!r}, shard_examples=4, progress=False)')
    kills = 0
    for delay in (.05, .15, .3, 60):
        p = subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE, cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(ROOT)))
        p.stdout.readline()
        try: p.wait(delay)
        except subprocess.TimeoutExpired:
            p.send_signal(signal.SIGKILL); p.wait(); kills += 1
        for shard in (tmp_path/'killed').glob('*.safetensors'): assert shard.read_bytes() == (tmp_path/'whole'/shard.name).read_bytes()
    assert kills and p.returncode == 0
    names = sorted(x.name for x in (tmp_path/'whole').iterdir())
    assert [(tmp_path/'killed'/n).read_bytes() for n in names] == [(tmp_path/'whole'/n).read_bytes() for n in names]


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
