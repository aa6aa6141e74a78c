"""The pages of the site that are made and not written: notebooks, figures, the table of decoders and the reference. mkdocs
calls the functions that begin with `on_`."""
import csv, html, io, json, re, subprocess
from pathlib import Path

import nbformat, yaml
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).parent.parent
GROUPS = {'The idea': 'Idea', 'The study': 'Study', 'Plumbing': 'Plumbing'}
TEMPLATE = """{% extends 'markdown/index.md.j2' %}
{% block input %}
```````python
{{ cell.source }}
```````
{% endblock input %}
{% block stream %}
``````` { .text .output .no-copy }
{{ output.text }}
```````
{% endblock stream %}
{% block data_text scoped %}
``````` { .text .output .no-copy }
{{ output.data['text/plain'] }}
```````
{% endblock data_text %}
{% block data_html scoped %}
<div class="output">{{ output.data['text/html'] }}</div>
{% endblock data_html %}
{% block data_png %}
![What the cell above draws]({{ output.metadata.filenames['image/png'] }})
{% endblock data_png %}
{% block markdowncell scoped %}
{{ cell.source }}

<!-- a list ends with its cell -->
{% endblock markdowncell %}
"""


# notebooks

def pages(links):
    "Links to notebooks become links to their pages, and what lies in docs/ is at the root of the site"
    return re.sub(r'\]\(([\w/]+)\.ipynb\)', r'](\1.md)', links).replace('docs/token-page.png', 'token-page.png')


def title(path): return nbformat.read(path, 4).cells[0].source.split('\n')[0].lstrip('# ')


def shown(notebook):
    "The cells that a reader sees, without the lines that speak to nbdev; the module that the page makes, if it makes one"
    module, cells = None, []
    for c in notebook.cells:
        directives = re.findall(r'^#\| *(.+)\n?', c.source, re.M) if c.cell_type == 'code' else []
        made = [d.split()[1] for d in directives if d.startswith('default_exp')]
        module = made[0] if made else module
        if c.cell_type == 'code': c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M).strip()
        if c.source and 'hide' not in directives: cells.append(c)
    notebook.cells = cells
    return notebook, module


def page(path):
    "A notebook as Markdown, and its pictures {name: bytes}"
    notebook, module = shown(nbformat.read(path, 4))
    config = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags={'hide-input'}))
    resources = dict(unique_key=path.stem, output_files_dir=f'{path.stem}_files')
    text, found = MarkdownExporter(config=config, raw_template=TEMPLATE).from_notebook_node(notebook, resources)
    text = re.sub(r'<style scoped>.*?</style>|border="1" class="dataframe"', '', pages(text), flags=re.S)
    where = [f'[Notebook]({path.name}){{ download }}']
    up = '../'*len(path.parent.relative_to(ROOT).parts)
    if module: where.append(f'makes [`simpledeco.{module}`]({up}reference/simpledeco.{module}.md)')
    heading, rest = text.strip().split('\n', 1)
    return f'{heading}\n\n<p class="where" markdown>{", ".join(where)}</p>\n{rest}\n', found['outputs']


def made_by():
    "{module: the notebook that makes it}"
    found = {p: shown(nbformat.read(p, 4))[1] for p in sorted((ROOT/'nbs').glob('*.ipynb'))}
    return {f'simpledeco.{module}': p for p,module in found.items() if module}


def listed(readme):
    "{group: names of notebooks, in order}, as the README lists them: links, names and ranges from name to name"
    names = sorted(p.stem for p in (ROOT/'nbs').glob('*.ipynb') if p.stem != 'index')
    section = re.search(r'^## The notebooks\n(.+?)^## ', readme, re.M | re.S)[1]
    groups = {}
    for group,text in re.findall(r'^\*\*([^*:,]+)[^\n]*\n(.+?)(?=^\*\*|\Z)', section, re.M | re.S):
        found = groups[group.strip()] = []
        for first,last,one in re.findall(r'`(\w+)` to `(\w+)`|(?:nbs/|`)(\w+)(?:\.ipynb|`)', text):
            found += [n for n in names if first <= n <= last] if first else [one] if one in names else []
    missing = set(names) - {n for g in groups.values() for n in g}
    if missing: raise PluginError(f'README.md does not list {", ".join(sorted(missing))} under "The notebooks"')
    return groups


