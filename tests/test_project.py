"The parts of the project agree with each other"
import ast, re, shutil, statistics

import nbformat, pytest, yaml
from conftest import ROOT, run

from simpledeco.conversations import asks
from simpledeco.study.corpora import CORPORA
from simpledeco.study.paper import ESTIMATES, numbers_tex, paper_numbers, readme, source_of, used_numbers
from simpledeco.study.pipeline import check_pipeline, import_graph, parameters, reached
from simpledeco.study.results import check_stamp
from simpledeco.study.settings import check_params, load_params, load_profile
from simpledeco.study.texts import test_prompts as prompts_of

STAGES = yaml.safe_load((ROOT/'dvc.yaml').read_text())['stages']
PIPELINE = sorted((ROOT/'nbs/pipeline').glob('*.ipynb'))
LIBRARY = sorted((ROOT/'nbs').glob('*.ipynb'))


def sources(path): return [c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'code']


def test_package_is_what_the_notebooks_export(tmp_path):
    for name in ('nbs', 'simpledeco', 'pyproject.toml', 'README.md'):
        copy = shutil.copytree if (ROOT/name).is_dir() else shutil.copy2
        copy(ROOT/name, tmp_path/name)
    run('nbdev-export', cwd=tmp_path)
    for p in (ROOT/'simpledeco').rglob('*.py'):
        made = (tmp_path/p.relative_to(ROOT)).read_text()
        assert made == p.read_text(), f'{p.name}: run nbdev-export'


def test_readme_is_the_index_notebook():
    index = nbformat.read(ROOT/'nbs/index.ipynb', 4)
    assert readme(index) == (ROOT/'README.md').read_text(), 'run `make notebooks`'


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: p.stem)
def test_library_notebooks_show_their_results_and_no_noise(path):
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == 'code']
    assert any(c.outputs for c in cells), 'no outputs: run `make notebooks`'
    assert not [o for c in cells for o in c.outputs if o.get('name') == 'stderr'
                or o.output_type == 'error']


@pytest.mark.parametrize('path', PIPELINE, ids=lambda p: p.stem)
def test_pipeline_notebooks_are_thin_and_without_outputs(path):
    for c in nbformat.read(path, 4).cells:
        assert not c.get('outputs'), 'clear the outputs before committing'
    tree = ast.parse('\n'.join(sources(path)))
    made = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert not made, 'pipeline notebooks define nothing'
    lambdas = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Lambda)]
    long = [x for x in lambdas if len(x) > 90]
    assert not long, f'science in a lambda: {long}'


PYTHON = {name: sorted((ROOT/name).glob('*.py')) for name in ('tests', 'benchmarks')}
SOURCES = {"library pages' code": (LIBRARY, 'code'), "library pages' prose": (LIBRARY, 'markdown'),
           "stage pages' code": (PIPELINE, 'code'), "stage pages' prose": (PIPELINE, 'markdown'),
           'tests': (PYTHON['tests'], None), 'benchmarks': (PYTHON['benchmarks'], None)}


def places_of_lines(paths, kind):
    "(file, cell and number; line) of every line with something on it"
    for p in paths:
        if kind is None: texts = [('', p.read_text(encoding='utf-8'))]
        else: texts = [(c.id, c.source) for c in nbformat.read(p, 4).cells if c.cell_type == kind]
        for cell,text in texts:
            for n,line in enumerate(text.split('\n'), 1):
                if line.strip(): yield f'{p.name} {cell} line {n}', line


@pytest.mark.parametrize('name', list(SOURCES))
def test_lines_are_not_too_wide(name):
    width = {place: len(line) for place,line in places_of_lines(*SOURCES[name])}
    worst = max(width, key=width.get)
    assert width[worst] <= 140, f'{name}: {worst} has {width[worst]} characters'
    p90 = statistics.quantiles(width.values(), n=10, method='inclusive')[-1]
    assert p90 < 110, f'{name}: the 90th percentile is {p90}; the worst is {worst}, {width[worst]}'


