"The library notebooks are tests: every cell runs, and what it asserts holds"
from conftest import ROOT, run


def test_library_notebooks_run(): run('nbdev-test', 'nbs', '--n-workers', '1', cwd=ROOT)