# results

def stages(profile):
    "{a file of results: the stage that makes it}, for one profile, from its dvc.yaml"
    own = ROOT/'results'/profile/'dvc.yaml'
    found = yaml.safe_load((own if own.exists() else ROOT/'dvc.yaml').read_text(encoding='utf-8'))['stages']
    outs = lambda s: [next(iter(x)).replace('${item}', profile) for k in ('outs', 'metrics') for x in s.get('do', s).get(k, [])]
    return {out: name for name,s in found.items() for out in outs(s)}


def stage_link(name):
    "A stage, linked to its notebook where it is one and not a script"
    return f'[`{name}`](nbs/pipeline/{name}.md)' if (ROOT/f'nbs/pipeline/{name}.ipynb').exists() else f'`{name}`'


def figures():
    "{profile: {figure: (SVG, what it shows, the files of results that it needs)}}, drawn anew by the code of the paper"
    from simpledeco.study import plots
    from simpledeco.study.settings import load_params
    from simpledeco.study.tables import drawn, FIGURES
    params, found = load_params(ROOT), {}
    for folder in sorted((ROOT/'paper/figures').iterdir()):
        c = drawn(ROOT, folder.name, params['train_corpora'].split(), params['risk'])
        for name in sorted(p.stem for p in folder.glob('*.pdf')):
            out = io.BytesIO()
            with plots.plt.rc_context({'svg.hashsalt': 'simpledeco'}):
                FIGURES[name].draw(c).savefig(out, format='svg', metadata=dict(Date=None))
            needs = [f'results/{folder.name}/{x}.csv' for x in FIGURES[name].needs]
            about = getattr(plots, f'plot_{"frontier" if name == "front" else name}').__doc__ # page one has a few of its decoders
            found.setdefault(folder.name, {})[name] = out.getvalue(), about, needs
    return found


def figure_page(found):
    lines = []
    for profile,drawn in found.items():
        made = stages(profile)
        lines.append(f'## Profile `{profile}`\n')
        for name,(_, doc, needs) in drawn.items():
            stage = lambda x: f'[`{x}`]({x}), made by the stage {stage_link(made[x])} with the commit {commit_of(x)}'
            path = f'paper/figures/{profile}/{name}'
            lines += [f'### {name} {{ #{profile}-{name} }}\n', f'{doc}.\n', f'![{doc}]({path}.svg)\n',
                      f'Drawn from {"; ".join(map(stage, needs))}. [PDF]({path}.pdf)\n']
    return '\n'.join(lines)


# the leaderboard