@pytest.mark.parametrize('path', [p for p in LIBRARY if p.stem != 'index'], ids=lambda p: p.stem)
def test_library_pages_say_what_they_are_about_and_what_comes_next(path):
    title = lambda p: nbformat.read(p, 4).cells[0].source.split('\n')[0]
    cells = nbformat.read(path, 4).cells
    assert re.match(r'# .+\n\n> .+', cells[0].source), 'begin with a title and a paragraph that sums up'
    last = re.search(r'Next: \[(.+)\]\((\w+\.ipynb)\)$', cells[-1].source)
    assert last, 'end with a link to the next page'
    assert title(ROOT/'nbs'/last[2]) == f'# {last[1]}', 'the title of the next page has changed'


def test_parameters_and_profiles_are_known():
    params = check_params(load_params(ROOT), list(CORPORA))
    read = {x for path in PIPELINE for x in parameters(path)} - {'profile'}
    watched = {x for s in STAGES.values() for x in s.get('do', s).get('params', [])}
    assert read <= watched and watched == set(params) - {'profiles'}
    for name in ('embedded', 'full', 'rungs', 'rungs-gpu', 'smoke', 'smoke-other', 'hub'): load_profile(name, ROOT)


@pytest.mark.parametrize('path', PIPELINE, ids=lambda x: x.stem)
def test_no_stage_writes_down_what_is_a_parameter(path):
    "A number of params.yaml in the code of a stage would stand still when the parameter moves"
    given = {x: y for x,y in load_params(ROOT).items() if isinstance(y, float)}
    cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'code' and 'parameters' not in c.metadata.get('tags', [])]
    for node in ast.walk(ast.parse('\n'.join(cells))):
        if isinstance(node, ast.keyword) and node.arg in given:
            assert getattr(node.value, 'value', None) != given[node.arg], f'{node.arg} is written down in {path.name}'
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') in ('fit', 'fit_answers', 'fit_rungs'):
            assert {k.arg for k in node.keywords} & {None, 'min_p'}, f'{node.func.id} has a min-p of its own in {path.name}'


def test_on_valid_sets_nothing_learns_from_more_than_the_heads():
    cells = [c.source for c in nbformat.read(ROOT/'nbs/pipeline/ladder.ipynb', 4).cells if c.cell_type == 'code']
    calls = [n for n in ast.walk(ast.parse('\n'.join(cells))) if isinstance(n, ast.Call)
             and getattr(n.func, 'id', '') in ('fit_rungs', 'fit_probes', 'rated')]
    assert len(calls) == 3
    for n in calls: assert 'corpora' in [getattr(x, 'id', '') for x in [*n.args, *(k.value for k in n.keywords)]], n.func.id


def test_every_stage_watches_the_modules_that_it_uses(): check_pipeline(ROOT)


def test_the_method_never_imports_the_study():
    graph = import_graph(ROOT)
    of_study = lambda m: m.startswith('simpledeco.study')
    assert not [(m, n) for m,needs in graph.items() if not of_study(m) for n in needs if of_study(n)]
    for m in graph: assert m not in reached(graph, graph[m]), f'{m} is in a circle of imports'
    assert 'simpledeco.conversations' not in reached(graph, ['simpledeco.head'])


def test_a_head_can_be_imported_alone():
    "Neither corpora nor the reader of settings, nor the library of data sets"
    code = ('import sys, simpledeco.head; print([m for m in sys.modules if m in ("datasets", '
            '"reasoning_gym", "simpledeco.conversations") or m.startswith("simpledeco.study")])')
    assert run('python', '-c', code, cwd=ROOT).stdout.strip() == '[]'


def test_no_private_name_crosses_a_module():
    for f in (ROOT/'simpledeco').rglob('*.py'):
        tree = ast.parse(f.read_text(encoding='utf-8'))
        ours = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
        imports = [a.name for n in ours for a in n.names]
        private = [x for x in imports if x.startswith('_') and not x.startswith('__')]
        assert not private, f'{f.name} imports {private}'


