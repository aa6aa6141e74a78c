"A reader's own rule, from the command line"
import re
from types import SimpleNamespace

import pandas as pd, torch
from conftest import ROOT, run, warm
from pypdf import PdfReader

from simpledeco.study.models import model_folder

RULE = '''
from simpledeco.decode import tempered

def warm(step): return tempered(step.logits, step.logits.new_full((len(step.logits),), .7), min_p=.1)
'''


def compare(*words, cwd, folder):
    "The command of `make compare`, in the project, with a rule that lies elsewhere"
    env = warm() | dict(PYTHONPATH=str(folder))
    return run('python', '-m', 'simpledeco.study.compare', *words, cwd=cwd, check=False, env=env)


def test_a_rule_of_ones_own_stands_beside_the_constants(tmp_path):
    "It is one of the constants, so it must lie where that one lies"
    model_folder('smoke', ROOT)
    (tmp_path/'my_rules.py').write_text(RULE)
    done = compare('my_rules:warm', '--profile', 'smoke', cwd=ROOT, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'question mark, T = 1' in done.stdout
    found = pd.read_csv(ROOT/'build/compare/my_rules-warm.csv').set_index('method')
    same = ['accuracy', 'lo', 'hi', 'diversity']
    assert found.loc['my_rules:warm', same].tolist() == found.loc['T = 0.7', same].tolist()
    text = PdfReader(ROOT/'build/compare/my_rules-warm.pdf').pages[0].extract_text()
    assert 'my_rules:warm' in text


def test_the_rule_of_the_contributing_guide_is_cold_where_the_model_is_sure(tmp_path):
    "As it stands there, in a file of its own: greedy or at T = 1 with min-p, which is the less varied the more often it is sure"
    text = re.search(r'```python\n(# my_rules.py\n.+?)```', (ROOT/'CONTRIBUTING.md').read_text(), re.S)[1]
    (tmp_path/'my_rules.py').write_text(text)
    done = compare('my_rules:sure_is_cold', '--profile', 'smoke', cwd=ROOT, folder=tmp_path)
    assert done.returncode == 0 and 'my_rules:sure_is_cold' in done.stdout, done.stderr
    made = {}
    exec(compile(text, 'CONTRIBUTING.md', 'exec'), made)
    z = torch.tensor([[5., 0., 0., 0.], [1., .9, .8, -9.]])
    p = made['sure_is_cold'](SimpleNamespace(logits=z)).softmax(-1)
    kept = z[1].softmax(-1)*(z[1].softmax(-1) >= .1*z[1].softmax(-1).max())
    assert torch.allclose(p, torch.stack([torch.eye(4)[0], kept/kept.sum()]), atol=1e-6)


def test_a_rule_that_is_not_there_is_named(tmp_path):
    (tmp_path/'my_rules.py').write_text(RULE)
    done = compare('my_rules:cold', cwd=ROOT, folder=tmp_path)
    assert done.returncode == 1 and "no attribute 'cold'" in done.stderr and 'Traceback' not in done.stderr