CONSTANT = 'static, min-p' # what the ladder calls it
# where decoders are measured: {heading: (what is compared, file of results, which task of it)}
BOARDS = {
    'Questions and open prompts: SmolLM2-135M': ('frontier', 'results/full/frontier.csv', None),
    'The same, with the prompts of `make paper`': ('frontier', 'results/embedded/frontier.csv', None),
    'Questions and open prompts: Gemma-3-270M, pretrained only': ('frontier', 'results/gemma-full/frontier.csv', None),
    'Public questions and instructions: SmolLM2-135M': ('public', 'benchmarks/public.json', None),
    'Public questions and instructions: Gemma-3-270M, pretrained only': ('public', 'benchmarks/public-gemma.json', None),
    'Questions, asked by lm-eval: SmolLM2-135M': ('harness', 'results/embedded/benchmarks.json', None),
    'Facts, creative: SmolLM2-135M': ('rungs', 'results/rungs/rungs_gains.csv', 'facts | creative'),
    'Plain questions, open requests, without a question mark: SmolLM2-135M': ('rungs', 'results/rungs/rungs_gains.csv', 'plain | openly'),
    'A fact inside fiction: SmolLM2-135M': ('rungs', 'results/rungs/rungs_gains.csv', 'inside'),
    'A fact inside fiction, in new places: SmolLM2-135M': ('rungs', 'results/rungs-elsewhere/rungs_gains.csv', 'elsewhere'),
    'A fact inside fiction, in the places that were left: SmolLM2-135M': ('rungs', 'results/rungs-further/rungs_gains.csv', 'further'),
    'A fact inside fiction, in all places: SmolLM2-135M': ('rungs', 'results/rungs-further/rungs_gains.csv', 'all places'),
    'Facts, creative: Gemma-3-270M, pretrained only': ('rungs', 'results/gemma/rungs_gains.csv', 'facts | creative'),
    'A fact inside fiction: Gemma-3-270M, pretrained only': ('rungs', 'results/gemma/rungs_gains.csv', 'inside'),
    'A fact inside fiction, in new places: Gemma-3-270M': ('rungs', 'results/gemma-elsewhere/rungs_gains.csv', 'elsewhere'),
    'A fact inside fiction, in the places that were left: Gemma-3-270M': ('rungs', 'results/gemma-further/rungs_gains.csv', 'further'),
    'A fact inside fiction, in all places: Gemma-3-270M': ('rungs', 'results/gemma-further/rungs_gains.csv', 'all places'),
    'Sets of valid answers: SmolLM2-135M': ('sets', 'results/embedded/ladder.json', None),
    'Sets of valid answers: Gemma-3-270M, pretrained only': ('sets', 'results/gemma/ladder.json', None),
    'Reference text, by corpus: SmolLM2-135M': ('text', 'results/embedded/evaluate.json', None),
    'Reference text, by corpus: Gemma-3-270M, pretrained only': ('text', 'results/gemma-full/evaluate.json', None),
    'Reference text, against a tuned constant: SmolLM2-135M': ('tuned', 'results/embedded/controls.json', None),
    'Reference text, against a tuned constant: Gemma-3-270M, pretrained only': ('tuned', 'results/gemma-full/controls.json', None)}
SAYS = dict(
    frontier='*Right answers*: the share that the answer key accepts. *Variety*: how different the answers to one open prompt are. '
             '*Above the constants*: accuracy over that of the constant temperature which is as varied.',
    public='The same measures, on questions and instructions that nobody here wrote. *Switch*: greedy after a question mark. The head is '
           'by token, and *first T, kept* is the head with its first temperature for the whole answer.',
    harness='The head is the one by token, *judged, left out*; *MeanShift* is its mean temperature everywhere. The file has the shares '
            'by corpus too.',
    rungs='Each decoder has several strengths, and is read off where it is as varied as a constant. *Above*: how much more often it is '
          'right there than that, and the head by token than it; empty where one of both is never as varied, without an interval '
          'where fewer than 95% of the resamples are. A decoder without a value is as varied as none of these constants.',
    sets='The expected number of distinct valid answers in several draws, exact, without sampling. The oracles know the set.',
    text='The expected probability of the true token. A constant that keeps more of the tokens has less of it: see the figure *tradeoff*.',
    tuned='The quadratic score, over that of the constant temperature that does best on the calibration split. *Tuned*: the decoder is '
          'at the setting that does best there.')


def commit_of(path):
    "The commit that made a file of results, with its date"
    run = (ROOT/path).parent/'run.json'
    if run.exists(): return '`{commit}` of {date}'.format(**json.loads(run.read_text(encoding='utf-8')))
    made = subprocess.run(['git', 'log', '-1', '--format=`%h` of %as', '--', path], cwd=ROOT, capture_output=True, text=True)
    return made.stdout.strip() or 'that is not known here'


def measured(row, value, lo='', hi='', form='.3f'):
    "What a cell is sorted by, and what it shows: a number with its interval, or nothing"
    if not row or row[value] in ('', None): return '', ''
    shown = lambda k: format(float(row[k]), form)
    between = f' <small>[{shown(lo)}, {shown(hi)}]</small>' if lo and row[lo] not in ('', None) else ''
    return float(row[value]), shown(value) + between


def frontier_rows(data, _):
    gained = lambda r: measured(r, 'excess', 'excess_lo', 'excess_hi', '+.3f')
    return [{'decoder': (r['method'],)*2, 'right answers': measured(r, 'accuracy', 'lo', 'hi'), 'variety': measured(r, 'diversity'),
             'above the constants': gained(r), 'kind': (r['kind'],)*2} for r in data]