def test_every_number_of_the_paper_was_produced_by_a_stage():
    made = (ROOT/'paper/numbers.tex').read_text()
    assert made == numbers_tex(ROOT/'paper', paper_numbers(ROOT)), 'run `dvc repro`'
    lines = [l for l in made.splitlines() if l.startswith(r'\defnumber')]
    assert len(lines) == len(used_numbers(ROOT/'paper')) > 20
    for line in lines: assert (ROOT/re.fullmatch(r'.* % ((results/[\w-]+|benchmarks)/[\w-]+\.json)', line)[1]).exists()


def test_the_long_results_are_those_of_their_run(): check_stamp(ROOT/'results/full')


SECTIONS = {f.stem: f.read_text(encoding='utf-8') for f in sorted((ROOT/'paper/sections').glob('*.tex'))}
FLOAT = re.compile(r'\\begin\{(figure|table)\}.*?\\end\{\1\}', re.S)
uncommented = lambda text: re.sub(r'(?<!\\)%.*', '', text)
FLOATS = [m[0] for text in SECTIONS.values() for m in FLOAT.finditer(text)]


def test_the_paper_types_no_results_by_hand():
    text = '\n'.join(SECTIONS.values())
    text = re.sub(r'\\(num|pct|est|gain|cite\w*|cref|label|ref|input|includegraphics(\[[^\]]*\])?)\{[^}]*\}', '', uncommented(text))
    assert not re.findall(r'(?<![\w.$=])(?:0?\.\d{3,}|\d+\.\d+\s*\\%)', text)


def test_figures_and_tables_used_are_committed_outputs():
    used = drawn_in('\n'.join(SECTIONS.values()))
    assert len(used) >= 4
    for name in used: assert (ROOT/'paper'/name).exists(), name


def drawn_in(text): # the generated files that a piece of the paper shows
    text = uncommented(text)
    return (re.findall(r'\\includegraphics(?:\[[^\]]*\])?\{([^}]*)\}', text)
            + [f'{t}.tex' for t in re.findall(r'\\input\{(tables/[^}]*)\}', text)])


def label_of(piece): return re.search(r'\\label\{([^}]*)\}', piece)[1]


def files_of(piece): # the files of results that a caption names
    return {source_of(f'{profile}:{stage}') for stage,profile in re.findall(r'\\source\{([^}]*)\}\{([^}]*)\}', piece)}


def numbers_in(text): return re.findall(r'\\(num|pct|est|gain)\{([^}]+)\}', text)


@pytest.mark.parametrize('piece', FLOATS, ids=label_of)
def test_a_caption_names_the_results_that_it_shows(piece):
    "Stage and profile, with a file that exists, and of the same profile as the generated files that are shown"
    caption = piece[piece.index(r'\caption'):]
    files = files_of(uncommented(caption))
    assert files, 'no \\source{stage}{profile} in the caption'
    for f in files: assert (ROOT/f).exists(), f
    assert {f.split('/')[1] for f in drawn_in(piece)} <= {f.split('/')[1] for f in files}
    missing = {source_of(k) for _,k in numbers_in(piece)} - files
    assert not missing, f'numbers of {missing}, which the caption does not name'


def sentences_of(text): # lines of prose, without floats and commands that stand alone
    lines = [l.strip() for l in FLOAT.sub('', text).splitlines()]
    return [l for l in lines if l and not re.fullmatch(r'(\\(begin|end|section|label)\{[^}]*\})+', l)]


@pytest.mark.parametrize('name', ['abstract', 'introduction', 'conclusion'])
def test_each_sentence_that_claims_something_names_its_source(name):
    """One sentence a line; its comment names labels, or says that it claims nothing. A number is in the file of results of a
    table or figure that is named"""
    labels = set(re.findall(r'\\label\{([^}]*)\}', '\n'.join(SECTIONS.values())))
    floats = {label_of(f): files_of(f) for f in FLOATS}
    for line in sentences_of(SECTIONS[name]):
        said, _, comment = line.partition(' % ')
        assert not re.search(r'[a-z}]\. [A-Z\\]', said), f'two sentences on a line: {line}'
        if comment == 'no claim':
            assert not numbers_in(said), f'a number is a claim: {line}'
            continue
        assert comment.startswith('from: '), f'no source: {line}'
        named = comment.removeprefix('from: ').split(', ')
        assert set(named) <= labels, f'no such label: {line}'
        files = set().union(*(floats.get(x, set()) for x in named))
        missing = {source_of(k) for _,k in numbers_in(said)} - files
        assert not missing, f'{line}\nhas numbers of {missing}, of which no table or figure is named'


