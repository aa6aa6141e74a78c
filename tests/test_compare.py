"A reader's own rule, from the command line"
import sys

import pandas as pd
from conftest import ROOT, run
from pypdf import PdfReader

from simpledeco.study.models import model_folder

RULE = '''
from simpledeco.decode import tempered

def warm(step): return tempered(step.logits, step.logits.new_full((len(step.logits),), .7), min_p=.1)
'''


def compare(*words, cwd, folder):
    "The command of `make compare`, in the project, with a rule that lies elsewhere"
    env = f'PYTHONPATH={folder}'
    return run('env', env, sys.executable, '-m', 'simpledeco.study.compare', *words, cwd=cwd, check=False)


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


def test_a_rule_that_is_not_there_is_named(tmp_path):
    (tmp_path/'my_rules.py').write_text(RULE)
    done = compare('my_rules:cold', cwd=ROOT, folder=tmp_path)
    assert done.returncode == 1 and "no attribute 'cold'" in done.stderr and 'Traceback' not in done.stderr