def rungs_rows(data, task):
    data = [r for r in data if r['task'] == task]
    of, levels = {(r['decoder'], r['rival'], r['at']): r for r in data}, list(dict.fromkeys(r['at'] for r in data))
    names = list(dict.fromkeys(r['decoder'] for r in data if r['rival'] == CONSTANT))
    for r in data: # how often the constant itself is right, from any decoder that is compared with it
        if r['rival'] == CONSTANT and r['gain']: of[CONSTANT, CONSTANT, r['at']] = dict(good=float(r['good']) - float(r['gain']), gain='')
    above = lambda *key: measured(of.get(key), 'gain', 'lo', 'hi', '+.3f')
    def row(name):
        return {'decoder': (name,)*2} | {f'{what}, {at}': cell for at in levels for what,cell in {
            'right answers': measured(of.get((name, CONSTANT, at)), 'good'), 'above a constant': above(name, CONSTANT, at),
            'by token above it': above('by token', name, at)}.items()}
    rows = [row(n) for n in [CONSTANT, *names]]
    filled = [c for c in rows[0] if any(r[c][1] != '' for r in rows)]
    return [{c: r[c] for c in filled} for r in rows]


def sets_rows(data, _):
    gains = {k.removesuffix(f' over {CONSTANT}'): r for k,r in data['gains'].items() if k.endswith(CONSTANT)}
    constant = dict(value=next(iter(gains.values()))['rival'])
    rows = [(f'oracle: {k}', measured(r, 'mean', 'lo', 'hi', '.2f'), ('', '')) for k,r in data['oracles'].items()]
    rows += [('a constant', measured(constant, 'value', form='.2f'), ('', ''))]
    rows += [(k, measured(r, 'value', form='.2f'), measured(r, 'mean', 'lo', 'hi', '+.2f')) for k,r in gains.items()]
    return [{'decoder': (name,)*2, 'valid answers': valid, 'above the constant': above} for name,valid,above in rows]


def text_rows(data, _):
    scores = data['scores']
    cells = lambda name: {corpus: measured(found[name]['p_true'], 'mean', 'lo', 'hi') for corpus,found in scores.items()}
    return [{'decoder': (name,)*2} | cells(name) for name in next(iter(scores.values()))]


def tuned_rows(data, _):
    cells = lambda found: {corpus: measured(gains['static'], 'mean', 'lo', 'hi', '+.3f') for corpus,gains in found.items()}
    return [{'decoder': (name,)*2} | cells(found) for name,found in data['gains'].items()]


def public_rows(data, _):
    share = lambda r: measured(r, 'mean', 'lo', 'hi')
    return [{'decoder': (r['decoder'],)*2, 'right answers': share(r['right']), 'variety': share(r['variety']),
             'above the constants': measured(r['above'], 'mean', 'lo', 'hi', '+.3f')} for r in data['decoders']]


def harness_rows(data, _):
    return [{'decoder': (name,)*2, 'right answers': measured(r['all'], 'mean', 'lo', 'hi'),
             'the head above it': measured(data['against'].get(name), 'mean', 'lo', 'hi', '+.3f')} for name,r in data['methods'].items()]


def sortable(rows):
    "A table that docs/site.js sorts"
    head = ''.join(f'<th aria-sort="none"><button>{html.escape(c)}</button></th>' for c in rows[0])
    cell = lambda value, shown: f'<td data-value="{html.escape(str(value))}">{shown}</td>'
    body = '\n'.join('<tr>' + ''.join(cell(*x) for x in r.values()) + '</tr>' for r in rows)
    return f'<div class="wide"><table class="sortable"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def leaderboard():
    "Every decoder on every task and model, from results that are committed"
    rows_of = dict(frontier=frontier_rows, public=public_rows, harness=harness_rows, rungs=rungs_rows, sets=sets_rows, text=text_rows,
                   tuned=tuned_rows)
    sections, said = [], set()
    for heading,(kind, path, task) in BOARDS.items():
        text = (ROOT/path).read_text(encoding='utf-8')
        data = json.loads(text) if path.endswith('.json') else list(csv.DictReader(io.StringIO(text)))
        about = '' if kind in said else f'{SAYS[kind]}\n\n'
        said.add(kind)
        sections.append(f'## {heading}\n\n{about}[`{path}`]({path}), made with the commit {commit_of(path)}.\n\n'
                        f'{sortable(rows_of[kind](data, task))}\n')
    return '\n'.join(sections)


