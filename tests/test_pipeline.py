"The real pipeline, in the smoke profile, in a clone, from nothing to the PDF"
import json, re

import pytest, yaml
from conftest import run, warm
from pypdf import PdfReader

from simpledeco.study.pipeline import SUMMARY


def set_params(folder, **values):
    path = folder/'params.yaml'
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


@pytest.fixture(scope='module')
def finished(clone):
    """The clone after one `dvc repro`: every stage, with a hundred steps, so that a head has had
    the time to move"""
    set_params(clone, profiles=['smoke'], steps=100, bootstrap=50, width=16)
    (clone/'dvc.lock').unlink() # of other profiles: DVC reads and writes the whole of it at each stage
    run('python', '-m', 'simpledeco.study.data', cwd=clone)
    done = run('dvc', 'repro', cwd=clone, env=warm())
    run('git', 'commit', '-qam', 'smoke', cwd=clone)
    return clone, done.stdout


def test_pipeline_ends_in_a_paper(finished):
    folder, _ = finished
    text = '\n'.join(p.extract_text() for p in PdfReader(folder/'paper/main.pdf').pages)
    for words in ('Introduction', 'References', 'Koenker', 'Limitations'): assert words in text
    assert '??' not in text
    tokens = json.loads((folder/'results/embedded/prescan.json').read_text())['tokens']
    assert f'{tokens:,}' in text, 'the PDF shows the numbers of the profile that it cites'
    log = (folder/'paper/main.log').read_text(errors='replace')
    assert 'undefined' not in log
    last = re.search(r'newlabel\{lastpage\}\{\{[^}]*\}\{(\d+)\}', (folder/'paper/main.aux').read_text())[1]
    assert int(last) <= 9, 'the main text has at most nine pages, references and appendix after it'
    wide = [float(x) for x in re.findall(r'Overfull .hbox .([\d.]+)pt', log)]
    assert not [x for x in wide if x > 3], 'a line or a table is wider than the text'


def test_the_bundle_for_arxiv_needs_pdflatex_alone(finished, tmp_path):
    folder, _ = finished
    run('make', '-o', 'paper', 'arxiv', cwd=folder)
    run('tar', 'xzf', folder/'build/arxiv.tar.gz', cwd=tmp_path)
    assert not [p for p in tmp_path.rglob('*') if p.suffix in ('.aux', '.bib', '.log')]
    for _ in range(3): run('pdflatex', '-interaction=nonstopmode', '-halt-on-error', 'main.tex', cwd=tmp_path)
    ours, bundled = ([p.extract_text() for p in PdfReader(x/'main.pdf').pages] for x in (folder/'paper', tmp_path))
    assert bundled == ours


def test_second_run_does_nothing(finished):
    folder, _ = finished
    before = {p: p.stat().st_mtime_ns
              for p in folder.rglob('*') if p.is_file() and not {'.git', '.dvc'} & set(p.parts)}
    done = run('dvc', 'repro', cwd=folder)
    assert 'Running stage' not in done.stdout and 'up to date' in done.stdout
    assert before == {p: p.stat().st_mtime_ns for p in before}
    # the long profile has a pipeline of its own, which is run by hand
    assert json.loads(run('dvc', 'status', '--json', 'dvc.yaml', 'data.dvc', cwd=folder).stdout) == {}


def test_running_again_gives_the_same_bytes(finished):
    "Executed notebooks are normalised, training is deterministic, and a kernel that starts cold does what a warm one did"
    folder, _ = finished
    files = [folder/'build/smoke/evaluate.ipynb', folder/'results/smoke/evaluate.json',
             folder/'paper/figures/smoke/v_curve.pdf', *(folder/'heads/smoke/logits-mix').iterdir()]
    before = {p: p.read_bytes() for p in files}
    run('dvc', 'repro', '--force', '--single-item', 'train@smoke', 'evaluate@smoke',
        'figures@smoke', cwd=folder)
    for p in files: assert p.read_bytes() == before[p], p


def test_metrics_and_plots_are_declared(finished):
    folder, _ = finished
    metrics = json.loads(run('dvc', 'metrics', 'show', '--json', cwd=folder).stdout)
    assert list(metrics['']['data']) == ['results/summary.json']
    found, stage = metrics['']['data']['results/summary.json']['data'], json.loads((folder/'results/smoke/evaluate.json').read_text())
    assert 8 <= len(found) and set(found) <= set(SUMMARY) and found['true tokens kept'] == stage['in_domain']['kept']['mean']
    run('dvc', 'plots', 'show', '-o', 'build/plots', cwd=folder)
    assert 'v_curve' in (folder/'build/plots/index.html').read_text()


def test_an_experiment_moves_the_coverage(finished):
    folder, _ = finished
    kept = lambda: json.loads(
        (folder/'results/smoke/evaluate.json').read_text())['in_domain']['kept']['mean']
    before = kept()
    run('dvc', 'exp', 'run', '-S', 'risk=0.6', 'evaluate@smoke', cwd=folder, env=warm())
    assert kept() < before - .02
    assert 'risk' in run('dvc', 'params', 'diff', cwd=folder).stdout


def test_an_experiment_that_changes_the_answers_scans_them_again(finished):
    folder, _ = finished
    said = lambda: [x['messages'][-1]['content']
                    for x in json.loads((folder/'answers/smoke/examples.json').read_text())]
    before = said()
    run('dvc', 'exp', 'run', '-S', 'seed=7', 'answers@smoke', cwd=folder, env=warm())
    assert said() != before
    scanned = json.loads((folder/'answers/smoke/tokens/table.json').read_text())
    assert scanned['tokens'] > 0 and len(scanned['examples']) == len(before)


def test_a_second_model_stands_beside_the_first(finished):
    """It has another vocabulary and another hidden size; neither overwrites the other, and what its
    results allow is drawn for it too"""
    folder, _ = finished
    before = {p: p.read_bytes() for p in (folder/'results/smoke').iterdir()}
    set_params(folder, profiles=['smoke', 'smoke-other'])
    run('dvc', 'repro', 'evaluate@smoke-other', cwd=folder, env=warm())
    run('python', '-m', 'simpledeco.study.pipeline', 'run', 'figures', 'smoke-other', cwd=folder, env=warm())
    found = [json.loads((folder/f'results/{name}/prescan.json').read_text())
             for name in ('smoke', 'smoke-other')]
    assert [(x['vocabulary'], x['hidden_size']) for x in found] == [(49152, 32), (3000, 48)]
    assert before == {p: p.read_bytes() for p in before}
    for kind, names in (('figures', {'v_curve.pdf', 'auroc.pdf', 'tradeoff.pdf'}),
                        ('tables', {'kept.tex', 'loss.tex', 'corpora.tex', 'decoders.tex'})):
        one, other = ({f.name: f.read_bytes() for f in (folder/f'paper/{kind}/{name}').iterdir()}
                      for name in ('smoke', 'smoke-other'))
        assert names <= other.keys() <= one.keys()
        assert all(one[k] != other[k] for k in names - {'decoders.tex'})
    run('git', 'checkout', 'params.yaml', cwd=folder)
