"The library notebooks are tests: every cell runs, and what it asserts holds"
import re

import pytest
from conftest import ROOT, run, warm

PARTS = ('tutorial', '0|1', '2|3', '4|5', 'guide|index') # how the names of pages begin


@pytest.mark.parametrize('part', PARTS)
def test_library_notebooks_run(part):
    run('nbdev-test', 'nbs', '--file-re', f'^({part})', '--n-workers', '1', cwd=ROOT, env=warm())


def test_every_page_is_in_one_part():
    for page in (ROOT/'nbs').glob('*.ipynb'):
        assert len([p for p in PARTS if re.match(p, page.stem)]) == 1, page