# the package

def modules():
    "The modules of the package and of the study, by their dotted names"
    paths = [p.relative_to(ROOT).with_suffix('') for p in sorted((ROOT/'simpledeco').rglob('*.py')) if p.stem[0] != '_']
    return ['.'.join(p.parts) for p in paths]


# what mkdocs calls

def on_config(config):
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    stage_pages = [f'nbs/pipeline/{p.name[:-6]}.md' for p in sorted((ROOT/'nbs/pipeline').glob('*.ipynb'))]
    nav = [{'Home': 'index.md'}]
    for group,names in listed(readme).items(): nav.append({group: [f'nbs/{n}.md' for n in names]})
    study = lambda m: m.startswith('simpledeco.study')
    of = lambda wanted: [{m.removeprefix('simpledeco.'): f'reference/{m}.md'} for m in modules() if study(m) == wanted]
    results = ['decoders.md', 'figures.md', {'Stages of the pipeline': stage_pages}]
    if (ROOT/'paper/main.pdf').exists(): results.insert(0, {'The paper (PDF)': 'paper/main.pdf'})
    config.nav = [*nav, {'Results': results}, {'Reference': [{'Package': of(False)}, {'Study': of(True)}]}]
    return config


def on_files(files, config):
    def add(uri, content=None, path=None):
        files.append(File.generated(config, uri, content=content, abs_src_path=path and str(path)))
    add('index.md', '---\nhide: [navigation]\n---\n' + pages((ROOT/'README.md').read_text(encoding='utf-8')))
    for path in [*(ROOT/'nbs').glob('*.ipynb'), *(ROOT/'nbs/pipeline').glob('*.ipynb')]:
        if path.stem == 'index': continue
        uri = path.relative_to(ROOT).as_posix()
        text, pictures = page(path)
        add(uri.replace('.ipynb', '.md'), text)
        add(uri, path=path)
        for name,data in pictures.items(): add(f'{Path(uri).parent.as_posix()}/{name}', data)
    config.extra['figures'] = found = figures()
    for profile,drawn in found.items():
        for name,(svg, _, needs) in drawn.items():
            add(f'paper/figures/{profile}/{name}.svg', svg)
            add(f'paper/figures/{profile}/{name}.pdf', path=ROOT/f'paper/figures/{profile}/{name}.pdf')
    shown = {x for drawn in found.values() for _,_,needs in drawn.values() for x in needs}
    for x in shown | {path for _,path,_ in BOARDS.values()}: add(x, path=ROOT/x)
    if (ROOT/'paper/main.pdf').exists(): add('paper/main.pdf', path=ROOT/'paper/main.pdf')
    notebooks = made_by()
    for m in modules():
        n = notebooks[m]
        add(f'reference/{m}.md', f'# {m}\n\n<p class="where" markdown>Made by [{title(n)}](../nbs/{n.stem}.md)</p>\n\n::: {m}\n')
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri == 'figures.md': return f'{markdown}\n{figure_page(config.extra["figures"])}'
    if page.file.src_uri == 'decoders.md': return markdown.replace('TABLES', leaderboard())


def on_page_content(html_text, page, config, files):
    "Formulas as MathML"
    def drawn(found):
        block = found[1] == 'div'
        made = convert(html.unescape(found[2].strip()[2:-2]), display='block' if block else 'inline')
        return re.sub(r'(<mi>log</mi>)(?=<m(?:i|sub|frac)\b)', r'\1<mspace width=".17em"/>', made) # log x, not logx
    return re.sub(r'<(div|span) class="arithmatex">(.+?)</\1>', drawn, html_text, flags=re.S)
