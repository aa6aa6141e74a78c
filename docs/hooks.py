"""The pages of the site that are made and not written: notebooks, figures, the table of decoders and the reference. mkdocs
calls the functions that begin with `on_`."""
import csv, html, io, json, re
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
"""


# notebooks

def pages(links):
    "Links to notebooks become links to their pages"
    return re.sub(r'\]\(([\w/]+)\.ipynb\)', r'](\1.md)', links)


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
            stage = lambda x: f'[`{x}`]({x}), made by the stage {stage_link(made[x])}'
            path = f'paper/figures/{profile}/{name}'
            lines += [f'### {name} {{ #{profile}-{name} }}\n', f'{doc}.\n', f'![{doc}]({path}.svg)\n',
                      f'Drawn from {"; ".join(map(stage, needs))}. [PDF]({path}.pdf)\n']
    return '\n'.join(lines)


def decoder_table():
    "results/full/frontier.csv as a table that docs/site.js sorts"
    rows = list(csv.DictReader((ROOT/'results/full/frontier.csv').open(encoding='utf-8')))
    number = lambda r, k, form='.3f': format(float(r[k]), form) if r[k] else ''
    def interval(r, k, lo, hi, form='.3f'):
        return f'{number(r, k, form)} <small>[{number(r, lo, form)}, {number(r, hi, form)}]</small>' if r[lo] else number(r, k, form)
    columns = {'decoder': ('method', lambda r: html.escape(r['method'])),
               'right answers': ('accuracy', lambda r: interval(r, 'accuracy', 'lo', 'hi')),
               'variety': ('diversity', lambda r: number(r, 'diversity')),
               'above the constants': ('excess', lambda r: interval(r, 'excess', 'excess_lo', 'excess_hi', '+.3f')),
               'kind': ('kind', lambda r: r['kind'])}
    head = ''.join(f'<th aria-sort="none"><button>{c}</button></th>' for c in columns)
    cell = lambda r, key, show: f'<td data-value="{html.escape(r[key])}">{show(r)}</td>'
    body = '\n'.join('<tr>' + ''.join(cell(r, *x) for x in columns.values()) + '</tr>' for r in rows)
    return f'<div class="wide"><table class="sortable"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


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
    for x in {x for drawn in found.values() for _,_,needs in drawn.values() for x in needs}: add(x, path=ROOT/x)
    if (ROOT/'paper/main.pdf').exists(): add('paper/main.pdf', path=ROOT/'paper/main.pdf')
    notebooks = made_by()
    for m in modules():
        n = notebooks[m]
        add(f'reference/{m}.md', f'# {m}\n\n<p class="where" markdown>Made by [{title(n)}](../nbs/{n.stem}.md)</p>\n\n::: {m}\n')
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri == 'figures.md': return f'{markdown}\n{figure_page(config.extra["figures"])}'
    if page.file.src_uri == 'decoders.md':
        run = json.loads((ROOT/'results/full/run.json').read_text(encoding='utf-8'))
        return markdown.replace('COMMIT', run['commit']).replace('DATE', run['date']).replace('TABLE', decoder_table())


def on_page_content(html_text, page, config, files):
    "Formulas as MathML"
    def drawn(found):
        block = found[1] == 'div'
        return convert(html.unescape(found[2].strip()[2:-2]), display='block' if block else 'inline')
    return re.sub(r'<(div|span) class="arithmatex">(.+?)</\1>', drawn, html_text, flags=re.S)