@pytest.mark.parametrize('name', SECTIONS)
def test_no_paragraph_carries_more_than_six_numbers(name):
    for paragraph in re.split(r'\n\s*\n', FLOAT.sub('', SECTIONS[name])):
        count = sum(3 if macro in ESTIMATES else 1 for macro,_ in numbers_in(paragraph))
        assert count <= 6, f'{count} numbers: {paragraph[:200]}'


def test_every_work_that_is_cited_is_in_the_bibliography_and_none_else():
    cited = {k.strip() for text in [*SECTIONS.values(), *(f.read_text() for f in (ROOT/'paper/tables').rglob('*.tex'))]
             for keys in re.findall(r'\\[cC]ite\w*\{([^}]*)\}', text) for k in keys.split(',')}
    listed = re.findall(r'^@\w+\{([^,]+),', (ROOT/'paper/references.bib').read_text(encoding='utf-8'), re.M)
    assert len(listed) == len(set(listed)) and set(listed) == cited, cited ^ set(listed)


def test_nothing_speaks_of_one_machine():
    files = [ROOT/f for f in run('git', 'ls-files', '-co', '--exclude-standard',
                                 cwd=ROOT).stdout.splitlines()]
    hosts = ['py' + 'pi.org', 'python' + 'hosted', 'deb' + 'ian.org', '/ro' + 'ot/', '/wo' + 'rk/',
             '/ho' + 'me/']
    for f in files:
        if f.suffix in ('.pdf', '.png', '.safetensors') or not f.is_file(): continue
        text = f.read_text(encoding='utf-8')
        for h in hosts: assert h not in text, f'{f.name} names {h}'


def test_clean_clone_is_up_to_date(clone):
    "With the models and tokens missing, DVC still knows that nothing has changed"
    done = run('dvc', 'repro', '--allow-missing', '--dry', cwd=clone)
    assert 'Data and pipelines are up to date' in done.stdout + done.stderr, done.stdout


def test_the_switch_of_the_paper_is_right_about_every_prompt_of_its_test():
    p = load_profile('full', ROOT)
    questions, opens = prompts_of(p, 'test', p.primary.split())
    ends = lambda prompts: [asks(x) for x in prompts]
    assert len(opens) == 100 and not any(ends(opens))
    assert sum(map(len, questions.values())) == 161 and all(all(ends(x)) for x in questions.values())


def test_make_paper_waits_for_what_a_stage_needs_and_for_nothing_else():
    "The order of two stages at a time, in the Makefile, is that of dvc.yaml"
    makes, reads = {}, {}
    for name,x in STAGES.items():
        x = x.get('do', x)
        path = lambda out: (next(iter(out)) if isinstance(out, dict) else out).replace('${item}', 'embedded')
        makes |= {path(out): name for out in (*x.get('outs', ()), *x.get('metrics', ()))}
        reads[name] = {path(d) for d in x.get('deps', ())}
    def needs(of, name): return of(name).union(*(needs(of, n) for n in of(name)))
    from_dvc = lambda name: {makes[d] for d in reads[name] if d in makes}
    text = (ROOT/'Makefile').read_text()
    lines = re.findall(r'^(stages/[a-z_ /-]+): ([^|\n]+)$', text, re.M) # after a bar is what may go first, and need not
    of = lambda name: ' '.join(found for targets,found in lines if f'stages/{name}' in targets.split())
    from_make = lambda name: {d.removeprefix('stages/') for d in of(name).split()}
    begun = ' '.join(re.findall(r'^(?:STAGES|FIGURES) = (.+)$', text, re.M)).replace('$(FIGURES)', '').split()
    assert len(begun) == len({*begun}) and {*STAGES} - {*begun} == {'cost', 'figures', 'summary', 'numbers', 'paper'}
    for name in begun: assert needs(from_make, name) == needs(from_dvc, name), name
